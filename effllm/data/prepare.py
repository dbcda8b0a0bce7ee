"""`prepare`: from raw text to the token store, in passes over temporary files, so that memory does not bound the text.

1. Read and clean every document, dropping what is no text.
2. Find exact and near duplicates; give each remaining document its split by the hash of its text.
3. Train a tokenizer on a bounded sample of the train split, or take an existing one.
4. Tokenise both splits.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from effllm.data.clean import Cleaning
from effllm.data.corpus import DEV, DROPPED, TRAIN, Corpus
from effllm.data.documents import Source, open_source
from effllm.data.draws import SPLIT
from effllm.data.settings import PrepareSettings, flag
from effllm.data.store import KIND, SPLITS, TOKENIZER, StoreWriter, token_dtype
from effllm.data.tokenizer_training import TRAINERS, save_tokenizer, train_tokenizer
from effllm.data.vocabulary import Vocabulary
from effllm.data.words import token_starts
from effllm.errors import ArtifactError, SettingError, unknown_name
from effllm.folder import TOKENIZER_FILES, find, tokenizer_files
from effllm.progress import Track, silent
from effllm.rows import Row
from effllm.settings import to_json
from effllm.variant import Variant, check_target, check_whole, create, sha256, write_manifest

CHUNK_CHARACTERS = 2_000_000
"""How much text is tokenised at once; its encodings take some 100 bytes a token."""


def prepare(
    files: Sequence[str | Path],
    out: str | Path,
    settings: PrepareSettings | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    force: bool = False,
    track: Track = silent,
) -> Variant:
    """Clean, deduplicate, split and tokenise texts into the token store `out`; see `effllm.data.store`.

    `files` are .txt, .jsonl, .csv or .tsv files, plain, .gz or .xz, or names of hub data sets; `columns` may say which
    column is `text`. The manifest's `report` counts what was read, dropped and kept. The same texts, settings and
    versions give the same bytes.

    Raises ArtifactError, SettingError or MissingExtra for bad input; then nothing is written and an existing folder at
    `out` survives.
    """
    settings = settings or PrepareSettings()
    target = Path(out)
    check_target(target, force=force)
    sources = _open_sources(files, columns or {})
    given = _existing_tokenizer(settings)
    with create(target, force=force) as staging:
        work = staging / ".work"
        work.mkdir()
        corpus = Corpus(
            work,
            Cleaning(settings.min_characters, settings.min_letters, settings.max_repetition),
            settings.near_duplicates,
        )
        for source in sources:
            corpus.fill(track(source.batches(), f"cleaning {Path(source.name).name}", source.steps))
        split = _split(corpus, settings, track)
        for _ in track(range(1), f"{'taking' if given else 'training'} the tokenizer", 1):
            if given:
                _copy_tokenizer(given, staging / TOKENIZER)
            else:
                _train_tokenizer(corpus, np.flatnonzero(split == TRAIN), settings, staging / TOKENIZER)
        vocabulary = Vocabulary.read(staging / TOKENIZER)
        kept = {
            name: _tokenise(corpus, np.flatnonzero(split == part), vocabulary, staging, name, track)
            for part, name in enumerate(SPLITS)
        }
        shutil.rmtree(work)
        write_manifest(staging, _manifest(sources, settings, corpus, kept, vocabulary))
    return Variant.open(target)


def _open_sources(files: Sequence[str | Path], columns: Mapping[str, str]) -> list[Source]:
    if not files:
        raise SettingError("no FILE to prepare was given")
    for name in columns:
        if name != "text":
            raise unknown_name("column", name, ["text"])
    sources = [open_source(file, columns) for file in files]
    if columns and all(source.kind == ".txt" for source in sources):
        raise SettingError(f"--columns has no effect: {sources[0].name} is a text file without columns")
    return sources


def _existing_tokenizer(settings: PrepareSettings) -> Path | None:
    """Return the folder of the tokenizer that the settings name; None when one is to be trained.

    Raises SettingError for an unknown name and for settings that only a trained tokenizer has.
    """
    name = settings.tokenizer
    if name in TRAINERS:
        return None
    if get_close_matches(name, TRAINERS, n=1, cutoff=0.6) and not Path(name).exists():
        raise unknown_name("tokenizer", name, [*TRAINERS, "or a folder or hub id"])
    trained_only = ("vocab_size", "case", "max_length", "sample_mb")
    changed = [f.name for f in fields(settings) if f.name in trained_only and getattr(settings, f.name) != f.default]
    if changed:
        raise SettingError(f"{flag(changed[0])} is for a tokenizer that is trained here; {name!r} is one already")
    try:
        folder = find(name, TOKENIZER_FILES)
    except ArtifactError as error:
        raise SettingError(
            f"unknown tokenizer {name!r} (known: {', '.join(TRAINERS)}, or a folder or hub id): {error}"
        ) from None
    check_whole(folder)
    inner = folder / TOKENIZER
    folder = inner if (inner / "tokenizer.json").is_file() else folder  # another token store
    Vocabulary.read(folder)
    return folder


def _copy_tokenizer(given: Path, folder: Path) -> None:
    """Copy a tokenizer's files, without the truncation and padding that `tokenizer.json` may carry."""
    folder.mkdir()
    for name, file in tokenizer_files(given).items():
        shutil.copyfile(file, folder / name)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")


