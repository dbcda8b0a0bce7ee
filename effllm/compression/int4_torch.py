"""int4-torch: 4-bit weights chosen as by int4, in the `pack-quantized` layout of compressed-tensors.

transformers and vLLM read the folder. transformers expands the weights at the first pass, so that in PyTorch on a CPU
the file is small and the speed is that of float32. Grids are symmetric: transformers 5.23 cannot load the packed zero
points of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from effllm.compression.calibrate import TOKENS, within
from effllm.compression.codes import (
    check_compressed_tensors,
    check_plain,
    inner_linears,
    outer_linears,
    replace_weights,
)
from effllm.compression.gptq import Algorithm, Order, check_group_size, check_groups, choose_codes
from effllm.compression.layers import linears
from effllm.compression.layerwise import group_by_group
from effllm.compression.method import Changed, Stage, WeightsJob, check_calibration

if TYPE_CHECKING:
    from effllm.exporters.source import Source


@dataclass(frozen=True)
class Int4Torch:
    """4-bit weights for transformers and vLLM."""

    name: ClassVar[str] = "int4-torch"
    summary: ClassVar[str] = "4-bit weights in groups for transformers and vLLM (GPTQ); needs compressed-tensors"
    stage: ClassVar[Stage] = Stage.CODES
    decoders: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {}

    algorithm: Algorithm = field(
        default="gptq", metadata={"help": "let later columns make up for rounding (gptq), or round each weight (rtn)"}
    )
    group_size: int = field(default=128, metadata={"help": "weights along a row that share a scale: 128, 64 or 32"})
    order: Order = field(
        default="activation", metadata={"help": "gptq: columns with the largest inputs first, or as they stand"}
    )
    calibration: int = field(
        default=500, metadata={"help": f"how many calibration texts to use, of at most {TOKENS:,} tokens together"}
    )
    seed: int = field(default=0, metadata={"help": "chooses the calibration texts"})

    def __post_init__(self) -> None:
        check_group_size(self.name, self.group_size)
        check_calibration(self.name, self.calibration)

    def check(self, source: Source) -> None:
        """Raise where the package is missing, the model was pruned, or the groups do not divide a layer's inputs."""
        check_compressed_tensors(self.name, source)
        self._check_groups(source.model)

    def _check_groups(self, model: Any) -> None:
        check_groups(self.name, {n: m.in_features for n, m in linears(model).items()}, self.group_size)

    def apply(self, job: WeightsJob) -> Changed:
        """Calibrate, choose codes, and hand over the model in the other library's format."""
        check_plain(self.name, job.model)
        self._check_groups(job.model)
        names = {id(linear): name for name, linear in inner_linears(job.model).items()}
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        layers: dict[str, dict[str, float]] = {}
        chosen = linears(job.model)
        encodings = within(job.encodings(), TOKENS, self.seed)
        for group in group_by_group(job.model, encodings, job.track):
            for name, seen in group.items():
                weight = chosen[name].weight.data
                coded, error = choose_codes(
                    self.algorithm, weight, seen, self.group_size, symmetric=True, order=self.order
                )
                layers[name] = {"relative_error": error}
                tensors[names[id(chosen[name])]] = {
                    "weight_packed": pack_int32(coded.codes),
                    "weight_scale": coded.scales,
                    "weight_shape": torch.tensor(weight.shape),
                }
                weight.copy_(coded.values())
        replace_weights(job, tensors, quantization_config(self.group_size, outer_linears(job.model)))
        note = "PyTorch expands the weights at the first pass: the file is small, the speed that of float32"
        return Changed({"layers": layers, "calibration_tokens": sum(map(len, encodings))}, [note])


def pack_int32(codes: torch.Tensor) -> torch.Tensor:
    """Return codes 0…15, (N, K), eight to a word, int32 (N, K / 8), the first in the lowest bits. K divides by 8.

    The format's codes are signed, -8…7, and stored 8 higher; that is what ours are.
    """
    words = (codes.long().unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def quantization_config(group_size: int, ignore: list[str]) -> dict[str, Any]:
    """Return what config.json says of the format; `ignore` names the linear layers that stay float."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
