"""Answers in the form that the Hugging Face Inference API gives them, from what a task's `decode` returns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from effllm.serving.refusals import BadInput
from effllm.tasks import Example
from effllm.tasks.fill_mask import MASK
from effllm.tasks.token_classification import entities

MASKS = re.compile(r"\[MASK\]|<mask>")
"""A masked place, however the model writes it."""
HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_RUN = rf"(?:(?![{HAN}])\w)+"
WORDS = re.compile(rf"[{HAN}]|{_RUN}(?:(?:[.'’&-]|(?<=\d),(?=\d)){_RUN})*|[^\w\s]+")
"""Words, and the punctuation around them apart, as the data of entity taggers have them. What joins the parts of a word
(`Jean-Luc`, `U.S`, `3,000`) stays in it; a Chinese character is a word."""


def sigmoid(x: float) -> float:
    """Return the logistic function without overflow."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


def classes(value: Mapping[str, Any], labels: Sequence[str], *, raw: bool) -> list[dict[str, Any]]:
    """Return `{"score", "label"}` per label, best first.

    `raw` asks for the model's outputs themselves; else they are probabilities, for a one-output head its sigmoid.
    """
    if "scores" not in value:
        return [{"score": value["score"] if raw else sigmoid(value["score"]), "label": value["label"]}]
    if not raw:
        return [{"score": score, "label": label} for label, score in value["scores"].items()]
    pairs = sorted(zip(labels, value["logits"], strict=True), key=lambda pair: -pair[1])
    return [{"score": score, "label": label} for label, score in pairs]


def words_of(text: str) -> Example:
    """Return the words of a text as a token classifier takes them."""
    return Example(tuple(WORDS.findall(text)))


def entity_groups(value: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
    """Return the entities `{"entity_group", "score", "word", "start", "end"}`; `text[start:end]` is the word.

    The score is the mean over the words of the entity.
    """
    spans = [match.span() for match in WORDS.finditer(text)]
    groups = []
    for kind, first, last in sorted(entities(value["tags"]), key=lambda entity: entity[1]):
        scores = value["scores"][first : last + 1]
        start, end = spans[first][0], spans[last][1]
        mean = sum(scores) / len(scores)
        groups.append({"entity_group": kind, "score": mean, "word": text[start:end], "start": start, "end": end})
    return groups


def masked_text(text: str) -> str:
    """Return a text whose masked places are written as the fill-mask task writes them."""
    return MASKS.sub(MASK, text)


def fillings(value: Mapping[str, Any], text: str, index: int = 0) -> list[Any]:
    """Return `{"score", "token", "token_str", "sequence"}` for the best words; a list of those per mask if several.

    Raises BadInput, for the input of that index, where a mask was cut off with the end of its text.
    """
    places = [match.span() for match in MASKS.finditer(text)]
    if len(value["masks"]) < len(places):
        raise BadInput("a [MASK] stands beyond the tokens that the model takes", index)
    masks = []
    for (start, end), mask in zip(places, value["masks"], strict=True):
        masks.append(
            [
                {
                    "score": one["score"],
                    "token": one["id"],
                    "token_str": one["token"],
                    "sequence": text[:start] + one["token"] + text[end:],
                }
                for one in mask["candidates"]
            ]
        )
    return masks[0] if len(masks) == 1 else masks


def span_answer(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"answer", "score", "start", "end"}`; the score is the answer's share among its best five spans."""
    best = [one["score"] for one in value["n_best"]]
    share = 1 / sum(math.exp(score - best[0]) for score in best) if best else 0.0
    return {"answer": value["answer"], "score": share, "start": value["start"], "end": value["end"]}
