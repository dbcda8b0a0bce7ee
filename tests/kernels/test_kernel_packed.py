"""Packed sequences, FlashAttention's signatures, and memory that is not laid out simply."""

from __future__ import annotations

import pytest
import torch
from effllm_kernels import attention, flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from effllm_kernels.record import Case
from oracle import leaves, output_gradient, results

LENGTHS = (0, 1, 17, 0, 70, 5)


def packed(device: str, tail: int = 0, dtype=torch.float16) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    total = sum(LENGTHS) + tail
    given = Case("p", batch=1, queries=total, keys=total, heads=2, width=16).inputs(dtype, device)
    starts = torch.tensor([0, *LENGTHS], device=device).cumsum(0)
    return {name: x[0] for name, x in given.items()}, starts.int()


@pytest.mark.parametrize(
    "settings", [{}, {"causal": True}, {"window_size": (4, 2)}], ids=lambda s: "-".join(s) or "full"
)
def test_packed_sequences_equal_each_one_alone(settings, device):
    given, starts = packed(device)
    dout = output_gradient(given)

    def together(q, k, v):
        return flash_attn_varlen_func(q, k, v, starts.long(), starts, 70, 70, **settings)

    got = results(together, given, dout)
    for low, high in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if high > low:
            one = {name: x[None, low:high] for name, x in given.items()}
            want = results(lambda **x: flash_attn_func(**x, **settings), one, dout[None, low:high])
            for name, value in want.items():
                torch.testing.assert_close(got[name][low:high], value[0], rtol=4e-3, atol=4e-3)


def test_starts_may_have_strides(device):
    given, starts = packed(device)
    dout, strided = output_gradient(given), starts.repeat_interleave(2)[::2]

    def run(starts):
        return results(lambda q, k, v: flash_attn_varlen_func(q, k, v, starts, starts, 70, 70), given, dout)

    got, want = run(strided), run(starts)
    assert all(torch.equal(value, want[name]) for name, value in got.items())


def test_a_packed_window_past_every_key_is_none(device):
    given, starts = packed(device)
    sides = (2**31 - 1, 2**31 - 1)
    got = flash_attn_varlen_func(*given.values(), starts, starts, 70, 70, window_size=sides)
    assert torch.equal(got, flash_attn_varlen_func(*given.values(), starts, starts, 70, 70))


def test_slopes_that_do_not_fit_are_refused(device):
    given, starts = packed(device)
    qkv = torch.stack(list(given.values()), 1)
    for slopes in (torch.ones(1, device=device), torch.ones(5, 2, device=device)):
        with pytest.raises(ValueError, match=r"alibi_slopes must be \(2,\) or \(6, 2\)"):
            flash_attn_varlen_func(*given.values(), starts, starts, 70, 70, alibi_slopes=slopes)
        with pytest.raises(ValueError, match=r"alibi_slopes must be \(2,\) or \(6, 2\)"):
            flash_attn_varlen_qkvpacked_func(qkv, starts, 70, alibi_slopes=slopes)


def test_rows_after_the_last_sequence_are_zero(device):
    given, starts = packed(device, tail=9)
    dout = output_gradient(given)
    for name in "qkv":
        given[name][-9:] = float("nan")
    got = results(lambda q, k, v: flash_attn_varlen_func(q, k, v, starts, starts, 70, 70), given, dout)
    for value in got.values():
        assert torch.isfinite(value).all()
        assert not value[-9:].any()


def test_different_query_and_key_lengths(device):
    given, starts = packed(device)
    few = torch.tensor([0, 0, 2, 5, 6, 6, 9], dtype=torch.int32, device=device)
    q = given["q"][:9]
    out, lse, none = flash_attn_varlen_func(q, given["k"], given["v"], few, starts, 3, 70, return_attn_probs=True)
    assert none is None
    assert lse.shape == (2, 9)
    for n in range(6):
        rows, keys = slice(few[n], few[n + 1]), slice(starts[n], starts[n + 1])
        if rows.stop > rows.start:
            alone = attention(q[None, rows], given["k"][None, keys], given["v"][None, keys])
            torch.testing.assert_close(out[rows], alone[0], rtol=2e-3, atol=2e-3)


