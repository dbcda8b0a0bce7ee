"""What every compression method promises, tried on every method of the table and every architecture.

A method brings nothing but its line in `METHODS`: its settings are made small here by their names. Every folder is
made first, then the models that they were made from are deleted, and one fresh process loads them all.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, LABELS, WORDS, make_model
from safetensors.numpy import load_file

import effllm
from effllm.compression import METHODS, check_order, method_class, parse_method
from effllm.compression.layers import layer_list, linears
from effllm.compression.method import Stage
from effllm.compression.pipeline import compress, export
from effllm.compression.texts import needs_training
from effllm.errors import EffllmError, MissingExtra, SettingError, Unsupported
from effllm.folder import open_folder
from effllm.hf import SparseLinear, load, load_folder

QUICK = ("bert", "modernbert")
TASKS = {
    "bert": "fill-mask",
    "roberta": "token-classification",
    "distilbert": "feature-extraction",
    "electra": "question-answering",
    "xlm-roberta": "text-classification",
    "modernbert": "text-classification",
}
SMALL = {
    "calibration": 8,
    "steps": 2,
    "batch_size": 8,
    "group_size": 32,
    "gradients": 8,
    "prunings": 2,
    "distil_steps": 2,
    "budget_minutes": 0.001,
}
DAMAGED = "magnitude"
"""Whose folder is damaged in a test."""
TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(4 + i % 9)) for i in range(40)]
FEEDS = {
    "input_ids": np.array([[2, 7, 11, 30, 3, 0], [2, 40, 3, 0, 0, 0]], dtype=np.int64),
    "attention_mask": np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], dtype=np.int64),
    "token_type_ids": np.zeros((2, 6), dtype=np.int64),
}
FRESH = """
import json, sys
import numpy as np
import effllm
folders, feeds, out = json.loads(sys.argv[1]), dict(np.load(sys.argv[2])), {}
for folder in folders:
    for name, value in effllm.open(folder, threads=1).engine.run(feeds).items():
        out[f"{folder}|{name}"] = value
