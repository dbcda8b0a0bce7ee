"""The training losses of the tasks, as sums over their terms.

A loss is a sum and the number of its terms, never a mean: the caller adds up both over all parts of a batch, on all
processes, and divides once, so that the result does not depend on how a batch is split. Padding takes no part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from effllm.tasks.task import IGNORED

Loss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], tuple[Tensor, Tensor]]
"""(outputs by name, targets by name, mask bool (n, S) of real tokens) -> (sum, number of terms), both 0-D."""


def text_classification(
    outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats of `logits` (n, labels) and `labels` int64 (n,); a term per text or pair.

    For a one-output head, the squared error of `logits` (n, 1) and the numbers in `labels`. Where a text has several
    labels, float32 (n, labels) of ones and zeros, the mean over them of the binary cross entropies.
    """
    logits, labels = _wide(outputs["logits"]), targets["labels"]
    if logits.shape[-1] == 1:
        return (logits[:, 0] - labels).square().sum(), _count(labels)
    if labels.ndim == 2:
        per_label = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return per_label.mean(dim=1).sum(), _count(labels)
    return _cross_entropy(logits, labels), _count(labels)


def token_classification(
    outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats of `logits` (n, S, labels) and `labels` int64 (n, S); a term per label that is not -100."""
    labels = targets["labels"]
    return _cross_entropy(_wide(outputs["logits"]).flatten(0, 1), labels.flatten()), (labels != IGNORED).sum()


def question_answering(
    outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean of the cross entropies in nats of the first and the last token of the answer; a term per window.

    `start_logits` and `end_logits` (n, S) over the real tokens of each window, `start` and `end` int64 (n,).
    """
    start, end = (_wide(outputs[f"{side}_logits"]).masked_fill(~mask, -torch.inf) for side in ("start", "end"))
    total = _cross_entropy(start, targets["start"]) + _cross_entropy(end, targets["end"])
    return total / 2, _count(targets["start"])


def sentence_similarity(
    outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared error of the cosine of two sentences and their `score` (n,), 0 to 1; a term per sentence, two a pair.

    `embedding` (n, H) holds the first sentences of all pairs, then the second ones in the same order.
    """
    first, second = _wide(outputs["embedding"]).chunk(2)
    cosine = functional.cosine_similarity(first, second)
    return (torch.cat([cosine, cosine]) - targets["score"]).square().sum(), _count(targets["score"])


LOSSES: dict[str, Loss] = {
    "text-classification": text_classification,
    "token-classification": token_classification,
    "question-answering": question_answering,
    "sentence-similarity": sentence_similarity,
}
"""Task -> its loss; a task that is not here is not fine-tuned."""


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _wide(values: Tensor) -> Tensor:
    """Return values as float32 where they have fewer bits."""
    return values.float() if values.dtype in {torch.bfloat16, torch.float16} else values


def _count(targets: Tensor) -> Tensor:
    return torch.tensor(len(targets), device=targets.device)
