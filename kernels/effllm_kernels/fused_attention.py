"""Attention for encoders: softmax(scale · q kᵀ + terms) v over padded or packed sequences, forward and backward.

Work, per sequence and head with S_q rows, S_k keys and width D: forward 4 · S_q · S_k · D operations, backward 2.5
times that (five products instead of two). Memory, forward: q, k, v read once and out written once, (2 S_q + 2 S_k) · D
elements, and S_q sums; backward: q, k, v, out, dout read and dq, dk, dv written. Nothing of size S_q × S_k exists.

Kernels: `forward.py`, `backward.py`, `term_gradients.py`; launcher: `launch.py`; operators and autograd:
`operators.py`; specification: `reference.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import reference
from .operators import NAMESPACE
from .record import Case, Kernel, attention_bytes, attention_flops
from .terms import UNLIMITED, Terms, flat

Window = int | tuple[int | None, int | None] | None
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FARTHEST = 2**30
"""No sequence is as long; the sum of a position and a nearer bound is a 32-bit number."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_lengths: Tensor | None = None,
    query_mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    c2p: Tensor | None = None,
    p2c: Tensor | None = None,
    relative_index: Tensor | None = None,
    heads: Tensor | None = None,
    window: Window = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    return_lse: bool = False,
) -> Any:
    """Return softmax(logits) v as (B, S_q, H, D) in q's dtype, and with `return_lse` also its log-sum-exp (B, H, S_q).

    q is (B, S_q, H, D), k and v are (B, S_k, H_k, D) with H a multiple of H_k; any strides. Products and sums are kept
    in float32 (float64 for float64, which only the CPU runs). Differentiable in q, k, v, bias, relative_bias, c2p, p2c.

    Which keys a row sees: those before `key_lengths` (B,) and where `key_mask` (B, S_k) is true; with `window` w those
    with |i - j| <= w, both ends included (ModernBERT's local attention is 64), or with a pair (left, right), None for
    no bound; with `causal` those with j <= i. i is counted so that the last row lies on the last key: row number +
    S_k - S_q. Rows from `query_lengths` on, or where `query_mask` is false, are padding, as are the heads where `heads`
    (H,) is false (pruned): not computed, output zero, log-sum-exp -inf, no gradient. So is a row that sees no key. What
    padded rows and keys hold, NaN too, changes nothing.

    logits = softcap · tanh(scale · q kᵀ / softcap), or scale · q kᵀ without softcap, scale 1 / sqrt(D) by default, plus
    - `bias`, broadcastable to (B, H, S_q, S_k) but of full size S_k;
    - `alibi_slopes` (H,) or (B, H): - slope · |i - j|, symmetric (Press et al. 2022), no gradient;
    - `relative_bias` (H, R): T5's table, at column relative_index[distance] (Raffel et al. 2020);
    - `c2p` (B, S_q, H, R) at [i, column] and `p2c` (B, S_k, H, R) at [j, column]: the two terms of DeBERTa (He et al.
      2021), already scaled. `relative_index` is (S_q + S_k - 1,) integers in [0, R), the column of distance i - j, in
      plain row and key numbers, at place i - j + S_k - 1.

    With `rotary_cos` and `rotary_sin`, (S, D_rot / 2) or (B, S, D_rot / 2), S >= S_k, q and k are given without their
    rotary embedding (Su et al. 2021): key j is turned by row j of the tables, row i by row i + S_k - S_q (S_q <= S_k).
    Pairs are the columns (c, c + D_rot / 2), or with `rotary_interleaved` (2c, 2c + 1); columns from D_rot on stay. It
    happens in registers, in float32, rounded once; gradients are those of the unturned q and k, the tables have none.
    A tile is turned each time it is read: keys once for every 64 or 128 rows that see them, rows, in the backward pass
    with more than one tile of keys, once for every tile of keys. That adds to each key read 3 · D_rot operations and
    D_rot table entries (beside 2 · D elements), mostly out of the L2 cache, and saves reading and writing q and k once
    more. Where rows see thousands of keys, turning q and k beforehand is likely the faster (not measured).

    Dropout is a function of (seed, batch, head, i, j) alone, its rate a multiple of 1/65536. `seed` is a number or a
    (1,) tensor, or (B,), each sequence's own: then of (seed, head, i, j), wherever the sequence stands. Without it one
    is drawn from torch's generator. Sums have a fixed order: equal inputs give equal
    bits, and a sequence's output does not depend, to the bit, on the others in its batch; nor do its gradients, except
    that keys that all fit in one tile (128 at width 64 in half precision) take a shorter path.

    Raises ValueError naming the argument that does not fit.
    """
    terms = attention_terms(
        q, k, v, key_lengths=key_lengths, key_mask=key_mask, query_lengths=query_lengths, query_mask=query_mask,
        bias=bias, alibi_slopes=alibi_slopes, relative_bias=relative_bias, c2p=c2p, p2c=p2c,
        relative_index=relative_index, heads=heads, window=window, causal=causal, dropout_p=dropout_p, seed=seed,
        scale=scale, softcap=softcap, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
    )  # fmt: skip
    out, lse = getattr(torch.ops, NAMESPACE).attention(q, k, v, *terms)
    return (out, lse) if return_lse else out


