"""Extractive question answering: the span of a passage that answers a question (SQuAD 1.1)."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effllm.errors import SettingError
from effllm.tasks.task import Example, Head, Outputs, Task, text_column

if TYPE_CHECKING:
    from effllm.runtime.tokenizer import Encoding, TextTokenizer

MAX_WINDOW = 384
STRIDE = 128
MAX_ANSWER_TOKENS = 30
N_BEST = 20


def normalise_answer(text: str) -> list[str]:
    """Return the words of an answer as SQuAD 1.1 compares them: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def answer_f1(prediction: str, reference: str) -> float:
    """Return the F1 over the words of two answers (Rajpurkar et al. 2016, section 6.1)."""
    predicted, expected = normalise_answer(prediction), normalise_answer(reference)
    common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def best_span(start: np.ndarray, end: np.ndarray, allowed: Sequence[int]) -> tuple[float, int, int] | None:
    """Return the (score, first, last) token span with the highest sum of start and end logits.

    Considers the 20 best starts and ends among `allowed` tokens and spans of at most 30 tokens; None when no token is
    allowed.
    """
    places = np.asarray(allowed)
    if not len(places):
        return None
    starts = places[np.argsort(-start[places], kind="stable")[:N_BEST]]
    ends = places[np.argsort(-end[places], kind="stable")[:N_BEST]]
    spans = [(float(start[s] + end[e]), int(s), int(e)) for s in starts for e in ends if s <= e < s + MAX_ANSWER_TOKENS]
    best = int(places[np.argmax(start[places])])
    return max(spans, key=lambda span: (span[0], -span[1]), default=(float(start[best] + end[best]), best, best))


class QuestionAnswering(Task):
    """Questions over passages; long passages are read in overlapping windows. Metric: SQuAD's F1."""

    name = "question-answering"
    auto_class = "AutoModelForQuestionAnswering"
    architectures = ("ForQuestionAnswering",)
    outputs = ("start_logits", "end_logits")
    columns = {"question": "the question", "context": "the passage", "answers": "reference answers with their `text`"}
    metric = "f1"

    def parse(self, record: Mapping[str, Any], head: Head, *, gold: bool) -> Example:
        """Read `question`, `context` and `answers` (a list of `{"text": …}`, or SQuAD's `{"text": […]}`)."""
        texts: Any = None
        if gold:
            answers = record.get("answers")
            texts = answers.get("text") if isinstance(answers, dict) else answers
            texts = [a.get("text") if isinstance(a, dict) else a for a in texts] if isinstance(texts, list) else None
            if not texts or not all(isinstance(text, str) for text in texts):
                raise SettingError(f"column 'answers' must list the reference answers, got {answers!r}")
            texts = tuple(texts)
        return Example(text_column(record, "question"), text_column(record, "context"), texts)

    def encode(self, tokenizer: TextTokenizer, example: Example) -> list[Encoding]:
        """Encode the pair as windows of at most 384 tokens that overlap by 128 tokens of the passage."""
        length = min(MAX_WINDOW, tokenizer.max_length)
        return tokenizer.encode_windows(str(example.text), str(example.text_pair), length, min(STRIDE, length // 3))

    def decode(self, example: Example, encodings: Sequence[Encoding], outputs: Sequence[Outputs], head: Head) -> Any:
        """Return `{"answer", "score", "start", "end"}` with character offsets into the passage."""
        passage = str(example.text_pair)
        best: tuple[float, int, int] = (-np.inf, 0, 0)
        for encoding, output in zip(encodings, outputs, strict=True):
            allowed = [i for i, part in enumerate(encoding.sequence_ids) if part == 1]
            span = best_span(output["start_logits"], output["end_logits"], allowed)
            if span is not None and span[0] > best[0]:
                best = (span[0], encoding.offsets[span[1]][0], encoding.offsets[span[2]][1])
        score = best[0] if np.isfinite(best[0]) else 0.0
        return {"answer": passage[best[1] : best[2]], "score": score, "start": best[1], "end": best[2]}

    def agreement(self, example: Example, first: Any, second: Any) -> tuple[float, float]:
        """Return whether the answers are the same span."""
        return float((first["start"], first["end"]) == (second["start"], second["end"])), 1.0

    def statistics(self, example: Example, answer: Any) -> tuple[float, ...]:
        """Return (best F1 over the reference answers, 1)."""
        return (max(answer_f1(answer["answer"], reference) for reference in example.gold), 1.0)

    def unlabelled(self, texts: Sequence[str], head: Head) -> list[Example]:
        """Ask the first words of each text of the text itself."""
        return [Example(" ".join(text.split()[:8]), text) for text in texts]
