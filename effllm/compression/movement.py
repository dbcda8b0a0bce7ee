"""movement: the weights that training moves towards zero become zero.

Written from Sanh et al. 2020, "Movement pruning: adaptive sparsity by fine-tuning". Every weight has a score S that is
learned with it. The layer computes with W ⊙ M; the gradient passes the mask straight through, ∂L/∂S = ∂L/∂(W ⊙ M) ⊙ W
(section 4), so a score grows while its weight moves away from zero.

- top-k: M keeps the largest scores, fewer along the cubic curve
- soft: M keeps the scores whose sigmoid is above a threshold, and a penalty λ · mean of the sigmoids pulls them down,
  λ rising along the same curve (soft movement pruning); the sparsity is what comes of it

The paper starts scores at zero and models before they are fine-tuned. A model that has been moves hardly, so that its
first scores would be noise: here top-k scores start at the weights' magnitudes. Adam moves both at one rate, so that a
score is the magnitude that its weight would have come to, which is the paper's movement up to where it starts.

Masks are chosen anew at each of the prunings from all weights: one that was out can return. After the last, they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook

from effllm.compression.gradual import Gradual, cubic, prune_while_training
from effllm.compression.layers import linears, replace_linear
from effllm.compression.masks import Pattern, check_pattern, set_masks
from effllm.compression.method import Changed, Stage, WeightsJob
from effllm.errors import SettingError
from effllm.hf import SparseLinear

if TYPE_CHECKING:
    from effllm.exporters.source import Source


Start = Literal["magnitude", "zero"]


class MovementLinear(nn.Linear):
    """A linear layer under movement pruning: `mask` is what it computes with, `free` what an earlier mask allows."""

    scores: nn.Parameter
    mask: torch.Tensor
    free: torch.Tensor

    @classmethod
    def of(cls, linear: nn.Linear, *, start: Start = "zero") -> MovementLinear:
        """Return a layer with the parameters of `linear` and scores that start at its weights' magnitudes, or at 0."""
        with torch.device("meta"):
            moving = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        moving.weight = linear.weight
        moving.register_parameter("bias", linear.bias)
        weight = linear.weight.detach()
        moving.scores = nn.Parameter(weight.abs() if start == "magnitude" else torch.zeros_like(weight))
        everything = torch.ones_like(linear.weight, dtype=torch.bool)
        free = linear.mask if isinstance(linear, SparseLinear) else everything
        moving.register_buffer("free", free, persistent=False)
        moving.register_buffer("mask", free, persistent=False)
        return moving.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """Apply the masked layer to (…, columns)."""
        return functional.linear(input, StraightThrough.apply(self.weight, self.scores, self.mask), self.bias)

    def plain(self) -> nn.Linear:
        """Return a linear layer with this one's parameters."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)


class StraightThrough(torch.autograd.Function):
    """W ⊙ M, whose gradient with regard to the scores ignores how M came from them."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the masked weight."""
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return the gradients of weight and scores."""
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


@dataclass(frozen=True)
class Movement(Gradual):
    """Unstructured or n:m pruning by where training moves the weights."""

    name: ClassVar[str] = "movement"
    summary: ClassVar[str] = "sets to zero the weights that training moves there; needs --train, labels are optional"
    stage: ClassVar[Stage] = Stage.SPARSE
    identity: ClassVar[Mapping[str, Any]] = {}

    selection: Literal["top-k", "soft"] = field(default="top-k", metadata={"help": "keep a share, or what is worth it"})
    sparsity: float = field(default=0.5, metadata={"help": "top-k: share of the weights that become zero"})
    pattern: Literal["layer", "row", "global", "2:4", "4:8"] = field(
        default="layer", metadata={"help": "top-k: within what weights compete: a layer, a row, all, or n of each m"}
    )
    start: Start = field(default="magnitude", metadata={"help": "top-k: where the scores start"})
    penalty: float = field(default=100.0, metadata={"help": "soft: weight of the scores' mean sigmoid, at its highest"})
    threshold: float = field(default=0.1, metadata={"help": "soft: weights whose score has a lower sigmoid go"})
    score_rate: float = field(default=0.01, metadata={"help": "soft: how much of a score changes in a step, at most"})
    prunings: int = field(kw_only=True, default=100, metadata={"help": "how often the masks are chosen anew"})
    epochs: float = field(kw_only=True, default=3.0, metadata={"help": "passes over the training texts"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self.name, self.pattern, self.sparsity)
        if not (self.epochs > 0 and self.learning_rate > 0):
            raise SettingError("movement: scores are learned; epochs and learning_rate must be above 0")
        if self.selection == "soft" and (self.sparsity, self.pattern) != (0.5, "layer"):
            raise SettingError(
                "movement: with selection=soft the sparsity comes of penalty; leave sparsity and pattern"
            )
        if not (self.penalty >= 0 and 0 < self.threshold < 0.5 and self.score_rate > 0):
            raise SettingError("movement: penalty must be at least 0, threshold between 0 and 0.5, score_rate above 0")

    def check(self, source: Source) -> None:
        """Raise SettingError where the pattern's groups do not divide a layer's columns."""
        Pattern(self.pattern).check(linears(source.model))

    def apply(self, job: WeightsJob) -> Changed:
        """Learn weights and scores together, then set the masks."""
        start: Start = "zero" if self.selection == "soft" else self.start
        layers = {name: MovementLinear.of(linear, start=start) for name, linear in linears(job.model).items()}
        for name, layer in layers.items():
            replace_linear(job.model, name, layer)
        reached = 0.0

        def prune(progress: float) -> Changed:
            nonlocal reached
            reached = progress
            for name, mask in self._masks(layers, progress).items():
                layers[name].mask = mask
            return Changed()

        def pull() -> float:
            return cubic(reached, self.penalty) if self.selection == "soft" else 0.0

        with penalised(layers, pull, self._scale):
            trained = prune_while_training(job, self, prune)
        for name, layer in layers.items():
            replace_linear(job.model, name, layer.plain())
        changed = set_masks(job.model, {name: layer.mask for name, layer in layers.items()})
        return Changed(changed.details | trained.details, changed.notes)

    @property
    def _scale(self) -> float:
        """What a score is, as a multiple of its parameter.

        Adam's steps are about the learning rate whatever the gradient's scale, so that scores change by `score_rate`.
        """
        return self.score_rate / self.learning_rate

    def _masks(self, layers: Mapping[str, MovementLinear], progress: float) -> dict[str, torch.Tensor]:
        scores = {name: layer.scores.detach() for name, layer in layers.items()}
        if self.selection == "soft":
            masks = {name: torch.sigmoid(self._scale * score) > self.threshold for name, score in scores.items()}
        else:
            allowed = {name: score.masked_fill(~layers[name].free, -torch.inf) for name, score in scores.items()}
            masks = Pattern(self.pattern).keep(allowed, cubic(progress, self.sparsity))
        return {name: mask & layers[name].free for name, mask in masks.items()}


@contextmanager
def penalised(layers: Mapping[str, MovementLinear], weight: Callable[[], float], scale: float) -> Iterator[None]:
    """Add, inside the block, the gradient of weight() · mean of sigmoid(scale · parameter) to each step's."""
    count = sum(layer.scores.numel() for layer in layers.values())

    def add(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for layer in layers.values():
            if layer.scores.grad is not None and weight() > 0:
                share = torch.sigmoid(scale * layer.scores.detach())
                layer.scores.grad.add_(share * (1 - share), alpha=weight() / count)

    handle = register_optimizer_step_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()
