"""A settings dataclass as text, as JSON and as help: one definition, three views.

The text form is the one of the command line, `name:key=value,key=value`. A settings dataclass is frozen, its fields
have defaults, and their types are `int`, `float`, `bool`, `str` or a `Literal` of strings; each field's help stands in
`field(metadata={"help": …})`. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from effllm.errors import SettingError, unknown_name

T = TypeVar("T")
Number = TypeVar("Number", int, float)

MOST = 1_000_000
"""Numbers of a list on the command line are below this."""


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split `"int8:activations=static,seed=1"` into its name and its raw settings."""
    name, _, rest = spec.partition(":")
    settings: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise SettingError(f"{spec!r}: expected key=value, got {item!r}")
        if key in settings:
            raise SettingError(f"{spec!r}: {key!r} is given twice")
        settings[key] = value
    return name.strip(), settings


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make a `cls` from raw values (strings of the command line or JSON values), checking keys and types.

    Raises SettingError for an unknown key or a value that does not fit the field's type. Ranges are the dataclass's
    own business, in its `__post_init__`.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cast(Any, cls)) if f.init}
    for key in values:
        if key not in fields:
            raise unknown_name(f"setting of {where}", key, fields)
    return cls(**{key: _convert(value, hints[key], f"{where}: {key}") for key, value in values.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise SettingError(f"{where} must be one of {', '.join(get_args(kind))}, got {value!r}")
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in {"true", "yes", "1"}:
            return True
        if str(value).lower() in {"false", "no", "0"}:
            return False
        raise SettingError(f"{where} must be true or false, got {value!r}")
    if kind in (int, float, str):
        converted = _scalar(value, kind)
        if converted is None:
            raise SettingError(f"{where} must be {_type_name(kind)}, got {value!r}")
        return converted
    raise TypeError(f"{where}: settings of type {kind} are not supported")


def _scalar(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, or None where it does not fit without loss or is not finite."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        converted = kind(value)
    except (ValueError, OverflowError):
        return None
    lossless = isinstance(value, str) or converted == value
    finite = kind is not float or math.isfinite(converted)
    return converted if lossless and finite else None


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "a whole number", float: "a number", str: "text", bool: "true|false"}[kind]


def to_json(settings: Any) -> dict[str, Any]:
    """Return the settings as a JSON object, in field order. `build` reads it back."""
    return dataclasses.asdict(settings)


def describe(cls: type[Any]) -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, help) for each field, keyword-only ones last, for `effllm show`."""
    hints = typing.get_type_hints(cls)
    return [
        (f.name, _type_name(hints[f.name]), str(f.default), f.metadata.get("help", ""))
        for f in sorted(dataclasses.fields(cls), key=lambda f: bool(f.kw_only))
        if f.init
    ]


def parse_numbers(flag: str, text: str, kind: type[Number]) -> list[Number]:
    """Return the numbers in `"1,8,32"`. Raises SettingError for anything else, and unless all are above zero."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = [kind(0)]
    if not all(0 < number < MOST for number in numbers):
        example, name = ("16,64", "whole numbers") if kind is int else ("50,100.5", "numbers")
        raise SettingError(f"{flag} takes {name} above zero, such as {example}; got {text!r}")
    return numbers


def read_key(flag: str, file: str) -> str:
    """Return the API key in a file. Raises SettingError, which does not quote it, when the file holds none."""
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingError(f"{flag} {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:  # whose text would quote a byte
        raise SettingError(f"{flag} {file} cannot be read: it is not UTF-8 text") from None
    if len(key.split()) != 1 or not key.isascii() or not key.isprintable():
        raise SettingError(f"{flag} {file} must hold one key of plain characters, without spaces in it")
    return key
