"""The main job on small models: export, int8, gate, folder. What is promised is read back from disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ARCHITECTURES, LABELS, WORDS, make_model

import effllm
from effllm.compression import pipeline
from effllm.compression.int8 import weight_levels
from effllm.compression.int8_graph import find_linears
from effllm.compression.texts import Given, choose_texts
from effllm.data.split import fingerprint
from effllm.exporters.graph import Graph, module_of
from effllm.exporters.layout import class_settings
from effllm.exporters.source import load_source
from effllm.machine import InstructionSet
from effllm.variant import sha256

TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(4 + i % 17)) for i in range(120)]
RECORDS = {
    "text-classification": [{"text": t, "label": LABELS["text-classification"][i % 3]} for i, t in enumerate(TEXTS)],
    "token-classification": [{"tokens": t.split(), "tags": ["O"] * len(t.split())} for t in TEXTS],
    "question-answering": [
        {"question": "where does ada live", "context": t, "answers": [{"text": t.split()[1], "answer_start": 0}]}
        for t in TEXTS
    ],
    "fill-mask": [{"text": t} for t in TEXTS],
}
TASK_OF = {
    "bert": "feature-extraction",
    "roberta": "text-classification",
    "distilbert": "token-classification",
    "electra": "question-answering",
    "xlm-roberta": "fill-mask",
    "modernbert": "text-classification",
}
STATIC = effllm.Int8(activations="static", calibration=40)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, effllm.Variant]]:
    """Each architecture with one task, compressed to static int8 against labelled data where the task has any."""
    root = tmp_path_factory.mktemp("made")
    variants = {}
    for architecture in ARCHITECTURES:
        task = TASK_OF[architecture]
        model = make_model(root / architecture, architecture, task)
        dev = RECORDS.get(task, [None])[60:] if task in RECORDS else None
        variant = effllm.compress(
            model, root / f"{architecture}-int8", method=STATIC, calib=TEXTS[:60], dev=dev, max_drop=1.0, threads=1
        )
        variants[architecture] = (model, variant)
    return variants


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_int8_covers_the_layer_stack_and_nothing_else(made, architecture: str) -> None:
    _, variant = made[architecture]
    graph = Graph(onnx.load(str(variant.path / "onnx/model_quantized.onnx")))
    int8_weights = {n for n in graph._constants if n.endswith(".weight_int8")}
    assert int8_weights
    for name in int8_weights:
        inside = any(part.isdigit() for part in name.split("."))
        assert inside or "embedding" in name, f"{name} should have stayed float"
    assert not find_linears(graph), "a linear layer of the stack is still float"
    kept = {n.op_type for n in graph.nodes}
    assert {"LayerNormalization", "Softmax"} <= kept
    for node in graph.nodes:
        if node.op_type in {"LayerNormalization", "Softmax", "Gelu"}:
            assert all(graph.constant(i).dtype == np.float32 for i in node.input if graph.is_constant(i))
        head = not any(part.isdigit() for part in module_of(node).split("."))
        if head and node.op_type in {"MatMul", "Gemm"}:
            assert graph.constant(node.input[1]).dtype == np.float32, f"head {node.name} was quantised"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compressed_folder_answers_like_its_parent(made, architecture: str) -> None:
    model, variant = made[architecture]
    small, dense = effllm.open(variant.path, threads=1), effllm.open(model, engine="torch", threads=1)
    examples = small.task.unlabelled(TEXTS[60:], small.head)
    agreed = [
        part
        for a, b in zip(small.answers(examples), dense.answers(examples), strict=True)
        for part in small.task.agreements(a.value, b.value)
    ]
    # Random weights leave close calls, about one text in twelve; of 60, a fifth of them would be no accident.
    assert sum(agreed) / len(agreed) > 0.8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_static_answers_do_not_depend_on_their_batch(made, architecture: str) -> None:
    _, variant = made[architecture]
    assert variant.batch_dependent is False
    small = effllm.open(variant.path, threads=1)
    examples = small.task.unlabelled(TEXTS[60:92], small.head)
    alone = [a.outputs for a in small.answers(examples, chunk=1, batch_size=1)]
    together = [a.outputs for a in small.answers(examples, batch_size=16)]
    for one, many in zip(alone, together, strict=True):
        for x, y in zip(one, many, strict=True):
            for name in x:
                np.testing.assert_allclose(x[name], y[name], atol=1e-5 * max(1.0, np.abs(x[name]).max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_odd_inputs_give_finite_numbers(made, architecture: str) -> None:
    _, variant = made[architecture]
    engine = effllm.open(variant.path, threads=1).engine
    for shape, mask in (((1, 1), 1), ((2, 7), 0), ((33, 3), 1)):
        ids = np.full(shape, 5, dtype=np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.full_like(ids, mask), "token_type_ids": np.zeros_like(ids)}
        assert all(np.isfinite(value).all() for value in engine.run(feeds).values())


def test_manifest_tells_where_the_folder_comes_from(made) -> None:
    model, variant = made["roberta"]
    manifest = variant.manifest
    assert manifest["parent"]["weights_sha256"] == {"model.safetensors": sha256(model / "model.safetensors")}
    assert manifest["steps"][-1]["settings"] == dataclasses.asdict(STATIC)
    assert manifest["parity"]["max_difference"] <= 1e-4
    assert len(manifest["parity"]["shapes"]) >= 6
    assert {"accuracy", "accuracy change", "agreement", "model size"} <= {row.metric for row in variant.rows}
    assert {"torch", "onnxruntime", "transformers"} <= set(manifest["versions"])


def test_notes_tell_what_the_gate_stood_on(made) -> None:
    agreement = "no labelled data was given (--dev): the gate is on agreement with the dense model"
    assert agreement in made["bert"][1].manifest["notes"]
    assert agreement not in made["roberta"][1].manifest["notes"]


def test_same_seed_gives_the_same_bytes(made, tmp_path: Path) -> None:
    model, variant = made["bert"]
    again = effllm.compress(model, tmp_path / "again", method=STATIC, calib=TEXTS[:60], max_drop=1.0, threads=1)
    name = "onnx/model_quantized.onnx"
    assert again.manifest["files"][name]["sha256"] == variant.manifest["files"][name]["sha256"]


def test_another_seed_calibrates_on_other_texts(made, tmp_path: Path) -> None:
    model, _ = made["bert"]
    digests = set()
    for seed in (0, 1):
        method = dataclasses.replace(STATIC, calibration=10, seed=seed)
        variant = effllm.compress(model, tmp_path / str(seed), method=method, calib=TEXTS, max_drop=1.0, threads=1)
        digests.add(variant.manifest["files"]["onnx/model_quantized.onnx"]["sha256"])
    assert len(digests) == 2


def test_auto_prints_every_candidate_and_marks_what_depends_on_the_batch(made, tmp_path: Path) -> None:
    model, _ = made["bert"]
    method = effllm.Int8(calibration=40)
    variant = effllm.compress(model, tmp_path / "auto", method=method, calib=TEXTS, max_drop=1.0, threads=1)
    flags = {row.system: row.value for row in variant.rows if row.metric == "batch dependent"}
    assert flags == {"int8 dynamic": 1.0, "int8 static": 0.0}
    assert {row.system for row in variant.rows if row.metric == "trial time"} == {"dense", *flags}
    assert variant.batch_dependent is bool(flags[f"int8 {variant.manifest['details']['activations']}"])


def test_dynamic_carries_its_measured_spread(made, tmp_path: Path) -> None:
    model, _ = made["bert"]
    method = effllm.Int8(activations="dynamic", calibration=40)
    variant = effllm.compress(model, tmp_path / "dynamic", method=method, calib=TEXTS, max_drop=1.0, threads=1)
    assert variant.batch_dependent
    assert variant.manifest["details"]["batch_spread"]["largest"] > 1e-5
    assert "can depend on the other texts" in (variant.path / "README.md").read_text(encoding="utf-8")


def test_a_broken_gate_leaves_nothing_and_keeps_the_old_folder(made, tmp_path: Path) -> None:
    model, variant = made["bert"]
    target = tmp_path / "out"
    shutil.copytree(variant.path, target)
    with pytest.raises(effllm.GateFailed, match="more than the allowed") as caught:
        effllm.compress(model, target, method=STATIC, calib=TEXTS[:60], max_drop=0.0, force=True, threads=1)
    assert {row.metric for row in caught.value.rows} >= {"cosine mean", "cosine min"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert effllm.Variant.open(target).manifest == variant.manifest


def test_calibration_and_gate_share_no_text(classifier: Path) -> None:
    source = load_source(*pipeline._open_folder(classifier, None))
    texts = choose_texts(source, [STATIC], Given(calib=TEXTS + TEXTS[:50]))
    assert not {fingerprint(e) for e in texts.calibration.examples} & {fingerprint(e) for e in texts.gate.examples}
    labelled = choose_texts(source, [STATIC], Given(calib=TEXTS, dev=RECORDS["text-classification"][:20]))
    seen = {fingerprint(e) for e in labelled.calibration.examples}
    assert not seen & {fingerprint(e) for e in labelled.gate.examples}
    assert len(labelled.gate.examples) == 20
    with pytest.raises(effllm.Unsupported, match="also in the evaluation data"):
        choose_texts(source, [STATIC], Given(calib=TEXTS[:5], dev=RECORDS["text-classification"]))


def test_export_is_shared_axes_and_no_trace_of_this_machine(classifier: Path, tmp_path: Path) -> None:
    variant = effllm.export(classifier, tmp_path / "dense")
    file = variant.path / "onnx" / "model.onnx"
    model = onnx.load(str(file))
    onnx.checker.check_model(model)
    for value in model.graph.input:
        assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["batch_size", "sequence_length"]
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch_size"
    content = file.read_bytes()
    assert b"site-packages" not in content
    assert b'File "' not in content
    tokenizer = json.loads((variant.path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["model_max_length"] == 64


def test_external_data_has_the_name_that_tools_fetch_and_moves(classifier: Path, tmp_path: Path) -> None:
    variant = effllm.export(classifier, tmp_path / "first", external_data_bytes=1000)
    assert sorted(p.name for p in (variant.path / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    before = effllm.open(variant.path).predict("a good movie")
    variant.path.rename(tmp_path / "second")
    assert effllm.open(tmp_path / "second").predict("a good movie") == before


def test_a_wrong_graph_is_caught_and_nothing_is_written(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(source):
        model = real(source)
        graph = Graph(model)
        name = next(n for n in graph._constants if n.endswith("query.bias"))
        graph.set_constant(name, graph.constant(name) + 0.01)
        return graph.finish()

    real = pipeline.export_graph
    monkeypatch.setattr(pipeline, "export_graph", corrupt)
    with pytest.raises(effllm.CheckFailed, match="logits of batch"):
        effllm.export(classifier, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_error_and_leaves_nothing(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "save_graph", full)
    with pytest.raises(effllm.ArtifactError, match="No space left on device"):
        effllm.export(classifier, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_quantised_models_and_exported_folders_are_refused(made, tmp_path: Path) -> None:
    model, variant = made["roberta"]
    with pytest.raises(effllm.Unsupported, match="start from the model that it was exported from"):
        effllm.compress(variant.path, tmp_path / "out", method=STATIC)
    quantised = tmp_path / "quantised"
    shutil.copytree(model, quantised)
    config = json.loads((quantised / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq"}
    (quantised / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(effllm.Unsupported, match="already quantised"):
        effllm.compress(quantised, tmp_path / "out", method=STATIC)


def test_a_task_without_a_trained_head_is_refused(made, classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(effllm.Unsupported, match="has no head for question-answering"):
        effllm.export(classifier, tmp_path / "out", task="question-answering")
    renamed = tmp_path / "renamed"
    shutil.copytree(made["bert"][0], renamed)
    config = json.loads((renamed / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["BertForSequenceClassification"]
    (renamed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(effllm.Unsupported, match="has no weights for classifier"):
        effllm.export(renamed, tmp_path / "out")


def test_weight_levels_follow_the_instruction_set() -> None:
    assert weight_levels(InstructionSet("x86", True, "AVX512-VNNI"))[0] == 127
    assert weight_levels(InstructionSet("x86", False, "AVX2"))[0] == 63
    assert weight_levels(InstructionSet("arm", True, "ARM i8mm"))[0] == 127


def test_weights_use_seven_bits_without_a_dot_product(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effllm.machine.instruction_set", lambda: InstructionSet("x86", False, "AVX2"))
    variant = effllm.compress(
        made["bert"][0], tmp_path / "avx2", method=STATIC, calib=TEXTS[:60], max_drop=1.0, threads=1
    )
    graph = Graph(onnx.load(str(variant.path / "onnx/model_quantized.onnx")))
    stack = [n for n in graph._constants if n.endswith(".weight_int8") and ".layer." in n]
    assert max(np.abs(graph.constant(name).astype(int)).max() for name in stack) == 63


BERT_NORMALIZER = {
    "type": "BertNormalizer",
    "lowercase": False,
    "strip_accents": None,
    "handle_chinese_chars": True,
    "clean_text": True,
}


@pytest.mark.parametrize(
    ("model_type", "backend", "expected"),
    [
        ("bert", {"model": {"type": "WordPiece"}, "normalizer": BERT_NORMALIZER}, "BertTokenizer"),
        ("bert", {"model": {"type": "WordPiece"}, "normalizer": {"type": "NFC"}}, "PreTrainedTokenizerFast"),
        ("bert", {"model": {"type": "BPE"}, "normalizer": None}, "PreTrainedTokenizerFast"),
        (
            "roberta",
            {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            "RobertaTokenizer",
        ),
        ("roberta", {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Whitespace"}}, "PreTrainedTokenizerFast"),
        (
            "bert",
            {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            "PreTrainedTokenizerFast",
        ),
        ("xlm-roberta", {"model": {"type": "Unigram"}}, "XLMRobertaTokenizer"),
        ("modernbert", {"model": {"type": "BPE"}}, "PreTrainedTokenizerFast"),
    ],
)
def test_a_tokenizer_gets_the_class_that_its_parts_fit(model_type: str, backend: dict, expected: str) -> None:
    settings = class_settings(model_type, backend)
    assert settings["tokenizer_class"] == expected
    # Transformers 4 lower-cases, and drops the leading space, unless the settings say otherwise.
    assert settings.get("do_lower_case") is (False if expected == "BertTokenizer" else None)
    assert settings.get("add_prefix_space") == (backend.get("pre_tokenizer") or {}).get("add_prefix_space")


def test_a_config_that_names_no_class_gets_that_of_the_model(classifier: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(classifier, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    del config["architectures"]
    (model / "config.json").write_text(json.dumps(config))
    task = "text-classification"
    made = effllm.compress(model, tmp_path / "out", method=STATIC, task=task, calib=TEXTS, max_drop=1.0, threads=1)
    assert json.loads((made.path / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


def test_a_model_with_a_vocabulary_file_alone_is_pruned(classifier: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(classifier, tmp_path / "model"))
    words = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    (model / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(words, key=words.get)))
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    method = effllm.parse_method("magnitude:sparsity=0.1")
    made = effllm.compress(model, tmp_path / "out", method=method, calib=TEXTS, max_drop=1.0, threads=1)
    assert effllm.open(made.path, threads=1).predict("a fox")["label"] in LABELS["text-classification"]
