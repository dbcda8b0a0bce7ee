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
    from effllm.compress import METHODS as METHODS
    from effllm.compress import Int8 as Int8
    from effllm.compress.pipeline import compress as compress
    from effllm.compress.pipeline import export as export
    from effllm.errors import (
        ArtifactError as ArtifactError,
    )
    from effllm.errors import (
        CheckFailed as CheckFailed,
    )
    from effllm.errors import (
        EffllmError as EffllmError,
    )
    from effllm.errors import (
        GateFailed as GateFailed,
    )
    from effllm.errors import (
        MissingExtra as MissingExtra,
    )
    from effllm.errors import (
        SettingError as SettingError,
    )
    from effllm.errors import (
        Unsupported as Unsupported,
    )
    from effllm.rows import Row as Row
    from effllm.runtime.predictor import Predictor as Predictor
    from effllm.runtime.predictor import open_predictor as open
    from effllm.tasks import TASKS as TASKS
    from effllm.variant import Variant as Variant

_PUBLIC = {
    "METHODS": "effllm.compress:METHODS",
    "Int8": "effllm.compress:Int8",
    "compress": "effllm.compress.pipeline:compress",
    "export": "effllm.compress.pipeline:export",
    "open": "effllm.runtime.predictor:open_predictor",
    "Predictor": "effllm.runtime.predictor:Predictor",
    "Row": "effllm.rows:Row",
    "TASKS": "effllm.tasks:TASKS",
    "Variant": "effllm.variant:Variant",
    "EffllmError": "effllm.errors:EffllmError",
    "ArtifactError": "effllm.errors:ArtifactError",
    "CheckFailed": "effllm.errors:CheckFailed",
    "GateFailed": "effllm.errors:GateFailed",
    "MissingExtra": "effllm.errors:MissingExtra",
    "SettingError": "effllm.errors:SettingError",
    "Unsupported": "effllm.errors:Unsupported",
}
__version__ = "0.1.0"
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'effllm' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
