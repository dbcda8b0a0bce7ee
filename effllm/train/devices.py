"""What a training runs on, in words."""

from __future__ import annotations

import torch

from effllm import machine


def describe(device: torch.device) -> str:
    """Return the machine in one line, as rows carry it; where a GPU computes, its name comes first."""
    host = machine.describe()
    return f"{torch.cuda.get_device_name(device)}; {host}" if device.type == "cuda" else host
