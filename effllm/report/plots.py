"""The report's plots: quality against speed, sizes, latency against length.

Each is drawn twice, for a wide screen and for a phone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from effllm.report import text
from effllm.report.measured import (
    Measured,
    by_system,
    grouped,
    lower_is_better,
    main_load,
    plotted_groups,
)
from effllm.report.svg import LINE_HEIGHT, Box, Canvas, Scale, place_labels, spread, text_width, tick_texts
from effllm.rows import Row

WIDE = 860
NARROW = 380
_LEFT, _TOP, _BOTTOM = 66, 12, 48
_LABEL_LIMIT = 34
_BYTE_STEPS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


@dataclass(frozen=True)
class Figure:
    """A plot, drawn twice. Without drawings, the caption says why there is none."""

    title: str
    caption: str
    wide: str = ""
    narrow: str = ""


@dataclass(frozen=True)
class _Point:
    """One system in the plot of quality against speed."""

    system: str
    x: Row
    y: Row

    @property
    def rows(self) -> tuple[Row, Row]:
        return self.x, self.y


def all_figures(measured: Measured) -> list[Figure]:
    """Return the plots that the rows allow, and a sentence where quality against speed is not one of them."""
    return [*_quality_figures(measured), *_size_figures(measured), *_length_figures(measured)]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the (cost, quality) pairs that no other pair beats, by rising cost.

    A pair is beaten when another costs no more and is no worse, and differs in one of the two.
    """
    front = []
    for index, (cost, quality) in enumerate(points):
        beaten = any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
        if not beaten:
            front.append(index)
    return sorted(front, key=lambda i: points[i])


def _quality_figures(measured: Measured) -> list[Figure]:
    title = "Quality against speed"
    if not any(plotted_groups(measured.rows)):
        return [Figure(title, "Not drawn: no quality metric was measured.")]
    figures = []
    for suffix, rows in measured.places():
        load = main_load(rows)
        if not load:
            continue
        speeds = by_system(load, load[0].metric)
        for group in plotted_groups(rows) or plotted_groups(measured.rows):
            values = by_system(group, group[0].metric)
            points = [_Point(s, speeds[s], values[s]) for s in measured.systems if s in speeds and s in values]
            if points:
                figures.append(_quality_figure(measured, points, suffix))
    return figures or [Figure(title, "Not drawn: no system has both a quality and a latency or throughput.")]


def _quality_figure(measured: Measured, points: Sequence[_Point], suffix: str) -> Figure:
    x, y = points[0].x, points[0].y
    faster = "left" if x.metric == "latency p50" else "right"
    better = "Down" if lower_is_better(y.metric) else "Up"
    data = f" on {text.plain(y.how['data'])}" if y.how.get("data") else ""
    over = f" with {text.plain(y.how['over'])}" if y.how.get("role") == "agreement" else ""
    caption = f"{better} and {faster} is better. Measured with {text.conditions(x.how)}; {y.metric}{over}{data}."
    if any(row.low is not None for point in points for row in point.rows):
        caption += " Whiskers are 95 % intervals."
    if len(points) > 1:
        caption += " The stepped line is the Pareto front: no other system beats those on it in both."
    return Figure(
        f"{_capital(y.metric)} against {'latency' if faster == 'left' else 'throughput'}{suffix}",
        caption,
        *(_draw_quality(measured, points, width) for width in (WIDE, NARROW)),
    )


def _draw_quality(measured: Measured, points: Sequence[_Point], width: int) -> str:
    height = 420 if width == WIDE else 400
    speed, metric = points[0].x, points[0].y.metric
    x = Scale.over(_bounds(point.x for point in points), _LEFT, width - 12)
    y = Scale.over(_bounds(point.y for point in points), height - _BOTTOM, _TOP)
    latency = speed.metric == "latency p50"
    x_title = f"latency p50 ({speed.unit})" if latency else f"throughput ({speed.unit})"
    canvas = Canvas(width, height, f"{metric} against {x_title} of {', '.join(point.system for point in points)}")
    canvas.axes(x, y, _axis_title(x_title, x), _axis_title(text.shorten(metric, 40), y))
    obstacles = _draw_front(canvas, points, x, y)
    for point in points:
        canvas.begin("whiskers")
        px, py = x.at(point.x.value), y.at(point.y.value)
        if point.x.low is not None and point.x.high is not None:
            canvas.line(x.at(point.x.low), py, x.at(point.x.high), py, "whisker")
            obstacles.append(Box(x.at(point.x.low), py - 1, x.at(point.x.high), py + 1))
        if point.y.low is not None and point.y.high is not None:
            canvas.line(px, y.at(point.y.low), px, y.at(point.y.high), "whisker")
            obstacles.append(Box(px - 1, y.at(point.y.high), px + 1, y.at(point.y.low)))
    anchors = [(x.at(point.x.value), y.at(point.y.value)) for point in points]
    labels = [text.shorten(measured.label(point.system), _LABEL_LIMIT) for point in points]
    frame = Box(_LEFT, _TOP, width - 4, height - _BOTTOM)
    boxes = place_labels(anchors, [text_width(label) for label in labels], frame, obstacles)
    for point, (px, py), label, box in zip(points, anchors, labels, boxes, strict=True):
        speed_text = text.significant(point.x.value)[0]
        quality_text = text.share(point.y.value)[0]
        canvas.begin("point", f"{point.system}: {speed_text} {point.x.unit}, {metric} {quality_text}")
        nearest = min(max(px, box.left), box.right), min(max(py, box.top), box.bottom)
        if abs(nearest[0] - px) + abs(nearest[1] - py) > 20:
            canvas.line(px, py, *nearest, "leader")
        canvas.marker(px, py, measured.systems.index(point.system))
        canvas.text((box.left + box.right) / 2, box.bottom - 4, label, "label", "middle")
    return str(canvas)


