"""What each way of making a model smaller costs in quality, and what it gains.

    python benchmarks/compression.py MODEL DATA --work DIR [--only NAME,…] [--seeds N] [--bench]

MODEL is a fine-tuned model (SST-2 from all-MiniLM-L6-v2 here, as `benchmarks/finetuning.py` leaves it, all-MiniLM-L6-v2
itself on STS-B, and on Chinese STS-B one that the README beside this file makes), DATA a folder with its
`train.jsonl.xz`, `dev.jsonl` and perhaps `test.jsonl`. Each recipe is a row of methods of `effllm compress`; recipes
that train are made once per seed. Folders are kept in DIR, and those that are there already are not made again. With
`--bench` they are timed in ONNX Runtime against the dense model there and in torch, one thread, one interleaved run.
Rows go to `results/compression.jsonl` for SST-2, to `results/compression_NAME.jsonl` for the folder NAME.

Calibration and training texts are the training set's. Quality is measured on dev, which chose the dense model's own
checkpoint, and on test, with twice as many examples of SST-2, which chose among `auto`'s trials. Both were also looked
at when defaults were chosen: the training inside `auto`, and int4's zero points. Small models, three tasks, one
processor.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from effllm import machine
from effllm.compression import parse_method
from effllm.compression.pipeline import compress, export
from effllm.data.readers import read_examples
from effllm.errors import EffllmError
from effllm.lineup import BenchSettings, bench
from effllm.measure.quality import evaluate
from effllm.rows import Row, read_rows, write_rows
from effllm.runtime.predictor import Predictor
from effllm.variant import Variant, is_variant

RESULTS = Path(__file__).parent / "results"
DISTIL = "distil:learning_rate=2e-4,seed={seed}"
"""One pass over the training set."""
SHORT_DISTIL = "distil:precision=bf16,steps=600,dropout=true,seed={seed}"


@dataclass(frozen=True)
class Recipe:
    """A row of methods, `{seed}` and `{group_size}` standing for those; `after` names the recipe it starts from.

    `max_drop` is the relative loss on the file `gate` that is allowed: all of it, so that every recipe gives a row, but
    for a search.
    """

    specs: tuple[str, ...]
    after: str = ""
    max_drop: float = 1.0
    gate: str = "dev.jsonl"

    @property
    def trains(self) -> bool:
        """Whether seeds make a difference."""
        return any("{seed}" in spec for spec in self.specs) or (bool(self.after) and RECIPES[self.after].trains)


def _sparse() -> dict[str, Recipe]:
    recipes = {}
    for method in ("magnitude", "wanda", "ria", "sparsegpt", "obert"):
        recovered = method in {"magnitude", "obert"}
        recipes[f"{method} 2:4"] = Recipe((f"{method}:pattern=2:4",))
        for percent in (50, 60, 70, 80, 90) if recovered else (50, 60, 70):
            spec = f"{method}:sparsity={percent / 100}"
            recipes[f"{method} {percent} %"] = Recipe((spec,))
            if recovered and percent >= 70:
                recipes[f"{method} {percent} % + distil"] = Recipe((spec, SHORT_DISTIL))  # from the dense model
    movement = "movement:sparsity=0.9,epochs=1,steps=600,precision=bf16,dropout=true,seed={seed}"
    recipes["movement 90 %"] = Recipe((movement,))
    return recipes


RECIPES = {
    "int8": Recipe(("int8",)),
    "int4 gptq": Recipe(("int4:algorithm=gptq,group_size={group_size}",)),
    "int4 rtn": Recipe(("int4:algorithm=rtn,group_size={group_size}",)),
    "nf4": Recipe(("nf4",)),
    "structured 2x": Recipe(("structured:flops=0.5",)),
    "structured 2x + distil": Recipe(("structured:flops=0.5", DISTIL)),
    "structured 2x + distil + int8": Recipe(("int8",), "structured 2x + distil"),
    "structured 3x": Recipe(("structured:flops=0.33",)),
    "structured 3x + distil": Recipe(("structured:flops=0.33", DISTIL)),
    "structured 3x + distil + int8": Recipe(("int8",), "structured 3x + distil"),
    "auto": Recipe(("auto:budget_minutes=30",), max_drop=0.01, gate="test.jsonl"),
    **_sparse(),
}


@dataclass(frozen=True)
class Plan:
    """The flags."""

    model: Path
    data: Path
    work: Path
    group_size: int

    def variants(self, name: str, seeds: int) -> list[Path]:
        """Return the folders of a recipe, one for each seed where those make a difference; of `dense`, the model."""
        if name == "dense":
            return [self.model]
        return [self.make(name, seed) for seed in range(seeds if RECIPES[name].trains else 1)]

    def make(self, name: str, seed: int) -> Path:
        """Return the folder of a recipe, made if it is not there."""
        recipe = RECIPES[name]
        out = self.work / f"{name.replace(' ', '-').replace(':', '-')}-seed{seed}"
        if not out.exists():
            compress(
                self.make(recipe.after, seed) if recipe.after else self.model,
                out,
                method=[parse_method(spec.format(seed=seed, group_size=self.group_size)) for spec in recipe.specs],
                calib=self.data / "train.jsonl.xz",
                train=self.data / "train.jsonl.xz",
                dev=self.data / recipe.gate,
                max_drop=recipe.max_drop,
                threads=1,
            )
            print(f"made {out.name}", flush=True)
        return out


def quality(folder: Path, data: Path) -> dict[str, Row]:
    """Return the metric of a folder on dev and, where there is such a file, on test, as it answers when loaded."""
    predictor = Predictor.open(folder, threads=1, task="sentence-similarity" if data.name.startswith("stsb") else None)
    found = {}
    for split in ("dev", "test"):
        file = data / f"{split}.jsonl"
        if file.is_file():
            examples = read_examples(file, predictor.task, predictor.head, gold=True)
            found[split] = evaluate(predictor, examples, split)[0][0]
    return found


def sizes_of(folder: Path) -> dict[str, dict[str, int]]:
    """Return the files of a folder as a manifest lists them, with their sizes alone."""
    return {file.name: {"size_bytes": file.stat().st_size} for file in folder.iterdir() if file.is_file()}


def rows_of(name: str, folders: list[Path], data: Path) -> Iterable[Row]:
    """Yield quality and size of a recipe: the median over seeds, bounded by the lowest and the highest."""
    measured = [quality(folder, data) for folder in folders]
    manifest = (
        Variant.open(folders[0]).manifest if is_variant(folders[0]) else {"steps": [], "files": sizes_of(folders[0])}
    )
    how = {
        "methods": [{"method": s.get("method", s["verb"]), **s.get("settings", {})} for s in manifest["steps"]],
        "bounds": "lowest and highest",
    }
    where = machine.describe()
    for split, row in measured[0].items():
        values = [rows[split].value for rows in measured]
        ends = (min(values), max(values)) if len(values) > 1 else (None, None)
        middle = statistics.median(values)
        yield Row(row.metric, middle, "absolute", name, len(values), *ends, {"split": split, **how}, where)
    sizes = [e["size_bytes"] for n, e in manifest["files"].items() if n.endswith((".safetensors", ".onnx"))]
    yield Row("model size", float(sum(sizes)), "bytes", name)


def timeable(name: str, folder: Path, work: Path) -> Path:
    """Return a folder of a recipe's name that ONNX Runtime runs: a transformers model is exported."""
    out = work / "onnx" / name
    if not out.exists() and (folder / "onnx").is_dir():
        out.parent.mkdir(exist_ok=True)
        out.symlink_to(folder.absolute())
    if not out.exists():
        export(folder, out)
    return out


