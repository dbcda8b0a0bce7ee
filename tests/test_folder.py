"""A model folder that is broken in a common way is one clear error before any work is done."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from effllm.errors import ArtifactError, EffllmError, Unsupported
from effllm.folder import ModelFolder, disguise, find, has_tokenizer, open_folder, read_json

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONFIG = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"


def model(folder: Path, config: object = CONFIG, **extra: object) -> Path:
    """Write a folder with a config, whole weights, and `extra` JSON files by their stem."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": np.zeros(8, np.float32), "b": np.ones(2, np.float16)}, folder / "model.safetensors")
    for stem, content in extra.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def weights(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def refused(folder: str | Path, kind: type[EffllmError] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        open_folder(folder)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_a_whole_folder_opens(tmp_path: Path) -> None:
    folder = open_folder(model(tmp_path, CONFIG | {"id2label": {"10": "c", "2": "b", "0": "a"}}))
    assert folder.architecture == "BertForSequenceClassification"
    assert folder.labels == ["a", "b", "c"]
    assert folder.has_weights
    assert open_folder(str(tmp_path)).path == tmp_path


def test_a_folder_without_head_or_names_opens(tmp_path: Path) -> None:
    folder = open_folder(model(tmp_path, {"model_type": "bert", "architectures": None, "id2label": None}))
    assert folder.architecture == ""
    assert folder.labels == []


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    assert "has no config.json; it is not a model folder" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON (it is empty)"),
        (b"{'model_type': 'bert'}", "is not valid JSON:"),
        (b"\xff\xfe{", "is not valid JSON:"),
        (b"[" * 100_000, "is not valid JSON:"),
        (POINTER, "is not valid JSON (it is a git-lfs pointer: run `git lfs pull`)"),
        (PAGE, "is not valid JSON (it is a web page saved under this name)"),
        (b"[]", "it has no model_type"),
        (b"null", "it has no model_type"),
        (b"{}", "it has no model_type"),
        (b'{"model_type": null}', "it has no model_type"),
        (b'{"model_type": ["bert"]}', "it has no model_type"),
    ],
)
def test_a_config_that_is_none_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (model(tmp_path) / "config.json").write_bytes(content)
    assert message in refused(tmp_path)


@pytest.mark.parametrize("value", [5, "BertModel", {"a": 1}, [5], [None]])
def test_architectures_that_are_no_names_are_refused(tmp_path: Path, value: object) -> None:
    assert "architectures must be a list of class names" in refused(model(tmp_path, CONFIG | {"architectures": value}))


@pytest.mark.parametrize("value", [5, ["a", "b"], {"x": "a"}, {"-1": "a"}, "ab"])
def test_labels_that_are_not_numbered_are_refused(tmp_path: Path, value: object) -> None:
    assert "id2label must map numbers to names" in refused(model(tmp_path, CONFIG | {"id2label": value}))


@pytest.mark.parametrize("value", ["x", [1], 1.5])
def test_a_padding_id_that_is_no_number_is_refused(tmp_path: Path, value: object) -> None:
    assert "pad_token_id must be a whole number" in refused(model(tmp_path, CONFIG | {"pad_token_id": value}))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    model(tmp_path, CONFIG | {"auto_map": {"AutoModel": "modeling.Model"}})
    assert "does not run remote code" in refused(tmp_path, Unsupported)
    with pytest.raises(Unsupported):
        open_folder(tmp_path, weights=False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt"])
def test_pickled_weights_are_never_loaded(tmp_path: Path, name: str) -> None:
    model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    assert f"holds only pickled weights ({name})" in refused(tmp_path, Unsupported)


def test_safetensors_beside_pickled_weights_are_enough(tmp_path: Path) -> None:
    (model(tmp_path) / "pytorch_model.bin").write_bytes(b"x")
    assert open_folder(tmp_path).has_weights


def test_a_folder_without_weights_opens_only_when_they_are_not_needed(tmp_path: Path) -> None:
    (model(tmp_path) / "model.safetensors").unlink()
    assert "has a config but no weights" in refused(tmp_path)
    assert not open_folder(tmp_path, weights=False).has_weights


@pytest.mark.parametrize("cut", [1, 16, 30, 60, 100])
def test_truncated_weights_are_named(tmp_path: Path, cut: int) -> None:
    file = model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    assert "model.safetensors is " in refused(tmp_path)


def test_weights_cut_in_the_data_say_how_much_is_there(tmp_path: Path) -> None:
    file = model(tmp_path) / "model.safetensors"
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    assert f"is truncated or damaged: {whole - 1} bytes, its header promises {whole}" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file (it is empty)"),
        (b"\x08", "is not a safetensors file"),
        (POINTER, "is not a safetensors file (it is a git-lfs pointer: run `git lfs pull`)"),
        (PAGE, "is not a safetensors file (it is a web page saved under this name)"),
        (b"\xff" * 64, "is not a safetensors file"),
        (b"PK\x03\x04" + b"\0" * 60, "is not a safetensors file"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "is not a safetensors file"),
        (weights([]), "is not a safetensors file"),
        (weights({"w": None}), "is not a safetensors file"),
        (weights({"w": {"data_offsets": 5}}), "is not a safetensors file"),
        (weights({"w": {"data_offsets": []}}), "is not a safetensors file"),
        (weights({"w": {"data_offsets": [0, "x"]}}), "is not a safetensors file"),
        (weights({"w": {"data_offsets": [0, 4]}}, b"123"), "is truncated or damaged"),
        (weights({"w": {"data_offsets": [0, 4]}}, b"12345"), "is truncated or damaged"),
    ],
    ids=range(14),
)
def test_weights_that_are_none_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (model(tmp_path) / "model.safetensors").write_bytes(content)
    assert message in refused(tmp_path)


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "w": {"data_offsets": [0, 4]}}
    (model(tmp_path) / "model.safetensors").write_bytes(weights(header, b"1234"))
    assert open_folder(tmp_path).has_weights


