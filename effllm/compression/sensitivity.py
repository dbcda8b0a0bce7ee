"""How much each linear layer of a graph matters: what the outputs move when it alone is int8.

The ranking is kept for the life of the process, so that trials on one graph with the same texts pay for it once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from effllm.compression.grids import Grid
from effllm.compression.int8_graph import find_linears, quantize_static
from effllm.compression.method import GraphJob
from effllm.exporters.graph import Graph, save_graph
from effllm.runtime.tokenizer import Encoding

TEXTS = 64

_ranked: dict[str, dict[str, float]] = {}


def rank(job: GraphJob, grids: Mapping[str, Grid], levels: int) -> dict[str, float]:
    """Return how far the outputs of `job.start` move by each group of linear layers in int8, the farthest first.

    Keys are the groups' names. The distance is the mean KL divergence of distributions (over the last axis), or one
    minus the cosine of embeddings, over at most 64 calibration texts, each run alone.
    """
    encodings = job.encodings()[:TEXTS]
    key = _key(job, encodings, grids, levels)
    if key not in _ranked:
        _ranked[key] = _measure(job, encodings, grids, levels)
    return dict(_ranked[key])


def _measure(job: GraphJob, encodings: Sequence[Encoding], grids: Mapping[str, Grid], levels: int) -> dict[str, float]:
    dense = job.predictor(job.start, "float").run(encodings, batch_size=1)
    groups = find_linears(Graph(onnx.load(str(job.start))))
    distances = {}
    for group in job.track(groups, "ranking layers", len(groups)):
        graph = Graph(onnx.load(str(job.start)))
        quantize_static(graph, {group.input: grids[group.input]}, levels)
        file = job.work / "alone" / "model.onnx"
        save_graph(graph.finish(), file)
        moved = job.predictor(file, group.name).run(encodings, batch_size=1)
        distances[group.name] = float(np.mean([_distance(a, b) for a, b in zip(dense, moved, strict=True)]))
    return dict(sorted(distances.items(), key=lambda item: -item[1]))


def _key(job: GraphJob, encodings: Sequence[Encoding], grids: Mapping[str, Grid], levels: int) -> str:
    seen = hashlib.sha256(job.start.read_bytes())
    seen.update(repr(([e.ids for e in encodings], levels)).encode())
    for name, grid in sorted(grids.items()):
        seen.update(repr((name, grid.range, None if grid.factors is None else grid.factors.tobytes())).encode())
    return seen.hexdigest()


def _distance(dense: Mapping[str, np.ndarray], moved: Mapping[str, np.ndarray]) -> float:
    return max(distance(name, dense[name], moved[name]) for name in dense)


def distance(name: str, dense: np.ndarray, moved: np.ndarray) -> float:
    """Return how far an output (…, width) moved: 0 where it did not.

    A single score has no distribution; its distance is the squared difference. An output of no places did not move.
    """
    if not dense.size:
        return 0.0
    a, b = dense.astype(np.float64), moved.astype(np.float64)
    if name == "last_hidden_state":
        sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return float(np.mean(1 - (a * b).sum(axis=-1) / np.maximum(sizes, 1e-12)))
    if a.shape[-1] == 1:
        return float(np.mean((a - b) ** 2))
    p, q = _log_softmax(a), _log_softmax(b)
    return float(np.mean((np.exp(p) * (p - q)).sum(axis=-1)))


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
