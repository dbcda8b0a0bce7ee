"""Files of examples: .jsonl, .csv, .tsv and .txt, plain or compressed with gzip or xz.

A file is read as records, a mapping of column names to values; a .txt file has one text per line, in column `text`.
Every fault names the file and the line.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from effllm.errors import ArtifactError, SettingError
from effllm.tasks import Example, Head, Task

SUFFIXES = (".jsonl", ".csv", ".tsv", ".txt")
FIELD_CHARACTERS = 10_000_000
"""The longest field of a table: a whole document, but not a whole file where a quotation mark is missing."""
LINE_CHARACTERS = 8 * FIELD_CHARACTERS
"""The longest line of a file of records: such a document with its escapes."""


def parse_columns(text: str | None) -> dict[str, str]:
    """Read `--columns text=sentence,label=y`: the names that effllm uses, mapped to the file's own."""
    mapping: dict[str, str] = {}
    for item in filter(None, (text or "").split(",")):
        ours, equals, theirs = item.partition("=")
        if not equals or not ours or not theirs:
            raise SettingError(f"--columns: expected name=column, got {item!r}")
        mapping[ours.strip()] = theirs.strip()
    return mapping


def read_records(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of a file, its columns renamed by `columns`.

    Raises ArtifactError for a missing, unreadable or empty file or a malformed line, SettingError for an unknown format
    or a column of `columns` that the file does not have.
    """
    file_format(path)
    count = 0
    with open_text(path) as (stream, _):
        for number, record in parse_records(stream, path, columns):
            count += 1
            yield number, record
    if not count:
        raise ArtifactError(f"{path} holds no examples")


def file_format(path: Path) -> str:
    """Return which of `SUFFIXES` a file has, packed or not.

    Raises ArtifactError when there is no such file, SettingError when the format is unknown.
    """
    suffixes = [s for s in path.suffixes if s not in {".gz", ".xz"}]
    kind = suffixes[-1] if suffixes else ""
    try:
        if not path.is_file():
            raise ArtifactError(f"no file at {path}")
    except OSError as error:
        raise ArtifactError(f"no file at {path}: {error.strerror}") from None
    if kind not in SUFFIXES:
        raise SettingError(f"{path}: unknown format {kind or '(no suffix)'}; expected {', '.join(SUFFIXES)} (.gz, .xz)")
    return kind


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[tuple[IO[str], IO[bytes]]]:
    """Open a file as UTF-8 text, unpacked, its line ends kept; yield it and the raw file, whose place tells progress.

    Faults of reading inside the block are raised as ArtifactError that names the file, and the line where it is not
    UTF-8.
    """
    try:
        with path.open("rb") as raw, io.TextIOWrapper(_unpacked(raw, path), "utf-8-sig", newline="") as stream:
            yield stream, raw
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}:{_undecodable_line(path)} is not UTF-8 text: {error.reason}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None


def _unpacked(raw: IO[bytes], path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(raw, "rb"))
    if path.suffix == ".xz":
        return lzma.open(raw, "rb")
    return raw


def _undecodable_line(path: Path) -> int:
    """Return the number of the first line that is not UTF-8; a decoding error only knows its place in a buffer."""
    with path.open("rb") as raw, _unpacked(raw, path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number


def parse_records(
    stream: IO[str], path: Path, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of an opened file, its columns renamed; `read_records` says what is raised."""
    for number, record in _parse(stream, file_format(path), path):
        yield number, renamed(record, columns or {}, path)


def _parse(stream: IO[str], kind: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if kind in {".csv", ".tsv"}:
        yield from _parse_table(stream, kind, path)
        return
    for number, raw in lines(stream, LINE_CHARACTERS):
        line = raw.strip("\r\n")
        if len(line) > LINE_CHARACTERS:
            raise ArtifactError(f"{path}:{number} has more than {LINE_CHARACTERS:,} characters; a line is one record")
        if not line.strip():
            continue
        if kind == ".txt":
            yield number, {"text": line.strip()}
            continue
        try:
            record = json.loads(line)
            if "\\u" in line:  # an escape can spell half of a surrogate pair, which is no character
                json.dumps(record, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path}:{number} is not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ArtifactError(f"{path}:{number} is not a JSON object")
        yield number, record


def lines(stream: IO[str], most: int) -> Iterator[tuple[int, str]]:
    """Yield (number, line). Of a line longer than `most`, what follows `most` + 1 characters is another line."""
    return enumerate(iter(lambda: stream.readline(most + 1), ""), start=1)


def _parse_table(stream: IO[str], kind: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a table. Sets the longest field of the module csv, for the whole process."""
    csv.field_size_limit(FIELD_CHARACTERS)
    reader = csv.reader(stream, delimiter="," if kind == ".csv" else "\t", strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            if header and cells:
                if len(cells) != len(header):
                    raise ArtifactError(f"{path}:{start} does not have the {len(header)} columns of the header")
                if kind == ".tsv" and any("\t" in cell and "\n" in cell for cell in cells):
                    message = "holds tabs and several lines in one field: a quotation mark opens it and is closed later"
                    raise ArtifactError(f"{path}:{start} {message}; double the marks that are text, or use .jsonl")
                yield start, dict(zip(header, cells, strict=True))
            header, start = header or _header(cells, path), reader.line_num + 1
    except csv.Error as error:
        raise ArtifactError(f"{path}:{start} is not valid {kind[1:]}: {error}") from None


def _header(cells: list[str], path: Path) -> list[str]:
    """Return the names of the columns. Raises ArtifactError where two have one name."""
    twice = [name for index, name in enumerate(cells) if name in cells[:index]]
    if twice:
        raise ArtifactError(f"{path} has two columns of the name {twice[0]!r}")
    return cells


def renamed(record: Mapping[str, Any], columns: Mapping[str, str], where: object) -> dict[str, Any]:
    """Return a record with the columns that `columns` maps under effllm's names too; `where` names it in errors."""
    result = dict(record)
    for ours, theirs in columns.items():
        if theirs not in record:
            raise SettingError(f"{where} has no column {theirs!r} (columns: {', '.join(map(str, record))})")
        result[ours] = record[theirs]
    return result


def read_examples(
    path: Path,
    task: Task,
    head: Head,
    *,
    gold: bool,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Read a file as examples of a task, at most `limit` of them.

    Without `gold`, reference answers are not needed, and a file that has only a `text` column serves every task.
    Raises SettingError naming file and line for a missing column or a label that the model does not have.
    """
    examples, texts = [], []
    for number, record in read_records(path, columns):
        try:
            examples.append(task.parse(record, head, gold=gold))
        except SettingError as error:
            if gold or not isinstance(record.get("text"), str) or examples:
                raise SettingError(f"{path}:{number}: {error}") from None
            texts.append(record["text"])
        if examples and texts:
            raise SettingError(f"{path}:{number} has the columns of {task.name}, the lines before it only a text")
        if limit is not None and max(len(examples), len(texts)) >= limit:
            break
    return examples or task.unlabelled(texts, head)
