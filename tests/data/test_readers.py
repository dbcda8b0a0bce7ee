"""Files of examples are read whole or refused with file and line."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effllm.data.readers import parse_columns, read_examples, read_records
from effllm.errors import ArtifactError, EffllmError, SettingError
from effllm.tasks import TASKS, Example, Head

PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
RECORDS = [{"text": "café\u2028au lait", "label": "1"}, {"text": "zwei, drei", "label": "0"}]
QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(records: list[dict], suffix: str) -> bytes:
    if suffix == ".jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if suffix == ".txt":
        return "".join(record["text"] + "\n" for record in records).encode()
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(records[0]), delimiter="," if suffix == ".csv" else "\t")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue().encode()


def file(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, kind: type[EffllmError] = ArtifactError, **settings: object) -> str:
    with pytest.raises(kind) as caught:
        list(read_records(path, **settings))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("packing", list(PACK))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("windows", [False, True])
def test_every_format_gives_the_same_records(
    tmp_path: Path, packing: str, suffix: str, bom: bytes, windows: bool
) -> None:
    content = written(RECORDS, suffix)
    content = content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n" if windows else b"\n")
    path = file(tmp_path, f"dev.set{suffix}{packing}", PACK[packing](bom + content))
    expected = [{"text": r["text"]} for r in RECORDS] if suffix == ".txt" else RECORDS
    assert [record for _, record in read_records(path)] == expected


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.txt", "one\n\n  \ntwo", [1, 4]),
        ("a.jsonl", '{"text": "a"}\n\n\t\n{"text": "b"}\n\n', [1, 4]),
        ("a.csv", 'text\none\n\n"two\nlines"\n\nthree\n', [2, 4, 7]),
    ],
)
def test_blank_lines_are_skipped_and_counted(tmp_path: Path, name: str, content: str, lines: list[int]) -> None:
    assert [number for number, _ in read_records(file(tmp_path, name, content))] == lines


@pytest.mark.parametrize("packing", list(PACK))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_refused(tmp_path: Path, suffix: str, packing: str, content: bytes) -> None:
    if suffix in {".csv", ".tsv"}:
        content = b"text" if content == b"\n \n" else content
    assert "holds no examples" in refused(file(tmp_path, f"a{suffix}{packing}", PACK[packing](content)))


def test_a_really_empty_packed_file_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.xz"):
        refused(file(tmp_path, name, b""))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "is not valid JSON"),
        ('{"text": "a"', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("1" * 5000, "is not valid JSON"),
        ('{"text": "half of a pair: \\ud83d"}', "is not valid JSON: .*surrogates"),
        ('{"tokens": [["\\ude00"]]}', "is not valid JSON: .*surrogates"),
        ('["a"]', "is not a JSON object"),
        ('"a"', "is not a JSON object"),
        ("5", "is not a JSON object"),
        ("null", "is not a JSON object"),
    ],
    ids=lambda text: text[:20],
)
def test_a_malformed_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = file(tmp_path, "a.jsonl", '{"text": "a"}\n\n' + line + '\n{"text": "b"}\n')
    with pytest.raises(ArtifactError, match=rf"a\.jsonl:3 {message}") as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)


def test_whole_surrogate_pairs_and_escaped_backslashes_are_text(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", '{"text": "\\ud83d\\ude00 \\\\ud83d"}')
    assert [record for _, record in read_records(path)] == [{"text": "😀 \\ud83d"}]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    assert "a.csv has two columns of the name 'label'" in refused(file(tmp_path, "a.csv", "text,label,label\na,1,2\n"))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", "text,label\na,1\nb\n", 3),
        ("a.csv", "text,label\na,1\nb,1,2\n", 3),
        ("a.tsv", "text\tlabel\na\t1\nb,1\n", 3),
        ("a.csv", 'text,label\n"a\nb",1\n"c"\n', 4),
    ],
)
def test_a_line_with_other_cells_than_the_header_is_named(tmp_path: Path, name: str, content: str, line: int) -> None:
    assert f"{name}:{line} does not have the 2 columns of the header" in refused(file(tmp_path, name, content))


@pytest.mark.parametrize("row", ['"a', '"a"b,1', "a\rb,1"])
def test_a_malformed_csv_line_is_named(tmp_path: Path, row: str) -> None:
    assert "a.csv:5 " in refused(file(tmp_path, "a.csv", f"text,label\na,1\n\n\n{row}\nb,2\nc,3\n"))


def test_a_quotation_mark_that_swallows_lines_of_a_tsv_is_named(tmp_path: Path) -> None:
    content = 'text\tlabel\nfirst\t1\n"it begins\t1\nit goes on\t0\nand "ends" here\t1\n'
    message = refused(file(tmp_path, "a.tsv", content.replace('"ends" here', 'ends"')))
    assert "a.tsv:3 holds tabs and several lines in one field" in message
    quoted = 'text\tlabel\n"two\nlines"\t1\n"a\ttab"\t0\n'
    assert [record["text"] for _, record in read_records(file(tmp_path, "b.tsv", quoted))] == ["two\nlines", "a\ttab"]


def test_a_csv_may_start_with_blank_lines(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "\n\ntext,label\na,1\n")
    assert list(read_records(path)) == [(4, {"text": "a", "label": "1"})]


@pytest.mark.parametrize("packing", list(PACK))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_the_line_that_is_not_utf8_is_named(tmp_path: Path, suffix: str, packing: str) -> None:
    before = written([{"text": "x" * 100}] * 300, suffix)
    count = before.count(b"\n")
    path = file(tmp_path, f"a{suffix}{packing}", PACK[packing](before + b'{"text": "caf\xe9"}\n' + before))
    assert f"a{suffix}{packing}:{count + 1} is not UTF-8 text" in refused(path)


@pytest.mark.parametrize("content", ["ab".encode("utf-16"), b"a\n\xff", b"a\nb\xc3"])
def test_text_in_another_encoding_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "is not UTF-8 text" in refused(file(tmp_path, "a.txt", content))


@pytest.mark.parametrize("packing", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "not packed", "half a header"])
def test_a_damaged_packed_file_is_refused(tmp_path: Path, packing: str, damage: str) -> None:
    content = written([{"text": f"line {i * i}"} for i in range(2000)], ".jsonl")
    packed = PACK[packing](content)
    middle = len(packed) // 2
    packed = {
        "truncated": packed[:middle],
        "flipped": packed[:middle] + bytes(255 - b for b in packed[middle : middle + 40]) + packed[middle + 40 :],
        "not packed": content,
        "half a header": packed[:5],
    }[damage]
    refused(file(tmp_path, f"a.jsonl{packing}", packed))


@pytest.mark.parametrize("name", ["a", "a.gz", "a.json", "a.parquet", "a.jsonl.zip", "a.jsonl.bak.gz"])
def test_an_unknown_format_is_a_setting_error(tmp_path: Path, name: str) -> None:
    message = refused(file(tmp_path, name, b"x"), SettingError)
    assert "unknown format" in message
    assert ".jsonl, .csv, .tsv, .txt (.gz, .xz)" in message


@pytest.mark.parametrize("name", ["missing.jsonl", "folder.jsonl", "x" * 300 + ".jsonl", "a\0.jsonl"])
def test_what_is_no_file_is_an_artifact_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    assert "no file at" in refused(tmp_path / name)


def test_a_file_without_permission_is_an_artifact_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = file(tmp_path, "a.jsonl", b"{}")
    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read" in refused(path)


def test_columns_are_renamed_and_kept(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "sentence,label,y\ngood,1,2\n")
    columns = parse_columns("text=sentence, label=y")
    assert [r for _, r in read_records(path, columns)] == [{"sentence": "good", "y": "2", "text": "good", "label": "2"}]


def test_columns_can_be_swapped(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "text,label\ngood,1\n")
    assert [r for _, r in read_records(path, {"text": "label", "label": "text"})] == [{"text": "1", "label": "good"}]


def test_a_column_that_the_file_lacks_is_a_setting_error(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "text,label\ngood,1\n")
    message = refused(path, SettingError, columns={"text": "sentence"})
    assert message.endswith("has no column 'sentence' (columns: text, label)")


@pytest.mark.parametrize("text", ["text", "text=", "=sentence", "text=a,label"])
def test_columns_must_be_pairs(text: str) -> None:
    with pytest.raises(SettingError, match="--columns: expected name=column"):
        parse_columns(text)


@pytest.mark.parametrize("text", [None, "", ","])
def test_no_columns_are_no_names(text: str | None) -> None:
    assert parse_columns(text) == {}


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_file_of_texts_serves_every_task(tmp_path: Path, task, suffix: str) -> None:
    path = file(tmp_path, f"a{suffix}", written([{"text": f"these are the words {i}"} for i in range(6)], suffix))
    examples = read_examples(path, task, Head(("a", "b")), gold=False)
    assert len(examples) == (3 if task.name == "sentence-similarity" else 6)
    assert all(isinstance(example, Example) for example in examples)
    assert "these are the words 5" in repr(examples[-1]) or examples[-1].text[-1] == "5"


REFERENCES_IN_COLUMNS = [task for task in TASKS.values() if task.metric and len(task.columns) > 1]


@pytest.mark.parametrize("task", REFERENCES_IN_COLUMNS, ids=lambda t: t.name)
def test_reference_answers_that_were_not_asked_for_are_not_taken(tmp_path: Path, task) -> None:
    record = {
        "text": "good film",
        "text_pair": "bad film",
        "label": "a",
        "score": 3,
        "tokens": ["good", "film"],
        "tags": ["a", "b"],
        "question": "what",
        "context": "good film",
        "answers": [{"text": "film"}],
    }
    path = file(tmp_path, "a.jsonl", json.dumps(record))
    assert [e.gold for e in read_examples(path, task, Head(("a", "b")), gold=False)] == [None]
    assert [e.gold is None for e in read_examples(path, task, Head(("a", "b")), gold=True)] == [False]


@pytest.mark.parametrize(
    "task",
    [t for t in TASKS.values() if t.metric and t.name not in {"fill-mask", "text-generation"}],
    ids=lambda t: t.name,
)
def test_texts_alone_are_no_reference(tmp_path: Path, task) -> None:
    path = file(tmp_path, "a.jsonl", '{"text": "good film"}')
    with pytest.raises(SettingError, match=r"a\.jsonl:1: "):
        read_examples(path, task, Head(("a", "b")), gold=True)


@pytest.mark.parametrize("first", [0, 1])
def test_texts_and_whole_records_do_not_mix(tmp_path: Path, first: int) -> None:
    lines = ['{"text": "alone"}', '{"text": "one", "text_pair": "two"}']
    path = file(tmp_path, "a.jsonl", "\n".join([lines[first], lines[1 - first]]))
    with pytest.raises(SettingError, match=r"a\.jsonl:2"):
        read_examples(path, TASKS["sentence-similarity"], Head(), gold=False)


def test_an_unknown_label_gets_file_line_and_the_nearest(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "text,label\ngood,positive\nbad,negativ\n")
    with pytest.raises(SettingError) as caught:
        read_examples(path, TASKS["text-classification"], Head(("negative", "positive")), gold=True)
    assert str(caught.value) == (
        f"{path}:3: unknown label 'negativ'; did you mean 'negative'? (known: negative, positive)"
    )


def test_an_unknown_tag_gets_file_line_and_the_nearest(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", '{"tokens": ["Ada"], "tags": ["B-PRE"]}')
    with pytest.raises(SettingError, match=r"a\.jsonl:1: unknown label 'B-PRE'; did you mean 'B-PER'\?"):
        read_examples(path, TASKS["token-classification"], Head(("O", "B-PER", "I-PER")), gold=True)


def test_the_limit_is_kept_and_stops_the_reading(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b"}\nnot json')
    task = TASKS["feature-extraction"]
    assert [e.text for e in read_examples(path, task, Head(), gold=False, limit=2)] == ["a", "b"]
    with pytest.raises(ArtifactError, match=r"a\.jsonl:3 is not valid JSON"):
        read_examples(path, task, Head(), gold=False, limit=3)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1).filter(str.strip)


@QUICK
@given(st.lists(st.fixed_dictionaries({"text": texts, "label": texts}), min_size=1, max_size=5))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_any_records_read_back_as_written(tmp_path: Path, suffix: str, records: list[dict]) -> None:
    path = file(tmp_path, f"a{suffix}", written(records, suffix))
    assert [record for _, record in read_records(path)] == records


def variants(content: st.SearchStrategy[bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    return st.sampled_from(list(PACK)).flatmap(
        lambda packing: st.tuples(st.just(packing), content | content.map(PACK[packing]))
    )


bits = st.sampled_from(
    [b"\n", b"\r", b'"', b",", b"\t", b"{", b"}", b'{"text": "a"}', b"text,label", b"\\", b"\xff", b"\0"]
)
damaged = st.binary(max_size=60) | st.lists(bits, max_size=12).map(b"".join)


@QUICK
@given(variants(damaged))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
def test_any_bytes_are_examples_or_one_error(tmp_path: Path, suffix: str, variant: tuple[str, bytes]) -> None:
    path = file(tmp_path, f"a{suffix}{variant[0]}", variant[1])
    for task in TASKS.values():
        for gold in (False, True):
            with contextlib.suppress(EffllmError):
                read_examples(path, task, Head(("a", "b")), gold=gold)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
COLUMNS = sorted({name for task in TASKS.values() for name in task.columns})


@QUICK
@given(st.dictionaries(st.sampled_from(COLUMNS), st.text(max_size=5) | json_values))
def test_any_json_record_is_an_example_or_one_error(tmp_path: Path, record: dict) -> None:
    path = file(tmp_path, "a.jsonl", json.dumps(record))
    for task in TASKS.values():
        for labels in ((), ("a",), ("a", "b")):
            with contextlib.suppress(EffllmError):
                read_examples(path, task, Head(labels), gold=True)
