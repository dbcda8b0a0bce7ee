"""`prepare`: whole or absent, the same bytes every time, nothing lost without a reason, no document in two splits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import effllm
from effllm import PrepareSettings, SettingError, Variant, prepare
from effllm.cli import main
from effllm.data.english import english_sentences
from effllm.data.store import TokenStore
from effllm.data.vocabulary import Vocabulary

WIKIPEDIA = Path(__file__).parents[3] / "shared" / "data"
SMALL = {"vocab_size": 600}
HAN = [chr(0x4E00 + 7 * i) for i in range(150)]


def documents(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of English sentences."""
    rng = random.Random(seed)
    sentences = english_sentences()
    return ["\n".join(rng.sample(sentences, 4)) for _ in range(count)]


def chinese(count: int) -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choices(HAN, k=80)) + "。" for _ in range(count)]


def text_file(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"# id={i}\n{text}\n\n" for i, text in enumerate(texts)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("corpus") / "corpus.txt", documents(120))


@pytest.fixture(scope="module")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return prepare([corpus], tmp_path_factory.mktemp("stores") / "store", PrepareSettings(dev_share=0.1, **SMALL))


def decoded(folder: Path, split: str) -> list[str]:
    backend = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    part = TokenStore.open(folder, split)
    pairs = zip(part.offsets[:-1], part.offsets[1:], strict=True)
    return [backend.decode(part.tokens[a:b].tolist(), skip_special_tokens=False) for a, b in pairs]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_folder_is_a_variant_that_says_what_it_is(store: Variant, corpus: Path) -> None:
    assert names(store.path) == ["dev", "effllm.json", "tokenizer", "train"]
    assert store.task == "fill-mask"
    assert store.manifest["kind"] == "tokens"
    assert store.manifest["parent"] == {"name": "corpus.txt"}
    assert store.manifest["inputs"][0]["name"] == "corpus.txt"
    assert store.manifest["store"] == {"dtype": "uint16", "vocabulary_size": 600}
    assert store.manifest["steps"][0]["settings"]["vocab_size"] == 600
    assert len(store.manifest["steps"][0]["settings"]) == len(PrepareSettings.__dataclass_fields__)
    file = store.path / "train" / "tokens.bin"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    try:
        file.write_bytes(content)
        with pytest.raises(effllm.ArtifactError, match=r"tokens\.bin is damaged"):
            Variant.open(store.path)
    finally:
        content[7] ^= 1
        file.write_bytes(content)


def test_the_report_accounts_for_every_document_and_character(tmp_path: Path) -> None:
    texts = documents(60)
    bad = ["short", "1 2 3 4 5 6 7 8 9 " * 9, "again and " * 30, texts[0].upper(), texts[1] + " x", "a\u200b\tb"]
    file = text_file(tmp_path / "corpus.txt", [*texts, *bad])
    report = prepare([file], tmp_path / "out", PrepareSettings(**SMALL)).manifest["report"]
    counts = {reason: count["documents"] for reason, count in report["dropped"].items()}
    assert counts == {"too short": 2, "few letters": 1, "repetitive": 1, "duplicate": 1, "near duplicate": 1}
    kept = report["kept"]
    assert report["read"]["documents"] == 66 == sum(counts.values()) + sum(k["documents"] for k in kept.values())
    away = report["cleaned away"]["characters"] + sum(d["characters"] for d in report["dropped"].values())
    assert report["read"]["characters"] == away + sum(k["characters"] for k in kept.values())
    for split in ("train", "dev"):
        part = TokenStore.open(tmp_path / "out", split)
        assert kept[split]["tokens"] == len(part.tokens)
        assert kept[split]["words"] == int(part.starts.sum())
        assert kept[split]["documents"] == len(part.offsets) - 1
    assert kept["dev"]["documents"] >= 1