def _draw_front(canvas: Canvas, points: Sequence[_Point], x: Scale, y: Scale) -> list[Box]:
    """Draw the best quality that each speed allows, as a step line; return boxes around its segments."""
    sign = 1.0 if points[0].x.metric == "latency p50" else -1.0
    worth = -1.0 if lower_is_better(points[0].y.metric) else 1.0
    front = pareto_front([(sign * point.x.value, worth * point.y.value) for point in points])
    if len(points) < 2:
        return []
    corners: list[tuple[float, float]] = []
    for index in front:
        px, py = x.at(points[index].x.value), y.at(points[index].y.value)
        corners += [(px, corners[-1][1] if corners else (y.start if worth > 0 else y.end)), (px, py)]
    corners.append((x.end if sign > 0 else x.start, corners[-1][1]))
    canvas.begin("front", "Pareto front")
    canvas.path(corners, "front-line")
    return [
        Box(min(a, c) - 2, min(b, d) - 2, max(a, c) + 2, max(b, d) + 2)
        for (a, b), (c, d) in itertools.pairwise(corners)
    ]


def _size_figures(measured: Measured) -> list[Figure]:
    for metric, name in (("model size", "Model file size"), ("folder size", "Folder size")):
        sizes = by_system(measured.rows, metric)
        rows = [sizes[system] for system in measured.systems if system in sizes]
        if rows:
            wide, narrow = (_draw_sizes(measured, rows, name, width) for width in (WIDE, NARROW))
            compared = measured.baseline in sizes and len(rows) > 1
            caption = f"Compared with {measured.label(measured.baseline)}." if compared else ""
            return [Figure(name, caption, wide, narrow)]
    return []


def _draw_sizes(measured: Measured, rows: Sequence[Row], name: str, width: int) -> str:
    remarks = [_size_remark(measured, row, rows) for row in rows]
    largest = max(row.value for row in rows)
    divisor, unit = next((step for step in _BYTE_STEPS if largest >= step[0]), _BYTE_STEPS[-1])
    beside = width == WIDE
    labels = [text.shorten(measured.label(row.system), _LABEL_LIMIT) for row in rows]
    left = 16 + max(text_width(label) for label in labels) if beside else 8
    right = width - 16 - (max(text_width(remark) for remark in remarks) if beside else 0)
    step = 30 if beside else 46
    bottom = _TOP + step * len(rows)
    x = Scale.over([0.0, largest / divisor], left, right, zero=True)
    canvas = Canvas(width, bottom + _BOTTOM, f"{name} of {', '.join(row.system for row in rows)}")
    canvas.begin("axes")
    ticks = x.ticks(most=max(2, int((x.end - x.start) / 60)))
    for tick, written in zip(ticks, tick_texts(ticks), strict=True):
        canvas.line(x.at(tick), _TOP, x.at(tick), bottom, "grid")
        canvas.text(x.at(tick), bottom + 17, written, "tick", "middle")
    canvas.text((x.start + x.end) / 2, bottom + 38, f"{name.lower()} ({unit})", "axis-title", "middle")
    for index, (row, label, remark) in enumerate(zip(rows, labels, remarks, strict=True)):
        top = _TOP + step * index + (6 if beside else LINE_HEIGHT + 6)
        length = max(x.at(row.value / divisor) - x.start, 1.0)
        canvas.begin("point", f"{row.system}: {remark}")
        canvas.bar(x.start, top, length, 18, measured.systems.index(row.system))
        if beside:
            canvas.text(left - 8, top + 13, label, "label", "end")
            canvas.text(x.start + length + 6, top + 13, remark, "remark")
        else:
            canvas.text(left, top - 5, label, "label")
            canvas.text(right, top - 5, text.size(row.value), "remark", "end")
    canvas.begin("axes")
    canvas.line(x.start, _TOP, x.start, bottom, "axis")
    return str(canvas)


