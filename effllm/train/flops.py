"""How much arithmetic a training step is, and how much this machine could do: model FLOP utilisation.

MFU = FLOP of the step / seconds / peak FLOP/s. Counted are matrix products alone, forward once and backward twice
(Kaplan et al. 2020, section 2.1): 6 per weight of the layers and token, 6 per weight of the masked-LM head and *masked*
token, and 12 · layers · width per token and token seen, for attention's two products.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

FORMULA = (
    "MFU = (6 x layer weights x tokens + 6 x head weights x masked tokens + 12 x layers x width x length x tokens) "
    "/ seconds / peak FLOP/s"
)
DATA_SHEET_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""GPU -> dense bf16 FLOP/s by its data sheet."""


@dataclass(frozen=True)
class FlopCount:
    """The weights of a model that a token, or a masked token, is multiplied with."""

    layer_weights: int
    head_weights: int
    layers: int
    width: int

    @classmethod
    def of(cls, model: Any) -> FlopCount:
        """Count a transformers model's linear layers: those of its body, and those of its head."""
        config, body = model.config, model.base_model
        inner = {id(m) for m in body.modules()}
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        return cls(
            layer_weights=sum(m.weight.numel() for m in linears if id(m) in inner),
            head_weights=sum(m.weight.numel() for m in linears if id(m) not in inner),
            layers=int(config.num_hidden_layers),
            width=int(config.hidden_size),
        )

    def step(self, tokens: int, masked: int, sequences: int) -> float:
        """Return the FLOP of a training step over `sequences` of `tokens` in all, `masked` of them with a loss."""
        length = tokens / max(1, sequences)
        attention = 12 * self.layers * self.width * length
        return tokens * (6 * self.layer_weights + attention) + 6 * self.head_weights * masked


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the FLOP/s to compare with, and where the number comes from.

    A known GPU's data sheet, for bf16; elsewhere the rate of a product of 1024 × 1024 in `dtype`, in which the run's
    products are computed, timed now, the best of 5.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, flops in DATA_SHEET_BF16.items():
            if known in name:
                return flops, f"{known} data sheet, bf16"
    size = 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    name = str(dtype).removeprefix("torch.")
    return 2 * size**3 / best, f"{name} matrix product of 1024 x 1024 measured at the start"
