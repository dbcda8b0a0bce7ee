"""Flags that several verbs share, and flags made from a settings dataclass."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import click

from effllm.errors import SettingError
from effllm.files import PARTIAL

F = TypeVar("F", bound=Callable[..., Any])

TASK = click.option("--task", metavar="TASK", help="What the model answers; read from the model when not given.")
COLUMNS = click.option("--columns", metavar="MAP", help="Column names of the data, as text=sentence,label=y.")
FORCE = click.option("--force", is_flag=True, help="Replace an existing folder; it survives a failure.")
OUT = click.option("--out", required=True, metavar="DIR", help="The folder to write.")
THREADS = click.option("--threads", type=click.IntRange(min=1), help="Threads to run and time with; default all cores.")


class _Share(click.FloatRange):
    """A number from 0 to 1. NaN, which click lets through, is none: every comparison with it would pass."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number != number:  # noqa: PLR0124 - NaN
            self.fail("nan is not in the range 0<=x<=1.", param, ctx)
        return number


SHARE = _Share(0, 1)


def _can_be_written(context: click.Context, option: click.Parameter, file: str | None) -> str | None:
    """Return the file that a flag names. Raises SettingError, before any work is done, unless it can be written."""
    import tempfile

    if file is None or (file == "-" and option.name == "json_file"):
        return file
    flag, folder = option.opts[-1], Path(file).parent
    try:
        for path in (Path(file), Path(f"{file}{PARTIAL}")):
            if path.exists() and not path.is_file():
                raise SettingError(f"{flag} must name a file to write; {str(path)!r} is something else")
        with tempfile.TemporaryFile(dir=folder):
            return file
    except OSError as error:
        raise SettingError(f"{flag} {file} cannot be written, in folder {folder}: {error.strerror}") from None


JSON = click.option(
    "--json",
    "json_file",
    metavar="FILE",
    callback=_can_be_written,
    help="Write the measured rows as JSON lines; - for stdout.",
)
HTML = click.option(
    "--html", "html_file", metavar="FILE", callback=_can_be_written, help="Write a self-contained HTML report."
)


def settings_options(cls: type[Any], skip: Sequence[str] = (), argument: str = "settings") -> Callable[[F], F]:
    """Return a decorator that gives a verb a flag for each field of a settings dataclass.

    Flags are made from the fields' names, types, defaults and help; the verb gets them as one `argument`.
    """
    hints = typing.get_type_hints(cls)
    chosen = [f for f in dataclasses.fields(cls) if f.name not in skip]

    def add(verb: F) -> F:
        @functools.wraps(verb)
        def _with_settings(**flags: Any) -> Any:
            settings = cls(**{f.name: flags.pop(f.name) for f in chosen})
            return verb(**{argument: settings}, **flags)

        function: Any = _with_settings
        for f in reversed(chosen):
            kind, flag = hints[f.name], "--" + f.name.replace("_", "-")
            text = str(f.metadata["help"])
            text = text[0].upper() + text[1:] + "."
            if kind is bool:
                both = f"{flag}/--no-{flag[2:]}"
                function = click.option(both, f.name, default=f.default, show_default=True, help=text)(function)
            else:
                shown = click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind
                option = click.option(flag, f.name, type=shown, default=f.default, show_default=True, help=text)
                function = option(function)
        return cast("F", function)

    return add
