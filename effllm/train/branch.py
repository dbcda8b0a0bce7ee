"""Decay branches: a finished model from any stable checkpoint of a run, which itself can go on.

Under `wsd` and `constant` the learning rate between warm-up and decay does not depend on the run's length, so one long
run gives a good model at every length for the price of a short decay (Hu et al. 2024, "MiniCPM"; Hägele et al. 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effllm.errors import ArtifactError, SettingError
from effllm.folder import read_json
from effllm.settings import build
from effllm.train.checkpoint import CHECKPOINTS, RUN, Progress, newest
from effllm.train.schedules import decay_branch, learning_rate_factor
from effllm.train.settings import PretrainSettings
from effllm.variant import Variant


@dataclass(frozen=True)
class Trunk:
    """The checkpoint that a branch starts from, where its run stood there, and the settings of that run."""

    checkpoint: Variant
    progress: Progress
    settings: PretrainSettings

    @classmethod
    def open(cls, path: str | Path) -> Trunk:
        """Open a run's newest checkpoint, or the checkpoint folder that `path` is.

        Raises ArtifactError when there is none, SettingError when its learning rate is not the full one.
        """
        folder = Path(path)
        found = newest(folder) if (folder / CHECKPOINTS).is_dir() else None
        variant = found[0] if found else Variant.open(folder.resolve())
        steps = variant.manifest.get("steps", [])
        if "progress" not in variant.manifest or not steps or steps[-1].get("verb") != "pretrain":
            raise ArtifactError(f"{path} is neither a pre-training run nor one of its checkpoints")
        settings = build(PretrainSettings, steps[-1]["settings"], str(variant.path))
        trunk = cls(variant, Progress(**variant.manifest["progress"]), settings)
        trunk._check_stable()
        return trunk

    def decaying(self, steps: int, free: Mapping[str, Any]) -> PretrainSettings:
        """Return the run's settings with a decay to zero over `steps` from here; `free` are settings to change."""
        total, decay = decay_branch(self.progress.step, steps)
        end: dict[str, Any] = {"steps": total, "seconds": 0.0, "schedule": "wsd", "warmup": 0.0, "decay": decay}
        return dataclasses.replace(self.settings, **end, **free)

    def _check_stable(self) -> None:
        s, p = self.settings, self.progress
        share = (p.elapsed_s - p.first_s) / (s.seconds - p.first_s) if s.seconds else (p.step + 0.5) / s.steps
        factor = learning_rate_factor(s.schedule, share, s.warmup, s.decay)
        if factor != 1.0:
            raise SettingError(
                f"{self.checkpoint.path} cannot be branched: its learning rate is {factor:.3g} of the full one under "
                f"{s.schedule}; take a checkpoint between warm-up and decay of a wsd or constant run"
            )
        if s.mask_rate_end:
            raise SettingError(f"{self.checkpoint.path} cannot be branched: its mask rate follows the run's length")


def origin(run: Path) -> dict[str, Any]:
    """Return what a run's identity holds of its trunk: `branch`, the digest of that checkpoint, or nothing."""
    identity = read_json(run / RUN, {})
    return {"branch": identity["branch"]} if "branch" in identity else {}


def begun(run: Path, steps: int, free: Mapping[str, Any]) -> PretrainSettings | None:
    """Return the settings of a branch of so many steps that has a checkpoint, None where `run` is none.

    It goes on from its own checkpoint, wherever the trunk stands by now and whatever became of it. Raises SettingError
    where it was begun with other steps.
    """
    found = newest(run) if origin(run) else None
    if not found:
        return None
    settings = build(PretrainSettings, found[0].manifest["steps"][-1]["settings"], str(found[0].path))
    own = round(settings.steps * settings.decay)
    if own != steps:
        raise SettingError(f"the branch in {run} was begun with --steps {own}, now it is {steps}")
    return dataclasses.replace(settings, **free)
