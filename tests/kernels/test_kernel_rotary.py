"""Rotary position embedding inside the kernels, and packed QKV: what is turned, from which position on, no copies."""

from __future__ import annotations

import functools

import pytest
import torch
from effllm_kernels import (
    attention,
    attention_qkvpacked,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    operators,
)
from effllm_kernels.record import Case
from oracle import assert_as_exact_as_torch, exact, leaves, output_gradient, plain, results, rotated
from torch._dynamo.backends.debugging import aot_eager

SMALL = Case("r", batch=2, queries=20, keys=20, heads=2, width=16, terms=("rotary",))
TABLES = ("rotary_cos", "rotary_sin")
LENGTHS = (0, 1, 17, 6)


def angles(positions: torch.Tensor, pairs: int, theta: float) -> dict[str, torch.Tensor]:
    """Return the tables of a RoPE with base theta at the positions."""
    frequency = theta ** -(torch.arange(pairs, dtype=torch.float64, device=positions.device) / pairs)
    phase = positions[..., None] * frequency
    return {"rotary_cos": phase.cos().float(), "rotary_sin": phase.sin().float()}


def turned_before(given: dict, interleaved: bool = False) -> dict:
    """Return the inputs with q and k already turned, in their own dtype."""
    first = given["k"].shape[1] - given["q"].shape[1]
    turn = functools.partial(rotated, cos=given["rotary_cos"], sin=given["rotary_sin"], interleaved=interleaved)
    q, k = (turn(given[n].transpose(1, 2), first=at).transpose(1, 2) for n, at in (("q", first), ("k", 0)))
    return {"q": q, "k": k, "v": given["v"]}


@pytest.mark.parametrize("theta", [10_000.0, pytest.param(160_000.0, marks=pytest.mark.slow)])
def test_two_thetas_with_a_window_as_in_modernbert(theta, device):
    """Float32 tables beside half-precision inputs, rounded once: at least as exact as turning in half precision."""
    given = Case("m", batch=1, queries=75, keys=75, heads=1, width=16).inputs(torch.float16, device)
    given |= angles(torch.arange(80, device=device), 8, theta) | {"window": 64, "rotary_interleaved": False}
    dout = output_gradient(given)
    half = {name: x.half() if name in TABLES else x for name, x in given.items()}
    true = results(plain, exact(given), dout)
    assert_as_exact_as_torch(results(attention, given, dout), results(plain, half, dout), true)


@pytest.mark.parametrize(("pairs", "interleaved"), [(8, False), (5, True), (1, False)])
def test_whole_and_partial_rotary_in_float64(pairs, interleaved, device):
    if device == "cuda":
        pytest.skip("float64 runs on the CPU")
    given = Case("f", batch=1, queries=34, keys=36, heads=1, width=16).inputs(torch.float64, device)
    given |= {name: x.double() for name, x in angles(torch.arange(36), pairs, 100.0).items()}
    given["rotary_interleaved"] = interleaved
    dout = output_gradient(given)
    want = results(plain, given, dout)
    for name, value in results(attention, given, dout).items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "terms",
    [
        ("rotary", "softcap"),
        pytest.param(("interleaved", "bias", "c2p", "p2c"), marks=pytest.mark.slow),
    ],
)
def test_gradcheck(terms, device):
    if device == "cuda":
        pytest.skip("float64 runs on the CPU")
    given = Case("g", batch=1, queries=3, keys=4, heads=1, width=8, terms=terms).inputs(torch.float64)
    own = leaves(given)

    def function(*values):
        return attention(**(given | dict(zip(own, values, strict=True))), return_lse=True)

    assert torch.autograd.gradcheck(function, tuple(own.values()), fast_mode=True)


def test_equals_turning_beforehand(device):
    given = SMALL.inputs(torch.float32, device)
    fused, lse = attention(**given, return_lse=True)
    before, sums = attention(**turned_before(given), return_lse=True)
    torch.testing.assert_close(fused, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, sums, rtol=1e-5, atol=1e-6)


def test_logits_depend_on_distances_only(device):
    """What rotary embedding is for: the same tables from a later position on give the same attention."""
    given = SMALL.inputs(torch.float32, device)
    found = [attention(**given | angles(torch.arange(20, device=device) + late, 8, 1e4)) for late in (0, 100)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], attention(**{n: given[n] for n in "qkv"}), atol=1e-2)


