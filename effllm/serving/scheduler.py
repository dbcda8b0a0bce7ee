"""Which inputs run next: a queue and a packer, without threads, clocks or models.

Requests share the engine by fair queueing. An input is tagged with the virtual time at which it would start if every
request were served at an equal rate, and the smallest tag runs first (start-time fair queueing: Goyal, Vin and Cheng
1996, section 2). Virtual time grows by the work that is done over the number of requests that share it (Demers, Keshav
and Shenker 1989), so that neither a request of one text waits for somebody's hundred, nor the hundred for ever new
requests of one. A batch goes out whenever one is asked for; nothing waits for company.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

LOOK_AHEAD = 8
"""How many of the inputs that are due next a batch is chosen from. More find closer lengths, and overtake more: with 16
all-MiniLM-L6-v2 in int8 answered up to 4 % more texts, and the slowest hundredth waited a tenth to a fifth longer."""
SAVED = 4
"""What an input saves that runs in a batch instead of alone, in tokens of work: the most padding that may come of it.
On a CPU a run costs 3 to 10 tokens besides its own, and a batch of many is hardly faster per token."""


@dataclass(frozen=True)
class Place:
    """An input that waits: which of a request's inputs, how many tokens it has, and its tag in virtual time."""

    request: int
    index: int
    length: int
    tag: float


class Scheduler:
    """The inputs that wait for one engine.

    A batch holds at most `max_tokens` padded tokens, or one input that is longer, and at most `SAVED` tokens of padding
    for each input after the first. Without `mix` every batch is one input: what it answers cannot depend on its
    neighbours.
    """

    def __init__(self, max_tokens: int, *, mix: bool = True) -> None:
        self._max_tokens = max_tokens
        self._mix = mix
        self._waiting: dict[tuple[int, int], Place] = {}
        self._left: Counter[int] = Counter()
        self._clock = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: int, lengths: Sequence[int]) -> None:
        """Take in the inputs of a request, numbered from 0, by their lengths in tokens. The shortest is due first."""
        tag = self._clock
        for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            self._waiting[request, index] = Place(request, index, lengths[index], tag)
            tag += lengths[index]
        self._left[request] += len(lengths)

    def remove(self, request: int) -> None:
        """Forget the inputs of a request that still wait."""
        for key in [key for key in self._waiting if key[0] == request]:
            del self._waiting[key]
        self._left.pop(request, None)

    def next_batch(self) -> list[Place]:
        """Take out the inputs to run next, empty when none waits.

        The input that is due is always among them; those of the look-ahead whose lengths are nearest to its own fill
        the batch up.
        """
        due = heapq.nsmallest(LOOK_AHEAD if self._mix else 1, self._waiting.values(), key=attrgetter("tag"))
        if not due:
            return []
        batch = self._pack(due[0], due[1:])
        work = sum(place.length for place in batch)
        self._clock = max(self._clock, due[0].tag) + work / len(self._left)
        for place in batch:
            del self._waiting[place.request, place.index]
            self._left[place.request] -= 1
            if not self._left[place.request]:
                del self._left[place.request]
        return batch

    def _pack(self, first: Place, others: Sequence[Place]) -> list[Place]:
        batch, width, tokens = [first], first.length, first.length
        for place in sorted(others, key=lambda p: (abs(p.length - first.length), p.tag)):
            wider, total = max(width, place.length), tokens + place.length
            padded = (len(batch) + 1) * wider
            if padded <= self._max_tokens and padded - total <= SAVED * len(batch):
                batch.append(place)
                width, tokens = wider, total
        return batch
