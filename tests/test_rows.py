"""Rows keep their numbers through files, and files that are not rows are refused by line."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effllm.errors import ArtifactError
from effllm.rows import Row, read_rows, write_rows

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]))
many_rows = st.lists(
    st.builds(
        Row,
        metric=texts,
        value=numbers,
        unit=texts,
        system=texts,
        n=st.integers(1, 10**6),
        low=st.none() | numbers,
        high=st.none() | numbers,
        how=st.dictionaries(texts, st.integers() | texts, max_size=3),
        machine=texts,
    ),
    max_size=4,
)
GOOD = {"metric": "f1", "value": 0.5, "unit": "share", "system": "int8"}


@QUICK
@given(many_rows)
def test_rows_read_back_as_written(tmp_path: Path, rows: list[Row]) -> None:
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e", "\r"])
def test_line_separators_inside_a_text_do_not_split_a_row(tmp_path: Path, separator: str) -> None:
    row = Row("f1", 0.5, "share", f"a{separator}b")
    write_rows(tmp_path / "rows.jsonl", [row])
    assert read_rows(tmp_path / "rows.jsonl") == [row]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_bug(value: float) -> None:
    with pytest.raises(ValueError, match="row 'f1' of 'int8' is not finite"):
        Row("f1", value, "share", "int8")


def test_empty_fields_are_left_out_and_zeros_kept() -> None:
    row = Row("f1", 0.0, "share", "int8", low=0.0, at="now")
    assert row.to_json() == {
        "metric": "f1",
        "value": 0.0,
        "unit": "share",
        "system": "int8",
        "n": 1,
        "low": 0.0,
        "at": "now",
    }


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "5",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({"metric": "f1"}),
        json.dumps(GOOD | {"colour": "red"}),
        json.dumps(GOOD | {"value": "0.5"}),
        json.dumps(GOOD | {"value": None}),
        json.dumps(GOOD | {"value": math.nan}),
        json.dumps(GOOD | {"value": 10**400}),
        json.dumps(GOOD | {"low": "x"}),
        json.dumps(GOOD | {"n": []}),
        json.dumps(GOOD | {"metric": 5}),
        json.dumps(GOOD | {"unit": None}),
        json.dumps(GOOD | {"system": ["a"]}),
        json.dumps(GOOD | {"how": 5}),
        json.dumps(GOOD | {"high": 10**400}),
        json.dumps(GOOD | {"how": {"role": ["serving"]}}),
        json.dumps(GOOD | {"how": {"role": "serving", "rate": "50"}}),
        json.dumps(GOOD | {"how": {"role": "serving", "within_ms": None}}),
        json.dumps(GOOD | {"how": {"clients": [8]}}),
        json.dumps(GOOD | {"how": {"tokens": math.inf}}),
        json.dumps(GOOD | {"how": {"tokens": 10**400}}),
    ],
    ids=lambda line: line[:60],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(ArtifactError, match=r"rows\.jsonl:3 is not a row of measurements") as caught:
        read_rows(file)
    assert "\n" not in str(caught.value)


def test_a_wrong_condition_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD | {"how": {"role": "serving", "rate": "50"}}))
    with pytest.raises(ArtifactError, match=r"rows\.jsonl:1 is not .*: how\.rate is not a finite number"):
        read_rows(tmp_path / "rows.jsonl")


def test_blank_lines_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes((json.dumps(GOOD) + "\r\n\r\n" + json.dumps(GOOD)).encode())
    assert [row.value for row in read_rows(file)] == [0.5, 0.5]


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff\xfe\x00")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make) -> None:
    make(tmp_path / "rows.jsonl")
    with pytest.raises(ArtifactError, match=r"cannot read rows from .*rows\.jsonl"):
        read_rows(tmp_path / "rows.jsonl")


@QUICK
@given(
    st.binary()
    | st.text().map(str.encode)
    | st.dictionaries(st.sampled_from(list(GOOD)), st.none() | st.text() | numbers).map(
        lambda d: json.dumps(d).encode()
    )
)
def test_any_bytes_are_rows_or_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with contextlib.suppress(ArtifactError):
        assert all(isinstance(row, Row) for row in read_rows(tmp_path / "rows.jsonl"))


def test_a_failed_write_keeps_the_old_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [Row("f1", 0.5, "share", "old")])
    with pytest.raises(TypeError):
        write_rows(file, [Row("f1", 0.5, "share", "new", how={"x": object()})])
    assert [row.system for row in read_rows(file)] == ["old"]
