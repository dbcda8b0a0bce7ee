"""Which keys count: padding, holes, windows, pruned heads, and what the memory of the others holds."""

from __future__ import annotations

import pytest
import torch
from effllm_kernels import attention, reference
from effllm_kernels.fused_attention import attention_terms
from effllm_kernels.record import Case
from oracle import assert_as_exact_as_torch, exact, output_gradient, plain, results

BATCH, LENGTH, HEADS, WIDTH = 3, 40, 2, 16


def tensors(device: str, dtype=torch.float16, length: int = LENGTH) -> dict[str, torch.Tensor]:
    return Case("m", batch=BATCH, queries=length, keys=length, heads=HEADS, width=WIDTH).inputs(dtype, device)


def mask_of(kind: str, device: str) -> torch.Tensor:
    position = torch.arange(LENGTH, device=device).expand(BATCH, -1)
    lengths = torch.tensor([LENGTH, 7, 23], device=device)[:, None]
    if kind == "right":
        return position < lengths
    if kind == "left":
        return position >= LENGTH - lengths
    return (position < lengths) & (position % 3 != 1)


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_equals_leaving_the_padding_out(kind, dtype, device):
    given, mask = tensors(device), mask_of(kind, device)
    out = attention(**given, key_mask=mask.to(dtype), query_mask=mask.to(dtype))
    for n in range(BATCH):
        alone = attention(*(given[name][n : n + 1, mask[n]] for name in "qkv"))
        torch.testing.assert_close(out[n, mask[n]], alone[0], rtol=2e-3, atol=2e-3)
        assert not out[n, ~mask[n]].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("by", ["lengths", "mask"])
def test_poison_in_padded_places_changes_no_bit(poison, by, device):
    given, dout = tensors(device, torch.float32), None
    mask = mask_of("right" if by == "lengths" else "holes", device)
    lengths = mask.sum(1, dtype=torch.int32)
    masks = {"key_lengths": lengths, "query_lengths": lengths}
    given |= masks if by == "lengths" else {"key_mask": mask, "query_mask": mask}
    given["bias"] = torch.randn(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)).to(device)
    dout = output_gradient(given)
    clean = results(attention, given, dout)
    bad = {name: torch.where(mask[:, :, None, None], given[name], poison) for name in "qkv"}
    bad["bias"] = torch.where(mask[:, None, :, None] & mask[:, None, None, :], given["bias"], poison)
    dirty = results(attention, given | bad, torch.where(mask[:, :, None, None], dout, poison))
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
        if name != "dbias":
            assert not dirty[name][~mask].any()


def test_rows_that_see_nothing_are_zero_with_zero_gradients(device):
    given = tensors(device) | {"key_lengths": torch.tensor([0, 5, LENGTH], dtype=torch.int32, device=device)}
    got = results(attention, given, output_gradient(given))
    assert all(torch.isfinite(value).all() for value in got.values())
    assert not any(value[0].any() for value in got.values())
    out, lse = attention(**given, return_lse=True)
    assert (lse[0] == -float("inf")).all()
    assert torch.isfinite(lse[1:]).all()
    assert not out[0].any()


def test_causal_rows_before_the_first_key_are_zero(device):
    given = Case("c", batch=1, queries=40, keys=10, heads=1, width=16).inputs(torch.float32, device)
    got = results(lambda **x: attention(**x, causal=True), given, output_gradient(given))
    assert not got["out"][0, :30].any()
    assert got["out"][0, 30:].any()
    assert not got["dq"][0, :30].any()


