"""Training on two processes, copied or sharded, on one host or two."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import WORDS, make_model
from runs import assert_same_run, assert_same_trace, command, finish, free_port, weights
from safetensors.numpy import load_file
from test_finetune import run, write_jsonl

import effllm
from effllm.train.finetune import FinetuneStep, finetune
from effllm.train.settings import FinetuneSettings

ON_CPU = [str(Path(__file__).parent / "fsdp_on_cpu.py")]
TASK = "sentence-similarity"
TUNED = {
    "steps": 8,
    "batch_size": 8,
    "dropout": 0.1,
    "pass_tokens": 60,
    "learning_rate": 3e-3,
    "epsilon": 1e-4,  # or Adam makes whole steps of gradients that are zero up to rounding, as of the keys' biases
    "schedule": "constant",
    "warmup": 0.0,
    "save_every": 3,
    "eval_every": 3,
    "average": 3,
    "log_every": 1,
    "distil_hidden": 1.0,
    "distil_attention": 1.0,
}


@pytest.fixture(scope="module")
def whole(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(tokens, out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_two_processes_on_one_host_or_two_give_the_trace_of_one(
    tokens: Path, whole: Path, tmp_path: Path, hosts: int
) -> None:
    each = ["--nnodes", str(hosts), "--nproc-per-node", str(2 // hosts), "--rdzv-backend", "c10d"]
    each += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test", "--local-addr", "127.0.0.1"]
    launched = [sys.executable, "-m", "torch.distributed.run", *each, *command(tokens, tmp_path / "run")[1:]]
    running = [subprocess.Popen(launched, stderr=subprocess.PIPE, text=True) for _ in range(hosts)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    assert_same_trace(tmp_path / "run", whole)


def shard(script: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `effllm` on two processes with the FSDP config of the examples."""
    config = Path(__file__).parents[2] / "examples" / "fsdp.yaml"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        "2",
    ]
    launched = [*launcher, "--main_process_port", str(free_port()), *script, *arguments]
    return subprocess.run(launched, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_sharded_model_gives_the_trace_of_one_process_and_resumes(tokens: Path, whole: Path, tmp_path: Path) -> None:
    result = shard(ON_CPU, command(tokens, tmp_path / "sharded")[3:])
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_trace(tmp_path / "sharded", whole)
    folder = tmp_path / "sharded" / "last"
    _, info = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    for name, tensor in weights(whole).items():
        np.testing.assert_allclose(weights(tmp_path / "sharded")[name], tensor, rtol=0, atol=2e-5, err_msg=name)

    out = tmp_path / "resumed"
    shutil.copytree(tmp_path / "sharded", out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    assert shard(ON_CPU, command(tokens, out, "--resume")[3:]).returncode == 0
    assert_same_run(tmp_path / "sharded", out)


@pytest.mark.slow
def test_what_is_compiled_is_not_sharded(tokens: Path, tmp_path: Path) -> None:
    result = shard(ON_CPU, command(tokens, tmp_path / "run", "--compile")[3:])
    assert "error: --compile does not go with sharding (FSDP)" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student, a teacher with its vocabulary, and pairs of sentences to learn from."""
    folder = tmp_path_factory.mktemp("lesson")
    texts = [" ".join(WORDS[(7 * i + i // 5 * k) % len(WORDS)] for k in range(3 + i % 6)) for i in range(48)]
    examples = zip(texts[::2], texts[1::2], strict=True)
    records = [{"text": a, "text_pair": b, "score": float(i % 6)} for i, (a, b) in enumerate(examples)]
    pairs = write_jsonl(folder / "pairs.jsonl", records)
    student = make_model(folder / "student", "bert", "feature-extraction")
    run(student, folder / "teacher", TASK, pairs, settings={"steps": 20})
    return {"student": student, "teacher": folder / "teacher", "pairs": pairs}


def tune(lesson: dict[str, Path], out: Path) -> Iterator[FinetuneStep]:
    """Fine-tune in this process, with the settings of `TUNED`."""
    return finetune(
        lesson["student"],
        out,
        task=TASK,
        train=lesson["pairs"],
        dev=lesson["pairs"],
        teacher=lesson["teacher"],
        settings=FinetuneSettings(**TUNED),
        seeds=2,
    )


@pytest.mark.slow
def test_a_sharded_fine_tuning_gives_the_folder_of_one_process_and_resumes_what_that_began(
    lesson: dict[str, Path], tmp_path: Path
) -> None:
    """With a teacher, whose hidden states and attention are learned from, and `--average`."""
    whole = tmp_path / "whole"
    list(tune(lesson, whole))
    begun = tune(lesson, tmp_path / "resumed")
    list(itertools.islice(begun, 5))
    begun.close()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TUNED.items()]
    flags += [f"--task={TASK}", f"--train={lesson['pairs']}", f"--dev={lesson['pairs']}", "--seeds=2"]
    for name, more in {"sharded": [], "resumed": ["--resume"]}.items():
        out = tmp_path / name
        arguments = ["finetune", str(lesson["student"]), f"--out={out}", f"--teacher={lesson['teacher']}"]
        result = shard(ON_CPU, [*arguments, *flags, *more])
        assert result.returncode == 0, result.stderr[-3000:]
        assert_same_trace(out / "training", whole / "training")
        one, other = effllm.Variant.open(whole), effllm.Variant.open(out)
        assert other.manifest["notes"] == one.manifest["notes"]
        assert [row.value for row in other.rows] == pytest.approx([row.value for row in one.rows], rel=1e-4)
        _, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"]
        for key, tensor in load_file(whole / "model.safetensors").items():
            found = load_file(out / "model.safetensors")[key]
            np.testing.assert_allclose(found, tensor, rtol=0, atol=2e-5, err_msg=key)


@pytest.mark.slow
def test_sharding_that_would_not_happen_is_refused(tokens: Path, tmp_path: Path) -> None:
    result = shard(["-m", "effllm"], command(tokens, tmp_path / "run")[3:])
    assert "error: accelerate shards models (FSDP) on GPUs only" in result.stderr
    assert not (tmp_path / "run").exists()
