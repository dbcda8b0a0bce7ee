"""What a compression method is: a frozen dataclass whose fields are its settings, with one verb, `apply`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from effllm.measure.quality import Comparison
from effllm.progress import Track
from effllm.rows import Row
from effllm.runtime.engine import open_engine
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import TextTokenizer
from effllm.tasks import Example

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class Job:
    """What a method works with.

    `dense` is the exported, checked float32 graph; `work` a scratch folder that is removed afterwards; `gate_examples`
    and `calibration` share no text. `threads` is what latencies are measured with.
    """

    source: Source
    dense: Path
    work: Path
    calibration: Sequence[Example]
    gate_examples: Sequence[Example]
    gate_data: str
    max_drop: float
    threads: int
    track: Track

    def predictor(self, file: Path, name: str) -> Predictor:
        """Load a graph file with the job's tokenizer, task and thread count."""
        folder, task = self.source.folder, self.source.task
        engine = open_engine("onnxruntime", file, auto_class=task.auto_class, threads=self.threads)
        return Predictor(name, folder, task, self.tokenizer, engine)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model, with its length limit."""
        return TextTokenizer.of(self.source.tokenizer.backend_tokenizer, self.source.folder)


@dataclass(frozen=True)
class Result:
    """What a method made: the graph file it chose, what it promises, what it measured, and notes for the reader."""

    file: Path
    file_name: str
    comparison: Comparison
    batch_dependent: bool
    rows: list[Row]
    details: dict[str, Any]
    notes: list[str]


class Method(Protocol):
    """A compression method. Subclass nothing; write a frozen dataclass and add a line to `METHODS`."""

    name: ClassVar[str]
    summary: ClassVar[str]

    def apply(self, job: Job) -> Result:
        """Compress. Raises GateFailed with the rows when nothing that it can make passes the gate."""