@pytest.mark.parametrize(
    ("language", "tokenizer", "size"),
    [
        *(("English", "wordpiece", 400), ("English", "bpe", 550), ("English", "unigram", 400)),
        *(("Chinese", "wordpiece", 156), ("Chinese", "bpe", 550), ("Chinese", "unigram", 300)),
    ],
)
def test_the_store_holds_the_documents(language: str, tokenizer: str, size: int, tmp_path: Path) -> None:
    texts = documents(60) if language == "English" else chinese(60)
    file = text_file(tmp_path / "corpus.txt", texts)
    settings = PrepareSettings(tokenizer=tokenizer, vocab_size=size, case="keep", dev_share=0.2)
    variant = prepare([file], tmp_path / "out", settings)
    got = decoded(variant.path, "train") + decoded(variant.path, "dev")
    if tokenizer == "bpe":
        assert sorted(got) == sorted(texts)
    else:
        known = {"".join(unicodedata.normalize("NFKC", t).split()) for t in got if "unk" not in t.lower()}
        assert known <= {"".join(unicodedata.normalize("NFKC", text).split()) for text in texts}
        assert len(known) > 50
    report = variant.manifest["report"]["kept"]["train"]
    part, vocabulary = TokenStore.open(variant.path), Vocabulary.read(variant.path / "tokenizer")
    assert int(np.isin(part.tokens, vocabulary.special_ids).sum()) == report["unknown_tokens"]
    assert report["unknown_tokens"] < 0.003 * report["tokens"]
    assert part.starts[part.offsets[:-1]].all()
    if language == "Chinese":
        assert part.starts.mean() > 0.3


def test_the_same_input_gives_the_same_bytes_in_another_process(store: Variant, corpus: Path, tmp_path: Path) -> None:
    again = tmp_path / "store"
    flags = ["--vocab-size", "600", "--dev-share", "0.1"]
    command = [sys.executable, "-m", "effllm", "prepare", str(corpus), "--out", str(again), *flags]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert files_of(again) == files_of(store.path)


def test_the_way_a_text_is_stored_does_not_matter(store: Variant, tmp_path: Path) -> None:
    lines = [json.dumps({"body": text.replace("\n", " \r\n")}) + "\n" for text in documents(120)]
    halves = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    halves[0].write_text("".join(lines[:50]), encoding="utf-8")
    halves[1].write_text("".join(lines[50:]), encoding="utf-8")
    settings = PrepareSettings(dev_share=0.1, **SMALL)
    other = prepare(halves, tmp_path / "out", settings, columns={"text": "body"})
    got, expected = files_of(other.path), files_of(store.path)
    assert got.keys() == expected.keys()
    assert [name for name in got if got[name] != expected[name]] == ["effllm.json"]


def test_splits_share_no_document_and_stay_when_files_are_added(tmp_path: Path) -> None:
    first = text_file(tmp_path / "a.txt", documents(150, seed=1))
    second = text_file(tmp_path / "b.txt", documents(150, seed=2))
    settings = PrepareSettings(tokenizer="bpe", vocab_size=400, dev_share=0.3)
    alone = prepare([first], tmp_path / "alone", settings).path
    both = prepare([first, second], tmp_path / "both", settings).path
    train, dev = set(decoded(both, "train")), set(decoded(both, "dev"))
    assert not train & dev
    assert len(train) + len(dev) == 300
    assert set(decoded(alone, "train")) <= train
    assert set(decoded(alone, "dev")) <= dev
    # binomial: 0.3 of 300, standard deviation 7.9; 5 of them make a failure by chance rarer than one in a million
    assert abs(len(dev) - 90) < 40
    other = prepare([first], tmp_path / "other", PrepareSettings(**{**vars(settings), "seed": 1})).path
    assert set(decoded(other, "dev")) != set(decoded(alone, "dev"))


