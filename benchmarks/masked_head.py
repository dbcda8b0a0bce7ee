"""How much faster a training step is when the masked-LM head runs on the masked positions only.

    python benchmarks/masked_head.py

Two layers of 128, a vocabulary of 8,192, 64 sequences of 128 tokens, 20 % masked, no dropout: effllm's step (packed,
head on masked positions) against the plain one (transformers' own loss over all positions), forward and backward,
interleaved in one process, all cores. Also the share of effllm's step that is spent on making its batch. Writes
`results/masked_head.jsonl`. Random tokens and weights: it measures speed, not learning.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import transformers

from effllm import machine
from effllm.data.masking import Masking
from effllm.data.packing import PretrainStream
from effllm.data.samples import Samples
from effllm.data.vocabulary import Vocabulary
from effllm.measure.clock import time_interleaved
from effllm.measure.statistics import median_interval, ratio_of_medians
from effllm.rows import Row, write_rows
from effllm.train.attention import NAME, register
from effllm.train.objectives import MaskedLanguageModel
from effllm.train.pretrain import micro_batch

RESULTS = Path(__file__).parent / "results" / "masked_head.jsonl"
VOCABULARY, SEQUENCES, LENGTH, RATE, ROUNDS = 8192, 64, 128, 0.2, 9


class RandomStore:
    """Documents of random tokens, each as long as a sequence."""

    def __init__(self) -> None:
        inner = LENGTH - 2
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(5, VOCABULARY, 4096 * inner).astype(np.uint16)
        self.starts = np.ones(len(self.tokens), dtype=np.uint8)
        self.offsets = np.arange(0, len(self.tokens) + 1, inner)


def model(implementation: str) -> transformers.PreTrainedModel:
    """Return the two-layer model."""
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, **shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.AutoModelForMaskedLM.from_config(config, attn_implementation=implementation)


def main() -> None:
    """Measure and write the rows."""
    register()
    vocabulary = Vocabulary(VOCABULARY, 2, 3, 4, 0, (0, 1, 2, 3, 4), np.arange(5, VOCABULARY))
    samples = Samples(RandomStore(), vocabulary, LENGTH)
    stream = PretrainStream(samples, vocabulary, Masking("token", RATE), 0, SEQUENCES)
    sparse, dense = MaskedLanguageModel(model(NAME)), model("sdpa")
    start = time.perf_counter()
    batches = [stream.batch(step) for step in range(8)]
    batch_s = (time.perf_counter() - start) / len(batches)
    batch = batches[0]
    arrays = {name: torch.from_numpy(array) for name, array in micro_batch(batch).arrays.items()}
    labels = torch.full((SEQUENCES * LENGTH,), -100)
    labels[arrays["masked_positions"]] = arrays["labels"]
    padded = {
        "input_ids": arrays["input_ids"].view(SEQUENCES, LENGTH),
        "attention_mask": torch.ones(SEQUENCES, LENGTH, dtype=torch.int64),
        "labels": labels.view(SEQUENCES, LENGTH),
    }

    def masked_only() -> None:
        sparse.zero_grad()
        (sparse(**arrays)[0] / len(batch.labels)).backward()

    def everywhere() -> None:
        dense.zero_grad()
        dense(**padded).loss.backward()

    times = time_interleaved({"head on masked positions": masked_only, "head on all positions": everywhere}, ROUNDS)
    how = {"sequences": SEQUENCES, "length": LENGTH, "mask rate": RATE, "vocabulary": VOCABULARY}
    how["threads"] = torch.get_num_threads()
    where, rows = machine.describe(), []
    for name, values in times.items():
        median, low, high = (SEQUENCES * LENGTH / (t / 1e3) for t in median_interval(values))
        rows.append(Row("training throughput", median, "tokens/s", name, ROUNDS, high, low, how, where))
    ratio, low, high = ratio_of_medians(times["head on all positions"], times["head on masked positions"])
    rows.append(Row("speed-up", ratio, "x", "head on masked positions", ROUNDS, low, high, how, where))
    step_s = median_interval(times["head on masked positions"])[0] / 1e3
    rows.append(
        Row(
            "data share of a step",
            batch_s / (batch_s + step_s),
            "share",
            "head on masked positions",
            8,
            None,
            None,
            how,
            where,
        )
    )
    write_rows(RESULTS, rows)
    for row in rows:
        print(f"{row.metric:24} {row.system:26} {row.value:.4g} {row.unit}")


if __name__ == "__main__":
    main()
