"""Packed sequences give what each sequence gives alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_config

from effllm.train.attention import NAME, _in_kernels, _packed_attention, implementation, register, sequence_index
from effllm.train.objectives import position_offset

LENGTHS = [40, 7, 1, 33, 5]
# Two orders of float32 sums over some hundred terms of size ten: a few units in the last place.
ROUNDING = 5e-6


def places_of(lengths: list[int]) -> torch.Tensor:
    return torch.from_numpy(sequence_index(np.array(lengths)))


def random_model(architecture: str, implementation: str):
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(
        make_config(architecture, 300, None), attn_implementation=implementation
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_is_unpacked(architecture: str) -> None:
    register()
    ids = [torch.randint(5, 300, (n,)) for n in LENGTHS]
    alone = random_model(architecture, "eager")
    packed = random_model(architecture, NAME)
    with torch.inference_mode():
        expected = torch.cat([alone(input_ids=i[None]).logits[0] for i in ids])
        places = torch.cat([torch.arange(n) for n in LENGTHS]) + position_offset(packed)
        index = places_of(LENGTHS)
        got = packed(input_ids=torch.cat(ids)[None], position_ids=places[None], sequence_index=index).logits[0]
    assert (got - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_a_neighbour_changes_nothing_even_when_it_is_not_a_number() -> None:
    register()
    module = torch.nn.Module()
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    index = places_of([4, 5])
    clean, _ = _packed_attention(module, q, k, v, None, sequence_index=index)
    for x in (q, k, v):
        x[:, :, 4:] = torch.nan
    poisoned, _ = _packed_attention(module, q, k, v, None, sequence_index=index)
    assert torch.equal(clean[:, :4], poisoned[:, :4])


def test_the_window_ends_where_transformers_ends_it() -> None:
    q, k = torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9, 4)
    v = torch.eye(9)[None, None]
    out, _ = _packed_attention(torch.nn.Module(), q, k, v, None, sliding_window=3, sequence_index=places_of([9]))
    seen = out[0, :, 0] > 0
    places = torch.arange(9)
    assert torch.equal(seen, (places[:, None] - places[None, :]).abs() <= 2)


def test_boundaries_are_demanded() -> None:
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="sequence_index"):
        _packed_attention(torch.nn.Module(), x, x, x, None)


@pytest.mark.parametrize("window", [None, 4])
def test_the_kernels_compute_the_same(window: int | None) -> None:
    pytest.importorskip("effllm_kernels")
    q, k, v = (torch.randn(1, 2, sum(LENGTHS), 16) for _ in range(3))
    index = places_of(LENGTHS)
    expected, _ = _packed_attention(torch.nn.Module(), q, k, v, None, sequence_index=index, sliding_window=window)
    got = _in_kernels(q, k, v, index >= 0, 0.0, None, window)
    assert (got[None] - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels")
def test_without_a_gpu_torch_computes() -> None:
    assert implementation() == "torch"
