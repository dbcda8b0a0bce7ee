"""Text generation: how well a decoder predicts the next token of given texts. effllm measures it and writes no text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effllm.tasks.task import Example, Head, Outputs, Task, text_column

if TYPE_CHECKING:
    from effllm.runtime.tokenizer import Encoding, TextTokenizer

WINDOW = 2048
"""The most tokens that a model sees at once: the context at which the papers on pruning and GPTQ measure perplexity."""
LARGEST_LOSS = 700.0
"""The loss at which perplexity stops growing, so that it stays a number."""


class TextGeneration(Task):
    """Causal language models. Any text is its own reference.

    Perplexity is exp(-Σ ln p / N). The sum is over all N predicted tokens of all texts, each weighing the same; p is
    what the model gives to a token after those before it in its window. A text is cut into windows of as many tokens
    as the model takes, at most 2048; each begins with the last token of the one before, as context alone, so that
    every token of a text but its first is predicted exactly once. Special tokens that the tokenizer puts around a text
    belong to it: with a token for its beginning, all of its own are predicted.
    """

    name = "text-generation"
    auto_class = "AutoModelForCausalLM"
    architectures = ("ForCausalLM",)
    causal = True
    outputs = ("logits",)
    compared = ("log_likelihood",)
    columns = {"text": "the text, which is its own reference"}
    metric = "perplexity"
    lower_is_better = True

    def parse(self, record: Mapping[str, Any], head: Head, *, gold: bool) -> Example:
        """Read `text`; its reference answer is the text itself."""
        return Example(text_column(record, "text"), gold=True if gold else None)

    def encode(self, tokenizer: TextTokenizer, example: Example) -> list[Encoding]:
        """Cut the text into windows; none when it has no tokens."""
        return tokenizer.encode_all(str(example.text), min(tokenizer.max_length, WINDOW))

    def condense(self, encoding: Encoding, outputs: Outputs) -> Outputs:
        """Return of logits (T, V), for each token but the first, what was `predicted` for it and its `log_likelihood`.

        Both are (T - 1,), int64 and float64.
        """
        logits = outputs["logits"][:-1]
        largest = logits.max(axis=-1, initial=-np.inf)
        total = np.exp(logits - largest[:, None]).sum(axis=-1, dtype=np.float64)
        true = np.take_along_axis(logits, np.asarray(encoding.ids[1:], dtype=np.int64)[:, None], axis=-1)[:, 0]
        return {
            "predicted": logits.argmax(axis=-1),
            "log_likelihood": (true.astype(np.float64) - largest) - np.log(total),
        }

    def decode(self, example: Example, encodings: Sequence[Encoding], outputs: Sequence[Outputs], head: Head) -> Any:
        """Return `perplexity`, `log_likelihood`, summed over the number of `tokens`, and the ids that were `predicted`.

        A text without a predicted token has perplexity 1.
        """
        likelihood = float(sum(o["log_likelihood"].sum() for o in outputs))
        predicted = [int(token) for o in outputs for token in o["predicted"]]
        perplexity = self.score(np.array([[-likelihood, len(predicted)]]))
        return {
            "perplexity": perplexity,
            "log_likelihood": likelihood,
            "tokens": len(predicted),
            "predicted": predicted,
        }

    def agreements(self, first: Any, second: Any) -> list[float]:
        """Return for each predicted token whether the same one was the likeliest."""
        return [float(a == b) for a, b in zip(first["predicted"], second["predicted"], strict=True)]

    def statistics(self, example: Example, answer: Any) -> tuple[float, ...]:
        """Return (negative log-likelihood, predicted tokens)."""
        return -answer["log_likelihood"], float(answer["tokens"])

    def score(self, statistics: np.ndarray) -> float:
        """Return the perplexity, at most exp(700)."""
        return math.exp(min(super().score(statistics), LARGEST_LOSS))

    def metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return the perplexity and the mean loss per predicted token, in nats."""
        return {self.metric: self.score(statistics), "loss": super().score(statistics)}
