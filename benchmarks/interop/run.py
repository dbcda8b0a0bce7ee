"""Load effllm's folders in other tools, each in its own environment, and compare their answers with effllm's.

Everything that is made (environments, models, folders, logs) lies in `.interop/` at the
root of the repository; environments are kept and used again, folders are written anew by each run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from models import SMALL_MODELS

import effllm
from effllm import machine
from effllm.data.packaged import minilm
from effllm.rows import Row, write_rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / ".interop"
ROWS = ROOT / "benchmarks" / "results" / "interop.jsonl"

LONG = " ".join(
    f"This is sentence number {i} of a text that is longer than any of the models can take." for i in range(40)
)
TEXTS = (
    "The cat sat on the mat.",
    "effllm makes encoder models smaller, and proves that they still answer as before.",
    "Café déjà vu — naïve ÉCOLE, Straße, İstanbul",
    "今天天气很好，我们去公园散步。",
    "🙂 the price is 12.50 € (−30 %)!",
    "tabs\tand\nnew lines,  two  spaces and a zero-width\u200bspace ",
    "Special words in a text: [MASK] of [SEP] the <mask> and </s> [ENTITY].",
    LONG,
)
PAIRS = (
    ("Who sat on the mat?", "The cat sat on the mat."),
    ("今天天气怎么样？", "今天天气很好，我们去公园散步。"),
    ("What does effllm make?", TEXTS[1]),
    ("Which sentence is this?", LONG),
)
INSTALL_SECONDS = 3600
CHECK_SECONDS = 1200
SAME_FILE = 1e-4
"""Largest difference of unit embeddings and of logits: float32 sums in another order, or the same int8 kernels."""
OTHER_RUNTIME = {"fp32": 1e-5, "int8": 1e-3}
"""Largest 1 - cosine of embeddings from another version of ONNX Runtime, whose kernels round in other places."""

Array = np.ndarray
Outputs = list[dict[str, Array]]


@dataclass(frozen=True)
class Case:
    """One folder to load in one tool; `name` is unique within a tool. `folder` is below `.interop/folders`."""

    folder: str
    task: str
    file: str = "onnx/model.onnx"
    inputs: tuple[tuple[str, ...], ...] = tuple((text,) for text in TEXTS)
    backend: str = "onnx"
    reference: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the case as the check scripts read it."""
        return {
            "name": self.folder,
            "folder": str(WORK / "folders" / self.folder),
            "task": self.task,
            "file": self.file,
            "inputs": self.inputs,
            "backend": self.backend,
        }


@dataclass(frozen=True)
class Tool:
    """A tool: its check script, the file that pins its environment, and what it is asked to load."""

    name: str
    package: str
    script: str
    pins: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Result:
    """One line of the table; `value` is None where there is no number, and then `problem` says why."""

    tool: str
    version: str
    case: Case
    loaded: str
    unit: str
    limit: float
    value: float | None
    state: str
    problem: str = ""
    runtime: str = ""


DENSE = Case("minilm-dense", "feature-extraction")
INT8 = Case("minilm-int8", "feature-extraction", file="onnx/model_quantized.onnx")
WITH_WEIGHTS = Case("minilm-torch", "feature-extraction", file="", backend="torch", reference="minilm-dense")
RERANKER = Case("bert-classifier", "text-classification", inputs=PAIRS)
SMALL = tuple(
    Case(model.name, model.task, inputs=PAIRS) if model.task == "question-answering" else Case(model.name, model.task)
    for model in SMALL_MODELS
)
FITTING = tuple(
    dataclasses.replace(case, inputs=tuple(texts for texts in case.inputs if LONG not in texts))
    for case in (DENSE, INT8, *SMALL)
)
"""Without the text that is cut: transformers.js cuts off the closing special token along with the rest."""
TOOLS = (
    Tool("optimum-onnx", "optimum-onnx", "check_optimum.py", "requirements-optimum.txt", (DENSE, INT8, *SMALL)),
    Tool(
        "sentence-transformers, ONNX",
        "sentence-transformers",
        "check_sentence_transformers.py",
        "requirements-optimum.txt",
        (DENSE, INT8, RERANKER),
    ),
    Tool(
        "sentence-transformers, torch",
        "sentence-transformers",
        "check_sentence_transformers.py",
        "requirements-sentence-transformers.txt",
        (WITH_WEIGHTS,),
    ),
    Tool("fastembed", "fastembed", "check_fastembed.py", "requirements-fastembed.txt", (DENSE, INT8)),
    Tool(
        "transformers.js",
        "@huggingface/transformers",
        "check_transformers_js.mjs",
        "package.json",
        FITTING,
    ),
)


