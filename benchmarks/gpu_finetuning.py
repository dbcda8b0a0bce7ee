"""What the size of passes, dropout and `--compile` cost a fine-tuning on a GPU.

    python benchmarks/gpu_finetuning.py TOKENS TRAIN [--steps N] [--preset NAME]

TOKENS is a folder that `effllm prepare` wrote, for its tokenizer; TRAIN a file of labelled texts, SST-2's here. A BERT
of 12 layers of 768 with random weights learns them as they are, and joined to 300 words at least, 32 a step, in
bfloat16: with passes of several sizes, with dropout and without, as written and compiled. Median seconds of the steps
after the first ones, with data and optimiser; one run each, one after another, on one GPU. It measures time only.
Writes `results/gpu_finetuning.jsonl` after each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from effllm.data.readers import read_records
from effllm.data.vocabulary import Vocabulary
from effllm.folder import tokenizer_files
from effllm.measure.statistics import median_interval
from effllm.rows import Row, write_rows
from effllm.train.devices import describe
from effllm.train.finetune import finetune
from effllm.train.models import preset_config
from effllm.train.settings import FinetuneSettings

RESULTS = Path(__file__).parent / "results" / "gpu_finetuning.jsonl"
STEPS, FIRST = 40, 12
SYSTEMS: dict[str, dict[str, Any]] = {
    "as it is": {"dropout": 0.1},
    "no dropout": {"dropout": 0.0},
    "passes of 1,024 tokens": {"dropout": 0.1, "pass_tokens": 1024},
    "passes of 16,384 tokens": {"dropout": 0.1, "pass_tokens": 16384},
    "compiled": {"dropout": 0.1, "compile": True},
}


def write_model(tokens: Path, preset: str, folder: Path) -> None:
    """Write a model of random weights with the tokenizer of `tokens`."""
    torch.manual_seed(0)
    config = preset_config(preset, Vocabulary.read(tokens / "tokenizer"), 512)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    for name, file in tokenizer_files(tokens / "tokenizer").items():
        (folder / name).write_bytes(file.read_bytes())


def write_texts(train: Path, words: int, count: int, file: Path) -> None:
    """Write `count` labelled texts of at least `words` words, each made of the next texts of `train` in turn."""
    records = (record for _, record in read_records(train))
    with file.open("w", encoding="utf-8") as lines:
        for record in itertools.islice(records, count):
            while len(record["text"].split()) < words:
                record["text"] += " " + next(records)["text"]
            lines.write(json.dumps(record) + "\n")


def measure(model: Path, file: Path, what: str, steps: int) -> Iterator[Row]:
    """Train with each of SYSTEMS and yield rows."""
    for system, chosen in SYSTEMS.items():
        settings = FinetuneSettings(steps=steps, precision="bf16", save_every=0, **chosen)
        with tempfile.TemporaryDirectory() as out:
            run = finetune(model, Path(out) / "out", task="text-classification", train=file, settings=settings)
            records = [step.record for step in run][min(FIRST, steps // 2) :]
        tokens = sum(record.tokens for record in records) / len(records)
        median, low, high = median_interval([record.step_s for record in records])
        how = {"texts": what, "batch": settings.batch_size, "tokens a step": round(tokens)}
        how |= {"torch": torch.__version__, "transformers": transformers.__version__}
        yield Row("step", median, "s", system, len(records), low, high, how, describe())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="with another number no rows are written")
    parser.add_argument("--preset", default="base", help="with another model no rows are written")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_model(options.tokens, options.preset, work / "model")
        for what, words in (("sentences", 0), ("300 words", 300)):
            write_texts(options.train, words, 32 * 20, work / "texts.jsonl")
            for row in measure(work / "model", work / "texts.jsonl", what, options.steps):
                print(f"{what:12} {row.system:24} {row.value * 1e3:.1f} ms", row.how, flush=True)
                rows.append(row)
                if (options.steps, options.preset) == (STEPS, "base"):
                    write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
