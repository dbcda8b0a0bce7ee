"""Model repositories for Triton and KServe: what the servers read is what the graph says, and batching as promised."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from click.testing import CliRunner
from conftest import make_model

import effllm
from effllm.cli import cli, main
from effllm.compression.repository import served_name
from effllm.variant import MANIFEST, Variant, write_manifest


def parse(text: str) -> dict[str, list[Any]]:
    """Parse protobuf's text form: every field is a list, as it may be repeated. Fails on anything but whole fields."""
    tokens = re.findall(r'"[^"\\\n]*"|[A-Za-z_][\w.]*|-?\d+|[][{}:,]|\S', text)
    position = 0

    def message(end: str | None) -> dict[str, list[Any]]:
        nonlocal position
        fields: dict[str, list[Any]] = {}
        while position < len(tokens) and tokens[position] != end:
            name = tokens[position]
            assert re.fullmatch(r"[a-z_]+", name), name
            position += 1
            if tokens[position] == ":":
                position += 1
            else:
                assert tokens[position] in "[{", f"{name} has no value"
            fields.setdefault(name, []).extend(values())
        assert end is None or tokens[position] == end
        position += end is not None
        return fields

    def values() -> list[Any]:
        nonlocal position
        token = tokens[position]
        position += 1
        if token == "{":
            return [message("}")]
        if token != "[":
            assert re.fullmatch(r'".*"|-?\d+|[A-Z][A-Z0-9_]*', token), token
            return [json.loads(token) if token[0] in '"-0123456789' else token]
        found = []
        while tokens[position] != "]":
            found += values()
            assert tokens[position] in ",]"
            position += tokens[position] == ","
        position += 1
        return found

    return message(None)


