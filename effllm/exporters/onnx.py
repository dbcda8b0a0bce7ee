"""A transformers encoder as an ONNX graph, on top of `transformers.exporters`.

What is added to the exporter's graph: one name for each axis (`batch_size`, `sequence_length`), only the outputs of the
task, nodes and weights named after the module they come from, no traces of the exporting machine, and the form that
ONNX Runtime's CPU kernels run fastest (see `plain_sums`; `benchmarks/graph_form.py` measures the choices).

Attention is exported in its eager form, MatMul–Softmax–MatMul. Opset 23's single `Attention` operator is not faster on
the CPU than this form is, and fewer runtimes load it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from onnx_ir import serde
from transformers.exporters import OnnxConfig, OnnxExporter

from effllm.exporters.graph import Graph
from effllm.exporters.source import Source
from effllm.runtime.tokenizer import inputs_of

OPSET = 20
"""The first opset with a Gelu operator; ONNX Runtime reads it from version 1.17 on."""
AXES = ("batch_size", "sequence_length")


def sample_inputs(source: Source, lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Make a padded int64 batch (B, T) of random vocabulary ids whose rows have the given lengths.

    The second half of each row is its second segment, for models that tell segments apart.
    """
    rng = np.random.default_rng(seed)
    width = max(lengths)
    ids = rng.integers(0, source.folder.config["vocab_size"], (len(lengths), width))
    places, ends = np.arange(width)[None, :], np.array(lengths)[:, None]
    mask = (places < ends).astype(np.int64)
    segments = mask * (2 * places >= ends)
    pad = int(source.folder.config.get("pad_token_id") or 0)
    ids = np.where(mask == 1, np.where(ids == pad, (pad + 1) % source.folder.config["vocab_size"], ids), pad)
    feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask, "token_type_ids": segments}
    return {name: feeds[name] for name in inputs_of(source.model)}


def export_graph(source: Source) -> onnx.ModelProto:
    """Trace the model and return its ONNX graph, float32, opset 20, with the outputs of the task only."""
    sample = {name: torch.from_numpy(array) for name, array in sample_inputs(source, [9, 7]).items()}
    with _quiet():
        exported = OnnxExporter().export(
            source.model, sample, config=OnnxConfig(dynamic=True, opset_version=OPSET, optimize=True)
        )
    model = serde.serialize_model(exported.program)
    _name_axes(model, source)
    graph = Graph(model)
    _name_after_modules(graph)
    plain_sums(graph)
    return graph.finish()


def plain_sums(graph: Graph) -> None:
    """Write the additions before a LayerNormalization or a Gelu as `Sum` instead of `Add`, in place.

    The two are the same sum. ONNX Runtime fuses Add + LayerNormalization to SkipLayerNormalization and Add + Gelu to
    BiasGelu, whose CPU kernels are slower than the operators that they replace; it does not fuse Sum.
    """
    followed = {n.input[0] for n in graph.nodes if n.op_type in {"LayerNormalization", "Gelu"}}
    for node in graph.model.graph.node:
        if node.op_type == "Add" and node.output[0] in followed:
            node.op_type = "Sum"


def _name_axes(model: onnx.ModelProto, source: Source) -> None:
    """Keep the task's outputs, in its order, and give every symbolic axis its shared name."""
    outputs = {output.name: output for output in model.graph.output}
    kept = [outputs[name] for name in source.task.outputs]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    inputs = inputs_of(source.model)
    for value in (*model.graph.input, *model.graph.output):
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param or axis < (2 if value.name in inputs else 1):
                dimension.dim_param = AXES[axis]


def _name_after_modules(graph: Graph) -> None:
    """Name nodes `module/Op_n` and transposed weights `module.weight_T`.

    The exporter's notes go: they hold source paths of the exporting machine.
    """
    renamed: dict[str, str] = {}
    counts: dict[str, int] = {}
    for node in graph.model.graph.node:
        scopes: list[str] = next(
            (ast.literal_eval(p.value) for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), [""]
        )
        module = scopes[-2] if len(scopes) > 1 else ""
        base = f"{module}/{node.op_type}"
        counts[base] = counts.get(base, 0) + 1
        node.name = base if counts[base] == 1 else f"{base}_{counts[base]}"
        del node.metadata_props[:]
        node.doc_string = ""
        if node.op_type == "MatMul" and module and graph.is_constant(node.input[1]):
            weight = renamed.setdefault(node.input[1], f"{module}.weight_T")
            if not graph.is_constant(weight):
                graph.set_constant(weight, graph.constant(node.input[1]))
            node.input[1] = weight
    for entry in (graph.model, graph.model.graph):
        del entry.metadata_props[:]
        entry.doc_string = ""
    for value in (*graph.model.graph.input, *graph.model.graph.output, *graph.model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    graph.model.producer_name = "effllm"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress lines and its warnings about itself; exceptions pass."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
