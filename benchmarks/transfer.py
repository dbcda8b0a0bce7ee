"""What ten minutes of pre-training are worth: SST-2 with 2,000 labelled examples, pre-trained against random weights.

    python benchmarks/transfer.py TOKENS SST2 [--seconds 600] [--run DIR] [--learning-rate 3e-4]

TOKENS is a folder that `effllm prepare` wrote with its defaults (English Wikipedia here), SST2 a folder with
`train.jsonl.xz` and `dev.jsonl`. Pre-trains the preset `modern-mini` for the given seconds on all cores, then fine-
tunes it and the same model with random weights with five paired seeds: same examples, order and settings. The gain
is the mean of the five differences of dev accuracy with a 95 % interval of Student's t; another pre-training would
move it too. With `--full` one fine-tuning on all examples stands beside. A pre-training run made elsewhere, as on a
GPU and of another model, is taken by `--run`, its seconds by `--seconds`. Writes `results/transfer.jsonl`, where
rows of other seconds stay. One corpus and one task.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from effllm import machine
from effllm.data.vocabulary import Vocabulary
from effllm.folder import tokenizer_files
from effllm.rows import Row, read_rows, write_rows
from effllm.train.finetune import finetune
from effllm.train.models import build_model
from effllm.train.pretrain import pretrain
from effllm.train.settings import FinetuneSettings, PretrainSettings
from effllm.variant import Variant

RESULTS = Path(__file__).parent / "results" / "transfer.jsonl"
EXAMPLES, SEEDS = 2000, 5
PRETRAIN = {"model": "modern-mini", "batch_size": 8, "learning_rate": 1.5e-3, "beta2": 0.95, "precision": "bf16"}
RECORDED = (
    "batch_size",
    "learning_rate",
    "schedule",
    "warmup",
    "optimizer",
    "beta2",
    "mask_rate",
    "max_length",
    "precision",
)
"""The settings of pre-training that rows hold."""
FINETUNE = {"epochs": 4.0, "learning_rate": 3e-4, "dropout": 0.1, "precision": "bf16"}


def accuracy(model: Path, train: Path, dev: Path, out: Path, **settings: float) -> float:
    """Fine-tune and return the dev accuracy of the last step."""
    chosen = FinetuneSettings(**{**FINETUNE, **settings, "eval_every": 10**6})
    for _ in finetune(model, out, task="text-classification", train=train, dev=dev, settings=chosen):
        pass
    return next(row.value for row in Variant.open(out).rows if row.metric == "accuracy")


def random_weights(pretrained: Path, tokens: Path, out: Path) -> Path:
    """Write the model that pre-training started from."""
    out.mkdir()
    shutil.copyfile(pretrained / "config.json", out / "config.json")
    model = build_model(str(out), Vocabulary.read(tokens / "tokenizer"), 128, "mlm", 0)
    model.save_pretrained(out)
    for name, file in tokenizer_files(tokens / "tokenizer").items():
        (out / name).write_bytes(file.read_bytes())
    return out


def main() -> None:
    """Pre-train, fine-tune, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("sst2", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--run", type=Path, help="keep the pre-training run here; one that is there is taken")
    parser.add_argument("--learning-rate", type=float, default=FINETUNE["learning_rate"], help="of both fine-tunings")
    parser.add_argument("--full", action="store_true", help="also fine-tune on all training examples")
    arguments = parser.parse_args()
    dev = arguments.sst2 / "dev.jsonl"
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        run = arguments.run or scratch / "run"
        if not (run / "last").exists():
            settings = PretrainSettings(seconds=arguments.seconds, log_every=50, **PRETRAIN)
            for record in pretrain(arguments.tokens, run, settings):
                if record.step % 50 == 0:
                    speed = record.tokens / record.step_s
                    print(f"step {record.step}  loss {record.loss:.4f}  {speed:.0f} tok/s", flush=True)
        last = Variant.open((run / "last").resolve())
        loss = next(row for row in last.rows if row.metric == "masked loss")
        with lzma.open(arguments.sst2 / "train.jsonl.xz", "rt", encoding="utf-8") as stream:
            lines = stream.read().splitlines()
        few = scratch / "few.jsonl"
        chosen = np.random.default_rng(0).permutation(len(lines))[:EXAMPLES]
        few.write_text("\n".join(lines[i] for i in chosen) + "\n", encoding="utf-8")
        starts = {
            "pre-trained": last.path,
            "random weights": random_weights(last.path, arguments.tokens, scratch / "random"),
        }
        rate = arguments.learning_rate
        found: dict[str, list[float]] = {name: [] for name in starts}
        for seed in range(SEEDS):
            for name, model in starts.items():
                found[name].append(accuracy(model, few, dev, scratch / f"{name}-{seed}", seed=seed, learning_rate=rate))
                print(f"seed {seed}  {name:16} {found[name][-1]:.4f}", flush=True)
        config = json.loads((last.path / "config.json").read_text(encoding="utf-8"))
        shape = "{model_type}, {num_hidden_layers} layers of {hidden_size}".format(**config)
        everything = arguments.sst2 / "train.jsonl.xz"
        full = (
            accuracy(last.path, everything, dev, scratch / "full", epochs=1.0, learning_rate=rate)
            if arguments.full
            else None
        )
    before = read_rows(RESULTS) if RESULTS.exists() else []
    others = [row for row in before if row.how["pre-training seconds"] != arguments.seconds]
    step = last.manifest["steps"][-1]["settings"]
    how = {
        "pre-training seconds": arguments.seconds,
        "pre-training steps": last.manifest["progress"]["step"],
        "pre-training": {name: step[name] for name in RECORDED},
        "pre-trained on": loss.machine,
        "model": shape,
        "examples": EXAMPLES,
        "learning rate": rate,
        "split": "dev",
    }
    write_rows(RESULTS, [*others, *rows_of(found, full, loss, how)])


def rows_of(found: dict[str, list[float]], full: float | None, loss: Row, how: dict[str, Any]) -> list[Row]:
    """Return the rows of what was found."""
    where = machine.describe()
    gains = np.array(found["pre-trained"]) - np.array(found["random weights"])
    half = float(stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains)))
    rows = [
        Row("accuracy", float(np.median(values)), "absolute", name, SEEDS, min(values), max(values), how, where)
        for name, values in found.items()
    ]
    rows.append(
        Row(
            *("gain", float(gains.mean()), "absolute", "pre-trained", SEEDS),
            *(float(gains.mean()) - half, float(gains.mean()) + half, how, where),
        )
    )
    if full is not None:
        rows.append(Row("accuracy", full, "absolute", "pre-trained, all examples", 1, None, None, how, where))
    rows.append(Row("masked loss", loss.value, "nats", "pre-trained", loss.n, None, None, how, where))
    for row in rows:
        print(f"{row.metric:12} {row.system:26} {row.value:.4f} {row.low} {row.high}")
    return rows


if __name__ == "__main__":
    main()
