"""Pre-training: exact under accumulation and processes, resumed bit for bit after a kill, safe against faults."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model
from runs import BASE, assert_same_run, assert_same_trace, command, finish, settings, trace, weights
from safetensors import SafetensorError

import effllm
from effllm.cli import main
from effllm.data.packing import evaluation_batches
from effllm.data.samples import Samples
from effllm.data.store import TokenStore
from effllm.data.vocabulary import Vocabulary
from effllm.errors import ArtifactError, SettingError, TrainingStopped, Unsupported
from effllm.train import loop as loops
from effllm.train import run as runs
from effllm.train.models import build_model
from effllm.train.objectives import MaskedLanguageModel
from effllm.train.pretrain import pretrain
from effllm.train.runlog import read_log


@pytest.fixture(scope="module")
def whole(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(tokens, out)
    return out


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
    # The promise of equal bits is for the CPU: on a GPU two processes may sum in another order.
    (assert_same_trace if torch.cuda.is_available() else assert_same_run)(whole, out)
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
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
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


def test_under_a_time_budget_the_schedule_starts_after_the_first_step() -> None:
    """In which a model is compiled: that can take longer than the warm-up."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    alone = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    timed = settings(steps=0, seconds=600.0, warmup=0.1, learning_rate=1.0)
    loop = loops.Loop(alone, torch.nn.Identity(), optimizer, None, timed, (), step=1, elapsed_s=100.0, first_s=100.0)
    assert loop._set_learning_rate() == 0.0
    loop.elapsed_s = 125.0
    assert loop._set_learning_rate() == pytest.approx(0.5)
    assert loop._progress() == pytest.approx(125 / 600)


def test_what_the_environment_says_changes_no_gradient(
    tokens: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    finish(tokens, tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_a_run_goes_on_without_the_model_that_it_started_from(tokens: Path, whole: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(whole / "last", start)
    finish(tokens, tmp_path / "whole", model=str(start), steps=6)
    for _ in zip(range(4), pretrain(tokens, tmp_path / "run", settings(model=str(start), steps=6)), strict=False):
        pass
    shutil.rmtree(start)
    finish(tokens, tmp_path / "run", model=str(start), steps=6, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


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
        ({"beta1": 1.5}, "beta1"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"clip": math.nan}, "--clip must be a finite number, got nan"),
        ({"steps": 0, "seconds": math.inf}, "--seconds must be a finite number, got inf"),
        ({"eval_limit": -1}, "eval-limit"),
        ({"model": "modern-tiny", "objective": "mlm+sop"}, "needs a sentence-pair head"),
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
    with pytest.raises((SettingError, ArtifactError, Unsupported), match=message):
        finish(tokens, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_model_with_fewer_rows_than_the_tokenizer_is_refused(tokens: Path, tmp_path: Path) -> None:
    transformers.BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path / "config"
    )
    with pytest.raises(SettingError, match="100 rows"):
        finish(tokens, tmp_path / "run", model=str(tmp_path / "config"))


def test_positions_that_the_padding_takes_are_not_counted(tokens: Path, tmp_path: Path) -> None:
    vocabulary = Vocabulary.read(tokens / "tokenizer")
    transformers.RobertaConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=vocabulary.pad_id,
    ).save_pretrained(tmp_path / "config")
    with pytest.raises(SettingError, match="takes 31 tokens, --max-length is 32"):
        finish(tokens, tmp_path / "run", model=str(tmp_path / "config"))


def test_a_run_does_not_replace_what_it_starts_from(tokens: Path, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    with pytest.raises(SettingError, match="lies in --out"):
        pretrain(tokens, run, settings(model=str(run / "last")), force=True)
    assert effllm.Variant.open((run / "last").resolve()).path.is_dir()


def test_a_trained_folder_with_another_tokenizer_is_refused(tokens: Path, tmp_path: Path) -> None:
    """Its embeddings would stand for other words than it learned them for."""
    folder = make_model(tmp_path / "model", "bert", "fill-mask")
    assert Vocabulary.read(folder).digest != Vocabulary.read(tokens / "tokenizer").digest
    with pytest.raises(SettingError, match="has another tokenizer than the data; prepare the data with the model's"):
        finish(tokens, tmp_path / "run", model=str(folder))


def test_a_config_pads_as_the_data_does(tokens: Path, tmp_path: Path) -> None:
    vocabulary = Vocabulary.read(tokens / "tokenizer")
    config = transformers.BertConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=vocabulary.mask_id,
    )
    config.save_pretrained(tmp_path / "config")
    model = build_model(str(tmp_path / "config"), vocabulary, 32, "mlm", 0)
    assert model.config.pad_token_id == vocabulary.pad_id
    assert model.base_model.embeddings.word_embeddings.padding_idx == vocabulary.pad_id


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


@pytest.mark.slow
def test_bfloat16_gives_the_losses_up_to_its_precision(tokens: Path, whole: Path, tmp_path: Path) -> None:
    steps = pretrain(tokens, tmp_path / "run", settings(precision="bf16"))
    for record in steps:
        assert record.loss == pytest.approx(trace(whole)[record.step][0], rel=2**-8)
        if record.step == 4:
            break
    steps.close()
    assert weights(tmp_path / "run")["bert.embeddings.word_embeddings.weight"].dtype == np.float32
