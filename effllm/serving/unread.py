"""The answers that clients have not read yet, which are held in memory until they have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from effllm.serving.refusals import QueueFull

PART = 65536
"""The bytes of an answer that are sent at once; one of no more goes out whatever is held."""
RETRY_S = 1.0


class Unread:
    """How many bytes of large answers are held, and how many may be."""

    def __init__(self, most: int) -> None:
        self.held = 0
        self._most = most

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count an answer of `size` bytes while the block sends it.

        Raises QueueFull where others that are held leave it no room; one that is alone may be larger than that.
        """
        if size <= PART:
            yield
            return
        if self.held and self.held + size > self._most:
            raise QueueFull(f"{self.held} bytes of answers are not read yet, and this one has {size}", RETRY_S)
        self.held += size
        try:
            yield
        finally:
            self.held -= size
