"""Which form of the exported graph ONNX Runtime's CPU kernels run fastest.

    python benchmarks/graph_form.py

Exports all-MiniLM-L6-v2 as effllm does, with ONNX Runtime's fusions allowed (`Add` instead of `Sum`), and with one
`Attention` operator per layer (sdpa, opset 23), and times them interleaved in one process, one thread. Writes
`results/graph_form.jsonl`. Does not measure other models, processors, or more threads.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
import transformers
from onnx_ir import serde
from transformers.exporters import OnnxConfig, OnnxExporter

from effllm import machine
from effllm.data.packaged import minilm
from effllm.exporters.graph import Graph, save_graph
from effllm.exporters.onnx import export_graph, plain_sums
from effllm.exporters.source import load_source
from effllm.folder import open_folder
from effllm.measure.clock import time_interleaved
from effllm.measure.statistics import median_interval, ratio_of_medians
from effllm.rows import Row, write_rows
from effllm.runtime.ort import OrtEngine
from effllm.tasks import task_of

RESULTS = Path(__file__).parent / "results" / "graph_form.jsonl"
ROUNDS = 15
BASELINE = "eager, opset 20, fusions allowed"


def graphs() -> dict[str, onnx.ModelProto]:
    """Return the graphs to compare."""
    folder = open_folder(minilm())
    source = load_source(folder, task_of(folder))
    plain = export_graph(source)
    fused = onnx.ModelProto()
    fused.CopyFrom(plain)
    for node in fused.graph.node:
        node.op_type = "Add" if node.op_type == "Sum" else node.op_type
    model = transformers.AutoModel.from_pretrained(folder.path, attn_implementation="sdpa").eval()
    ids = torch.randint(1000, 20000, (2, 9))
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    exported = OnnxExporter().export(model, sample, config=OnnxConfig(dynamic=True, opset_version=23))
    attention = serde.serialize_model(exported.program)
    del attention.graph.output[1:]
    plain_attention = onnx.ModelProto()
    plain_attention.CopyFrom(attention)
    graph = Graph(plain_attention)
    plain_sums(graph)
    return {
        BASELINE: fused,
        "eager, opset 20, plain sums (exported)": plain,
        "Attention operator, opset 23, fusions allowed": attention,
        "Attention operator, opset 23, plain sums": graph.finish(),
    }


def main() -> None:
    """Measure and write the rows."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        engines = {}
        for index, (name, graph) in enumerate(graphs().items()):
            file = Path(scratch) / f"{index}.onnx"
            save_graph(graph, file)
            engines[name] = OrtEngine.open(file, auto_class="", threads=1)
        for batch, tokens in ((1, 16), (1, 128), (16, 64)):
            ids = np.random.default_rng(0).integers(1000, 20000, (batch, tokens))
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            times = time_interleaved({name: partial(e.run, feeds) for name, e in engines.items()}, ROUNDS)
            how = {"batch": batch, "tokens": tokens, "threads": 1}
            for name, values in times.items():
                median, low, high = median_interval(values)
                rows.append(Row("latency p50", median, "ms", name, ROUNDS, low, high, how, machine.describe()))
                ratio, low, high = ratio_of_medians(times[BASELINE], values)
                over = {"over": BASELINE, **how}
                rows.append(Row("speed-up", ratio, "x", name, ROUNDS, low, high, over, machine.describe()))
                print(f"{batch} × {tokens}  {name:50} {median:8.2f} ms  {ratio:.2f}×")
    write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
