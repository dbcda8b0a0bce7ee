"""What masking and packing need to know of a tokenizer: its special tokens, and which may stand in for others."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from effllm.errors import ArtifactError
from effllm.folder import read_json

UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]")
"""Places that a vocabulary keeps free, such as BERT's `[unused12]`."""
ROLES = {
    "cls": (("cls_token", "bos_token"), ("[CLS]", "<s>")),
    "sep": (("sep_token", "eos_token"), ("[SEP]", "</s>")),
    "mask": (("mask_token",), ("[MASK]", "<mask>")),
    "pad": (("pad_token",), ("[PAD]", "<pad>")),
}
"""For each special token that training needs, its names in the tokenizer's files, and what it is called without any."""


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of a tokenizer.

    `size` is one more than the largest id. `special_ids` are all special tokens, sorted. `ordinary` is int64 (n,), the
    sorted ids that a random replacement may use: no special token, no added one, no place kept free. `digest` is the
    SHA-256 of all tokens with their ids.
    """

    size: int
    cls_id: int
    sep_id: int
    mask_id: int
    pad_id: int
    special_ids: tuple[int, ...]
    ordinary: np.ndarray = field(repr=False, compare=False)
    digest: str = field(default="", repr=False, compare=False)

    @classmethod
    def read(cls, folder: str | Path) -> Vocabulary:
        """Read a tokenizer's folder; a missing cls token falls back to bos, a missing sep to eos.

        Raises ArtifactError when there is no tokenizer that can be read, when one of the four tokens is missing, and
        when no ordinary token is left.
        """
        path = Path(folder)
        backend = _open(path / "tokenizer.json")
        names: dict[str, str] = {}
        special: set[str] = set()
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            for key, value in read_json(path / file, {}).items():
                found = _contents(value) if key.endswith(("_token", "_special_tokens")) else []
                special.update(found)
                if len(found) == 1:
                    names[key] = found[0]
        added = backend.get_added_tokens_decoder()
        ids = {role: _find(role, names, backend, path) for role in ROLES}
        special_ids = {i for i, token in added.items() if token.special} | set(ids.values())
        special_ids |= {i for i in map(backend.token_to_id, special) if i is not None}
        vocabulary = backend.get_vocab()
        excluded = special_ids | set(added) | {i for token, i in vocabulary.items() if UNUSED.fullmatch(token)}
        ordinary = np.array(sorted(set(vocabulary.values()) - excluded), dtype=np.int64)
        if not len(ordinary):
            raise ArtifactError(f"{path} has no token that is not a special one; there is nothing to learn")
        return cls(
            size=max(vocabulary.values()) + 1,
            cls_id=ids["cls"],
            sep_id=ids["sep"],
            mask_id=ids["mask"],
            pad_id=ids["pad"],
            special_ids=tuple(sorted(special_ids)),
            ordinary=ordinary,
            digest=hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest(),
        )


def _open(file: Path) -> Tokenizer:
    if not file.is_file():
        raise ArtifactError(f"{file.parent} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ArtifactError(f"{file} is not a tokenizer: {error}") from None


def _contents(value: Any) -> list[str]:
    """Return the token texts of an entry: a text, an object with `content`, or a list or an object of such."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _contents(value["content"]) if "content" in value else _contents(list(value.values()))
    return [text for item in value for text in _contents(item)] if isinstance(value, list) else []


def _find(role: str, names: dict[str, str], backend: Tokenizer, path: Path) -> int:
    keys, usual = ROLES[role]
    named = [names[key] for key in keys if key in names]
    for token in named or usual:
        found = backend.token_to_id(token)
        if found is not None:
            return int(found)
    tried = f"{named[0]!r} is not in its vocabulary" if named else f"no {' or '.join(keys)} is named"
    raise ArtifactError(f"the tokenizer in {path} has no {role} token, which masked-LM training needs: {tried}")
