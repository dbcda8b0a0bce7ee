"""FlashAttention's own function names and signatures (flash_attn 2.8), so that a user replaces an import."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .fused_attention import (
    attention,
    attention_qkvpacked,
    bounds,
    check_dtype,
    check_rotary,
    check_shape,
    positive,
    seed_tensor,
)
from .operators import NAMESPACE
from .terms import Terms, flat

NO_WINDOW = (-1, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Return attention of (B, S, H, D) tensors; see `attention`. Always deterministic.

    With `return_attn_probs`: (out, log-sum-exp (B, H, S_q), None); probabilities are never formed.
    """
    out, lse = attention(
        q,
        k,
        v,
        window=_window(window_size),
        causal=causal,
        dropout_p=dropout_p,
        scale=softmax_scale,
        softcap=softcap or None,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    seed: int | Tensor | None = None,
) -> Any:
    """Return attention of packed sequences: q (T_q, H, D), k and v (T_k, H_k, D), sequence n at cu_seqlens[n:n + 2].

    A sequence may be empty; rows after the last one give zero. No sequence may be longer than its `max_seqlen`. With
    `return_attn_probs`: (out, log-sum-exp (H, T_q), None). Raises ValueError for a `block_table` (paged caches).

    Not in FlashAttention's signature: `rotary_cos` and `rotary_sin`, (S, D_rot / 2) or (sequences, S, D_rot / 2), turn
    q and k as in `attention`. Positions count within each sequence; a row before its sequence's first key stays. `seed`
    decides dropout as in `attention`, (sequences,) for each its own.
    """
    if block_table is not None:
        raise ValueError("block_table is not supported: keys and values must be contiguous sequences, not pages")
    if not q.dtype == k.dtype == v.dtype or k.shape != v.shape or not q.dim() == k.dim() == 3:
        raise ValueError(f"q, k, v must be (T, H, D) of one dtype, got {q.shape}, {k.shape}, {v.shape}")
    if q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1] or q.shape[2] > 256:
        raise ValueError(f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}: width equal and at most 256")
    check_dtype(q)
    check_rotary(rotary_cos, rotary_sin, cu_seqlens_k.shape[0] - 1, max_seqlen_k, q.shape[2])
    terms = _packed_terms(
        q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, seed,
    )._replace(rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved)  # fmt: skip
    out, lse = getattr(torch.ops, NAMESPACE).attention(q, k, v, *terms)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Return attention of q, k, v in one tensor (B, S, 3, H, D); see `attention_qkvpacked`, which takes padding too."""
    out, lse = attention_qkvpacked(
        qkv,
        window=_window(window_size),
        causal=causal,
        dropout_p=dropout_p,
        scale=softmax_scale,
        softcap=softcap or None,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
) -> Any:
    """Return attention of packed sequences whose q, k and v are one tensor (T, 3, H, D); its gradient is one too.

    It is read in place, any strides, and the kernels write the gradient in place. Rotary tables as in
    `flash_attn_varlen_func`.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.shape[3] > 256:
        raise ValueError(f"qkv must be (T, 3, H, D) with D at most 256, got {tuple(qkv.shape)}")
    check_dtype(qkv)
    check_rotary(rotary_cos, rotary_sin, cu_seqlens.shape[0] - 1, max_seqlen, qkv.shape[3])
    terms = _packed_terms(
        qkv, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes,
    )._replace(rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved)  # fmt: skip
    out, lse = getattr(torch.ops, NAMESPACE).packed_attention(qkv, *terms)
    return (out, lse, None) if return_attn_probs else out


def _window(window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    left, right = (None if side < 0 else side for side in window_size)
    return left, right


def _packed_terms(
    q: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_query: int,
    max_key: int,
    dropout_p: float,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    seed: int | Tensor | None = None,
) -> Terms:
    if query_starts.shape != key_starts.shape or query_starts.dim() != 1:
        got = f"{tuple(query_starts.shape)} and {tuple(key_starts.shape)}"
        raise ValueError(f"cu_seqlens must be of one shape (sequences + 1,), got {got}")
    sequences, heads = query_starts.shape[0] - 1, q.shape[-2]
    check_shape("alibi_slopes", alibi_slopes, ((heads,), (sequences, heads)))
    left, right = bounds(_window(window_size), causal)
    terms = Terms(
        query_starts=query_starts,
        key_starts=key_starts,
        query_lengths=None,
        key_lengths=None,
        query_mask=None,
        key_mask=None,
        heads=None,
        bias=None,
        alibi_slopes=alibi_slopes,
        c2p=None,
        p2c=None,
        relative_index=None,
        rotary_cos=None,
        rotary_sin=None,
        seed=seed_tensor(seed, dropout_p, q.device, sequences),
        max_query=max_query,
        max_key=max_key,
        left=left,
        right=right,
        dropout=float(dropout_p),
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else positive("softmax_scale", scale),
        softcap=positive("softcap", softcap) if softcap else 0.0,
        rotary_interleaved=False,
    )
    return flat(terms)
