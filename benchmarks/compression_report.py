"""The README's tables and plot of compression, from the rows that `compression.py` writes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effllm.compression import METHODS
from effllm.report import text
from effllm.report.plots import WIDE
from effllm.report.svg import Canvas, Scale, text_width
from effllm.rows import Row

GROUPS = {
    "fewer heads, neurons, layers": ("layers", "heads", "ffn", "structured", "lowrank"),
    "8 and 4 bits": ("int8", "int4", "int4-torch", "nf4", "llm-int8", "fp8", "qat"),
    "found by search": ("auto",),
    "zeros": ("magnitude", "wanda", "ria", "sparsegpt", "obert", "movement"),
}
"""Heading of the table -> the first methods of the recipes under it. The order of the last is that of the lines."""
SPARSE = GROUPS["zeros"]
LOADS = ((1, 128), (16, 64))
Place = str | float
"""A pattern n:m, or a share of zeros."""
_LEFT, _TOP, _BOTTOM, _HEIGHT = 66, 16, 48, 400
_LEGEND_STEP, _LEGEND_GAP, _SAMPLE, _DODGE, _SLOT = 20, 8, 34, 15, 10.0


@dataclass(frozen=True)
class Recipe:
    """What was measured of a recipe. `steps` are its methods with their settings, in order; none are dense.

    `quality` is on dev, `tested` on test.
    """

    name: str
    steps: tuple[dict[str, Any], ...]
    quality: Row
    tested: Row | None
    size: Row | None
    speeds: tuple[Row | None, ...]

    @property
    def line(self) -> tuple[str, bool] | None:
        """The method that sets weights to zero and whether distillation follows it; None where more is done."""
        if not self.steps or self.steps[0]["method"] not in SPARSE:
            return None
        first, *others = self.steps
        trains = any(first.get(setting) for setting in ("epochs", "steps"))
        if trains or first["method"] == "movement" or any(step["method"] != "distil" for step in others):
            return None
        return first["method"], bool(others)

    @property
    def place(self) -> Place:
        """The pattern n:m, or else the share of zeros."""
        pattern = str(self.steps[0]["pattern"])
        return pattern if ":" in pattern else float(self.steps[0]["sparsity"])


Lines = dict[tuple[str, bool], dict[Place, Recipe]]
"""(method, whether distilled) -> its recipes by their place."""


def recipes(rows: Sequence[Row], metric: str) -> list[Recipe]:
    """Return the newest measurement of each recipe, the dense model first, then by group and name."""
    oldest_first = sorted(rows, key=lambda row: row.at)
    scores = [row for row in oldest_first if row.metric == metric]
    dev, test = ({row.system: row for row in scores if row.how["split"] == split} for split in ("dev", "test"))
    found = []
    for name, quality in dev.items():
        own = [row for row in reversed(oldest_first) if row.system == name]
        size = next((row for row in own if row.metric == "model size"), None)
        speeds = tuple(
            next((r for r in own if r.metric == "speed-up" and (r.how.get("batch"), r.how.get("tokens")) == load), None)
            for load in LOADS
        )
        steps = tuple(step for step in quality.how["methods"] if step["method"] in METHODS)
        found.append(Recipe(name, steps, quality, test.get(name), size, speeds))
    return sorted(found, key=lambda recipe: (_group(recipe), recipe.name))


def _group(recipe: Recipe) -> int:
    if not recipe.steps:
        return -1
    first = recipe.steps[0]["method"]
    return next((i for i, methods in enumerate(GROUPS.values()) if first in methods), len(GROUPS))


def dense_of(found: Iterable[Recipe]) -> Recipe | None:
    """Return the model that nothing was done to, where it was measured."""
    return next((recipe for recipe in found if not recipe.steps), None)


def tables(rows: Sequence[Row], metric: str, name: str, picture: str = "") -> str:
    """Return what the README says of one data set, whose `metric` it calls `name`.

    A `picture`, the path of what `sparsity_plot` gave, stands under the tables where there is something in it.
    """
    found = recipes(rows, metric)
    seeds = max(recipe.quality.n for recipe in found)
    timed = [row for recipe in found for row in recipe.speeds if row]
    notes = [timed[0].machine if timed else found[0].quality.machine]
    notes.append(f"where several seeds were run, up to {seeds}, median [lowest, highest]" if seeds > 1 else "one seed")
    if timed:
        notes.append("speed over ONNX Runtime float32, one thread, one interleaved run")
    shown = f"![{name} against the share of weights that are zero]({picture})"
    zeros = sparse_table(found, name)
    parts = [list_table(found, name), zeros, f"{'; '.join(notes)}.", shown if picture and zeros else ""]
    return "\n\n".join(part for part in parts if part)


def list_table(found: Sequence[Recipe], metric: str) -> str:
    """Return one line per recipe that is no point of a curve, in groups: quality, its change, size, speed-ups.

    The columns of the speed-ups and of the change on test are there where something was timed, or tested.
    """
    dense = dense_of(found)
    listed = [recipe for recipe in found if recipe.line is None]
    timed = any(row for recipe in listed for row in recipe.speeds)
    tested = any(recipe.tested for recipe in listed)
    header = ["methods, in order", metric, "change, points", *(["on test"] if tested else []), "file"]
    header += [f"{batch} × {tokens}" for batch, tokens in LOADS] if timed else []
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for group, members in itertools.groupby(listed, key=_group):
        if group >= 0:
            heading = [*GROUPS, "other"][group]
            lines.append(f"| **{heading}** |{' |' * (len(header) - 1)}")
        for recipe in members:
            changes = _changes(recipe, dense)
            cells = [recipe.name, quality(recipe.quality), *(changes if tested else changes[:1])]
            cells.append(text.size(recipe.size.value) if recipe.size else text.ABSENT)
            cells += [text.ratio(row.value)[0] if row else text.ABSENT for row in recipe.speeds] if timed else []
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _changes(recipe: Recipe, dense: Recipe | None) -> list[str]:
    """Return by how many points a recipe differs from the dense model on dev and on test."""
    if dense is None or recipe is dense:
        return [text.ABSENT] * 2
    pairs = ((recipe.quality, dense.quality), (recipe.tested, dense.tested))
    return [signed(100 * (row.value - before.value)) if row and before else text.ABSENT for row, before in pairs]


def sparse_table(found: Sequence[Recipe], metric: str) -> str:
    """Return one line per method that sets weights to zero and one column per pattern and share; "" without any."""
    points = curves(found)
    if not points:
        return ""
    columns = places(points)
    lines = [f"| zeros, {metric} | {' | '.join(map(_written, columns))} |", "|---" * (len(columns) + 1) + "|"]
    for (method, distilled), recipes_of in points.items():
        cells = [quality(recipes_of[place].quality) if place in recipes_of else text.ABSENT for place in columns]
        lines.append(f"| {_label(method, distilled)} | {' | '.join(cells)} |")
    sizes = [next((r.size for own in points.values() if (r := own.get(place)) and r.size), None) for place in columns]
    lines.append(f"| file | {' | '.join(text.size(row.value) if row else text.ABSENT for row in sizes)} |")
    return "\n".join(lines)


def curves(found: Iterable[Recipe]) -> Lines:
    """Return the recipes of each line by their place, lines in the order of the methods, at once before distilled."""
    lines: Lines = {}
    for recipe in found:
        if recipe.line:
            lines.setdefault(recipe.line, {})[recipe.place] = recipe
    return dict(sorted(lines.items(), key=lambda item: (item[0][1], SPARSE.index(item[0][0]))))


def places(lines: Lines) -> list[Place]:
    """Return the patterns n:m, then the shares, each in order."""
    return sorted({place for own in lines.values() for place in own}, key=lambda p: (isinstance(p, float), p))


def sparsity_plot(found: Sequence[Recipe], metric: str) -> str:
    """Return an SVG file of quality against zeros, the same bytes for the same rows; "" where nothing was pruned.

    Methods that prune at once have hollow markers and dashed lines, distilled ones filled markers and whole lines.
    Patterns n:m stand to the left of the shares. Whiskers go from the lowest to the highest seed.
    """
    lines, untouched = curves(found), dense_of(found)
    if not lines or untouched is None:
        return ""
    dense = untouched.quality
    columns = places(lines)
    shares = [100 * place for place in columns if isinstance(place, float)]
    first = (min(shares) if shares else 0.0) - _SLOT * (len(columns) - len(shares))
    spots = {p: 100 * p if isinstance(p, float) else first + _SLOT * i for i, p in enumerate(columns)}
    labels = [_label(*line) for line in lines]
    right = WIDE - 28 - _SAMPLE - max(text_width(label) for label in [*labels, f"dense, {text.share(dense.value)[0]}"])
    rows = [dense, *(recipe.quality for own in lines.values() for recipe in own.values())]
    bounds = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    x = Scale(min(spots.values()) - 6, max(spots.values()) + 4, _LEFT, right)
    y = Scale.over(bounds, _HEIGHT - _BOTTOM, _TOP)
    canvas = Canvas(WIDE, _HEIGHT, f"{metric} against the share of weights that are zero: {', '.join(labels)}")
    canvas.stand_alone()
    canvas.axes(
        x, y, "weights that are zero", metric, [spots[place] for place in columns], list(map(_written, columns))
    )
    canvas.begin("front", f"dense: {text.share(dense.value)[0]}")
    canvas.path([(x.start, y.at(dense.value)), (x.end, y.at(dense.value))], "front-line")
    for (method, distilled), own in lines.items():
        points = [(x.at(spots[place]) + _dodge(lines, place, own), own[place]) for place in columns if place in own]
        _draw_line(canvas, points, y, SPARSE.index(method), distilled)
    _draw_legend(canvas, list(lines), dense, right + 20)
    return f"{canvas}\n"


def _dodge(lines: Lines, place: Place, own: Mapping[Place, Recipe]) -> float:
    """Return by how many pixels a line's point moves sideways: at a pattern n:m they stand side by side."""
    if isinstance(place, float):
        return 0.0
    there = [line for line in lines.values() if place in line]
    return _DODGE * (next(i for i, line in enumerate(there) if line is own) - (len(there) - 1) / 2)


