"""Kernels that encoders need: fused, exact, and importable anywhere.

On CUDA tensors they are Triton kernels; on CPU tensors, and wherever triton is missing, their plain torch reference.
"""

from __future__ import annotations

from .flash import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from .fused_attention import attention, attention_qkvpacked
from .table import KERNELS

__all__ = [
    "KERNELS",
    "attention",
    "attention_qkvpacked",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
]
