"""The most that a model gives in one process without a server: tokenise, sort by length, run batches, pool.

    python benchmarks/peers/raw_loop.py DIR --threads 2 < commands

Reads one JSON command a line and answers each with one JSON line: `{"texts": […], "chunk": 32, "seconds": 5}` embeds
chunks of texts over and over and answers `{"texts_per_s": …, "p50_ms": …}`, the median time of a chunk. Within a chunk
texts are sorted by length and run in batches of at most `--max-tokens` padded tokens, the server's own default.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from effllm.runtime.engine import Engine
from effllm.runtime.predictor import Predictor, batches
from effllm.serving.settings import ServeSettings

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def embed(texts: list[str], predictor: Predictor, backend: Any, engine: Engine, max_tokens: int) -> list[np.ndarray]:
    """Return unit-length mean-pooled embeddings."""
    encoded = backend.encode_batch(texts)
    vectors: list[np.ndarray] = [np.empty(0)] * len(texts)
    for batch in batches([len(e.ids) for e in encoded], max_tokens):
        width = max(len(encoded[i].ids) for i in batch)
        ids = np.zeros((len(batch), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, index in enumerate(batch):
            own = encoded[index].ids
            ids[row, : len(own)] = own
            mask[row, : len(own)] = 1
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = engine.run(feeds)["last_hidden_state"]
        pooled = (hidden * mask[:, :, None]).sum(axis=1)
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        for row, index in enumerate(batch):
            vectors[index] = pooled[row]
    return vectors


def main() -> None:
    """Answer commands until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, default=ServeSettings().max_tokens)
    options = parser.parse_args()
    predictor = Predictor.open(options.folder, threads=options.threads)
    backend = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    backend.enable_truncation(predictor.tokenizer.max_length)
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        texts, size, done, times = command["texts"], command["chunk"], 0, []
        start = time.perf_counter()
        while time.perf_counter() - start < command["seconds"]:
            chunk = [texts[(done + i) % len(texts)] for i in range(size)]
            before = time.perf_counter()
            embed(chunk, predictor, backend, predictor.engine, options.max_tokens)
            times.append((time.perf_counter() - before) * 1e3)
            done += size
        seconds = time.perf_counter() - start
        print(json.dumps({"texts_per_s": done / seconds, "p50_ms": float(np.median(times))}), flush=True)


if __name__ == "__main__":
    main()