np.savez(sys.argv[3], **out)
"""


def small_settings(name: str) -> dict[str, Any]:
    """Return settings that make a method quick, those of its fields that have such names."""
    defaults = {field.name: field.default for field in dataclasses.fields(method_class(name))}
    untrained = {"steps"} if defaults.get("epochs") == 0 else set()
    return {key: value for key, value in SMALL.items() if key in defaults.keys() - untrained}


def method_of(name: str, **settings: Any) -> Any:
    return method_class(name)(**{**small_settings(name), **settings})


def row_of(name: str, **settings: Any) -> list[Any]:
    """Return the method, followed by int8 where it cannot be the last."""
    method = method_of(name, **settings)
    try:
        check_order([method])
    except SettingError:
        return [method, method_of("int8", activations="dynamic")]
    return [method]


def run(source: Path, out: Path, methods: list[Any], train: Path) -> Path:
    compress(source, out, method=methods, calib=TEXTS, train=train, max_drop=1.0, threads=1, dev=None)
    return out


@dataclasses.dataclass(frozen=True)
class Made:
    """Of one architecture: the dense model, the folders by method, what was refused, what a fresh process answered."""

    dense: Path
    train: Path
    folders: dict[str, Path]
    refused: dict[str, EffllmError]
    answers: dict[str, np.ndarray]


def train_file(folder: Path, task: str) -> Path:
    records = {
        "text-classification": [
            {"text": t, "label": LABELS["text-classification"][i % 3]} for i, t in enumerate(TEXTS)
        ],
        "token-classification": [{"tokens": t.split(), "tags": ["O"] * len(t.split())} for t in TEXTS],
        "question-answering": [
            {"question": "where does ada live", "context": t, "answers": [{"text": t.split()[0], "answer_start": 0}]}
            for t in TEXTS
        ],
    }.get(task, [{"text": t} for t in TEXTS])
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def make_all(root: Path, architecture: str, names: Iterable[str]) -> Made:
    task = TASKS[architecture]
    made = Made(make_model(root / "dense", architecture, task), train_file(root, task), {}, {}, {})
    source = shutil.copytree(made.dense, root / "source")
    for name in names:
        try:
            made.folders[name] = run(source, root / name, row_of(name), made.train)
        except EffllmError as error:
            made.refused[name] = error
    shutil.rmtree(source)
    np.savez(root / "feeds.npz", **FEEDS)
    paths = json.dumps([str(path) for path in made.folders.values()])
    command = [sys.executable, "-c", FRESH, paths, str(root / "feeds.npz"), str(root / "answers.npz")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    made.answers.update(np.load(root / "answers.npz"))
    return made


@pytest.fixture(scope="session")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """What `make_all` makes of an architecture, when it is first asked for: the methods whose tests were chosen."""
    own = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    chosen = {item.callspec.params.get("name") for item in own}
    names = [name for name in METHODS if name in chosen | {DAMAGED}]
    return functools.cache(lambda architecture: make_all(tmp_path_factory.mktemp(architecture), architecture, names))


def over_architectures(names: Iterable[str], quick: Collection[str] = QUICK) -> pytest.MarkDecorator:
    """Run a test on each method and architecture; the quick architectures always, the others with the slow tests."""
    return pytest.mark.parametrize(
        ("name", "architecture"),
        [
            pytest.param(name, architecture, marks=[] if architecture in quick else [pytest.mark.slow])
            for name in names
            for architecture in ARCHITECTURES
        ],
    )


OF_WEIGHTS = [name for name in METHODS if method_class(name).stage < Stage.CODES]


def folder_of(made: Callable[[str], Made], name: str, architecture: str) -> Path:
    everything = made(architecture)
    if isinstance(everything.refused.get(name), (Unsupported, MissingExtra)):
        pytest.skip(str(everything.refused[name]))
    if name in everything.refused:
        raise everything.refused[name]
    return everything.folders[name]


def torch_folder_of(made: Callable[[str], Made], name: str, architecture: str) -> Path:
    folder = folder_of(made, name, architecture)
    if not is_torch(folder):
        pytest.skip("an ONNX folder")
    return folder


def is_torch(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


@over_architectures(METHODS)
def test_a_fresh_process_without_the_source_gives_the_same_finite_answers(
    made: Callable[[str], Made], name: str, architecture: str
) -> None:
    folder = folder_of(made, name, architecture)
    here = effllm.open(folder, threads=1).engine.run(FEEDS)
    assert here
    for key, value in here.items():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(made(architecture).answers[f"{folder}|{key}"], value)


@over_architectures(METHODS)
def test_odd_inputs_give_finite_numbers(made: Callable[[str], Made], name: str, architecture: str) -> None:
    engine = effllm.open(folder_of(made, name, architecture), threads=1).engine
    for shape, mask in (((1, 1), 1), ((2, 7), 0)):
        ids = np.full(shape, 5, dtype=np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.full_like(ids, mask), "token_type_ids": np.zeros_like(ids)}
        assert all(np.isfinite(value).all() for value in engine.run(feeds).values())


@over_architectures(OF_WEIGHTS)
def test_transformers_finds_every_key_and_no_other(made: Callable[[str], Made], name: str, architecture: str) -> None:
    folder = torch_folder_of(made, name, architecture)
    opened = open_folder(folder)
    _, info = load_folder(opened, effllm.TASKS[TASKS[architecture]].auto_class)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


@over_architectures(OF_WEIGHTS)
def test_what_is_not_a_linear_layer_of_the_stack_stays_bit_for_bit(
    made: Callable[[str], Made], name: str, architecture: str
) -> None:
    if needs_training(method_of(name)):
        pytest.skip("trains")
    folder = torch_folder_of(made, name, architecture)
    dense, small = load(made(architecture).dense), load(folder)
    stack = layer_list(dense)[0]
    touched = {f"{n}." for n in linears(dense)} | ({f"{stack}."} if method_class(name).stage is Stage.LAYERS else set())
    before, after = dense.state_dict(), small.state_dict()
    prefix = f"{dense.base_model_prefix}." if dense.base_model is not dense else ""
    kept = [key for key in before if not any(key.startswith(prefix + part) for part in touched)]
    assert kept
    for key in kept:
        assert torch.equal(before[key], after[key]), key


@over_architectures(OF_WEIGHTS)
def test_heads_norms_and_embeddings_are_float32(made: Callable[[str], Made], name: str, architecture: str) -> None:
    folder = torch_folder_of(made, name, architecture)
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert {str(v.dtype) for k, v in stored.items() if not k.endswith("weight_bits")} == {"float32"}


@over_architectures(OF_WEIGHTS)
def test_the_file_is_as_large_as_its_numbers(made: Callable[[str], Made], name: str, architecture: str) -> None:
    """4 bytes per weight; a sparse layer has 4 per weight that is not zero and one bit for each; headers are small."""
    folder = torch_folder_of(made, name, architecture)
    model = load(folder)
    tensors = {p.data_ptr(): p for p in model.parameters()}
    buffers = [b for n, b in model.named_buffers() if n in model.state_dict()]
    budget = sum(p.numel() * p.element_size() for p in [*tensors.values(), *buffers])
    for module in model.modules():
        if isinstance(module, SparseLinear):
            budget -= 4 * int((~module.mask).sum())
            budget += module.out_features * -(-module.in_features // 8)
    header = 8 + 200 * len(model.state_dict())
    assert budget <= (folder / "model.safetensors").stat().st_size <= budget + header


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bytes(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    folder = folder_of(made, name, "bert")
    again = run(made("bert").dense, tmp_path / "again", row_of(name), made("bert").train)
    for file in sorted(p.name for p in [*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        assert (folder / file).read_bytes() == (again / file).read_bytes(), file


@pytest.mark.parametrize("name", [n for n in METHODS if getattr(method_class(n), "identity", None)])
@pytest.mark.parametrize("architecture", ["bert", pytest.param("modernbert", marks=pytest.mark.slow)])
def test_strength_zero_changes_nothing(
    made: Callable[[str], Made], name: str, architecture: str, tmp_path: Path
) -> None:
    methods = [method_of(name, **method_class(name).identity)]
    out = run(made(architecture).dense, tmp_path / "out", methods, made(architecture).train)
    before, after = load(made(architecture).dense).state_dict(), load(out).state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


@over_architectures(OF_WEIGHTS, quick=["bert"])
def test_the_exported_graph_agrees(made: Callable[[str], Made], name: str, architecture: str, tmp_path: Path) -> None:
    """`export` raises where the graph's answers differ from torch's by more than rounding."""
    folder = torch_folder_of(made, name, architecture)
    exported = export(folder, tmp_path / "onnx").path
    torch_answers, onnx_answers = effllm.open(folder), effllm.open(exported, threads=1)
    for key, value in onnx_answers.engine.run(FEEDS).items():
        np.testing.assert_allclose(value, torch_answers.engine.run(FEEDS)[key], atol=1e-4)


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_tied_weights_stay_tied_and_are_stored_once(made: Callable[[str], Made], name: str) -> None:
    folder = torch_folder_of(made, name, "bert")
    model = load(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    vocabulary = model.config.vocab_size
    stored = load_file(folder / "model.safetensors")
    assert sum(v.ndim == 2 and v.shape[0] == vocabulary for v in stored.values()) == 1


def zeroed(model: Any) -> None:
    names = list(linears(model))
    weights = [linears(model)[n].weight for n in names[:3]]
    weights[0].zero_()
    weights[1].fill_(0.25)
    weights[2][1:] = 0


@pytest.mark.parametrize("name", METHODS)
def test_zero_constant_and_single_channel_weights_survive(
    made: Callable[[str], Made], name: str, tmp_path: Path
) -> None:
    folder_of(made, name, "bert")
    model = load(made("bert").dense)
    with torch.no_grad():
        zeroed(model)
    source = shutil.copytree(made("bert").dense, tmp_path / "source")
    model.save_pretrained(source)
    out = run(source, tmp_path / "out", row_of(name), made("bert").train)
    answers = effllm.open(out, threads=1).engine.run(FEEDS)
    assert all(np.isfinite(value).all() for value in answers.values())


@pytest.mark.parametrize(
    "name", [n for n in METHODS if method_class(n).stage in {Stage.TRAIN, Stage.SPARSE, Stage.FACTORS}]
)
def test_zeros_of_a_step_before_stay_zero(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    first = method_of("magnitude", sparsity=0.4)
    try:
        check_order([first, *row_of(name)])
    except SettingError:
        pytest.skip("cannot follow pruning")
    train = made("bert").train
    pruned = run(made("bert").dense, tmp_path / "pruned", [first], train)
    out = run(pruned, tmp_path / "out", row_of(name), train)
    if not is_torch(out):
        pytest.skip("an ONNX folder")
    before, after = linears(load(pruned)), linears(load(out))
    for layer, linear in before.items():
        assert not after[layer].weight[linear.weight == 0].any(), layer


def test_two_methods_in_a_row_are_two_commands(made: Callable[[str], Made], tmp_path: Path) -> None:
    methods = [method_of("magnitude", sparsity=0.3), method_of("magnitude", sparsity=0.6, pattern="row")]
    train = made("bert").train
    together = run(made("bert").dense, tmp_path / "together", methods, train)
    first = run(made("bert").dense, tmp_path / "first", methods[:1], train)
    second = run(first, tmp_path / "second", methods[1:], train)
    assert (together / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    steps = effllm.Variant.open(second).manifest["steps"]
    assert [step["settings"]["sparsity"] for step in steps] == [0.3, 0.6]


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ([], "at least one"),
        (["int8", "magnitude"], "int8 must be the last"),
        (["magnitude", "heads"], "heads must come before magnitude"),
        (["magnitude", "distil", "layers"], "layers must come before magnitude"),
        (["ffn", "layers"], "layers must come before ffn: widths are chosen"),
    ],
)
def test_wrong_orders_fail_before_any_work(specs: list[str], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        check_order([parse_method(spec) for spec in specs])


def test_training_without_data_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="distil trains; give --train"):
        compress(made("bert").dense, tmp_path / "out", method=method_of("distil"))
    assert not (tmp_path / "out").exists()


def test_a_model_that_another_tool_quantised_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    source = shutil.copytree(made("bert").dense, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (source / "config.json").write_text(json.dumps(config))
    for name in METHODS:
        with pytest.raises(Unsupported, match="already quantised"):
            compress(source, tmp_path / "out", method=row_of(name), train=made("bert").train)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.update(rows=-1),
        lambda entry: entry.update(nonzeros="many"),
        lambda entry: entry.update(nonzeros=3),
        lambda entry: entry.update(colour="red"),
        lambda entry: entry.pop("rows"),
    ],
)
def test_damaged_sizes_in_the_config_are_one_clear_error(
    made: Callable[[str], Made], damage: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(made("bert").folders[DAMAGED], tmp_path / "damaged")
    (folder / "effllm.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    damage(next(iter(config["quantization_config"]["linears"].values())))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EffllmError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
