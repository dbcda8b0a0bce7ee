"""One run at a time writes into a folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from effllm.errors import SettingError

T = TypeVar("T")


class Lock:
    """What keeps other processes of this machine from running into a folder, until it is closed or forgotten."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Give it back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def take(folder: Path) -> Lock | None:
    """Return the lock of a folder that a run writes into.

    It is one of a file among the temporary ones; the system frees it when the process ends, however it ends, and a
    child does not inherit it. None for the other processes of a launch, and where there can be no such file. Raises
    SettingError where another process has it.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    name = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    file = Path(tempfile.gettempdir()) / f"effllm-{os.getuid()}-{name}.lock"
    try:
        lock = Lock(descriptor := os.open(file, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise SettingError(f"another process is training into {folder}; wait for it, or choose another --out") from None
    return lock


def holding(lock: Lock | None, records: Iterator[T]) -> Iterator[T]:
    """Yield from the records of a run, and give its lock back at their end."""
    try:
        yield from records
    finally:
        if lock:
            lock.close()