def test_packed_qkv_has_one_gradient(device):
    given, starts = packed(device)
    dout = output_gradient(given)
    qkv = torch.stack([given[name] for name in "qkv"], 1).requires_grad_()
    out = flash_attn_varlen_qkvpacked_func(qkv, starts, 70, causal=True)
    want = results(lambda q, k, v: flash_attn_varlen_func(q, k, v, starts, starts, 70, 70, causal=True), given, dout)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    assert torch.equal(out, want["out"])
    for place, name in enumerate("qkv"):
        assert torch.equal(grad[:, place], want[f"d{name}"])


def test_many_tiny_sequences(device):
    count = 70_000 if device == "cuda" else 40
    given = Case("m", batch=1, queries=2 * count, keys=2 * count, heads=1, width=16).inputs(torch.float16, device)
    q, k, v = (given[name][0] for name in "qkv")
    starts = torch.arange(0, 2 * count + 1, 2, dtype=torch.int32, device=device)
    out = flash_attn_varlen_func(q, k, v, starts, starts, 2, 2)
    want = attention(*(x.view(count, 2, 1, 16) for x in (q, k, v)))
    assert torch.equal(out.view(count, 2, 1, 16), want)


def test_any_strides_and_offsets(device):
    plain = Case("s", batch=2, queries=20, keys=20, heads=2, width=16).inputs(torch.float32, device)
    dout = output_gradient(plain)
    want = results(attention, plain, dout)
    heads_first = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in plain.items()}
    inside = {n: torch.nn.functional.pad(x, (3, 2, 1, 0))[:, :, 1:, 3:19] for n, x in plain.items()}
    backwards = {n: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for n, x in plain.items()}
    for views in (heads_first, inside, backwards):
        own = {n: x.detach().requires_grad_() for n, x in views.items()}
        out = attention(**own)
        strided = torch.nn.functional.pad(dout, (1, 1))[..., 1:17]
        grads = torch.autograd.grad(out, list(own.values()), strided)
        assert torch.equal(out, want["out"])
        assert all(torch.equal(grad, want[f"d{name}"]) for name, grad in zip(own, grads, strict=True))


def test_offsets_beyond_two_to_the_31(device):
    """Ten rows that lie 2^28 elements apart; untouched memory between them is never mapped."""
    given = Case("o", batch=1, queries=10, keys=10, heads=1, width=16).inputs(torch.float16, device)
    memory = torch.empty(9 * 2**28 + 16, dtype=torch.float16, device=device)
    far = memory.as_strided((1, 10, 1, 16), (0, 2**28, 16, 1))
    far.copy_(given["k"])
    assert torch.equal(attention(given["q"], far, given["v"]), attention(**given))


def test_an_expanded_output_gradient(device):
    given = Case("e", batch=2, queries=20, keys=20, heads=2, width=16).inputs(torch.float32, device)
    own = leaves(given)
    grads = torch.autograd.grad(attention(**own).sum(), list(own.values()))
    want = results(attention, given, torch.ones_like(given["q"]))
    assert all(torch.equal(grad, want[f"d{name}"]) for name, grad in zip(own, grads, strict=True))


def test_empty_tensors(device):
    for shape, keys in (((0, 5, 2, 16), 5), ((2, 0, 2, 16), 5), ((2, 5, 2, 16), 0)):
        q = torch.zeros(shape, device=device, requires_grad=True)
        k = torch.zeros(shape[0], keys, 2, 16, device=device, requires_grad=True)
        out = attention(q, k, k)
        out.sum().backward()
        assert out.shape == shape
        assert not q.grad.any()
        assert not k.grad.any()


def test_what_is_not_supported_is_refused(device):
    given, starts = packed(device)
    with pytest.raises(ValueError, match="block_table"):
        flash_attn_varlen_func(*given.values(), starts, starts, 70, 70, block_table=starts)
    with pytest.raises(ValueError, match="one shape"):
        flash_attn_varlen_func(*given.values(), starts, starts[1:], 70, 70)


def test_packed_numbers_are_floats():
    starts = torch.tensor([0, 3], dtype=torch.int32)
    whole = torch.ones(3, 2, 16, dtype=torch.int32)
    with pytest.raises(ValueError, match="q must be float16, bfloat16, float32 or float64"):
        flash_attn_varlen_func(whole, whole, whole, starts, starts, 3, 3)
    with pytest.raises(ValueError, match="q must be float16, bfloat16, float32 or float64"):
        flash_attn_varlen_qkvpacked_func(whole[:, None].expand(3, 3, 2, 16), starts, 3)
