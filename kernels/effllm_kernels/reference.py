"""The specification: every operation in plain torch, in float32 (float64 for float64 inputs), on any device.

    q, k turned by their positions' angles (`_turned`), then
    z = softcap(scale · q kᵀ) + bias + alibi + c2p + p2c      softcap(x) = c · tanh(x / c)
    p = softmax(z over the visible keys)                      zero for a row that sees none
    o = (m ∘ p / (1 - rate)) v                                m: the dropout mask

and, with dp = m ∘ (do vᵀ) / (1 - rate) and Δ = Σ_d o · do - dlse,

    dz = p ∘ (dp - Δ)      dq = scale · (dz ∘ softcap') k      dk = scale · (dz ∘ softcap')ᵀ q      dv = (m ∘ p)ᵀ do

Memory is S × S: this says what is right, not how to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .terms import UNLIMITED, Terms

ROUNDS, WORD = 7, 0xFFFFFFFF


def forward(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return (out like q, log-sum-exp (B, H, S_q), or (H, T) for packed sequences, -inf where a row sees no key)."""
    work = working_dtype(q)
    if terms.packed:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=work, device=q.device)
        for number, rows, keys, one in _sequences(q, k, terms):
            part, sums = _dense(q[None, rows], k[None, keys], v[None, keys], one, number)
            out[rows], lse[:, rows] = part[0], sums[0]
        return out, lse
    return _dense(q, k, v, terms, 0)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of (q, k, v, bias, c2p, p2c); None for a term that is absent."""
    if terms.packed:
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        for number, rows, keys, one in _sequences(q, k, terms):
            sums = None if dlse is None else dlse[None, :, rows]
            tensors = (q[None, rows], k[None, keys], v[None, keys], out[None, rows], lse[None, :, rows])
            parts = _dense_backward(dout[None, rows], sums, *tensors, one, number)
            grads[0][rows], grads[1][keys], grads[2][keys] = (part[0] for part in parts[:3])
        return grads[0], grads[1], grads[2], None, None, None
    return _dense_backward(dout, dlse, q, k, v, out, lse, terms, 0)


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def visible(q: Tensor, k: Tensor, terms: Terms) -> Tensor:
    """Return (B, H, S_q, S_k) bool, true where a row sees a key."""
    rows, keys = _counting(q, terms.query_lengths, terms.query_mask), _counting(k, terms.key_lengths, terms.key_mask)
    seen = rows[:, None, :, None] & keys[:, None, None, :]
    distance = aligned_distance(q, k)
    if terms.left != UNLIMITED:
        seen = seen & (distance <= terms.left)
    if terms.right != UNLIMITED:
        seen = seen & (distance >= -terms.right)
    kept = torch.ones(q.shape[2], dtype=torch.bool, device=q.device) if terms.heads is None else terms.heads
    return seen & kept[None, :, None, None]


def aligned_distance(q: Tensor, k: Tensor) -> Tensor:
    """Return i + S_k - S_q - j as (S_q, S_k): the last row lies on the last key."""
    i = torch.arange(q.shape[1], device=q.device)[:, None]
    return i + k.shape[1] - q.shape[1] - torch.arange(k.shape[1], device=q.device)


def dropout_mask(seed: Tensor, threshold: int, first: int, shape: Sequence[int]) -> Tensor:
    """Return (B, H, S_q, S_k) bool, true where a probability is kept; `first` is the number of the first sequence.

    One Philox-4x32-7 draw (Salmon et al. 2011), keyed by the seed and counted by (j div 8, i, sequence · H + head, 0),
    gives 16 bits to each of 8 neighbouring keys, low halves first; fewer than `threshold` drops. Where there is a seed
    for each sequence it is counted by (j div 8, i, head, 0).
    """
    batch, heads, rows, keys = shape
    device = seed.device
    numbers = first * heads + torch.arange(batch * heads, device=device)
    if len(seed) > 1:
        numbers, seed = numbers % heads, seed.repeat_interleave(heads)[:, None, None]
    zero = torch.zeros(batch * heads, rows, -(-keys // 8), dtype=torch.int64, device=device)
    c = [zero + torch.arange(zero.shape[2], device=device), zero + torch.arange(rows, device=device)[:, None]]
    c += [zero + numbers[:, None, None], zero]
    low, high = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        (h0, l0), (h1, l1) = _multiply(0xD2511F53, c[0]), _multiply(0xCD9E8D57, c[2])
        c = [h1 ^ c[1] ^ low, l1, h0 ^ c[3] ^ high, l0]
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    draws = torch.stack([half for word in c for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (draws.flatten(2)[..., :keys] >= threshold).view(batch, heads, rows, keys)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a product of 32-bit numbers held in int64, without leaving 63 bits."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _sequences(q: Tensor, k: Tensor, terms: Terms) -> list[tuple[int, slice, slice, Terms]]:
    """Return number, rows, keys and own terms of each packed sequence that has rows.

    The number is what dropout counts by, 0 for a sequence with a seed of its own.
    """
    assert terms.query_starts is not None
    assert terms.key_starts is not None
    starts, key_starts, found = terms.query_starts.tolist(), terms.key_starts.tolist(), []
    own_seeds = terms.seed is not None and len(terms.seed) > 1
    for n in range(len(starts) - 1):
        one = terms._replace(
            query_starts=None,
            key_starts=None,
            alibi_slopes=_of_sequence(terms.alibi_slopes, n, 2),
            rotary_cos=_of_sequence(terms.rotary_cos, n, 3),
            rotary_sin=_of_sequence(terms.rotary_sin, n, 3),
            seed=_of_sequence(terms.seed, n, 1),
        )
        if starts[n + 1] > starts[n]:
            found.append(
                (0 if own_seeds else n, slice(starts[n], starts[n + 1]), slice(key_starts[n], key_starts[n + 1]), one)
            )
    return found


def _of_sequence(x: Tensor | None, number: int, dimensions: int) -> Tensor | None:
    """Return the part of a sequence where there is one for each, that is with so many dimensions."""
    shared = x is None or x.dim() < dimensions or x.shape[0] == 1
    return x if shared or x is None else x[number : number + 1]


def _counting(x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    counts = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if lengths is not None:
        counts = counts & (torch.arange(x.shape[1], device=x.device) < lengths[:, None])
    return counts if mask is None else counts & (mask != 0)


def _clean(x: Tensor, counts: Tensor, heads: int) -> Tensor:
    """Return (B, heads, S, D) in the working dtype, each key head repeated, with rows that do not count zeroed."""
    x = torch.where(counts[:, :, None, None], x, 0).to(working_dtype(x)).transpose(1, 2)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _clean_all(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys = _counting(q, terms.query_lengths, terms.query_mask), _counting(k, terms.key_lengths, terms.key_mask)
    own, other = _clean(q, rows, q.shape[2]), _clean(k, keys, q.shape[2])
    own, other = _turned(own, rows, terms, k.shape[1] - q.shape[1]), _turned(other, keys, terms, 0)
    return own, other, _clean(v, keys, q.shape[2])


def _turned(x: Tensor, counts: Tensor, terms: Terms, offset: int, *, back: bool = False) -> Tensor:
    """Return (B, H, S, D) with each pair of columns (a, b) turned to (a cos - b sin, b cos + a sin); back if `back`.

    Row i takes the angles at position i + offset. A row outside the tables stays, as one that does not count.
    """
    if terms.rotary_cos is None or terms.rotary_sin is None:
        return x
    length, pairs = terms.rotary_cos.shape[-2:]
    position = torch.arange(x.shape[2], device=x.device) + offset
    inside = (counts & (position >= 0) & (position < length))[..., None]
    cos, sin = (
        torch.where(inside, table[..., position.clamp(0, length - 1), :].to(x.dtype), still)[:, None]
        for table, still in ((terms.rotary_cos, 1), (terms.rotary_sin, 0))
    )
    part, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = part.unflatten(-1, (pairs, 2)).unbind(-1) if terms.rotary_interleaved else part.split(pairs, -1)
    sin = -sin if back else sin
    both = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    both = both if terms.rotary_interleaved else both.transpose(-1, -2)
    return torch.cat([both.flatten(-2), rest], -1)


def _columns(terms: Terms, queries: int, keys: int) -> Tensor:
    """Return (S_q, S_k): the column of each pair's distance."""
    assert terms.relative_index is not None
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    return terms.relative_index.long()[(i - j + keys - 1).to(terms.relative_index.device)]


