"""`export --triton` and `export --kserve`: a checked ONNX variant in the form that a model server loads."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from effllm.compression.pipeline import export
from effllm.errors import SettingError, Unsupported, unknown_name
from effllm.exporters.card import repository_card
from effllm.exporters.kserve import write_kserve
from effllm.exporters.triton import write_triton
from effllm.progress import Track, silent
from effllm.variant import Variant, check_target, create, is_variant, write_manifest

FORMS: dict[str, Callable[[Variant, str, Path], str]] = {"triton": write_triton, "kserve": write_kserve}
"""Form -> what writes it: (variant, name, folder) to the path of the graph in the folder."""


def export_repository(
    model: str | Path,
    out: str | Path,
    form: str,
    *,
    task: str | None = None,
    force: bool = False,
    track: Track = silent,
) -> Variant:
    """Write a model repository: `"triton"` for Triton Inference Server, `"kserve"` for `effllm serve` under KServe.

    An ONNX folder that effllm wrote is packed as it is, its graph byte for byte; any other model is exported in float32
    first. The written folder is opened again, and Triton's graph is run from it, before it appears.

    Raises SettingError, ArtifactError or Unsupported for bad input, CheckFailed when what was written is not the model.
    """
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
    target = Path(out)
    check_target(target, force=force)
    with create(target, force=force) as staging:
        with _onnx_variant(model, staging / ".work", task, track) as variant:
            name = served_name(model)
            model_file = FORMS[form](variant, name, staging)
            content = {
                key: value for key, value in variant.manifest.items() if key not in {"files", "versions", "machine"}
            }
            step = {"verb": "export", "form": form, "name": name}
            content |= {"form": form, "model_file": model_file, "steps": [*variant.manifest.get("steps", []), step]}
            (staging / "README.md").write_text(repository_card(content, form, name), encoding="utf-8")
        write_manifest(staging, content)
    return Variant.open(target)


@contextlib.contextmanager
def _onnx_variant(model: str | Path, work: Path, task: str | None, track: Track) -> Iterator[Variant]:
    """Yield an ONNX variant: the folder itself, checked, or one exported to `work`, which is removed afterwards."""
    folder = Path(model).expanduser()
    if folder.is_dir() and is_variant(folder):
        variant = Variant.open(folder)
        if variant.manifest.get("form"):
            raise Unsupported(f"{folder} is a model repository already; start from the model that it was made of")
        if variant.manifest.get("model_file"):
            if task not in {None, variant.task}:
                raise SettingError(
                    f"{folder} answers {variant.task}; --task {task} needs the model it was exported from"
                )
            yield variant
            return
    try:
        yield export(model, work, task=task, track=track)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def served_name(model: str | Path) -> str:
    """Return a name that Triton, Kubernetes and URLs take: the model's own, in small letters, digits and hyphens."""
    own = Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else Path(model).name
    name = re.sub(r"[^a-z0-9]+", "-", own.lower()).strip("-")[:50].strip("-")
    return name if name[:1].isalpha() else f"m-{name}".strip("-")
