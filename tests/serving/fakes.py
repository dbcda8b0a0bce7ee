"""Models that answer by rule, to test what stands before them: canned answers, delays and refusals on demand."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from effllm.serving.refusals import QueueFull, UnknownModel, WrongTask
from effllm.serving.served import POOLED, TOKEN_STATES, Answers, ModelInfo, Result, TokenPiece
from effllm.tasks import Example
from effllm.tasks.feature_extraction import pool, unit

SIZE = 8
LIMIT = 64
LABELS = {
    "text-classification": ("negative", "positive", "neutral"),
    "token-classification": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
}


def numbers(text: str, count: int) -> np.ndarray:
    """Numbers that a text always has, float32 (count,)."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


class FakeModel:
    """A model of one task. `delay` seconds pass before an answer; `refusal` is raised instead of one."""

    def __init__(self, name: str, task: str, labels: tuple[str, ...] | None = None) -> None:
        labels = LABELS.get(task, ()) if labels is None else labels
        self.info = ModelInfo(name, task, labels, LIMIT, False, 1000, SIZE, "mean", "onnxruntime", {})
        self.ready = True
        self.queued = 0
        self.full: QueueFull | None = None
        self.delay = 0.0
        self.refusal: Exception | None = None
        self.asked: list[tuple[list[Example], str, bool, float | None]] = []
        self.cancelled = 0

    async def answer(
        self, examples: Sequence[Example], *, task: str = "", truncate: bool = True, deadline_s: float | None = None
    ) -> Answers:
        self.asked.append((list(examples), task, truncate, deadline_s))
        self.queued += len(examples)
        try:
            if self.delay:
                await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += len(examples)
            raise
        finally:
            self.queued -= len(examples)
        if self.refusal is not None:
            raise self.refusal
        return Answers([self._result(example, task or self.info.task) for example in examples], 0.001, 0.002, 0.003)

    def _result(self, example: Example, task: str) -> Result:
        text = example.text if isinstance(example.text, str) else " ".join(example.text)
        words = text.split() + (example.text_pair or "").split()
        tokens = min(LIMIT, len(words) + 2)
        return Result(self._value(example, text, task, tokens), tokens, len(words) + 2 - tokens)

    def _value(self, example: Example, text: str, task: str, tokens: int):
        states = numbers(text, tokens * SIZE).reshape(tokens, SIZE)
        if task == TOKEN_STATES:
            return states
        if task == POOLED:
            return pool(states, "mean")
        if task in {"feature-extraction", "sentence-similarity"}:
            return unit(pool(states, "mean")).astype(np.float32)
        if task == "text-classification":
            return self._classes(text + (example.text_pair or ""))
        if task == "token-classification":
            assert isinstance(example.text, tuple)
            tags = ["B-PER" if word == "Ada" else "I-LOC" if word[:1].isupper() else "O" for word in example.text]
            return {
                "words": list(example.text),
                "tags": tags,
                "scores": [0.5 + 0.5 / (i + 1) for i in range(len(tags))],
            }
        if task == "fill-mask":
            best = [{"token": word, "id": i, "score": 0.5 / (i + 1)} for i, word in enumerate(("fox", "dog", "cat"))]
            return {"masks": [{"candidates": best, "id": 0, "true_id": None}] * text.count("[MASK]")}
        passage = str(example.text_pair)
        best = [{"answer": passage[:4], "score": 2.0 - i, "start": 0, "end": len(passage[:4])} for i in range(2)]
        return {**best[0], "n_best": best}

    def _classes(self, text: str):
        logits = numbers(text, len(self.info.labels))
        if len(logits) == 1:
            return {"label": self.info.labels[0], "score": float(logits[0]), "index": 0}
        scores = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
        named = {self.info.labels[i]: float(scores[i]) for i in np.argsort(-scores)}
        best = next(iter(named))
        return {"label": best, "score": named[best], "index": 0, "scores": named, "logits": logits.tolist()}

    async def tokenise(self, texts: Sequence[str]) -> list[list[TokenPiece]]:
        return [
            [
                TokenPiece(1, "[CLS]", True, 0, 0),
                *(
                    TokenPiece(i + 5, w, False, text.index(w), text.index(w) + len(w))
                    for i, w in enumerate(text.split())
                ),
                TokenPiece(2, "[SEP]", True, 0, 0),
            ]
            for text in texts
        ]


class FakeModels:
    """Some models by name."""

    def __init__(self, *models: FakeModel) -> None:
        self.models: Mapping[str, FakeModel] = {model.info.name: model for model in models}
        self.draining = False
        self.reloads: list[str | None] = []
        self.reload_error: Exception | None = None
        self.closed = False
        self.waits = True

    @property
    def ready(self) -> bool:
        return not self.draining and all(model.ready for model in self.models.values())

    def find(self, name: str | None, *tasks: str) -> FakeModel:
        if name is not None:
            if name not in self.models:
                raise UnknownModel(f"no model {name[:100]!r} is served")
            model = self.models[name]
            if model.info.task not in tasks:
                raise WrongTask(f"{name} answers {model.info.task}")
            return model
        found = next((model for model in self.models.values() if model.info.task in tasks), None)
        if found is None:
            raise WrongTask(f"no model answers {' or '.join(tasks)}")
        return found

    async def reload(self, name: str | None = None) -> list[str]:
        self.reloads.append(name)
        if name is not None and name not in self.models:
            raise UnknownModel(f"no model {name!r}")
        if self.reload_error is not None:
            raise self.reload_error
        return [name] if name else list(self.models)

    async def close(self) -> None:
        self.draining = self.closed = True

    def stop_waiting(self) -> None:
        self.waits = False


def every_task() -> FakeModels:
    """One model of each task, a second embedder, and a reranker."""
    return FakeModels(
        FakeModel("minilm", "feature-extraction"),
        FakeModel("films", "text-classification"),
        FakeModel("rank", "text-classification", ("score",)),
        FakeModel("names", "token-classification"),
        FakeModel("masks", "fill-mask"),
        FakeModel("squad", "question-answering"),
        FakeModel("other", "feature-extraction"),
    )
