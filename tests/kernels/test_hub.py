"""The layout for Hugging Face's kernels holds a package that stands alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from effllm_kernels import hub

INTEROP = Path(__file__).parents[2] / "benchmarks" / "interop"
# The loader's own steps: a spec of the metadata's id at the variant's __init__.py, nothing of the package on the path.
LOAD = """
import importlib.util, json, pathlib, sys, torch
for path in sys.argv[1:]:
    variant = pathlib.Path(path)
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    q = torch.randn(1, 5, 2, 16)
    exact = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3).transpose(1, 2)
    assert (module.flash_attn_func(q, q, q) - exact).abs().max() < 1e-5
assert not any(name.split(".")[0] in ("effllm_kernels", "transformers") for name in sys.modules)
"""


def test_every_variant_loads_alone_and_beside_the_others(tmp_path: Path) -> None:
    build = hub.write_layout(tmp_path) / "build"
    variants = [str(build / f"torch-{backend}") for backend in hub.BACKENDS]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    subprocess.run([sys.executable, "-c", LOAD, *variants], check=True, env=environment, cwd=tmp_path)


def test_metadata_names_the_contents(tmp_path: Path) -> None:
    folder = hub.write_layout(tmp_path) / "build" / "torch-cpu"
    told = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    assert told["id"].isidentifier()
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", told["name"])
    assert told["backend"] == {"type": "cpu"}
    files = sorted(folder.glob("*.py"))
    assert hub.metadata(files, "cpu") == told
    files[0].write_text("changed = True\n", encoding="utf-8")
    assert hub.metadata(files, "cpu")["id"] != told["id"]


def test_an_earlier_layout_is_replaced(tmp_path: Path) -> None:
    variant = hub.write_layout(tmp_path) / "build" / "torch-cpu"
    (variant / "removed_since.py").touch()
    hub.write_layout(tmp_path)
    assert (variant / "__init__.py").is_file()
    assert not (variant / "removed_since.py").exists()


def test_a_build_of_somebody_else_stays(tmp_path: Path) -> None:
    file = tmp_path / "build" / "lib" / "module.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not written by effllm_kernels"):
        hub.write_layout(tmp_path)
    beside = hub.write_layout(tmp_path / "own") / "build" / "notes.txt"
    beside.write_text("kept\n", encoding="utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "build").write_text("a file\n", encoding="utf-8")
    for folder in ("own", "other"):
        with pytest.raises(FileExistsError, match="not written by effllm_kernels"):
            hub.write_layout(tmp_path / folder)
    assert file.is_file()
    assert beside.is_file()


@pytest.mark.slow
def test_the_kernels_package_and_transformers_load_it(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-r", INTEROP / "requirements-kernels.txt"]
    subprocess.run(install, check=True)
    layout = hub.write_layout(tmp_path / "layout")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [python, INTEROP / "check_kernels.py", layout], capture_output=True, text=True, check=True, env=environment
    )
    said = json.loads(done.stdout.splitlines()[-1])
    # float32 sums of ten terms in two orders, through two layers in the model
    assert max(said["get_local_kernel"], said["get_kernel"]) < 2e-6
    assert said["attn_implementation"] < 1e-5