def _logits(product: Tensor, q: Tensor, k: Tensor, terms: Terms) -> tuple[Tensor, Tensor | float]:
    """Return the logits and the softcap's slope, from the scaled products (B, H, S_q, S_k)."""
    slope: Tensor | float = 1.0
    z = product
    if terms.softcap:
        bent = torch.tanh(z / terms.softcap)
        z, slope = terms.softcap * bent, 1 - bent * bent
    if terms.bias is not None:
        z = z + terms.bias.to(z.dtype)
    if terms.alibi_slopes is not None:
        z = z - terms.alibi_slopes.to(z.dtype)[..., :, None, None] * aligned_distance(q, k).abs()
    if terms.c2p is not None:
        index = _columns(terms, q.shape[1], k.shape[1]).expand(*z.shape)
        z = z + terms.c2p.to(z.dtype).transpose(1, 2).gather(3, index)
    if terms.p2c is not None:
        index = _columns(terms, q.shape[1], k.shape[1]).T.expand(*z.mT.shape)
        z = z + terms.p2c.to(z.dtype).transpose(1, 2).gather(3, index).mT
    return z, slope


def _weights(z: Tensor, lse: Tensor) -> Tensor:
    """Return the softmax of logits, zero in rows that see no key.

    Not exp(z - lse): where a mask adds a large negative number to a whole row, the lse rounds its small terms away.
    """
    return torch.where((lse == float("-inf"))[..., None], 0, z.softmax(-1))


