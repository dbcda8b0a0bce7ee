"""The token store: a corpus as token ids on disk, memory-mapped, so that any place is reached at once.

    DIR/effllm.json         what it is made of, the report, the digest of every file
    DIR/tokenizer/          the tokenizer, as transformers reads it
    DIR/train/, DIR/dev/    tokens.bin (uint16 or uint32), starts.bin (uint8), documents.bin (int64)

All numbers are little-endian.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effllm.errors import ArtifactError, unknown_name
from effllm.variant import read_manifest

KIND = "tokens"
SPLITS = ("train", "dev")
TOKENIZER = "tokenizer"
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
TOKENS, STARTS, DOCUMENTS = "tokens.bin", "starts.bin", "documents.bin"


@dataclass(frozen=True)
class TokenStore:
    """One split of a store of `N` tokens in `D` documents.

    `tokens` (N,) are ids without special tokens, uint16 or uint32; `starts` (N,), uint8, is 1 where a token begins a
    word; `offsets` (D + 1,), int64, says where each document begins. `fingerprint` changes with the content of the
    split and with the tokenizer.
    """

    folder: Path
    split: str
    tokens: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    fingerprint: str

    @classmethod
    def open(cls, folder: Path | str, split: str = "train") -> TokenStore:
        """Map a split of a folder that `effllm prepare` wrote.

        File sizes are checked, digests are not: that would read all of it (`Variant.open` does). Raises ArtifactError
        for a folder of another kind and for a missing or truncated file, SettingError for an unknown split.
        """
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        path = Path(folder)
        manifest = read_manifest(path)
        entry = manifest.get("store")
        dtype = DTYPES.get(str(entry.get("dtype"))) if isinstance(entry, dict) else None
        if manifest.get("kind") != KIND or dtype is None:
            raise ArtifactError(f"{path} is not a token store; make one with: effllm prepare FILE… --out {path.name}")
        tokens = _map(path, f"{split}/{TOKENS}", manifest["files"], dtype)
        starts = _map(path, f"{split}/{STARTS}", manifest["files"], np.dtype(np.uint8))
        offsets = _map(path, f"{split}/{DOCUMENTS}", manifest["files"], np.dtype("<i8"))
        if len(starts) != len(tokens) or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(tokens):
            raise ArtifactError(f"{path / split} does not fit together: its files have different numbers of tokens")
        return cls(path, split, tokens, starts, offsets, _fingerprint(manifest["files"], split))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer."""
        return self.folder / TOKENIZER


def _map(folder: Path, name: str, files: dict[str, object], dtype: np.dtype) -> np.ndarray:
    file, entry = folder / name, files.get(name)
    size = entry.get("size_bytes") if isinstance(entry, dict) else None
    try:
        found = file.stat().st_size
        if found != size or found % dtype.itemsize:
            raise ArtifactError(f"{file} is damaged: {found} bytes, {size} were written")
        if not found:
            return np.zeros(0, dtype=dtype)
        return np.memmap(file, dtype=dtype, mode="r")
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror or error}") from None


def _fingerprint(files: dict[str, object], split: str) -> str:
    parts = {name: entry for name, entry in files.items() if name.startswith((f"{split}/", f"{TOKENIZER}/"))}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class StoreWriter:
    """Appends documents to a split that is being written; use it as a context manager."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        (folder / split).mkdir(parents=True)
        self._dtype = dtype
        self._stack = contextlib.ExitStack()
        self._tokens, self._starts, self._documents = (
            self._stack.enter_context((folder / split / name).open("wb")) for name in (TOKENS, STARTS, DOCUMENTS)
        )
        self._end = 0
        self._mark()

    def append(self, ids: np.ndarray, starts: np.ndarray) -> None:
        """Append one document: its ids (n,) and word starts (n,)."""
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self._starts.write(starts.astype(np.uint8).tobytes())
        self._end += len(ids)
        self._mark()

    def _mark(self) -> None:
        self._documents.write(np.array(self._end, dtype="<i8").tobytes())

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Return the smaller of the two types that holds every id."""
    return DTYPES["uint16" if vocabulary_size <= 2**16 else "uint32"]
