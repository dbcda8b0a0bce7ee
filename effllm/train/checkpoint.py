"""Checkpoints of a run: each a model folder that `from_pretrained` loads, with what training needs to go on.

    RUN/run.json                     the settings and data that decide the run's numbers
    RUN/log.jsonl                    one line per logged step
    RUN/checkpoints/step-00000500/   config, weights, tokenizer, effllm.json, training/optimizer.safetensors, and
                                     training/losses.safetensors where the losses have weights of their own
    RUN/last  RUN/best               links to the newest and to the best checkpoint

A checkpoint is a variant: written whole or not at all, every file with its SHA-256. The newest whole one is resumed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effllm import files
from effllm.errors import ArtifactError, SettingError
from effllm.train.loop import Loop
from effllm.train.optimizers import load_state_tensors, state_tensors
from effllm.train.sharding import load_whole, whole_weights
from effllm.variant import Variant, create, write_manifest

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
OPTIMIZER = Path("training") / "optimizer.safetensors"
LOSSES = Path("training") / "losses.safetensors"
RUN = "run.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stood at a checkpoint. `score`, larger is better, is what `best` goes by; None without evaluation.

    `worse` counts the evaluations since the best one; `first_s` is how long the first step took.
    """

    step: int
    elapsed_s: float
    score: float | None
    best_step: int | None
    best_score: float | None
    worse: int = 0
    first_s: float = 0.0


def start_run(run: Path, identity: Mapping[str, Any], *, resume: bool, force: bool) -> None:
    """Make a run folder, or check that an existing one may be resumed with these settings.

    `identity` is everything that decides the run's numbers. Raises SettingError when the folder exists without
    `resume`, is not a run, or was started with another identity; the message names what differs.
    """
    file = run / RUN
    begun = not _is_new(run)
    if resume and file.is_file():
        _check_identity(file, identity)
        return
    if resume and begun:
        raise SettingError(f"{run} is not a training run (it has no {RUN}); start one without --resume")
    if begun and not (force and file.is_file()):
        hint = "pass --resume to go on or --force to start anew" if file.is_file() else "choose another --out"
        raise SettingError(f"{run} exists; {hint}")
    with writing(run):
        if begun:
            shutil.rmtree(run)
        (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    write_json(file, identity)


def _is_new(run: Path) -> bool:
    """Return whether a folder is missing or empty, or a run's that ended before its `run.json` was written."""
    if not run.is_dir():
        return not run.exists()
    names = {path.name for path in run.iterdir()}
    return names <= {CHECKPOINTS, f"{RUN}{files.PARTIAL}"} and not any((run / CHECKPOINTS).glob("*"))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an OSError of the block an ArtifactError that names what could not be written."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}") from None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as `write_whole` does."""
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises ArtifactError when it cannot be written."""
    with writing(file):
        files.write_whole(file, text)


def _check_identity(file: Path, identity: Mapping[str, Any]) -> None:
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from None
    now = json.loads(json.dumps(identity))
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
        raise SettingError(
            f"the run was started with {key} = {before.get(key)!r}, now it is {now.get(key)!r}{more}; "
            "a resumed run keeps its settings"
        )


def save(
    run: Path, loop: Loop, progress: Progress, write_model: Callable[[Path], None], manifest: Mapping[str, Any]
) -> Path | None:
    """Write the checkpoint of the loop's step and move `last` and `best`; returns its folder on the main process.

    `write_model(folder)` writes config, weights and tokenizer. Every process must call this, as the optimiser's state
    may be spread over them. Raises ArtifactError when the disk is full; the checkpoints before survive. Those of this
    step and later ones, which `newest` left out as damaged, are removed.
    """
    tensors = {OPTIMIZER: state_tensors(loop.optimizer, loop.bare_model), LOSSES: _losses_weights(loop.bare_model)}
    if not loop.accelerator.is_main_process:
        return None
    folder = _folder(run, progress.step)
    with writing(run / CHECKPOINTS):
        _remove_from(run, folder)
    with create(folder, force=True) as staging:
        write_model(staging)
        (staging / OPTIMIZER).parent.mkdir()
        for file, named in tensors.items():
            if named or file == OPTIMIZER:
                save_file({name: tensor.contiguous().cpu() for name, tensor in named.items()}, staging / file)
        write_manifest(staging, {**manifest, "progress": progress.__dict__})
    set_links(run, progress)
    with writing(run / CHECKPOINTS):
        _prune(run, loop.settings.keep, progress.best_step)
    return folder


def set_links(run: Path, progress: Progress) -> None:
    """Point `last` and `best` to the checkpoints that `progress` names; a link whose checkpoint is missing is removed.

    Raises ArtifactError where they cannot be written.
    """
    for name, step in (("last", progress.step), ("best", progress.best_step)):
        folder = _folder(run, step) if step is not None else None
        with writing(run / name):
            if folder and folder.is_dir():
                _link(run / name, folder)
            else:
                (run / name).unlink(missing_ok=True)


def newest(run: Path) -> tuple[Variant, Progress] | None:
    """Return the newest whole checkpoint of a run; a damaged one is named in a warning, and the one before is taken.

    Raises ArtifactError when there are checkpoints but none is whole.
    """
    damaged = []
    for folder in sorted((run / CHECKPOINTS).glob("step-*"), reverse=True):
        try:
            variant = Variant.open(folder)
            return variant, Progress(**variant.manifest["progress"])
        except (ArtifactError, TypeError, KeyError) as error:
            damaged.append(folder.name)
            log.warning("checkpoint %s is damaged and is left out: %s", folder.name, error)
    if damaged:
        raise ArtifactError(
            f"{run}: no checkpoint is whole ({', '.join(damaged)} are damaged); start anew with --force"
        )
    return None


def restore(loop: Loop, checkpoint: Variant, progress: Progress) -> None:
    """Put back the losses' own weights, the optimiser's state and the loop's place.

    The model was loaded from the checkpoint's folder.
    """
    if (checkpoint.path / LOSSES).is_file():
        load_whole(loop.bare_model, load_file(checkpoint.path / LOSSES))
    load_state_tensors(loop.optimizer, loop.bare_model, load_file(checkpoint.path / OPTIMIZER))
    loop.step, loop.elapsed_s, loop.first_s = progress.step, progress.elapsed_s, progress.first_s


def _losses_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return by their names what is trained beside the module's `model`; every process must call this."""
    children = ((name, child) for name, child in module.named_children() if name != "model")
    return {f"{name}.{key}": tensor for name, child in children for key, tensor in whole_weights(child).items()}


def _folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:08d}"


def _link(link: Path, folder: Path) -> None:
    partial = link.with_name(f".{link.name}.new")
    partial.unlink(missing_ok=True)
    partial.symlink_to(folder.relative_to(link.parent), target_is_directory=True)
    partial.replace(link)


def _remove_from(run: Path, first: Path) -> None:
    for folder in (run / CHECKPOINTS).glob("step-*"):
        if folder.name >= first.name:
            shutil.rmtree(folder)


def _prune(run: Path, keep: int, best_step: int | None) -> None:
    best = _folder(run, best_step) if best_step is not None else None
    for folder in sorted((run / CHECKPOINTS).glob("step-*"))[:-keep]:
        if folder != best:
            shutil.rmtree(folder)
