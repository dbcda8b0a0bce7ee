"""The int8 rewriting of an exported encoder graph.

Only the linear layers inside the encoder's layer stack are rewritten, and the embedding tables. Everything else stays
float32: LayerNorm, softmax, attention products, activations, pooler and task heads. Standard ONNX operators only.

    dynamic   x → DynamicQuantizeLinear → MatMulInteger → × (scale of x · scales of W) → + bias
              one scale for the whole batch, found at run time: an answer depends on its batch
    static    x → [× 1/factors] → QuantizeLinear → DequantizeLinear → MatMul(W dequantised) → + bias
              the scale is a constant: an answer does not depend on its batch

ONNX Runtime fuses either form to its MatMulIntegerToFloat kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from effllm.compression.grids import Grid, quantize_weight
from effllm.exporters.graph import FLOAT, Graph, module_of, node

IN_STACK = re.compile(r"(^|\.)\d+(\.|$)")
"""A module inside the encoder's list of layers has the layer's number in its path; heads and poolers have none."""


@dataclass(frozen=True)
class Linears:
    """The linear layers that read one value: its name, and their nodes in graph order."""

    input: str
    nodes: tuple[onnx.NodeProto, ...]

    @property
    def name(self) -> str:
        """The module paths of the layers, joined."""
        return " + ".join(module_of(n) for n in self.nodes)


def find_linears(graph: Graph) -> list[Linears]:
    """Return the linear layers of the encoder's layer stack, grouped by the value they read."""
    groups: dict[str, list[onnx.NodeProto]] = {}
    for n in graph.nodes:
        by_weight = n.op_type == "MatMul" and graph.is_constant(n.input[1]) and len(graph.shape(n.input[1])) == 2
        if by_weight and IN_STACK.search(module_of(n)):
            groups.setdefault(n.input[0], []).append(n)
    return [Linears(value, tuple(nodes)) for value, nodes in groups.items()]


def quantize_dynamic(graph: Graph, grids: Mapping[str, Grid], levels: int) -> None:
    """Rewrite the linear layers whose input is in `grids` to dynamic int8, in place."""

    def form(n: onnx.NodeProto, x: str) -> list[onnx.NodeProto]:
        weight, scales, zeros = _store_weight(graph, n, grids[n.input[0]], levels)
        out, base = n.output[0], n.name
        return [
            node("MatMulInteger", [f"{x}_q", weight, f"{x}_zero", zeros], [f"{out}_int"], f"{base}/MatMulInteger"),
            node("Cast", [f"{out}_int"], [f"{out}_float"], f"{base}/Cast", to=FLOAT),
            node("Mul", [f"{x}_scale", scales], [f"{out}_scales"], f"{base}/Scales"),
            node("Mul", [f"{out}_float", f"{out}_scales"], [out], f"{base}/Mul"),
        ]

    def quantise(x: str, _: Grid) -> list[onnx.NodeProto]:
        return [node("DynamicQuantizeLinear", [x], [f"{x}_q", f"{x}_scale", f"{x}_zero"], f"{x}/DynamicQuantizeLinear")]

    _rewrite(graph, grids, form, quantise)


def quantize_static(graph: Graph, grids: Mapping[str, Grid], levels: int) -> None:
    """Rewrite the linear layers whose input is in `grids` to static int8, in place."""

    def form(n: onnx.NodeProto, x: str) -> list[onnx.NodeProto]:
        weight, scales, zeros = _store_weight(graph, n, grids[n.input[0]], levels)
        out = n.output[0]
        return [
            node("DequantizeLinear", [weight, scales, zeros], [f"{out}_w"], f"{n.name}/DequantizeLinear", axis=1),
            node("MatMul", [f"{x}_dq", f"{out}_w"], [out], n.name),
        ]

    def quantise(x: str, grid: Grid) -> list[onnx.NodeProto]:
        scale = graph.set_constant(f"{x}_scale", np.array(grid.range.scale, np.float32))
        zero = graph.set_constant(f"{x}_zero", np.array(grid.range.zero_point, np.uint8))
        return [
            node("QuantizeLinear", [x, scale, zero], [f"{x}_q"], f"{x}/QuantizeLinear"),
            node("DequantizeLinear", [f"{x}_q", scale, zero], [f"{x}_dq"], f"{x}/DequantizeLinear"),
        ]

    _rewrite(graph, grids, form, quantise)


