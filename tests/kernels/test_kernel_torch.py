"""The operators as PyTorch sees them: opcheck, compile, export, and a process without triton."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from effllm_kernels import KERNELS, attention, flash_attn_varlen_func, table
from effllm_kernels.fused_attention import attention_terms
from effllm_kernels.record import Case
from oracle import leaves

CASES = {case.name: case for case in KERNELS["attention"].cases}


@pytest.mark.parametrize("name", ["grouped", "deberta", "rotary"])
def test_opcheck(name, device):
    given = CASES[name].inputs(torch.float32, device)
    given |= leaves(given)
    arguments = (*(given[n] for n in "qkv"), *attention_terms(**given))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.effllm_kernels.attention.default, arguments, test_utils=checks)


def test_opcheck_of_the_packed_operator(device):
    given = Case("p", batch=2, queries=6, keys=6, heads=1, width=16).inputs(torch.float32, device)
    qkv = torch.stack([given[n] for n in "qkv"], 2).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (qkv, *attention_terms(**given))
    torch.library.opcheck(torch.ops.effllm_kernels.packed_attention.default, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the first step ran beside the default one
def test_a_captured_graph_replays_with_other_lengths_and_nothing_waits_for_the_device():
    given = Case("g", batch=2, queries=100, keys=100, heads=2, width=64).inputs(torch.float16, "cuda")
    lengths = torch.tensor([100, 7], dtype=torch.int32, device="cuda")
    own = leaves(given)

    def step():
        out = attention(**own, key_lengths=lengths, query_lengths=lengths)
        return out, torch.autograd.grad(out, list(own.values()), torch.ones_like(out))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    with warnings.catch_warnings(action="ignore"):  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, grads = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lengths.copy_(torch.tensor([31, 64]))
    graph.replay()
    want, gradients = step()
    assert torch.equal(out, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, gradients, strict=True))


def test_compiled_whole_with_changing_lengths(device):
    """One full graph, forward and backward, and at most one more when the length turns out to change."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(q, k, v, lengths):
        return attention(q, k, v, key_lengths=lengths, window=8).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    counted = torch.compile(loss, fullgraph=True, backend=count)
    for length in (9, 12, 15):
        given = Case("c", batch=2, queries=length, keys=length, heads=1, width=16).inputs(torch.float32, device)
        lengths = torch.tensor([length, 3], dtype=torch.int32, device=device)
        want, got = leaves(given), leaves(given)
        loss(**want, lengths=lengths).backward()
        compiled(**got, lengths=lengths).backward()
        counted(**given, lengths=lengths)
        assert all(torch.equal(got[name].grad, want[name].grad) for name in want)
    assert len(graphs) <= 2


def test_compiled_whole_with_dropout_and_packed_sequences(device):
    torch._dynamo.reset()
    given = Case("v", batch=1, queries=20, keys=20, heads=1, width=16).inputs(torch.float32, device)
    q, k, v = (given[name][0] for name in "qkv")
    starts = torch.tensor([0, 12, 20], dtype=torch.int32, device=device)

    def run(q, k, v):
        return flash_attn_varlen_func(q, k, v, starts, starts, 12, 12, dropout_p=0.3)

    torch.manual_seed(0)
    want = run(q, k, v)
    torch.manual_seed(0)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), want)


def test_exported_and_run(device):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, lengths):
            return attention(q, k, v, key_lengths=lengths)

    def inputs(length):
        given = Case("x", batch=2, queries=length, keys=length, heads=1, width=16).inputs(torch.float32, device)
        return (*(given[n] for n in "qkv"), torch.tensor([length, 2], dtype=torch.int32, device=device))

    length = torch.export.Dim("length", min=2, max=512)
    shapes = ({1: length}, {1: length}, {1: length}, None)
    exported = torch.export.export(Layer(), inputs(10), dynamic_shapes=shapes)
    assert torch.equal(exported.module()(*inputs(23)), Layer()(*inputs(23)))


def test_work_and_memory_of_a_case():
    kernel = KERNELS["attention"]
    case = Case("w", batch=2, queries=3, keys=5, heads=4, key_heads=2, width=8)
    assert kernel.flops(case) == 2 * 4 * (3 * 5 * 8 * 2 + 3 * 5 * 8 * 2)
    assert kernel.bytes(case, torch.float16) == 2 * (2 * 3 * 4 * 8 + 2 * 5 * 2 * 8) * 2 + 2 * 3 * 4 * 4
    assert len({case.name for case in kernel.cases}) == len(kernel.cases)


def test_without_triton_the_reference_runs():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, effllm_kernels as kernels\n"
        "q = torch.randn(1, 4, 2, 8, requires_grad=True)\n"
        "kernels.attention(q, q, q, causal=True).sum().backward()\n"
        "starts = torch.tensor([0, 3, 4])\n"
        "qkv = torch.randn(4, 3, 2, 8, requires_grad=True)\n"
        "kernels.flash_attn_varlen_qkvpacked_func(qkv, starts, 3).sum().backward()\n"
        "assert q.grad.isfinite().all() and qkv.grad.isfinite().all()\n"
    )
    package = Path(table.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(package)})
