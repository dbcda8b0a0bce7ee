"""Extractive question answering: the span of a passage that answers a question (SQuAD 1.1)."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from effllm.errors import SettingError
from effllm.tasks.task import Example, Head, Outputs, Task, text_column

if TYPE_CHECKING:
    from effllm.runtime.tokenizer import Encoding, TextTokenizer

MAX_WINDOW = 384
STRIDE = 128
MAX_ANSWER_TOKENS = 30
CANDIDATES = 20
N_BEST = 5


def normalise_answer(text: str) -> list[str]:
    """Return the words of an answer as SQuAD 1.1 compares them: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def answer_f1(prediction: str, reference: str) -> float:
    """Return the F1 over the words of two answers (Rajpurkar et al. 2016, section 6.1)."""
    predicted, expected = normalise_answer(prediction), normalise_answer(reference)
    common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 where two answers are the same words (Rajpurkar et al. 2016, section 6.1), else 0."""
    return float(normalise_answer(prediction) == normalise_answer(reference))


def best_spans(start: np.ndarray, end: np.ndarray, allowed: Sequence[int]) -> list[tuple[float, int, int]]:
    """Return (score, first, last) token spans, best first; the score is the sum of the start and the end logit.

    Considers the 20 best starts and ends among `allowed` tokens and spans of at most 30 tokens; where none of these is
    a span, the token with the best start. Empty when no token is allowed.
    """
    places = np.asarray(allowed)
    if not len(places):
        return []
    starts = places[np.argsort(-start[places], kind="stable")[:CANDIDATES]]
    ends = places[np.argsort(-end[places], kind="stable")[:CANDIDATES]]
    spans = [(float(start[s] + end[e]), int(s), int(e)) for s in starts for e in ends if s <= e < s + MAX_ANSWER_TOKENS]
    best = int(starts[0])
    spans = spans or [(float(start[best] + end[best]), best, best)]
    return sorted(spans, key=lambda span: (-span[0], span[1], span[2]))


class Reference(NamedTuple):
    """A reference answer, and where in the passage it starts (a character offset) if the record says so."""

    text: str
    start: int | None


def read_references(answers: Any) -> tuple[Reference, ...]:
    """Read the column `answers`: texts, or objects with `text` and perhaps `answer_start`, or SQuAD's object of lists.

    Raises SettingError when it holds no answer, or something else.
    """
    items: Any = answers
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        texts = texts if isinstance(texts, list) else []
        starts = starts if isinstance(starts, list) and len(starts) == len(texts) else [None] * len(texts)
        items = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
    items = items if isinstance(items, list) else []
    pairs: list[Any] = [(i.get("text"), i.get("answer_start")) if isinstance(i, dict) else (i, None) for i in items]
    if not pairs or not all(isinstance(text, str) for text, _ in pairs):
        raise SettingError(f"column 'answers' must list the reference answers, got {answers!r}")
    if not all(start is None or (isinstance(start, int) and start >= 0) for _, start in pairs):
        raise SettingError(f"column 'answers': answer_start must be a character offset, got {answers!r}")
    return tuple(Reference(text, start) for text, start in pairs)


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the characters start…end without the white space around them, which some tokenizers keep with a word."""
    part = text[start:end]
    first = start + len(part) - len(part.lstrip())
    return first, first + len(part.strip())


