"""The part of `effllm bench` that loads a running server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from effllm.errors import CheckFailed, SettingError
from effllm.measure.server_settings import ServerSettings

if TYPE_CHECKING:
    from effllm.measure.server import Texts

ONLY_MODELS = ("threads", "batch_sizes", "rounds", "engines", "min_agreement")
GENERATED = 2000


def check_flags(context: click.Context, settings: ServerSettings, models: Sequence[str]) -> None:
    """Refuse flags that the chosen form of `bench` would ignore. Raises SettingError, or click's own UsageError."""
    given = {p.name: p.opts[-1] for p in context.command.params if p.name and _given(context, p.name)}
    useless = ("columns",) if settings.url else ("columns", "limit")
    for name in useless:
        if name in given and "data" not in given:
            raise SettingError(f"{given[name]} is about the file of --data, and there is none")
    if settings.url:
        wrong = [given[name] for name in ONLY_MODELS if name in given]
        if models or wrong:
            raise SettingError(
                f"bench --url measures a running server; it does not take {wrong[0] if wrong else 'MODEL'}"
            )
        return
    if not models:
        raise click.UsageError("Missing argument 'MODEL…'.", context)
    wrong = [given[name] for name in ServerSettings.__dataclass_fields__ if name in given]
    if wrong:
        raise SettingError(f"{wrong[0]} is for a running server; it needs --url")


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def bench_url(
    settings: ServerSettings,
    *,
    data: str | None,
    columns: str | None,
    limit: int | None,
    tokens: str,
    task: str | None,
    json_file: str | None,
    html_file: str | None,
) -> None:
    """Load a server and show the rows; `tokens` is empty where the flag was not given.

    Raises CheckFailed, after the rows so far are shown and written, when the server stopped answering.
    """
    from effllm.cli.console import give_rows, progress
    from effllm.measure.server import bench_server
    from effllm.rows import Row

    sets = _texts(data, columns, limit, tokens)
    rows: list[Row] = []
    died: CheckFailed | None = None
    with progress() as track:
        try:
            for row in bench_server(settings, sets, task or "", track):
                rows.append(row)
        except CheckFailed as error:
            died = error
    give_rows(rows, json_file, html_file, f"{rows[0].system if rows else settings.url} under load")
    if died:
        raise died


def _texts(data: str | None, columns: str | None, limit: int | None, tokens: str) -> list[Texts]:
    """Return the sets of texts to send: of the lengths asked for, of a file, or English sentences."""
    from effllm.data.english import english_sentences
    from effllm.data.lengths import texts_of_lengths
    from effllm.data.readers import parse_columns, read_records
    from effllm.measure.server import Texts

    if tokens and data:
        raise SettingError("--tokens makes texts of its own; it does not go with --data")
    if tokens:
        return [
            Texts(texts_of_lengths(low, high, limit or GENERATED), {"tokens": low if low == high else f"{low}–{high}"})
            for low, high in map(_range, tokens.split(","))
        ]
    if data is None:
        return [Texts(english_sentences()[:limit], {"tokens": "mix", "data": "English sentences"})]
    path, texts = Path(data), []
    for number, record in read_records(path, parse_columns(columns)):
        if not isinstance(record.get("text"), str) or not record["text"].strip():
            raise SettingError(f"{path}:{number}: no text in column 'text' (columns: {', '.join(map(str, record))})")
        texts.append(record["text"])
        if len(texts) == limit:
            break
    return [Texts(texts, {"tokens": "mix", "data": path.name})]


def _range(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        bounds = int(low), int(high if dash else low)
    except ValueError:
        bounds = (0, 0)
    if not 3 <= bounds[0] <= bounds[1] <= 100_000:
        raise SettingError(f"--tokens takes lengths from 3 on, such as 64 or 16-64; got {text!r}")
    return bounds