def _rewrite(
    graph: Graph,
    grids: Mapping[str, Grid],
    form: Callable[[onnx.NodeProto, str], list[onnx.NodeProto]],
    quantise: Callable[[str, Grid], list[onnx.NodeProto]],
) -> None:
    """Replace each linear layer by `form(node, quantised input)` after one `quantise(input)` per distinct input."""
    chosen = {n.name for group in find_linears(graph) if group.input in grids for n in group.nodes}
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()
    for n in graph.nodes:
        if n.name not in chosen:
            nodes.append(n)
            continue
        x, grid = n.input[0], grids[n.input[0]]
        smooth = x if grid.factors is None else f"{x}_smooth"
        if x not in done:
            done.add(x)
            if grid.factors is not None:
                inverse = graph.set_constant(f"{x}_factors", (1 / grid.factors).astype(np.float32))
                nodes.append(node("Mul", [x, inverse], [smooth], f"{x}/Smooth"))
            nodes += quantise(smooth, grid)
        nodes += form(n, smooth)
    graph.replace_nodes(nodes)


def _store_weight(graph: Graph, n: onnx.NodeProto, grid: Grid, levels: int) -> tuple[str, str, str]:
    weight = graph.constant(n.input[1])
    q, scales = quantize_weight(weight if grid.factors is None else weight * grid.factors[:, None], levels)
    base = f"{module_of(n)}.weight"  # not the initializer's name: layers of equal weights share one
    return (
        graph.set_constant(f"{base}_int8", q),
        graph.set_constant(f"{base}_scales", scales),
        graph.set_constant(f"{base}_zeros", np.zeros(len(scales), dtype=np.int8)),
    )


def shift_biases(graph: Graph, shifts: Mapping[str, np.ndarray]) -> None:
    """Add to the bias after each named linear layer, in place. Layers without a bias are left alone.

    The sum is a constant of its own: layers of equal biases share one.
    """
    readers = graph.readers()
    for group in find_linears(graph):
        for n in group.nodes:
            followers = readers.get(n.output[0], [])
            if n.name in shifts and len(followers) == 1 and followers[0].op_type in {"Add", "Sum"}:
                add = followers[0]
                for place, name in enumerate(add.input):
                    if graph.is_constant(name) and graph.shape(name) == shifts[n.name].shape:
                        shifted = graph.constant(name) + shifts[n.name]
                        add.input[place] = graph.set_constant(f"{add.output[0]}_bias", shifted)


def quantize_embeddings(graph: Graph) -> list[str]:
    """Store embedding tables as int8 with one scale per row, in place; return their names.

    Rows are gathered as int8 and scaled afterwards, so the float table never exists in memory. A table that something
    else reads too, such as a masked-LM head tied to it, stays float: storing it twice would cost what is saved.
    """
    readers = graph.readers()
    nodes, tables = [], []
    for n in graph.nodes:
        table = n.input[0] if n.input else ""
        if n.op_type != "Gather" or not graph.is_constant(table) or len(graph.shape(table)) != 2:
            nodes.append(n)
            continue
        rows, width = graph.shape(table)
        if rows < 256 or width < 16 or len(readers[table]) > 1 or _axis(n) != 0:
            nodes.append(n)
            continue
        q, scales = quantize_weight(graph.constant(table).T)
        codes = graph.set_constant(f"{table}_int8", q.T)
        steps = graph.set_constant(f"{table}_scales", scales[:, None])
        out, ids = n.output[0], n.input[1]
        tables.append(table)
        nodes += [
            node("Gather", [codes, ids], [f"{out}_codes"], n.name),
            node("Gather", [steps, ids], [f"{out}_steps"], f"{n.name}/Scales"),
            node("Cast", [f"{out}_codes"], [f"{out}_float"], f"{n.name}/Cast", to=FLOAT),
            node("Mul", [f"{out}_float", f"{out}_steps"], [out], f"{n.name}/Mul"),
        ]
    graph.replace_nodes(nodes)
    return tables


def _axis(n: onnx.NodeProto) -> int:
    return next((a.i for a in n.attribute if a.name == "axis"), 0)
