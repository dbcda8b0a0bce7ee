"""What can go wrong, as types.

    EffllmError                something the caller can act on; the CLI prints it as one line
    ├── SettingError           a setting, flag or column has a value that is not allowed      exit 2
    ├── ArtifactError          a file or folder is missing, damaged or not what it claims     exit 2
    ├── MissingExtra           an optional package is needed for this; names the extra        exit 2
    ├── Unsupported            valid input that effllm does not handle                        exit 2
    ├── TrainingStopped        a run cannot go on, or has no compiler for --compile           exit 3
    └── CheckFailed            a model, a system or a server does not do what it must         exit 3
        └── GateFailed         a quality gate was broken; carries the comparison              exit 3

Any other exception is a bug of effllm and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effllm.rows import Row


class EffllmError(Exception):
    """Base of every error that effllm raises on purpose."""

    exit_code = 2


class SettingError(EffllmError):
    """A setting has a value that is not allowed; the message names it, what was got and what is allowed."""


class ArtifactError(EffllmError):
    """A file or folder is missing, damaged or not what it claims to be."""


class MissingExtra(EffllmError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'effllm[{extra}]'")
        self._parts = (package, extra, purpose)

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str]]:
        return type(self), self._parts  # worker processes send errors home


class Unsupported(EffllmError):
    """The input is valid, but effllm does not handle it."""


class CheckFailed(EffllmError):
    """A written model, a system that is measured or a server does not do what it must; `--out` is not written.

    `rows` holds what was measured before.
    """

    exit_code = 3

    def __init__(self, message: str, rows: Sequence[Row] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)

    def __reduce__(self) -> tuple[type[CheckFailed], tuple[str, list[Row]]]:
        return type(self), (str(self), self.rows)


class TrainingStopped(EffllmError):
    """A run cannot go on: a loss or gradient is not finite, or a compiler is missing. The last checkpoint stands."""

    exit_code = 3


class GateFailed(CheckFailed):
    """A compressed model lost more quality than `--max-drop` allows. Nothing is kept.

    `rows` holds the comparison that failed, for printing.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or the name of its type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> SettingError:
    """Return the error for a misspelt name: what was got, the nearest known name, and all known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return SettingError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")
