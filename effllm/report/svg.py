"""Drawing for plots: scales, 1-2-5 ticks, axes, markers, labels that keep clear of each other.

Colours and fonts are CSS classes, which a page sets for light, dark and print, and a drawing in a file of its own as it
stands there. Elements are built with ElementTree, which escapes every text.
"""

from __future__ import annotations

import importlib.resources
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

COLOURS = 7
FONT_SIZE = 12
LINE_HEIGHT = 16
_SHAPES = (
    "M-5,0 A5,5 0 1 0 5,0 A5,5 0 1 0 -5,0 Z",
    "M-4.5,-4.5 H4.5 V4.5 H-4.5 Z",
    "M0,-6 L5.5,4 H-5.5 Z",
    "M0,-6.5 L6,0 L0,6.5 L-6,0 Z",
    "M0,6 L5.5,-4 H-5.5 Z",
)
"""Marker outlines around (0, 0). Their number is coprime to `COLOURS`, so 35 systems look different."""
_DIRECTIONS = (
    *((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)),
    *((0.5, -1), (0.5, 1), (-0.5, -1), (-0.5, 1), (1, -0.5), (1, 0.5), (-1, -0.5), (-1, 0.5)),
)


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from `low`..`high` to the pixels `start`..`end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Scale:
        """Return a scale with some room around `values`; logarithmic where they span more than a factor of 20.

        `zero` starts a linear scale at 0. Equal values get a range around them.
        """
        low, high = min(values), max(values)
        if low > 0 and high / low > 20:
            room = (high / low) ** 0.06
            return cls(low / room, high * room, start, end, log=True)
        if zero and low >= 0:
            return cls(0.0, high * 1.06 or 1.0, start, end)
        equal = high - low <= 1e-9 * max(abs(low), abs(high))
        room = (abs(high) * 0.05 or 1.0) if equal else (high - low) * 0.1
        return cls(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """Return the pixel of a value, kept within the scale."""
        value = min(max(value, self.low), self.high)
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Return at most about `most` round values (1, 2 or 5 times a power of ten) within the scale."""
        return _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 5), (1,)):
        ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / max(most, 1))]


def tick_texts(ticks: Sequence[float], log: bool = False) -> list[str]:
    """Return the ticks without needless digits; on a linear scale with the same decimals."""
    texts = [f"{tick:.6g}" for tick in ticks]
    if not log and not any("e" in text for text in texts):
        decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
        texts = [f"{tick:.{decimals}f}" for tick in ticks]
    return [text.replace("-", "−", 1) if text.startswith("-") else text for text in texts]


def text_width(text: str) -> float:
    """Return a generous estimate of the pixels of `text` at `FONT_SIZE`, for any sans-serif font."""
    return sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.61 for c in text) * FONT_SIZE


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Return the shared area in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, frame: Box) -> float:
        """Return by how many pixels this box leaves `frame`."""
        return (
            max(frame.left - self.left, 0)
            + max(self.right - frame.right, 0)
            + max(frame.top - self.top, 0)
            + max(self.bottom - frame.bottom, 0)
        )


def place_labels(
    anchors: Sequence[tuple[float, float]], widths: Sequence[float], frame: Box, obstacles: Sequence[Box]
) -> list[Box]:
    """Return a box for the label of each anchor, near it, within `frame` and clear of other labels and all anchors.

    Crossing an obstacle (a whisker or line) is allowed where there is no better place.
    """
    points = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in anchors]
    placed: dict[int, Box] = {}
    # Points with near neighbours have the fewest free places, so they choose first.
    order = sorted(range(len(anchors)), key=lambda i: sorted(math.dist(anchors[i], other) for other in anchors)[1:2])
    for index in order:

        def cost(candidate: tuple[float, Box]) -> float:
            distance, box = candidate
            hard = sum(box.overlap(other) for other in (*placed.values(), *points))
            soft = sum(box.overlap(other) for other in obstacles)
            return distance + 1000 * box.outside(frame) + 50 * hard + 0.3 * soft

        placed[index] = min(_candidates(*anchors[index], widths[index]), key=cost)[1]
    return [placed[index] for index in range(len(anchors))]


def _candidates(x: float, y: float, width: float) -> list[tuple[float, Box]]:
    """Return (distance, box) pairs around a point: right first, then left, above, below and the corners."""
    half = LINE_HEIGHT / 2
    found = []
    for ring, distance in enumerate((9, 16, 26, 38, 52, 68, 86, 106, 130, 160, 200, 250)):
        for order, (dx, dy) in enumerate(_DIRECTIONS):
            left = x + dx * distance - (width / 2 if dx == 0 else width if dx < 0 else 0)
            top = y + dy * distance - (half if dy == 0 else LINE_HEIGHT if dy < 0 else 0)
            found.append((distance + order * 0.5 + ring, Box(left, top, left + width, top + LINE_HEIGHT)))
    return found


def plot_style() -> str:
    """Return the style sheet of the drawings' classes, with the colours for light and dark."""
    return importlib.resources.files("effllm.report").joinpath("plot.css").read_text(encoding="utf-8")


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions in the same order that are `gap` apart and within `low`..`high`, moved as little as needed."""
    gap = min(gap, (high - low) / max(len(positions) - 1, 1))
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [min(max(positions[i], low), high) for i in order]
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    limit = high
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return [value for _, value in sorted(zip(order, placed, strict=True))]


class Canvas:
    """An SVG picture under construction; coordinates are pixels from the top left."""

    def __init__(self, width: float, height: float, description: str) -> None:
        self._root = ElementTree.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {width:g} {height:g}",
                "width": f"{width:g}",
                "height": f"{height:g}",
                "role": "img",
                "aria-label": description,
            },
        )
        ElementTree.SubElement(self._root, "title").text = description
        self._group = self._root

    def __str__(self) -> str:
        return ElementTree.tostring(self._root, encoding="unicode")

    def stand_alone(self) -> None:
        """Give the picture its style and background, for a file of its own; before anything is drawn."""
        ElementTree.SubElement(self._root, "style").text = plot_style()
        width, height = float(self._root.attrib["width"]), float(self._root.attrib["height"])
        self._add("rect", {"width": width, "height": height, "rx": 6, "class": "page"})

    def begin(self, name: str, title: str = "") -> None:
        """Put what follows into a group of class `name`, whose title is shown on hover."""
        self._group = ElementTree.SubElement(self._root, "g", {"class": name})
        if title:
            ElementTree.SubElement(self._group, "title").text = title

    def line(self, x1: float, y1: float, x2: float, y2: float, name: str) -> None:
        """Draw a line of class `name`."""
        self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": name})

    def path(self, points: Sequence[tuple[float, float]], name: str, index: int | None = None) -> None:
        """Draw straight lines through `points`, in the colour of the system number `index` where given."""
        colour = "" if index is None else f" {_colour(index)}"
        self._add("polyline", {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points), "class": f"{name}{colour}"})

    def bar(self, x: float, y: float, width: float, height: float, index: int) -> None:
        """Draw a filled rectangle in the colour of the system number `index`."""
        name = f"bar {_colour(index)}"
        self._add("rect", {"x": x, "y": y, "width": width, "height": height, "rx": 2, "class": name})

    def marker(self, x: float, y: float, index: int, name: str = "marker") -> None:
        """Draw the marker of the system number `index`; `name` is its class, `marker` or `hollow-marker`."""
        shape = _SHAPES[index % len(_SHAPES)]
        name = f"{name} {_colour(index)}"
        self._add("path", {"d": shape, "transform": f"translate({x:.1f} {y:.1f})", "class": name})

    def text(self, x: float, y: float, text: str, name: str, anchor: str = "start", turn: bool = False) -> None:
        """Write `text` with its baseline at (x, y); `turn` rotates it to read upwards."""
        attributes: dict[str, str | float] = {"x": x, "y": y, "class": name, "text-anchor": anchor}
        if turn:
            attributes["transform"] = f"rotate(-90 {x:.1f} {y:.1f})"
        self._add("text", attributes).text = text

    def axes(
        self,
        x: Scale,
        y: Scale,
        x_title: str,
        y_title: str,
        x_ticks: Sequence[float] | None = None,
        x_texts: Sequence[str] | None = None,
    ) -> None:
        """Draw grid lines, tick labels and titles for two scales whose starts meet at the lower left."""
        self.begin("axes")
        x_ticks = x_ticks or x.ticks(most=max(5, int((x.end - x.start) / 75)))
        for tick, written in zip(x_ticks, x_texts or tick_texts(x_ticks, x.log), strict=True):
            self.line(x.at(tick), y.end, x.at(tick), y.start, "grid")
            self.text(x.at(tick), y.start + 17, written, "tick", "middle")
        y_ticks = y.ticks(most=max(3, int((y.start - y.end) / 45)))
        for tick, written in zip(y_ticks, tick_texts(y_ticks, y.log), strict=True):
            self.line(x.start, y.at(tick), x.end, y.at(tick), "grid")
            self.text(x.start - 7, y.at(tick) + 4, written, "tick", "end")
        self.line(x.start, y.start, x.end, y.start, "axis")
        self.text((x.start + x.end) / 2, y.start + 38, x_title, "axis-title", "middle")
        self.text(13, (y.start + y.end) / 2, y_title, "axis-title", "middle", turn=True)

    def _add(self, tag: str, attributes: Mapping[str, str | float]) -> ElementTree.Element:
        written = {k: v if isinstance(v, str) else f"{v:.1f}".removesuffix(".0") for k, v in attributes.items()}
        return ElementTree.SubElement(self._group, tag, written)


def _colour(index: int) -> str:
    return f"c{index % COLOURS}"
