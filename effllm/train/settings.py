"""The settings of training runs: flags, JSON and manifest entries are made from these fields. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from effllm.errors import SettingError
from effllm.settings import to_json
from effllm.train.schedules import check_schedule

FREE = frozenset({"accumulate", "pass_tokens", "log_every", "save_every", "keep", "workers", "average"})
"""Settings that do not decide a run's numbers, `accumulate` and `pass_tokens` up to rounding; a resumed run may change
them."""


TEACHING = ("distil_logits", "distil_hidden", "distil_attention", "label_weight")
"""The weights of the losses where there is a teacher."""


@dataclass(frozen=True)
class LoopSettings:
    """How to train: what pre-training and fine-tuning share. The flags of the command line are made from the fields."""

    steps: int = field(default=0, metadata={"help": "optimiser steps to take; 0 = until --seconds"})
    seconds: float = field(default=0.0, metadata={"help": "wall-clock budget; the schedule follows it; 0 = --steps"})
    batch_size: int = field(default=256, metadata={"help": "sequences in one optimiser step, over all processes"})
    accumulate: int = field(
        default=1,
        metadata={"help": "micro-batches per process and step; changes results by rounding only"},
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    schedule: Literal["linear", "cosine", "wsd", "constant"] = field(
        default="linear", metadata={"help": "how the learning rate falls after the warm-up"}
    )
    warmup: float = field(default=0.06, metadata={"help": "share of the run with rising learning rate"})
    decay: float = field(default=0.2, metadata={"help": "share of the run in which wsd falls"})
    optimizer: Literal["adamw", "stableadamw", "muon"] = field(default="adamw", metadata={"help": "optimiser"})
    weight_decay: float = field(default=0.01, metadata={"help": "decoupled weight decay; none on norms and biases"})
    beta1: float = field(default=0.9, metadata={"help": "decay of the mean gradient"})
    beta2: float = field(default=0.98, metadata={"help": "decay of the mean squared gradient"})
    epsilon: float = field(default=1e-6, metadata={"help": "added to the root of the mean squared gradient"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm; 0 = no clipping"})
    precision: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "how products are computed: in fp32, or in bf16 by autocast"}
    )
    compile: bool = field(default=False, metadata={"help": "compile the model with torch.compile, in the first step"})
    workers: int = field(default=0, metadata={"help": "processes that prepare batches; does not change results"})
    seed: int = field(default=0, metadata={"help": "decides initial weights, order, masks and dropout"})
    log_every: int = field(default=10, metadata={"help": "steps between lines of the log"})
    save_every: int = field(default=500, metadata={"help": "steps between checkpoints; 0 = only at the end"})
    keep: int = field(default=2, metadata={"help": "checkpoints to keep, besides the best"})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise SettingError(f"--{name.replace('_', '-')} must be a finite number, got {value}")
        at_least = {"batch_size": 1, "accumulate": 1, "log_every": 1, "keep": 1, "steps": 0, "save_every": 0}
        for name, least in {**at_least, "seconds": 0, "workers": 0, "clip": 0, "weight_decay": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise SettingError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if self.steps and self.seconds:
            raise SettingError("give --steps or --seconds, not both")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(f"--{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not self.epsilon > 0:
            raise SettingError(f"--epsilon must be positive, got {self.epsilon}")
        check_schedule(self.schedule, self.warmup, self.decay)
        if not self.learning_rate > 0:
            raise SettingError(f"--learning-rate must be positive, got {self.learning_rate}")

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide a run's numbers, as JSON: what a resumed run must share."""
        return {name: value for name, value in to_json(self).items() if name not in FREE}


