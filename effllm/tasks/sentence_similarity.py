"""Sentence similarity: the cosine of two embeddings, scored by its correlation with human scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effllm.tasks.feature_extraction import cosine, pool, unit
from effllm.tasks.task import Example, Head, Outputs, Task, number_column, pearson, spearman, text_column

if TYPE_CHECKING:
    from effllm.runtime.tokenizer import Encoding, TextTokenizer


class SentenceSimilarity(Task):
    """Pairs of sentences. The answer holds both embeddings, so that agreement sees the vectors, not only the cosine.

    Metric: Spearman's rank correlation; Pearson's beside it.
    """

    name = "sentence-similarity"
    pairs = "must"
    auto_class = "AutoModel"
    architectures = ("Model",)
    any_model = True
    outputs = ("last_hidden_state",)
    columns = {"text": "one sentence", "text_pair": "the other sentence", "score": "how similar they are (any scale)"}
    references = ("score",)
    metric = "spearman"

    def parse(self, record: Mapping[str, Any], head: Head, *, gold: bool) -> Example:
        """Read `text`, `text_pair` and the number `score`."""
        score = number_column(record, "score") if gold else None
        return Example(text_column(record, "text"), text_column(record, "text_pair"), score)

    def encode(self, tokenizer: TextTokenizer, example: Example) -> list[Encoding]:
        """Encode each sentence alone."""
        return [tokenizer.encode(str(example.text)), tokenizer.encode(str(example.text_pair))]

    def decode(self, example: Example, encodings: Sequence[Encoding], outputs: Sequence[Outputs], head: Head) -> Any:
        """Return `{"similarity": cosine, "embeddings": (2, H) float32 array}`."""
        vectors = np.stack([unit(pool(o["last_hidden_state"], head.pooling)) for o in outputs])
        return {"similarity": float(vectors[0] @ vectors[1]), "embeddings": vectors.astype(np.float32)}

    def targets(self, example: Example, encodings: Sequence[Encoding], head: Head) -> list[dict[str, Any]]:
        """Return `score` for both sentences: the reference score on a scale from 0 to 1, by the head's range."""
        low, high = head.score_range
        score = (float(example.gold) - low) / (high - low)
        return [{"score": score} for _ in encodings]

    def agreements(self, first: Any, second: Any) -> list[float]:
        """Return the cosines between the two models' embeddings of each sentence."""
        return [cosine(a, b) for a, b in zip(first["embeddings"], second["embeddings"], strict=True)]

    def statistics(self, example: Example, answer: Any) -> tuple[float, ...]:
        """Return (similarity, reference score)."""
        return (answer["similarity"], float(example.gold))

    def score(self, statistics: np.ndarray) -> float:
        """Return Spearman's rank correlation, ties averaged; 0 when one side is constant."""
        return spearman(statistics[:, 0], statistics[:, 1])

    def metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return Spearman's and Pearson's correlation."""
        return {"spearman": self.score(statistics), "pearson": pearson(statistics[:, 0], statistics[:, 1])}

    def unlabelled(self, texts: Sequence[str], head: Head) -> list[Example]:
        """Pair each text with the next one."""
        return [Example(a, b) for a, b in zip(texts[::2], texts[1::2], strict=False)]
