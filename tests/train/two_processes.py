"""Train each task's head, and the masked-LM, for a few steps and write the traces; run alone or under torchrun.

torchrun --nproc-per-node 2 tests/train/two_processes.py MODELS TOKENS OUT MASKED_LM
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from effllm.train.finetune import finetune
from effllm.train.pretrain import pretrain
from effllm.train.settings import FinetuneSettings, PretrainSettings

STEPS = 3


def main(models: Path, tokens: Path, out: Path, masked_lm: Path) -> None:
    """Write `OUT/ARCHITECTURE-TASK.json` and `OUT/pretrain-….json`: loss and gradient norm of each step."""
    out.mkdir(parents=True, exist_ok=True)
    for folder in sorted(path for path in models.iterdir() if path.is_dir()):
        task = folder.name.split("--")[1]
        for pass_tokens in (64, 10_000):
            settings = FinetuneSettings(
                steps=STEPS, batch_size=8, dropout=0.1, pass_tokens=pass_tokens, learning_rate=1e-3
            )
            steps = finetune(
                folder,
                out / f"{folder.name}-model",
                task=task.removesuffix("+sets"),
                train=models / f"{task}.jsonl",
                settings=settings,
                force=True,
            )
            write(out / f"{folder.name}-{pass_tokens}.json", [step.record for step in steps])
    for model in ("tiny", str(masked_lm)):
        for accumulate in (1, 2):
            settings = PretrainSettings(
                model=model, steps=STEPS, batch_size=16, max_length=32, accumulate=accumulate, eval_limit=4
            )
            name = f"pretrain-{Path(model).name}-{accumulate}"
            write(out / f"{name}.json", list(pretrain(tokens, out / name, settings, force=True)))


def write(file: Path, records: list) -> None:
    """Write loss and gradient norm of each record."""
    file.write_text(json.dumps([[r.loss, r.gradient_norm] for r in records]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
