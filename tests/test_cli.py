"""The command line: wrong input is one line and exit code 2, a killed run leaves nothing, answers can be read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LABELS, make_model

import effllm
from effllm.cli import COMMANDS, cli, entry, main
from effllm.cli.console import give_rows
from effllm.errors import ArtifactError, GateFailed
from effllm.rows import Row, read_rows
from effllm.variant import write_manifest


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one error line on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")]
    assert len(errors) == 1, lines
    assert not any("Traceback" in line for line in lines)
    return errors[0]


@pytest.fixture(scope="module")
def exported(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "exported"
    effllm.export(classifier, out)
    return out


def broken(classifier: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(classifier, copy)
    return copy


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: effllm {verb}")
    assert "Examples:" in text or verb == "doctor"


def damage_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pointer_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def page_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<!DOCTYPE html><html>Not Found</html>")


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModel": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_config, "has no config.json"),
        (damage_tokenizer, "no tokenizer files"),
        (damage_weights, "no weights"),
        (truncate_weights, "truncated or damaged"),
        (pointer_weights, "git-lfs pointer"),
        (page_weights, "web page"),
        (pickled_weights, "only pickled weights"),
        (remote_code, "does not run remote code"),
    ],
)
def test_a_broken_model_is_one_line(
    damage, words: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken(classifier, tmp_path)
    damage(folder)
    assert run("compress", folder, "--method", "int8", "--out", tmp_path / "out") == 2
    assert words in one_line(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "int9"], "did you mean 'int8'"),
        (["--method", "int8:activation=static"], "did you mean 'activations'"),
        (["--method", "int8:activations=fast"], "must be one of auto, dynamic, static"),
        (["--method", "int8:calibration=many"], "must be a whole number"),
        (["--method", "int8:smooth=2"], "smooth must be between 0 and 1"),
        (["--method", "int8:static"], "expected key=value"),
        (["--method", "int8", "--task", "text-clasification"], "did you mean 'text-classification'"),
        (["--method", "int8", "--task", "fill-mask"], "has no head for fill-mask"),
        (["--method", "int8", "--calib", "missing.txt"], "no file at missing.txt"),
        (["--method", "int8", "--columns", "text"], "expected name=column"),
    ],
)
def test_wrong_settings_are_one_line(
    arguments: list[str], words: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compress", classifier, *arguments, "--out", tmp_path / "out") == 2
    assert words in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "holds no examples"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "is not UTF-8"),
        ("columns.jsonl", b'{"sentence": "a"}\n', "columns.jsonl:1: no text in column 'text' (columns: sentence)"),
        ("line.jsonl", b'{"text": "a", "label": "positive"}\n{"text": \n', "line.jsonl:2 is not valid JSON"),
        ("label.jsonl", b'{"text": "a", "label": "positiv"}\n', "did you mean 'positive'"),
        ("data.parquet", b"PAR1", "unknown format .parquet"),
    ],
)
def test_wrong_data_is_one_line(
    name: str, content: bytes, words: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / name
    data.write_bytes(content)
    flag = "--dev" if name in {"line.jsonl", "label.jsonl"} else "--calib"
    assert run("compress", classifier, "--method", "int8", flag, data, "--out", tmp_path / "out") == 2
    assert words in one_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_missing_model_and_existing_output(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compress", tmp_path / "none", "--method", "int8", "--out", tmp_path / "out") == 2
    assert "no model folder" in one_line(capsys)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine", encoding="utf-8")
    assert run("export", classifier, "--out", taken) == 2
    assert "exists" in one_line(capsys)
    assert run("export", classifier, "--out", taken, "--force") == 2
    assert "was not written by effllm" in one_line(capsys)
    assert (taken / "thesis.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("verb", ["compress", "finetune", "pretrain", "pretrain --model"])
def test_a_flipped_byte_in_what_is_started_from_is_found(
    verb: str, classifier: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    if verb == "pretrain --model":
        make_model(copy, task="fill-mask")
    else:
        shutil.copytree(tokens if verb == "pretrain" else classifier, copy)
    if verb != "pretrain":
        write_manifest(copy, {"task": "text-classification"})
    file = copy / ("train/tokens.bin" if verb == "pretrain" else "model.safetensors")
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "positive"}\n' * 40, encoding="utf-8")
    more = {
        "compress": ["--method", "magnitude"],
        "finetune": ["--task", "text-classification", "--train", data],
        "pretrain": ["--model", "tiny", "--steps", 1, "--batch-size", 2, "--max-length", 16],
        "pretrain --model": ["--model", copy, "--steps", 1, "--batch-size", 2, "--max-length", 16],
    }[verb]
    start = tokens if verb == "pretrain --model" else copy
    assert run(verb.split(maxsplit=1)[0], start, "--out", tmp_path / "out", *more) == 2
    assert "is damaged: its SHA-256" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["predict", "eval", "show"])
def test_a_flipped_byte_is_found(verb: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    file = copy / "onnx" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "positive"}\n', encoding="utf-8")
    arguments = {"predict": [copy, "good"], "eval": [copy, "--data", data], "show": [copy]}[verb]
    assert run(verb, *arguments) == 2
    assert "is damaged" in one_line(capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"<html>404</html>", "web page"),
        (b"", "empty"),
        (b"\x08\x07garbage", "cannot be loaded"),
    ],
)
def test_a_broken_onnx_file_is_named(
    content: bytes, words: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "effllm.json").unlink()
    (copy / "onnx" / "model.onnx").write_bytes(content)
    assert run("predict", copy, "good") == 2
    assert words in one_line(capsys)


def test_predict_answers_each_task(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("predict", exported, "a good movie", "an awful ending", "--json") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 2
    assert {"label", "score", "scores"} == set(answers[0])
    assert sum(answers[0]["scores"].values()) == pytest.approx(1.0)
    assert run("predict", exported, "") == 2
    assert "a text is empty" in one_line(capsys)
    assert run("predict", exported, "movie " * 500) == 0
    assert "tokens were cut; the model takes 64" in capsys.readouterr().err


def test_predict_fills_a_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "mlm", "bert", "fill-mask")
    assert run("predict", model, "The quick brown fox [MASK] over the lazy dog.") == 0
    words = capsys.readouterr().out
    assert words.count("(0.") == 5


def test_texts_that_come_with_their_masks_have_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "lm", "bert", "fill-mask")
    data = tmp_path / "cloze.txt"
    data.write_text("paris is the [MASK] of france\n")
    assert run("eval", model, "--data", data) == 2
    assert one_line(capsys) == "error: cloze.txt has no reference answers"
    data.write_text("paris is the [MASK] of france\nparis is in france\n")
    assert run("eval", model, "--data", data) == 0
    assert "n = 1" in capsys.readouterr().out


def test_names_of_others_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    names = {str(index): f"\x1b[31m{index}" for index in range(3)}
    (model / "config.json").write_text(json.dumps(config | {"id2label": names}))
    assert run("predict", model, "paris") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_predict_says_what_is_missing_or_too_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "mlm", "bert", "fill-mask")
    assert run("predict", model, "The quick brown fox.") == 2
    assert "there is no [MASK] in the text" in one_line(capsys)
    assert run("predict", model, "--pair", "The [MASK]", "fox") == 2
    assert "fill-mask takes one text" in one_line(capsys)
    reader = make_model(tmp_path / "reader", "bert", "question-answering")
    assert run("predict", reader, "where?") == 2
    assert "question-answering takes two texts" in one_line(capsys)


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_two_labels_that_nobody_named_have_the_names_of_transformers(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(LABELS, task)
    model = make_model(tmp_path / "model", "bert", task)
    assert run("predict", model, "good movie") == 0
    assert "LABEL_" in capsys.readouterr().out


def test_eval_writes_rows_and_report_reads_them(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "dev.csv"
    data.write_text("sentence,y\na good movie,positive\nan awful plot,negative\n", encoding="utf-8")
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    assert run("eval", exported, "--data", data, "--columns", "text=sentence,label=y", "--json", rows) == 0
    assert [row.metric for row in read_rows(rows)] == ["accuracy", "macro f1", "matthews"]
    assert run("report", rows, "--html", page) == 0
    assert "accuracy" in page.read_text(encoding="utf-8")
    rows.write_text("{}\n", encoding="utf-8")
    capsys.readouterr()
    assert run("report", rows) == 2
    assert ":1 is not a row" in one_line(capsys)


TARGETS = {
    "compress": ["none", "--method", "int8", "--out", "out"],
    "bench": ["none"],
    "bench --url": ["--url", "http://127.0.0.1:9"],
    "eval": ["none", "--data", "none.jsonl"],
    "finetune": ["none", "--task", "text-classification", "--train", "none.jsonl", "--out", "out"],
    "prepare": ["none.txt", "--out", "out"],
    "report": ["none.jsonl"],
}
"""Verbs that write a report, with arguments that are wrong too: the report is looked at first."""


def report_flags() -> list[tuple[str, str]]:
    """Return every verb with each of its flags that names a file of a report."""
    commands = {verb: cli.get_command(None, verb) for verb in COMMANDS}
    flags = {
        verb: [p.opts[-1] for p in c.params if p.name in {"json_file", "html_file"}] for verb, c in commands.items()
    }
    return [(verb, flag) for verb in (*COMMANDS, "bench --url") for flag in flags[verb.removesuffix(" --url")]]


@pytest.mark.parametrize(("verb", "flag"), report_flags())
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    verb: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "taken.part"):
        Path(folder).mkdir()
    Path("file").touch()
    wrong = ["folder", "missing/rows", "file/rows", "taken", "x" * 252, "/dev/null", ""]
    wrong += ["/proc/rows"] if Path("/proc/self").exists() else []
    for target in wrong:
        assert run(verb.removesuffix(" --url"), *TARGETS[verb], flag, target) == 2
        line = one_line(capsys)
        assert line.startswith(f"error: {flag} "), (target, line)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "taken.part"]


def test_reports_replace_files_and_one_that_fails_does_not_take_the_other_along(tmp_path: Path) -> None:
    row, page, rows = Row("f1", 0.5, "share", "int8"), tmp_path / "page.html", tmp_path / "rows.jsonl"
    page.write_text("old", encoding="utf-8")
    with pytest.raises(ArtifactError, match="rows cannot be written: No such file or directory"):
        give_rows([row], str(tmp_path / "gone" / "rows"), str(page), "a title")
    assert "a title" in page.read_text(encoding="utf-8")
    rows.write_text("old", encoding="utf-8")
    with pytest.raises(ArtifactError, match="page cannot be written: No such file or directory"):
        give_rows([row], str(rows), str(tmp_path / "gone" / "page"), "a title")
    assert read_rows(rows) == [row]


def test_a_broken_gate_is_exit_code_3_with_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model", "bert", "feature-extraction")
    method = "int8:activations=static,calibration=20"
    assert run("compress", model, "--method", method, "--max-drop", "0", "--out", tmp_path / "out") == 3
    captured = capsys.readouterr()
    assert "AGREEMENT" in captured.out
    assert "int8 static" in captured.out
    assert "more than the allowed" in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_run_leaves_no_folder_and_a_rerun_works(end: signal.Signals, classifier: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-m", "effllm", "export", str(classifier), "--out", str(target)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(end)
    _, messages = process.communicate(timeout=60)
    assert not target.exists()
    if end == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in messages
        assert list(tmp_path.iterdir()) == []
    effllm.export(classifier, target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert effllm.Variant.open(target).task == "text-classification"


def test_an_interrupted_training_tells_how_to_go_on(tmp_path: Path) -> None:
    from effllm.cli.training import Interrupted, follow

    def steps():
        raise KeyboardInterrupt
        yield

    with pytest.raises(Interrupted, match="there was no checkpoint yet"):
        follow(steps(), 10, tmp_path)
    (tmp_path / "seed-0" / "checkpoints" / "step-00000500").mkdir(parents=True)
    with pytest.raises(Interrupted, match="--resume goes on"):
        follow(steps(), 10, tmp_path)


def test_an_argument_that_is_not_utf8_is_one_line_before_any_work(capsys) -> None:
    assert main(["prepare", "caf\udce9.txt", "--out", "tokens"]) == 2
    assert "error: 'caf?.txt' is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "M", "--method", "int8", "--out", "o", "--max-drop", "nan"],
        ["bench", "M", "--min-agreement", "nan"],
    ],
)
def test_a_share_that_is_no_number_is_refused(arguments: list[str], capsys) -> None:
    assert main(arguments) == 2
    assert "nan is not in the range" in capsys.readouterr().err


def test_rows_of_a_broken_gate_go_where_all_rows_go(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise GateFailed("int8: lost", [Row("accuracy", 0.5, "absolute", "int8")])

    monkeypatch.setattr("effllm.compression.pipeline.compress", lost)
    arguments = ["compress", classifier, "--method", "int8", "--out", tmp_path / "out"]
    assert main([*map(str, arguments), "--json", "-"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["value"] == 0.5
    assert "error: int8: lost" in err
    assert main([*map(str, arguments), "--html", str(tmp_path / "page.html")]) == 3
    assert "int8: lost" in (tmp_path / "page.html").read_text()


def test_files_are_written_though_the_tables_cannot_be_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effllm.cli import console

    def unprintable(rows: object) -> None:
        raise UnicodeEncodeError("latin-1", "–", 0, 1, "")

    monkeypatch.setattr(console, "print_rows", unprintable)
    with pytest.raises(UnicodeEncodeError):
        console.give_rows([Row("accuracy", 0.5, "absolute", "int8")], str(tmp_path / "rows.jsonl"))
    assert (tmp_path / "rows.jsonl").is_file()


def test_what_an_interrupt_says_is_said_to_the_user(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from effllm.cli.training import Interrupted

    def interrupted() -> None:
        raise Interrupted("the checkpoints stay")

    monkeypatch.setattr("effllm.machine.instruction_set", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the checkpoints stay"


def test_an_interrupt_while_one_is_reported_is_the_same_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("effllm.cli.main", interrupted)
    try:
        with pytest.raises(SystemExit) as left:
            entry()
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == 130


AN_INTERRUPTED_PROGRAM = """
import signal, time
from effllm.cli import cli, entry
def command(**_):
    {body}
