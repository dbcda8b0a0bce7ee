"""The packaged model is the original or an error."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from effllm.data import packaged
from effllm.errors import ArtifactError, MissingExtra
from effllm.variant import sha256


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of another name with a model folder, whose code fails when it is run."""
    folder = tmp_path / "some_packaged_model"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the code was run')")
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packaged, "PACKAGE", folder.name)
    importlib.invalidate_caches()
    return folder


def test_the_original_is_found_without_running_the_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "WEIGHTS_SHA256", sha256(package / "model" / "model.safetensors"))
    assert packaged.minilm() == package / "model"
    assert package.name not in sys.modules


def test_other_weights_are_refused(package: Path) -> None:
    with pytest.raises(ArtifactError, match="is not the original all-MiniLM-L6-v2"):
        packaged.minilm()


def test_a_package_without_the_weights_is_refused(package: Path) -> None:
    (package / "model" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        packaged.minilm()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "PACKAGE", "no_such_package")
    with pytest.raises(MissingExtra, match=r"effllm\[demo\]"):
        packaged.minilm()
