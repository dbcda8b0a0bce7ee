"""What the user is told, and that errors survive the way home from a worker process."""

from __future__ import annotations

import pickle

import pytest

from effllm.errors import (
    ArtifactError,
    CheckFailed,
    EffllmError,
    GateFailed,
    MissingExtra,
    SettingError,
    Unsupported,
    first_line,
    unknown_name,
)
from effllm.rows import Row


@pytest.mark.parametrize(
    "error",
    [
        EffllmError("why"),
        SettingError("why"),
        ArtifactError("why"),
        MissingExtra("openvino", "openvino", "the engine"),
        Unsupported("why"),
        CheckFailed("why"),
        GateFailed("why", [Row("f1", 0.5, "absolute", "int8")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: EffllmError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert getattr(copy, "rows", None) == getattr(error, "rows", None)


def test_wrong_input_exits_with_2_and_a_failed_check_with_3() -> None:
    assert {e.exit_code for e in (EffllmError, SettingError, ArtifactError, MissingExtra, Unsupported)} == {2}
    assert {e.exit_code for e in (CheckFailed, GateFailed)} == {3}


def test_a_missing_package_names_the_extra_that_brings_it() -> None:
    message = str(MissingExtra("openvino", "openvino", "the engine"))
    assert message == "the engine needs the package 'openvino': pip install 'effllm[openvino]'"


def test_a_misspelt_name_gets_the_nearest_and_all_known_names() -> None:
    assert str(unknown_name("method", "int9", ["int8", "prune"])) == (
        "unknown method 'int9'; did you mean 'int8'? (known: int8, prune)"
    )


def test_a_name_near_to_nothing_gets_no_suggestion() -> None:
    assert "did you mean" not in str(unknown_name("method", "zzzz", ["int8", "prune"]))


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\nwhy\nand how"), "why"), (RuntimeError(), "RuntimeError"), (OSError("  "), "OSError")],
)
def test_the_first_line_of_an_error_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line
