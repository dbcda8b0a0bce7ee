"""What a training runs on, in words."""

from __future__ import annotations

import importlib.util

import torch

from effllm import machine

KERNEL_DEVICES = ("cuda",) if all(map(importlib.util.find_spec, ("effllm_kernels", "triton"))) else ()
"""Where the kernels of effllm_kernels compute. A constant, as torch.compile cannot look for packages."""


def describe(device: torch.device | None = None) -> str:
    """Return the machine in one line, as rows carry it; where a GPU computes, its name comes first.

    Without `device` it is what a training takes: a GPU where there is one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    host = machine.describe()
    return f"{torch.cuda.get_device_name(device)}; {host}" if device.type == "cuda" else host
