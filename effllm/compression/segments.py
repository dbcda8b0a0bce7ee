"""One group of linear layers after another: what enters it in the graph as it was, and in the graph as it becomes.

The graph is cut before the first node of each group. What is alive at a cut, the values made before it and read after
it, is kept for every text as both graphs give it, and what lies between two cuts is run once for each: all of it takes
two runs of the graph. Every text runs alone, so there is no padding to mask out and nothing depends on how texts would
be batched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto, helper, numpy_helper

from effllm.compression.calibrate import Drift
from effllm.compression.int8_graph import Linears
from effllm.exporters.graph import Graph, save_graph
from effllm.progress import Track
from effllm.runtime.ort import OrtEngine
from effllm.runtime.tokenizer import Encoding, pad_batch

State = dict[str, np.ndarray]
"""What is alive at a cut, of one text; the graph's own inputs are among it."""


def code_in_order(
    graph: Graph,
    groups: Sequence[Linears],
    encodings: Sequence[Encoding],
    work: Path,
    code: Callable[[Linears, Drift], Mapping[str, np.ndarray]],
    *,
    threads: int,
    track: Track,
) -> None:
    """Call `code` with each group, in the graph's order, and with what enters it.

    It returns the weights (K, N), float32, that the group's nodes have from now on, by the nodes' names; the groups
    that follow see inputs made by them. The graph itself is not changed.
    """
    segments = _segments(graph, groups)
    dense: list[State] = [pad_batch([encoding], 0) for encoding in encodings]
    coded = dense
    weights: dict[str, np.ndarray] = {}
    for group, segment in track(list(zip(groups, segments, strict=True)), "quantising", len(groups)):
        after = segment.run(dense, {}, work, threads)
        coded = segment.run(coded, weights, work, threads) if weights else after
        dense = after
        entering = ([torch.from_numpy(state[group.input]) for state in states] for states in (dense, coded))
        weights |= code(group, Drift.between(zip(*entering, strict=True)))


@dataclass(frozen=True)
class Segment:
    """The nodes between two cuts that are needed after the second, and the names of what is alive there."""

    graph: Graph
    nodes: tuple[NodeProto, ...]
    alive: frozenset[str]

    def run(self, states: Sequence[State], weights: Mapping[str, np.ndarray], work: Path, threads: int) -> list[State]:
        """Return what is alive after it, for each text; `weights` stand in for those of the nodes they name."""
        inputs = {i.name for i in self.graph.model.graph.input}
        kept = [{name: value for name, value in s.items() if name in self.alive | inputs} for s in states]
        if not self.nodes:
            return kept
        file = work / "segment.onnx"
        written = save_graph(self._model(states[0], weights), file)
        engine = OrtEngine.open(file, auto_class="", threads=threads)
        results = [old | engine.run(state) for old, state in zip(kept, states, strict=True)]
        for name in written:
            (work / name).unlink()
        return results

    def _model(self, state: State, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
        """Return a graph of these nodes alone, which takes what it reads of `state` and gives what is alive after."""
        nodes, constants = [], {}
        for n in self.nodes:
            if n.name in weights:
                own = NodeProto()
                own.CopyFrom(n)
                own.input[1] = f"{n.output[0]}_coded"
                constants[own.input[1]] = weights[n.name]
                n = own  # noqa: PLW2901
            nodes.append(n)
        read = {name for n in nodes for name in n.input}
        made = {name for n in nodes for name in n.output}
        constants |= {name: self.graph.constant(name) for name in sorted(read) if self.graph.is_constant(name)}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
            for name, value in state.items()
            if name in read
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in sorted(self.alive & made)]
        stored = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
        whole = self.graph.model
        return helper.make_model(
            helper.make_graph(nodes, "segment", inputs, outputs, stored),
            opset_imports=list(whole.opset_import),
            ir_version=whole.ir_version,
        )


def _segments(graph: Graph, groups: Sequence[Linears]) -> list[Segment]:
    """Return what lies between the cuts before the groups, from the graph's inputs on, in order."""
    nodes = graph.nodes
    position = {n.output[0]: index for index, n in enumerate(nodes)}
    cuts = [min(position[n.output[0]] for n in group.nodes) for group in groups]
    segments = []
    alive: set[str] = set()
    for (start, stop), group in reversed(list(zip(pairwise([0, *cuts]), groups, strict=True))):
        alive = {name for name in alive | {group.input} if name and not graph.is_constant(name)}
        needed, own = set(alive), []
        for n in reversed(nodes[start:stop]):
            if needed & set(n.output):
                own.append(n)
                needed = (needed - set(n.output)) | set(n.input)
        segments.append(Segment(graph, tuple(reversed(own)), frozenset(alive)))
        alive = needed
    return segments[::-1]
