"""Text files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".part"
"""What the name of a file ends in that is not whole yet."""


def write_whole(file: Path, text: str) -> None:
    """Write a text as UTF-8 beside `file`, to the disk, and put it in its place. Raises OSError."""
    partial = file.with_name(f"{file.name}{PARTIAL}")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
