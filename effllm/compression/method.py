"""What a compression method is: a frozen dataclass whose fields are its settings, with one verb, `apply`.

Methods of the weights change a torch model in place and can follow each other; a method of the graph takes what they
left, exported to ONNX, and ends the row. `stage` says where in the row a method may stand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from effllm.errors import SettingError
from effllm.measure.quality import Comparison
from effllm.progress import Track
from effllm.rows import Row
from effllm.runtime.engine import open_engine
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import Encoding, TextTokenizer
from effllm.tasks import Example

if TYPE_CHECKING:
    from effllm.exporters.source import Source
    from effllm.folder import ModelFolder


class Stage(IntEnum):
    """Where in a row of methods a method may stand: stages do not fall, but for training, which may stand anywhere."""

    TRAIN = 0
    """Changes weights by training; shapes and zeros stay. Needs training data."""
    LAYERS = 1
    """Removes whole layers."""
    WIDTH = 2
    """Removes attention heads and neurons."""
    FACTORS = 3
    """Replaces linear layers by products of two."""
    SPARSE = 4
    """Sets weights to zero, for good."""
    CODES = 5
    """Stores weights in a quantised format of another library; nothing can follow."""
    GRAPH = 6
    """Quantises the exported ONNX graph; nothing can follow."""
    SEARCH = 7
    """Tries rows of the other methods; stands alone."""


def check_calibration(method: str, calibration: int) -> None:
    """Raise SettingError for a number of calibration texts below 1."""
    if calibration < 1:
        raise SettingError(f"{method}: calibration must be at least 1, got {calibration}")


class Calibrated:
    """A job's calibration texts, tokenised as the model takes them."""

    source: Source
    calibration: Sequence[Example]

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model, with its length limit."""
        return self.source.text_tokenizer()

    def encodings(self) -> list[Encoding]:
        """Return the tokenised calibration inputs, in order."""
        return [e for example in self.calibration for e in self.source.task.encode(self.tokenizer, example)]


@dataclass
class WeightsJob(Calibrated):
    """What a method of the weights works with. `source.model` is the model, in eval mode; it is changed in place.

    `calibration` needs no reference answers; `train` is empty where no training data was given. `work` is a scratch
    folder of this step alone. `threads` is what latencies are measured with. `teacher` is the model that training
    learns from, where it is not the dense one.
    """

    source: Source
    work: Path
    calibration: Sequence[Example]
    train: Sequence[Example]
    threads: int
    track: Track
    teacher: ModelFolder | None = None

    @property
    def model(self) -> Any:
        """The transformers model as the steps before left it."""
        return self.source.model


@dataclass(frozen=True)
class Changed:
    """What a method did to the weights: what the manifest records of it, and notes for the reader.

    `batch_dependent` says that an answer can now change with the other texts of its batch.
    """

    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    batch_dependent: bool = False


@dataclass(frozen=True)
class GraphJob(Calibrated):
    """What a method of the graph works with.

    `start` is the exported, checked float32 graph to compress, `dense` the one of the model before any method, which
    the result is compared with; without other methods they are the same file. `work` is a scratch folder that is
    removed afterwards; `gate_examples` and `calibration` share no text. `threads` is what latencies are measured with.
    """

    source: Source
    start: Path
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


@dataclass(frozen=True)
class Result:
    """What a method made of a graph: the file it chose, what it promises and measured, and notes for the reader."""

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
    stage: ClassVar[Stage]


class WeightsMethod(Method, Protocol):
    """A method of a stage before `GRAPH`."""

    def check(self, source: Source) -> None:
        """Raise SettingError or Unsupported where the model cannot be compressed so, before anything else is done."""

    def apply(self, job: WeightsJob) -> Changed:
        """Change `job.model` in place. The same job gives the same bytes."""


class GraphMethod(Method, Protocol):
    """A method of the stage `GRAPH`."""

    def apply(self, job: GraphJob) -> Result:
        """Compress. Raises GateFailed with the rows when nothing that it can make passes the gate."""
