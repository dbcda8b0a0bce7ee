"""A transformers folder loads whole or is refused, by whoever loads it, and leaves the process as it was."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from conftest import WORDS, make_model
from safetensors.torch import load_file, save_file

import effllm
from effllm.errors import ArtifactError
from effllm.exporters.source import load_source
from effllm.folder import open_folder
from effllm.hf import SparseLinear, load
from effllm.runtime.ort import OrtEngine
from effllm.tasks import task_of


def by_torch_engine(folder: Path, task: str | None = None) -> Any:
    return effllm.open(folder, task=task, threads=1).engine


def by_source(folder: Path, task: str | None = None) -> Any:
    opened = open_folder(folder)
    return load_source(opened, task_of(opened, task))


def by_load(folder: Path, task: str | None = None) -> Any:
    return load(folder, task=task)


@pytest.fixture(params=[by_torch_engine, by_source, by_load], ids=lambda f: f.__name__)
def loader(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param


def renamed(folder: Path, target: Path, name: Callable[[str], str]) -> Path:
    """Copy a folder with its tensors under other names; those without a name are left out."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    kept = {name(key): value.clone() for key, value in tensors.items() if name(key)}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weights_under_other_names_are_not_replaced_by_random_ones(classifier: Path, tmp_path: Path, loader) -> None:
    wrapped = renamed(classifier, tmp_path / "wrapped", lambda key: f"module.{key}")
    with pytest.raises(effllm.Unsupported, match=r"has no weights for bert\.embeddings"):
        loader(wrapped)


def test_one_missing_tensor_is_named(classifier: Path, tmp_path: Path, loader) -> None:
    gone = "bert.encoder.layer.1.output.dense.bias"
    half = renamed(classifier, tmp_path / "half", lambda key: "" if key == gone else key)
    with pytest.raises(effllm.Unsupported, match=f"has no weights for {gone}, which BertForSequenceClassification"):
        loader(half)


def test_a_pooler_is_drawn_anew_only_where_nothing_reads_it(classifier: Path, tmp_path: Path, loader) -> None:
    bare = renamed(classifier, tmp_path / "bare", lambda key: "" if ".pooler." in key else key)
    with pytest.raises(effllm.Unsupported, match=r"has no weights for bert\.pooler"):
        loader(bare)
    assert loader(bare, "feature-extraction") is not None


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_codes_that_nothing_here_reads_are_one_error(method: str, classifier: Path, tmp_path: Path, loader) -> None:
    folder = tmp_path / method
    shutil.copytree(classifier, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((effllm.Unsupported, effllm.ArtifactError)):
        loader(folder)


def test_loading_leaves_the_log_as_loud_as_it_was(classifier: Path, loader) -> None:
    logger = logging.getLogger("transformers")
    before = logger.level
    try:
        for level in (logging.INFO, logging.WARNING):
            logger.setLevel(level)
            loader(classifier)
            assert logger.level == level
    finally:
        logger.setLevel(before)


def fail(*args: object, **kwargs: object) -> None:
    raise OSError


def test_a_fault_without_text_is_named_by_its_type(classifier: Path, monkeypatch, loader) -> None:
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", fail)
    with pytest.raises(effllm.ArtifactError, match=r"cannot be loaded by transformers: OSError$"):
        loader(classifier)


def test_a_fault_of_onnx_runtime_without_text_is_named_by_its_type(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    (tmp_path / "model.onnx").write_bytes(b"graph")
    with pytest.raises(effllm.ArtifactError, match=r"cannot be loaded: OSError$"):
        OrtEngine.open(tmp_path / "model.onnx", auto_class="", threads=1)


@pytest.mark.parametrize("method", ["magnitude:sparsity=0.5", "nf4"])
def test_the_progress_bars_of_transformers_are_hidden_and_left_on(
    classifier: Path, tmp_path: Path, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers.utils.logging.enable_progress_bar()
    effllm.compress(classifier, tmp_path / "small", method=effllm.parse_method(method), max_drop=1.0)
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert "%|" not in capfd.readouterr().err


def test_a_quantization_config_that_says_nothing_is_an_error(classifier: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "effllm"}}))
    with pytest.raises(ArtifactError, match="cannot be loaded by transformers"):
        effllm.load(folder)


@pytest.mark.parametrize("damage", ["not one", "an unknown kind", "a pointer"])
def test_a_tokenizer_that_transformers_cannot_read_is_one_error(damage: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(
        {
            "not one": "{}",
            "an unknown kind": json.dumps(content | {"model": {**content["model"], "type": "Unheard"}}),
            "a pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        }[damage]
    )
    pointer = r" \(it is a git-lfs pointer" if damage == "a pointer" else ""
    with pytest.raises(ArtifactError, match=f"tokenizer of .* cannot be loaded by transformers{pointer}"):
        by_source(folder)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("sentence_bert_config.json", {"do_lower_case": True}, "has texts lower-cased"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "puts the prompt 'query' before"),
    ],
)
def test_settings_that_change_texts_before_they_are_embedded_are_refused(
    file: str, content: dict, reason: str, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", "bert", "feature-extraction")
    assert len(effllm.open(folder).embed(["a fox"])) == 1
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(effllm.Unsupported, match=reason):
        effllm.open(folder)
    if file == "sentence_bert_config.json":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": True}))
        assert len(effllm.open(folder).embed(["a fox"])) == 1


def test_what_an_optimizer_moves_outside_of_a_mask_is_not_used() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    layer = SparseLinear.of(torch.nn.Linear(2, 2), mask)
    x = torch.randn(3, 2)
    with torch.inference_mode():
        before = layer(x)
    with torch.no_grad():
        layer.weight += 5 * ~mask
    with torch.inference_mode():
        assert torch.equal(layer(x), before)


def test_the_end_of_a_text_that_is_kept_is_kept_by_the_export_too(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    file = folder / "tokenizer.json"
    truncation = {"direction": "Left", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": truncation}))
    variant = effllm.export(folder, tmp_path / "out")
    text = " ".join(WORDS)
    assert effllm.open(variant.path).predict(text)["label"] == effllm.open(folder).predict(text)["label"]
    assert effllm.open(variant.path).tokenizer.keeps_end
    assert transformers.AutoTokenizer.from_pretrained(variant.path).truncation_side == "left"


def test_what_sentence_transformers_does_with_embeddings_is_exported(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "bert", "feature-extraction")
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true, "include_prompt": false}')
    kept = {"similarity_fn_name": "dot", "prompts": {"query": "query: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(kept | {"__version__": {}}))
    out = effllm.export(folder, tmp_path / "out").path
    written = json.loads((out / "config_sentence_transformers.json").read_text())
    assert written == kept | {"default_prompt_name": None}
    assert json.loads((out / "1_Pooling" / "config.json").read_text())["include_prompt"] is False