def attention_qkvpacked(
    qkv: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    heads: Tensor | None = None,
    window: Window = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    return_lse: bool = False,
) -> Any:
    """Return `attention` of q, k and v that are one tensor (B, S, 3, H, D), as one projection writes it; any strides.

    The tensor is read in place and its gradient is written as one, where slices of it passed to `attention` would have
    their three gradients copied together. `lengths` (B,) and `mask` (B, S) say which positions count, as rows and keys.
    """
    _require(qkv.dim() == 5 and qkv.shape[2] == 3, f"qkv must be (B, S, 3, H, D), got {tuple(qkv.shape)}")
    terms = attention_terms(
        *qkv.unbind(2), key_lengths=lengths, key_mask=mask, query_lengths=lengths, query_mask=mask,
        alibi_slopes=alibi_slopes, heads=heads, window=window, causal=causal, dropout_p=dropout_p, seed=seed,
        scale=scale, softcap=softcap, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
    )  # fmt: skip
    out, lse = getattr(torch.ops, NAMESPACE).packed_attention(qkv, *terms)
    return (out, lse) if return_lse else out


def attention_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_lengths: Tensor | None = None,
    query_mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    c2p: Tensor | None = None,
    p2c: Tensor | None = None,
    relative_index: Tensor | None = None,
    heads: Tensor | None = None,
    window: Window = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
) -> Terms:
    """Return the checked terms of a call of `attention`, as the operator takes them."""
    _check(q, k, v)
    batch, queries, count, width = q.shape
    for name, value, shape in (
        ("key_mask", key_mask, (batch, k.shape[1])), ("query_mask", query_mask, (batch, queries)),
        ("key_lengths", key_lengths, (batch,)), ("query_lengths", query_lengths, (batch,)), ("heads", heads, (count,)),
    ):  # fmt: skip
        if value is not None:
            check_shape(name, value, (shape,))
    if alibi_slopes is not None:
        check_shape("alibi_slopes", alibi_slopes, ((count,), (batch, count)))
    if relative_bias is not None:
        _require(c2p is None, "give relative_bias or c2p, not both")
        _require(relative_bias.shape[0] == count, f"relative_bias must have {count} rows, one a head")
        sums = torch.promote_types(relative_bias.dtype, torch.float32)  # the table's gradient is a long sum
        c2p = relative_bias.to(sums)[None, None].expand(batch, queries, -1, -1)
    _check_relative(q, k, c2p, p2c, relative_index)
    check_rotary(rotary_cos, rotary_sin, batch, k.shape[1], width)
    _require(rotary_cos is None or queries <= k.shape[1], "rotary_cos needs S_q <= S_k: a row's position is a key's")
    left, right = bounds(window, causal)
    terms = Terms(
        query_starts=None,
        key_starts=None,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_mask=query_mask,
        key_mask=key_mask,
        heads=heads,
        bias=_four_dimensions(bias, (batch, count, queries, k.shape[1])),
        alibi_slopes=alibi_slopes,
        c2p=c2p,
        p2c=p2c,
        relative_index=relative_index,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        seed=seed_tensor(seed, dropout_p, q.device, batch),
        max_query=queries,
        max_key=k.shape[1],
        left=left,
        right=right,
        dropout=float(dropout_p),
        scale=1 / math.sqrt(width) if scale is None else positive("scale", scale),
        softcap=0.0 if softcap is None else positive("softcap", softcap),
        rotary_interleaved=rotary_interleaved,
    )
    return flat(terms)


