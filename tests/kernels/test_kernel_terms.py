"""What the terms that are added to the logits mean, said a second time: each equals a dense bias written out here."""

from __future__ import annotations

import pytest
import torch
from effllm_kernels import attention
from effllm_kernels.record import Case
from oracle import output_gradient, results

QUERIES, KEYS, HEADS = 5, 7, 2


def tensors(*terms: str) -> dict:
    return Case("t", batch=2, queries=QUERIES, keys=KEYS, heads=HEADS, width=16, terms=terms).inputs(torch.float64)


def dense(function) -> torch.Tensor:
    """Return (B, H, S_q, S_k) of function(batch, head, i, j)."""
    places = [
        [[[function(b, h, i, j) for j in range(KEYS)] for i in range(QUERIES)] for h in range(HEADS)] for b in range(2)
    ]
    return torch.tensor(places, dtype=torch.float64)


def compare(given: dict, bias: torch.Tensor) -> None:
    plain = {name: given[name] for name in "qkv"}
    got, want = attention(**given), attention(**plain, bias=bias)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert not torch.allclose(got, attention(**plain), atol=1e-3)


def needs_float64(device: str) -> None:
    if device == "cuda":
        pytest.skip("float64 runs on the CPU")


def test_alibi_falls_with_the_distance_on_both_sides(device):
    """The last row lies on the last key: row i stands at key i + 2."""
    needs_float64(device)
    slopes = torch.tensor([0.5, 0.25])
    compare(tensors() | {"alibi_slopes": slopes}, dense(lambda b, h, i, j: -float(slopes[h]) * abs(i + 2 - j)))
    own = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    compare(tensors() | {"alibi_slopes": own}, dense(lambda b, h, i, j: -float(own[b, h]) * abs(i + 2 - j)))


def test_relative_bias_is_t5s_table(device):
    needs_float64(device)
    given = tensors("relative_bias")
    table, index = given["relative_bias"], given["relative_index"]
    compare(given, dense(lambda b, h, i, j: float(table[h, index[i - j + KEYS - 1]])))


def test_c2p_is_read_by_rows_and_p2c_by_keys(device):
    needs_float64(device)
    given = tensors("c2p", "p2c")
    c2p, p2c, index = given["c2p"], given["p2c"], given["relative_index"]

    def both(b, h, i, j):
        column = index[i - j + KEYS - 1]
        return float(c2p[b, i, h, column] + p2c[b, j, h, column])

    compare(given, dense(both))


def test_softcap_bends_before_the_bias(device):
    needs_float64(device)
    given = tensors("softcap", "bias")
    products = torch.einsum("bihd,bjhd->bhij", given["q"], given["k"]) / 4
    p = (3.0 * torch.tanh(products / 3.0) + given["bias"]).softmax(-1)
    want = torch.einsum("bhij,bjhd->bihd", p, given["v"])
    # The kernels' tanh is a series near 0, whose first term left out is 1382 / 155925 x^11 < 8e-12 there.
    torch.testing.assert_close(attention(**given), want, rtol=0, atol=1e-10)


def test_a_bias_that_is_shared_has_the_sum_as_its_gradient(device):
    needs_float64(device)
    given = tensors()
    dout = output_gradient(given)
    whole = torch.zeros(2, HEADS, QUERIES, KEYS, dtype=torch.float64)
    full = results(attention, given | {"bias": whole}, dout)["dbias"]
    shared = results(attention, given | {"bias": whole[:1, :, :1]}, dout)["dbias"]
    torch.testing.assert_close(shared, full.sum((0, 2), keepdim=True), rtol=0, atol=1e-12)
