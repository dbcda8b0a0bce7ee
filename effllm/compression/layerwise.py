"""One layer after another: what enters the linear layers of each, given what was made of the layers before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from effllm.compression.calibrate import Moments, feeds, observe, watching
from effllm.compression.layers import layer_list, linears, weight_of
from effllm.compression.masks import Pattern, set_masks
from effllm.compression.method import Changed, WeightsJob
from effllm.progress import Track, silent
from effllm.runtime.tokenizer import Encoding

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with besides the hidden states: positional and named arguments."""


def layer_by_layer(
    model: Any, encodings: Sequence[Encoding], track: Track = silent, what: str = "calibrating"
) -> Iterator[dict[str, Moments]]:
    """Yield for each layer, in order, what enters its linear layers, by their names in the base model.

    What the caller does to a layer before asking for the next one is seen by all that follow. The hidden states of one
    layer are in memory for all texts.
    """
    prefix, modules = layer_list(model)
    states, calls = _first_states(model, modules, encodings)
    names = list(linears(model))
    for index in track(range(len(modules)), what, len(modules)):
        moments: dict[str, Moments] = {}
        own = [name for name in names if name.startswith(f"{prefix}.{index}.")]
        with torch.no_grad(), watching(model, own, moments):
            for state, call in zip(states, calls, strict=True):
                _run(modules[index], state, call[index])
        yield moments
        with torch.no_grad():
            states = [_run(modules[index], state, call[index]) for state, call in zip(states, calls, strict=True)]


def prune_by(
    score: Callable[[torch.Tensor, Moments], torch.Tensor], job: WeightsJob, pattern: str, sparsity: float, method: str
) -> Changed:
    """Set the weights with the smallest scores to zero, in place, each layer on what the pruned ones before it give it.

    `score` makes of a weight (rows, columns) and its inputs the scores, at least 0, of the same shape. With the pattern
    `global` all layers compete, and the inputs are those of the dense model.
    """
    model, chosen = job.model, Pattern(pattern)
    if pattern == "global":
        moments = observe(model, list(linears(model)), job.encodings(), job.track)
        scores = {name: score(weight_of(model, name), seen) for name, seen in moments.items()}
        return set_masks(model, chosen.keep(scores, sparsity))
    masks: dict[str, torch.Tensor] = {}
    for moments in layer_by_layer(model, job.encodings(), job.track, f"pruning ({method})"):
        for name, seen in moments.items():
            weight = weight_of(model, name)
            masks[name] = chosen.keep_one(score(weight, seen), sparsity)
            weight.mul_(masks[name])
    return set_masks(model, masks)


def _first_states(
    model: Any, modules: torch.nn.ModuleList, encodings: Sequence[Encoding]
) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """Return for each text what enters the first layer, (1, T, H), and what every layer is called with besides."""
    states: list[torch.Tensor] = []
    calls: list[list[Call]] = []

    def watch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, *others = args
        if module is modules[0]:
            states.append(state)
            calls.append([])
        calls[-1].append((tuple(others), kwargs))

    handles = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            for feed in feeds(model, encodings):
                model(**feed)
    finally:
        for handle in handles:
            handle.remove()
    return states, calls


def _run(module: torch.nn.Module, state: torch.Tensor, call: Call) -> torch.Tensor:
    output = module(state, *call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output
