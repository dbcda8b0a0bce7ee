"""What the HTTP side sees of the models: names, what they answer, and `answer`. `service.py` implements it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from effllm.serving.refusals import QueueFull
from effllm.tasks import Example

EMBEDDING = ("feature-extraction", "sentence-similarity")
"""The tasks whose models embed."""
TOKEN_STATES = "token-states"  # noqa: S105 - no password
"""Asked of an embedding model instead of its task: the value is float32 (T, H), one row per token."""
POOLED = "pooled"
"""Asked of an embedding model instead of its task: the value is float32 (H,), not scaled to length one."""


@dataclass(frozen=True)
class Result:
    """One input's answer: what its task's `decode` returns, how many tokens were run, and how many were cut off."""

    value: Any
    tokens: int
    truncated_tokens: int


@dataclass(frozen=True)
class Answers:
    """A request's answers in the order of its inputs, and where its time went, in seconds."""

    results: Sequence[Result]
    queue_s: float
    tokenise_s: float
    infer_s: float

    @property
    def tokens(self) -> int:
        """The tokens of all inputs."""
        return sum(result.tokens for result in self.results)


@dataclass(frozen=True)
class TokenPiece:
    """One token of `ServedModel.tokenise`: id, text, whether special, and its characters (start, stop) in the text."""

    id: int
    text: str
    special: bool
    start: int
    stop: int


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a served model. `manifest` is the folder's `effllm.json`."""

    name: str
    task: str
    labels: tuple[str, ...]
    max_length: int
    batch_dependent: bool
    size_bytes: int
    embedding_size: int
    pooling: str
    engine: str
    manifest: Mapping[str, Any]


class ServedModel(Protocol):
    """A model that is served."""

    @property
    def info(self) -> ModelInfo:
        """What is known of it."""

    @property
    def ready(self) -> bool:
        """Whether its worker answers."""

    @property
    def queued(self) -> int:
        """The inputs that wait."""

    @property
    def full(self) -> QueueFull | None:
        """The refusal of one more input, None where it has room."""

    async def answer(
        self, examples: Sequence[Example], *, task: str = "", truncate: bool = True, deadline_s: float | None = None
    ) -> Answers:
        """Answer examples. `task` is the model's own by default; embedding models take `TOKEN_STATES` and `POOLED` too.

        Raises a `Refused`. Cancelling the call frees the places of its inputs.
        """

    async def tokenise(self, texts: Sequence[str]) -> list[list[TokenPiece]]:
        """Return the tokens of each text, as the model sees them but not truncated."""


class Models(Protocol):
    """All models of a server."""

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """The models by name, in the order of the command line."""

    @property
    def ready(self) -> bool:
        """Whether every model answers and the server is not draining."""

    def find(self, name: str | None, *tasks: str) -> ServedModel:
        """Return the model of that name, or the first that answers one of the tasks; raises UnknownModel, WrongTask."""

    async def reload(self, name: str | None = None) -> list[str]:
        """Load folders again, changed or not, and switch when the new worker answers; returns the names.

        All are tried. Where one cannot be loaded its old model serves on; an ArtifactError at the end names which
        could not, why, and which were loaded. One reload runs after another.
        """

    async def close(self) -> None:
        """Refuse what is new, finish what was accepted within the drain time, and end the workers."""

    def stop_waiting(self) -> None:
        """Have `close`, running or to come, not finish what was accepted."""
