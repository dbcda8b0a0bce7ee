"""The house rules that code cannot break unnoticed: who imports whom, what importing costs, what the tables hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "effllm"
KERNELS = Path(__file__).parent.parent / "kernels" / "effllm_kernels"
LEAVES = {"errors", "files", "settings", "rows", "machine", "progress", "variant", "folder", "tasks", "hf"}
NO_TORCH = {"runtime", "serving", "measure", "report", "data", "cli"} | LEAVES - {"hf"}
# Each room of the house and the rooms it may import; every room may import the leaves.
ARROWS = {
    "data": set(),
    "report": set(),
    "measure": set(),
    "runtime": set(),
    "serving": {"runtime"},
    "exporters": {"data", "report", "runtime", "measure"},
    "compression": {"data", "exporters", "runtime", "measure", "train"},
    "lineup": {"data", "runtime", "measure", "compression"},
    "train": {"data", "report", "runtime", "measure"},
    "cli": {"data", "runtime", "serving", "measure", "report", "exporters", "compression", "lineup", "train"},
    "__main__": {"cli"},
    "__init__": {"compression", "data", "lineup", "runtime", "train"},
}
LEAF_ARROWS = {
    "errors": {"rows"},  # for type checkers only
    "settings": {"errors"},
    "rows": {"errors", "files"},
    "files": set(),
    "machine": {"errors"},
    "progress": set(),
    "folder": {"errors", "variant"},
    "variant": {"errors", "machine", "rows"},
    "hf": {"errors", "folder", "tasks"},
    "tasks": {"errors", "folder", "runtime"},  # runtime's Encoding, for type checkers only
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, run_time_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    if run_time_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped |= {child for part in node.body for child in ast.walk(part)}
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("effllm.")}
    rooms = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()}
    return (names & rooms) - {"__init__"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_arrows(path: Path) -> None:
    own = room(path)
    allowed = LEAF_ARROWS[own] if own in LEAVES else ARROWS[own] | LEAVES
    extra = rooms_imported(path) - allowed - {own}
    assert not extra, f"{path.relative_to(PACKAGE)} may not import {sorted(extra)}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_only_some_rooms_may_load_torch(path: Path) -> None:
    if room(path) in NO_TORCH and path.name != "torch.py":
        heavy = {name.split(".")[0] for name in imports(path, run_time_only=True)} & {"torch", "transformers"}
        assert not heavy, f"{path.relative_to(PACKAGE)} imports {heavy}"


def test_kernels_import_torch_triton_and_the_standard_library_only() -> None:
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                continue  # a model hub loads the package under another name, so its own modules are relative
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            optional = {"transformers"} if path.name == "hf.py" else set()
            extra = {name.split(".")[0] for name in names} - allowed - optional
            assert not extra, f"{path.name} imports {sorted(extra)}"
    assert not (KERNELS.parent / "__init__.py").exists(), "it would shadow the package 'kernels' of transformers"


def test_a_method_imports_no_other_method() -> None:
    from effllm.compression import METHODS

    files = {target.split(":")[0] for target in METHODS.values()}
    for name in files:
        path = PACKAGE / Path(*name.split(".")[1:]).with_suffix(".py")
        assert not imports(path) & (files - {name})


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import effllm", ("torch", "transformers", "onnxruntime", "onnx", "numpy", "rich")),
        ("from effllm.cli import main; main(['--help'])", ("torch", "transformers", "onnxruntime", "numpy", "rich")),
        ("import effllm; effllm.Int8, effllm.open, effllm.TASKS", ("torch", "transformers")),
        ("from effllm.cli import main; main(['pretrain', '--help'])", ("torch", "transformers")),
        ("from effllm.cli import main; main(['finetune', '--help'])", ("torch", "transformers")),
    ],
)
def test_importing_is_light(code: str, forbidden: tuple[str, ...]) -> None:
    check = f"{code}\nimport sys\nprint('LOADED', [name for name in {forbidden!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "LOADED []"


def test_every_public_name_exists_and_is_written_out() -> None:
    import effllm

    assert sorted(effllm.__all__) == sorted(set(effllm.__all__))
    for name in effllm.__all__:
        assert getattr(effllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        effllm.compres  # noqa: B018


def test_every_verb_task_and_engine_file_has_its_line() -> None:
    from effllm.cli import COMMANDS
    from effllm.runtime.engine import ENGINES
    from effllm.tasks import TASKS

    shared = {"__init__", "bench_url", "console", "interrupt", "options", "training"}
    verbs = {p.stem for p in (PACKAGE / "cli").glob("*.py")} - shared
    assert verbs == {target.split(":")[0].rsplit(".", 1)[1] for target in COMMANDS.values()}
    tasks = {p.stem for p in (PACKAGE / "tasks").glob("*.py")} - {"__init__", "multi_label", "task"}
    assert tasks == {name.replace("-", "_") for name in TASKS}
    engines = {target.split(":")[0].rsplit(".", 1)[1] for target in ENGINES.values()}
    assert engines == {p.stem for p in (PACKAGE / "runtime").glob("*.py") if "def run(self, feeds" in p.read_text()} - {
        "engine"
    }


def test_every_method_is_a_frozen_dataclass_with_help_for_each_setting() -> None:
    import dataclasses

    from effllm.compression import METHODS, method_class
    from effllm.settings import describe

    for name in METHODS:
        method = method_class(name)
        assert dataclasses.is_dataclass(method)
        assert method.__dataclass_params__.frozen
        assert method.name == name
        assert all(text for *_, text in describe(method)), f"{name} has a setting without help"


def test_files_and_functions_stay_readable() -> None:
    for path in [*modules(), *KERNELS.rglob("*.py")]:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 400, f"{path.name} is too long"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                body = node.end_lineno - node.body[0].lineno
                assert body <= 60, f"{path.name}: {node.name} is too long"


def test_no_public_function_takes_keyword_leftovers() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name != "node":
                assert node.args.kwarg is None, f"{path.name}: {node.name} takes **{node.args.kwarg.arg}"
