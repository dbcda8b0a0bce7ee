"""The container files: what they start exists, and what they install is enough to serve and no more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from click.testing import CliRunner
from fakes import FakeModel, FakeModels

from effllm.cli import cli
from effllm.serving.app import create_app
from effllm.serving.settings import ServeSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "serving"
SERVED = """
import importlib.metadata, re, sys
from packaging.requirements import Requirement

def closure(wanted):
    found, todo = set(), list(wanted)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name not in found:
            found.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            todo += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return found

allowed = closure(sys.argv[1:])
owners = importlib.metadata.packages_distributions()

class Refuse:
    def find_spec(self, name, path=None, target=None):
        own = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(name.partition(".")[0], ())}
        if own and not own & (allowed | {"effllm"}):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for module in [name for name in sys.modules if name.startswith("packaging")]:
    del sys.modules[module]
sys.meta_path.insert(0, Refuse())
import effllm.cli.serve, effllm.serving.server, effllm.serving.service, effllm.serving.worker, effllm.runtime.ort
import rich.console, rich.table, uvloop
try:
    import torch
except ModuleNotFoundError:
    print("served without torch")
"""


def requirements() -> dict[str, str]:
    lines = (FOLDER / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions with their arguments, continued lines joined and comments left out."""
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines if line.strip()]


def arguments(name: str) -> str:
    """Return the arguments of an instruction's last occurrence: the one that counts."""
    return [rest for instruction, rest in dockerfile() if instruction == name][-1]


def check_command(command: list[str]) -> None:
    assert command[0] == "serve"
    text = CliRunner().invoke(cli, ["serve", "--help"]).output
    flags = [word for word in command if word.startswith("--")]
    assert {"--host", "--port"} <= set(flags)
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", text)]
    assert command[command.index("--port") + 1] == "8080"
    names = [flag[2:].replace("-", "_") for flag in flags]
    values = [command[command.index(flag) + 1] for flag in flags]
    kinds = {name: type(getattr(ServeSettings(), name)) for name in names}
    ServeSettings(**{name: kinds[name](value) for name, value in zip(names, values, strict=True)})


def check_health(command: list[str]) -> None:
    """Check that a health check asks a path that needs no key, on the port that is served."""
    code = command[-1]
    compile(code, "healthcheck", "exec")
    (url,) = re.findall(r"http://127\.0\.0\.1:8080(/[\w/]+)", code)
    app = create_app(FakeModels(FakeModel("m", "text-classification")), ServeSettings())
    assert url in app.openapi()["paths"]
    assert url.startswith("/health")


def test_the_image_serves_as_nobody() -> None:
    instructions = [name for name, _ in dockerfile()]
    assert instructions.count("FROM") == 2
    check_command(json.loads(arguments("CMD")))
    assert json.loads(arguments("ENTRYPOINT")) == ["effllm"]
    assert arguments("USER") == "10001:10001"
    assert instructions.index("USER") < instructions.index("ENTRYPOINT")
    assert "useradd --uid 10001 --user-group " in arguments("RUN")
    assert arguments("EXPOSE") == "8080"
    check_health(json.loads(arguments("HEALTHCHECK").partition("CMD ")[2]))
    copied = [rest.split()[:-1] for name, rest in dockerfile() if name == "COPY" and "--from" not in rest]
    sources = [source for rest in copied for source in rest]
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert all((ROOT / source).exists() for source in sources)
    assert {f"!{source}" for source in sources} == {line for line in ignored if line.startswith("!")}


def test_compose_gives_no_more_than_it_needs() -> None:
    (service,) = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    check_command(service["command"])
    assert "healthcheck" not in service  # the image has one
    assert (FOLDER / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert service["user"] == arguments("USER")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["ports"] == ["127.0.0.1:8080:8080"]
    (volume,) = service["volumes"]
    assert volume["read_only"] is True
    assert volume["target"] in service["command"]
    command = service["command"]
    assert int(service["stop_grace_period"].rstrip("s")) > int(command[command.index("--drain") + 1])


def test_the_documented_run_leaves_time_to_drain() -> None:
    header = (FOLDER / "Dockerfile").read_text(encoding="utf-8").partition("FROM")[0]
    (seconds,) = re.findall(r"docker run .*--stop-timeout (\d+) ", header)
    assert int(seconds) > ServeSettings().drain


def test_pins_are_those_that_the_tests_run_with() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in constraints if not line.startswith("#"))
    assert requirements() == {name: pinned[name] for name in requirements()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {
        re.split(r"[>=;\[ ]", need)[0]
        for need in (*project["dependencies"], *project["optional-dependencies"]["serve"])
    }
    assert set(requirements()) <= known | {"pydantic", "starlette"}
    assert "torch" not in requirements()
    version = project["version"]
    for name in ("Dockerfile", "compose.yaml"):
        assert set(re.findall(r"effllm-serve:([\w.]+)", (FOLDER / name).read_text(encoding="utf-8"))) == {version}


def test_what_is_installed_is_enough_to_serve() -> None:
    command = [sys.executable, "-c", SERVED, *requirements()]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == ["served without torch"], result.stderr