def check_rotary(cos: Tensor | None, sin: Tensor | None, sequences: int, longest: int, width: int) -> None:
    """Raise ValueError unless both tables or none are given, of one shape that covers the keys and fits the width."""
    if cos is None or sin is None:
        _require(cos is sin, "rotary_cos and rotary_sin go together")
        return
    # Messages are made only when raised: under torch.compile, a length in a string would become a constant.
    if cos.shape != sin.shape or cos.dtype != sin.dtype or not cos.is_floating_point():
        raise ValueError(f"rotary_cos and rotary_sin must be floats of one shape, got {_told(cos)} and {_told(sin)}")
    fits = cos.dim() in {2, 3} and cos.shape[:-2] in {(), (1,), (sequences,)} and cos.shape[-2] >= longest
    if not (fits and 0 < 2 * cos.shape[-1] <= width):
        wanted = f"(S, D_rot / 2) or ({sequences}, S, D_rot / 2) with S at least {longest} and D_rot at most {width}"
        raise ValueError(f"rotary_cos must be {wanted}, got {tuple(cos.shape)}")


def _told(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


def bounds(window: Window, causal: bool) -> tuple[int, int]:
    """Return how many keys before and after its own a row sees; UNLIMITED is no bound."""
    sides = window if isinstance(window, tuple) else (window, window)
    left, right = (UNLIMITED if side is None or side >= FARTHEST else side for side in sides)
    if left < UNLIMITED or right < UNLIMITED:
        raise ValueError(f"window must be non-negative, got {window}")
    return left, 0 if causal else right


def seed_tensor(seed: int | Tensor | None, dropout_p: float, device: torch.device, sequences: int) -> Tensor | None:
    """Return the dropout seed as (1,) or (sequences,) integers, None when nothing is dropped.

    Raises ValueError for a rate of 1 and for other shapes.
    """
    if not 0 <= dropout_p < 1 - 2**-17:
        wanted = "at least 0 and less than 1, also when rounded to a multiple of 1/65536"
        raise ValueError(f"dropout_p must be {wanted}, got {dropout_p}")
    if round(dropout_p * 65536) == 0:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    check_shape("seed", seed, ((1,), (sequences,)))
    return seed


def positive(name: str, value: float) -> float:
    """Return the value as a float. Raises ValueError unless it is finite and greater than 0."""
    if not 0 < value < math.inf:  # the message is made only here: torch.compile cannot format a number that varies
        raise ValueError(f"{name} must be greater than 0, got {value}")
    return float(value)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    # Before every launch: messages are made only where they are raised.
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError("q, k and v must be (batch, sequence, heads, width)")
    check_dtype(q)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    (batch, _, heads, width), shape = q.shape, k.shape
    if shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(shape)} and {tuple(v.shape)}")
    if batch != shape[0] or width != shape[3] or heads % shape[2]:
        raise ValueError(f"k {tuple(shape)} does not fit q {tuple(q.shape)}: batch and width equal, heads a divisor")
    if width > 256:
        raise ValueError(f"width must be at most 256, got {width}")


