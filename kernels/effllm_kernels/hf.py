"""The kernels in transformers: `register()`, then `from_pretrained(..., attn_implementation="effllm")`.

transformers 5 asks two functions of one name: a mask function, once per forward pass, for who may see whom, and an
attention function, in every layer. Ours hand over lengths, 2-D masks and window bounds; a (B, 1, S, S) mask is formed
only for patterns that these cannot say, and then added as a bias. Needs the package transformers, which nothing else in
effllm_kernels imports.

What differs from eager attention: an encoder's padded rows are not computed and give zeros, and so does a row that sees
no key, where eager averages over what is masked. No weights are returned. Models that do not use the interface cannot
take the name: they keep their own attention (DeBERTa-v2), or fail on the mask (MPNet). Rotary models hand over q and k
already rotated: the kernels' own rotary embedding (`rotary_cos` of `attention`) is for modules that call `attention`
themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import masking_utils as masks

from .flash import flash_attn_varlen_func
from .fused_attention import attention

SELF_ATTENDING = frozenset(
    ("albert", "bert", "camembert", "distilbert", "electra", "eurobert", "modernbert", "roberta", "t5", "xlm-roberta")
)
"""Model types whose bidirectional masks belong to self-attention, unless they are configured as decoders."""
NOT_COVERED = {
    "output_attentions": "attention weights, which are never formed",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "cache": "paged caches",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}


class Mask(NamedTuple):
    """Who sees whom, as the layers get it in place of a mask tensor.

    The first four are arguments of `attention`. A row sees `left` keys before its own and `right` after, None for no
    bound. `starts` (sequences + 1,) int32 and `longest` describe sequences that lie one after another in each row.
    """

    key_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    query_mask: Tensor | None = None
    query_lengths: Tensor | None = None
    left: int | None = None
    right: int | None = None
    starts: Tensor | None = None
    longest: int = 0


class Pattern(NamedTuple):
    """What a mask function of transformers says: window bounds, and (B, S) numbers of packed sequences."""

    left: int | None = None
    right: int | None = None
    sequences: Tensor | None = None


def register(name: str = "effllm") -> None:
    """Make `attn_implementation=name` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, _mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masks.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: object,
) -> Mask | Tensor:
    """Return who sees whom as a Mask where it can say it, else as (B, 1, q_length, kv_length) bool."""
    pattern = _pattern(mask_function)
    keys = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
    # The kernel lays the last row on the last key; a static cache, longer than what it holds, needs a mask.
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    bounded = pattern is not None and (pattern.left is not None or pattern.right is not None)
    if pattern is None or (bounded and not aligned) or (keys is not None and keys.shape[1] != kv_length):
        return masks.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, use_vmap=use_vmap,
            allow_is_causal_skip=False, device=device,
        )  # fmt: skip
    if pattern.sequences is not None:
        starts = _starts(pattern.sequences)
        return Mask(left=pattern.left, right=pattern.right, starts=starts, longest=int(starts.diff().max()))
    if keys is None:
        return Mask(left=pattern.left, right=pattern.right)
    lengths = (keys * torch.arange(1, kv_length + 1, device=keys.device, dtype=torch.int32)).amax(1)
    rows = None
    if pattern.right == 0 or (q_length == kv_length and _attends_to_itself(config)):
        rows = keys[:, kv_length - q_length :]
    own = lengths if rows is not None and q_length == kv_length else None
    return Mask(keys, lengths, rows, own, pattern.left, pattern.right)


def _attends_to_itself(config: Any) -> bool:
    """Return whether the mask's keys are the rows too, so that padded rows can be skipped."""
    decodes = any(getattr(config, flag, False) for flag in ("is_decoder", "is_encoder_decoder", "add_cross_attention"))
    return getattr(config, "model_type", None) in SELF_ATTENDING and not decodes


def _pattern(function: Callable[..., Any]) -> Pattern | None:
    """Return what a mask function says, None where it is not one of transformers' own that we know."""
    if function is masks.bidirectional_mask_function:
        return Pattern()
    if function is masks.causal_mask_function:
        return Pattern(right=0)
    for maker, read in PATTERNS.items():
        if found := _captured(function, maker):
            return read(**found)
    return None


def _all(mask_functions: tuple[Callable[..., Any], ...]) -> Pattern | None:
    """Return what holds where every one of the functions holds."""
    known = [part for part in map(_pattern, mask_functions) if part is not None]
    if len(known) < len(mask_functions):
        return None
    left, right, sequences = ([x for x in column if x is not None] for column in zip(*known, strict=True))
    if len(sequences) > 1:
        return None
    return Pattern(min(left, default=None), min(right, default=None), sequences[0] if sequences else None)


