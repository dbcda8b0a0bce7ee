"""Documents come out of every kind of file as they went in, and whatever is wrong is one error that names the place."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from effllm.data import documents, readers
from effllm.data.documents import open_source
from effllm.data.prepare import prepare
from effllm.data.settings import PrepareSettings
from effllm.errors import ArtifactError, EffllmError, MissingExtra, SettingError

PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
TEXTS = ["Rome is old.\nIt has hills.", "北京是首都。", "café “au lait”, 3 €"]


def file(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(name: object, columns: dict[str, str] | None = None) -> list[str]:
    return [text for batch in open_source(name, columns).batches() for text in batch]


def refused(name: object, kind: type[EffllmError] = ArtifactError, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(kind) as caught:
        read(name, columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("packing", list(PACK))
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_empty_lines_separate_the_documents_of_a_text_file(
    tmp_path: Path, packing: str, ending: str, bom: bytes
) -> None:
    content = "\n" + "\n \n\n".join(TEXTS) + "\n"
    path = file(tmp_path, f"a.txt{packing}", PACK[packing](bom + content.replace("\n", ending).encode()))
    assert read(path) == TEXTS


def test_a_header_is_not_text(tmp_path: Path) -> None:
    content = (
        "# id=1 title=Rome\nRome is old.\n# id=2 is no header here\n\n# A heading\nText\n\n#id=3\nMore\n\n# id=4\n"
    )
    expected = ["Rome is old.\n# id=2 is no header here", "# A heading\nText", "More", ""]
    assert read(file(tmp_path, "a.txt", content)) == expected


@pytest.mark.parametrize("packing", list(PACK))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_records_are_documents(tmp_path: Path, packing: str, suffix: str) -> None:
    if suffix == ".jsonl":
        content = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(TEXTS))
    else:
        cells = "\n".join(f'{i}{"," if suffix == ".csv" else chr(9)}"{text}"' for i, text in enumerate(TEXTS))
        content = f"id{',' if suffix == '.csv' else chr(9)}body\n{cells}\n"
    path = file(tmp_path, f"a{suffix}{packing}", PACK[packing](content.encode()))
    assert read(path, {"text": "body"}) == TEXTS
    assert "no column 'text' (columns: id, body); name the right one with --columns text=…" in refused(
        path, SettingError
    )
    assert "has no column 'bodi'" in refused(path, SettingError, {"text": "bodi"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no documents"),
        ("a.txt", b"\n \n\r\n", "a.txt holds no documents"),
        ("a.jsonl", b"\n", "a.jsonl holds no documents"),
        ("a.csv", b"text\n", "a.csv holds no documents"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz holds no documents"),
        ("a.txt", b"one\n\ntwo\n\xff\n", "a.txt:4 is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["a"]\n', "a.jsonl:2 is not a JSON object"),
        ("a.csv", b"text,id\na,1\nb\n", "a.csv:3 does not have the 2 columns of the header"),
        ("a.txt.gz", b"no gzip", "a.txt.gz cannot be read"),
        ("a.txt.xz", lzma.compress(b"text\n" * 10_000)[:60], "a.txt.xz cannot be read"),
    ],
)
def test_a_bad_file_is_one_error_that_names_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    assert message in refused(file(tmp_path, name, content))


@pytest.mark.parametrize("value", [None, 5, ["a"], {"a": 1}])
def test_a_text_that_is_none_is_a_setting_error(tmp_path: Path, value: object) -> None:
    path = file(tmp_path, "a.jsonl", '{"text": "a"}\n' + json.dumps({"text": value}))
    assert f"a.jsonl:2: no text in column 'text' but {value!r}" in refused(path, SettingError)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    file(tmp_path, "corpus.txt", "text")
    assert "no file at" in refused(tmp_path / "missing.txt")
    assert "is a folder; name its files, such as" in refused(tmp_path, SettingError)
    assert "unknown format .parquet" in refused(file(tmp_path, "a.parquet", b"PAR1"), SettingError)
    assert "no file at" in refused("x" * 300 + ".txt")


def test_a_document_too_long_for_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 100)
    lines = "short\n\n" + "a line of text\n" * 20_000
    message = refused(file(tmp_path, "a.txt", lines.encode() + b"\xff"))  # found before all of it was read
    assert "a.txt:3: a document of more than 100 characters starts here; put an empty line between" in message
    assert "a.jsonl:2: a document" in refused(file(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "%s"}' % ("x" * 101)))
    assert read(file(tmp_path, "b.txt", "x" * 100 + "\n\n" + "y" * 100)) == ["x" * 100, "y" * 100]


@pytest.mark.parametrize(("name", "words"), [("a.txt", "1: a document of more than"), ("a.jsonl", "1 has more than")])
def test_a_line_too_long_for_memory_is_not_read_to_its_end(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(readers, "LINE_CHARACTERS", 100)
    assert f"{name}:{words} 100 characters" in refused(file(tmp_path, name, b"x" * 100_000 + b"\xff"))


def test_a_large_file_comes_in_batches_as_it_is_read(tmp_path: Path) -> None:
    good = "x" * 1000 + "\n\n"
    path = file(tmp_path, "a.txt", good.encode() * 5000 + b"\xff")
    batches = open_source(path).batches()
    first = next(batches)
    assert next(first) == "x" * 1000
    assert 1000 <= 1 + len(list(first)) <= 1200  # one MiB, and what is read ahead
    with pytest.raises(ArtifactError, match=r"a\.txt:10001 is not UTF-8"):
        [list(batch) for batch in batches]


def test_a_field_of_a_table_may_be_a_long_document_but_not_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read(file(tmp_path, "a.csv", "text\n" + "x" * 200_000)) == ["x" * 200_000]
    monkeypatch.setattr(readers, "FIELD_CHARACTERS", 1000)
    unclosed = 'text\n"a\n' + "b\n" * 1000
    assert "a.csv:2 is not valid csv: field larger than field limit (1000)" in refused(
        file(tmp_path, "a.csv", unclosed)
    )


@pytest.mark.parametrize("size", [1, 2**20 - 2, 2**20, 3 * 2**20 + 5])
def test_there_are_no_more_batches_than_steps(tmp_path: Path, size: int) -> None:
    line = "x" * 1022 + "\n\n"
    source = open_source(file(tmp_path, "a.txt", (line * (size // 1024 + 1))[:size]))
    assert len(list(source.batches())) <= source.steps


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: object) -> list[tuple]:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        calls.append((name, config, split, streaming))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_hub_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = fake_datasets(monkeypatch, [{"body": f"text {i}"} for i in range(2500)])
    batches = [list(batch) for batch in open_source("owner/name:config", {"text": "body"}).batches()]
    assert batches == [[f"text {i}" for i in range(2500)]]
    fake_datasets(monkeypatch, [{"text": "a"}, {"body": "b"}])
    assert "owner/name, row 2: no column 'text' (columns: body)" in refused("owner/name", SettingError)
    fake_datasets(monkeypatch, [{"body": "b", "text": "a"}])
    assert "owner/name, row 1 has no column 'txt' (columns: body, text)" in refused(
        "owner/name", SettingError, {"text": "txt"}
    )
    fake_datasets(monkeypatch, [])
    assert "owner/name holds no documents" in refused("owner/name")
    assert calls == [("owner/name", "config", "train", True)]
    calls = fake_datasets(monkeypatch, [{"text": "a"}])
    assert read("owner/name") == ["a"]
    assert calls == [("owner/name", None, "train", True)]


def test_a_hub_that_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fake_datasets(monkeypatch, ConnectionError("no route\nto host"))
    message = refused("owner/name")
    assert message.startswith("no file named 'owner/name' here, and the hub did not give a data set of that name")
    assert message.endswith("ConnectionError: no route")


def test_a_hub_that_breaks_off_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise TimeoutError("read timed out")

    monkeypatch.chdir(tmp_path)
    fake_datasets(monkeypatch, rows())
    assert refused("owner/name").endswith("TimeoutError: read timed out")


def test_a_hub_data_set_needs_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refused("owner/name", MissingExtra)
    assert "no file owner/name" in message
    assert "pip install 'effllm[hub]'" in message


def test_a_mistyped_local_path_is_not_sent_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = fake_datasets(monkeypatch, [])
    (tmp_path / "corpora").mkdir()
    file(tmp_path / "corpora", "english.txt", "text")
    assert "no file at corpora/englsh; did you mean corpora/english.txt?" in refused("corpora/englsh")
    assert "no file at corpora/x (the folder corpora has none of that name)" in refused("corpora/x")
    assert "no file at corpora/english.txt.gz" in refused("corpora/english.txt.gz")
    assert "no file at corpora/x" in refused("./corpora/x")
    assert "unknown format" in refused(file(tmp_path, "corpus", "text"), SettingError)
    assert calls == []


def test_a_data_set_in_the_layout_of_the_hub_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client, given a folder in place of the hub: two parquet files of `train`, one of `test`."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "hub" / "owner" / "set" / "data"
    folder.mkdir(parents=True)
    words = "river boat town spring winter harbour north south old new bridge mill church road field stone".split()
    texts = [" ".join(words[(i * k + k * k) % 16] for k in range(1, 20)) + f" number {i}." for i in range(60)]
    for name, part in (("train-00000-of-00002", texts[:40]), ("train-00001-of-00002", texts[40:]), ("test", ["no"])):
        datasets.Dataset.from_list([{"id": 7, "body": text} for text in part]).to_parquet(folder / f"{name}.parquet")
    (folder.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files:\n  - {split: train, path: data/train-*}\n---\n"
    )
    load = datasets.load_dataset

    def load_here(hub_id: str, config: str | None, **more):
        return load(str(tmp_path / "hub" / hub_id), config, **more)

    monkeypatch.setattr(datasets, "load_dataset", load_here)
    assert read("owner/set:all", {"text": "body"}) == texts
    assert "owner/set:all, row 1: no column 'text' (columns: id, body)" in refused("owner/set:all", SettingError)
    assert "BuilderConfig 'two' not found" in refused("owner/set:two", ArtifactError)
    settings = PrepareSettings(vocab_size=60, dev_share=0.1, near_duplicates=1.0)
    variant = prepare(["owner/set:all"], tmp_path / "tokens", settings, columns={"text": "body"})
    assert variant.manifest["report"]["read"]["documents"] == 60
    assert variant.manifest["inputs"] == [{"name": "owner/set:all"}]
