"""Equal inputs give equal bits, whatever else is in the batch; dropout depends on nothing but its seed."""

from __future__ import annotations

import pytest
import torch
from effllm_kernels import KERNELS, attention, flash_attn_varlen_func, reference
from effllm_kernels.record import Case
from oracle import output_gradient, results

EVERYTHING = next(case for case in KERNELS["attention"].cases if case.name == "everything")


def test_repeated_runs_are_equal_bit_for_bit(device):
    given = EVERYTHING.inputs(torch.float16, device)
    dout = output_gradient(given)
    first, second = (results(attention, given, dout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("length", "padded"), [(20, 33), (40, 70)])
def test_a_sequence_does_not_depend_on_its_neighbours_or_padding(length, padded, device):
    """The output never; the gradients while the longest sequence stays on one side of a tile (here 32 keys)."""
    neighbours(length, padded, torch.float32, device)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "padded"), [(60, 140), (130, 300), (30, 520)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_long_sequence_does_not_depend_on_its_neighbours_or_padding(length, padded, dtype, device):
    neighbours(length, padded, dtype, device)


def neighbours(length, padded, dtype, device):
    alone = Case("a", batch=1, queries=length, keys=length, heads=2, width=32).inputs(dtype, device)
    dout = output_gradient(alone)
    want = results(attention, alone, dout)
    batch = Case("b", batch=3, queries=padded, keys=padded, heads=2, width=32).inputs(dtype, device, seed=5)
    lengths = torch.tensor([padded, length, 3], dtype=torch.int32, device=device)
    douts = output_gradient(batch, seed=6)
    for name in "qkv":
        batch[name][1, :length] = alone[name][0]
    douts[1, :length] = dout[0]
    got = results(attention, batch | {"key_lengths": lengths, "query_lengths": lengths}, douts)
    one_path = (length <= 32) == (padded <= 32) if dtype == torch.float32 else (length <= 128) == (padded <= 128)
    for name in want if one_path else ["out"]:
        assert torch.equal(got[name][1, :length], want[name][0]), name


def test_the_dropout_mask_is_philox_of_seed_head_row_and_key(device):
    """Values that are the identity show the probabilities; without logits each kept one is 1 / (S · kept rate)."""
    batch, length, heads = 2, 64, 2
    zero = torch.zeros(batch, 70, heads, length, device=device)
    identity = torch.eye(length, device=device)[None, :, None].expand(batch, -1, heads, -1)
    out = attention(zero, zero[:, :length], identity, dropout_p=0.25, seed=7)
    seed = torch.tensor([7], device=device)
    kept = reference.dropout_mask(seed, 16384, 0, (batch, heads, 70, length))
    torch.testing.assert_close(out, kept.transpose(1, 2).float() / length / 0.75)


@pytest.mark.parametrize("length", [20, 70])
def test_a_sequence_with_a_seed_of_its_own_drops_the_same_wherever_it_stands(length, device):
    batch = Case("b", batch=3, queries=length, keys=length, heads=2, width=16).inputs(torch.float32, device)
    dout, seeds = output_gradient(batch), torch.tensor([5, 2**40 + 1, -3], device=device)
    want = results(attention, batch | {"dropout_p": 0.25, "seed": seeds}, dout)
    packed = {name: batch[name].flatten(0, 1) for name in "qkv"}
    starts = torch.arange(0, 3 * length + 1, length, dtype=torch.int32, device=device)
    sizes = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": length, "max_seqlen_k": length}
    row = results(flash_attn_varlen_func, packed | sizes | {"dropout_p": 0.25, "seed": seeds}, dout.flatten(0, 1))
    for name, both in want.items():
        assert torch.equal(row[name].view_as(both), both), name
    for n in range(3):
        alone = {name: batch[name][n : n + 1] for name in "qkv"} | {"dropout_p": 0.25, "seed": seeds[n : n + 1]}
        for name, one in results(attention, alone, dout[n : n + 1]).items():
            assert torch.equal(one[0], want[name][n]), (name, n)
    shared = attention(**batch, dropout_p=0.25, seed=seeds[:1])
    assert torch.equal(shared[0], want["out"][0])
    assert not torch.equal(attention(**batch, dropout_p=0.25, seed=seeds[[0, 0, 0]])[1], shared[1])
    with pytest.raises(ValueError, match=r"seed must be"):
        attention(**batch, dropout_p=0.25, seed=seeds[:2])


def test_philox_is_philox():
    """The known answers of Random123 are for 10 rounds; this checks the first round by hand and the draws' rate."""
    assert [int(x) for x in reference._multiply(0xD2511F53, torch.tensor(0xFFFFFFFF))] == [
        (0xD2511F53 * 0xFFFFFFFF) >> 32,
        (0xD2511F53 * 0xFFFFFFFF) & 0xFFFFFFFF,
    ]
    kept = reference.dropout_mask(torch.tensor([3]), 6554, 0, (2, 3, 200, 203)).double()
    deviation = (0.1 * 0.9 / kept.numel()) ** 0.5
    assert abs(kept.mean() - 0.9) < 5 * deviation
    for axis in range(4):  # no row, key, head or sequence is special
        others = [other for other in range(4) if other != axis]
        spread = kept.mean(others).std(correction=0)
        assert spread < 1.5 * (0.09 / (kept.numel() / kept.shape[axis])) ** 0.5


def test_dropout_needs_its_seed_and_nothing_else(device):
    given = Case("d", batch=2, queries=20, keys=20, heads=2, width=16).inputs(torch.float32, device)
    run = [attention(**given, dropout_p=0.5, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(run[0], run[1])
    assert not torch.equal(run[0], run[2])
    assert torch.equal(run[0][:1], attention(*(given[n][:1] for n in "qkv"), dropout_p=0.5, seed=1))
    assert torch.equal(attention(**given), attention(**given, dropout_p=0.0, seed=1))
    torch.manual_seed(0)
    drawn = attention(**given, dropout_p=0.5)
    assert not torch.equal(drawn, attention(**given, dropout_p=0.5))
    torch.manual_seed(0)
    assert torch.equal(drawn, attention(**given, dropout_p=0.5))