PATTERNS: dict[Callable[..., Any], Callable[..., Pattern | None]] = {
    masks.sliding_window_overlay: lambda sliding_window: Pattern(left=sliding_window - 1),
    masks.sliding_window_bidirectional_overlay: lambda sliding_window: Pattern(sliding_window, sliding_window),
    masks.packed_sequence_mask_function: lambda packed_sequence_mask: Pattern(sequences=packed_sequence_mask),
    masks.and_masks: _all,
}
"""Maker of mask functions -> what one of its functions says, from the variables that it captured."""
if hasattr(masks, "remap_positions_for_packed_sequence"):  # newer than transformers 5.17
    # Positions count from each sequence's start: distances within it stay.
    PATTERNS[masks.remap_positions_for_packed_sequence] = lambda mask_function, position_ids: _pattern(mask_function)


def _captured(function: Callable[..., Any], maker: Callable[..., Any]) -> dict[str, Any]:
    """Return the variables that an inner function of `maker` holds, none when it is not one.

    torch.compile cannot look into closures: there windows and packed positions become masks.
    """
    if torch.compiler.is_compiling():
        return {}
    code: Any = getattr(function, "__code__", None)
    if code not in maker.__code__.co_consts:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)}


def _starts(sequences: Tensor) -> Tensor:
    """Return where each sequence begins, and the end, in the flattened (B, S) numbers of sequences."""
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    first = begins.flatten().nonzero()[:, 0]
    return torch.cat([first, first.new_full((1,), sequences.numel())]).to(torch.int32)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return ((B, S_q, H, D), None) of query (B, H, S_q, D), key and value (B, H_k, S_k, D).

    Raises ValueError naming what the kernels do not cover.
    """
    for name, what in NOT_COVERED.items():
        if others.get(name) is not None and others[name] is not False:
            raise ValueError(f"effllm attention does not cover {what} ({name}): use attn_implementation='eager'")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask, bias = _mask_and_bias(module, q, k, attention_mask, is_causal, sliding_window, position_bias)
    starts = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if any(x is not None for x in starts):
        if any(x is None for x in starts):
            raise ValueError("cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k go together")
    elif mask.starts is not None:
        starts = (mask.starts, mask.starts, mask.longest, mask.longest)
    if starts[0] is None:
        out = attention(
            q, k, v, key_mask=mask.key_mask, key_lengths=mask.key_lengths, query_mask=mask.query_mask,
            query_lengths=mask.query_lengths, bias=bias, window=(mask.left, mask.right), dropout_p=dropout,
            scale=scaling, softcap=softcap,
        )  # fmt: skip
        return out, None
    if mask.key_mask is not None or bias is not None:
        made = " (torch.compile turns windows and packed positions into one)" if torch.compiler.is_compiling() else ""
        raise ValueError(f"packed sequences take no attention_mask{made} and no position bias: leave them out")
    sides = (-1 if mask.left is None else mask.left, -1 if mask.right is None else mask.right)
    rows, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    starts_q, starts_k, longest_q, longest_k = cast("tuple[Tensor, Tensor, int, int]", starts)
    out = flash_attn_varlen_func(
        rows, keys, values, starts_q, starts_k, longest_q, longest_k,
        dropout_p=dropout, softmax_scale=scaling, window_size=sides, softcap=softcap or 0.0,
    )  # fmt: skip
    return out.view(q.shape), None


def _mask_and_bias(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    given: Mask | Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
    position_bias: Tensor | None,
) -> tuple[Mask, Tensor | None]:
    """Return the mask, and what is added to the logits: a 4-D mask, T5's bias, or both."""
    if isinstance(given, Mask):
        return given, position_bias
    if given is None:  # a model that makes no mask says by attributes what it means
        causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
        if causal is None or (causal and 1 < q.shape[1] != k.shape[1]):
            raise ValueError(f"{type(module).__name__} passes no mask and does not say whether attention is causal")
        side = None if sliding_window is None else sliding_window - 1
        return Mask(left=side, right=0 if causal else side), position_bias
    if given.dim() != 4:
        raise ValueError(f"a mask given by hand must be (B, 1 or H, S_q, S_k), got {tuple(given.shape)}")
    hidden = ~given if given.dtype == torch.bool else given <= torch.finfo(given.dtype).min / 2
    bias = torch.zeros_like(given, dtype=q.dtype) if given.dtype == torch.bool else given
    bias = bias.masked_fill(hidden, float("-inf"))
    return Mask(), bias if position_bias is None else position_bias + bias
