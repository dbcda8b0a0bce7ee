"""Every case of every kernel against float64, by FlashAttention-3's rule, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from effllm_kernels import KERNELS, attention, reference
from effllm_kernels.fused_attention import attention_terms
from effllm_kernels.record import Case
from oracle import assert_as_exact_as_torch, exact, leaves, output_gradient, plain, results

CASES = KERNELS["attention"].cases
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
QUICK = {"grouped", "deberta"}


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    given = case.inputs(dtype, device)
    dout = output_gradient(given)
    got = results(attention, given, dout)
    assert_as_exact_as_torch(got, results(plain, given, dout), results(plain, exact(given), dout))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_half_precision(case, device):
    check(case, torch.float16, device)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in QUICK], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_the_other_precisions(case, dtype, device):
    check(case, DTYPES[dtype], device)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_case_in_every_precision(case, dtype, device):
    check(case, DTYPES[dtype], device)


@pytest.mark.parametrize("width", [16, 40, 80, 96, 256, 5])
def test_every_width(width, device):
    check(Case("width", batch=1, queries=33, keys=70, heads=1, width=width), torch.float16, device)


@pytest.mark.parametrize("width", [48, 64, 128])
@pytest.mark.slow
def test_more_widths(width, device):
    check(Case("width", batch=2, queries=130, keys=257, heads=2, width=width), torch.bfloat16, device)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 2), (5, 1), (17, 16), (64, 65), (129, 127)])
def test_small_and_odd_lengths(queries, keys, device):
    check(Case("length", batch=1, queries=queries, keys=keys, heads=1, width=16), torch.float16, device)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [2, 16, 63, 97, 128, 200, 384, 511, 512, 513])
@pytest.mark.parametrize("keys", [128, 257, 513])
def test_more_lengths(queries, keys, device):
    for terms in ((), ("causal",), ("window", "lengths")):
        check(
            Case("length", batch=2, queries=queries, keys=keys, heads=2, width=32, terms=terms), torch.bfloat16, device
        )


def test_several_blocks_of_rows_and_keys_with_every_term(device):
    case = next(case for case in CASES if case.name == "everything")
    check(dataclasses.replace(case, batch=1, queries=150, keys=150), torch.float16, device)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_is_the_mathematics(case):
    given = case.inputs(torch.float64)
    dout = output_gradient(given)
    own = leaves(given)
    terms = attention_terms(**(given | own))
    with torch.no_grad():
        out, lse = reference.forward(given["q"], given["k"], given["v"], terms)
        grads = reference.backward(dout, None, given["q"], given["k"], given["v"], out, lse, terms)
    want = results(plain, given, dout)
    torch.testing.assert_close(out, want["out"], rtol=1e-12, atol=1e-12)
    for name, grad in zip(("dq", "dk", "dv", "dbias", "dc2p", "dp2c"), grads, strict=True):
        if name in want:
            torch.testing.assert_close(grad, want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["grouped", "bias"])
def test_the_kernels_in_float64_are_the_reference(name, device):
    if device == "cuda":
        pytest.skip("float64 runs on the CPU")
    given = next(case for case in CASES if case.name == name).inputs(torch.float64)
    dout = output_gradient(given)
    want = results(plain, given, dout)
    for part, value in results(attention, given, dout).items():
        torch.testing.assert_close(value, want[part], rtol=0, atol=1e-12)


def test_gradcheck(device):
    if device == "cuda":
        pytest.skip("float64 runs on the CPU")
    case = Case("g", batch=1, queries=3, keys=4, heads=1, width=2, terms=("bias", "c2p", "p2c", "softcap"))
    given = case.inputs(torch.float64)
    own = leaves(given)

    def function(*values):
        return attention(**(given | dict(zip(own, values, strict=True))), return_lse=True)

    assert torch.autograd.gradcheck(function, tuple(own.values()), fast_mode=True)


def test_log_sum_exp_and_its_gradient(device):
    given = Case("l", batch=2, queries=9, keys=20, heads=2, width=16, terms=("lengths",)).inputs(torch.float32, device)
    own = leaves(given)
    _, lse = attention(**(given | own), return_lse=True)
    grads = torch.autograd.grad(lse.sum(), [own["q"], own["k"]])
    q, k = (own[name].detach().double().requires_grad_() for name in "qk")
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    beyond = torch.arange(20, device=device) >= given["key_lengths"][:, None]
    want = logits.masked_fill(beyond[:, None, None], float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)
    for got, true in zip(grads, torch.autograd.grad(want.sum(), [q, k]), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-5)
