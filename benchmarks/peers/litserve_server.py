"""effllm's predictor behind LitServe, which batches up to 8 requests that wait.

    LITSERVE_PYTHON benchmarks/peers/litserve_server.py DIR --port 9002 --threads 2

Runs in an environment that has LitServe and effllm's runtime (onnxruntime, tokenizers, numpy, scipy; no torch), effllm
itself on the path. DIR is an exported embedding model; answers `POST /embed` with `{"inputs": [text]}`, one text a
request. One worker by default; a batch is what waits when the one before is done (`batch_timeout=0`), as waiting for
company does not help on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import litserve

from effllm.runtime.predictor import Predictor

MAX_BATCH = 8


class Embed(litserve.LitAPI):
    """Sentence embeddings."""

    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=0.0, api_path="/embed")
        self._folder = folder
        self._threads = threads

    def setup(self, device: str) -> None:
        """Load the model in the worker."""
        self._predictor = Predictor.open(self._folder, threads=self._threads)

    def decode_request(self, request) -> str:  # LitServe makes the endpoint from this signature: no type is any JSON
        """Take the text out of a request."""
        (text,) = request["inputs"]
        return str(text)

    def predict(self, texts: list[str]) -> Any:
        """Embed a batch."""
        return self._predictor.embed(texts)

    def encode_response(self, vector: Any) -> list[list[float]]:
        """Return the answer of one request."""
        return [vector.tolist()]


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the threads")
    options = parser.parse_args()
    server = litserve.LitServer(
        Embed(options.folder, options.threads // options.workers),
        accelerator="cpu",
        workers_per_device=options.workers,
        timeout=60,
    )
    server.run(port=options.port, host="127.0.0.1", num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