@dataclass(frozen=True)
class PretrainSettings(LoopSettings):
    """How to pre-train."""

    model: str = field(
        default="modern-mini",
        metadata={"help": "[modern-]tiny, mini, small, medium or base, or a folder with a config or a model"},
    )
    objective: Literal["mlm", "mlm+nsp", "mlm+sop"] = field(
        default="mlm", metadata={"help": "masked-LM, with next-sentence or sentence-order prediction"}
    )
    masking: Literal["token", "word", "span"] = field(default="token", metadata={"help": "what is masked as one"})
    mask_rate: float = field(default=0.3, metadata={"help": "share of the tokens that is masked, at the start"})
    mask_rate_end: float = field(default=0.0, metadata={"help": "the share at the end of the run; 0 = as at the start"})
    mask_share: float = field(default=0.8, metadata={"help": "share of masked tokens that become the mask token"})
    random_share: float = field(default=0.1, metadata={"help": "share of masked tokens that become a random one"})
    max_length: int = field(default=128, metadata={"help": "most tokens of a sequence, special tokens included"})
    eval_every: int = field(default=0, metadata={"help": "steps between evaluations on dev; 0 = with each checkpoint"})
    eval_limit: int = field(default=2000, metadata={"help": "most dev sequences of an evaluation; 0 = all"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steps and not self.seconds:
            raise SettingError("give --steps or --seconds: how long to train")
        if self.eval_limit < 0:
            raise SettingError(f"--eval-limit must be at least 0, got {self.eval_limit}")
        for name in ("mask_rate", "mask_rate_end"):
            rate = getattr(self, name)
            if not 0 < rate < 1 and not (name == "mask_rate_end" and rate == 0):
                raise SettingError(f"--{name.replace('_', '-')} must be between 0 and 1, got {rate}")
        if self.mask_rate_end and self.seconds:
            raise SettingError("--mask-rate-end needs --steps: masks are a function of the step, not of the clock")


@dataclass(frozen=True)
class FinetuneSettings(LoopSettings):
    """How to fine-tune."""

    steps: int = field(default=0, metadata={"help": "optimiser steps to take; 0 = by --epochs or --seconds"})
    seconds: float = field(default=0.0, metadata={"help": "wall-clock budget; the schedule follows it; 0 = none"})
    epochs: float = field(default=3.0, metadata={"help": "passes over the training data, unless --steps or --seconds"})
    batch_size: int = field(default=32, metadata={"help": "examples in one optimiser step, over all processes"})
    learning_rate: float = field(default=5e-5, metadata={"help": "peak learning rate"})
    beta2: float = field(default=0.999, metadata={"help": "decay of the mean squared gradient"})
    epsilon: float = field(default=1e-8, metadata={"help": "added to the root of the mean squared gradient"})
    pass_tokens: int = field(
        default=0,
        metadata={
            "help": "padded tokens in memory at a time, 0 = 1024, on a GPU 8192; changes results by rounding only"
        },
    )
    max_length: int = field(
        default=0,
        metadata={"help": "most tokens of an input, in the written folder too; 0 = what the model takes, up to 512"},
    )
    dropout: float = field(default=-1.0, metadata={"help": "dropout of the whole model; -1 = as in its config"})
    eval_every: int = field(default=0, metadata={"help": "steps between evaluations on --dev; 0 = once an epoch"})
    average: int = field(
        default=0,
        metadata={"help": "also try the mean of that many last checkpoints, and keep it if it is best on --dev"},
    )
    patience: int = field(default=0, metadata={"help": "evaluations without a better score before it stops; 0 = never"})
    distil_logits: float = field(default=1.0, metadata={"help": "with --teacher: weight of matching its logits"})
    distil_hidden: float = field(default=0.0, metadata={"help": "with --teacher: weight of matching its hidden states"})
    distil_attention: float = field(
        default=0.0, metadata={"help": "with --teacher: weight of matching its last attention relations (MiniLM)"}
    )
    temperature: float = field(default=2.0, metadata={"help": "with --teacher: softens both models' logits"})
    label_weight: float = field(default=0.5, metadata={"help": "with --teacher: weight of the loss on the labels"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epochs > 0:
            raise SettingError(f"--epochs must be positive, got {self.epochs}")
        if self.pass_tokens < 0:
            raise SettingError(f"--pass-tokens must be at least 0, got {self.pass_tokens}")
        if self.max_length and self.max_length < 8:
            raise SettingError(f"--max-length must be at least 8, got {self.max_length}")
        if not (self.dropout == -1 or 0 <= self.dropout < 1):
            raise SettingError(f"--dropout must be at least 0 and below 1, got {self.dropout}")
        if self.average == 1:
            raise SettingError("--average takes the mean of at least 2 checkpoints, got 1")
        if self.compile and self.distil_hidden:
            raise SettingError("--distil-hidden cannot be compiled; leave out --compile or --distil-hidden")
        if not any(getattr(self, name) for name in TEACHING):
            raise SettingError(
                "--distil-logits, --distil-hidden, --distil-attention and --label-weight are all 0: nothing is learned"
            )
        if not self.temperature > 0:
            raise SettingError(f"--temperature must be positive, got {self.temperature}")
        for name in (*TEACHING, "patience", "eval_every", "average"):
            if getattr(self, name) < 0:
                raise SettingError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")

    def check_untaught(self) -> None:
        """Raise SettingError where a setting that only matters with a teacher is not the default."""
        for name in (*TEACHING, "temperature"):
            if getattr(self, name) != getattr(type(self), name):
                raise SettingError(f"--{name.replace('_', '-')} {getattr(self, name):g} needs --teacher")
