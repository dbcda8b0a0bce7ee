"""Token classification: one label per word; entities in the schemes IOB2, IOBES and BILOU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effllm.errors import SettingError
from effllm.tasks.task import IGNORED, Example, Head, Outputs, Task, label_index, softmax

if TYPE_CHECKING:
    from effllm.runtime.tokenizer import Encoding, TextTokenizer


STARTS, ENDS = "BSU", "ESLU"
PREFIXES = frozenset(f"{letter}-" for letter in "BIESLU")


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the (type, first, last) word spans of a tag sequence, as the CoNLL evaluation counts them.

    A span starts at `B-X`, at `S-X` and `U-X`, and at any other tag of X whose predecessor is not part of an X; it ends
    at `E-X`, `L-X`, `S-X` and `U-X`, and before the next start, other type or `O`. Tags without a prefix count as one
    span per run of equal tags.
    """
    found = set()
    kind, start, over = "", 0, False
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-") if tag[:2] in PREFIXES else ("I", "-", "" if tag == "O" else tag)
        if kind and (name != kind or over or prefix in STARTS):
            found.add((kind, start, index - 1))
            kind = ""
        if name and not kind:
            kind, start = name, index
        over = prefix in ENDS
    return found


class TokenClassification(Task):
    """Words with tags. A word takes the label of its first token.

    Metric: F1 over exact entity spans (CoNLL); their precision and recall beside it.
    """

    name = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    architectures = ("ForTokenClassification",)
    outputs = ("logits",)
    columns = {"tokens": "the words, a list (or a text)", "tags": "one tag per word"}
    references = ("tags",)
    metric = "f1"

    def parse(self, record: Mapping[str, Any], head: Head, *, gold: bool) -> Example:
        """Read `tokens` (a list of words; a text in `text` is split at white space) and `tags`."""
        words = record.get("tokens", record.get("text"))
        words = words.split() if isinstance(words, str) else words
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise SettingError(f"column 'tokens' must be a list of words (columns: {', '.join(map(str, record))})")
        tags = None
        if gold:
            tags = record.get("tags")
            tags = tags.split() if isinstance(tags, str) else tags
            if not isinstance(tags, list) or len(tags) != len(words):
                raise SettingError(f"column 'tags' must hold one tag per word, {len(words)} in this line")
            tags = tuple(head.labels[label_index(tag, head.labels)] for tag in tags)
        return Example(tuple(words), None, tags)

    def encode(self, tokenizer: TextTokenizer, example: Example) -> list[Encoding]:
        """Encode the words, keeping which token belongs to which word."""
        words = example.text.split() if isinstance(example.text, str) else example.text
        return [tokenizer.encode_words(words)]

    def decode(self, example: Example, encodings: Sequence[Encoding], outputs: Sequence[Outputs], head: Head) -> Any:
        """Return `{"words", "tags", "scores"}`, one of each per word; words cut off by truncation are tagged `O`."""
        words = example.text.split() if isinstance(example.text, str) else list(example.text)
        probabilities = softmax(outputs[0]["logits"])
        tags, scores = ["O"] * len(words), [0.0] * len(words)
        for position, word in reversed(list(enumerate(encodings[0].word_ids))):
            if word is not None:
                best = int(probabilities[position].argmax())
                tags[word], scores[word] = head.labels[best], float(probabilities[position, best])
        return {"words": words, "tags": tags, "scores": scores}

    def targets(self, example: Example, encodings: Sequence[Encoding], head: Head) -> list[dict[str, Any]]:
        """Return `labels`: each word's label index on its first token, -100 on all other tokens."""
        word_ids = encodings[0].word_ids
        labels = np.full(len(word_ids), IGNORED, dtype=np.int64)
        index = {label: i for i, label in enumerate(head.labels)}
        previous = None
        for position, word in enumerate(word_ids):
            if word is not None and word != previous:
                labels[position] = index[example.gold[word]]
            previous = word
        return [{"labels": labels}]

    def agreements(self, first: Any, second: Any) -> list[float]:
        """Return for each word whether the tags are the same; words that were cut off, which score 0, do not count."""
        tagged = zip(first["tags"], second["tags"], first["scores"], strict=True)
        return [float(a == b) for a, b, score in tagged if score]

    def statistics(self, example: Example, answer: Any) -> tuple[float, ...]:
        """Return (spans right, spans predicted, spans in the reference)."""
        predicted, reference = entities(answer["tags"]), entities(example.gold)
        return (float(len(predicted & reference)), float(len(predicted)), float(len(reference)))

    def score(self, statistics: np.ndarray) -> float:
        """Return the micro-averaged F1 over spans."""
        return self.metrics(statistics)["f1"]

    def metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return the micro-averaged F1, precision and recall over spans; 0 where there is nothing to divide by."""
        right, predicted, reference = (float(total) for total in statistics.sum(axis=0))
        return {
            "f1": 2 * right / (predicted + reference) if predicted + reference else 0.0,
            "precision": right / predicted if predicted else 0.0,
            "recall": right / reference if reference else 0.0,
        }