def test_a_copy_of_a_dev_document_is_not_in_train(tmp_path: Path) -> None:
    texts = documents(60)
    file = text_file(tmp_path / "a.txt", [*texts, *[text.upper() + " z" for text in texts]])
    settings = PrepareSettings(tokenizer="bpe", vocab_size=400, dev_share=0.5)
    report = prepare([file], tmp_path / "out", settings).manifest["report"]
    assert report["dropped"]["near duplicate"]["documents"] == 60


def test_a_small_corpus_still_has_a_dev_document(tmp_path: Path) -> None:
    file = text_file(tmp_path / "a.txt", documents(3))
    for share in (1e-9, 1 - 1e-9):
        kept = prepare([file], tmp_path / "out", PrepareSettings(dev_share=share, vocab_size=140), force=True)
        assert [kept.manifest["report"]["kept"][s]["documents"] for s in ("train", "dev")] == [2, 1]
    kept = prepare([file], tmp_path / "out", PrepareSettings(dev_share=0, vocab_size=140), force=True)
    assert [kept.manifest["report"]["kept"][s]["documents"] for s in ("train", "dev")] == [3, 0]


def test_what_looks_like_a_special_token_is_text(tmp_path: Path) -> None:
    texts = documents(40)
    texts[3] += "\nThe token [MASK] comes before [SEP] and <mask> after <s> in this sentence."
    file = text_file(tmp_path / "a.txt", texts)
    for tokenizer, special in (("wordpiece", "[MASK]"), ("bpe", "<mask>")):
        settings = PrepareSettings(tokenizer=tokenizer, dev_share=0, vocab_size=400)
        folder = prepare([file], tmp_path / tokenizer, settings).path
        vocabulary = Vocabulary.read(folder / "tokenizer")
        ids = (vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id, vocabulary.pad_id)
        assert not np.isin(TokenStore.open(folder).tokens, ids).any()
        assert special.lower() in "".join(decoded(folder, "train")[3].split()).lower()


def test_the_tokenizer_is_trained_on_train_only(tmp_path: Path) -> None:
    texts = documents(60)
    file = text_file(tmp_path / "a.txt", texts)
    settings = PrepareSettings(tokenizer="bpe", dev_share=0.5, vocab_size=400)
    both = prepare([file], tmp_path / "both", settings).path
    train = text_file(tmp_path / "train.txt", decoded(both, "train"))
    alone = prepare([train], tmp_path / "alone", PrepareSettings(**{**vars(settings), "dev_share": 0.0})).path
    whole = prepare([file], tmp_path / "whole", PrepareSettings(**{**vars(settings), "dev_share": 0.0})).path
    assert files_of(both / "tokenizer") == files_of(alone / "tokenizer")
    assert files_of(both / "tokenizer") != files_of(whole / "tokenizer")


