"""From tensors to kernel calls: tile sizes, views, grids.

A tile size depends on dtype, head width and the longest sequence, never on how many sequences there are. A longer tile
only adds masked keys and rows, that is exact zeros, to a sum whose order stays: a sequence's bits do not depend on its
neighbours' lengths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import tile as device
from .backward import key_kernel, query_kernel, whole_kernel
from .forward import forward_kernel
from .term_gradients import bias_kernel, relative_kernel
from .terms import UNLIMITED, Terms

INTERPRETED: bool = device.INTERPRETED.value


class Call(NamedTuple):
    """A kernel with everything it is launched with."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch it; nothing is done for an empty grid."""
        if self.programs:
            self.kernel[(self.programs,)](*self.args, **self.options)


class Tile(NamedTuple):
    """Rows and keys of one program's tile, and how the compiler schedules it."""

    rows: int
    keys: int
    warps: int
    stages: int


def forward_tile(q: Tensor, terms: Terms) -> Tile:
    """Return the forward tile; for half precision the fastest of those measured on an H100."""
    width = q.shape[-1]
    if q.dtype.itemsize > 2:
        tile = Tile(32, 32, 4, 2)
    elif width > 128:
        tile = Tile(64, 64, 8, 2)
    elif width > 64:
        tile = Tile(128, 64, 4 if terms.rotary_cos is None else 8, 2)
    else:
        tile = Tile(64, 64, 4, 3) if _is_sparse(terms) else Tile(128, 64, 8, 3)
    return _shrink(tile, terms, least_keys=16)


class BackwardTiles(NamedTuple):
    """The tiles of the two backward kernels, and of the one that stands for both where `whole` holds all keys."""

    query: Tile
    key: Tile
    whole: Tile


def backward_tiles(q: Tensor, terms: Terms) -> BackwardTiles:
    """Return the backward tiles; those of plain logits in half precision are the fastest measured on an H100."""
    width = q.shape[-1]
    looks_up, turns = any(x is not None for x in (terms.bias, terms.c2p, terms.p2c)), terms.rotary_cos is not None
    if q.dtype.itemsize > 2:
        tiles = [Tile(32, 32, 8, 1)] * 3
    elif width > 128:
        tiles = [Tile(64, 32, 8, 1)] * 3
    elif looks_up or (turns and width > 64):
        tiles = [Tile(64, 64, 8 if turns else 4, 1)] * 3
    elif width > 64:
        tiles = [Tile(64, 32, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1)]
    elif turns:  # chosen for what fits in registers, not measured
        tiles = [Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 128, 8, 1)]
    else:
        tiles = [Tile(64, 64, 4, 3), Tile(32, 64, 4, 2), Tile(64, 128, 4, 2)]
    return BackwardTiles(*(_shrink(tile, terms, least_keys=64) for tile in tiles))


def _is_sparse(terms: Terms) -> bool:
    """Return whether many rows see few keys, or there are few of them."""
    bounded = terms.left != UNLIMITED or terms.right != UNLIMITED
    return bounded or terms.packed or terms.key_lengths is not None


def _shrink(tile: Tile, terms: Terms, least_keys: int) -> Tile:
    """Return the tile without rows and keys that no sequence has; 64 rows are the least of Hopper's matrix unit."""
    rows, keys = (max(16, _power_of_2(size)) for size in (terms.max_query, terms.max_key))
    small = tile._replace(rows=min(tile.rows, max(64, rows)), keys=min(tile.keys, max(least_keys, keys)))
    return small if small == tile or small.rows * small.keys > 64 * 64 else small._replace(warps=4)


