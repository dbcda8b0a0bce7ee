"""How long work reports itself: the library hands its iterables to a `Track`, the command line draws them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")
SURE_S, SURE = 20.0, 0.05
"""How long work is watched before it is said when it will end, and what share of its time that may be wrong by."""


class Track(Protocol):
    """Wraps an iterable of known length under a name; yields the same items."""

    def __call__(self, items: Iterable[T], name: str, total: int) -> Iterable[T]:
        """Return the items, reporting as they are taken."""


def silent(items: Iterable[T], name: str, total: int) -> Iterable[T]:
    """Report nothing."""
    return items


class OutOfTime(Exception):
    """Work that was bounded would end too late; says which, and by how much. For whoever bounded it, not for users.

    `needed_s` is how long all of it would take.
    """

    def __init__(self, message: str, needed_s: float) -> None:
        super().__init__(message)
        self.needed_s = needed_s


def bounded(track: Track, until: float, kind: str) -> Track:
    """Return a track under which work whose name begins with `kind` raises OutOfTime once it is sure to be late.

    That is when, `SURE_S` after its first item, it would end after `until`, on the monotonic clock in seconds, by more
    than `SURE` of all its time. What comes before the first item does not count for the rest.
    """

    def watched(items: Iterable[T], name: str, total: int) -> Iterator[T]:
        first = 0.0
        for done, item in enumerate(track(items, name, total)):
            now = time.monotonic()
            first = first or now
            each = (now - first) / max(1, done)
            late = now + (total - done - 1) * each - until
            if now - first > SURE_S and late > SURE * total * each:
                needed = total * each
                message = f"{name} would take {needed / 60:.1f} minutes, {late / 60:.1f} minutes too long"
                raise OutOfTime(message, needed)
            yield item

    return lambda items, name, total: (watched if name.startswith(kind) else track)(items, name, total)
