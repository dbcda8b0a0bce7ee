"""What fine-tuning all-MiniLM-L6-v2 reaches on five tasks.

    python benchmarks/finetuning.py DATA --work DIR [--tasks sst2,banking77] [--seeds 3]

DATA holds a folder per data set with `train.jsonl.xz`, `dev.jsonl` and, where there is one, `test.jsonl`. Each task is
fine-tuned once per seed with the settings below; models are kept in DIR, and those that are there already are not
trained again. Adds rows to `results/finetuning.jsonl`: dev metrics, chosen by dev, and test metrics of the same model.
One base model; the settings were chosen once and not searched.
"""

from __future__ import annotations

import argparse
import lzma
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from effllm import machine
from effllm.data.packaged import minilm
from effllm.data.readers import read_examples
from effllm.measure.quality import evaluate
from effllm.rows import Row, read_rows, write_rows
from effllm.runtime.predictor import Predictor
from effllm.train.finetune import finetune
from effllm.train.settings import FinetuneSettings
from effllm.variant import Variant

RESULTS = Path(__file__).parent / "results" / "finetuning.jsonl"


@dataclass(frozen=True)
class Case:
    """A data set, its task, how it is trained, and how many of its training and dev examples are used (0 = all)."""

    task: str
    settings: FinetuneSettings
    train: int = 0


CASES = {
    "sst2": Case(
        "text-classification",
        FinetuneSettings(epochs=2, precision="bf16", eval_every=421, save_every=421, average=5),
    ),
    "banking77": Case("text-classification", FinetuneSettings(epochs=4, learning_rate=2e-4)),
    "stsb-en": Case("sentence-similarity", FinetuneSettings(epochs=3, learning_rate=3e-5)),
    "wnut17": Case("token-classification", FinetuneSettings(epochs=5, learning_rate=2e-4)),
    "squad11": Case(
        "question-answering",
        FinetuneSettings(epochs=1, learning_rate=2e-4, precision="bf16", eval_every=10**6),
        train=12000,
    ),
}


def find(folder: Path, split: str) -> Path | None:
    """Return the file of a split, plain or compressed."""
    return next((folder / name for name in (f"{split}.jsonl", f"{split}.jsonl.xz") if (folder / name).is_file()), None)


def train(name: str, case: Case, data: Path, work: Path, seed: int) -> Variant:
    """Fine-tune one seed, or take the model that is there."""
    out = work / f"{name}-seed{seed}"
    if not out.exists():
        settings = FinetuneSettings(**{**vars(case.settings), "seed": seed, "log_every": 100})
        file = shortened(find(data / name, "train"), case.train, work)
        dev = find(data / name, "dev")
        steps = finetune(minilm(), out, task=case.task, train=file, dev=dev, settings=settings, resume=True)
        for step in steps:
            if step.record.step % 100 == 0:
                print(f"{name} seed {seed} step {step.record.step} loss {step.record.loss:.4f}", flush=True)
    return Variant.open(out)


def shortened(file: Path, count: int, work: Path) -> Path:
    """Return a file with the first `count` lines of another one; the file itself for 0."""
    if not count:
        return file
    short = work / f"{file.parent.name}-{count}.jsonl"
    with lzma.open(file, "rt", encoding="utf-8") as stream:
        short.write_text("".join(line for _, line in zip(range(count), stream, strict=False)), encoding="utf-8")
    return short


def rows_of(name: str, case: Case, data: Path, variants: list[Variant]) -> Iterator[Row]:
    """Yield for each split and metric the median over the seeds, bounded by the lowest and the highest."""
    found: dict[tuple[str, str], list[float]] = {}
    for variant in variants:
        for row in variant.rows:
            found.setdefault(("dev", row.metric), []).append(row.value)
        test = find(data / name, "test")
        if test is not None:
            predictor = Predictor.open(variant.path, task=case.task)
            examples = read_examples(test, predictor.task, predictor.head, gold=True)
            for row in evaluate(predictor, examples, "test")[0]:
                found.setdefault(("test", row.metric), []).append(row.value)
    settings = variants[0].manifest["steps"][-1]["settings"]
    how = {key: settings.get(key) for key in ("epochs", "batch_size", "learning_rate", "precision", "average")}
    how |= {"examples": variants[0].manifest["train"]["examples"], "bounds": "lowest and highest"}
    for (split, metric), values in found.items():
        yield Row(
            metric,
            statistics.median(values),
            "absolute",
            name,
            len(values),
            min(values),
            max(values),
            {**how, "split": split},
            machine.describe(),
        )


def main() -> None:
    """Train, measure, and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tasks", default=",".join(CASES))
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in arguments.tasks.split(","):
        case = CASES[name]
        variants = [train(name, case, arguments.data, arguments.work, seed) for seed in range(arguments.seeds)]
        rows = list(rows_of(name, case, arguments.data, variants))
        before = [row for row in read_rows(RESULTS) if row.system != name] if RESULTS.is_file() else []
        write_rows(RESULTS, [*before, *rows])
        for row in rows:
            print(f"{row.system:10} {row.how['split']:5} {row.metric:14} {row.value:.4f} [{row.low}, {row.high}]")


if __name__ == "__main__":
    main()
