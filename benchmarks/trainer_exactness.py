"""Whether the loss and the gradient of a step depend on how its batch is split: the Hugging Face Trainer, and effllm.

    python benchmarks/trainer_exactness.py

The same 16 sequences with uneven masks or labels, one step, learning rate 0, no dropout, fp32: as one batch, in four
accumulation steps, and each of these on two processes (gloo). What must come out is always the loss and the gradient
norm of the one batch. Writes `results/trainer_exactness.jsonl` with the factors by which each is off. Random weights;
one transformers version; other heads than the three shown were not run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator

from effllm.errors import EffllmError
from effllm.rows import Row, write_rows
from effllm.train.loop import Loop, MicroBatch
from effllm.train.settings import LoopSettings

RESULTS = Path(__file__).parent / "results" / "trainer_exactness.jsonl"
EXAMPLES, LENGTH, VOCABULARY = 16, 32, 200
MODELS = ("BertForMaskedLM", "ModernBertForMaskedLM", "BertForSequenceClassification")
SPLITS = ((1, 1), (1, 4), (2, 1), (2, 4))
"""(processes, accumulation steps)."""


def build(name: str) -> transformers.PreTrainedModel:
    """Return a small random model without dropout."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 128, "max_position_embeddings": 64}
    if name.startswith("Modern"):
        special = {"cls_token_id": 2, "sep_token_id": 3, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        return transformers.ModernBertForMaskedLM._from_config(
            transformers.ModernBertConfig(**shape, **special), attn_implementation="eager"
        )
    config = transformers.BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return getattr(transformers, name)(config)


def examples(name: str) -> list[dict[str, Any]]:
    """Return the same examples for every run: full rows, of which example i has i + 1 masked tokens."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(EXAMPLES):
        ids = rng.integers(5, VOCABULARY, LENGTH)
        labels = np.full(LENGTH, -100)
        chosen = rng.permutation(LENGTH)[: index + 1]
        labels[chosen] = ids[chosen]
        ids = np.where(labels >= 0, 4, ids)
        target = index % 2 if name.endswith("Classification") else labels
        made.append({"input_ids": ids, "attention_mask": np.ones(LENGTH, dtype=np.int64), "labels": target})
    return made


def trainer_step(name: str, processes: int, accumulate: int, out: str) -> dict[str, float]:
    """Return what the Trainer logs for the step."""
    arguments = transformers.TrainingArguments(
        output_dir=out,
        max_steps=1,
        per_device_train_batch_size=EXAMPLES // processes // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.0,
        max_grad_norm=1e9,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    trainer = transformers.Trainer(model=build(name), args=arguments, train_dataset=examples(name))
    trainer.train()
    first = trainer.state.log_history[0]
    return {"loss": float(first["loss"]), "gradient norm": float(first["grad_norm"])}


def effllm_step(name: str, processes: int, accumulate: int, out: str) -> dict[str, float]:
    """Return what effllm's loop reports for the step."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build(name)

        def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
            logits = self.model(**inputs).logits.flatten(0, -2)
            return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")[None]

    class Source:
        def micro_batches(self, step: int, rank: int, world: int) -> list[MicroBatch]:
            made, parts = examples(name), world * accumulate
            slices = [made[EXAMPLES * k // parts : EXAMPLES * (k + 1) // parts] for k in range(parts)]
            own = slices[rank * accumulate : (rank + 1) * accumulate]
            stacked = [{key: np.stack([np.asarray(e[key]) for e in part]) for key in part[0]} for part in own]
            return [MicroBatch(a, np.array([float((a["labels"] >= 0).sum())]), 0, 0, len(a["labels"])) for a in stacked]

    accelerator = Accelerator(cpu=True)
    module = Module()
    model, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.0))
    settings = LoopSettings(steps=1, batch_size=EXAMPLES, accumulate=accumulate, clip=1e9, learning_rate=1e-9)
    record = next(iter(Loop(accelerator, model, optimizer, Source(), settings, ("loss",)).run()))
    return {"loss": record.loss, "gradient norm": record.gradient_norm}


STEPS = {"Hugging Face Trainer": trainer_step, "effllm": effllm_step}


def one(system: str, name: str, processes: str, accumulate: str, file: str) -> None:
    """Run one step and write what was found; the entry point of each process."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as out:
        found = STEPS[system](name, int(processes), int(accumulate), out)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(file).write_text(json.dumps(found))


def main() -> None:
    """Run every split of every model and write the rows."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in MODELS:
            whole: dict[str, float] = {}
            for system in ("effllm", "Hugging Face Trainer"):
                for processes, accumulate in SPLITS:
                    file = Path(scratch) / "found.json"
                    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if processes == 2 else []
                    command = [
                        sys.executable,
                        *launch,
                        __file__,
                        system,
                        name,
                        str(processes),
                        str(accumulate),
                        str(file),
                    ]
                    result = subprocess.run(command, capture_output=True, text=True, check=False)
                    if result.returncode:
                        raise EffllmError(result.stderr[-2000:])
                    found = json.loads(file.read_text())
                    whole = whole or found
                    how = {"model": name, "processes": processes, "accumulation": accumulate}
                    for metric, value in found.items():
                        rows.append(Row(metric, value, "", system, how=how))
                        rows.append(Row(f"{metric} factor", value / whole[metric], "x", system, how=how))
                        split = f"{name:30} {system:22} {processes} x {accumulate}"
                        print(f"{split}  {metric:14} {value:9.4f} {value / whole[metric]:.4f}", flush=True)
    write_rows(RESULTS, rows)


if __name__ == "__main__":
    one(*sys.argv[1:]) if len(sys.argv) > 1 else main()
