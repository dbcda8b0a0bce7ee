"""nf4: weights as one of 16 values that split a normal distribution evenly (Dettmers et al. 2023), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import nn

from effllm.compression.codes import check_codes, code_by_bitsandbytes, inner_linears
from effllm.compression.method import Changed, Stage, WeightsJob
from effllm.errors import Unsupported

if TYPE_CHECKING:
    from effllm.exporters.source import Source


COLUMNS, ROWS = 64, 32
"""What a layer's inputs and outputs must divide by: on processors with AVX512-BF16 bitsandbytes packs blocks of these
sizes at the first product and stops at others. A folder should work on every machine, so others stay float on all."""


def fits(linear: nn.Linear) -> bool:
    """Return whether bitsandbytes can use a layer in 4 bits on every processor."""
    return linear.in_features % COLUMNS == 0 and linear.out_features % ROWS == 0


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
        """Raise MissingExtra without bitsandbytes, Unsupported for a pruned model and one without a layer that fits."""
        check_codes(self.name, source, package="bitsandbytes", extra="bitsandbytes")
        if not any(map(fits, inner_linears(source.model).values())):
            raise Unsupported(
                f"--method {self.name} codes layers whose inputs divide by {COLUMNS}, outputs by {ROWS}; there is none"
            )

    def apply(self, job: WeightsJob) -> Changed:
        """Hand over the model, its inner linear layers in codes."""
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quantisation,
            bnb_4bit_compute_dtype=torch.float32,
        )
        details = code_by_bitsandbytes(self.name, job, config, fits)
        note = "weights are expanded for every product: smaller in memory; on a CPU slower than float32 at these sizes"
        return Changed(details, [note])