def check_dtype(q: Tensor) -> None:
    """Raise ValueError for a dtype that neither the kernels nor the reference take, where the tensor is."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if q.dtype == torch.float64 and q.is_cuda:
        raise ValueError("float64 runs on the CPU only; use float32")


def check_shape(name: str, value: Tensor | None, allowed: tuple[tuple[int, ...], ...]) -> None:
    """Raise ValueError unless the value is None or of one of the shapes."""
    if value is not None and tuple(value.shape) not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(str, allowed))}, got {tuple(value.shape)}")


def _check_relative(q: Tensor, k: Tensor, c2p: Tensor | None, p2c: Tensor | None, index: Tensor | None) -> None:
    given = c2p is not None or p2c is not None
    if not given and index is None:
        return
    _require(given == (index is not None), "relative_index goes with relative_bias, c2p or p2c")
    for name, term, size in (("c2p", c2p, q.shape[1]), ("p2c", p2c, k.shape[1])):
        if term is not None:
            check_shape(name, term, ((q.shape[0], size, q.shape[2], term.shape[-1]),))
    check_shape("relative_index", index, ((q.shape[1] + k.shape[1] - 1,),))


def _four_dimensions(bias: Tensor | None, full: tuple[int, ...]) -> Tensor | None:
    """Return the bias as (1|B, 1|H, 1|S_q, S_k)."""
    if bias is None:
        return None
    _require(bias.dim() <= 4, f"bias must have at most 4 dimensions, got {bias.dim()}")
    view = bias[(None,) * (4 - bias.dim())]
    fits = all(size in {1, whole} for size, whole in zip(view.shape, full, strict=True)) and view.shape[3] == full[3]
    _require(fits, f"bias must broadcast to {full} with a full last dimension, got {tuple(bias.shape)}")
    return view


KERNEL = Kernel(
    name="attention",
    reference=reference.forward,
    flops=attention_flops,
    bytes=attention_bytes,
    cases=(
        Case("bert", batch=2, queries=37, keys=37, heads=2, width=64),
        Case("cross", batch=1, queries=5, keys=70, heads=2, width=32),
        Case("grouped", batch=2, queries=33, keys=33, heads=4, key_heads=2, width=32),
        Case("lengths", batch=3, queries=70, keys=70, heads=2, width=32, terms=("lengths",)),
        Case("holes", batch=2, queries=40, keys=40, heads=2, width=32, terms=("mask",)),
        Case("window", batch=1, queries=200, keys=200, heads=1, width=32, terms=("window", "lengths")),
        Case("causal", batch=1, queries=90, keys=140, heads=2, width=32, terms=("causal",)),
        Case("alibi", batch=2, queries=65, keys=65, heads=2, width=32, terms=("alibi",)),
        Case("bias", batch=2, queries=50, keys=66, heads=2, width=32, terms=("bias", "lengths")),
        Case("t5", batch=2, queries=66, keys=66, heads=2, width=32, terms=("relative_bias", "mask")),
        Case("deberta", batch=1, queries=67, keys=35, heads=2, width=32, terms=("c2p", "p2c", "lengths")),
        Case("softcap", batch=1, queries=40, keys=40, heads=2, width=32, terms=("softcap", "causal")),
        Case("dropout", batch=2, queries=35, keys=70, heads=2, width=32, terms=("dropout", "lengths")),
        Case("seeds", batch=3, queries=35, keys=70, heads=2, width=32, terms=("dropout", "seeds", "lengths")),
        Case("pruned", batch=1, queries=35, keys=35, heads=4, key_heads=2, width=32, terms=("heads",)),
        Case("rotary", batch=2, queries=40, keys=70, heads=4, key_heads=2, width=32, terms=("rotary", "lengths")),
        Case("interleaved", batch=1, queries=70, keys=70, heads=2, width=40, terms=("interleaved", "window", "mask")),
        Case("everything", batch=2, queries=45, keys=45, heads=2, key_heads=1, width=32, terms=(
            "lengths", "mask", "window", "bias", "alibi", "c2p", "p2c", "softcap", "dropout", "heads", "rotary")),
    ),
)  # fmt: skip
