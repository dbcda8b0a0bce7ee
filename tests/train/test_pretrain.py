"""Pre-training: exact under accumulation and processes, resumed bit for bit after a kill, safe against faults."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import effllm
from effllm.cli import main
from effllm.data.packing import evaluation_batches
from effllm.data.samples import Samples
from effllm.data.store import TokenStore
from effllm.data.vocabulary import Vocabulary
from effllm.errors import ArtifactError, SettingError, TrainingStopped
from effllm.train import loop as loops
from effllm.train import run as runs
from effllm.train.branch import Trunk
from effllm.train.objectives import MaskedLanguageModel
from effllm.train.pretrain import pretrain
from effllm.train.runlog import read_log
from effllm.train.settings import PretrainSettings

BASE = {
    "model": "tiny",
    "steps": 8,
    "batch_size": 16,
    "max_length": 32,
    "learning_rate": 2e-3,
    "save_every": 3,
    "log_every": 1,
    "eval_limit": 8,
}


def settings(**changes) -> PretrainSettings:
    return PretrainSettings(**{**BASE, **changes})


def finish(tokens: Path, out: Path, resume: bool = False, **changes) -> list:
    return list(pretrain(tokens, out, settings(**changes), resume=resume))


def trace(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in read_log(run) if "loss" in line}


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "last" / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert trace(one) == trace(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def assert_same_trace(run: Path, whole: Path) -> None:
    """The same up to the rounding of sums in another order."""
    found, wanted = trace(run), trace(whole)
    assert found.keys() == wanted.keys()
    for step, (loss, norm) in wanted.items():
        assert found[step][0] == pytest.approx(loss, rel=1e-5)
        assert found[step][1] == pytest.approx(norm, rel=1e-4)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def whole(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(tokens, out)
    return out


def command(tokens: Path, out: Path, *more: str) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in BASE.items()]
    return [sys.executable, "-m", "effllm", "pretrain", str(tokens), "--out", str(out), *flags, *more]


def test_it_learns_and_every_checkpoint_is_a_model_folder(tokens: Path, whole: Path) -> None:
    losses = [loss for loss, _ in trace(whole).values()]
    assert losses[-1] < losses[0]
    for link in ("last", "best"):
        model, info = transformers.AutoModelForMaskedLM.from_pretrained(whole / link, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert len(transformers.AutoTokenizer.from_pretrained(whole / link)) == model.config.vocab_size


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_nothing_but_rounding(tokens: Path, whole: Path, tmp_path: Path, accumulate: int) -> None:
    finish(tokens, tmp_path / "run", accumulate=accumulate)
    assert_same_trace(tmp_path / "run", whole)


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (4, 2), (7, 0)])
def test_a_stopped_run_goes_on_bit_for_bit(tokens: Path, whole: Path, tmp_path: Path, stop: int, workers: int) -> None:
    steps = pretrain(tokens, tmp_path / "run", settings())
    for record in steps:
        if record.step == stop:
            break
    steps.close()
    if stop >= 3:
        finish(tokens, tmp_path / "run", resume=True, workers=workers)
    else:
        finish(tokens, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_the_end_of_an_epoch_is_no_special_place(tokens: Path, tmp_path: Path) -> None:
    few = {"batch_size": 64, "steps": 9, "save_every": 2}
    finish(tokens, tmp_path / "whole", **few)
    steps = pretrain(tokens, tmp_path / "run", settings(**few))
    for record in steps:
        if record.step == 5:
            break
    steps.close()
    finish(tokens, tmp_path / "run", resume=True, **few)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("moment", ["checkpoint", "step"])
def test_sigkill_and_resume_give_the_same_bits(tokens: Path, whole: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "run"
    child = subprocess.Popen(command(tokens, out), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < until:
        writing = any((out / "checkpoints").glob(".step-*"))
        line = (out / "log.jsonl").exists() and '"step": 4' in (out / "log.jsonl").read_text()
        if writing if moment == "checkpoint" else line:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    finish(tokens, out, resume=True)
    assert_same_run(whole, out)
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tokens: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    newest = sorted((out / "checkpoints").iterdir())[-1]
    with (newest / "model.safetensors").open("r+b") as stream:
        stream.seek(5000)
        byte = stream.read(1)
        stream.seek(5000)
        stream.write(bytes([byte[0] ^ 1]))
    records = finish(tokens, out, resume=True)
    assert [record.step for record in records] == [7, 8]
    assert newest.name in caplog.text
    assert_same_run(whole, out)


def test_a_resume_with_other_settings_is_refused_by_name(tokens: Path, whole: Path) -> None:
    with pytest.raises(SettingError, match=r"learning_rate = 0\.002, now it is 0\.001"):
        pretrain(tokens, whole, settings(learning_rate=1e-3), resume=True)


def test_a_run_is_not_overwritten_without_force(tokens: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--resume"):
        pretrain(tokens, whole, settings())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(SettingError, match="exists"):
        pretrain(tokens, tmp_path / "mine", settings(), force=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = runs.build_optimizer

    def poisoned(*arguments):
        optimizer = before(*arguments)
        step = optimizer.step
        calls = iter(range(100))

        def poison(*a, **k):
            step(*a, **k)
            if next(calls) == 4:
                with torch.no_grad():
                    optimizer.param_groups[0]["params"][0].fill_(torch.nan)

        optimizer.step = poison
        return optimizer

    monkeypatch.setattr(runs, "build_optimizer", poisoned)
    with pytest.raises(TrainingStopped, match=r"not finite in step 6.*last good checkpoint is of step 3"):
        finish(tokens, tmp_path / "run")
    assert np.isfinite(weights(tmp_path / "run")["bert.embeddings.word_embeddings.weight"]).all()


def test_a_full_disk_keeps_the_checkpoint_before(
    tokens: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effllm.train import checkpoint

    saves = iter(range(100))
    before = checkpoint.save_file

    def full(*arguments, **more):
        if next(saves) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        before(*arguments, **more)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ArtifactError, match="No space left"):
        finish(tokens, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    finish(tokens, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the notes."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    ],
)
def test_out_of_memory_names_the_setting_and_keeps_the_checkpoint(
    tokens: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, error: Exception
) -> None:
    forward, steps = MaskedLanguageModel.forward, iter(range(100))

    def scarce(self, **arrays):
        if self.training and next(steps) == 4:
            raise error
        return forward(self, **arrays)

    monkeypatch.setattr(MaskedLanguageModel, "forward", scarce)
    assert main(command(tokens, tmp_path / "run")[3:]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: out of memory (")
    assert "go on with --resume and double --accumulate (now 1)" in last
    assert "the last good checkpoint is of step 3" in last
    monkeypatch.undo()
    finish(tokens, tmp_path / "run", resume=True, accumulate=2)
    assert_same_trace(tmp_path / "run", whole)


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
def test_pair_objectives_train(tokens: Path, tmp_path: Path, objective: str) -> None:
    last = finish(tokens, tmp_path / "run", objective=objective, steps=2, save_every=0)[-1]
    assert 0.3 < last.losses[objective.removeprefix("mlm+")] < 2


def test_a_budget_of_seconds_ends_the_run_and_takes_the_schedule_along(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(loops.time, "perf_counter", lambda: float(next(clock)))
    records = finish(tokens, tmp_path / "run", steps=0, seconds=60.0, save_every=0)
    assert records[-1].progress == 1
    assert len(records) > 10
    assert records[-1].learning_rate < records[len(records) // 2].learning_rate / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps or --seconds"),
        ({"seconds": 5.0}, "not both"),
        ({"batch_size": 100_000}, "smaller than one batch"),
        ({"batch_size": 2, "accumulate": 4}, "too small"),
        ({"model": "minni"}, "did you mean 'mini'"),
        ({"mask_rate": 1.5}, "mask-rate"),
        ({"max_length": 4}, "max_length"),
        ({"model": "modernbert-none/nothing"}, "no folder"),
    ],
)
def test_bad_settings_are_one_error_and_leave_nothing(
    tokens: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises((SettingError, ArtifactError), match=message):
        finish(tokens, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_model_with_fewer_rows_than_the_tokenizer_is_refused(tokens: Path, tmp_path: Path) -> None:
    transformers.BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path / "config"
    )
    with pytest.raises(SettingError, match="100 rows"):
        finish(tokens, tmp_path / "run", model=str(tmp_path / "config"))


def test_training_goes_on_from_a_trained_folder(tokens: Path, whole: Path, tmp_path: Path) -> None:
    records = finish(tokens, tmp_path / "more", model=str(whole / "last"), steps=1, save_every=0)
    assert records[0].loss < trace(whole)[1][0]


def test_the_command_line_writes_to_stderr_and_refuses_in_one_line(tokens: Path, tmp_path: Path) -> None:
    result = subprocess.run(command(tokens, tmp_path / "r", "--steps=0"), capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: give --steps or --seconds")
    assert json.dumps(result.stdout) == '""'


def test_the_evaluation_counts_the_masked_tokens_that_are_right(tokens: Path, whole: Path) -> None:
    rows = [line["evaluation"] for line in read_log(whole) if "evaluation" in line][-1]
    assert [row["metric"] for row in rows] == ["masked loss", "masked accuracy"]
    vocabulary = Vocabulary.read(tokens / "tokenizer")
    samples = Samples(TokenStore.open(tokens, "dev"), vocabulary, BASE["max_length"], "mlm")
    model = transformers.AutoModelForMaskedLM.from_pretrained(whole / "last", attn_implementation="eager").eval()
    right = count = 0
    for batch in evaluation_batches(samples, vocabulary, limit=BASE["eval_limit"]):
        starts = np.concatenate(([0], np.cumsum(batch.lengths)[:-1]))
        rows_of = [
            torch.from_numpy(batch.input_ids[a : a + n])[None] for a, n in zip(starts, batch.lengths, strict=True)
        ]
        guesses = torch.cat([model(input_ids=ids).logits[0].argmax(-1) for ids in rows_of]).numpy()
        right += int((guesses[batch.masked_positions] == batch.labels).sum())
        count += len(batch.labels)
    assert rows[1]["n"] == count
    assert rows[1]["value"] == pytest.approx(right / count, abs=1e-6)


@pytest.fixture(scope="module")
def stable(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoints of steps 2, 4 and 6 are before its decay."""
    out = tmp_path_factory.mktemp("runs") / "stable"
    finish(tokens, out, schedule="wsd", steps=10, decay=0.3, warmup=0.1, save_every=2, keep=9)
    return out