def _split(corpus: Corpus, settings: PrepareSettings, track: Track) -> np.ndarray:
    """Return each document's split, int8 (D,): its place in `SPLITS`, or `DROPPED` for a duplicate.

    A document's split depends on its text and the seed only, so adding files moves none. With documents too few for
    the share, the one with the smallest draw goes to dev.
    """
    if not len(corpus):
        raise ArtifactError(
            f"no text is left of {corpus.read['documents']} documents: {corpus.why_dropped() or 'none'}"
        )
    split = np.full(len(corpus), DROPPED, dtype=np.int8)
    kept = corpus.distinct(track)
    split[kept] = TRAIN
    if settings.dev_share == 0:
        return split
    if len(kept) == 1:
        raise ArtifactError(
            "only one document is left, and train and dev need one each: put an empty line between documents, give "
            f"more text, or pass --dev-share 0 (dropped: {corpus.why_dropped() or 'none'})"
        )
    draws = corpus.draws(kept, SPLIT, settings.seed)
    dev = draws < settings.dev_share
    if dev.all() or not dev.any():
        dev = np.arange(len(kept)) == np.argmin(draws)
    split[kept[dev]] = DEV
    return split


def _train_tokenizer(corpus: Corpus, places: np.ndarray, settings: PrepareSettings, folder: Path) -> None:
    sample = corpus.sample(places, settings.sample_mb * 1e6, settings.seed)
    trained = train_tokenizer(
        settings.tokenizer, settings.vocab_size, lambda: corpus.texts(sample), lowercase=settings.lowercase
    )
    save_tokenizer(trained, folder, settings.max_length)


def _tokenise(
    corpus: Corpus, places: np.ndarray, vocabulary: Vocabulary, staging: Path, split: str, track: Track
) -> dict[str, int]:
    """Write a split; return how many documents, characters, words, tokens and unknown tokens it has.

    What looks like a special token in the text is text.
    """
    backend = Tokenizer.from_file(str(staging / TOKENIZER / "tokenizer.json"))
    backend.encode_special_tokens = True
    unknown = _unknown_id(backend)
    count = Counter(documents=0, characters=0, words=0, tokens=0, unknown_tokens=0)
    chunks = corpus.chunks(places, CHUNK_CHARACTERS)
    with StoreWriter(staging, split, token_dtype(vocabulary.size)) as writer:
        for chunk in track(chunks, f"tokenising {split}", len(chunks)):
            texts = list(corpus.texts(chunk))
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            for text, encoding, starts in zip(texts, encodings, token_starts(texts, encodings), strict=True):
                ids = np.array(encoding.ids, dtype=np.int64)
                writer.append(ids, starts)
                count.update(documents=1, characters=len(text), words=int(starts.sum()), tokens=len(ids))
                count.update(unknown_tokens=int((ids == unknown).sum()))
    return dict(count)


def _unknown_id(backend: Tokenizer) -> int:
    model = json.loads(backend.to_str())["model"]
    found = backend.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
    return -1 if found is None else int(found)


def _manifest(
    sources: Sequence[Source],
    settings: PrepareSettings,
    corpus: Corpus,
    kept: Mapping[str, Mapping[str, int]],
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    inputs = [
        {"name": Path(source.name).name, "sha256": sha256(Path(source.name))}
        if source.kind != "hub"
        else {"name": source.name}
        for source in sources
    ]
    return {
        "kind": KIND,
        "task": "fill-mask",
        "parent": {"name": inputs[0]["name"] + (f" and {len(inputs) - 1} more" if len(inputs) > 1 else "")},
        "inputs": inputs,
        "steps": [{"verb": "prepare", "settings": to_json(settings)}],
        "store": {"dtype": token_dtype(vocabulary.size).name, "vocabulary_size": vocabulary.size},
        "report": {
            "read": dict(corpus.read),
            "cleaned away": {"characters": corpus.cleaned_away},
            "dropped": {reason: dict(count) for reason, count in corpus.dropped.items()},
            "kept": {split: dict(count) for split, count in kept.items()},
        },
    }


def report_rows(report: Mapping[str, Any]) -> list[Row]:
    """Return a store's report as rows: documents, characters, words and tokens that were read, dropped and kept."""
    return [
        Row(metric.replace("_", " "), float(count), metric.split("_")[-1], system)
        for system, counts in report_lines(report).items()
        for metric, count in counts.items()
    ]


def report_lines(report: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return a store's report line by line: what was read, cleaned away, dropped and kept, each with its counts."""
    lines = {name: report[name] for name in ("read", "cleaned away")}
    lines |= {f"dropped: {reason}": counts for reason, counts in report["dropped"].items()}
    return lines | {f"kept: {split}": counts for split, counts in report["kept"].items()}
