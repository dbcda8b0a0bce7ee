"""Integer grids: where a tensor's numbers may lie, and how far that moves the product they enter.

Weights are int8, symmetric, one scale per output channel. Activations are uint8, asymmetric, one scale and zero point
per tensor. All arrays are float32 unless said; `X` is (tokens, K), `W` is (K, N), the product is X W.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from effllm import machine

TINY = np.float32(1e-8)


def quantize_weight(weight: np.ndarray, levels: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Return W as int8 (K, N) in [-levels, levels] and its scales (N,). A zero column gets scale 1 and stays zero."""
    largest = np.abs(weight).max(axis=0)
    scales = np.where(largest > 0, np.maximum(largest / levels, TINY), 1.0).astype(np.float32)
    return np.clip(np.round(weight / scales), -levels, levels).astype(np.int8), scales


def weight_levels(isa: machine.InstructionSet) -> tuple[int, str]:
    """Return the largest weight code for a processor, and the reason in words.

    Without a dot-product instruction that accumulates in 32 bits, x86 sums two u8 x s8 products in 16 bits, which
    saturates; 7-bit weights (|q| <= 63) cannot overflow there.
    """
    if isa.vnni:
        return 127, "8-bit dot products accumulate in 32 bits, so uint8 activations x int8 weights use all 8 bits"
    if isa.family == "x86":
        return 63, "no 8-bit dot product: 16-bit sums would saturate, so weights use 7 bits; expect little speed-up"
    return 127, "32-bit sums, so uint8 activations x int8 weights use all 8 bits"


@dataclass(frozen=True)
class Range:
    """A uint8 grid: value = (q - zero_point) * scale, q in 0…255."""

    scale: float
    zero_point: int

    @classmethod
    def covering(cls, low: float, high: float) -> Range:
        """Return the grid over [low, high], widened to hold zero exactly."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        scale = max((high - low) / 255, float(TINY))
        return cls(float(np.float32(scale)), int(np.clip(round(-low / scale), 0, 255)))

    def snap(self, values: np.ndarray) -> np.ndarray:
        """Return the values moved to the grid, those outside to its ends."""
        q = np.clip(np.round(values / np.float32(self.scale)) + self.zero_point, 0, 255)
        result: np.ndarray = (q - self.zero_point) * np.float32(self.scale)
        return result


def smoothing_factors(largest_x: np.ndarray, largest_w: np.ndarray, alpha: float) -> np.ndarray:
    """Return the factors (K,) by which X is divided and the rows of W multiplied.

    SmoothQuant (Xiao et al. 2023), equation 4: max|X_j|^alpha / max|W_j|^(1-alpha). They are scaled to a geometric mean
    of one, so that only their differences move the range, and are one for channels that never fire.
    """
    x = np.maximum(largest_x.astype(np.float64), 1e-5)
    w = np.maximum(largest_w.astype(np.float64), 1e-5)
    factors = x**alpha / w ** (1 - alpha)
    factors /= np.exp(np.log(factors).mean())
    return np.where(largest_x > 0, factors, 1.0).astype(np.float32)


@dataclass(frozen=True)
class Grid:
    """How one input and the weights it meets are quantised, and the squared error that this causes.

    `factors` (K,) are None without smoothing; `error` is the squared error of the products over their squared size.
    """

    factors: np.ndarray | None
    range: Range
    error: float


def choose_grid(
    x: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    weights: list[np.ndarray],
    alphas: Iterable[float],
    clips: Iterable[float],
    levels: int = 127,
    gain: float = 0.9,
) -> Grid:
    """Return the smoothing and range that move the products X W_i least on the sample `x` (tokens, K).

    `low` and `high` (K,) are the extremes of each channel over all tokens seen, of which `x` is a sample.

    First the smoothing exponent is chosen at full range, then the range is shrunk (Banner et al. 2019 clip for the same
    reason; here the error is measured, not modelled). Smoothing costs one multiplication per element at run time, so it
    must bring the error below `gain` times the error without it.
    """
    wide = np.concatenate(weights, axis=1)
    target = x @ wide
    size = float((target.astype(np.float64) ** 2).sum()) or 1.0

    def error(factors: np.ndarray | None, clip: float) -> tuple[Range, float]:
        smooth, w = (x, wide) if factors is None else (x / factors, wide * factors[:, None])
        ends = (low, high) if factors is None else (low / factors, high / factors)
        grid = Range.covering(float(ends[0].min()) * clip, float(ends[1].max()) * clip)
        q, scales = quantize_weight(w, levels)
        difference = target - grid.snap(smooth) @ (q * scales)
        return grid, float((difference.astype(np.float64) ** 2).sum()) / size

    largest_x, largest_w = np.maximum(np.abs(low), np.abs(high)), np.abs(wide).max(axis=1)
    best = Grid(None, *error(None, 1.0))
    limit = best.error * gain
    for alpha in alphas:
        factors = smoothing_factors(largest_x, largest_w, alpha)
        candidate = Grid(factors, *error(factors, 1.0))
        if candidate.error < min(limit, best.error):
            best = candidate
    for clip in clips:
        candidate = Grid(best.factors, *error(best.factors, clip))
        if candidate.error < best.error:
            best = candidate
    return best


def bias_shift(x: np.ndarray, weight: np.ndarray, grid: Grid, levels: int = 127, *, snap: bool = True) -> np.ndarray:
    """Return the mean (N,) by which quantisation lowers X W, to be added to the bias.

    Bias correction, Nagel et al. 2019, section 4.2, with the mean measured on the sample. Without `snap` only the
    weights are quantised, as with ranges that are found at run time.
    """
    smooth, w = (x, weight) if grid.factors is None else (x / grid.factors, weight * grid.factors[:, None])
    q, scales = quantize_weight(w, levels)
    snapped = grid.range.snap(smooth) if snap else smooth
    shift: np.ndarray = (x @ weight - snapped @ (q * scales)).mean(axis=0)
    return shift.astype(np.float32)
