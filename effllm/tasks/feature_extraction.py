"""Feature extraction: one vector per text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effllm.tasks.task import Example, Head, Outputs, Task, text_column

if TYPE_CHECKING:
    from effllm.runtime.tokenizer import Encoding, TextTokenizer


def pool(hidden: np.ndarray, pooling: str) -> np.ndarray:
    """Pool token states (T, H) to one vector (H,): `mean`, `cls`, `max`, `mean_sqrt_len` or `lasttoken`."""
    pooled: dict[str, Any] = {
        "mean": lambda: hidden.mean(axis=0),
        "cls": lambda: hidden[0],
        "max": lambda: hidden.max(axis=0),
        "mean_sqrt_len": lambda: hidden.sum(axis=0) / np.sqrt(len(hidden)),
        "lasttoken": lambda: hidden[-1],
    }
    vector: np.ndarray = pooled[pooling]()
    return vector


def unit(vector: np.ndarray) -> np.ndarray:
    """Scale a vector to length one; a zero vector stays zero."""
    norm = float(np.linalg.norm(vector))
    result: np.ndarray = vector / norm if norm else vector
    return result


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Return the cosine of two vectors, in float64."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0


class FeatureExtraction(Task):
    """Embeddings. They have no metric of their own; agreement is the cosine between the two models' vectors."""

    name = "feature-extraction"
    auto_class = "AutoModel"
    architectures = ("Model",)
    any_model = True
    scored_by = "sentence-similarity"
    outputs = ("last_hidden_state",)
    columns = {"text": "the text"}

    def parse(self, record: Mapping[str, Any], head: Head, *, gold: bool) -> Example:
        """Read `text`."""
        return Example(text_column(record, "text"))

    def encode(self, tokenizer: TextTokenizer, example: Example) -> list[Encoding]:
        """Encode the text."""
        return [tokenizer.encode(str(example.text))]

    def decode(self, example: Example, encodings: Sequence[Encoding], outputs: Sequence[Outputs], head: Head) -> Any:
        """Return the unit-length embedding as a float32 array (H,)."""
        return unit(pool(outputs[0]["last_hidden_state"], head.pooling)).astype(np.float32)

    def agreements(self, first: Any, second: Any) -> list[float]:
        """Return the cosine of the two embeddings."""
        return [cosine(first, second)]
