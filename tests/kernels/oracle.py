"""What the kernels are measured against: plain attention in a given precision, and the rule of what may differ."""

from __future__ import annotations

import torch
from effllm_kernels import reference
from effllm_kernels.fused_attention import attention_terms

EPSILON = torch.finfo(torch.float32).eps
NOT_DIFFERENTIABLE = {"alibi_slopes", "rotary_cos", "rotary_sin"}


def leaves(given: dict) -> dict[str, torch.Tensor]:
    """Return the inputs that have a gradient, as new leaves."""
    floats = {n: x for n, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return {n: x.detach().clone().requires_grad_() for n, x in floats.items() if n not in NOT_DIFFERENTIABLE}


def plain(**given) -> torch.Tensor:
    """Return attention as eager PyTorch computes it, every step in q's dtype, differentiable by autograd."""
    q, k, v = given["q"], given["k"], given["v"]
    terms = attention_terms(**given)
    group = q.shape[2] // k.shape[2]
    rows, (keys, values) = q.transpose(1, 2), (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    if "rotary_cos" in given:
        tables = (given["rotary_cos"], given["rotary_sin"], given["rotary_interleaved"])
        rows, keys = rotated(rows, *tables, first=k.shape[1] - q.shape[1]), rotated(keys, *tables)
    logits, _ = reference._logits(rows @ keys.mT * terms.scale, q, k, terms)
    seen = reference.visible(q, k, terms)
    p = torch.softmax(logits.to(q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min), -1) * seen
    if terms.seed is not None:
        kept = reference.dropout_mask(terms.seed, terms.threshold, 0, tuple(p.shape))
        p = p * kept / (1 - terms.threshold / 65536)
    return (p @ values).transpose(1, 2)


def rotated(x: torch.Tensor, cos, sin, interleaved: bool, first: int = 0) -> torch.Tensor:
    """Return (…, S, D) turned as transformers does it, x · cos + rotate_half(x) · sin, from position `first` on."""
    cos, sin = (table[..., first : first + x.shape[-2], :] for table in (cos, sin))
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    part, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    if interleaved:
        cos, sin = (table.repeat_interleave(2, -1) for table in (cos, sin))
        half = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)
    else:
        cos, sin = (torch.cat([table, table], -1) for table in (cos, sin))
        a, b = part.chunk(2, -1)
        half = torch.cat([-b, a], -1)
    return torch.cat([part * cos + half * sin, rest], -1)


def results(function, given: dict, dout: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output and every gradient."""
    own = leaves(given)
    out = function(**(given | own))
    grads = torch.autograd.grad(out, list(own.values()), dout.to(out), allow_unused=True)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(own, grads, strict=True)}


def exact(given: dict) -> dict:
    """Return the inputs on the CPU, which alone computes in float64, with every float as float64: the same numbers."""
    own = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    return {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in own.items()}


def output_gradient(given: dict, seed: int = 1) -> torch.Tensor:
    """Return a random gradient of the output, in q's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(given["q"].shape, generator=generator, dtype=torch.float64).to(given["q"])


def assert_as_exact_as_torch(got: dict, torchs: dict, true: dict, factor: float = 2.0) -> None:
    """FlashAttention-3's rule: at most twice PyTorch's own error in this dtype, plus two roundings of the result.

    Sixteen float32 roundings of numbers of order one are added, for gradients that cancel to zero.
    """
    for name, want in true.items():
        assert torch.isfinite(got[name]).all(), name
        rounded = want.to(got[name].dtype)
        rounding = (rounded + 0.3 - 0.3 - rounded).abs().max().item()
        error, torchs_error = ((x[name].cpu().double() - want).abs().max().item() for x in (got, torchs))
        allowed = factor * torchs_error + 2 * rounding + 16 * EPSILON
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
