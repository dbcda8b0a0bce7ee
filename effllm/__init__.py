"""effllm: the maintained compressor for encoder models, from raw text to a served model, with proof.

    import effllm

    variant = effllm.compress("path/or/hub-id", "small", method=effllm.Int8())
    model = effllm.open("small")
    model.predict("a text")

The names below are the public interface. They are imported when first used: `import effllm` loads neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effllm.compression import METHODS, Int8, parse_method
    from effllm.compression.pipeline import compress, export
    from effllm.data.prepare import prepare
    from effllm.data.settings import PrepareSettings
    from effllm.errors import (
        ArtifactError,
        CheckFailed,
        EffllmError,
        GateFailed,
        MissingExtra,
        SettingError,
        TrainingStopped,
        Unsupported,
    )
    from effllm.hf import load
    from effllm.lineup import BenchSettings, bench
    from effllm.rows import Row
    from effllm.runtime.predictor import Predictor, open_predictor
    from effllm.tasks import TASKS
    from effllm.train.finetune import finetune
    from effllm.train.pretrain import pretrain
    from effllm.train.settings import FinetuneSettings, PretrainSettings
    from effllm.variant import Variant

    open = open_predictor

_HOMES = {
    "effllm.compression": ("METHODS", "Int8", "parse_method"),
    "effllm.compression.pipeline": ("compress", "export"),
    "effllm.data.prepare": ("prepare",),
    "effllm.data.settings": ("PrepareSettings",),
    "effllm.errors": (
        "ArtifactError",
        "CheckFailed",
        "EffllmError",
        "GateFailed",
        "MissingExtra",
        "SettingError",
        "TrainingStopped",
        "Unsupported",
    ),
    "effllm.hf": ("load",),
    "effllm.lineup": ("BenchSettings", "bench"),
    "effllm.rows": ("Row",),
    "effllm.runtime.predictor": ("Predictor", "open_predictor"),
    "effllm.tasks": ("TASKS",),
    "effllm.train.finetune": ("finetune",),
    "effllm.train.pretrain": ("pretrain",),
    "effllm.train.settings": ("FinetuneSettings", "PretrainSettings"),
    "effllm.variant": ("Variant",),
}

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "TASKS",
    "ArtifactError",
    "BenchSettings",
    "CheckFailed",
    "EffllmError",
    "FinetuneSettings",
    "GateFailed",
    "Int8",
    "MissingExtra",
    "Predictor",
    "PrepareSettings",
    "PretrainSettings",
    "Row",
    "SettingError",
    "TrainingStopped",
    "Unsupported",
    "Variant",
    "bench",
    "compress",
    "export",
    "finetune",
    "load",
    "open",
    "parse_method",
    "prepare",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    wanted = "open_predictor" if name == "open" else name
    for module, names in _HOMES.items():
        if wanted in names and name in __all__:
            return getattr(importlib.import_module(module), wanted)
    raise AttributeError(f"module 'effllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
