"""Keeping calibration and evaluation apart: by the text itself, not by its file."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from effllm.tasks import Example


def fingerprint(example: Example) -> str:
    """Return a digest of an example's texts, case and white space aside."""
    first = example.text if isinstance(example.text, str) else " ".join(example.text)
    text = "\x1f".join(" ".join(part.casefold().split()) for part in (first, example.text_pair or ""))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest(examples: Sequence[Example]) -> str:
    """Return one digest for a set of examples, whatever their order; manifests record it."""
    return hashlib.sha256("".join(sorted({fingerprint(e) for e in examples})).encode()).hexdigest()


def labelled_digest(examples: Sequence[Example]) -> str:
    """Return one digest of examples as they stand, with their reference answers and in their order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(repr(example).encode() + b"\n")
    return found.hexdigest()


def without(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """Return the examples whose texts do not occur in `others`."""
    known = {fingerprint(e) for e in others}
    return [e for e in examples if fingerprint(e) not in known]


def distinct(examples: Sequence[Example]) -> list[Example]:
    """Return the examples, of those with the same texts the last at the place of the first."""
    return list({fingerprint(e): e for e in examples}.values())


def sample(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Return at most `count` distinct examples, chosen by the seed and kept in their order."""
    pool = distinct(examples)
    chosen = sorted(random.Random(seed).sample(range(len(pool)), min(count, len(pool))))
    return [pool[i] for i in chosen]
