"""layers: whole layers go; the others stay as they are.

Evenly spaced layers, the first and the last among them, are those that DistilBERT starts from (Sanh et al. 2019). The
others are chosen by what a layer changes: the cosine between its input and its output (block influence, Men et al.
2024, "ShortGPT"), or the Fisher information of a mask variable m in x + m (layer(x) - x), as Kwon et al. 2022 have it
for heads and neurons. The first layer always stays: it alone reads embeddings, and in ModernBERT it has no norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from effllm.compression.calibrate import feeds
from effllm.compression.fisher import per_example_gradients
from effllm.compression.layers import layer_list
from effllm.compression.method import Changed, Stage, WeightsJob, check_calibration
from effllm.errors import SettingError

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class Layers:
    """Fewer layers."""

    name: ClassVar[str] = "layers"
    summary: ClassVar[str] = "removes whole layers; a plain config, and faster on every engine"
    stage: ClassVar[Stage] = Stage.LAYERS
    identity: ClassVar[Mapping[str, Any]] = {}

    keep: int = field(default=0, metadata={"help": "how many layers stay; 0 = as drop says, half where that is 0 too"})
    drop: int = field(default=0, metadata={"help": "how many layers go; 0 = as keep says"})
    by: Literal["even", "cosine", "fisher"] = field(
        default="even", metadata={"help": "evenly spaced, or those that change the hidden states or the answers most"}
    )
    calibration: int = field(default=128, metadata={"help": "how many calibration texts to use"})
    seed: int = field(default=0, metadata={"help": "chooses the calibration texts and the drawn answers"})

    def __post_init__(self) -> None:
        if min(self.keep, self.drop) < 0 or (self.keep and self.drop):
            raise SettingError(f"layers: give one of keep and drop, 1 or more, got keep={self.keep}, drop={self.drop}")
        check_calibration(self.name, self.calibration)

    @property
    def calibrates(self) -> bool:
        """Whether texts decide which layers stay."""
        return self.by != "even"

    def check(self, source: Source) -> None:
        """Raise SettingError when the model does not have as many layers as should stay or go."""
        self._kept(len(layer_list(source.model)[1]))

    def apply(self, job: WeightsJob) -> Changed:
        """Choose the layers and drop the others."""
        modules = layer_list(job.model)[1]
        count = self._kept(len(modules))
        if self.by == "even" or count == len(modules):
            kept, scores = evenly_spaced(len(modules), count), None
        else:
            scores = self._changes(job, modules)
            others = sorted(range(1, len(modules)), key=lambda i: -float(scores[i]))
            kept = sorted([0, *others[: count - 1]])
        keep_layers(job.model, kept)
        details = {"kept": kept, "by": self.by}
        return Changed(details if scores is None else details | {"scores": scores.tolist()})

    def _kept(self, count: int) -> int:
        kept = self.keep or count - (self.drop or count // 2)
        if not 1 <= kept <= count:
            raise SettingError(f"layers: of {count} layers at least 1 must stay, got {kept}")
        return kept

    def _changes(self, job: WeightsJob, modules: nn.ModuleList) -> torch.Tensor:
        return hidden_changes(job, modules) if self.by == "cosine" else mask_information(job, modules, self.seed)


def evenly_spaced(count: int, kept: int) -> list[int]:
    """Return `kept` of `count` layers at equal distances, from the first to the last."""
    return [round(i * (count - 1) / max(1, kept - 1)) for i in range(kept)]


def hidden_changes(job: WeightsJob, modules: nn.ModuleList) -> torch.Tensor:
    """Return for each layer one minus the mean cosine between its input and its output, over tokens, (layers,)."""
    cosines = torch.zeros(len(modules), dtype=torch.float64)
    encodings = job.encodings()
    with ExitStack() as hooks, torch.no_grad():
        for i, module in enumerate(modules):

            def add(_: nn.Module, args: Any, output: torch.Tensor, i: int = i) -> None:
                cosines[i] += functional.cosine_similarity(args[0], output, dim=-1).double().sum()

            hooks.callback(module.register_forward_hook(add).remove)
        for feed in job.track(feeds(job.model, encodings), "comparing layers", len(encodings)):
            job.model(**feed)
    return 1 - cosines / sum(len(e) for e in encodings)


def mask_information(job: WeightsJob, modules: nn.ModuleList, seed: int) -> torch.Tensor:
    """Return the diagonal Fisher information of each layer's mask variable, (layers,)."""
    masks = [torch.ones((), requires_grad=True) for _ in modules]
    encodings, total = job.encodings(), torch.zeros(len(masks), dtype=torch.float64)
    with ExitStack() as hooks:
        for module, mask in zip(modules, masks, strict=True):

            def blend(_: nn.Module, args: Any, output: torch.Tensor, mask: torch.Tensor = mask) -> torch.Tensor:
                mixed: torch.Tensor = torch.lerp(args[0], output, mask)
                return mixed

            hooks.callback(module.register_forward_hook(blend).remove)
        for gradients in per_example_gradients(
            job.model,
            job.source.task,
            job.source.head,
            encodings,
            masks,
            count=len(encodings),
            seed=seed,
            track=job.track,
            what="Fisher information",
        ):
            total += torch.stack(gradients).double().square()
    return total / len(encodings)


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Keep the layers of the given numbers, ascending, in place, in the model and in its config."""
    name, modules = layer_list(model)
    parent, _, own = name.rpartition(".")
    setattr(model.base_model.get_submodule(parent), own, nn.ModuleList(modules[i] for i in kept))
    for number, index in enumerate(kept):
        for module in modules[index].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        model.config.layer_types = [types[i] for i in kept]
    model.config.num_hidden_layers = len(kept)