@pytest.mark.parametrize("broken", [b"", POINTER, b"x" * 100])
def test_every_shard_is_checked(tmp_path: Path, broken: bytes) -> None:
    names = ["a.safetensors", "b.safetensors"]
    model(tmp_path, **{"model.safetensors.index": {"weight_map": dict(zip("wb", names, strict=True))}})
    for name in names:
        (tmp_path / name).write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert open_folder(tmp_path).has_weights
    (tmp_path / "b.safetensors").write_bytes(broken)
    assert "b.safetensors is not a safetensors file" in refused(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert "b.safetensors is missing; the index names it" in refused(tmp_path)


@pytest.mark.parametrize(
    "index",
    [[], 5, {}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"w": 5}}, {"weight_map": {"w": {}}}],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: object) -> None:
    assert "model.safetensors.index.json" in refused(model(tmp_path, **{"model.safetensors.index": index}))


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, ""])
def test_an_index_with_an_impossible_name_is_refused(tmp_path: Path, name: str) -> None:
    refused(model(tmp_path, **{"model.safetensors.index": {"weight_map": {"w": name}}}))


def test_a_file_that_may_not_be_read_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    model(tmp_path)
    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refused(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "./x",
        "/no/such/folder",
        "a b",
        "http://example.org/model",
        "https://huggingface.co/bert-base-uncased",
        "a/b/c",
        "a\0b",
        "a\nb",
        "x" * 300,
        "~no-such-user/model",
        "a..b",
        "a--b",
        "-a",
        "ü/x",
        "nobody/nothing",
        "nothing",
        "\ud800",
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    message = refused(name)
    assert message.startswith(("no model folder at", "no folder named"))
    assert "\0" not in message


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("x")
    assert "is a file; expected a model folder or a hub id" in refused(tmp_path / "model.bin")


HUB = {
    "config.json": True,
    "model.safetensors": True,
    "tokenizer.json": True,
    "vocab.txt": True,
    "1_Pooling/config.json": True,
    "onnx/model.onnx": True,
    "onnx/model.onnx_data": True,
    "onnx/model_quantized.onnx": True,
    "onnx/model_O4.onnx": False,
    "onnx/model_qint8_avx512.onnx": False,
    "openvino/openvino_model.bin": False,
    "pytorch_model.bin": False,
    "modeling.py": False,
    "2_Dense/model.safetensors": False,
    "checkpoint-500/model.safetensors": False,
}
"""A hub repository's files, and whether effllm fetches them."""


def test_a_hub_id_is_asked_of_the_hub_once_and_its_folder_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(hub_id)
        fetched = set(filter_repo_objects(HUB, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert fetched == {name for name, wanted in HUB.items() if wanted}
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find("some-org/some.model") == tmp_path
    assert asked == ["some-org/some.model"]


def test_of_a_folder_that_effllm_wrote_the_hub_is_asked_for_what_its_manifest_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def download(hub_id: str, **more: object) -> str:
        asked.append((hub_id, more.get("revision"), more["allow_patterns"]))
        return str(tmp_path / "0123abc")

    (tmp_path / "0123abc").mkdir()
    (tmp_path / "0123abc" / "effllm.json").write_text('{"files": {"onnx/model.onnx": {}, "training/log.jsonl": {}}}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find("me/small") == tmp_path / "0123abc"
    assert asked[1:] == [("me/small", "0123abc", ["onnx/model.onnx", "training/log.jsonl"])]


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), KeyError(), ValueError("")])
def test_any_fault_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import huggingface_hub

    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "the hub did not give a model of that name" in refused("some-org/some-model")


@pytest.mark.parametrize(
    ("config", "files", "tokens"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, {}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, {}, 512),
        ({"model_type": "longformer", "max_position_embeddings": 4098, "pad_token_id": 1}, {}, 4096),
        ({"model_type": "roberta", "max_position_embeddings": 40, "pad_token_id": 0}, {}, 39),
        ({"model_type": "roberta", "max_position_embeddings": 40, "pad_token_id": None}, {}, 39),
        ({"model_type": "bert"}, {}, 512),
        ({"model_type": "bert"}, {"tokenizer_config": {"model_max_length": 128}}, 128),
        ({"model_type": "bert"}, {"tokenizer_config": {"model_max_length": int(1e30)}}, 512),
        ({"model_type": "bert"}, {"tokenizer_config": {"model_max_length": 1e30}}, 512),
        ({"model_type": "bert"}, {"tokenizer_config": {"model_max_length": float("nan")}}, 512),
        ({"model_type": "bert"}, {"tokenizer_config": {"model_max_length": -1}}, 512),
        ({"model_type": "bert"}, {"tokenizer_config": {"model_max_length": None}}, 512),
        ({"model_type": "bert", "max_position_embeddings": -1}, {}, 512),
        (
            {"model_type": "bert", "max_position_embeddings": 512},
            {"sentence_bert_config": {"max_seq_length": 256}},
            256,
        ),
        (
            {"model_type": "bert", "max_position_embeddings": 512},
            {"sentence_bert_config": {"max_seq_length": None}},
            512,
        ),
        (
            {"model_type": "bert", "max_position_embeddings": 64},
            {"sentence_bert_config": {"max_seq_length": 256}, "tokenizer_config": {"model_max_length": 128}},
            64,
        ),
    ],
)
def test_the_most_tokens_are_the_smallest_limit(tmp_path: Path, config: dict, files: dict, tokens: int) -> None:
    assert open_folder(model(tmp_path, config, **files)).max_length == tokens


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "bert", "electra"])
def test_the_most_tokens_are_the_most_that_the_model_takes(tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        kind,
        hidden_size=8,
        embedding_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=50,
        max_position_embeddings=20,
        pad_token_id=1,
    )
    longest = ModelFolder(tmp_path, config.to_dict()).max_length
    network = AutoModel.from_config(config).eval()
    ids = torch.full((1, longest + 1), 40)
    with torch.no_grad():
        assert network(input_ids=ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:]))[0].shape[1] == longest
        with pytest.raises((IndexError, RuntimeError)):
            network(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("content", [[], None, 5, "x"])
@pytest.mark.parametrize("stem", ["tokenizer_config", "sentence_bert_config"])
def test_a_limit_in_a_file_of_another_shape_is_refused(tmp_path: Path, stem: str, content: object) -> None:
    folder = open_folder(model(tmp_path, **{stem: content}))
    with pytest.raises(ArtifactError, match=f"{stem}.json must hold a JSON object"):
        folder.max_length  # noqa: B018


def test_read_json_gives_the_default_only_for_a_missing_file(tmp_path: Path) -> None:
    assert read_json(tmp_path / "x.json", {"a": 1}) == {"a": 1}
    with pytest.raises(ArtifactError, match=r"x\.json is missing"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json", {})
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"x\.json must hold a JSON list"):
        read_json(tmp_path / "x.json", [])


@pytest.mark.parametrize(
    ("content", "looks"), [(POINTER, "git-lfs pointer"), (PAGE, "web page"), (b"", "it is empty"), (b"\x08\x07", "")]
)
def test_a_file_in_disguise_is_recognised(tmp_path: Path, content: bytes, looks: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert looks in disguise(tmp_path / "model.onnx")
    assert disguise(tmp_path / "missing.onnx") == ""


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "spiece.model"])
def test_any_tokenizer_file_counts(tmp_path: Path, name: str) -> None:
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).write_text("x")
    assert has_tokenizer(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("model_type", "architectures", "id2label", "max_position_embeddings", "pad_token_id", "auto_map")


@QUICK
@given(st.dictionaries(st.sampled_from(FIELDS), json_values), json_values, json_values)
def test_any_json_is_a_folder_or_one_error(tmp_path: Path, config: dict, tokenizer: object, index: object) -> None:
    config.setdefault("model_type", "roberta")
    files = {"tokenizer_config": tokenizer, "model.safetensors.index": index}
    with contextlib.suppress(EffllmError):
        folder = open_folder(model(tmp_path, config, **files))
        assert isinstance(folder.architecture, str)
        assert all(isinstance(label, str) for label in folder.labels)
        assert isinstance(folder.max_length, int)


@QUICK
@given(st.binary() | json_values.map(weights) | st.dictionaries(st.text(), json_values).map(weights))
def test_any_bytes_are_weights_or_one_error(tmp_path: Path, content: bytes) -> None:
    (model(tmp_path) / "model.safetensors").write_bytes(content)
    with contextlib.suppress(EffllmError):
        open_folder(tmp_path)


def test_a_model_of_the_hub_is_called_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = model(tmp_path)
    monkeypatch.setattr("effllm.folder._download", lambda hub_id, files: snapshot)
    assert open_folder("org/tiny").name == "org/tiny"
    assert open_folder(snapshot).name == snapshot.name
    monkeypatch.chdir(snapshot)
    assert open_folder(".").name == snapshot.name
