"""Whether int8 keeps all-MiniLM-L6-v2's quality on STS-B, and how much smaller and faster it is.

    python benchmarks/stsb_int8.py DIR

DIR holds the English STS-B as `train.jsonl.xz`, `dev.jsonl` and `test.jsonl` with `text`, `text_pair` and `score`
(0–5). Compresses the packaged model with the command line (500 calibration examples from train, gate on dev), noting
time and peak memory, then measures all on test in one interleaved run, one thread. Writes `results/stsb_int8.jsonl`.

Mean pooling, at most 256 tokens, as the model's own card says; its published figure on test is 0.8203. One model, one
processor, one run; other encoders and other machines are not measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from effllm import machine
from effllm.data.packaged import minilm
from effllm.lineup import BenchSettings, bench
from effllm.rows import Row, write_rows

RESULTS = Path(__file__).parent / "results" / "stsb_int8.jsonl"
METHODS = {
    "int8": "int8",
    "int8 static": "int8:activations=static",
    "int8 dynamic": "int8:activations=dynamic",
}


def compress(model: Path, method: str, data: Path, out: Path) -> tuple[float, int]:
    """Run `effllm compress` in a process of its own; return its seconds and its peak memory in bytes."""
    command = [sys.executable, "-m", "effllm", "compress", str(model), "--method", method, "--out", str(out)]
    command += [
        "--task",
        "sentence-similarity",
        "--calib",
        str(data / "train.jsonl.xz"),
        "--dev",
        str(data / "dev.jsonl"),
    ]
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DIR")
    data = parser.parse_args().data
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "all-MiniLM-L6-v2"
        shutil.copytree(minilm(), model)
        folders = []
        for name, method in METHODS.items():
            folders.append(Path(scratch) / name)
            seconds, peak = compress(model, method, data, folders[-1])
            how = {"command": f"effllm compress --method {method}", "calibration texts": 500}
            where = machine.describe()
            rows.append(Row("compress time", seconds, "s", name, how=how, machine=where))
            rows.append(Row("compress peak memory", float(peak), "bytes", name, how=how, machine=where))
        settings = BenchSettings(
            data=data / "test.jsonl",
            task="sentence-similarity",
            threads=1,
            tokens=(16, 64, 128, 256),
            batch_sizes=(1, 16),
            rounds=15,
        )
        rows += bench([model, *folders], settings)
    write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
