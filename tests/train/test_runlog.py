"""A run's log and its page."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import pytest
import torch
import transformers
from runs import finish, settings
from torch.utils.flop_counter import FlopCounterMode

from effllm.errors import ArtifactError
from effllm.report.training import run_page
from effllm.train.flops import FlopCount
from effllm.train.loop import StepRecord
from effllm.train.pretrain import pretrain
from effllm.train.runlog import RunLog, read_log


def line(step: int) -> dict:
    values = {"loss": 7.0 - 0.1 * step, "learning_rate": 1e-3 / step, "gradient_norm": 1.0, "tokens_per_s": 4000.0}
    return {"step": step, **values, "mfu": 0.4, "data_wait": 0.01, "elapsed_s": 2.0 * step}


START = {"start": {"mfu": "MFU = <formula>", "peak_flops": 1e11, "peak": "measured", "machine": "m"}, "step": 0}


def test_the_page_shows_the_curves_and_renews_itself_while_the_run_goes_on() -> None:
    row = {"metric": "masked loss", "value": 6.0, "unit": "nats", "system": "model"}
    lines = [START, line(1), line(2), {"step": 2, "evaluation": [row]}, line(3), {"step": 3, "evaluation": [row]}]
    page = run_page(lines, "Run <1>", live=True)
    assert 'http-equiv="refresh"' in page
    assert "Training loss: 6.7 at step 3" in page
    assert "Dev masked loss: 6 at step 3" in page
    assert "Run &lt;1&gt;" in page
    assert "&lt;formula&gt;" in page
    assert 'http-equiv="refresh"' not in run_page(lines, "Run", live=False)


def test_the_page_of_a_run_that_has_just_begun_has_no_curves() -> None:
    assert "<svg" not in run_page([START], "Run", live=True)
    assert "<svg" not in run_page([START, line(1)], "Run", live=True)


def test_a_last_line_that_a_kill_cut_off_is_left_out_and_another_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(line(1)) + "\n" + json.dumps(line(2))[:20])
    assert [entry["step"] for entry in read_log(tmp_path)] == [1]
    (tmp_path / "log.jsonl").write_text('{"step"\n' + json.dumps(line(2)) + "\n")
    with pytest.raises(ArtifactError, match="damaged"):
        read_log(tmp_path)
    with pytest.raises(ArtifactError, match="cannot read"):
        read_log(tmp_path / "none")


def test_the_count_of_operations_is_that_of_the_matrix_products() -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.AutoModelForMaskedLM.from_config(config)
    count = FlopCount.of(model)
    assert count.layer_weights == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert count.head_weights == 32 * 32 + 32 * 100
    tokens, masked, length = 60, 9, 20
    attention = 12 * 2 * 32 * length * tokens
    assert (
        count.step(tokens, masked, 3) == 6 * count.layer_weights * tokens + attention + 6 * count.head_weights * masked
    )
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(3, length, dtype=torch.int64)).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(count.step(tokens, tokens, 3), rel=0.1)


def test_tensorboard_shows_the_log_of_a_resumed_run_without_steps_taken_twice(tokens: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    steps = pretrain(tokens, out, settings(steps=6))
    for record in steps:
        if record.step == 5:
            break
    steps.close()
    finish(tokens, out, resume=True, steps=6)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    lines = read_log(out)
    for key in ("loss", "learning_rate", "gradient_norm", "tokens_per_s"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        wanted = [(entry["step"], entry[key]) for entry in lines if key in entry]
        assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)  # float32
    for index, metric in enumerate(("masked loss", "masked accuracy")):
        wanted = [(entry["step"], entry["evaluation"][index]["value"]) for entry in lines if "evaluation" in entry]
        found = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(f"dev/{metric}")]
        assert wanted == found


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_utilisation_is_that_of_the_precision_of_the_run(tmp_path: Path, precision: str, dtype: str) -> None:
    module = torch.nn.Module()
    module.model = transformers.BertModel(transformers.BertConfig(vocab_size=10, hidden_size=12, num_hidden_layers=1))
    RunLog(tmp_path, module, resumed_at=0, precision=precision).close()
    assert read_log(tmp_path)[0]["start"]["peak"].startswith(f"{dtype} matrix product")


def test_utilisation_is_over_the_peak_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effllm.train.flops.peak_flops", lambda *_: (1e9, "a data sheet"))
    module = torch.nn.Module()
    module.model = transformers.BertModel(transformers.BertConfig(vocab_size=10, hidden_size=12, num_hidden_layers=1))
    record = StepRecord(1, {"mlm": 1.0}, 1e-3, 1.0, 64, 8, 2, 0.5, 0.0, 0.5, 1.0)
    found = []
    for processes in (1, 4):
        run = tmp_path / str(processes)
        run.mkdir()
        log = RunLog(run, module, resumed_at=0, precision="fp32", processes=processes)
        log.write(record)
        log.close()
        start, line = read_log(run)
        found.append((start["start"]["peak"], line["mfu"]))
    assert found[1][0] == "4 × a data sheet"
    assert found[1][1] == pytest.approx(found[0][1] / 4, abs=1e-4)


def test_a_full_disk_at_the_end_of_a_log_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunLog, "__init__", lambda self: None)
    log = RunLog()
    log._file, log._stream = tmp_path / "log.jsonl", Full()
    with pytest.raises(ArtifactError, match="No space left"):
        log.close()
