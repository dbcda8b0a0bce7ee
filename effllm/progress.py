"""How long work reports itself: the library hands its iterables to a `Track`, the command line draws them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")
SURE_S = 20.0
"""How long work is watched before it is said when it will end."""


class Track(Protocol):
    """Wraps an iterable of known length under a name; yields the same items."""

    def __call__(self, items: Iterable[T], name: str, total: int) -> Iterable[T]:
        """Return the items, reporting as they are taken."""


def silent(items: Iterable[T], name: str, total: int) -> Iterable[T]:
    """Report nothing."""
    return items


class OutOfTime(Exception):
    """Work that was bounded would end too late; says which, and by how much. For whoever bounded it, not for users."""


def bounded(track: Track, until: float) -> Track:
    """Return a track whose work raises OutOfTime as soon as it shows that it will end after `until`.

    `until` is on the monotonic clock, in seconds. Work that takes `SURE_S` or less is let through.
    """

    def watched(items: Iterable[T], name: str, total: int) -> Iterator[T]:
        started = time.monotonic()
        for done, item in enumerate(track(items, name, total)):
            spent = time.monotonic() - started
            whole = spent * total / max(1, done)
            late = started + whole - until
            if spent > SURE_S and late > 0:
                raise OutOfTime(f"{name} would take {whole / 60:.1f} minutes, {late / 60:.1f} minutes too long")
            yield item

    return watched
