"""Every operation of the package, by name."""

from __future__ import annotations

from . import fused_attention
from .record import Kernel

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (fused_attention.KERNEL,)}