def make_folders() -> None:
    """Write every folder that the tools load into `.interop/folders`."""
    folders, models = WORK / "folders", WORK / "models"
    for target in (folders, models):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    source = minilm()
    command = [sys.executable, "-m", "effllm"]
    int8 = ["--method", "int8:activations=static"]
    for name, words in (("minilm-dense", ["export"]), ("minilm-int8", ["compress", *int8])):
        run_quietly([*command, words[0], str(source), *words[1:], "--out", str(folders / name)], name, CHECK_SECONDS)
    shutil.copytree(folders / "minilm-dense", folders / "minilm-torch")
    shutil.copyfile(source / "model.safetensors", folders / "minilm-torch" / "model.safetensors")
    for model in SMALL_MODELS:
        say(f"making {model.name}")
        model.write(models / model.name, TEXTS)
        effllm.export(models / model.name, folders / model.name)


def make_environment(pins: str) -> list[str]:
    """Return the command that runs a script in the environment that `pins` describes, made first where needed.

    The environment is complete when it holds a copy of the file that it was made from; an interrupted installation
    goes on where it stopped. Raises RuntimeError with the installer's last lines when it cannot be made.
    """
    wanted = (HERE / pins).read_text(encoding="utf-8")
    place = WORK / "environments" / Path(pins).stem
    done = place / "complete"
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    ready = done.is_file() and done.read_text(encoding="utf-8") == wanted
    if pins.endswith(".json"):
        missing = [program for program in ("node", "npm") if shutil.which(program) is None]
        if missing:
            raise RuntimeError(f"{missing[0]} is not installed")
        if not ready:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(HERE / pins, place / "package.json")
            # The packages' install scripts only fetch GPU libraries; the CPU library is in the package.
            install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
            run_quietly([*install, "--prefix", str(place)], pins, INSTALL_SECONDS)
    elif not ready:
        if not python.exists():
            run_quietly([sys.executable, "-m", "venv", str(place)], pins, INSTALL_SECONDS)
        run_quietly([str(python), "-m", "pip", "install", "-r", str(HERE / pins)], pins, INSTALL_SECONDS)
    done.write_text(wanted, encoding="utf-8")
    return ["node"] if pins.endswith(".json") else [str(python)]


def run_quietly(command: Sequence[str], name: str, seconds: int) -> str:
    """Run a command and return what it printed; stderr goes to `.interop/logs`.

    Raises RuntimeError with the last line of stderr when it fails.
    """
    say(" ".join(Path(word).name if os.sep in word else word for word in command))
    log = WORK / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Nothing may come from the hub: what is loaded is the folder.
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    with log.open("a", encoding="utf-8") as stream:
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                encoding="utf-8",
                timeout=seconds,
                env=os.environ | settings,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end after {seconds} s; see {log}") from None
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        raise RuntimeError(f"exit code {done.returncode}: {lines[-1] if lines else ''} (all of it in {log})")
    return done.stdout


def reference(case: Case) -> tuple[Outputs, list[str]]:
    """Return effllm's own outputs for each input of a case, and the model's label names."""
    predictor = effllm.open(WORK / "folders" / (case.reference or case.folder))
    if case.task == "feature-extraction":
        vectors = predictor.embed([text for (text,) in case.inputs])
        outputs: Outputs = [{"embedding": vector} for vector in vectors]
    else:
        encodings = [predictor.tokenizer.encode(*given) for given in case.inputs]
        outputs = [dict(answer) for answer in predictor.run(encodings)]
    return outputs, predictor.folder.labels


def least_contrast(outputs: Outputs) -> float:
    """Return the smallest difference between the answers to two inputs, over the tokens that both have."""

    def contrast(first: Mapping[str, Array], second: Mapping[str, Array]) -> float:
        pairs = ((a.ravel(), second[name].ravel()) for name, a in first.items())
        return max(float(np.abs(a[: len(b)] - b[: len(a)]).max()) for a, b in pairs)

    return min(contrast(first, second) for first, second in itertools.combinations(outputs, 2))


def largest_difference(expected: Outputs, got: Sequence[Mapping[str, Any]], *, cosine: bool) -> float:
    """Return the largest difference between two lists of outputs: absolute, or 1 - cosine of each array.

    Raises ValueError when they differ in number, names or shape; a shape tells how many tokens each side saw.
    """
    if len(expected) != len(got):
        raise ValueError(f"{len(got)} answers to {len(expected)} inputs")
    largest = 0.0
    for number, (ours, theirs) in enumerate(zip(expected, got, strict=True)):
        if set(ours) != set(theirs):
            raise ValueError(f"outputs {', '.join(theirs)}, expected {', '.join(ours)}")
        for name, array in ours.items():
            other = np.asarray(theirs[name], dtype=np.float64)
            mine = array.astype(np.float64)
            if mine.shape != other.shape:
                raise ValueError(f"input {number}: {name} has shape {other.shape}, expected {mine.shape}")
            if cosine:
                value = 1 - float(mine @ other / (np.linalg.norm(mine) * np.linalg.norm(other)))
            else:
                value = float(np.abs(mine - other).max())
            largest = max(largest, value) if np.isfinite(value) else float("inf")
    return largest


