"""Making encoders smaller: the methods, the gate, and the pipeline that proves what it writes."""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING, Any

from effllm.errors import SettingError, Unsupported, unknown_name
from effllm.settings import build, split_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from effllm.compression.int8 import Int8
    from effllm.compression.method import Method

METHODS = {
    "distil": "effllm.compression.distil:Distil",
    "qat": "effllm.compression.qat:Qat",
    "layers": "effllm.compression.layer_drop:Layers",
    "heads": "effllm.compression.heads:Heads",
    "ffn": "effllm.compression.ffn:Ffn",
    "structured": "effllm.compression.structured:Structured",
    "lowrank": "effllm.compression.lowrank:LowRank",
    "magnitude": "effllm.compression.magnitude:Magnitude",
    "wanda": "effllm.compression.wanda:Wanda",
    "ria": "effllm.compression.ria:Ria",
    "sparsegpt": "effllm.compression.sparsegpt:SparseGpt",
    "obert": "effllm.compression.obert:OBert",
    "movement": "effllm.compression.movement:Movement",
    "int4-torch": "effllm.compression.int4_torch:Int4Torch",
    "nf4": "effllm.compression.nf4:Nf4",
    "llm-int8": "effllm.compression.llm_int8:LlmInt8",
    "fp8": "effllm.compression.fp8:Fp8",
    "int8": "effllm.compression.int8:Int8",
    "int4": "effllm.compression.int4:Int4",
    "auto": "effllm.compression.auto:Auto",
}
"""Method name -> `module:class` of its settings dataclass, in the order of `effllm show methods`. A method is one
file and one line here."""

__all__ = ["METHODS", "Int8", "check_decoder", "check_order", "method_class", "parse_method"]


def __getattr__(name: str) -> Any:
    if name == "Int8":
        return method_class("int8")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def method_class(name: str) -> type[Any]:
    """Return a method's settings dataclass. Raises SettingError for an unknown name."""
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    module, _, cls = METHODS[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), cls)
    return found


def parse_method(spec: str) -> Method:
    """Read `name` or `name:key=value,…`. Raises SettingError for an unknown method, setting or value."""
    name, settings = split_spec(spec)
    method: Method = build(method_class(name), settings, f"method {name}")
    return method


def check_order(methods: Sequence[Method]) -> None:
    """Raise SettingError where methods cannot follow each other, naming the reason."""
    if not methods:
        raise SettingError("give at least one --method; `effllm show methods` lists them")
    searching = [method.name for method in methods if method.stage.name == "SEARCH"]
    if searching and len(methods) > 1:
        raise SettingError(f"--method {searching[0]} must stand alone: it tries rows of the other methods itself")
    reached = methods[0]
    for before, method in itertools.pairwise(methods):
        if before.stage >= before.stage.CODES:
            raise SettingError(f"--method {before.name} must be the last: it writes what no other method can change")
        if before.stage and before.stage > reached.stage:
            reached = before
        if method.stage and method.stage < reached.stage:
            raise SettingError(f"--method {method.name} must come before {reached.name}: {REASONS[reached.stage.name]}")
    for index, method in enumerate(methods):
        check_later = getattr(method, "check_later", None)
        if check_later is not None:
            check_later(methods[index + 1 :])


def check_decoder(methods: Sequence[Method]) -> None:
    """Raise Unsupported for a method that a decoder cannot be compressed by, naming those that it can."""
    for method in methods:
        if not getattr(method, "decoders", False):
            able = [name for name in METHODS if getattr(method_class(name), "decoders", False)]
            raise Unsupported(f"--method {method.name} is for encoders; those for decoders: {', '.join(able)}")
        if getattr(method, "epochs", 0) > 0:
            raise Unsupported(f"--method {method.name} with epochs trains, which effllm does to encoders only")


REASONS = {
    "WIDTH": "widths are chosen for the layers that stay",
    "FACTORS": "heads and neurons cannot be taken out of a product of two matrices",
    "SPARSE": "the zeros were chosen for the weights as they were",
}
"""Why nothing of an earlier stage may follow one of these."""