def _dense(q: Tensor, k: Tensor, v: Tensor, terms: Terms, first: int) -> tuple[Tensor, Tensor]:
    rows, keys, values = _clean_all(q, k, v, terms)
    z, _ = _logits(rows @ keys.mT * terms.scale, q, k, terms)
    z = torch.where(visible(q, k, terms), z, float("-inf"))
    lse = z.logsumexp(-1)
    p = _weights(z, lse)
    if terms.seed is not None:
        kept = dropout_mask(terms.seed, terms.threshold, first, p.shape)
        p = torch.where(kept, p / (1 - terms.threshold / 65536), 0)
    return (p @ values).transpose(1, 2).to(q.dtype).contiguous(), lse


def _dense_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: Terms,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    rows, keys, values = _clean_all(q, k, v, terms)
    counts = _counting(q, terms.query_lengths, terms.query_mask)
    z, slope = _logits(rows @ keys.mT * terms.scale, q, k, terms)
    seen = visible(q, k, terms)
    p = _weights(torch.where(seen, z, float("-inf")), lse)
    do, o = _clean(dout, counts, q.shape[2]), _clean(out, counts, q.shape[2])
    delta = (do * o).sum(-1) if dlse is None else (do * o).sum(-1) - dlse
    dp, dropped = do @ values.mT, p
    if terms.seed is not None:
        kept = dropout_mask(terms.seed, terms.threshold, first, p.shape).to(p.dtype) / (1 - terms.threshold / 65536)
        dp, dropped = dp * kept, p * kept
    dz = torch.where(seen, p * (dp - delta[..., None]), 0)
    ds = dz * slope * terms.scale
    group = (k.shape[0], k.shape[2], q.shape[2] // k.shape[2], *k.shape[1:2], k.shape[3])
    dk, dv = ((x.mT @ y).view(group).sum(2) for x, y in ((ds, rows), (dropped, do)))
    dq = _turned(ds @ keys, counts, terms, k.shape[1] - q.shape[1], back=True)
    dk = _turned(dk, _counting(k, terms.key_lengths, terms.key_mask), terms, 0, back=True)
    dq, dk, dv = (grad.transpose(1, 2).to(q.dtype).contiguous() for grad in (dq, dk, dv))
    dbias = None if terms.bias is None else dz.sum_to_size(terms.bias.shape).to(terms.bias.dtype)
    dc2p = dp2c = None
    if terms.c2p is not None:
        index = _columns(terms, q.shape[1], k.shape[1]).expand(*dz.shape)
        zero = dz.new_zeros(*dz.shape[:3], terms.c2p.shape[3])
        dc2p = zero.scatter_add_(3, index, dz).transpose(1, 2).to(terms.c2p.dtype).contiguous()
    if terms.p2c is not None:
        index = _columns(terms, q.shape[1], k.shape[1]).T.expand(*dz.mT.shape)
        zero = dz.new_zeros(*dz.mT.shape[:3], terms.p2c.shape[3])
        dp2c = zero.scatter_add_(3, index, dz.mT).transpose(1, 2).to(terms.p2c.dtype).contiguous()
    return dq, dk, dv, dbias, dc2p, dp2c
