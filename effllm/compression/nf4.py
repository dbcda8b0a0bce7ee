"""nf4: weights as one of 16 values that split a normal distribution evenly (Dettmers et al. 2023), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers

from effllm.compression.codes import check_codes, code_by_bitsandbytes
from effllm.compression.method import Changed, Stage, WeightsJob

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class Nf4:
    """4-bit NormalFloat weights for transformers with bitsandbytes."""

    name: ClassVar[str] = "nf4"
    summary: ClassVar[str] = "4-bit NormalFloat weights for transformers; needs bitsandbytes, no data"
    stage: ClassVar[Stage] = Stage.CODES
    decoders: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {}

    double_quantisation: bool = field(
        default=True, metadata={"help": "store the scale of each 64 weights in 8 bits: 0.37 bits less per weight"}
    )

    def check(self, source: Source) -> None:
        """Raise MissingExtra without bitsandbytes, Unsupported for a pruned model."""
        check_codes(self.name, source, package="bitsandbytes", extra="bitsandbytes")

    def apply(self, job: WeightsJob) -> Changed:
        """Hand over the model, its inner linear layers in codes."""
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quantisation,
            bnb_4bit_compute_dtype=torch.float32,
        )
        details = code_by_bitsandbytes(self.name, job, config)
        note = "weights are expanded for every product: smaller in memory; on a CPU slower than float32 at these sizes"
        return Changed(details, [note])
