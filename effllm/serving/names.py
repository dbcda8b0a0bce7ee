"""The names under which folders are served."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from effllm.errors import SettingError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a name may be: it stands in URLs and in metrics."""


def name_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """Return name -> folder for arguments `DIR` or `NAME=DIR`, in their order.

    A folder is served under its own name; folders of the same name get their parent's before it, `parent-name`. Raises
    SettingError for a name that cannot stand in a URL, and for one given twice.
    """
    given = [_split(argument) for argument in arguments]
    own = Counter(_clean(folder.name) for name, folder in given if not name)
    named: dict[str, Path] = {}
    for name, folder in given:
        chosen = name or _clean(folder.name)
        if not name and (own[chosen] > 1 or any(chosen == other for other, _ in given)):
            chosen = _clean(f"{folder.parent.name}-{folder.name}")
        if not NAME.fullmatch(chosen):
            raise SettingError(f"{chosen!r} cannot be a model's name (letters, digits, . _ -); use NAME=DIR")
        if chosen in named:
            raise SettingError(f"{named[chosen]} and {folder} would both be {chosen!r}; use NAME=DIR")
        named[chosen] = folder
    return named


def _split(argument: str) -> tuple[str, Path]:
    """Return the name, empty if none is given, and the folder; a folder whose own name holds `=` stays whole."""
    name, equals, folder = argument.partition("=")
    if not equals or "/" in name or Path(argument).is_dir():
        return "", _absolute(argument)
    if not NAME.fullmatch(name):
        raise SettingError(f"{name!r} cannot be a model's name (letters, digits, . _ -)")
    return name, _absolute(folder)


def _absolute(folder: str) -> Path:
    """Return a folder's absolute path. Links stay: a reload follows one to where it leads then."""
    return Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() follows links


def _clean(name: str) -> str:
    """Return a folder's name with what cannot stand in a URL replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100]
