"""distil: trains the compressed model to answer as the dense one does.

The dense model is the one before the first method, or the one that `--teacher` names. The losses are those of
`effllm.train.distil`: softened logits (Hinton et al. 2015), hidden states (TinyBERT, Jiao et al. 2020), attention
relations (MiniLMv2, Wang et al. 2021). Texts without reference answers are enough. After layers were dropped, student
layer i learns from teacher layer i · teacher layers / student layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from effllm.compression.method import Changed, Stage, WeightsJob
from effllm.compression.recovery import Training, recover
from effllm.errors import SettingError

if TYPE_CHECKING:
    from effllm.exporters.source import Source


SAME = 1e-6
"""The loss below which two models are the same, but for rounding."""
ITSELF = (
    "it learnt from itself, as no method before had changed the model; put it after one, or name the model to learn "
    "from with --teacher"
)


@dataclass(frozen=True)
class Distil(Training):
    """Knowledge distillation from the dense model."""

    name: ClassVar[str] = "distil"
    summary: ClassVar[str] = "recovers by learning from the dense model; needs --train, labels are optional"
    stage: ClassVar[Stage] = Stage.TRAIN

    logits: float = field(default=1.0, metadata={"help": "weight of matching the dense model's logits"})
    attention: float = field(default=0.0, metadata={"help": "weight of matching its last attention relations"})
    temperature: float = field(default=2.0, metadata={"help": "softens both models' logits"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.logits + self.hidden + self.attention > 0:
            raise SettingError("distil: one of logits, hidden and attention must have a weight above 0")

    def check(self, source: Source) -> None:
        """Every model can learn from its dense self."""

    def apply(self, job: WeightsJob) -> Changed:
        """Train in place."""
        details = recover(job, self)
        return Changed(details, [ITSELF] if details["first_loss"] < SAME else [])
