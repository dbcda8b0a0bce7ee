"""One layer after another: what enters the linear layers of each, given what was made of the layers before it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from effllm.compression.calibrate import Drift, Moments, feeds, observe, watching
from effllm.compression.layers import layer_list, linears, weight_of
from effllm.compression.masks import Pattern, set_masks
from effllm.compression.method import Changed, WeightsJob
from effllm.errors import Unsupported
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


def group_by_group(
    model: Any, encodings: Sequence[Encoding], track: Track = silent, what: str = "quantising"
) -> Iterator[dict[str, Drift]]:
    """Yield, in order, the linear layers that read one input, and what became of it, by their names in the base model.

    What the caller does to their weights before asking for the next group is seen by all that follow, beside what they
    would have seen without it. The hidden states of one layer are in memory for all texts, twice. Raises Unsupported
    for linear layers that run several times for a text, or never.
    """
    prefix, modules = layer_list(model)
    states, calls = _first_states(model, modules, encodings)
    moved = states
    for index in track(range(len(modules)), what, len(modules)):
        layer = modules[index]
        own = [call[index] for call in calls]
        dense = copy.deepcopy(layer)
        groups = _groups(layer, states[0], own[0])
        if sorted(itertools.chain(*groups)) != sorted(n for n, m in layer.named_modules() if isinstance(m, nn.Linear)):
            raise Unsupported(f"linear layers of {prefix}.{index} run several times for a text, or never")
        for names in groups:
            pairs = (
                (_entering(dense, names[0], state, call), _entering(layer, names[0], new, call))
                for state, new, call in zip(states, moved, own, strict=True)
            )
            seen = Drift.between(pairs)
            yield {f"{prefix}.{index}.{name}": seen for name in names}
        if index == len(modules) - 1:
            return
        with torch.no_grad():
            states = [_run(dense, state, call) for state, call in zip(states, own, strict=True)]
            moved = [_run(layer, state, call) for state, call in zip(moved, own, strict=True)]


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
    model: Any, modules: nn.ModuleList, encodings: Sequence[Encoding]
) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """Return for each text what enters the first layer, (1, T, H), and what every layer is called with besides."""
    states: list[torch.Tensor] = []
    calls: list[list[Call]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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


def _groups(layer: nn.Module, state: torch.Tensor, call: Call) -> list[list[str]]:
    """Return the names of a layer's linear layers, in the order they run, those together that read the same tensor."""
    groups: list[tuple[torch.Tensor, list[str]]] = []

    def watch(name: str, x: torch.Tensor) -> None:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))

    linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    handles = [m.register_forward_pre_hook(lambda _, args, n=n: watch(n, args[0])) for n, m in linear.items()]
    try:
        with torch.no_grad():
            _run(layer, state, call)
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in groups]


class _Entered(Exception):
    """Ends a run as soon as what was wanted of it is there."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = x


def _entering(layer: nn.Module, name: str, state: torch.Tensor, call: Call) -> torch.Tensor:
    """Return what enters the linear layer of that name, (…, K)."""

    def stop(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        raise _Entered(args[0])

    handle = layer.get_submodule(name).register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            _run(layer, state, call)
    except _Entered as entered:
        return entered.x
    finally:
        handle.remove()
    raise AssertionError(f"{name} ran for the first text, and did not for another one")


def _run(module: nn.Module, state: torch.Tensor, call: Call) -> torch.Tensor:
    output = module(state, *call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output
