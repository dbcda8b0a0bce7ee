"""Handing a model over to another library's format: what the methods of the stage `CODES` share.

Such a method writes a folder as that library reads it and loads it again, so that the model which is judged and saved
is the one that a user will load. Only linear layers inside the encoder's layers are coded: the default of transformers
would code task heads and poolers too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from effllm.compression.layers import linears
from effllm.compression.method import WeightsJob
from effllm.errors import MissingExtra, Unsupported
from effllm.hf import quiet, stored_linears

if TYPE_CHECKING:
    from effllm.exporters.source import Source


UNREADABLE = frozenset({"modernbert"})
"""Model types whose packed weights transformers 5.23 cannot load: their initialisation reads a float weight."""


def check_compressed_tensors(method: str, source: Source) -> None:
    """Raise as `check_codes` for the package compressed-tensors, Unsupported for a model type that cannot be loaded."""
    kind = source.model.config.model_type
    if kind in UNREADABLE:
        raise Unsupported(f"--method {method}: transformers cannot load a {kind} model packed so; use --method int4")
    check_codes(method, source, package="compressed_tensors", extra="int4")


def check_codes(method: str, source: Source, *, package: str, extra: str) -> None:
    """Raise MissingExtra without the package that reads the format, Unsupported for a model that it cannot hold."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(package.replace("_", "-"), extra, f"--method {method}")
    check_plain(method, source.model)


def check_plain(method: str, model: Any) -> None:
    """Raise Unsupported for a model with layers that were resized or masked."""
    found = next(iter(stored_linears(model)), None)
    if found:
        raise Unsupported(
            f"--method {method} cannot follow pruning: {found} was resized or masked, and a folder holds one "
            "quantization_config; use --method int4 or int8 (ONNX) there"
        )


def inner_linears(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers inside the layers by their names in the whole model."""
    inside = {id(linear) for linear in linears(model).values()}
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}


def outer_linears(model: Any) -> list[str]:
    """Return the names of all other linear layers: heads, poolers, projections of embeddings."""
    inside = inner_linears(model)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in inside]


def replace_weights(job: WeightsJob, coded: Mapping[str, Mapping[str, torch.Tensor]], config: dict[str, Any]) -> None:
    """Store each linear layer of `coded` as these tensors instead of its weight, and load the model from there.

    `config` is the `quantization_config` that says what they are.
    """
    model = job.model
    state = model.state_dict()
    for name, tensors in coded.items():
        del state[f"{name}.weight"]
        state |= {f"{name}.{key}": value for key, value in tensors.items()}
    model.config.quantization_config = config
    folder = job.work / "coded"
    with quiet():
        model.save_pretrained(folder, state_dict=state)
    load_coded(job, folder)


def code_by_bitsandbytes(
    method: str,
    job: WeightsJob,
    config: transformers.BitsAndBytesConfig,
    fits: Callable[[nn.Linear], bool] = lambda linear: True,
) -> dict[str, list[str]]:
    """Let bitsandbytes code the inner linear layers that it `fits`.

    Returns the names of those, and of the others, that stay float.
    """
    check_plain(method, job.model)
    inner = inner_linears(job.model)
    names = [name for name, linear in inner.items() if fits(linear)]
    ignore = [*outer_linears(job.model), *(name for name in inner if name not in names)]
    config.llm_int8_skip_modules = ignore
    with quiet():
        job.model.save_pretrained(job.work / "dense")
    load_coded(job, job.work / "dense", config)
    return {"layers": names, "float": ignore}


def load_coded(job: WeightsJob, folder: Any, config: Any = None) -> None:
    """Make the job's model the one that transformers loads from a folder, coding it by `config` where given."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every product
    chosen = {} if config is None else {"quantization_config": config}
    with quiet():
        auto_class = getattr(transformers, job.source.task.auto_class)
        model = auto_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **chosen)
    job.source = dataclasses.replace(job.source, model=model.eval())