def compare(tool: Tool, case: Case, answer: Mapping[str, Any], versions: Mapping[str, str | None]) -> Result:
    """Judge one tool's answers to one case."""
    cosine = tool.pins.endswith(".json") and case.task == "feature-extraction"
    limit = OTHER_RUNTIME["int8" if "quantized" in case.file else "fp32"] if cosine else SAME_FILE
    runtime = versions.get("onnxruntime") or versions.get("onnxruntime-node") or ""
    value, problem = None, str(answer.get("error", ""))
    if not problem:
        expected, labels = reference(case)
        if least_contrast(expected) < 100 * limit:
            raise RuntimeError(f"{case.folder}: the texts' answers are too alike for a limit of {limit}")
        try:
            value = largest_difference(expected, answer["outputs"], cosine=cosine)
        except ValueError as error:
            problem = str(error)
        if value is not None and value > limit:
            problem = f"larger than {limit:g}"
        elif labels and "labels" in answer and case.task.endswith("classification") and answer["labels"] != labels:
            problem = f"labels {answer['labels']}, expected {labels}"
    return Result(
        tool=tool.name,
        version=versions.get(tool.package) or "",
        case=case,
        loaded=str(answer.get("loaded", "")),
        unit="1 - cosine" if cosine else "absolute",
        limit=limit,
        value=value if value is not None and np.isfinite(value) else None,
        state="FAILED" if problem else "OK",
        problem=problem,
        runtime=runtime,
    )


def check(tool: Tool) -> Iterator[Result]:
    """Make a tool's environment, run its script over its cases, and judge the answers."""
    name = f"{Path(tool.script).stem}-{Path(tool.pins).stem}"
    plan = WORK / f"{name}.json"
    plan.write_text(json.dumps([case.to_json() for case in tool.cases]), encoding="utf-8")
    try:
        command = make_environment(tool.pins)
    except RuntimeError as error:
        yield from (Result(tool.name, "", case, "", "", 0, None, "not run", str(error)) for case in tool.cases)
        return
    script = HERE / tool.script
    if tool.pins.endswith(".json"):
        # Node looks for packages beside the script.
        script = Path(shutil.copy(script, WORK / "environments" / Path(tool.pins).stem))
    try:
        said = json.loads(run_quietly([*command, str(script), str(plan)], name, CHECK_SECONDS).splitlines()[-1])
    except (RuntimeError, ValueError, IndexError) as error:
        yield from (Result(tool.name, "", case, "", "", 0, None, "FAILED", str(error)) for case in tool.cases)
        return
    answers = {answer["case"]: answer for answer in said["results"]}
    for case in tool.cases:
        yield compare(tool, case, answers.get(case.folder, {"error": "no answer"}), said["versions"])


def row(result: Result) -> Row:
    """Return a result as a row; one without a number counts as a check without an answer."""
    how = {"folder": result.case.folder, "file": result.case.file, "task": result.case.task, "state": result.state}
    system = f"{result.tool} {result.version}".strip()
    if result.value is None:
        return Row("checks without an answer", 1.0, "checks", system, how=how, machine=machine.describe())
    how |= {"loaded": result.loaded, "limit": result.limit, "onnxruntime": result.runtime}
    how["texts"] = len(result.case.inputs)
    return Row(
        "largest difference to effllm",
        result.value,
        result.unit,
        system,
        n=len(result.case.inputs),
        how=how,
        machine=machine.describe(),
    )


def table(results: Sequence[Result]) -> str:
    """Return the results as a table of plain text."""
    lines = [("tool", "version", "folder", "loaded", "largest difference", "limit", "result")]
    for r in results:
        value = "-" if r.value is None else f"{r.value:.1e} {r.unit}"
        state = f"{r.state}: {r.problem.splitlines()[0][:200]}" if r.problem else r.state
        lines.append((r.tool, r.version, r.case.folder, r.loaded, value, f"{r.limit:g}", state))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=True)), line[-1]])
        for line in lines
    )


def say(text: str) -> None:
    """Tell what is being done, on stderr."""
    print(f"· {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Run the checks; return 0 when each of them is OK."""
    parser = argparse.ArgumentParser(description="Load effllm's folders in other tools and compare the answers.")
    parser.add_argument("--only", choices=[tool.name for tool in TOOLS], help="check one tool and write no rows")
    parser.add_argument("--keep-folders", action="store_true", help="use the folders of an earlier run")
    options = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    if not options.keep_folders or not (WORK / "folders").is_dir():
        make_folders()
    tools = [tool for tool in TOOLS if options.only in {None, tool.name}]
    results = [result for tool in tools for result in check(tool)]
    print(table(results))
    if options.only is None:
        ROWS.parent.mkdir(parents=True, exist_ok=True)
        write_rows(ROWS, map(row, results))
    bad = [result for result in results if result.state != "OK"]
    print(f"{len(results) - len(bad)} of {len(results)} checks are OK")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
