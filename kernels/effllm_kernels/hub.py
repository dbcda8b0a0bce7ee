"""The package in the layout that Hugging Face's `kernels` loads: the same Python files for CUDA and for the CPU.

    DIR/build/torch-cuda/metadata.json, __init__.py, …      picked by a torch built for CUDA
    DIR/build/torch-cpu/…                                   picked by a torch built for the CPU

`kernels.get_local_kernel(DIR)` loads it, and with LOCAL_KERNELS="org/name=DIR" in the environment so does transformers'
`attn_implementation="org/name"`, offline. Uploaded to a hub repository of kind kernel, DIR is what others load.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

NAME, VERSION, LICENSE = "effllm-kernels", 1, "Apache-2.0"
BACKENDS = ("cuda", "cpu")
PACKAGE = Path(__file__).parent
LEFT_OUT = {"hf.py", "hub.py"}
"""A hub kernel may import torch and triton only, and does not write kernels."""


def write_layout(folder: str | Path) -> Path:
    """Write the layout into a folder, in place of an earlier layout's `build` there, and return the folder.

    Raises FileExistsError, having changed nothing, for a `build` that holds anything else.
    """
    target = Path(folder)
    build = target / "build"
    if build.exists():
        if not _is_layout(build):
            raise FileExistsError(f"{build} was not written by effllm_kernels, so it stays; choose another folder")
        shutil.rmtree(build)
    files = [file for file in sorted(PACKAGE.glob("*.py")) if file.name not in LEFT_OUT]
    for backend in BACKENDS:
        variant = build / f"torch-{backend}"
        variant.mkdir(parents=True)
        text = json.dumps(metadata(files, backend), indent=2) + "\n"
        (variant / "metadata.json").write_text(text, encoding="utf-8")  # first: it says whose folder this is
        for file in files:
            shutil.copyfile(file, variant / file.name)
    return target


def _is_layout(build: Path) -> bool:
    """Return whether a folder holds nothing but variants that `write_layout` wrote."""
    try:
        told = [json.loads((variant / "metadata.json").read_text(encoding="utf-8")) for variant in build.iterdir()]
    except (OSError, ValueError):
        return False
    return all(isinstance(one, dict) and one.get("name") == NAME for one in told)


def metadata(files: list[Path], backend: str) -> dict[str, Any]:
    """Return a variant's `metadata.json`; its id names the contents, so that two versions can live in one process."""
    contents = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()
    return {
        "id": f"_{NAME.replace('-', '_')}_{backend}_{contents[:12]}",
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
    }