def test_tables_of_each_sequence_serve_left_padding(device):
    """With positions that count from each sequence's first token, padding left or right gives the same."""
    given, length = SMALL.inputs(torch.float32, device), 12
    real = torch.arange(20, device=device).expand(2, -1) >= torch.tensor([0, 20 - length], device=device)[:, None]
    tables = angles(real.cumsum(1) - 1, 8, 1e4)
    out = attention(**given | tables, key_mask=real, query_mask=real)
    alone = {n: given[n][1:, -length:] for n in "qkv"} | angles(torch.arange(length, device=device), 8, 1e4)
    torch.testing.assert_close(out[1:, -length:], attention(**alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own_tables", [False, True])
def test_packed_positions_count_within_each_sequence(own_tables, device):
    total, starts = sum(LENGTHS), torch.tensor([0, *LENGTHS], dtype=torch.int32, device=device).cumsum(0).int()
    given = Case("p", batch=1, queries=total, keys=total, heads=1, width=16).inputs(torch.float32, device)
    given = {name: x[0] for name, x in given.items()}
    late = torch.arange(len(LENGTHS), device=device)[:, None] * 3 * own_tables
    tables = angles(late + torch.arange(17, device=device), 8, 1e2)
    shared = tables if own_tables else {name: x[0] for name, x in tables.items()}
    dout = output_gradient(given)
    got = results(lambda q, k, v: flash_attn_varlen_func(q, k, v, starts, starts, 17, 17, **shared), given, dout)
    qkv = torch.stack([given[n] for n in "qkv"], 1).requires_grad_()
    out = flash_attn_varlen_qkvpacked_func(qkv, starts, 17, **shared)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    assert torch.equal(out, got["out"])
    assert all(torch.equal(grad[:, place], got[f"d{name}"]) for place, name in enumerate("qkv"))
    for n, (low, high) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        if high > low:
            alone = {name: x[None, low:high] for name, x in given.items()} | {m: x[n] for m, x in tables.items()}
            for name, value in results(attention, alone, dout[None, low:high]).items():
                torch.testing.assert_close(got[name][low:high], value[0], rtol=1e-5, atol=1e-5)


def test_the_reference_packs_as_the_kernels_do(device, monkeypatch):
    given = Case("p", batch=1, queries=9, keys=12, heads=1, width=16).inputs(torch.float64, "cpu")
    given = {name: x[0] for name, x in given.items()}
    few, starts = (torch.tensor(x, dtype=torch.int32) for x in ([0, 0, 6, 9], [0, 5, 9, 12]))  # 6 rows on 4 keys
    tables = angles(torch.arange(3)[:, None] + torch.arange(6), 4, 1e2)
    sizes = {"cu_seqlens_q": few, "cu_seqlens_k": starts, "max_seqlen_q": 6, "max_seqlen_k": 5}
    dout, found = output_gradient(given), []
    for kernels in (True, False):
        monkeypatch.setattr(operators, "runs_kernels", lambda _, kernels=kernels: kernels and device == "cpu")
        found.append(results(lambda **x: flash_attn_varlen_func(**x, **sizes, **tables), given, dout))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_in_padded_rows_and_their_angles_changes_no_bit(poison, device):
    given = SMALL.inputs(torch.float32, device)
    lengths = torch.tensor([20, 7], dtype=torch.int32, device=device)
    given |= angles(torch.arange(20, device=device).expand(2, -1), 8, 1e2)
    given |= {"key_lengths": lengths, "query_lengths": lengths}
    real, dout = torch.arange(20, device=device) < lengths[:, None], output_gradient(given)
    clean = results(attention, given, dout)
    bad = {name: torch.where(real[:, :, None, None], given[name], poison) for name in "qkv"}
    bad |= {name: torch.where(real[..., None], given[name], poison) for name in TABLES}
    dirty = results(attention, given | bad, torch.where(real[:, :, None, None], dout, poison))
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
        assert not dirty[name][~real].any()


def test_rows_that_see_nothing_are_zero_with_zero_gradients(device):
    given = SMALL.inputs(torch.float32, device) | {"key_lengths": torch.tensor([0, 20], device=device).int()}
    got = results(attention, given, output_gradient(given))
    assert all(torch.isfinite(value).all() and not value[0].any() for value in got.values())


def test_a_sequence_does_not_depend_on_its_neighbours(device):
    given, dout = SMALL.inputs(torch.float32, device), output_gradient(SMALL.inputs(torch.float32, device))
    both = results(attention, given, dout)
    alone = results(attention, given | {name: given[name][1:] for name in "qkv"}, dout[1:])
    assert all(torch.equal(both[name][1:], value) for name, value in alone.items())


def test_compiled_whole_with_changing_lengths(device):
    torch._dynamo.reset()
    graphs, tables = [], angles(torch.arange(32, device=device), 8, 1e4)

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def loss(qkv, rotary_cos, rotary_sin):
        return attention_qkvpacked(qkv, window=4, rotary_cos=rotary_cos, rotary_sin=rotary_sin).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for length in (9, 12, 15):
        drawn = Case("c", batch=2, queries=length, keys=length, heads=1, width=16).inputs(torch.float32, device)
        own = [torch.stack([drawn[n] for n in "qkv"], 2).requires_grad_() for _ in range(2)]
        loss(own[0], **tables).backward()
        compiled(own[1], **tables).backward()
        assert torch.equal(own[0].grad, own[1].grad)
    assert len(graphs) <= 2


@pytest.mark.parametrize("layout", ["one projection", "heads first", "inside something larger"])
def test_packed_qkv_is_read_and_its_gradient_written_in_place(layout, device, monkeypatch):
    given = SMALL.inputs(torch.float32, device)
    dout = output_gradient(given)
    want = results(functools.partial(attention, **{n: given[n] for n in TABLES}), {n: given[n] for n in "qkv"}, dout)
    qkv = torch.stack([given[n] for n in "qkv"], 2)
    if layout == "heads first":
        qkv = qkv.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
    if layout == "inside something larger":
        qkv = torch.nn.functional.pad(qkv, (3, 1, 1, 0))[:, :, :, 1:, 3:19]
    qkv.requires_grad_()
    memory = set()

    def watched(function, tensors):
        def run(*arguments):
            memory.update(x.untyped_storage().data_ptr() for x in tensors(arguments))
            return function(*arguments)

        return run

    launch = operators.launch
    monkeypatch.setattr(launch, "forward", watched(launch.forward, lambda given: given[:3]))
    monkeypatch.setattr(launch, "backward", watched(launch.backward, lambda given: (*given[2:5], *given[8])))
    out = attention_qkvpacked(qkv, **{n: given[n] for n in TABLES})
    (grad,) = torch.autograd.grad(out, qkv, dout)
    assert memory == {qkv.untyped_storage().data_ptr(), grad.untyped_storage().data_ptr()}
    assert torch.equal(out, want["out"])
    assert all(torch.equal(grad[:, :, place], want[f"d{name}"]) for place, name in enumerate("qkv"))


def test_flash_attentions_packed_function(device):
    given = SMALL.inputs(torch.float32, device)
    qkv = torch.stack([given[n] for n in "qkv"], 2)
    out, lse, none = flash_attn_qkvpacked_func(qkv, causal=True, window_size=(5, -1), return_attn_probs=True)
    assert none is None
    want, sums = attention(*qkv.unbind(2), causal=True, window=(5, None), return_lse=True)
    assert torch.equal(out, want)
    assert torch.equal(lse, sums)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rotary_sin": None}, "go together"),
        ({"rotary_sin": torch.ones(20, 7)}, "one shape"),
        ({"rotary_cos": torch.ones(19, 8), "rotary_sin": torch.ones(19, 8)}, "S at least 20"),
        ({"rotary_cos": torch.ones(20, 9), "rotary_sin": torch.ones(20, 9)}, "D_rot at most 16"),
        ({"rotary_cos": torch.ones(3, 20, 8), "rotary_sin": torch.ones(3, 20, 8)}, r"\(2, S, D_rot / 2\)"),
        ({"rotary_cos": torch.ones(20, 8).int(), "rotary_sin": torch.ones(20, 8).int()}, "floats of one shape"),
        ({"q": torch.ones(2, 21, 2, 16)}, "S_q <= S_k"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        attention(**(SMALL.inputs(torch.float32) | wrong))


def test_a_packed_tensor_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"qkv must be \(B, S, 3, H, D\)"):
        attention_qkvpacked(torch.ones(2, 20, 2, 16))
