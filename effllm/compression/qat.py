"""qat: trains with weights and inputs rounded as a later int8 or int4 will round them, so that it costs less.

Jacob et al. 2018, section 3, written from the paper: the forward pass rounds, the gradient passes straight through the
rounding to the float weights, which are what is left at the end. With 8 bits, weights have a scale per output and
inputs a range per layer, an exponential moving average of what was seen; with 4 bits, weights have a scale and a zero
point per group, over the group's whole range, and inputs stay float, as int4 leaves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from effllm import machine
from effllm.compression.gptq import CODES, check_group_size, check_groups
from effllm.compression.grids import weight_levels
from effllm.compression.layers import linears
from effllm.compression.method import Changed, Method, Stage, WeightsJob
from effllm.compression.recovery import Training, recover
from effllm.errors import SettingError

if TYPE_CHECKING:
    from effllm.exporters.source import Source

PREPARED = {8: ("int8", "llm-int8"), 4: ("int4", "int4-torch")}
"""The methods that a training with so many bits prepares for; llm-int8 rounds inputs more finely, by token."""
MEMORY = 0.99
"""The share that a layer's range keeps of itself at each pass."""


@dataclass(frozen=True)
class Qat(Training):
    """Quantisation-aware fine-tuning: a step before int8 or int4."""

    name: ClassVar[str] = "qat"
    summary: ClassVar[str] = "trains the model for the rounding of a later int8 or int4; needs --train"
    stage: ClassVar[Stage] = Stage.TRAIN
    identity: ClassVar[Mapping[str, Any]] = {}

    bits: int = field(default=8, metadata={"help": "bits of the weights: 8, inputs too, or 4, weights alone in groups"})
    group_size: int = field(default=128, metadata={"help": "with 4 bits: weights along a row that share a scale"})
    symmetric: bool = field(default=False, metadata={"help": "with 4 bits: no zero points, as int4-torch has none"})
    learning_rate: float = field(kw_only=True, default=2e-5, metadata={"help": "peak learning rate"})
    logits: float = field(default=1.0, metadata={"help": "weight of matching the dense model's logits"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in {4, 8}:
            raise SettingError(f"qat: bits must be 8 or 4, got {self.bits}")
        check_group_size(self.name, self.group_size)
        if not self.logits + self.hidden + self.label_weight > 0:
            raise SettingError("qat: one of logits, hidden and label_weight must be above 0")

    def check_later(self, methods: Sequence[Method]) -> None:
        """Raise SettingError where no method quantises afterwards, or one that rounds otherwise than the training."""
        later = next((method for method in methods if method.stage >= Stage.CODES), None)
        if later is None:
            raise SettingError("--method qat prepares for quantisation: let one such as int8 or int4 follow")
        if later.name not in PREPARED[self.bits]:
            fitting = " and ".join(f"bits={bits} for {', '.join(names)}" for bits, names in PREPARED.items())
            raise SettingError(f"qat: bits={self.bits} does not prepare for {later.name}; there is {fitting}")
        for name in ("group_size", "symmetric") if self.bits == 4 else ():
            own, its = getattr(self, name), getattr(later, name, True)  # int4-torch is always symmetric
            if own != its:
                raise SettingError(f"qat: {name}={own} does not prepare for {later.name}, whose {name} is {its}")

    def check(self, source: Source) -> None:
        """Raise SettingError where the groups do not divide a layer's inputs."""
        self._check_groups(source.model)

    def _check_groups(self, model: Any) -> None:
        if self.bits == 4:
            check_groups(self.name, {n: m.in_features for n, m in linears(model).items()}, self.group_size)

    def apply(self, job: WeightsJob) -> Changed:
        """Train in place; the weights are float afterwards."""
        self._check_groups(job.model)
        levels, _ = weight_levels(machine.instruction_set())
        chosen = list(linears(job.model).values())
        rounding: nn.Module = RoundedWeight(levels)
        if self.bits == 4:
            rounding = RoundedWeight(7, self.group_size) if self.symmetric else RoundedGroups(self.group_size)
        with rounded(job.model, chosen, rounding, inputs=self.bits == 8):
            details = recover(job, self)
        return Changed(details)


@contextmanager
def rounded(model: nn.Module, chosen: list[nn.Linear], weights: nn.Module, *, inputs: bool) -> Iterator[None]:
    """Let linear layers of a model compute with rounded weights, and with rounded inputs too, while the block runs."""
    real = RealTokens()
    handles = [model.register_forward_pre_hook(real, with_kwargs=True)]
    for linear in chosen:
        parametrize.register_parametrization(linear, "weight", weights)
        if inputs:
            handles.append(linear.register_forward_pre_hook(RoundedInput(real)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for linear in chosen:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


class RoundedWeight(nn.Module):
    """Rounds W (N, K) to -levels…levels times a scale per row, or per `group_size` columns of a row."""

    def __init__(self, levels: int, group_size: int = 0) -> None:
        super().__init__()
        self.levels, self.group_size = levels, group_size

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the rounded weight; its gradient is the weight's."""
        groups = weight.detach().unflatten(1, (-1, self.group_size or weight.shape[1]))
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-8) / self.levels
        return _straight_through(weight, ((groups / scales).round() * scales).flatten(1))


class RoundedGroups(nn.Module):
    """Rounds W (N, K) to 16 steps over the range of each `group_size` columns of a row, zero among them."""

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the rounded weight; its gradient is the weight's."""
        groups = weight.detach().unflatten(1, (-1, self.group_size))
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scales = ((high - low) / (CODES - 1)).clamp(min=1e-8)
        zeros = (-low / scales).round()
        codes = ((groups / scales).round() + zeros).clamp(0, CODES - 1)
        return _straight_through(weight, ((codes - zeros) * scales).flatten(1))


class RealTokens:
    """A hook before a model that notes which tokens of its batch are no padding: `mask`, bool (n, S)."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the batch's mask."""
        self.mask = kwargs["attention_mask"] == 1

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of x (n, S, K) that belong to real tokens, (tokens, K); all of x where it has no tokens."""
        return x if self.mask is None or self.mask.shape != x.shape[:-1] else x[self.mask]


class RoundedInput:
    """A hook before a layer that rounds its input to 256 steps over a moving range that holds zero.

    Padding is rounded too, but does not widen the range.
    """

    def __init__(self, real: RealTokens) -> None:
        self.real = real
        self.low, self.high = 0.0, 0.0
        self.seen = False

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Take in the input's range and return the rounded input; its gradient is the input's."""
        x = args[0].detach()
        keep, real = MEMORY if self.seen else 0.0, self.real.of(x)
        self.low = keep * self.low + (1 - keep) * min(float(real.min()), 0.0)
        self.high = keep * self.high + (1 - keep) * max(float(real.max()), 0.0)
        self.seen = True
        scale = max((self.high - self.low) / 255, 1e-8)
        zero = round(-self.low / scale)
        codes = ((x / scale).round() + zero).clamp(0, 255)
        return (_straight_through(args[0], (codes - zero) * scale), *args[1:])


def _straight_through(value: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    return value + (changed - value).detach()