def _size_remark(measured: Measured, row: Row, rows: Sequence[Row]) -> str:
    reference = next((other.value for other in rows if other.system == measured.baseline), 0.0)
    compared = text.times_smaller(row.value, reference) if row.system != measured.baseline else ""
    return f"{text.size(row.value)}, {compared}" if compared else text.size(row.value)


def _length_figures(measured: Measured) -> list[Figure]:
    figures = []
    for suffix, rows in measured.places():
        single = (
            row
            for row in rows
            if row.metric == "latency p50"
            and row.how.get("batch") == 1
            and isinstance(row.how.get("tokens"), (int, float))
            and row.how["tokens"] > 0
        )
        for group in grouped(single, ("tokens",)):
            if len({row.how["tokens"] for row in group}) < 2:
                continue
            rest = {key: value for key, value in group[0].how.items() if key != "tokens"}
            wide, narrow = (_draw_lengths(measured, group, width) for width in (WIDE, NARROW))
            caption = f"Lower is better. Medians with {text.conditions(rest)}; whiskers are 95 % intervals."
            figures.append(Figure(f"Latency against length{suffix}", caption, wide, narrow))
    return figures


def _draw_lengths(measured: Measured, rows: Sequence[Row], width: int) -> str:
    systems = [system for system in measured.systems if any(row.system == system for row in rows)]
    labels = [text.shorten(measured.label(system), _LABEL_LIMIT) for system in systems]
    right = width - 26 - max(text_width(label) for label in labels) if width == WIDE else width - 12
    legend = 0 if width == WIDE else 12 + 20 * len(systems)
    height = max(360, LINE_HEIGHT * len(systems) + _TOP + _BOTTOM) + legend
    x = Scale.over([float(row.how["tokens"]) for row in rows], _LEFT, right)
    y = Scale.over(_bounds(rows), height - legend - _BOTTOM, _TOP, zero=True)
    canvas = Canvas(width, height, f"latency p50 (ms) against tokens of {', '.join(systems)}")
    lengths = sorted({float(row.how["tokens"]) for row in rows})
    roomy = all(x.at(b) - x.at(a) > 30 for a, b in itertools.pairwise(lengths))
    canvas.axes(x, y, _axis_title("length (tokens)", x), _axis_title("latency p50 (ms)", y), lengths if roomy else None)
    ends = []
    for system in systems:
        line = [row for row in rows if row.system == system]
        ends.append(_draw_line(canvas, line, x, y, measured.systems.index(system)))
    if legend:
        spots = [(float(_LEFT), height - legend + 20.0 * index + 16) for index in range(len(systems))]
    else:
        places = spread([end[1] for end in ends], LINE_HEIGHT, _TOP + 4, y.start)
        spots = [(right + 14, place) for place in places]
    for system, label, end, (left, middle) in zip(systems, labels, ends, spots, strict=True):
        index = measured.systems.index(system)
        canvas.begin("point", system)
        if legend:
            canvas.marker(left - 14, middle, index)
        else:
            canvas.line(end[0] + 7, end[1], left - 3, middle, "leader")
        canvas.text(left, middle + 4, label, "label")
    return str(canvas)


def _draw_line(canvas: Canvas, rows: Sequence[Row], x: Scale, y: Scale, index: int) -> tuple[float, float]:
    """Draw one system's latencies and return where its line ends."""
    rows = sorted(rows, key=lambda row: float(row.how["tokens"]))
    points = [(x.at(float(row.how["tokens"])), y.at(row.value)) for row in rows]
    canvas.begin("series")
    canvas.path(points, "series-line", index)
    for row, (px, py) in zip(rows, points, strict=True):
        tokens = row.how["tokens"]
        canvas.begin("point", f"{row.system}: {text.milliseconds(row.value)} at {tokens} tokens")
        if row.low is not None and row.high is not None:
            canvas.line(px, y.at(row.low), px, y.at(row.high), "whisker")
        canvas.marker(px, py, index)
    return points[-1]


def _bounds(rows: Iterable[Row]) -> list[float]:
    """Return the values and interval ends, which the axes must hold."""
    return [value for row in rows for value in (row.value, row.low, row.high) if value is not None]


def _axis_title(title: str, scale: Scale) -> str:
    return f"{title}, log scale" if scale.log else title


def _capital(metric: str) -> str:
    return metric[:1].upper() + metric[1:]
