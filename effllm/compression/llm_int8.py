"""llm-int8: 8-bit weights, and 8-bit inputs but for outlier channels (Dettmers et al. 2022), by bitsandbytes.

An input channel with a value of at least `threshold` is multiplied in float, all others in int8 with a scale per token
and per output. Which channels those are is found in the whole batch at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import transformers

from effllm.compression.codes import check_codes, code_by_bitsandbytes
from effllm.compression.method import Changed, Stage, WeightsJob
from effllm.errors import SettingError

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class LlmInt8:
    """LLM.int8() for transformers with bitsandbytes."""

    name: ClassVar[str] = "llm-int8"
    summary: ClassVar[str] = "8-bit weights, outlier channels in float, for transformers; needs bitsandbytes, no data"
    stage: ClassVar[Stage] = Stage.CODES
    decoders: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {}

    threshold: float = field(
        default=6.0, metadata={"help": "inputs of at least this size are multiplied in float; 0 = none are"}
    )

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise SettingError(f"llm-int8: threshold must be at least 0, got {self.threshold}")

    def check(self, source: Source) -> None:
        """Raise MissingExtra without bitsandbytes, Unsupported for a pruned model."""
        check_codes(self.name, source, package="bitsandbytes", extra="bitsandbytes")

    def apply(self, job: WeightsJob) -> Changed:
        """Hand over the model, its inner linear layers in codes."""
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold)
        details = code_by_bitsandbytes(self.name, job, config)
        note = "which input channels are outliers depends on the batch; on a CPU slower than float32 at these sizes"
        return Changed(details, [note], batch_dependent=self.threshold > 0)
