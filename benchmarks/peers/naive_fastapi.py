"""The server that people write by hand: transformers' tokenizer and one `session.run` a request, in FastAPI's threads.

    python benchmarks/peers/naive_fastapi.py DIR --port 9001 --threads 2

DIR is a folder that `effllm export` or `effllm compress` wrote for an embedding model. Answers `POST /embed` with
`{"inputs": [text, …]}`, as TEI does, by mean pooling. ONNX Runtime gets `--threads` threads, as every peer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoTokenizer


class Inputs(BaseModel):
    """The body of a request."""

    inputs: list[str]


def create_app(folder: Path, threads: int) -> FastAPI:
    """Return the app, its model loaded."""
    manifest = json.loads((folder / "effllm.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(folder / manifest["model_file"]), options, providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    app = FastAPI()

    @app.post("/embed")
    def embed(body: Inputs) -> list[list[float]]:
        tokens = tokenizer(body.inputs, padding=True, truncation=True, return_tensors="np")
        hidden = session.run(["last_hidden_state"], {name: tokens[name] for name in names})[0]
        mask = tokens["attention_mask"][:, :, None]
        pooled = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
        unit: np.ndarray = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return unit.tolist()

    return app


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(create_app(options.folder, options.threads), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
