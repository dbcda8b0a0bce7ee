"""int4: the weights of the encoder's linear layers in 4 bits, for ONNX Runtime's `MatMulNBits`.

Activations stay float32, so answers do not depend on their batch. Codes are chosen by GPTQ (Frantar et al. 2022), one
group of layers after another on what enters it behind those coded before, whose error it makes up for (Li et al. 2025),
or by rounding to nearest. Embedding tables are rounded after that. The file is small; the codes are expanded again for
every product, so that on a CPU the model is rarely faster than int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import torch

from effllm.compression.calibrate import TOKENS, Drift, within
from effllm.compression.gptq import (
    Algorithm,
    Coded,
    Order,
    check_group_size,
    check_groups,
    choose_codes,
)
from effllm.compression.int4_graph import quantize_int4
from effllm.compression.int8_graph import Linears, find_linears, quantize_embeddings
from effllm.compression.method import GraphJob, Result, Stage, check_calibration
from effllm.compression.segments import code_in_order
from effllm.compression.trials import latencies, latency_rows, try_out
from effllm.errors import CheckFailed, GateFailed, Unsupported
from effllm.exporters.graph import Graph, module_of, save_graph
from effllm.measure.statistics import ratio_of_medians
from effllm.runtime.tokenizer import Encoding

FILE_NAME = "onnx/model_q4.onnx"


@dataclass(frozen=True)
class Int4:
    """4-bit weights for ONNX Runtime."""

    name: ClassVar[str] = "int4"
    summary: ClassVar[str] = "4-bit weights in groups for ONNX Runtime (GPTQ); needs no training"
    stage: ClassVar[Stage] = Stage.GRAPH
    identity: ClassVar[Mapping[str, Any]] = {}

    algorithm: Algorithm = field(
        default="gptq", metadata={"help": "let later columns make up for rounding (gptq), or round each weight (rtn)"}
    )
    group_size: int = field(default=128, metadata={"help": "weights along a row that share a scale: 128, 64 or 32"})
    symmetric: bool = field(
        default=False, metadata={"help": "no zero points: the grid of a group is centred on zero, which rounds more"}
    )
    order: Order = field(
        default="activation", metadata={"help": "gptq: columns with the largest inputs first, or as they stand"}
    )
    compute: Literal["float32", "int8"] = field(
        default="float32", metadata={"help": "how products are computed; int8 rounds activations per token and group"}
    )
    embeddings: bool = field(default=True, metadata={"help": "store embedding tables in int8, one scale per row"})
    calibration: int = field(
        default=2000, metadata={"help": f"how many calibration texts to use, of at most {TOKENS:,} tokens together"}
    )
    seed: int = field(default=0, metadata={"help": "chooses the calibration texts"})

    def __post_init__(self) -> None:
        check_group_size(self.name, self.group_size)
        check_calibration(self.name, self.calibration)

    def apply(self, job: GraphJob) -> Result:
        """Calibrate, choose codes, gate, and return the graph."""
        graph = Graph(onnx.load(str(job.start)))
        groups = find_linears(graph)
        if not groups:
            raise CheckFailed("the exported graph has no linear layers that int4 could quantise")
        columns = {module_of(n): graph.shape(n.input[1])[0] for group in groups for n in group.nodes}
        check_groups(self.name, columns, self.group_size)
        if len(columns) < sum(len(group.nodes) for group in groups):
            raise Unsupported("int4: linear layers of this model run several times for a text")
        encodings = within(job.encodings(), TOKENS, self.seed)
        tokens = sum(map(len, encodings))
        coded, layers = self._code(job, graph, groups, encodings)
        quantize_int4(graph, coded, symmetric=self.symmetric, compute=self.compute)
        tables = quantize_embeddings(graph) if self.embeddings else []
        file = job.work / self.name / Path(FILE_NAME).name
        save_graph(graph.finish(), file)
        del graph, coded
        dense, predictor = job.predictor(job.dense, "dense"), job.predictor(file, self.name)
        trial = try_out(job, file, dense, predictor)
        if not trial.passed:
            raise GateFailed(f"{self.name}: {trial.reason}", trial.comparison.rows())
        times = latencies({"dense": dense, self.name: predictor}, job.gate_examples, job.track)
        rows = [*trial.comparison.rows(), *trial.spread_rows(), *latency_rows(times, job.threads)]
        ratio, _, _ = ratio_of_medians(times[self.name], times["dense"])
        notes = [f"{self.name}: {trial.reason}", f"{self.name} takes {ratio:.2f} of the dense model's time here"]
        details = {
            "batch_spread": trial.spread_details(),
            "layers": layers,
            "embedding_tables": tables,
            "calibration_tokens": tokens,
        }
        return Result(file, FILE_NAME, trial.comparison, trial.batch_dependent, rows, details, notes)

    def _code(
        self, job: GraphJob, graph: Graph, groups: list[Linears], encodings: list[Encoding]
    ) -> tuple[dict[str, Coded], dict[str, dict[str, float]]]:
        """Return the codes of each linear layer by its node's name, and its error by its module."""
        coded: dict[str, Coded] = {}
        layers: dict[str, dict[str, float]] = {}

        def code(group: Linears, seen: Drift) -> dict[str, np.ndarray]:
            for n in group.nodes:
                weight = torch.from_numpy(np.ascontiguousarray(graph.constant(n.input[1]).T))
                coded[n.name], error = choose_codes(
                    self.algorithm,
                    weight,
                    seen,
                    self.group_size,
                    symmetric=self.symmetric,
                    order=self.order,
                )
                layers[module_of(n)] = {"relative_error": error}
            return {n.name: coded[n.name].values().T.numpy() for n in group.nodes}

        code_in_order(graph, groups, encodings, job.work, code, threads=job.threads, track=job.track)
        return coded, layers
