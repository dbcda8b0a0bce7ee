"""Dropout whose masks belong to the sequences, not to the batch that they are in.

What is dropped is a pure function of a sequence's key (`effllm.data.draws`), of how many dropouts the forward pass had
before, and of the place in the sequence, so that it does not depend on padding, micro-batches or processes.
`SequenceDropout` replaces PyTorch's own dropout, and that of its scaled-dot-product attention, in whatever a model
does inside the block. The attention kernels' own dropout takes `SequenceDropout.seeds` instead. Other attention with
dropout is written out, since PyTorch's takes no mask for it: its memory grows with the square of the length.

The bits are those of the draws' SplitMix64 (Steele, Lea and Flood, 2014): one of its words decides four neighbours,
16 bits each, so that the rate is a multiple of 1/65536.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from effllm.data.draws import BLOCK, GOLDEN
from effllm.train.devices import KERNEL_DEVICES

STEPS = 1 << 16
"""The rates that there are; a word of 64 bits gives as many decisions as it has parts of so many values."""
ROW_BITS, HEAD_BITS = 12, 26
"""A counter holds the groups of four neighbours in its lowest bits, then the row, then the head."""
LARGEST = 4 << ROW_BITS


def signed(word: int) -> int:
    """Return a 64-bit word as the signed number that has its bits; torch has no unsigned arithmetic."""
    word &= 2**64 - 1
    return word - 2**64 if word >> 63 else word


def mix(bits: Tensor) -> Tensor:
    """Return `effllm.data.draws.mix` of int64 words."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ _shifted(bits, shift)) * signed(factor)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Return the words shifted to the right, zeros moving in."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def rates(config: Mapping[str, Any]) -> dict[str, float]:
    """Return a transformers config's dropout probabilities, by whatever names the architecture gives them."""
    return {name: value for name, value in config.items() if "drop" in name and isinstance(value, float)}


def sequence_dropout(
    keys: Tensor | None, positions: Tensor | None = None, sequence_index: Tensor | None = None
) -> SequenceDropout | None:
    """Return `SequenceDropout`, or None without keys.

    `sequence_index` (n, S) holds the places of the sequences in a packed row, -1 where one has ended.
    """
    if keys is None:
        return None
    return SequenceDropout(keys, positions, None if sequence_index is None else (sequence_index >= 0).sum(1))


def within(dropout: SequenceDropout | None) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a dropout, or one that changes nothing.

    What a `with` statement binds by `as` is None in compiled code, so dropout that is used inside is made before.
    """
    return contextlib.nullcontext() if dropout is None else dropout


class SequenceDropout(TorchFunctionMode):
    """Inside the block, what dropout drops is a function of each sequence's key.

    `keys` int64 (n,) are those of the sequences, which tensors hold along their first dimension: token states
    (n, S, H), pooled states (n, H), attention probabilities (n, heads, S, S). With `positions` int64 (T,) and
    `lengths` int64 (n,), token states are one packed row (1, T, H) instead, whose tokens have these places in their
    sequences. Dropout on anything else stays PyTorch's own, such as DeBERTa's on its relative positions, in causal
    attention, or where there are more than 16,384 columns, or heads or rows of attention.
    """

    def __init__(self, keys: Tensor, positions: Tensor | None = None, lengths: Tensor | None = None) -> None:
        super().__init__()
        self._keys, self._positions = keys, positions
        self._token_keys = None
        if positions is not None and lengths is not None:
            self._token_keys = keys.repeat_interleave(lengths, output_size=len(positions))
        self._calls = 0

    def seeds(self) -> Tensor:
        """Return int64 (n,), what a kernel that drops by itself draws from: others for each call."""
        self._calls += 1
        return self._keys + self._calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute dropout and attention with dropout here, everything else as it is."""
        if func is functional.dropout:
            return self._dropout(*args, **(kwargs or {}))
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002 (torch's own signature)
        rate = round(p * STEPS)
        if not training or not rate:
            return functional.dropout(input, 0.0, training, inplace)
        if rate == STEPS:
            return input * 0
        found = self._kept(input.shape, rate)
        if found is None:
            return functional.dropout(input, p, training, inplace)
        return torch.where(found, input * (STEPS / (STEPS - rate)), 0)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return softmax(q kᵀ · scale) v with dropped probabilities, (n, heads, S, D)."""
        if not dropout_p or is_causal or query.dim() != 4 or max(query.shape[2], key.shape[2]) > LARGEST:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        logits = (query @ key.transpose(-2, -1)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, torch.finfo(logits.dtype).min)
        elif attn_mask is not None:
            logits = logits + attn_mask
        return self._dropout(logits.softmax(-1).to(value.dtype), dropout_p) @ value

    def _kept(self, shape: Sequence[int], rate: int) -> Tensor | None:
        """Return what is kept of a tensor of this shape, bool; None where it does not hold sequences."""
        outer, places = shape[:-1], None
        if self._token_keys is not None and self._positions is not None and outer == (1, len(self._positions)):
            keys, places = self._token_keys, self._positions
        elif 1 <= len(outer) <= 3 and outer[0] == len(self._keys):
            keys = self._keys
        else:
            return None
        if shape[-1] > LARGEST or (len(outer) == 3 and (outer[1] > LARGEST or outer[2] > LARGEST)):
            return None
        self._calls += 1
        found: Tensor = torch.ops.effllm.kept(keys, places, shape, self._calls - 1, rate)
        return found


@torch.library.custom_op(
    "effllm::kept",
    mutates_args=(),
    schema="(Tensor keys, Tensor? places, SymInt[] shape, SymInt call, SymInt rate) -> Tensor",
)
def kept(keys: Tensor, places: Tensor | None, shape: Sequence[int], call: int, rate: int) -> Tensor:
    """Return what is kept of a tensor (n, …, columns), or of a packed row (1, T, columns) of tokens at `places`.

    An operator, so that compiled code does not differ by a bit: compilers take 64-bit arithmetic on places for indices.
    On a GPU with triton one kernel draws and decides, with the same bits.
    """
    starts = keys
    if places is not None:
        starts = (keys + places * signed(GOLDEN << ROW_BITS))[None]
    else:
        for bits, size in zip((HEAD_BITS, ROW_BITS)[4 - len(shape) :], shape[1:-1], strict=True):
            starts = starts[..., None] + torch.arange(size, device=keys.device) * signed(GOLDEN << bits)
    starts = starts + signed(GOLDEN * (call * BLOCK + 1))
    if keys.device.type in KERNEL_DEVICES:
        from effllm_kernels.keep import keep  # noqa: PLC0415 (loads triton)

        return keep(starts, shape[-1], rate)
    groups = torch.arange(shape[-1] // 4 + 1, device=keys.device) * signed(GOLDEN)
    return mix(starts[..., None] + groups).view(torch.int16)[..., : shape[-1]] >= rate - STEPS // 2


@kept.register_fake
def _(keys: Tensor, places: Tensor | None, shape: Sequence[int], call: int, rate: int) -> Tensor:
    return keys.new_empty(shape, dtype=torch.bool)