def test_an_existing_tokenizer_is_taken_as_it_is(store: Variant, tmp_path: Path) -> None:
    file = text_file(tmp_path / "a.txt", documents(20, seed=3))
    folder = prepare([file], tmp_path / "out", PrepareSettings(tokenizer=str(store.path), dev_share=0.2)).path
    assert files_of(folder / "tokenizer") == files_of(store.path / "tokenizer")
    model = tmp_path / "model"
    shutil.copytree(store.path / "tokenizer", model)
    (model / "model.safetensors").write_bytes(b"weights")
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.enable_truncation(8)
    backend.enable_padding()
    (model / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    other = prepare([file], tmp_path / "other", PrepareSettings(tokenizer=str(model), dev_share=0.2)).path
    assert files_of(other / "tokenizer") == files_of(folder / "tokenizer")
    assert files_of(other / "train") == files_of(folder / "train")
    assert np.diff(TokenStore.open(other).offsets).min() > 8


@pytest.mark.parametrize("damage", ["missing", "broken", "no mask"])
def test_a_tokenizer_that_cannot_serve_is_refused_before_any_work(
    damage: str, store: Variant, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(store.path / "tokenizer", folder)
    if damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "broken":
        (folder / "tokenizer.json").write_text("{}")
    else:
        for file in folder.iterdir():
            file.write_text(file.read_text(encoding="utf-8").replace("[MASK]", "[KSAM]"), encoding="utf-8")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (folder / name).write_text(json.dumps({k: v for k, v in config.items() if k != "mask_token"}))
    assert run(corpus, "--out", tmp_path / "out", "--tokenizer", folder) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert {"missing": "has no tokenizer.json", "broken": "is not a tokenizer", "no mask": "has no mask token"}[
        damage
    ] in errors[0]


def test_lines_of_work_are_tracked(corpus: Path, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def track(items, name: str, total: int):
        count = 0
        for item in items:
            count += 1
            yield item
        seen[name] = (count, total)

    prepare([corpus], tmp_path / "out", PrepareSettings(**SMALL), track=track)
    assert list(seen) == [
        *("cleaning corpus.txt", "comparing near duplicates", "training the tokenizer"),
        *("tokenising train", "tokenising dev"),
    ]
    assert all(count <= total for count, total in seen.values())


def run(*arguments: object) -> int:
    return main(["prepare", *map(str, arguments)])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.lower().startswith("error:")]
    assert len(errors) == 1
    return errors[0]


GOOD = "\n\n".join(documents(12)).encode()


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("a.txt", None, [], "no file at"),
        ("a.txt", b"", [], "a.txt holds no documents"),
        ("a.txt", b"too\n\nshort\n\n42 42\n", [], "no text is left of 3 documents: 3 too short"),
        ("a.txt", b"short\n\n" + b"1997 " * 99, [], "left of 2 documents: 1 too short, 1 few letters"),
        ("a.txt", GOOD.replace(b"\n\n", b"\n"), [], "only one document is left, and train and dev need one each"),
        ("a.txt", GOOD + b"\n\ncaf\xe9\n", [], "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', [], "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"body": "a"}\n', [], "a.jsonl:1: no column 'text' (columns: body)"),
        ("a.jsonl", b'{"body": "a"}\n', ["--columns", "text=bdy"], "has no column 'bdy' (columns: body)"),
        ("a.jsonl", b'{"body": "a"}\n', ["--columns", "txt=body"], "unknown column 'txt'; did you mean 'text'?"),
        ("a.jsonl", b'{"body": "a"}\n', ["--columns", "text"], "--columns: expected name=column"),
        ("a.txt", GOOD, ["--columns", "text=body"], "--columns has no effect"),
        ("a.pdf", b"%PDF", [], "unknown format .pdf"),
        ("a.txt", GOOD, ["--tokenizer", "wordpeice"], "unknown tokenizer 'wordpeice'; did you mean 'wordpiece'?"),
        ("a.txt", GOOD, ["--tokenizer", "none/such"], "unknown tokenizer 'none/such' (known: wordpiece, bpe, unigram"),
        ("a.txt", GOOD, ["--tokenizer", "."], "has no tokenizer.json"),
        ("a.txt", GOOD, ["--vocab-size", 20], "--vocab-size 20 is too small: wordpiece needs at least"),
        ("a.txt", GOOD, ["--vocab-size", 90_000], "--vocab-size 90000 is more than the text supports"),
        ("a.txt", GOOD, ["--vocab-size", 0], "--vocab-size must be at least 1, got 0"),
        ("a.txt", GOOD, ["--dev-share", 1], "--dev-share must be below 1"),
        ("a.txt", GOOD, ["--near-duplicates", 0.2], "--near-duplicates must be between 0.5 and 1, got 0.2"),
        ("a.txt", GOOD, ["--min-letters", 1.5], "--min-letters must be between 0 and 1, got 1.5"),
        ("a.txt", GOOD, ["--vocab-size", "many"], "is not a valid integer"),
    ],
)
def test_bad_input_is_one_line(
    name: str, content: bytes | None, flags: list, message: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(name, "--out", "out", *flags) == 2
    assert message in one_line(capsys)
    assert names(tmp_path) == ([name] if content is not None else [])


@pytest.mark.parametrize("flag", ["--vocab-size", "--max-length", "--sample-mb"])
def test_settings_of_a_trained_tokenizer_are_refused_for_another(
    flag: str, store: Variant, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(corpus, "--out", tmp_path / "out", "--tokenizer", store.path, flag, 300) == 2
    assert f"{flag} is for a tokenizer that is trained here" in one_line(capsys)


def test_an_existing_folder_is_kept_without_force(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("mine")
    assert run(corpus, "--out", tmp_path / "out") == 2
    assert "exists; choose another --out or pass --force" in one_line(capsys)
    assert run(corpus, "--out", tmp_path / "out", "--force") == 2
    assert "was not written by effllm" in one_line(capsys)
    assert names(tmp_path / "out") == ["thesis"]
    with pytest.raises(SettingError, match="no FILE to prepare was given"):
        prepare([], tmp_path / "new")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize(("count", "stage"), [(700, "cleaning"), (400, "training"), (250, "tokenising")])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    count: int, stage: str, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = text_file(tmp_path / "a.txt", documents(count))
    assert run(file, "--out", small_disk / "out", "--vocab-size", 2000 if stage == "training" else 600) == 2
    messages = capsys.readouterr().err.strip().splitlines()
    assert messages[-2].startswith(stage)
    assert messages[-1].startswith("error: cannot write")
    assert "No space left on device" in messages[-1]
    assert names(small_disk) == []


@pytest.mark.parametrize("after", ["cleaning", "training", "tokenising"])
def test_a_killed_run_leaves_nothing_and_the_next_one_works(after: str, corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "effllm", "prepare", str(corpus), "--out", str(tmp_path / "out")]
    command += ["--vocab-size", "600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    for line in process.stderr:
        if line.startswith(after):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (tmp_path / "out").exists()
    prepare([corpus], tmp_path / "out", PrepareSettings(**SMALL))
    assert names(tmp_path) == ["out"]


def test_the_command_line_prints_the_report(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    assert run(corpus, "--out", out, "--vocab-size", 600, "--json", rows) == 0
    printed = capsys.readouterr()
    assert "kept: train" in printed.out
    assert "documents" in printed.out
    assert f"wrote {out}" in printed.err
    read = effllm.Row.from_json(json.loads(rows.read_text(encoding="utf-8").splitlines()[0]))
    assert (read.metric, read.value, read.system) == ("documents", 120.0, "read")
    assert run(corpus, "--out", out, "--vocab-size", 600, "--json", "-", "--force") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {json.loads(line)["system"] for line in lines} == {"read", "cleaned away", "kept: train", "kept: dev"}
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "tokens to train on, from corpus.txt" in shown
    assert "kept: train" in shown
    assert "600 tokens" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "tokenizer", "limit_s", "unknown"), [("en", "wordpiece", 300, 5e-4), ("zh", "bpe", 300, 0.0)]
)
def test_wikipedia(language: str, tokenizer: str, limit_s: float, unknown: float, tmp_path: Path) -> None:
    file = WIKIPEDIA / f"wikipedia_{language}" / "train.txt.xz"
    if not file.is_file():
        pytest.skip(f"no Wikipedia texts at {file}")
    start = time.monotonic()
    variant = prepare([file], tmp_path / "out", PrepareSettings(tokenizer=tokenizer))
    assert time.monotonic() - start < limit_s
    report = variant.manifest["report"]
    kept = report["kept"]["train"]
    assert kept["documents"] > 0.95 * report["read"]["documents"]
    assert kept["unknown_tokens"] <= unknown * kept["tokens"]
    share = report["kept"]["dev"]["documents"] / kept["documents"]
    assert 0.007 < share < 0.014
