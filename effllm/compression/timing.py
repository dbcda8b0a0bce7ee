"""How long models take beside each other, in one process: for choosing between them, not for publishing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from effllm.measure.clock import time_interleaved
from effllm.progress import Track
from effllm.runtime.predictor import Predictor
from effllm.runtime.tokenizer import pad_batch
from effllm.tasks import Example

ROUNDS = 21


def trial_times(
    predictors: Mapping[str, Predictor], examples: Sequence[Example], track: Track
) -> dict[str, list[float]]:
    """Time one batch-1 and one batch-8 pass of a text of median length, in milliseconds, interleaved."""
    first = next(iter(predictors.values()))
    encodings = sorted((e for group in first.encode(examples[:200]) for e in group), key=len)
    middle = encodings[len(encodings) // 2]
    feeds = [pad_batch([middle], 0), pad_batch([middle] * 8, 0)]

    def call(predictor: Predictor) -> None:
        for feed in feeds:
            predictor.engine.run(feed)

    calls: dict[str, Callable[[], None]] = {name: partial(call, p) for name, p in predictors.items()}
    return time_interleaved(calls, ROUNDS, track)
