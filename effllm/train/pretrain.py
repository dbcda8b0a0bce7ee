"""Pre-training: from a prepared folder of tokens to a masked-LM, resumable bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effllm.data.masking import EVALUATION, Masking
from effllm.data.packing import PackedBatch, PretrainStream, evaluation_batches
from effllm.data.samples import Samples
from effllm.data.store import TokenStore
from effllm.data.vocabulary import Vocabulary
from effllm.errors import SettingError
from effllm.folder import tokenizer_files
from effllm.rows import Row
from effllm.settings import to_json
from effllm.train.attention import implementation, sequence_index
from effllm.train.branch import Trunk, origin
from effllm.train.checkpoint import CHECKPOINTS, Progress
from effllm.train.devices import describe
from effllm.train.lock import holding, take
from effllm.train.loop import MicroBatch, StepRecord, to_tensors
from effllm.train.models import build_model
from effllm.train.objectives import MaskedLanguageModel
from effllm.train.run import Evaluation, Run, make_accelerator, open_run, train
from effllm.train.settings import PretrainSettings
from effllm.variant import check_whole, weights_digest


@dataclass
class PretrainSource:
    """The batches of a pre-training run; opens the token store when first used, so that workers open their own."""

    data: Path
    settings: PretrainSettings
    _stream: PretrainStream | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "settings": self.settings, "_stream": None}

    def open(self) -> PretrainStream:
        """Open the token store. Raises SettingError or ArtifactError where it does not fit the settings."""
        if self._stream is None:
            store, vocabulary = TokenStore.open(self.data, "train"), Vocabulary.read(self.data / "tokenizer")
            s = self.settings
            samples = Samples(store, vocabulary, s.max_length, s.objective)
            masking = Masking(s.masking, s.mask_rate, s.mask_share, s.random_share)
            self._stream = PretrainStream(samples, vocabulary, masking, s.seed, s.batch_size, self.rate_at)
        return self._stream

    def micro_batches(self, step: int, rank: int, world: int) -> list[MicroBatch]:
        """Return this process's micro-batches of a step; the parts of all processes make up the batch in order."""
        stream, each, pairs = self.open(), self.settings.accumulate, self.settings.objective != "mlm"
        parts = world * each
        return [micro_batch(stream.batch(step, rank * each + i, parts), pairs=pairs) for i in range(each)]

    def rate_at(self, step: int) -> float:
        """Return the mask rate of a step: linear from start to end."""
        s = self.settings
        end = s.mask_rate_end or s.mask_rate
        return s.mask_rate + (end - s.mask_rate) * (min(step, s.steps) / s.steps if s.steps else 0.0)


def micro_batch(batch: PackedBatch, *, pairs: bool = False) -> MicroBatch:
    """Return a packed batch with the counts of its losses: masked tokens and, with `pairs`, labelled pairs."""
    arrays = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "type_ids": batch.type_ids,
        "sequence_index": sequence_index(batch.lengths),
        "masked_positions": batch.masked_positions,
        "labels": batch.labels,
        "pair_labels": batch.pair_labels,
        "dropout_keys": batch.dropout_keys,
    }
    counts = [len(batch.labels), *([int((batch.pair_labels >= 0).sum())] if pairs else [])]
    return MicroBatch(arrays, np.array(counts, np.float64), len(batch.input_ids), len(batch.labels), len(batch.lengths))


