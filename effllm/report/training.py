"""A training run as a page: what its log says, as curves. While the run goes on the page renews itself."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from effllm.report.page import html_page
from effllm.report.plots import NARROW, WIDE, Figure
from effllm.report.svg import Canvas, Scale
from effllm.rows import Row

RENEW_S = 10
_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 66, 20, 12, 48, 300
_MOST_POINTS = 600
_CURVES = (
    ("loss", "Training loss", "loss (nats)", "Mean over each logged step's own terms."),
    ("learning_rate", "Learning rate", "learning rate", ""),
    ("gradient_norm", "Gradient norm", "norm before clipping", ""),
    ("tokens_per_s", "Speed", "tokens per second, without padding", ""),
    ("data_wait", "Waiting for data", "share of the step", "Time in which no batch was ready."),
)
"""(key of the log's lines, title, axis, caption) of each curve."""


def run_page(lines: Sequence[Mapping[str, Any]], title: str, *, live: bool) -> str:
    """Return an HTML page of a run's log; a `live` one asks the browser to load it again every ten seconds."""
    steps = [line for line in lines if "loss" in line]
    evaluations = [
        (line["step"], [Row.from_json(row) for row in line["evaluation"]]) for line in lines if "evaluation" in line
    ]
    figures = [
        _figure(name, axis, caption, [(line["step"], line[key]) for line in steps])
        for key, name, axis, caption in _CURVES
    ]
    for metric in dict.fromkeys(row.metric for _, rows in evaluations for row in rows):
        points = [(step, row.value) for step, rows in evaluations for row in rows if row.metric == metric]
        figures.append(_figure(f"Dev {metric}", metric, "Over the evaluation's examples.", points))
    rows = evaluations[-1][1] if evaluations else []
    rows = [*rows, *_speed_rows(steps)]
    return html_page(
        rows, title, _notes(lines, steps), figures=[f for f in figures if f.wide], renew_s=RENEW_S if live else 0
    )


def _notes(lines: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    if steps:
        notes.append(f"step {steps[-1]['step']}, {steps[-1]['elapsed_s'] / 60:.1f} minutes of training")
    start = next((line["start"] for line in reversed(lines) if "start" in line), None)
    if start:
        notes.append(f"{start['mfu']}; peak {start['peak_flops']:.3g} FLOP/s: {start['peak']}")
    return notes


def _speed_rows(steps: Sequence[Mapping[str, Any]]) -> list[Row]:
    units = {
        "tokens_per_s": ("training throughput", "tokens/s"),
        "mfu": ("MFU", "share"),
        "data_wait": ("data wait", "share"),
    }
    return [
        Row(metric, statistics.median(line[key] for line in steps), unit, "model", len(steps))
        for key, (metric, unit) in units.items()
        if steps
    ]


def _figure(title: str, axis: str, caption: str, points: Sequence[tuple[float, float]]) -> Figure:
    """Return a curve over the steps; without drawings where there are fewer than two points."""
    if len(points) < 2:
        return Figure(title, caption)
    thinned = [*points[:: max(1, len(points) // _MOST_POINTS)], points[-1]]
    return Figure(title, caption, *(_draw(title, axis, thinned, width) for width in (WIDE, NARROW)))


def _draw(title: str, axis: str, points: Sequence[tuple[float, float]], width: int) -> str:
    x = Scale(float(points[0][0]), float(points[-1][0]), _LEFT, width - _RIGHT)
    values = [float(value) for _, value in points]
    bottom = _HEIGHT - _BOTTOM
    if 0 <= min(values) < 0.3 * max(values):
        y = Scale(0.0, 1.06 * max(values), bottom, _TOP)
    else:
        y = Scale.over(values, bottom, _TOP)
    canvas = Canvas(width, _HEIGHT, f"{title} over the steps")
    canvas.axes(x, y, "step", f"{axis}, log scale" if y.log else axis)
    canvas.begin("series", f"{title}: {values[-1]:.4g} at step {points[-1][0]}")
    canvas.path(
        [(x.at(float(step)), y.at(value)) for (step, _), value in zip(points, values, strict=True)], "series-line", 0
    )
    return str(canvas)