def forward(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return (out, log-sum-exp), as `reference.forward`."""
    make = torch.zeros if terms.packed else torch.empty  # rows after the last packed sequence belong to no program
    out = make(q.shape, dtype=q.dtype, device=q.device)
    sums = (q.shape[1], q.shape[0]) if terms.packed else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(sums, float("-inf"), dtype=_sum_dtype(q), device=q.device) if terms.packed else q.new_empty(
        sums, dtype=_sum_dtype(q))  # fmt: skip
    _run(q, [forward_call(q, k, v, out, lse, terms)])
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, terms: Terms,
    grads: tuple[Tensor, Tensor, Tensor], dbias: Tensor | None, dc2p: Tensor | None, dp2c: Tensor | None,
) -> None:  # fmt: skip
    """Fill `grads`, the gradients of (q, k, v), of any strides, and those of the terms where given."""
    delta = torch.empty_like(lse)
    calls = backward_calls(dout, dlse, q, k, v, out, lse, delta, terms, grads)
    calls += term_calls(dout, q, k, v, lse, delta, terms, dbias, dc2p, dp2c)
    _run(q, calls)


def forward_call(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, terms: Terms) -> Call:
    """Return the forward launch."""
    tile = forward_tile(q, terms)
    batch, heads, group = _sizes(q, k, terms)
    blocks = _parts(terms.max_query, tile.rows)
    args = (_view(q), _view(k), _view(v), _view(out), _sums_view(lse), _device_terms(terms), blocks, heads, group,
            terms.max_query, terms.max_key)  # fmt: skip
    single = {"SINGLE": terms.max_key <= tile.keys, "PACKED": terms.packed}
    return Call(forward_kernel, blocks * heads * batch, args, single | _blocks(q, tile) | _options(tile))


def backward_calls(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, delta: Tensor,
    terms: Terms, grads: tuple[Tensor, Tensor, Tensor],
) -> list[Call]:  # fmt: skip
    """Return the launches that fill delta and the gradients of q, k, v: one where all keys fit in a tile, else two."""
    tiles = backward_tiles(q, terms)
    batch, heads, group = _sizes(q, k, terms)
    of_query, of_key, of_whole = (_blocks(q, tile) | _options(tile) for tile in tiles)
    inputs, sizes = (_view(q), _view(k), _view(v)), (heads, group, terms.max_query, terms.max_key)
    sums, known, own = _sums_view(lse), _sums_view(delta), _device_terms(terms)
    dsums = None if dlse is None else _sums_view(dlse)
    dq, dk, dv = (_view(grad) for grad in grads)
    if terms.max_key <= tiles.whole.keys:
        whole = (*inputs, _view(out), _view(dout), sums, dsums, known, dq, dk, dv, own, *sizes)
        return [Call(whole_kernel, batch * heads // group, whole, of_whole)]
    row_blocks, key_blocks = _parts(terms.max_query, tiles.query.rows), _parts(terms.max_key, tiles.key.keys)
    rows = (*inputs, _view(out), _view(dout), sums, dsums, known, dq, own, row_blocks, *sizes)
    keys = (*inputs, _view(dout), sums, known, dk, dv, own, key_blocks, *sizes)
    return [
        Call(query_kernel, row_blocks * heads * batch, rows, of_query),
        Call(key_kernel, key_blocks * heads // group * batch, keys, of_key),
    ]


def term_calls(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, terms: Terms,
    dbias: Tensor | None, dc2p: Tensor | None, dp2c: Tensor | None,
) -> list[Call]:  # fmt: skip
    """Return the launches that fill the gradients of the terms that are given."""
    size = 32 if q.dtype.itemsize > 2 or q.shape[-1] > 128 else 64
    batch, heads, group = _sizes(q, k, terms)
    options = _blocks(q, None) | {"BLOCK": size} | _options(Tile(size, size, 4, 1))
    inputs = (_view(q), _view(k), _view(v), _view(dout), _sums_view(lse), _sums_view(delta))
    own, ends, calls = _device_terms(terms), (terms.max_query, terms.max_key), []
    if dbias is not None:
        every = dbias.shape[2] == terms.max_query
        programs = dbias.shape[0] * dbias.shape[1] * (_parts(ends[0], size) if every else 1)
        args = (*inputs, _term_view(dbias), own, batch, heads, group, dbias.shape[0], dbias.shape[1], *ends)
        calls.append(Call(bias_kernel, programs * _parts(ends[1], size), args, options | {"EVERY_ROW": every}))
    # With tiles of 64 Triton 3.6 lets Hopper's matrix unit read outside the relative kernel's shared memory.
    small = 32
    for grad, of_keys in ((dc2p, False), (dp2c, True)):
        if grad is not None:
            columns = min(64, max(16, _power_of_2(grad.shape[3])))
            programs = _parts(grad.shape[1], small) * _parts(grad.shape[3], columns) * heads * batch
            relative = (*inputs, _view(grad), own, heads, group, grad.shape[3], *ends)
            more = {"BLOCK": small, "OF_KEYS": of_keys, "COLUMNS": columns}
            calls.append(Call(relative_kernel, programs, relative, options | more))
    return calls


def _parts(size: int, part: int) -> int:
    """Return size / part, rounded up; Triton's own function takes several µs of each launch."""
    return -(-size // part)


def _power_of_2(size: int) -> int:
    """Return the least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def _run(q: Tensor, calls: Iterable[Call]) -> None:
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        for call in calls:
            call.run()


def _sum_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _sizes(q: Tensor, k: Tensor, terms: Terms) -> tuple[int, int, int]:
    """Return (sequences, heads, query heads per key head)."""
    batch = q.shape[0] if terms.query_starts is None else terms.query_starts.shape[0] - 1
    return batch, q.shape[-2], q.shape[-2] // k.shape[-2]


def _blocks(q: Tensor, tile: Tile | None) -> dict[str, Any]:
    width = q.shape[-1]
    sizes: dict[str, Any] = {} if tile is None else {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    acc = tl.float64 if q.dtype == torch.float64 else tl.float32
    return sizes | {"WIDTH": width, "BLOCK_D": max(16, _power_of_2(width)), "ACC": acc}


def _options(tile: Tile) -> dict[str, Any]:
    # Fused multiply-adds are part of the speed; Triton 3.10 stops assuming them.
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _view(x: Tensor) -> device.View:
    """Return the view of (B, S, H, D), or of (T, H, D), whose batch stride is 0."""
    return device.View(x, *(() if x.dim() == 4 else (0,)), *x.stride())


def _sums_view(x: Tensor) -> device.View:
    """Return the view of (B, H, S) or (H, T)."""
    batch, head, row = x.stride() if x.dim() == 3 else (0, *x.stride())
    return device.View(x, batch, row, head, 0)


def _term_view(x: Tensor) -> device.View:
    """Return the view of (1|B, 1|H, 1|S_q, S_k); a dimension of size 1 does not move."""
    batch, head, row, column = (0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
    return device.View(x, batch, row, head, column)


def _mask_view(x: Tensor | None) -> device.View | None:
    if x is None:
        return None
    return device.View(x.view(torch.uint8) if x.dtype == torch.bool else x, x.stride(0), x.stride(1), 0, 0)


def _table_view(x: Tensor | None) -> device.View | None:
    """Return the view of (positions, pairs) or (1|B, positions, pairs)."""
    if x is None:
        return None
    sequence = x.stride(0) if x.dim() == 3 and x.shape[0] > 1 else 0
    return device.View(x, sequence, x.stride(-2), 0, x.stride(-1))


def _device_terms(terms: Terms) -> device.Terms:
    slopes = terms.alibi_slopes
    positions, pairs = (None, None) if terms.rotary_cos is None else terms.rotary_cos.shape[-2:]
    steps = () if slopes is None else (0, slopes.stride(0)) if slopes.dim() == 1 else slopes.stride()
    return device.Terms(
        query_starts=terms.query_starts,
        key_starts=terms.key_starts,
        query_lengths=terms.query_lengths,
        key_lengths=terms.key_lengths,
        query_mask=_mask_view(terms.query_mask),
        key_mask=_mask_view(terms.key_mask),
        heads=None if terms.heads is None else terms.heads.view(torch.uint8),
        left=None if terms.left == UNLIMITED else terms.left,
        right=None if terms.right == UNLIMITED else terms.right,
        scale=terms.scale,
        softcap=terms.softcap or None,
        bias=None if terms.bias is None else _term_view(terms.bias),
        alibi=None if slopes is None else device.View(slopes, steps[0], 0, steps[1], 0),
        c2p=None if terms.c2p is None else _view(terms.c2p),
        p2c=None if terms.p2c is None else _view(terms.p2c),
        index=terms.relative_index,
        cos=_table_view(terms.rotary_cos),
        sin=_table_view(terms.rotary_sin),
        positions=positions,
        pairs=pairs,
        step=1 if terms.rotary_interleaved and pairs else pairs,
        seed=terms.seed,
        threshold=None if terms.seed is None else terms.threshold,
        rescale=None if terms.seed is None else 65536 / (65536 - terms.threshold),
        own_seeds=None if terms.seed is None or terms.seed.shape[0] == 1 else 1,
    )
