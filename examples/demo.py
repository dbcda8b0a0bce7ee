"""The main job on a real model: all-MiniLM-L6-v2 to int8, with the proof. Takes a few minutes on two cores.

Needs the extra `demo`, which brings the model. Calibration and comparison use English text that ships with Python.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from effllm.data.packaged import minilm

OUT = Path("demo-out")


def run(*arguments: str) -> None:
    """Run an effllm command, showing it first; stop when it fails."""
    print(f"\n$ effllm {' '.join(arguments)}\n", flush=True)
    code = subprocess.run([sys.executable, "-m", "effllm", *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


def main() -> None:
    """Compress, compare, report."""
    model = OUT / "all-MiniLM-L6-v2"
    OUT.mkdir(exist_ok=True)
    if not model.exists():
        shutil.copytree(minilm(), model)
    small, rows, page = str(OUT / "minilm-int8"), str(OUT / "rows.jsonl"), str(OUT / "report.html")
    run("compress", str(model), "--method", "int8", "--out", small, "--force")
    run("bench", str(model), small, "--rounds", "6", "--tokens", "16,64", "--json", rows, "--html", page)
    run("predict", small, "--pair", "How do I reset my password?", "I forgot my login credentials.")
    print(f"""
The model is in {small}; the report, with plots, in {page}.
Next, with a model and data of your own:

  effllm compress YOUR_MODEL --method int8 --calib texts.txt --dev dev.jsonl --out small
  effllm bench YOUR_MODEL small --data dev.jsonl --html report.html
  effllm show small
""")


if __name__ == "__main__":
    main()
