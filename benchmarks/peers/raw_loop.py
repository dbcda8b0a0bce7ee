"""The most that a model gives in one process without a server: tokenise, sort by length, run batches, pool.

    python benchmarks/peers/raw_loop.py DIR --threads 2 < commands

Reads one JSON command a line and answers each with one JSON line: `{"texts": […], "chunk": 32, "seconds": 5}` embeds
chunks of texts over and over and answers `{"texts_per_s": …, "p50_ms": …}`, the median time of a chunk. Within a chunk
texts are sorted by length and run in batches of at most `--max-tokens` padded tokens, the server's own default. With
`"apart": true` there are as many loops as threads, of one thread each, which share the texts out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from effllm.runtime.engine import Engine
from effllm.runtime.predictor import Predictor, batches
from effllm.serving.settings import ServeSettings

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def embed(texts: list[str], backend: Any, engine: Engine, max_tokens: int) -> list[np.ndarray]:
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


class Loop:
    """A model, its own tokenizer, and what the last run of `embed_for` did."""

    def __init__(self, folder: Path, threads: int, max_tokens: int) -> None:
        predictor = Predictor.open(folder, threads=threads)
        self._engine = predictor.engine
        self._backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._backend.enable_truncation(predictor.tokenizer.max_length)
        self._max_tokens = max_tokens
        self.rate = 0.0
        self.times_ms: list[float] = []

    def embed_for(self, seconds: float, texts: list[str], size: int) -> None:
        """Embed chunks of so many texts over and over, until the time is over after one of them."""
        done, self.times_ms, start = 0, [], time.perf_counter()
        while time.perf_counter() - start < seconds:
            chunk = [texts[(done + i) % len(texts)] for i in range(size)]
            before = time.perf_counter()
            embed(chunk, self._backend, self._engine, self._max_tokens)
            self.times_ms.append((time.perf_counter() - before) * 1e3)
            done += size
        self.rate = done / (time.perf_counter() - start)


def embed_apart(loops: list[Loop], seconds: float, texts: list[str], size: int) -> None:
    """Run all loops at once, each on its share of the texts, in chunks of its share of the size."""
    count = len(loops)
    threads = [
        threading.Thread(target=loop.embed_for, args=(seconds, texts[index::count], max(1, size // count)))
        for index, loop in enumerate(loops)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Answer commands until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, default=ServeSettings().max_tokens)
    options = parser.parse_args()
    together = [Loop(options.folder, options.threads, options.max_tokens)]
    apart = [Loop(options.folder, 1, options.max_tokens) for _ in range(options.threads)]
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        loops = apart if command.get("apart") else together
        embed_apart(loops, command["seconds"], command["texts"], command["chunk"])
        times = [one for loop in loops for one in loop.times_ms]
        answer = {"texts_per_s": sum(loop.rate for loop in loops), "p50_ms": float(np.median(times))}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
