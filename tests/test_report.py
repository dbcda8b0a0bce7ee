"""The report: what it must show, what it must escape, and that its drawings are well-formed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from effllm.errors import SettingError
from effllm.report import html_page, markdown_table, terminal_table, text
from effllm.report.measured import Measured, newest_rows
from effllm.report.plots import pareto_front
from effllm.report.svg import Box, Scale, place_labels, spread, text_width, tick_texts
from effllm.report.tables import all_tables
from effllm.rows import Row

MACHINE = "Test CPU (AVX2), 2 cores, Linux"
AT = "2026-03-01T10:00:00+00:00"
LOAD = {"batch": 1, "tokens": 128, "threads": 1}
QUALITY = {"role": "quality", "data": "dev.jsonl"}
EVIL = '<script>alert("1")</script> & | [b]x[/b]'
# name: (p50 in ms, spearman, model size in bytes)
SYSTEMS = {
    "torch fp32": (16.2, 0.8203, 90_900_000),
    "onnxruntime fp32": (11.6, 0.8203, 90_400_000),
    "minilm-int8": (4.7, 0.8179, 22_700_000),
    "minilm-int8-static": (5.0, 0.8122, 23_100_000),
    "all-MiniLM-L6-v2-heads50-int8": (3.4, 0.7921, 17_400_000),
}
STREAMS = [html_page, markdown_table, terminal_table]


def row(metric, value, unit, system, *, how=None, low=None, high=None, n=11, at=AT, machine=MACHINE):
    return Row(metric, value, unit, system, n, low, high, how or {}, machine, at)


def rows_of(system, p50, quality, size):
    """The rows that a benchmark yields for one system."""
    ratio = 11.6 / p50
    rows = [
        row("model size", size, "bytes", system, how={"file": "model.onnx"}, machine=""),
        row("folder size", size + 1_000_000, "bytes", system, machine=""),
        row("load time", 0.5, "s", system),
        row("peak memory", 3e8, "bytes", system),
        row("spearman", quality, "absolute", system, how=QUALITY, low=quality - 0.01, high=quality + 0.01, n=1500),
    ]
    for tokens in (16, 128):
        how = {**LOAD, "tokens": tokens}
        scaled = p50 * tokens / 128
        rows.append(row("latency p50", scaled, "ms", system, how=how, low=scaled * 0.98, high=scaled * 1.02))
        rows.append(row("latency p95", scaled * 1.2, "ms", system, how=how, n=550))
        if system != "onnxruntime fp32":
            how = {"over": "onnxruntime fp32", **how}
            rows.append(row("speed-up", ratio, "x", system, how=how, low=ratio * 0.98, high=ratio * 1.02))
    if system != "torch fp32":
        how = {"role": "change", "data": "dev.jsonl", "over": "torch fp32"}
        change = quality - 0.8203
        rows.append(
            row("spearman change", change, "absolute", system, how=how, low=change - 0.002, high=change + 0.001)
        )
        how = {**how, "role": "agreement"}
        rows.append(row("cosine mean", 0.9999987, "share", system, how=how))
        rows.append(row("largest logit difference", 0.0213, "absolute", system, how=how))
    return rows


def benchmark():
    return [r for system, values in SYSTEMS.items() for r in rows_of(system, *values)]


def terminal(rows, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(terminal_table(rows))
    return console.file.getvalue()


def printed(stream, rows):
    return terminal(rows) if stream is terminal_table else stream(rows, "T") if stream is html_page else stream(rows)


def drawings(page):
    """Every SVG of a page, parsed."""
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def texts(svg, name):
    return [e.text for e in svg.iter("{http://www.w3.org/2000/svg}text") if e.get("class") == name]


def test_newest_row_wins_whatever_its_place_in_the_file():
    old, new = "2026-03-01T10:00:00+00:00", "2026-03-01T10:30:00+00:00"
    for order in ([old, new], [new, old]):
        rows = [row("latency p50", 7.77 if at == new else 5.55, "ms", "a", how=LOAD, at=at) for at in order]
        assert [r.value for r in newest_rows(rows)] == [7.77]
        for stream in STREAMS:
            assert "7.77" in printed(stream, rows)
            assert "5.55" not in printed(stream, rows)


def test_newest_compares_moments_not_text():
    rows = [
        row("m", 1.0, "x", "a", at="2026-03-01T23:00:00-05:00"),  # 04:00 of the next day in UTC
        row("m", 2.0, "x", "a", at="2026-03-02T01:00:00+00:00"),
    ]
    assert [r.value for r in newest_rows(rows)] == [1.0]
    rows.append(row("m", 3.0, "x", "a", at="2026-03-02T05:00:00"))  # no time zone: taken as UTC
    assert [r.value for r in newest_rows(rows)] == [3.0]


def test_order_of_conditions_does_not_matter_but_machine_and_values_do():
    base = row("m", 1.0, "x", "a", how={"batch": 1, "tokens": 2})
    same = row("m", 2.0, "x", "a", how={"tokens": 2, "batch": 1})
    other_load = row("m", 3.0, "x", "a", how={"tokens": 4, "batch": 1})
    other_machine = row("m", 4.0, "x", "a", how={"batch": 1, "tokens": 2}, machine="B")
    assert [r.value for r in newest_rows([base, same, other_load, other_machine])] == [2.0, 3.0, 4.0]


def test_every_row_is_in_exactly_one_table():
    rows = [
        *benchmark(),
        row("speed-up", 2.0, "x", "minilm-int8", how={"over": "torch fp32", **LOAD}),
        row("spearman change", 0.1, "absolute", "minilm-int8", how={"role": "change", "data": "?", "over": "b"}),
        row("model size", 5.0, "bytes", "minilm-int8", how={"file": "second.onnx"}, machine=""),
        row("load time", 9.0, "s", "minilm-int8", how={"includes": "nothing"}),
        row("novel", 1.0, "furlongs", "minilm-int8"),
        row("novel", 1.0, "furlongs", "minilm-int8", machine=""),
        row("batch spread", 0.1, "logit", "minilm-int8", how={"role": "batch"}),
        row("batch dependent", 0.0, "flag", "minilm-int8", how={"role": "batch"}),
    ]
    for extra in ([], [row("latency p50", 3.0, "ms", "minilm-int8", how=LOAD, machine="Other CPU")]):
        measured = Measured.of(rows + extra)
        shown = [id(r) for table in all_tables(measured) for r in table.sources]
        assert sorted(shown) == sorted(id(r) for r in measured.rows)


def test_two_machines_are_not_mixed():
    rows = [
        row("latency p50", 1.11, "ms", "a", how=LOAD, machine="CPU one"),
        row("latency p50", 2.22, "ms", "a", how=LOAD, machine="CPU two"),
    ]
    page = markdown_table(rows)
    assert "machine 1, n = 11**\n\n| system | p50, ms |\n| --- | ---: |\n| a | 1.11 |" in page
    assert "machine 2, n = 11**\n\n| system | p50, ms |\n| --- | ---: |\n| a | 2.22 |" in page
    assert "Machine 2: CPU two" in page


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("value", "low", "high", "slower"),
    [(0.80, 0.75, 0.90, True), (0.98, 0.90, 1.01, False), (2.46, 2.40, 2.52, False), (0.80, None, None, True)],
)
def test_slower_is_said_when_the_whole_interval_is_below_one(stream, value, low, high, slower):
    rows = [
        row("latency p50", 10.0, "ms", "onnxruntime fp32", how=LOAD),
        row("latency p50", 10.0 / value, "ms", "b", how=LOAD),
        row("speed-up", value, "x", "b", how={"over": "onnxruntime fp32", **LOAD}, low=low, high=high),
    ]
    shown = printed(stream, rows)
    assert bool(re.search(r"× slower", shown)) is slower
    assert text.ratio(value)[0] in shown


def test_dagger_marks_a_batch_dependent_system_in_every_table_that_lists_it():
    rows = [
        *benchmark(),
        row("batch dependent", 1.0, "flag", "minilm-int8", how={"role": "batch"}),
        row("batch dependent", 0.0, "flag", "minilm-int8-static", how={"role": "batch"}),
    ]
    listed = 0
    for table in all_tables(Measured.of(rows)):
        names = [line[0].text for line in table.lines]
        assert "minilm-int8" not in names
        assert "minilm-int8-static †" not in names
        assert any(note.startswith("† ") for note in table.notes) == ("minilm-int8 †" in names)
        listed += "minilm-int8 †" in names
    assert listed >= 5
    for stream in STREAMS:
        assert "minilm-int8 †" in printed(stream, rows)
        assert "† answers can depend on the other texts in the batch" in printed(stream, rows)
        assert "†" not in printed(stream, benchmark())
    assert any("minilm-int8 †" in texts(svg, "label") for svg in drawings(html_page(rows, "T")))


def test_speed_up_names_the_system_it_is_over():
    markdown = markdown_table(benchmark())
    assert "Speed-up: over onnxruntime fp32." in markdown
    assert re.search(r"\| onnxruntime fp32 \| 11\.6 .*\| baseline \|", markdown)
    assert "| torch fp32 | 0.8203 [0.8103, 0.8303] | reference |" in markdown


def test_sizes_are_compared_with_dense_onnxruntime_not_with_the_first_system():
    markdown = markdown_table(benchmark())
    assert "22.7 MB 3.98× smaller" in markdown
    assert "90.9 MB 1.01× larger" in markdown
    assert "90.4 MB baseline" in markdown


@pytest.mark.parametrize("stream", STREAMS)
def test_forms_of_two_models_with_one_name_are_refused(stream):
    ours = [row("spearman", 0.8, "absolute", "dense", how={**QUALITY, "parent": name}) for name in ("a", "b")]
    with pytest.raises(SettingError, match="'dense' is a form of a in some rows and of b in others"):
        printed(stream, ours)
    shown = printed(stream, [ours[0], dataclasses.replace(ours[1], system="other")])
    assert "parent a" not in shown


@pytest.mark.parametrize("stream", STREAMS)
def test_bounds_that_are_no_interval_are_not_called_one(stream):
    ours = row("f1", 0.8, "absolute", "x", how={**QUALITY, "bounds": "lowest and highest"}, low=0.7, high=0.9)
    assert "95 %" not in printed(stream, [ours])
    assert "95 %" in printed(stream, [dataclasses.replace(ours, how=QUALITY)])


@pytest.mark.parametrize("stream", STREAMS)
def test_nothing_measured(stream):
    assert "Nothing was measured." in printed(stream, [])


@pytest.mark.parametrize("stream", STREAMS)
def test_unknown_metric_is_shown(stream):
    rows = [row("moon phase", 0.123, "turns", "a", how={"role": "sky"}, low=0.1, high=0.2)]
    shown = printed(stream, rows)
    for word in ("moon phase", "turns", "0.123", "[0.100, 0.200]", "role sky"):
        assert word in shown
    assert "other measurements" in shown.lower()


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    "rows",
    [
        rows_of("alone", 3.0, 0.8, 1000),
        [r for name in "abcdef" for r in rows_of(name, 3.0, 0.8, 1000)],
        [dataclasses.replace(r, low=None, high=None) for name in "ab" for r in rows_of(name, 3.0, 0.8, 1000)],
        [dataclasses.replace(r, low=float("nan"), high=float("inf")) for r in rows_of("a", 3.0, 0.8, 1000)],
        [r for name in "ab" for r in rows_of(name, 3.0, 0.0, 0)],
        [row(metric, 0.0, "ms", "a", how=LOAD) for metric in ("latency p50", "throughput", "speed-up")],
        [row("spearman", -0.2, "absolute", "a", how={"role": "quality"})],
        [
            row("latency p50", 1.0, "ms", "a"),
            row("throughput", 1e-9, "texts/s", "a", how={"batch": None, "tokens": [1]}),
        ],
        [row("speed-up", 1.0, "x", "a"), row("agreement", 1.0, "share", "a")],
        [row("agreement", 1.0, "share", "", how={"role": "agreement"}, at="yesterday")],
    ],
    ids=[
        "single",
        "identical",
        "no intervals",
        "not finite",
        "zero",
        "zero times",
        "negative",
        "odd conditions",
        "no conditions",
        "no names",
    ],
)
def test_degenerate_rows_are_shown(stream, rows):
    assert printed(stream, rows).strip()


@pytest.mark.parametrize("stream", STREAMS)
def test_very_long_name_is_whole_in_tables(stream):
    name = "a-very-long-system-name-" * 9 + "end"
    shown = printed(stream, [*benchmark(), *rows_of(name, 3.0, 0.8, 2e7)])
    if stream is terminal_table:
        assert "…" not in shown
        assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())
    else:
        assert name in shown
    if stream is html_page:
        for svg in drawings(shown):
            width = float(svg.get("viewBox").split()[2])
            assert all(len(label) * 5 < width for label in texts(svg, "label"))


def test_terminal_shows_whole_names_and_numbers_in_80_columns():
    shown = terminal(benchmark())
    assert "…" not in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    for table in all_tables(Measured.of(benchmark())):
        for line in table.lines:
            for cell in line:
                assert cell.text in shown
                assert cell.detail in shown
    for name in SYSTEMS:
        assert len(re.findall(rf"^{re.escape(name)} ", shown, flags=re.MULTILINE)) >= 4


def evil_rows():
    rows = [r for name, values in SYSTEMS.items() for r in rows_of(name + EVIL, *values)]
    how = {"role": "quality", "data": EVIL}
    return [*rows, row(EVIL, 0.5, EVIL, EVIL + "\x1b[31m\x00", how=how, machine=EVIL), row("u", 1.0, EVIL, EVIL)]


def test_html_and_svg_escape_what_users_give():
    page = html_page(evil_rows(), EVIL, [EVIL])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "\x00" not in page
    assert drawings(page)


def test_markdown_escapes_pipes_and_markup():
    markdown = markdown_table([row("m|n", 1.0, "u|v", "a|b <i> `c` _d_ snake_case", how={"k": "x|y"})])
    assert "<i>" not in markdown
    assert "| a\\|b &lt;i&gt; \\`c\\` \\_d\\_ snake_case | 1.00 |" in markdown
    assert "m\\|n (k x\\|y)" in markdown
    tables = [line for line in markdown_table(evil_rows()).splitlines() if line.startswith("|")]
    pipes = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    headers = [line.startswith("| system") for line in tables]
    expected = 0
    for count, header in zip(pipes, headers, strict=True):
        expected = count if header else expected
        assert count == expected


def serving(metric, value, *, system="s", **how):
    return row(metric, value, "", system, how={"role": "serving", "api": "tei", **how})


def test_a_cell_of_several_lines_stays_one_cell_of_markdown():
    rows = [serving("throughput served", 10.0, clients=8)]
    rows += [serving("requests", 5 * n, clients=8, outcome=name) for n, name in enumerate(["200", "503", "timed out"])]
    lines = [line for line in markdown_table(rows).splitlines() if line.startswith("|")]
    assert lines[-1] == "| 8 clients | 10.0 | – | – | – | 15 503: 5<br>timed out: 10 |"
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("missing", ["throughput served", "goodput", "request p50"])
def test_a_load_without_one_of_its_numbers_has_a_gap(missing):
    values = {"throughput served": 11.1, "goodput": 22.2, "request p50": 33.3, "request p99": 44.4}
    rows = [serving(metric, value, clients=8) for metric, value in values.items() if metric != missing]
    (table,) = all_tables(Measured.of(rows))
    cells = [cell.text for cell in table.lines[0][1:-1]]
    assert sorted(cells) == sorted([text.ABSENT] * (len(cells) - 3) + [str(r.value) for r in rows])
    assert all(printed(stream, rows) for stream in STREAMS)


METRICS = ["latency p50", "throughput", "speed-up", "accuracy", "accuracy change", "agreement", "model size", "goodput"]
METRICS += ["batch dependent", "batch spread", "throughput served", "request p99", "requests", "send delay p99"]
FIELDS = ["role", "batch", "tokens", "threads", "data", "over", "clients", "rate", "within_ms", "outcome"]
WORDS = ["quality", "change", "agreement", "serving", "batch", "mix", "a\n|b"]
NUMBERS = st.sampled_from([-1, 0, 1, 8, 64, 0.5, 16.25, 1e6, math.nan, math.inf, -math.inf, 10**400])
LEAVES = st.sampled_from(WORDS) | NUMBERS | st.booleans() | st.none()
ANYTHING = LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.sampled_from("ab"), LEAVES, max_size=1)
LINES = st.fixed_dictionaries(
    {
        "metric": st.sampled_from(METRICS),
        "value": st.sampled_from([0.0, -1.5, 0.99, 12.3, 1e9]),
        "unit": st.sampled_from(["ms", "bytes", "share"]),
        "system": st.sampled_from(["a", "onnxruntime fp32"]),
    },
    optional={
        "low": NUMBERS,
        "high": NUMBERS,
        "how": st.dictionaries(st.sampled_from(FIELDS), LEAVES, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4),
    },
)


@given(st.lists(LINES, max_size=6))
@settings(deadline=None, max_examples=60)
def test_what_is_read_as_a_row_can_be_shown(lines):
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(Row.from_json(json.loads(json.dumps(line))))
    for stream in STREAMS:
        assert printed(stream, rows)


def test_terminal_neither_reads_markup_nor_passes_escape_codes():
    shown = terminal([row("m", 1.0, "u", "a[red]b[/red]\x1b[31m", how=LOAD)])
    assert "a[red]b[/red]" in shown
    assert "\x1b" not in shown


def test_page_is_self_contained():
    page = html_page(benchmark(), "T", ["a note"])
    assert "a note" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    for loader in ("<script", "<img", "<iframe", "@import", "url(", '<link rel="stylesheet'):
        assert loader not in page
    for asked in ("prefers-color-scheme: dark", "@media print", "width=device-width", MACHINE, "2026-03-01"):
        assert asked in page


def test_page_without_quality_says_why_there_is_no_plot():
    rows = [r for r in benchmark() if r.how.get("role") is None]
    assert "no quality metric was measured" in html_page(rows, "T")
    assert "Pareto" not in html_page(rows, "T")


def test_plots_are_labelled_well_formed_svg():
    svgs = drawings(html_page(benchmark(), "T"))
    assert len(svgs) == 6  # three plots, each for a wide screen and for a phone
    titles = [texts(svg, "axis-title") for svg in svgs]
    assert titles[0] == ["latency p50 (ms)", "spearman"]
    assert titles[2] == ["model file size (MB)"]
    assert titles[4] == ["length (tokens)", "latency p50 (ms), log scale"]
    for svg in svgs:
        assert svg.get("role") == "img"
        assert svg.get("aria-label")
        assert svg[0].tag.endswith("title")
        assert sorted(texts(svg, "label")) == sorted(SYSTEMS)
        width, height = (float(part) for part in svg.get("viewBox").split()[2:])
        for element in svg.iter("{http://www.w3.org/2000/svg}text"):
            if element.get("transform") is None:
                before = {"start": 0.0, "middle": 0.5, "end": 1.0}[element.get("text-anchor")]
                left = float(element.get("x")) - before * text_width(element.text)
                assert -1 <= left <= left + text_width(element.text) <= width + 1, element.text
        for element in svg.iter():
            for name, limit in (
                ("x", width),
                ("x1", width),
                ("x2", width),
                ("y", height),
                ("y1", height),
                ("y2", height),
            ):
                assert 0 <= float(element.get(name, 0)) <= limit


def test_throughput_replaces_missing_latency_and_the_front_turns():
    how = {"batch": 16, "tokens": 64, "threads": 1}
    rows = [r for r in benchmark() if r.metric not in {"latency p50", "latency p95", "speed-up"}]
    rows += [row("throughput", 1000 / values[0], "texts/s", name, how=how) for name, values in SYSTEMS.items()]
    page = html_page(rows, "T")
    assert "Up and right is better" in page
    svg = drawings(page)[0]
    assert texts(svg, "axis-title")[0] == "throughput (texts/s)"
    front = next(e for e in svg.iter() if e.get("class") == "front-line")
    points = [tuple(float(v) for v in point.split(",")) for point in front.get("points").split()]
    assert points[0][0] > points[-1][0]
    assert points[0][1] > points[-1][1]


def test_pareto_front():
    #         slow+best   fast+bad    middle      beaten      same cost, worse   twin of the middle
    points = [(10, 0.90), (1, 0.50), (5, 0.80), (6, 0.79), (5, 0.70), (5, 0.80), (11, 0.90)]
    assert pareto_front(points) == [1, 2, 5, 0]
    assert pareto_front([(1, 1)]) == [0]
    assert pareto_front([]) == []


@pytest.mark.parametrize("count", [2, 8, 14])
def test_labels_do_not_overlap(count):
    frame = Box(0, 0, 800, 380)
    widths = [120.0] * count
    for anchors in ([(400.0, 200.0)] * count, [(790.0, 5.0 + i) for i in range(count)]):
        boxes = place_labels(anchors, widths, frame, [])
        for a, b in itertools.combinations(boxes, 2):
            assert a.overlap(b) == 0
        for box in boxes:
            assert box.outside(frame) == 0
            for x, y in anchors:
                assert box.overlap(Box(x - 4, y - 4, x + 4, y + 4)) == 0


def test_spread_keeps_order_gap_and_bounds():
    placed = spread([50, 49, 51, 99, 100], 10, 0, 100)
    assert sorted(range(5), key=lambda i: placed[i]) == [1, 0, 2, 3, 4]
    assert min(b - a for a, b in itertools.pairwise(sorted(placed))) >= 10
    assert 0 <= min(placed) <= max(placed) <= 100
    assert spread([5, 80], 10, 0, 100) == [5, 80]
    assert spread([0, 1, 2], 10, 0, 100) == [0, 10, 20]


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0, 10, 5, ["0", "2", "4", "6", "8", "10"]),
        (0.777, 0.834, 6, ["0.78", "0.79", "0.80", "0.81", "0.82", "0.83"]),
        (-1, 1, 4, ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (0, 95, 4, ["0", "50"]),
    ],
)
def test_linear_ticks(low, high, most, expected):
    assert tick_texts(Scale(low, high, 0, 100).ticks(most)) == expected


def test_log_scale_only_beyond_a_factor_of_twenty():
    assert not Scale.over([1, 20], 0, 100).log
    assert not Scale.over([0, 100], 0, 100).log
    scale = Scale.over([1, 100], 0, 100)
    assert scale.log
    assert scale.at(10) == pytest.approx(50)
    assert tick_texts(scale.ticks(9), log=True) == ["1", "2", "5", "10", "20", "50", "100"]
    assert tick_texts(scale.ticks(3), log=True) == ["1", "10", "100"]


def test_bars_start_at_zero_and_are_proportional():
    svg = drawings(html_page(benchmark(), "T"))[2]
    bars = [float(e.get("width")) for e in svg.iter() if e.get("class", "").startswith("bar ")]
    sizes = [size for _, _, size in SYSTEMS.values()]
    for bar, size in zip(bars, sizes, strict=True):
        assert bar / bars[0] == pytest.approx(size / sizes[0], abs=0.002)


def test_numbers():
    assert text.size(22_700_000) == "22.7 MB"
    assert text.size(999_999) == "1.00 MB"
    assert text.size(512) == "512 B"
    assert text.size(0) == "0 B"
    assert text.times_smaller(25, 100) == "4.00× smaller"
    assert text.times_smaller(100, 80) == "1.25× larger"
    assert text.times_smaller(1001, 1000) == "same size"
    assert text.milliseconds(1.2345) == "1.23 ms"
    assert text.milliseconds(1234.5) == "1234 ms"
    assert text.ratio(2.4567, 2.4, 2.5249) == ("2.46×", "[2.40, 2.52]")
    assert text.significant(9.999) == ("10.0", "")
    assert text.significant(1.2e-7, 1e-7, 2e-7) == ("1.2e-07", "[1e-07, 2e-07]")
    assert text.share(0.81234, 0.8, 0.82) == ("0.8123", "[0.8000, 0.8200]")
    assert text.share(0.999998) == ("0.999998", "")
    assert text.share(1.0) == ("1.0000", "")
    assert text.change(-0.0012, -0.002, 0.0004) == ("−0.0012", "[−0.0020, +0.0004]")
    assert text.change(-0.00001) == ("0.0000", "")


def test_conditions_read_as_words():
    assert text.conditions(LOAD) == "batch 1, 128 tokens, 1 thread"
    assert text.conditions({"threads": 4, "tokens": "mix", "data": "d.jsonl"}) == "real lengths of d.jsonl, 4 threads"
    assert text.shorten("abcdefghij", 5) == "ab…ij"
    assert text.shorten("abc", 5) == "abc"


def test_metrics_of_one_evaluation_stand_side_by_side():
    rows = [row(name, value, "absolute", "a", how=QUALITY) for name, value in (("accuracy", 0.9), ("macro f1", 0.8))]
    rows.append(row("f1", 0.7, "absolute", "a", how={**QUALITY, "data": "other.jsonl"}))
    first, second = all_tables(Measured.of(rows))
    assert first.title.startswith("accuracy, macro f1 on dev.jsonl")
    assert first.header == ("system", "accuracy", "macro f1")
    assert second.header == ("system", "f1")
