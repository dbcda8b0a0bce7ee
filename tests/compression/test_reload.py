"""Packed and resized layers in transformers: what is stored, what comes back, and that zeros survive training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LABELS, WORDS
from safetensors.torch import load_file
from torch import nn

import effllm
from effllm.compression import parse_method
from effllm.compression.layers import linears
from effllm.hf import LowRankLinear, SparseLinear, describe_in_config, load, pack_bits, stored_linears, unpack_bits

TEXTS = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(4 + i % 9)) for i in range(40)]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    labels = LABELS["text-classification"]
    file.write_text("".join(json.dumps({"text": t, "label": labels[i % 3]}) + "\n" for i, t in enumerate(TEXTS)))
    return file


@pytest.fixture(scope="module")
def pruned(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    effllm.compress(classifier, out, method=parse_method("magnitude:sparsity=0.7"), calib=TEXTS, max_drop=1.0)
    return out


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 13), (4, 64)])
def test_bits_come_back_as_they_were(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    bits = pack_bits(mask)
    assert bits.shape == (shape[0], -(-shape[1] // 8))
    np.testing.assert_array_equal(bits.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpack_bits(bits, shape[1]), mask)


def test_a_masked_weight_gets_no_gradient_and_no_momentum() -> None:
    torch.manual_seed(0)
    linear = SparseLinear.of(nn.Linear(6, 4), torch.rand(4, 6) < 0.5)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        linear(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not linear.weight[~linear.mask].any()
    assert linear.weight[linear.mask].all()
    assert not optimizer.state[linear.weight]["exp_avg"][~linear.mask].any()


def test_fine_tuning_a_pruned_folder_keeps_its_zeros_and_its_size(pruned: Path, train: Path, tmp_path: Path) -> None:
    settings = effllm.FinetuneSettings(steps=4, batch_size=8, learning_rate=1e-2)
    for _ in effllm.finetune(pruned, tmp_path / "tuned", task="text-classification", train=train, settings=settings):
        pass
    before, after = linears(load(pruned)), linears(load(tmp_path / "tuned"))
    for name, linear in before.items():
        assert torch.equal(linear.mask, after[name].mask)
        assert not torch.equal(linear.weight, after[name].weight)
        assert not after[name].weight[~linear.mask].any()
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (pruned, tmp_path / "tuned")]
    assert abs(sizes[0] - sizes[1]) < 100


def test_factors_and_other_widths_reload_by_the_plain_class(classifier: Path, tmp_path: Path) -> None:
    import transformers

    model = load(classifier)
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense, layer.output.dense = nn.Linear(32, 17), nn.Linear(17, 32)
    layer.attention.output.dense = LowRankLinear(32, 32, 5, bias=True)
    describe_in_config(model)
    model.save_pretrained(tmp_path / "out")
    again, info = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert stored_linears(again) == stored_linears(model)
    assert len(stored_linears(again)) == 3
    ids = torch.tensor([[2, 7, 11, 3]])
    # Weights of odd widths lie otherwise in memory once reloaded, and are summed in another order.
    torch.testing.assert_close(model(ids).logits, again.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    headless = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert headless.encoder.layer[0].intermediate.dense.out_features == 17


def test_a_model_in_which_nothing_differs_has_no_entry(classifier: Path) -> None:
    model = load(classifier)
    describe_in_config(model)
    assert not hasattr(model.config, "quantization_config")


def test_only_the_values_that_are_not_zero_are_stored(pruned: Path) -> None:
    stored = load_file(pruned / "model.safetensors")
    values = [v for k, v in stored.items() if k.endswith("weight_values")]
    assert len(values) == 12
    assert all(v.all() for v in values)
    assert not any(k.endswith("query.weight") for k in stored)
