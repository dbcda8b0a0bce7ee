"""Attention over packed sequences, for any transformers encoder that uses the attention interface.

A packed batch is one row (1, T) that holds n sequences one after the other, without padding. Everything in an encoder
acts on single tokens but for attention, which must not reach across sequences. `register` gives transformers an
attention and a mask function under the name `effllm_packed`; a model loaded with that `attn_implementation` takes the
sequences' places as the keyword `sequence_index`, made by `sequence_index`. All sizes follow from the shapes of what is
handed in, so that `torch.compile` takes a model whole, for every batch.

On a GPU with effllm_kernels and triton installed, the packed row goes to its kernel as it is. Elsewhere PyTorch's
scaled-dot-product attention runs on the sequences gathered to (n, S), S the longest: on the CPU, where the other layers
dominate, this costs less than a mask of T × T. Transformers' own functions build that mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from effllm.train.devices import KERNEL_DEVICES
from effllm.train.dropout import SequenceDropout

NAME = "effllm_packed"


def register() -> None:
    """Make `attn_implementation="effllm_packed"` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, _packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def implementation() -> str:
    """Return what computes the attention of a run on this machine, as its manifest records it."""
    return "effllm_kernels" if KERNEL_DEVICES and torch.cuda.is_available() else "torch"


def sequence_index(lengths: np.ndarray) -> np.ndarray:
    """Return the places of the sequences' tokens in a packed row: int64 (n, S), -1 where a sequence has ended.

    `lengths` (n,) int64, S the largest of them.
    """
    places = np.arange(lengths.max())
    starts = np.cumsum(lengths) - lengths
    return np.where(places < lengths[:, None], places + starts[:, None], -1)


class Spread(torch.autograd.Function):
    """Rows (T, …) laid into zeros (size, …) at distinct places (T,).

    The backward pass takes them from there again; indexing would add them up one by one.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
        """Return the (size, …) tensor."""
        ctx.save_for_backward(places)
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of the rows."""
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class Pick(torch.autograd.Function):
    """Rows at distinct places (T,) of a tensor (size, …); the reverse of `Spread`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the (T, …) rows."""
        ctx.save_for_backward(places)
        ctx.size = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the (size, …) tensor."""
        gradient = gradients[0]
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, ctx.saved_tensors[0], gradient), None


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sequence_index: torch.Tensor | None = None,
    sequence_dropout: SequenceDropout | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence of a packed row.

    `query`, `key`, `value` (1, heads, T, D); `sequence_index` (n, S) as `sequence_index` makes it. With
    `sliding_window` w, a token sees those less than w places away (transformers passes ModernBERT's half window plus
    one). `sequence_dropout` decides what the kernel drops; elsewhere it does so by itself. Returns (1, T, heads, D).
    Raises ValueError without `sequence_index`: a packed row without its boundaries has no meaning.
    """
    if sequence_index is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"{NAME} takes one packed row with sequence_index and no attention_mask")
    n, width = sequence_index.shape
    real = sequence_index >= 0
    if query.device.type in KERNEL_DEVICES:
        seeds = None if sequence_dropout is None else sequence_dropout.seeds()
        return _in_kernels(query, key, value, real, dropout, scaling, sliding_window, seeds)[None], None
    # Sequences of one length need no padding: the row is cut by a view.
    places = None if n * width == query.shape[2] else torch.nonzero_static(real.reshape(-1), size=query.shape[2])[:, 0]

    def unpack(x: torch.Tensor) -> torch.Tensor:
        rows = x[0].transpose(0, 1)
        rows = rows if places is None else Spread.apply(rows, places, n * width)
        return rows.reshape(n, width, *rows.shape[1:]).transpose(1, 2)

    mask = None if places is None and sliding_window is None else _mask(real, sliding_window)
    out = functional.scaled_dot_product_attention(
        unpack(query), unpack(key), unpack(value), attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    rows = out.transpose(1, 2).reshape(n * width, *value.shape[1::2])
    return (rows if places is None else Pick.apply(rows, places))[None], None


def _in_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    real: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (T, heads, D): the kernel's attention over the packed row; `real` (n, S) as lengths, `seeds` (n,)."""
    from effllm_kernels import flash_attn_varlen_func  # noqa: PLC0415 (loads triton)

    starts = functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    side = -1 if window is None else window - 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return flash_attn_varlen_func(
        q, k, v, starts, starts, real.shape[1], real.shape[1], dropout, scaling, window_size=(side, side), seed=seeds
    )


def _mask(real: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return who may be seen, bool (n, 1, 1 or S, S). Past a sequence's end a row sees the sequence: none is empty."""
    seen = real[:, None, None, :]
    if window is None:
        return seen
    places = torch.arange(real.shape[1], device=real.device)
    near = (places[:, None] - places[None, :]).abs() < window
    return (seen & near) | (seen & ~real[:, None, :, None])


def _no_mask(**_: object) -> None:
    """Give the model no mask: `_packed_attention` makes its own from `sequence_index`."""
