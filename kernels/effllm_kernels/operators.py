"""The torch operators: schemas, shapes for tracing, gradients, and which implementation runs where.

CUDA tensors run the kernels. CPU tensors run the reference, or the kernels themselves in Triton's interpreter when
TRITON_INTERPRET=1 was set before the import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .terms import SCHEMA, Terms

try:
    from . import launch
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "triton":
        raise
    launch = None  # type: ignore[assignment]

# A copy of this package under another name, as model hubs load it, registers operators of its own.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
TERMS = len(Terms._fields)
GRADIENTS = {name: Terms._fields.index(name) for name in ("bias", "c2p", "p2c")}

LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)")
LIBRARY.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool[] needs, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"packed_attention(Tensor qkv, {SCHEMA}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"packed_attention_backward(Tensor dout, Tensor? dlse, Tensor qkv, Tensor out, Tensor lse, {SCHEMA}) -> Tensor"
)


def runs_kernels(x: Tensor) -> bool:
    """Return whether operators run Triton kernels on this tensor. Raises RuntimeError for CUDA without triton."""
    if not x.is_cuda:
        return launch is not None and launch.INTERPRETED
    if launch is None:
        raise RuntimeError("attention on a CUDA tensor needs the package 'triton': pip install triton")
    return True


def _attention(q: Tensor, k: Tensor, v: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    return (launch if runs_kernels(q) else reference).forward(q, k, v, Terms(*terms))


def _packed_attention(qkv: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    return _attention(*qkv.unbind(-3), *terms)


def _attention_shapes(q: Tensor, k: Tensor, v: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    sums = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(sums, dtype=reference.working_dtype(q))


def _packed_attention_shapes(qkv: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    return _attention_shapes(*qkv.unbind(-3), *terms)


def _attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, needs: list[bool],
    *terms: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    own = Terms(*terms)
    wanted = [
        x if x is not None and need else None for x, need in zip((own.bias, own.c2p, own.p2c), needs, strict=True)
    ]
    if runs_kernels(q):
        make = torch.zeros if own.packed else torch.empty
        dq, dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        extra = [None if x is None else x.new_empty(x.shape) for x in wanted]
        launch.backward(dout, dlse, q, k, v, out, lse, own, (dq, dk, dv), *extra)
    else:
        dq, dk, dv, *every = reference.backward(dout, dlse, q, k, v, out, lse, own)
        extra = [None if x is None else grad for x, grad in zip(wanted, every, strict=True)]
    return (dq, dk, dv, *(q.new_empty(0) if x is None else x for x in extra))


def _attention_backward_shapes(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, needs: list[bool],
    *terms: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    own = Terms(*terms)
    extra = zip((own.bias, own.c2p, own.p2c), needs, strict=True)
    absent = [x.new_empty(x.shape) if x is not None and need else q.new_empty(0) for x, need in extra]
    return (*(x.new_empty(x.shape) for x in (q, k, v)), *absent)


def _packed_attention_backward(
    dout: Tensor, dlse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, *terms: Any
) -> Tensor:
    own, (q, k, v) = Terms(*terms), qkv.unbind(-3)
    if runs_kernels(qkv):
        make = torch.zeros if own.packed else torch.empty  # rows after the last packed sequence belong to no program
        dqkv = make(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        dq, dk, dv = dqkv.unbind(-3)
        launch.backward(dout, dlse, q, k, v, out, lse, own, (dq, dk, dv), None, None, None)
        return dqkv
    dq, dk, dv, *_ = reference.backward(dout, dlse, q, k, v, out, lse, own)
    return torch.stack([dq, dk, dv], dim=-3)


def _packed_attention_backward_shapes(
    dout: Tensor, dlse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, *terms: Any
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(count: int) -> Any:
    """Return a `setup_context` for an operator whose first `count` arguments are tensors and the rest are Terms."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        terms = inputs[count:]
        ctx.tensors = [number for number, term in enumerate(terms) if isinstance(term, Tensor)]
        ctx.terms = [None if isinstance(term, Tensor) else term for term in terms]
        ctx.save_for_backward(*inputs[:count], *output, *(terms[number] for number in ctx.tensors))

    return setup


def _load(ctx: Any, count: int) -> tuple[list[Tensor], list[Any]]:
    """Return (the operator's first tensors and its outputs, its terms), as saved by `_save`."""
    saved, terms = list(ctx.saved_tensors), list(ctx.terms)
    for number, tensor in zip(ctx.tensors, saved[count + 2 :], strict=True):
        terms[number] = tensor
    return saved[: count + 2], terms


def _attention_gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    (q, k, v, out, lse), terms = _load(ctx, 3)
    dout = torch.zeros_like(out) if dout is None else dout
    needs = [bool(ctx.needs_input_grad[3 + place]) for place in GRADIENTS.values()]
    operator = getattr(torch.ops, NAMESPACE).attention_backward
    dq, dk, dv, *extra = operator(dout, dlse, q, k, v, out, lse, needs, *terms)
    grads: list[Tensor | None] = [None] * TERMS
    for place, need, grad in zip(GRADIENTS.values(), needs, extra, strict=True):
        grads[place] = grad if need else None
    return (dq, dk, dv, *grads)


def _packed_attention_gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    (qkv, out, lse), terms = _load(ctx, 1)
    dout = torch.zeros_like(out) if dout is None else dout
    operator = getattr(torch.ops, NAMESPACE).packed_attention_backward
    return (operator(dout, dlse, qkv, out, lse, *terms), *[None] * TERMS)


def _differentiate(name: str, count: int, gradient: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """Give an operator its gradient, under torch's key for it, as `torch.library.register_autograd` does.

    That one reads the operator's schema anew in every call, which for so many arguments takes longer than a launch.
    """
    operator, setup = getattr(getattr(torch.ops, NAMESPACE), name).default, _save(count)

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            result = below(keyset, *inputs)
            setup(ctx, tuple(inputs), result)
            return result

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            return (*gradient(ctx, *gradients), None)

    def run(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return Differentiable.apply(*args, keyset)
        return below(keyset, *args)

    LIBRARY.impl(name, run, "Autograd", with_keyset=True)


def _register() -> None:
    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "attention": (_attention, _attention_shapes),
        "attention_backward": (_attention_backward, _attention_backward_shapes),
        "packed_attention": (_packed_attention, _packed_attention_shapes),
        "packed_attention_backward": (_packed_attention_backward, _packed_attention_backward_shapes),
    }
    for name, (run, shapes) in implementations.items():
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, run, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=LIBRARY)
    _differentiate("attention", 3, _attention_gradient)
    _differentiate("packed_attention", 1, _packed_attention_gradient)


_register()
