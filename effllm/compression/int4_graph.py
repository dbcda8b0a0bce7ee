"""The int4 rewriting of an exported encoder graph: linear layers become ONNX Runtime's `com.microsoft.MatMulNBits`.

    x → MatMulNBits(codes, scales[, zero points]) → + bias

The operator multiplies by (code - zero point) × scale; a missing zero point is 8. Its `accuracy_level` says how the
products are computed: 1 in float32; 4 with x rounded to int8 per token and group, faster and less exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import helper

from effllm.compression.gptq import Coded
from effllm.exporters.graph import Graph, module_of, node

DOMAIN = "com.microsoft"
ACCURACY_LEVELS = {"float32": 1, "int8": 4}


def pack(codes: torch.Tensor) -> np.ndarray:
    """Return codes below 16 (…, K) two to a byte, uint8 (…, K / 2 rounded up), the first in the lower half."""
    odd = codes.numpy().astype(np.uint8)
    even = np.concatenate([odd, np.zeros((*odd.shape[:-1], odd.shape[-1] % 2), np.uint8)], axis=-1)
    packed: np.ndarray = even[..., ::2] | (even[..., 1::2] << 4)
    return packed


def quantize_int4(graph: Graph, coded: Mapping[str, Coded], *, symmetric: bool, compute: str) -> None:
    """Rewrite the linear layers whose node is named in `coded`, in place. `compute` is a key of `ACCURACY_LEVELS`."""
    nodes = []
    for n in graph.nodes:
        if n.name not in coded:
            nodes.append(n)
            continue
        weight, base = coded[n.name], f"{module_of(n)}.weight"  # layers of equal weights share an initializer
        rows, columns = weight.codes.shape
        blobs = pack(weight.codes.unflatten(1, (-1, weight.group_size)))
        inputs = [
            n.input[0],
            graph.set_constant(f"{base}_int4", blobs),
            graph.set_constant(f"{base}_scales", weight.scales.numpy()),
        ]
        if not symmetric:
            inputs.append(graph.set_constant(f"{base}_zeros", pack(weight.zeros)))
        sizes = {"K": columns, "N": rows, "bits": 4, "block_size": weight.group_size}
        level = ACCURACY_LEVELS[compute]
        nodes.append(node("MatMulNBits", inputs, n.output, n.name, domain=DOMAIN, accuracy_level=level, **sizes))
    graph.replace_nodes(nodes)
    _import_domain(graph.model)


def _import_domain(model: onnx.ModelProto) -> None:
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