def test_a_decay_branch_repeats_the_next_step_of_its_run_and_ends_at_nothing(
    tokens: Path, stable: Path, tmp_path: Path
) -> None:
    trunk = Trunk.open(stable / "checkpoints" / "step-00000004")
    settings_of_branch = trunk.decaying(4, {"save_every": 2})
    records = list(pretrain(tokens, tmp_path / "branch", settings_of_branch, trunk=trunk))
    assert [record.step for record in records] == [5, 6, 7, 8]
    assert trace(tmp_path / "branch")[5] == trace(stable)[5]
    rates = [record.learning_rate / BASE["learning_rate"] for record in records]
    assert rates == pytest.approx([1 - ((k + 0.5) / 4) ** 0.5 for k in range(4)], rel=1e-12)

    steps = pretrain(tokens, tmp_path / "resumed", settings_of_branch, trunk=trunk)
    for record in steps:
        if record.step == 7:
            break
    steps.close()
    list(pretrain(tokens, tmp_path / "resumed", settings_of_branch, trunk=trunk, resume=True))
    assert_same_run(tmp_path / "branch", tmp_path / "resumed")


def test_a_branch_from_the_command_line_keeps_the_settings_of_its_run(
    tokens: Path, stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["pretrain", str(tokens), "--out", str(tmp_path / "out"), "--steps", "1"]
    checkpoint = str(stable / "checkpoints" / "step-00000006")
    assert main([*base, "--branch", checkpoint, "--batch-size", "8"]) == 2
    assert "leave out --batch-size" in capsys.readouterr().err
    assert main([*base, "--branch", str(stable)]) == 2
    assert "step-00000010 cannot be branched: its learning rate is 0 of the full one" in capsys.readouterr().err
    assert main([*base, "--branch", str(tokens)]) == 2
    assert "neither a pre-training run nor one of its checkpoints" in capsys.readouterr().err
    assert main([*base, "--branch", checkpoint, "--log-every", "1"]) == 0
    assert trace(tmp_path / "out")[7] == trace(stable)[7]
    settings_of_run = effllm.Variant.open(tmp_path / "out" / "last").manifest["steps"]
    assert [step["settings"]["schedule"] for step in settings_of_run] == ["wsd", "wsd"]


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


def shard(script: list[str], tokens: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run `effllm pretrain` on two processes with the FSDP config of the examples."""
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
    launched = [*launcher, "--main_process_port", str(free_port()), *script, *command(tokens, out, *more)[3:]]
    return subprocess.run(launched, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_sharded_model_gives_the_trace_of_one_process_and_resumes(tokens: Path, whole: Path, tmp_path: Path) -> None:
    script = [str(Path(__file__).parent / "fsdp_on_cpu.py")]
    result = shard(script, tokens, tmp_path / "sharded")
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
    assert shard(script, tokens, out, "--resume").returncode == 0
    assert_same_run(tmp_path / "sharded", out)


@pytest.mark.slow
def test_sharding_that_would_not_happen_is_refused(tokens: Path, tmp_path: Path) -> None:
    result = shard(["-m", "effllm"], tokens, tmp_path / "run")
    assert "error: accelerate shards models (FSDP) on GPUs only" in result.stderr
    assert not (tmp_path / "run").exists()
