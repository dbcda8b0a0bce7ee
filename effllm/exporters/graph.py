"""Small edits of an ONNX graph: who makes a value, who reads it, add and remove nodes and constants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
EXTERNAL_DATA_BYTES = 2_000_000_000
"""Graphs larger than this keep their weights beside the graph: protobuf ends at 2 GiB."""


class Graph:
    """An ONNX model under edit. Index lookups are built when needed and dropped by every change."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}

    @property
    def nodes(self) -> Sequence[NodeProto]:
        """The nodes in topological order."""
        return list(self.model.graph.node)

    @property
    def opset(self) -> int:
        """The version of the standard operator set."""
        return next(entry.version for entry in self.model.opset_import if entry.domain in {"", "ai.onnx"})

    def is_constant(self, name: str) -> bool:
        """Return whether a value is an initializer."""
        return name in self._constants

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an initializer."""
        return tuple(self._constants[name].dims)

    def constant(self, name: str) -> np.ndarray:
        """Return the value of an initializer."""
        return numpy_helper.to_array(self._constants[name])

    def set_constant(self, name: str, value: np.ndarray) -> str:
        """Add or replace an initializer; return its name."""
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def readers(self) -> dict[str, list[NodeProto]]:
        """Return for each value the nodes that read it."""
        readers: dict[str, list[NodeProto]] = {}
        for node in self.model.graph.node:
            for name in set(node.input):
                readers.setdefault(name, []).append(node)
        return readers

    def replace_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """Set the graph's nodes, in topological order."""
        nodes = list(nodes)
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def finish(self) -> onnx.ModelProto:
        """Drop nodes and constants that no output needs, and return the model. No node may hold a graph of its own."""
        needed = {output.name for output in self.model.graph.output}
        kept = []
        for node in reversed(self.model.graph.node):
            if needed & set(node.output):
                kept.append(node)
                needed |= set(node.input)
        self.replace_nodes(reversed(kept))
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(t for name, t in self._constants.items() if name in needed)
        del self.model.graph.value_info[:]
        return self.model


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, **attributes: Any) -> NodeProto:
    """Make a node of the standard operator set."""
    return helper.make_node(op, inputs, outputs, name=name, **attributes)


def module_of(node: onnx.NodeProto) -> str:
    """Return the module path that a node of an exported graph was named after, such as `encoder.layer.0.output`."""
    return node.name.rpartition("/")[0]


def save_graph(model: onnx.ModelProto, path: Path, external_data_bytes: int = EXTERNAL_DATA_BYTES) -> list[str]:
    """Write a graph and return the names of the files written.

    Past `external_data_bytes` its weights go to `<name>_data` beside it, the name that other tools fetch. What an
    earlier graph of that name left there is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.name}_data")
    data.unlink(missing_ok=True)  # onnx appends to it
    # Counted by hand: protobuf refuses to measure a message past 2 GiB.
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= external_data_bytes:
        path.write_bytes(model.SerializeToString())
        return [path.name]
    onnx.save_model(model, str(path), save_as_external_data=True, location=data.name, size_threshold=1024)
    return [path.name, data.name]
