"""Compiled training is one graph for all steps, with the numbers of uncompiled training."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_config, make_model
from runs import assert_same_run, assert_same_trace, command, finish, run_references, settings, weights
from test_finetune import run, tagged, write_jsonl

from effllm.data.vocabulary import Vocabulary
from effllm.errors import SettingError
from effllm.train import attention
from effllm.train.compiled import compile_forward
from effllm.train.dropout import rates
from effllm.train.loop import to_tensors
from effllm.train.models import build_model
from effllm.train.objectives import MaskedLanguageModel
from effllm.train.pretrain import PretrainSource
from effllm.train.settings import FinetuneSettings


@pytest.fixture
def graphs() -> dict[str, int]:
    """How many graphs torch.compile has made, under `unique_graphs`."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    return counters["stats"]


@pytest.mark.parametrize(
    ("model", "in_kernels"),
    [
        ("modern-tiny", False),
        ("tiny", True),
        ("modernbert with a window", True),
        ("bert with dropout", False),
        ("bert with dropout", True),
        ("modernbert with dropout", False),
        ("modernbert with dropout", True),
    ],
)
def test_packed_batches_of_all_sizes_share_one_graph(
    tokens: Path, tmp_path: Path, graphs: dict[str, int], monkeypatch: pytest.MonkeyPatch, model: str, in_kernels: bool
) -> None:
    if in_kernels:  # their operator is a node of the graph
        run_references(monkeypatch)
    source = PretrainSource(tokens, settings())
    vocabulary = Vocabulary.read(tokens / "tokenizer")
    drops = "dropout" in model
    if " with " in model:
        config = make_config(model.split(maxsplit=1)[0], vocabulary.size, None)
        config.update(dict.fromkeys(rates(config.to_dict()), 0.5 * drops))
        model = str(tmp_path)
        config.save_pretrained(tmp_path)
    plain, compiled = (MaskedLanguageModel(build_model(model, vocabulary, 32, "mlm", 0)) for _ in range(2))
    for name, matrix in (*plain.named_parameters(), *compiled.named_parameters()):
        if drops and matrix.ndim == 2 and "embeddings" not in name:
            matrix.data *= 5  # what attention drops then moves the losses by a hundredth
    compile_forward(compiled.train(), backend="aot_eager")
    plain.train()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    shapes = set()
    for step in range(4):
        (batch,) = source.micro_batches(step, 0, 1)
        shapes.add((batch.tokens, batch.masked))
        arrays = to_tensors(batch.arrays, torch.device("cpu"))
        wanted, got = plain(**arrays), compiled(**arrays)
        got.sum().backward()
        torch.testing.assert_close(got, wanted, rtol=1e-5 if drops else 1e-6, atol=0)
        if in_kernels and not drops:  # what the kernel drops is its own
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr(attention, "KERNEL_DEVICES", ())
                torch.testing.assert_close(wanted, plain(**arrays), rtol=1e-5, atol=0)
    assert len(shapes) == 4
    assert graphs["unique_graphs"] == 1


@pytest.mark.slow
def test_a_compiled_run_gives_the_trace_of_an_uncompiled_one_and_resumes(
    tokens: Path, tmp_path: Path, graphs: dict[str, int]
) -> None:
    finish(tokens, tmp_path / "plain")
    finish(tokens, tmp_path / "compiled", compile=True)
    assert graphs["unique_graphs"] == 1
    assert_same_trace(tmp_path / "compiled", tmp_path / "plain")
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()
    _, info = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "compiled" / "last", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]

    out = tmp_path / "resumed"
    shutil.copytree(tmp_path / "compiled", out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    finish(tokens, out, resume=True, compile=True)
    assert_same_run(tmp_path / "compiled", out)


@pytest.mark.slow
def test_a_compiled_fine_tuning_with_dropout_and_a_teacher_gives_the_losses_of_an_uncompiled_one(
    tmp_path: Path, graphs: dict[str, int]
) -> None:
    task, file = "token-classification", write_jsonl(tmp_path / "data.jsonl", tagged())
    student = make_model(tmp_path / "student", "bert", "feature-extraction")
    run(student, tmp_path / "teacher", task, file)
    losses = []
    for compile_ in (False, True):
        chosen = {"compile": compile_, "dropout": 0.1, "pass_tokens": 60, "precision": "fp32"}
        steps = run(student, tmp_path / f"{compile_}", task, file, teacher=tmp_path / "teacher", settings=chosen)
        losses.append([step.record.loss for step in steps])
    assert graphs["unique_graphs"] == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_without_a_compiler_nothing_is_started(tokens: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        command(tokens, tmp_path / "run", "--compile"),
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3
    assert result.stderr.splitlines()[-1].startswith("error: --compile needs a C++ compiler")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_one_graph_is_refused() -> None:
    with pytest.raises(SettingError, match="--distil-hidden"):
        FinetuneSettings(compile=True, distil_hidden=1.0)
