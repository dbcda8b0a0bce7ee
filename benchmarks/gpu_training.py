"""How well pre-training uses a GPU: model FLOP utilisation of whole steps, data and optimiser included.

    python benchmarks/gpu_training.py TOKENS [--only SHAPE …]

TOKENS is a folder that `effllm prepare` wrote, of long documents, so that most sequences are as long as they may be.
For each shape `effllm pretrain`'s own run in bfloat16, 20 % masked, as written and with `--compile`: MFU, tokens/s and
wait for data of its log, medians over the steps after the first ones, the seconds until the first step is over, and the
most memory that tensors took. The formula of the MFU stands in the log of every run; it counts matrix products by what
the data sheet says that the GPU can do. One run each, on one GPU. Writes `results/gpu_training.jsonl`, where rows of
what is not measured this time stay.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from effllm.data.vocabulary import Vocabulary
from effllm.measure.statistics import median_interval
from effllm.rows import Row, read_rows, write_rows
from effllm.train.models import preset_config
from effllm.train.pretrain import pretrain
from effllm.train.runlog import read_log
from effllm.train.settings import PretrainSettings
from effllm.variant import Variant

RESULTS = Path(__file__).parent / "results" / "gpu_training.jsonl"
STEPS, FIRST = 40, 10


@dataclass(frozen=True)
class Shape:
    """A model and the sequences it is trained on: `preset` with another number of layers where `layers` says so."""

    preset: str
    length: int
    batch_size: int
    layers: int = 0
    as_written: int = 0
    """The sequences a step where it is not compiled, which takes more memory; 0 = as many."""


SHAPES = {
    "BERT 12 x 768, 512 tokens": Shape("base", 512, 320, as_written=160),
    "ModernBERT 12 x 768, 512 tokens": Shape("modern-base", 512, 256),
    "BERT 6 x 512, 128 tokens": Shape("medium", 128, 1536, layers=6),
    "ModernBERT 6 x 512, 128 tokens": Shape("modern-medium", 128, 1536, layers=6),
}


def write_config(shape: Shape, tokens: Path, folder: Path) -> None:
    """Write the shape's config.json into a folder."""
    config = preset_config(shape.preset, Vocabulary.read(tokens / "tokenizer"), shape.length)
    if shape.layers:
        config.num_hidden_layers = shape.layers
        if hasattr(config, "layer_types"):
            config.layer_types = config.layer_types[: shape.layers]
    config.save_pretrained(folder)


def measure(name: str, shape: Shape, tokens: Path, steps: int, *, compiled: bool) -> list[Row]:
    """Train and return the rows."""
    with tempfile.TemporaryDirectory() as temporary:
        write_config(shape, tokens, Path(temporary) / "config")
        out = Path(temporary) / "run"
        settings = PretrainSettings(
            model=str(Path(temporary) / "config"),
            steps=steps,
            batch_size=shape.batch_size if compiled else shape.as_written or shape.batch_size,
            max_length=shape.length,
            mask_rate=0.2,
            precision="bf16",
            compile=compiled,
            workers=4,
            log_every=1,
            save_every=0,
            eval_limit=64,
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start, first_s = time.perf_counter(), 0.0
        for _ in pretrain(tokens, out, settings):
            first_s = first_s or time.perf_counter() - start
        rows = rows_of_run(name, out)
    how, where, system = rows[0].how, rows[0].machine, rows[0].system
    rows.append(Row("first step", first_s, "s", system, 1, None, None, how, where))
    if torch.cuda.is_available():
        peak = float(torch.cuda.max_memory_allocated())
        rows.append(Row("peak GPU memory", peak, "bytes", system, 1, None, None, how, where))
    for row in rows:
        print(f"{name:32} {system:11} {row.metric:20} {row.value:.4g} {row.unit}", flush=True)
    return rows


def rows_of_run(name: str, run: Path) -> list[Row]:
    """Return the rows that the log of a run gives, without its first steps."""
    log, manifest = read_log(run), Variant.open((run / "last").resolve()).manifest
    lines = [line for line in log if "loss" in line]
    lines = [line for line in lines if line["step"] > min(FIRST, lines[-1]["step"] // 2)]
    step = manifest["steps"][-1]
    tokens = sum(line["tokens"] for line in lines) / len(lines)
    how = {
        "what": name,
        "batch": step["settings"]["batch_size"],
        "tokens a step": round(tokens),
        "mean length": round(tokens / step["settings"]["batch_size"], 1),
        "masked": step["settings"]["mask_rate"],
        "precision": step["settings"]["precision"],
        "attention": step["attention"],
        **{package: manifest["versions"][package] for package in ("torch", "transformers")},
    }
    system = "compiled" if step["settings"]["compile"] else "as written"
    where = next(line["start"]["machine"] for line in log if "start" in line)
    rows = []
    for metric, key, unit in (
        ("MFU", "mfu", "share"),
        ("training throughput", "tokens_per_s", "tokens/s"),
        ("data wait", "data_wait", "share"),
    ):
        median, low, high = median_interval([line[key] for line in lines])
        rows.append(Row(metric, median, unit, system, len(lines), low, high, how, where))
    return rows


def main() -> None:
    """Measure, print and write after each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--only", nargs="*", choices=SHAPES, default=[*SHAPES], metavar="SHAPE")
    parser.add_argument("--compiled", action="store_true", help="compiled only")
    parser.add_argument("--run", type=Path, help="take the rows of the one shape in --only from the log of this run")
    parser.add_argument("--steps", type=int, default=STEPS, help="with another number no rows are written")
    options = parser.parse_args()
    rows = list(read_rows(RESULTS)) if RESULTS.exists() else []
    for name in options.only:
        for compiled in (True,) if options.compiled or options.run else (False, True):
            if options.run:
                found = rows_of_run(name, options.run)
            else:
                found = measure(name, SHAPES[name], options.tokens, options.steps, compiled=compiled)
            measured = {(row.how["what"], row.system) for row in found}
            rows = [*(row for row in rows if (row.how["what"], row.system) not in measured), *found]
            if options.steps == STEPS:
                write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
