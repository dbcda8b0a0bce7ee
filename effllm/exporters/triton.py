"""A model repository for NVIDIA's Triton Inference Server: one ONNX model, its configuration, and what a client needs.

DIR/NAME/config.pbtxt      what Triton reads
DIR/NAME/metadata.json     the same tensors as the Open Inference Protocol describes them
DIR/NAME/1/model.onnx      the graph, with its weights beside it where they are apart
DIR/NAME/tokenizer/        tokenizer and model config: Triton runs tensors, so the client makes them of texts
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from effllm.errors import CheckFailed, Unsupported
from effllm.exporters.onnx import AXES
from effllm.folder import open_folder, write_json
from effllm.runtime.engine import open_engine
from effllm.runtime.tokenizer import TextTokenizer, pad_batch
from effllm.variant import Variant, sha256

MAX_BATCH = 32
DATATYPES = {onnx.TensorProto.INT64: ("TYPE_INT64", "INT64"), onnx.TensorProto.FLOAT: ("TYPE_FP32", "FP32")}
"""The element types that effllm's graphs have: Triton's name, and the Open Inference Protocol's."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph: its name, its ONNX element type, and its dimensions, -1 for any size."""

    name: str
    kind: int
    dims: tuple[int, ...]


def interface(file: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs and outputs of an ONNX file. Raises Unsupported when their first axis is not a free one."""
    graph = onnx.load(file, load_external_data=False).graph
    inputs, outputs = ([_tensor(value) for value in values] for values in (graph.input, graph.output))
    for tensor in (*inputs, *outputs):
        if tensor.kind not in DATATYPES or tensor.dims[:1] != (-1,):
            raise Unsupported(f"{file}: {tensor.name} is not a batch of {AXES[0]} rows that Triton could serve")
    return inputs, outputs


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    return Tensor(value.name, kind.elem_type, dims)


def config_text(name: str, inputs: list[Tensor], outputs: list[Tensor], *, batch_dependent: bool) -> str:
    """Return `config.pbtxt`, in protobuf's text form.

    Dynamic batching is only for models whose answers do not depend on their batch. The others get at most one text a
    request: with `max_batch_size: 0`, Triton would complete the configuration with a batcher of its own.
    """
    batch = 1 if batch_dependent else MAX_BATCH
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', 'default_model_filename: "model.onnx"']
    lines.append(f"max_batch_size: {batch}")
    lines += [_entry("input", tensor) for tensor in inputs]
    lines += [_entry("output", tensor) for tensor in outputs]
    lines.append("instance_group [ { kind: KIND_CPU count: 1 } ]")
    if not batch_dependent:
        # No delay: on a CPU, waiting for company costs more than a fuller batch gives.
        lines.append("dynamic_batching { max_queue_delay_microseconds: 0 }")
    lines += [
        "version_policy { latest { num_versions: 1 } }",
        # With free shapes, ONNX Runtime would keep a plan for each shape seen.
        'parameters { key: "enable_mem_pattern" value { string_value: "0" } }',
        'parameters { key: "inter_op_thread_count" value { string_value: "1" } }',
    ]
    return "\n".join([*lines, ""])


def _entry(kind: str, tensor: Tensor) -> str:
    dims = ", ".join(str(dim) for dim in tensor.dims[1:])  # the batch axis is implied by max_batch_size
    return f'{kind} [ {{ name: "{tensor.name}" data_type: {DATATYPES[tensor.kind][0]} dims: [ {dims} ] }} ]'


def metadata(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> dict[str, Any]:
    """Return what `GET /v2/models/NAME` answers in the Open Inference Protocol."""

    def described(tensors: list[Tensor]) -> list[dict[str, Any]]:
        return [{"name": t.name, "datatype": DATATYPES[t.kind][1], "shape": list(t.dims)} for t in tensors]

    return {
        "name": name,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": described(inputs),
        "outputs": described(outputs),
    }


def write_triton(variant: Variant, name: str, target: Path) -> str:
    """Write the repository of a checked ONNX variant into `target`; return the path of its graph there."""
    base, graph = target / name, Path(str(variant.manifest["model_file"]))
    (base / "1").mkdir(parents=True)
    model = base / "1" / "model.onnx"
    shutil.copyfile(variant.path / graph, model)
    for file in map(Path, variant.manifest["files"]):
        if file.parent == graph.parent and file.name.startswith(f"{graph.name}_data"):
            shutil.copyfile(variant.path / file, base / "1" / file.name)  # the graph knows it by this name
        elif file.parts[0] != "onnx" and file.suffix not in {".onnx", ".md"}:
            (base / "tokenizer" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(variant.path / file, base / "tokenizer" / file)
    inputs, outputs = interface(model)
    config = config_text(name, inputs, outputs, batch_dependent=variant.batch_dependent)
    (base / "config.pbtxt").write_text(config, encoding="utf-8")
    write_json(base / "metadata.json", metadata(name, inputs, outputs))
    _check(variant, base, outputs)
    return model.relative_to(target).as_posix()


def _check(variant: Variant, base: Path, outputs: list[Tensor]) -> None:
    """Open what was written, from its own tokenizer on, and run a text. Raises CheckFailed where it differs."""
    written, source = base / "1" / "model.onnx", variant.path / str(variant.manifest["model_file"])
    if sha256(written) != sha256(source):
        raise CheckFailed(f"{written.name} is not a copy of {source}")
    folder = open_folder(base / "tokenizer", weights=False)
    feeds = pad_batch([TextTokenizer.open(folder).encode("Is this what was checked?")], 0)
    got, expected = (
        open_engine("onnxruntime", file, auto_class="", threads=1).run(feeds) for file in (written, source)
    )
    for tensor in outputs:
        array = got[tensor.name]
        fits = len(array.shape) == len(tensor.dims) and all(
            d in {-1, n} for d, n in zip(tensor.dims, array.shape, strict=True)
        )
        if not fits or not np.array_equal(array, expected[tensor.name]):
            raise CheckFailed(f"{tensor.name} of the written repository is {array.shape}, promised are {tensor.dims}")
