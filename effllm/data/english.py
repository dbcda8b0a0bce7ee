"""English text that every CPython carries: the language reference's topics, as sentences.

It serves where the user gives no text of their own: to calibrate, and to measure agreement with the dense model. It is
technical prose, more than 2,000 sentences; text of the user's own domain is better.
"""

from __future__ import annotations

import re
from pydoc_data.topics import topics


def english_sentences() -> list[str]:
    """Return the distinct sentences of 6 to 60 words, in a fixed order."""
    found: dict[str, None] = {}
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            if _is_prose(paragraph):
                text = re.sub(r"[*`]+|\s+", " ", paragraph)
                for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", re.sub(r" +", " ", text).strip()):
                    if 6 <= len(sentence.split()) <= 60:
                        found[sentence] = None
    return list(found)


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return "::=" not in paragraph and ">>>" not in paragraph and letters > 0.85 * len(paragraph)