cli.main = command
entry()
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        pytest.param("exec('signal.raise_signal(signal.SIGINT)')", "", id="in an exec, which CPython does not forget"),
        pytest.param(
            """
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
    time.sleep(60)""",
            "",
            id="caught by a library",
        ),
        pytest.param(
            """
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        time.sleep(0.7)
        print("cleared up")""",
            "cleared up\n",
            id="while it clears up",
        ),
    ],
)
def test_an_interrupt_arrives_once_and_the_exit_code_is_130(body: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(AN_INTERRUPTED_PROGRAM.format(body=body), encoding="utf-8")
    command = [sys.executable, "-m", "program"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, said, "interrupted; nothing was written")


def test_bench_times_only_what_agrees(classifier: Path, exported: Path, tmp_path: Path, capsys) -> None:
    rows = tmp_path / "rows.jsonl"
    page = tmp_path / "page.html"
    flags = ["--rounds", 6, "--tokens", "4,8", "--batch", "1,2", "--json", rows, "--html", page]
    assert run("bench", classifier, exported, *flags) == 0
    measured = read_rows(rows)
    systems = {row.system for row in measured}
    assert systems == {"torch fp32", "torch bf16", "onnxruntime fp32", "exported"}
    for metric in ("latency p50", "latency p95", "throughput", "speed-up", "load time", "peak memory", "model size"):
        assert metric in {row.metric for row in measured}
    assert {row.how.get("tokens") for row in measured if row.metric == "latency p50"} == {4, 8, "mix"}
    other = make_other(classifier, tmp_path)
    capsys.readouterr()
    assert run("bench", classifier, other, *flags, "--min-agreement", "0.99") == 3
    assert "not timed, as it agrees too little with onnxruntime fp32: other on only" in capsys.readouterr().err
    assert {row.system for row in read_rows(rows) if row.metric == "latency p50"} == systems - {"exported"}
    assert "not timed" in page.read_text(encoding="utf-8")


def make_other(classifier: Path, tmp_path: Path) -> Path:
    """Export a model with other weights under the same labels."""
    import safetensors.torch
    import torch

    changed = tmp_path / "changed"
    shutil.copytree(classifier, changed)
    file = changed / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    torch.manual_seed(1)
    tensors = {k: torch.randn_like(v) * 0.2 if v.dim() == 2 else v for k, v in tensors.items()}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    effllm.export(changed, tmp_path / "other")
    return tmp_path / "other"


def test_doctor_and_show_tell_what_is_there(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    assert "onnxruntime: " in capsys.readouterr().out
    assert run("show", exported) == 0
    assert "text-classification, from classifier" in capsys.readouterr().out
    assert run("show", "tasks") == 0
    assert "question-answering" in capsys.readouterr().out
