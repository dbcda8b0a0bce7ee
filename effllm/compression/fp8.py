"""fp8: weights as e4m3 floats with a scale per output (Micikevicius et al. 2022), in compressed-tensors' layout.

Without hardware that multiplies such floats there is nothing to gain over int8, so the method is refused elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from effllm.compression.codes import (
    check_compressed_tensors,
    check_plain,
    inner_linears,
    outer_linears,
    replace_weights,
)
from effllm.compression.method import Changed, Stage, WeightsJob
from effllm.errors import Unsupported

if TYPE_CHECKING:
    from effllm.exporters.source import Source

E4M3 = torch.float8_e4m3fn
ADA = (8, 9)
"""The CUDA capability from which tensor cores multiply e4m3."""


@dataclass(frozen=True)
class Fp8:
    """8-bit float weights for GPUs that multiply them."""

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "8-bit float weights for transformers and vLLM; needs a GPU of 2022 or later, no data"
    stage: ClassVar[Stage] = Stage.CODES
    identity: ClassVar[Mapping[str, Any]] = {}

    def check(self, source: Source) -> None:
        """Raise Unsupported without the hardware or for a pruned model, MissingExtra without the package."""
        if not has_fp8():
            raise Unsupported(
                "--method fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper); "
                "this machine has none, use --method int8"
            )
        check_compressed_tensors(self.name, source)

    def apply(self, job: WeightsJob) -> Changed:
        """Hand over the model, its inner linear layers in e4m3."""
        check_plain(self.name, job.model)
        tensors = {}
        for name, linear in inner_linears(job.model).items():
            values, scales = round_to_e4m3(linear.weight.detach())
            tensors[name] = {"weight": values, "weight_scale": scales}
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
        config = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": outer_linears(job.model),
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
        replace_weights(job, tensors, config)
        return Changed({"layers": list(tensors)})


def has_fp8() -> bool:
    """Return whether a GPU here multiplies e4m3 floats."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= ADA


def round_to_e4m3(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W (N, K) as e4m3 and its scales, float32 (N, 1): each row's largest weight becomes the largest e4m3."""
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    scales = torch.where(largest > 0, largest / torch.finfo(E4M3).max, 1.0)
    return (weight.float() / scales).to(E4M3), scales