def _draw_line(canvas: Canvas, points: Sequence[tuple[float, Recipe]], y: Scale, index: int, distilled: bool) -> None:
    spots = [(px, y.at(recipe.quality.value)) for px, recipe in points if isinstance(recipe.place, float)]
    canvas.begin("series")
    if len(spots) > 1:
        canvas.path(spots, "series-line" if distilled else "dashed-line", index)
    for px, recipe in points:
        row = recipe.quality
        canvas.begin("point", f"{recipe.name}: {quality(row)}")
        if row.low is not None and row.high is not None:
            canvas.line(px, y.at(row.low), px, y.at(row.high), "whisker")
        canvas.marker(px, y.at(row.value), index, "marker" if distilled else "hollow-marker")


def _draw_legend(canvas: Canvas, lines: Sequence[tuple[str, bool]], dense: Row, left: float) -> None:
    canvas.begin("legend")
    middle = _TOP + _LEGEND_STEP / 2
    canvas.path([(left, middle), (left + _SAMPLE, middle)], "front-line")
    canvas.text(left + _SAMPLE + 8, middle + 4, f"dense, {text.share(dense.value)[0]}", "label")
    for number, (method, distilled) in enumerate(lines):
        middle += _LEGEND_STEP + (_LEGEND_GAP if number == 0 or distilled != lines[number - 1][1] else 0)
        index = SPARSE.index(method)
        canvas.path([(left, middle), (left + _SAMPLE, middle)], "series-line" if distilled else "dashed-line", index)
        canvas.marker(left + _SAMPLE / 2, middle, index, "marker" if distilled else "hollow-marker")
        canvas.text(left + _SAMPLE + 8, middle + 4, _label(method, distilled), "label")


def quality(row: Row) -> str:
    """Return a quality with the lowest and highest of its seeds where there are several."""
    return " ".join(part for part in text.share(row.value, row.low, row.high) if part)


def signed(points: float) -> str:
    """Return a change in points with its sign and one decimal."""
    written = f"{points:+.1f}"
    return "0.0" if float(written) == 0 else written.replace("-", "−")


def _label(method: str, distilled: bool) -> str:
    return f"{method} + distil" if distilled else method


def _written(place: Place) -> str:
    return place if isinstance(place, str) else f"{place * 100:g} %"
