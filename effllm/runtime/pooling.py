"""How a sentence-embedding folder pools: read from the module files of sentence-transformers, old and new."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effllm.errors import Unsupported
from effllm.folder import read_json

MODE_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Pooling mode -> its boolean key in the old `1_Pooling/config.json`."""


@dataclass(frozen=True)
class Pooling:
    """How token states become one vector; `declared` is false when the folder does not say and mean was assumed."""

    mode: str = "mean"
    normalize: bool = False
    declared: bool = False


def read_pooling(folder: Path) -> Pooling:
    """Read a folder's pooling. Raises Unsupported for modules other than transformer, pooling and normalisation."""
    modules = read_json(folder / "modules.json", [])
    mode, declared, normalize = "mean", False, False
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            config = read_json(folder / module["path"] / "config.json")
            mode, declared = _mode(config, folder), True
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise Unsupported(f"{folder}: module {kind!r} is not supported (Transformer, Pooling and Normalize are)")
    return Pooling(mode, normalize, declared)


def _mode(config: dict[str, object], folder: Path) -> str:
    named = config.get("pooling_mode")
    found = [named] if isinstance(named, str) else [m for m, key in MODE_KEYS.items() if config.get(key) is True]
    if len(found) != 1 or found[0] not in MODE_KEYS:
        raise Unsupported(f"{folder}: pooling {found or 'none'} is not supported (one of {', '.join(MODE_KEYS)})")
    return str(found[0])
