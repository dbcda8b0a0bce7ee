"""Compress a model and use the result, from Python. Pass a folder or hub id, or take the packaged MiniLM."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import effllm
from effllm.data.packaged import minilm


def main(model: str | Path, out: Path) -> None:
    """Make an int8 variant of `model` in `out`, then ask it and its dense parent the same question."""
    variant = effllm.compress(model, out, method=effllm.Int8(activations="static", calibration=64))
    print(f"{variant.path.name}: {variant.task}, batch dependent: {variant.batch_dependent}")
    for row in variant.rows:
        print(f"  {row.system:12} {row.metric:20} {row.value:.4g} {row.unit}")

    small = effllm.open(out)
    dense = effllm.open(model, engine="torch")
    if small.task.name in {"feature-extraction", "sentence-similarity"}:
        texts = ["A cat sits on the mat.", "A kitten rests on a rug."]
        print("similarity, dense and int8:", *(float(a @ b) for a, b in (dense.embed(texts), small.embed(texts))))
    else:
        examples = small.task.unlabelled(["A cat sits on the mat.", "It was a [MASK] day."], small.head)
        for ours, theirs in zip(small.answers(examples), dense.answers(examples), strict=True):
            print("dense:", theirs.value, "\nint8:", ours.value)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1] if len(sys.argv) > 1 else minilm(), Path(scratch) / "small")
