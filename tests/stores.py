"""A token store made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import make_tokenizer

from effllm.data.store import KIND, TOKENIZER, StoreWriter
from effllm.variant import write_manifest


def write_store(folder: Path, documents: int = 120, seed: int = 0) -> Path:
    """Write a store whose tokens follow each other with a rule that a model can learn."""
    tokenizer = make_tokenizer("bert")
    folder.mkdir()
    tokenizer.save_pretrained(folder / TOKENIZER)
    rng = np.random.default_rng(seed)
    for split, count in (("train", documents), ("dev", 12)):
        with StoreWriter(folder, split, np.dtype(np.uint16)) as writer:
            for _ in range(count):
                length, first = int(rng.integers(4, 90)), int(rng.integers(0, 100))
                ids = 10 + (first + np.arange(length) * (1 + first % 3)) % 140
                writer.append(ids, rng.random(length) < 0.7)
    store = {"dtype": "uint16", "vocabulary_size": len(tokenizer), "tokenizer": "wordpiece"}
    write_manifest(folder, {"kind": KIND, "task": "fill-mask", "store": store, "steps": [], "rows": []})
    return folder
