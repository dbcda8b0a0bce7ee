"""What the README shows of compression: which rows stand where, in the tables and in the plot."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from effllm.report.svg import plot_style, text_width
from effllm.rows import Row

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compression_report

SVG = "{http://www.w3.org/2000/svg}"
TRAINED = {"method": "finetune", "epochs": 1}
DISTIL = {"method": "distil", "steps": 600}


def measured(name, value, *steps, low=None, high=None, n=1, size=5e7, at="2026-03-01T10:00:00+00:00"):
    how = {"split": "dev", "methods": [TRAINED, *steps]}
    return [
        Row("accuracy", value, "absolute", name, n, low, high, how, "CPU", at),
        Row("model size", size, "bytes", name, at=at),
    ]


def zeros(method, place, value, *after, **others):
    """A recipe at a share of zeros or a pattern n:m."""
    share = place if isinstance(place, float) else 0.5
    pattern = "layer" if isinstance(place, float) else place
    step = {"method": method, "sparsity": share, "pattern": pattern, "epochs": 0.0, "steps": 0}
    name = " + ".join([f"{method} {place}", *(step["method"] for step in after)])
    return measured(name, value, step, *after, **others)


def rows():
    return [
        *measured("int8", 0.891, {"method": "int8"}),
        *zeros("obert", 0.9, 0.7),
        *zeros("obert", 0.9, 0.86, DISTIL, low=0.85, high=0.865, n=3),
        *zeros("magnitude", 0.9, 0.5),
        *zeros("magnitude", 0.5, 0.85, size=7.1e7),
        *zeros("magnitude", "2:4", 0.84),
        *zeros("wanda", "2:4", 0.86),
        *zeros("magnitude", 0.5, 0.8501, {"method": "int8"}),
        *measured("structured 2x + distil", 0.885, {"method": "structured"}, DISTIL, low=0.88, high=0.89, n=3),
        *measured("structured 2x", 0.88, {"method": "structured"}),
        *measured("dense", 0.89),
    ]


def plotted(of=None):
    found = compression_report.recipes(rows() if of is None else of, "accuracy")
    return compression_report.sparsity_plot(found, "accuracy")


def points(svg):
    """Title of each point -> (its marker's class, x, y, ends of its whisker)."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        if group.get("class") == "point":
            (marker,) = group.iter(f"{SVG}path")
            x, y = (float(number) for number in re.findall(r"[\d.]+", marker.get("transform")))
            whiskers = [(float(w.get("y1")), float(w.get("y2"))) for w in group.iter(f"{SVG}line")]
            found[group.find(f"{SVG}title").text] = (marker.get("class"), x, y, whiskers)
    return found


def test_the_list_is_grouped_and_says_the_change_and_the_seeds():
    table = compression_report.list_table(compression_report.recipes(rows(), "accuracy"), "accuracy")
    assert table.splitlines() == [
        "| methods, in order | accuracy | change, points | file |",
        "|---|---|---|---|",
        "| dense | 0.8900 | – | 50.0 MB |",
        "| **fewer heads, neurons, layers** | | | |",
        "| structured 2x | 0.8800 | −1.0 | 50.0 MB |",
        "| structured 2x + distil | 0.8850 [0.8800, 0.8900] | −0.5 | 50.0 MB |",
        "| **8 and 4 bits** | | | |",
        "| int8 | 0.8910 | +0.1 | 50.0 MB |",
        "| **zeros** | | | |",
        "| magnitude 0.5 + int8 | 0.8501 | −4.0 | 50.0 MB |",
    ]


def test_speeds_have_columns_where_something_was_timed():
    timed = [Row("speed-up", 1.5, "x", "int8", how={"batch": 16, "tokens": 64})]
    lines = compression_report.tables([*rows(), *timed], "accuracy", "accuracy").splitlines()
    assert lines[0].endswith("| file | 1 × 128 | 16 × 64 |")
    assert "| int8 | 0.8910 | +0.1 | 50.0 MB | – | 1.50× |" in lines
    assert {line.count("|") for line in lines[: lines.index("")]} == {7}


def test_changes_on_test_have_a_column_of_their_own_beside_the_dense_models_there():
    on_test = {"split": "test", "methods": [TRAINED]}
    tested = [
        Row("accuracy", 0.9, "absolute", "dense", how=on_test),
        Row("accuracy", 0.888, "absolute", "int8", how={**on_test, "methods": [TRAINED, {"method": "int8"}]}),
    ]
    lines = compression_report.tables([*rows(), *tested], "accuracy", "accuracy").splitlines()
    assert lines[0] == "| methods, in order | accuracy | change, points | on test | file |"
    assert "| dense | 0.8900 | – | – | 50.0 MB |" in lines
    assert "| int8 | 0.8910 | +0.1 | −1.2 | 50.0 MB |" in lines
    assert "| structured 2x | 0.8800 | −1.0 | – | 50.0 MB |" in lines
    assert {line.count("|") for line in lines[: lines.index("")]} == {6}


def test_zeros_stand_by_method_and_share_with_gaps_where_nothing_was_measured():
    table = compression_report.sparse_table(compression_report.recipes(rows(), "accuracy"), "accuracy")
    assert table.splitlines() == [
        "| zeros, accuracy | 2:4 | 50 % | 90 % |",
        "|---|---|---|---|",
        "| magnitude | 0.8400 | 0.8500 | 0.5000 |",
        "| wanda | 0.8600 | – | – |",
        "| obert | – | – | 0.7000 |",
        "| obert + distil | – | – | 0.8600 [0.8500, 0.8650] |",
        "| file | 50.0 MB | 71.0 MB | 50.0 MB |",
    ]


def test_the_notes_count_the_seeds():
    assert "up to 3, median [lowest, highest]" in compression_report.tables(rows(), "accuracy", "accuracy")
    assert "CPU; one seed." in compression_report.tables(measured("dense", 0.89), "accuracy", "accuracy")


def test_the_newest_measurement_of_a_recipe_counts():
    new = zeros("magnitude", 0.5, 0.87, at="2026-03-02T10:00:00+00:00")
    for order in ([*new, *rows()], [*rows(), *new]):
        table = compression_report.sparse_table(compression_report.recipes(order, "accuracy"), "accuracy")
        assert "| magnitude | 0.8400 | 0.8700 | 0.5000 |" in table


def test_without_zeros_there_is_neither_table_nor_plot():
    dense = measured("dense", 0.89)
    assert plotted(dense) == ""
    assert compression_report.tables(dense, "accuracy", "accuracy", "plot.svg").count("|---") == 4
    assert "plot.svg" not in compression_report.tables(dense, "accuracy", "accuracy", "plot.svg")
    assert "(plot.svg)" in compression_report.tables(rows(), "accuracy", "accuracy", "plot.svg")
    assert plotted(zeros("magnitude", 0.5, 0.85)) == "", "without the dense model there is nothing to compare with"


def test_each_pruned_model_is_a_point_at_its_share_and_quality():
    found = points(plotted())
    names = {title.split(":")[0] if "2:4" not in title else title for title in found}
    assert names == {
        "magnitude 0.5",
        "magnitude 0.9",
        "obert 0.9",
        "obert 0.9 + distil",
        "magnitude 2:4: 0.8400",
        "wanda 2:4: 0.8600",
    }
    xs, ys = ({title: spot[axis] for title, spot in found.items()} for axis in (1, 2))
    assert sorted(ys, key=ys.get, reverse=True) == sorted(found, key=lambda title: float(title.split(": ")[-1][:6]))
    assert xs["magnitude 0.9: 0.5000"] == xs["obert 0.9: 0.7000"] > xs["magnitude 0.5: 0.8500"]
    assert xs["magnitude 2:4: 0.8400"] + 12 < xs["wanda 2:4: 0.8600"] < xs["magnitude 0.5: 0.8500"]


def test_what_was_distilled_differs_by_more_than_its_colour():
    svg = plotted()
    kinds = {title: kind.split() for title, (kind, *_) in points(svg).items()}
    at_once, distilled = kinds["obert 0.9: 0.7000"], kinds["obert 0.9 + distil: 0.8600 [0.8500, 0.8650]"]
    assert at_once == ["hollow-marker", distilled[1]]
    assert distilled[0] == "marker"
    lines = re.findall(r'class="((?:series|dashed)-line) (c\d)"', svg)
    assert ("series-line", distilled[1]) in lines
    assert ("dashed-line", distilled[1]) in lines


def test_whiskers_reach_from_the_lowest_to_the_highest_seed_and_only_where_there_are_several():
    found = points(plotted())
    (((low, high),),) = [whiskers for *_, whiskers in found.values() if whiskers]
    _, _, y, _ = found["obert 0.9 + distil: 0.8600 [0.8500, 0.8650]"]
    # One scale for all: 0.010 below the median and 0.005 above it; coordinates have one decimal.
    assert abs((low - y) - 2 * (y - high)) <= 0.2
    assert high < y < low


def test_the_dense_model_is_a_line_across_at_its_value():
    svg = ElementTree.fromstring(plotted([*zeros("magnitude", 0.5, 0.85), *zeros("wanda", 0.5, 0.89), *rows()[-2:]]))
    lines = [line for group in svg.iter(f"{SVG}g") if group.get("class") == "front" for line in group]
    (across,) = [line for line in lines if line.tag == f"{SVG}polyline"]
    (x1, y1), (x2, y2) = (map(float, spot.split(",")) for spot in across.get("points").split())
    ys = {title: y for title, (_, _, y, _) in points(ElementTree.tostring(svg, encoding="unicode")).items()}
    assert y1 == y2 == ys["wanda 0.5: 0.8900"] < ys["magnitude 0.5: 0.8500"]
    assert x2 - x1 > 400


def test_the_order_of_the_rows_changes_no_byte_of_the_plot():
    expected = plotted()
    for seed in range(3):
        shuffled = rows()
        random.Random(seed).shuffle(shuffled)
        assert plotted(shuffled) == expected


def test_the_plot_brings_its_style_and_background():
    svg = ElementTree.fromstring(plotted())
    assert svg.find(f"{SVG}style").text == plot_style()
    background = svg.find(f"{SVG}rect")
    assert (background.get("class"), background.get("width"), background.get("height")) == ("page", "860", "400")
    assert "prefers-color-scheme: dark" in plot_style()
    rules = set(re.findall(r"\.([a-z][\w-]*)", plot_style()))
    drawn = {name for e in svg.iter() if e.tag not in {f"{SVG}g", f"{SVG}svg"} for name in e.get("class", "").split()}
    assert drawn <= rules


def test_every_text_is_within_the_picture():
    svg = ElementTree.fromstring(plotted())
    for element in svg.iter(f"{SVG}text"):
        if "transform" not in element.attrib:
            width = text_width(element.text)
            left = float(element.get("x")) - width * {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor")]
            assert 0 <= left <= left + width <= 860, element.text


def test_a_line_runs_along_the_shares_whatever_the_recipes_are_called():
    steps = [{"method": "magnitude", "sparsity": share, "pattern": "layer"} for share in (0.9, 0.5, 0.7)]
    svg = plotted([*measured("dense", 0.89), *(r for i, s in enumerate(steps) for r in measured(f"{i}", 0.8, s))])
    (line, _) = re.findall(r'points="([^"]*)" class="dashed-line', svg)
    xs = [float(spot.split(",")[0]) for spot in line.split()]
    assert xs == sorted(xs)
    assert len(xs) == 3


def test_a_change_that_is_rounded_to_nothing_has_no_sign():
    assert [compression_report.signed(points) for points in (-0.04, 0.04, -0.06, 1.25)] == [
        "0.0",
        "0.0",
        "−0.1",
        "+1.2",
    ]