@pytest.mark.parametrize("window", [2**31 - 1, 2**31 - 40, 2**70, (2**31 - 1, None), (None, 2**31 - 1)])
def test_a_window_past_every_key_is_none(window, device):
    given = Case("w", batch=1, queries=40, keys=40, heads=1, width=16).inputs(torch.float32, device)
    dout = output_gradient(given)
    got, want = results(lambda **x: attention(**x, window=window), given, dout), results(attention, given, dout)
    assert all(torch.equal(value, want[name]) for name, value in got.items())


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 64])
def test_a_window_ends_exactly_where_it_says(size, device):
    """With constant logits the output is the mean of the visible values, here the positions themselves."""
    length = 150
    zero = torch.zeros(1, length, 1, 16, device=device)
    position = torch.arange(length, device=device, dtype=torch.float32)
    out = attention(zero, zero, zero + position[None, :, None, None], window=size)[0, :, 0, 0]
    seen = (position[:, None] - position).abs() <= size
    torch.testing.assert_close(out, (seen * position).sum(1) / seen.sum(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("window", [(3, None), (None, 2), (0, 5), (70, 0)])
def test_one_sided_windows(window, device):
    given = Case("w", batch=1, queries=100, keys=130, heads=1, width=16).inputs(torch.float16, device)
    given["window"] = window
    dout = output_gradient(given)
    got = results(attention, given, dout)
    assert_as_exact_as_torch(got, results(plain, given, dout), results(plain, exact(given), dout))


@pytest.mark.parametrize("level", [-200.0, -120.0, 120.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_logits(level, dtype, device):
    """Rows whose log-sum-exp is far from 0, at a length of 64 past a multiple of 128, with a mask (pytorch#196678)."""
    given = Case("x", batch=1, queries=192, keys=192, heads=1, width=16, terms=("lengths",)).inputs(dtype, device)
    given["q"] = given["q"] * 0.1 + 4 * level / 200
    given["k"] = given["k"] * 0.1 + 12.5
    given.pop("query_lengths")
    dout = output_gradient(given)
    true = results(plain, exact(given), dout)
    assert_as_exact_as_torch(results(attention, given, dout), results(plain, given, dout), true)


def test_pruned_heads_cost_their_groups_nothing(device):
    given = Case("p", batch=1, queries=20, keys=20, heads=4, key_heads=2, width=16).inputs(torch.float32, device)
    dout = output_gradient(given)
    kept = torch.tensor([True, True, True, False], device=device)
    got = results(lambda **x: attention(**x, heads=kept), given, dout)
    whole = results(attention, given, dout * kept[:, None])
    assert not got["out"][:, :, 3].any()
    for name in ("dq", "dk", "dv"):
        torch.testing.assert_close(got[name], whole[name])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_heads_are_kept_where_they_are_not_zero(dtype, device):
    given, kept = tensors(device), torch.tensor([True, False], device=device)
    number = torch.tensor([256.0 if dtype.itemsize > 1 else 3, 0], device=device).to(dtype)
    for run in (attention, lambda **x: reference.forward(*(x[n] for n in "qkv"), attention_terms(**x))[0]):
        assert torch.equal(run(**given, heads=number), run(**given, heads=kept))


@pytest.mark.parametrize("name", ["key_lengths", "query_lengths", "heads", "relative_index"])
def test_one_dimensional_terms_may_have_strides(name, device):
    given = tensors(device) | {
        "key_lengths": torch.tensor([LENGTH, 7, 23], dtype=torch.int32, device=device),
        "query_lengths": torch.tensor([9, LENGTH, 23], dtype=torch.int32, device=device),
        "heads": torch.tensor([True, False], device=device),
        "relative_index": (torch.arange(2 * LENGTH - 1, device=device) % 5).int(),
        "relative_bias": torch.tensor([[1.0, -2, 3, 0, 5]] * HEADS, device=device),
    }
    strided = given | {name: given[name].repeat_interleave(2)[::2]}
    dout = output_gradient(given)
    got, want = results(attention, strided, dout), results(attention, given, dout)
    assert all(torch.equal(value, want[name]) for name, value in got.items())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("value", [3, -5])
def test_a_seed_drops_the_same_in_every_integer_type(dtype, value, device):
    given = tensors(device, torch.float32) | {"dropout_p": 0.3}
    want = attention(**given, seed=value)
    given["seed"] = torch.tensor([value], dtype=dtype, device=device)
    assert torch.equal(attention(**given), want)
    same, _ = reference.forward(*(given[n] for n in "qkv"), attention_terms(**given))
    torch.testing.assert_close(same, want)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"key_lengths": torch.ones(2)}, r"key_lengths must be \(3,\)"),
        ({"key_mask": torch.ones(3, 39)}, r"key_mask must be \(3, 40\)"),
        ({"bias": torch.ones(3, 1, 40, 1)}, "full last dimension"),
        ({"bias": torch.ones(1, 1, 1, 1, 40)}, "at most 4"),
        ({"heads": torch.ones(3, dtype=torch.bool)}, r"heads must be \(2,\)"),
        ({"c2p": torch.ones(3, 40, 2, 5)}, "relative_index goes with"),
        ({"dropout_p": 1.0}, "dropout_p must be at least 0"),
        ({"dropout_p": 0.999995}, "dropout_p must be at least 0"),
        ({"key_lengths": torch.ones(3)}, "key_lengths must be integers"),
        ({"dropout_p": 0.1, "seed": torch.ones(1)}, "seed must be integers"),
        ({"dropout_p": 0.1, "seed": torch.ones(2, dtype=torch.int64)}, r"seed must be \(1,\)"),
        ({"window": -3}, "window must be non-negative"),
        ({"scale": 0.0}, "scale must be greater than 0"),
        ({"k": torch.ones(3, 40, 2, 16)}, "one dtype"),
        ({"v": torch.ones(3, 39, 2, 16, dtype=torch.float16)}, "one shape"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        attention(**(tensors("cpu") | wrong))


def test_the_highest_dropout_that_is_not_all(device):
    given = tensors(device, torch.float32) | {"dropout_p": 65535 / 65536, "seed": 1}
    assert attention(**given).isfinite().all()
