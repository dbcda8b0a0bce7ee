"""Documents: the texts that a corpus is made of, read from files or from a hub data set, one after the other.

In a .txt file an empty line ends a document, and a first line such as `# id=12 title=Rome` is its header, not text. In
.jsonl, .csv and .tsv files and in data sets every record is one document, its text in column `text`.
"""

from __future__ import annotations

import difflib
import itertools
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from effllm.data.readers import SUFFIXES, file_format, lines, open_text, parse_records, renamed
from effllm.errors import ArtifactError, MissingExtra, SettingError

STEP_BYTES = 2**20
MAX_CHARACTERS = 10_000_000
"""The longest document that is taken; a text file without empty lines is longer, and would not fit in memory."""

_HEADER = re.compile(r"#\s*\w+=\S")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One input: a file (`kind` is its suffix) or a hub data set (`kind` is "hub"); `steps` says how long it is."""

    name: str
    kind: str
    columns: Mapping[str, str]
    steps: int

    def batches(self) -> Iterator[Iterator[str]]:
        """Yield the documents in at most `steps` runs, each read as it is taken, in order.

        Raises ArtifactError or SettingError naming file and line for whatever cannot be read, and for an empty file.
        """
        texts = _rows(self) if self.kind == "hub" else _file(self)
        for _, run in itertools.groupby(texts, key=operator.itemgetter(0)):
            yield (text for _, text in run)


def open_source(name: str | Path, columns: Mapping[str, str] | None = None) -> Source:
    """Find an input: a local file, or else a hub data set `owner/name`, `owner/name:config`.

    Raises ArtifactError when there is no such file, SettingError for an unknown format.
    """
    path = Path(name)
    is_set = _HUB.fullmatch(str(name)) is not None and not any(suffix in path.suffixes for suffix in SUFFIXES)
    try:
        if path.is_dir():
            raise SettingError(f"{path} is a folder; name its files, such as {path}/*.txt")
        if is_set and not path.exists():
            if path.parent.is_dir():
                raise ArtifactError(f"no file at {path}{_nearest(path)}")
            return Source(str(name), "hub", columns or {}, 1)
    except OSError as error:
        raise ArtifactError(f"no file at {path}: {error.strerror}") from None
    kind = file_format(path)
    return Source(str(name), kind, columns or {}, path.stat().st_size // STEP_BYTES + 1)


def _nearest(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else f" (the folder {path.parent} has none of that name)"


def _file(source: Source) -> Iterator[tuple[int, str]]:
    """Yield (step, text) of each document of a file."""
    path = Path(source.name)
    number = 0
    with open_text(path) as (stream, raw):
        for number, text in _paragraphs(stream, path) if source.kind == ".txt" else _column(stream, source):
            if len(text) > MAX_CHARACTERS:
                raise ArtifactError(_too_long(path, number))
            yield raw.tell() // STEP_BYTES, text
    if not number:
        raise ArtifactError(f"{path} holds no documents")


def _too_long(path: Path, number: int) -> str:
    return (
        f"{path}:{number}: a document of more than {MAX_CHARACTERS:,} characters starts here; "
        "put an empty line between documents"
    )


def _paragraphs(stream: IO[str], path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of each document of a text file."""
    body: list[str] = []
    start, size = 1, 0
    for number, raw in lines(stream, MAX_CHARACTERS):
        line = raw.strip()
        if line:
            if not body:
                start = number
            body.append(line)
            size += len(line)
            if size > MAX_CHARACTERS:
                raise ArtifactError(_too_long(path, start))
        elif body:
            yield start, _text_of(body)
            body, size = [], 0
    if body:
        yield start, _text_of(body)


def _text_of(body: list[str]) -> str:
    return "\n".join(body[1:] if _HEADER.match(body[0]) else body)


def _column(stream: IO[str], source: Source) -> Iterator[tuple[int, str]]:
    path = Path(source.name)
    for number, record in parse_records(stream, path, source.columns):
        yield number, _text(record, f"{path}:{number}")


def _text(record: Mapping[str, Any], where: str) -> str:
    text = record.get("text")
    if isinstance(text, str):
        return text
    names = ", ".join(map(str, record))
    found = "no column 'text'" if "text" not in record else f"no text in column 'text' but {text!r}"[:80]
    raise SettingError(f"{where}: {found} (columns: {names}); name the right one with --columns text=…")


def _rows(source: Source) -> Iterator[tuple[int, str]]:
    """Yield (0, text) of each row of a data set: how many there are is not known."""
    number = 0
    for number, record in enumerate(_stream(*source.name.partition(":")[::2]), start=1):
        where = f"{source.name}, row {number}"
        text = _text(renamed(record, source.columns, where), where)
        if len(text) > MAX_CHARACTERS:
            raise ArtifactError(f"{where} has more than {MAX_CHARACTERS:,} characters, the most of one document")
        yield 0, text
    if not number:
        raise ArtifactError(f"{source.name} holds no documents")


def _stream(hub_id: str, config: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a hub data set's split `train`, fetched as they are needed."""
    try:
        import datasets  # noqa: PLC0415 - heavy, and needed for hub data sets only
    except ImportError:
        raise MissingExtra("datasets", "hub", f"there is no file {hub_id}, and reading a hub data set") from None
    try:
        yield from datasets.load_dataset(hub_id, config or None, split="train", streaming=True)
    except Exception as error:  # the hub clients raise types of several libraries; each becomes one clear line
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ArtifactError(
            f"no file named {hub_id!r} here, and the hub did not give a data set of that name: "
            f"{type(error).__name__}: {reason}"
        ) from error