def main() -> None:
    """Make what is missing, measure, add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", default=",".join(RECIPES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=128, help="of int4: 32 or 64 for layers of other widths")
    parser.add_argument("--bench", action="store_true", help="also time them, in one run; timings of earlier runs go")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    plan = Plan(arguments.model, arguments.data, arguments.work, arguments.group_size)
    data_set = plan.data.name
    results = RESULTS / ("compression.jsonl" if data_set == "sst2" else f"compression_{data_set}.jsonl")
    rows = list(read_rows(results)) if results.is_file() else []
    folders: dict[str, list[Path]] = {}
    failed: list[str] = []
    chosen = arguments.only.split(",")
    unknown = sorted(set(chosen) - set(RECIPES))
    if unknown:
        parser.error(f"--only: there is no recipe {unknown[0]!r}")
    for name in ("dense", *chosen):
        try:
            made = plan.variants(name, arguments.seeds)
            *scores, size = rows_of(name, made, plan.data)
        except EffllmError as error:
            failed.append(f"{name}: {error}")
        else:
            folders[name] = made
            shown = ", ".join(f"{row.how['split']} {row.value:.4f} {row.low} {row.high}" for row in scores)
            print(f"{name:32} {shown}  {size.value / 1e6:.1f} MB", flush=True)
            others = [r for r in rows if not (r.system == name and r.how.get("batch") is None)]
            rows = [*others, *scores, size]
            write_rows(results, rows)
    if arguments.bench:
        timed = []
        for name, made in folders.items():
            try:
                timed += [timeable(name, made[0], plan.work)] if name != "dense" else []
            except EffllmError as error:  # a format of transformers that has no ONNX graph
                failed.append(f"{name} is not timed: {error}")
        settings = BenchSettings(
            data=plan.data / "dev.jsonl", threads=1, tokens=(64, 128), batch_sizes=(1, 16), rounds=15, min_agreement=0.8
        )
        rows = [r for r in rows if r.how.get("batch") is None]
        rows += [r for r in bench([plan.model, *timed], settings) if r.how.get("batch") is not None]
        write_rows(results, rows)
    if failed:
        raise SystemExit("\n".join(["not made:", *failed]))


if __name__ == "__main__":
    main()
