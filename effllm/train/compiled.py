"""Compiled training: a module's forward and backward pass as one graph, for batches of all sizes.

The graph is made in the first step. Whatever would break it into parts is an error, and sizes are symbols in it, so
that later steps use it as it is. Graphs of their own have a size of 1, packed sequences that are all equally long, and
sizes that differ where in the first step they chanced to agree. Random numbers are drawn as without compilation, so
losses differ from uncompiled ones by rounding only.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from effllm.errors import TrainingStopped, Unsupported

GRAPHS = 64
"""How many graphs a run may make for batches whose sizes differ in kind; PyTorch's own limit, 8, ends the run."""


def check_compiled(accelerator: Accelerator) -> None:
    """Raise Unsupported where the model is sharded, TrainingStopped on a processor without a C++ compiler."""
    if accelerator.distributed_type == DistributedType.FSDP:
        raise Unsupported("--compile does not go with sharding (FSDP); leave it out, or launch with torchrun")
    if accelerator.device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415 (takes seconds)
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise TrainingStopped(
            "--compile needs a C++ compiler, and there is none: install g++, let CXX name one, or train without it"
        ) from None


def compile_forward(module: nn.Module, backend: str = "inductor") -> None:
    """Compile a module's forward pass, in place; its parameters and state dict stay as they are.

    Graphs of earlier modules are dropped, as PyTorch limits how many a function may have.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = GRAPHS
    options: dict[str, Any] = {"options": {"fallback_random": True}} if backend == "inductor" else {}
    compiled = torch.compile(module.forward, fullgraph=True, dynamic=True, backend=backend, **options)
    module.forward = compiled


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled modules run as written, as in an evaluation, which has no graph."""
    return torch.compiler.set_stance("force_eager")
