"""infinity, which runs effllm's own ONNX file through optimum.

    INFINITY_PYTHON benchmarks/peers/infinity_server.py DIR --port 9003 --threads 2

Runs in an environment that has `infinity-emb[server,optimum]`; effllm is not needed. infinity 0.0.78 finds no ONNX file
in a folder below the model's, so the model is laid out flat in a temporary folder, by links. Answers OpenAI's
`POST /v1/embeddings`. ONNX Runtime takes as many threads as there are cores, so `--threads` must be that many.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Become infinity's server, until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    if options.threads != len(os.sched_getaffinity(0)):
        parser.error("infinity runs as many threads as there are cores")
    flat = Path(tempfile.mkdtemp(prefix="infinity-"))
    for file in (*options.folder.iterdir(), *(options.folder / "onnx").iterdir()):
        if file.name != "onnx":
            (flat / file.name).symlink_to(file.absolute())
    os.chdir(flat)
    os.environ |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    flags = {"--model-id": ".", "--served-model-name": "m", "--engine": "optimum", "--device": "cpu"}
    flags |= {"--host": "127.0.0.1", "--port": str(options.port), "--url-prefix": "/v1", "--log-level": "warning"}
    switches = ["--no-bettertransformer", "--no-model-warmup"]
    start = [sys.executable, "-c", "from infinity_emb.cli import cli; cli()", "v2"]
    os.execv(sys.executable, [*start, *(word for flag in flags.items() for word in flag), *switches])


if __name__ == "__main__":
    main()
