"""Making encoders smaller: the methods, the gate, and the pipeline that proves what it writes."""

from __future__ import annotations

from typing import Any

from effllm.compression.int8 import Int8
from effllm.compression.method import Method
from effllm.errors import unknown_name
from effllm.settings import build, split_spec

METHODS: dict[str, type[Any]] = {method.name: method for method in (Int8,)}
"""Method name -> its settings dataclass. A method is one file and one line here."""

__all__ = ["METHODS", "Int8", "Method", "parse_method"]


def parse_method(spec: str) -> Method:
    """Read `name` or `name:key=value,…`. Raises SettingError for an unknown method, setting or value."""
    name, settings = split_spec(spec)
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    method: Method = build(METHODS[name], settings, f"method {name}")
    return method