def answer_tokens(encoding: Encoding, start: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token that hold the passage's characters start…end, end excluded.

    None when a window does not hold all of them.
    """
    tokens = [i for i, part in enumerate(encoding.sequence_ids) if part == 1]
    if not tokens or encoding.offsets[tokens[0]][0] > start or encoding.offsets[tokens[-1]][1] < end:
        return None
    inside = [i for i in tokens if encoding.offsets[i][0] < end and encoding.offsets[i][1] > start]
    return (inside[0], inside[-1]) if inside else None


def answer_characters(passage: str, reference: Reference) -> tuple[int, int]:
    """Return where a passage holds a reference answer, white space around it left out: characters start…end.

    Raises SettingError when it is not where its record says, or nowhere.
    """
    text = reference.text.strip()
    near = reference.start if reference.start is not None else passage.find(text)
    start = passage.find(text, near, near + len(reference.text)) if text and near >= 0 else -1
    if start < 0:
        where = "in" if reference.start is None else f"at character {reference.start} of"
        raise SettingError(f"the answer {reference.text!r} is not {where} the passage {passage[:60]!r}…")
    return start, start + len(text)


class QuestionAnswering(Task):
    """Questions over passages; long passages are read in overlapping windows.

    Metric: SQuAD's F1, with exact match beside it; each the best over the reference answers.
    """

    name = "question-answering"
    pairs = "must"
    auto_class = "AutoModelForQuestionAnswering"
    architectures = ("ForQuestionAnswering",)
    outputs = ("start_logits", "end_logits")
    columns = {"question": "the question", "context": "the passage", "answers": "reference answers with their `text`"}
    references = ("answers",)
    metric = "f1"

    def parse(self, record: Mapping[str, Any], head: Head, *, gold: bool) -> Example:
        """Read `question`, `context` and `answers` (a list of `{"text": …}`, or SQuAD's `{"text": […]}`)."""
        references = read_references(record.get("answers")) if gold else None
        return Example(text_column(record, "question"), text_column(record, "context"), references)

    def encode(self, tokenizer: TextTokenizer, example: Example) -> list[Encoding]:
        """Encode the pair as windows of at most 384 tokens that overlap by 128 tokens of the passage."""
        length = min(MAX_WINDOW, tokenizer.max_length)
        return tokenizer.encode_windows(str(example.text), str(example.text_pair), length, min(STRIDE, length // 3))

    def decode(self, example: Example, encodings: Sequence[Encoding], outputs: Sequence[Outputs], head: Head) -> Any:
        """Return `{"answer", "score", "start", "end", "n_best"}` with character offsets into the passage.

        The answer is the best one over all windows; `n_best` lists the five best of different extent, itself first,
        as `{"answer", "score", "start", "end"}`.
        """
        passage = str(example.text_pair)
        scores: dict[tuple[int, int], float] = {}
        for encoding, output in zip(encodings, outputs, strict=True):
            allowed = [i for i, part in enumerate(encoding.sequence_ids) if part == 1]
            for score, first, last in best_spans(output["start_logits"], output["end_logits"], allowed):
                span = trimmed(passage, encoding.offsets[first][0], encoding.offsets[last][1])
                scores[span] = max(score, scores.get(span, -np.inf))
        ranked = sorted(scores, key=lambda span: (-scores[span], span))[:N_BEST]
        n_best = [{"answer": passage[s:e], "score": scores[s, e], "start": s, "end": e} for s, e in ranked]
        best = n_best[0] if n_best else {"answer": "", "score": 0.0, "start": 0, "end": 0}
        return {**best, "n_best": n_best}

    def targets(self, example: Example, encodings: Sequence[Encoding], head: Head) -> list[dict[str, Any]]:
        """Return `start` and `end`, the token places of the first reference answer, for each window.

        Both are 0, the place of [CLS], for a window that does not hold the whole answer (Devlin et al. 2019, section
        4.3). A reference answer without `answer_start` is looked for in the passage.
        """
        start, end = answer_characters(str(example.text_pair), example.gold[0])
        spans = [answer_tokens(encoding, start, end) or (0, 0) for encoding in encodings]
        return [{"start": first, "end": last} for first, last in spans]

    def agreements(self, first: Any, second: Any) -> list[float]:
        """Return whether the answers are the same span."""
        return [float((first["start"], first["end"]) == (second["start"], second["end"]))]

    def statistics(self, example: Example, answer: Any) -> tuple[float, ...]:
        """Return (best F1 over the reference answers, 1, whether one is matched exactly)."""
        found, references = answer["answer"], [reference.text for reference in example.gold]
        return (max(answer_f1(found, r) for r in references), 1.0, max(exact_match(found, r) for r in references))

    def metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return the mean F1 and the share of exact matches."""
        return {"f1": self.score(statistics), "exact match": float(statistics[:, 2].mean())}

    def unlabelled(self, texts: Sequence[str], head: Head) -> list[Example]:
        """Ask the first words of each text of the text itself."""
        return [Example(" ".join(text.split()[:8]), text) for text in texts]