def pretrain(
    data: str | Path,
    out: str | Path,
    settings: PretrainSettings,
    *,
    trunk: Trunk | None = None,
    resume: bool = False,
    force: bool = False,
) -> Iterator[StepRecord]:
    """Pre-train on a folder that `prepare` wrote; yields a record after each step.

    Writes checkpoints and `log.jsonl` to `out`; `out/last` and `out/best` are model folders. With `resume` an
    interrupted run goes on from its newest whole checkpoint, with the numbers that the uninterrupted run has. With
    `trunk` it starts where that checkpoint stands, its weights, optimiser and place in the data; `settings` are then
    those of `trunk.decaying`. Raises SettingError, ArtifactError or Unsupported for bad input before any work,
    TrainingStopped when a loss is not finite.
    """
    folder, target = Path(data), Path(out)
    store = TokenStore.open(folder, "train")
    vocabulary = Vocabulary.read(folder / "tokenizer")
    source = PretrainSource(folder, settings)
    source.open()
    for beginning in (trunk.checkpoint.path if trunk else None, Path(settings.model)):
        if beginning and beginning.exists() and beginning.resolve().is_relative_to(target.resolve()):
            raise SettingError(f"the run starts from {beginning}, which lies in --out {target}; choose another --out")
    lock = take(target)
    accelerator = make_accelerator(settings)
    if accelerator.is_main_process:
        check_whole(folder)
    identity = {"verb": "pretrain", "data": store.fingerprint, **settings.deciding()}
    start = None
    if resume and not trunk:
        identity |= origin(target)
    if trunk:
        identity["branch"] = weights_digest(trunk.checkpoint.path)
        start = trunk.checkpoint, Progress(trunk.progress.step, trunk.progress.elapsed_s, None, None, None)
        if trunk.checkpoint.manifest["parent"]["data"] != store.fingerprint:
            raise SettingError(
                f"{trunk.checkpoint.path} was not trained on {folder}; a branch keeps the data of its run"
            )
    begun = resume and any((target / CHECKPOINTS).glob("step-*"))
    if not begun:  # before there is a folder
        model = _built(trunk.checkpoint.path if trunk else settings.model, vocabulary, settings)
    checkpoint = open_run(target, identity, accelerator, resume=resume, force=force)
    if checkpoint:
        model = _built(checkpoint[0].path, vocabulary, settings)
    before = checkpoint[0].manifest["steps"][:-1] if checkpoint else trunk.checkpoint.manifest["steps"] if trunk else []
    checkpoint = checkpoint or start
    step = {"verb": "pretrain", "settings": to_json(settings), "attention": implementation()}
    run = Run(
        folder=target,
        module=MaskedLanguageModel(model, settings.objective),
        source=source,
        settings=settings,
        evaluate=DevLoss(folder, vocabulary, settings),
        eval_every=settings.eval_every,
        companions=tokenizer_files(folder / "tokenizer"),
        manifest={
            "task": "fill-mask",
            "parent": {"name": settings.model, "data": store.fingerprint},
            "steps": [*before, step],
            "max_length": settings.max_length,
        },
    )
    return holding(lock, train(run, accelerator, checkpoint))


def _built(model: str | Path, vocabulary: Vocabulary, settings: PretrainSettings) -> Any:
    return build_model(str(model), vocabulary, settings.max_length, settings.objective, settings.seed)


@dataclass(frozen=True)
class DevLoss:
    """Evaluates on the dev split: always 15 % of the tokens masked, with one seed, so that runs compare."""

    data: Path
    vocabulary: Vocabulary
    settings: PretrainSettings

    def __call__(self, model: torch.nn.Module, device: torch.device) -> Evaluation | None:
        """Return mean loss and accuracy on the masked tokens of at most `eval_limit` sequences; None without dev."""
        store = TokenStore.open(self.data, "dev")
        if len(store.tokens) == 0:
            return None
        samples = Samples(store, self.vocabulary, self.settings.max_length, "mlm")
        limit = self.settings.eval_limit or None
        total, right, count = 0.0, 0.0, 0
        with torch.inference_mode():
            for batch in evaluation_batches(samples, self.vocabulary, limit=limit):
                arrays = micro_batch(batch).arrays
                sums = model(**to_tensors(arrays, device)).tolist()
                total, right = total + sums[0], right + sums[-1]
                count += len(batch.labels)
        how = {"mask rate": EVALUATION.rate, "sequences": min(len(samples), limit or len(samples)), "data": "dev"}
        values = {"masked loss": (total / count, "nats"), "masked accuracy": (right / count, "share")}
        on = describe(device)
        rows = [Row(name, value, unit, "model", count, how=how, machine=on) for name, (value, unit) in values.items()]
        return Evaluation(-total / count, rows)
