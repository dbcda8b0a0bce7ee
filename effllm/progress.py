"""How long work reports itself: the library hands its iterables to a `Track`, the command line draws them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Wraps an iterable of known length under a name; yields the same items."""

    def __call__(self, items: Iterable[T], name: str, total: int) -> Iterable[T]:
        """Return the items, reporting as they are taken."""


def silent(items: Iterable[T], name: str, total: int) -> Iterable[T]:
    """Report nothing."""
    return items