def read_config(text: str) -> dict[str, list[Any]]:
    """Parse a configuration; by Triton's own definition too, where its client is installed."""
    fields = parse(text)
    found = importlib.util.find_spec("tritonclient")
    if found is not None:
        from google.protobuf import text_format

        file = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
        spec = importlib.util.spec_from_file_location("model_config_pb2", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = text_format.Parse(text, module.ModelConfig())
        assert config.max_batch_size == fields["max_batch_size"][0]
        assert config.HasField("dynamic_batching") == ("dynamic_batching" in fields)
        assert [list(i.dims) for i in config.input] == [i["dims"] for i in fields["input"]]
        assert config.instance_group[0].kind == module.ModelInstanceGroup.KIND_CPU
    return fields


@pytest.fixture(scope="module")
def exported(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repository") / "My Classifier"
    effllm.export(classifier, out)
    return out


@pytest.fixture(scope="module")
def dependent(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder, but its manifest says that answers depend on their batch."""
    import shutil

    out = tmp_path_factory.mktemp("repository") / "dependent"
    shutil.copytree(exported, out)
    content = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in {"files", "versions", "machine"}}
    write_manifest(out, kept | {"batch_dependent": True})
    return out


def export(form: str, model: Path, out: Path, *flags: str) -> int:
    return main(["export", str(model), f"--{form}", "--out", str(out), *flags])


def test_triton_reads_what_the_graph_says(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    assert export("triton", exported, out) == 0
    base = out / "my-classifier"
    config = read_config((base / "config.pbtxt").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(str(base / "1" / config["default_model_filename"][0]))
    kinds = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
    for name, tensors in (("input", session.get_inputs()), ("output", session.get_outputs())):
        wanted = [(t.name, kinds[t.type], [d if isinstance(d, int) else -1 for d in t.shape[1:]]) for t in tensors]
        assert [(t["name"][0], t["data_type"][0], t["dims"]) for t in config[name]] == wanted
    assert config["name"] == ["my-classifier"]
    assert config["backend"] == ["onnxruntime"]
    assert config["instance_group"] == [{"kind": ["KIND_CPU"], "count": [1]}]
    assert config["max_batch_size"] == [32]
    assert config["dynamic_batching"] == [{"max_queue_delay_microseconds": [0]}]
    described = json.loads((base / "metadata.json").read_text(encoding="utf-8"))
    assert [t["shape"][1:] for t in described["inputs"]] == [t["dims"] for t in config["input"]]
    assert {t["datatype"] for t in described["inputs"]} == {"INT64"}


def test_the_repository_is_a_checked_variant(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    assert export("triton", exported, out) == 0
    variant, source = Variant.open(out), Variant.open(exported)
    graph = variant.path / variant.manifest["model_file"]
    assert graph.read_bytes() == (source.path / source.manifest["model_file"]).read_bytes()
    assert variant.manifest["steps"][-1] == {"verb": "export", "form": "triton", "name": "my-classifier"}
    assert variant.task == "text-classification"
    assert sorted(p.name for p in out.iterdir()) == ["README.md", MANIFEST, "my-classifier"]
    assert not list(out.rglob("tokenizer/onnx"))
    assert (out / "my-classifier" / "tokenizer" / "tokenizer.json").is_file()
    assert "tritonserver --model-repository" in (out / "README.md").read_text(encoding="utf-8")
    assert export("triton", exported, out) == 2  # it exists
    assert export("triton", exported, out, "--force") == 0


def test_the_card_makes_the_tensors_that_the_model_answers(exported: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    assert export("triton", exported, tmp_path / "r") == 0
    base = tmp_path / "r" / "my-classifier"
    tokens = Tokenizer.from_file(str(base / "tokenizer" / "tokenizer.json")).encode("a good movie")
    arrays = {"input_ids": tokens.ids, "attention_mask": tokens.attention_mask, "token_type_ids": tokens.type_ids}
    session = onnxruntime.InferenceSession(str(base / "1" / "model.onnx"))
    feeds = {i.name: np.array([arrays[i.name]], dtype=np.int64) for i in session.get_inputs()}
    label = effllm.open(exported).predict("a good movie")["label"]
    labels = effllm.open(exported).head.labels
    assert labels[int(session.run(None, feeds)[0][0].argmax())] == label


def test_texts_are_not_mixed_where_answers_depend_on_it(dependent: Path, tmp_path: Path) -> None:
    assert export("triton", dependent, tmp_path / "r") == 0
    config = read_config((tmp_path / "r" / "dependent" / "config.pbtxt").read_text(encoding="utf-8"))
    assert config["max_batch_size"] == [1]
    assert "dynamic_batching" not in config
    assert "one text" in (tmp_path / "r" / "README.md").read_text(encoding="utf-8")


def test_a_model_with_weights_is_exported_first(tmp_path: Path) -> None:
    model = make_model(tmp_path / "extract", task="question-answering")
    assert export("triton", model, tmp_path / "r") == 0
    config = read_config((tmp_path / "r" / "extract" / "config.pbtxt").read_text(encoding="utf-8"))
    assert [t["name"] for t in config["output"]] == [["start_logits"], ["end_logits"]]
    assert [t["dims"] for t in config["output"]] == [[-1], [-1]]
    assert not list(tmp_path.rglob(".work"))


def test_kserve_runs_serve_over_the_folder_as_it_is(exported: Path, tmp_path: Path) -> None:
    assert export("kserve", exported, tmp_path / "service") == 0
    Variant.open(tmp_path / "service")
    copy = Variant.open(tmp_path / "service" / "model")
    assert copy.manifest == Variant.open(exported).manifest
    text = (tmp_path / "service" / "service.yaml").read_text(encoding="utf-8")
    runtime, service = yaml.safe_load_all(text)
    assert (runtime["kind"], service["kind"]) == ("ServingRuntime", "InferenceService")
    assert runtime["spec"]["protocolVersions"] == ["v2"]
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] == runtime["spec"]["supportedModelFormats"][0]["name"]
    assert service["metadata"]["name"] == "my-classifier"
    (container,) = runtime["spec"]["containers"]
    arguments = [argument.replace("{{.Name}}", "my-classifier") for argument in container["args"]]
    assert arguments[:2] == ["serve", "my-classifier=/mnt/models"]
    check_serve_flags(arguments[2:])
    port = container["ports"][0]["containerPort"]
    assert arguments[arguments.index("--port") + 1] == str(port)
    probes = [container[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["port"] for probe in probes} == {port}
    assert_served({probe["path"] for probe in probes})
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def check_serve_flags(arguments: list[str]) -> None:
    """Check that each flag is one of `effllm serve`."""
    text = CliRunner().invoke(cli, ["serve", "--help"]).output
    flags = [argument for argument in arguments if argument.startswith("--")]
    assert flags
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", text)]


def assert_served(paths: set[str]) -> None:
    """Check that the server has these paths."""
    from fakes import FakeModel, FakeModels

    from effllm.serving.app import create_app
    from effllm.serving.settings import ServeSettings

    app = create_app(FakeModels(FakeModel("m", "fill-mask")), ServeSettings())
    assert paths <= set(app.openapi()["paths"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--triton", "--kserve"], "give one of them"),
        (["--triton", "--task", "fill-mask"], "answers text-classification"),
    ],
)
def test_wrong_flags_are_one_line(
    arguments: list[str], words: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(exported), "--out", str(tmp_path / "r"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_repository_is_not_packed_again(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("triton", exported, tmp_path / "r") == 0
    assert export("kserve", tmp_path / "r", tmp_path / "s") == 2
    assert "is a model repository already" in capsys.readouterr().err


def test_a_damaged_folder_is_not_packed(exported: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert export("triton", copy, tmp_path / "r") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize(
    ("model", "name"),
    [("org/Bert_Base.v2", "bert-base-v2"), ("runs/12", "m-12"), ("Ünï", "n"), ("a" * 80, "a" * 50), ("…", "m")],
)
def test_names_are_those_that_every_server_takes(model: str, name: str) -> None:
    assert served_name(model) == name
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
