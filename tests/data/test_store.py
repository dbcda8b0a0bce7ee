"""A token store gives back what was written, in any place at once, and refuses what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.data.store import DTYPES, StoreWriter, TokenStore, token_dtype
from effllm.errors import ArtifactError, SettingError
from effllm.variant import MANIFEST, create, write_manifest

DOCUMENTS = [[5, 6, 7], [], [65_535], [8, 9]]


def write(
    target: Path, train: list[list[int]], dev: list[list[int]], *, dtype: str = "uint16", vocabulary: str = "{}"
) -> Path:
    with create(target, force=True) as staging:
        for split, documents in (("train", train), ("dev", dev)):
            with StoreWriter(staging, split, DTYPES[dtype]) as writer:
                for ids in documents:
                    writer.append(np.array(ids, dtype=np.int64), np.arange(len(ids)) % 2 == 0)
        (staging / "tokenizer").mkdir()
        (staging / "tokenizer" / "tokenizer.json").write_text(vocabulary)
        write_manifest(staging, {"kind": "tokens", "task": "fill-mask", "store": {"dtype": dtype}})
    return target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "store", DOCUMENTS, [[1]])


def test_what_was_written_is_mapped(folder: Path) -> None:
    store = TokenStore.open(folder)
    assert isinstance(store.tokens, np.memmap)
    assert store.tokens.dtype == np.uint16
    assert store.tokens.tolist() == [5, 6, 7, 65_535, 8, 9]
    assert store.starts.tolist() == [1, 0, 1, 1, 1, 0]
    assert store.starts.dtype == np.uint8
    assert store.offsets.tolist() == [0, 3, 3, 4, 6]
    assert store.offsets.dtype == np.int64
    assert len(store) == 6
    assert store.tokenizer == folder / "tokenizer"
    assert TokenStore.open(str(folder), "dev").tokens.tolist() == [1]


def test_the_files_are_little_endian_numbers_and_nothing_else(folder: Path) -> None:
    assert (folder / "train" / "tokens.bin").read_bytes() == bytes([5, 0, 6, 0, 7, 0, 255, 255, 8, 0, 9, 0])
    assert (folder / "dev" / "documents.bin").read_bytes() == bytes(8) + bytes([1, *bytes(7)])


def test_a_split_may_be_empty(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "store", DOCUMENTS, []), "dev")
    assert (len(store.tokens), len(store.starts), store.offsets.tolist()) == (0, 0, [0])
    store = TokenStore.open(write(tmp_path / "store", [[]], []))
    assert (len(store.tokens), store.offsets.tolist()) == (0, [0, 0])


@pytest.mark.parametrize(("size", "dtype"), [(8192, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_the_type_holds_every_id(size: int, dtype: str, tmp_path: Path) -> None:
    assert token_dtype(size) == DTYPES[dtype]
    store = TokenStore.open(write(tmp_path / "store", [[0, size - 1]], [], dtype=dtype))
    assert store.tokens.tolist() == [0, size - 1]


@settings(deadline=None, max_examples=30)
@given(documents=st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=9), max_size=6))
def test_any_documents_come_back(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    store = TokenStore.open(write(tmp_path_factory.mktemp("any") / "store", documents, [], dtype="uint32"))
    pairs = zip(store.offsets[:-1], store.offsets[1:], strict=True)
    assert [store.tokens[a:b].tolist() for a, b in pairs] == documents


def test_the_fingerprint_is_that_of_the_split_and_the_tokenizer(tmp_path: Path) -> None:
    first = TokenStore.open(write(tmp_path / "a", DOCUMENTS, [[1]])).fingerprint
    assert TokenStore.open(write(tmp_path / "b", DOCUMENTS, [[2]])).fingerprint == first
    assert TokenStore.open(write(tmp_path / "b", [*DOCUMENTS, []], [[1]])).fingerprint != first
    assert TokenStore.open(write(tmp_path / "b", [[5, 6, 8], *DOCUMENTS[1:]], [[1]])).fingerprint != first
    assert TokenStore.open(write(tmp_path / "b", DOCUMENTS, [[1]], vocabulary="{ }")).fingerprint != first
    assert TokenStore.open(tmp_path / "a", "dev").fingerprint != first


@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin", "documents.bin"])
def test_a_missing_or_truncated_file_is_named(folder: Path, name: str) -> None:
    file = folder / "train" / name
    content = file.read_bytes()
    for damaged in (content[:-1], content + b"\0", b""):
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=rf"{name} is damaged: \d+ bytes, {len(content)} were written"):
            TokenStore.open(folder)
    file.unlink()
    with pytest.raises(ArtifactError, match=rf"{name} cannot be read: No such file"):
        TokenStore.open(folder)
    TokenStore.open(folder, "dev")


def test_files_that_do_not_fit_together_are_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / "train" / "starts.bin").write_bytes(b"\1" * 5)
    manifest["files"]["train/starts.bin"]["size_bytes"] = 5
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="does not fit together"):
        TokenStore.open(folder)


@pytest.mark.parametrize("offsets", [[0, 3, 3, 4, 5], [0, 3, 3, 4, 7], [1, 3, 3, 4, 6]])
def test_offsets_of_other_tokens_are_refused(folder: Path, offsets: list[int]) -> None:
    (folder / "train" / "documents.bin").write_bytes(np.array(offsets, dtype="<i8").tobytes())
    with pytest.raises(ArtifactError, match="does not fit together"):
        TokenStore.open(folder)


@pytest.mark.parametrize(
    "change", [{"kind": "model"}, {"store": None}, {"store": {"dtype": "int8"}}, {"store": {"dtype": ["uint16"]}}]
)
def test_another_kind_of_folder_is_refused(folder: Path, change: dict) -> None:
    manifest = json.loads((folder / MANIFEST).read_text()) | change
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"is not a token store; make one with: effllm prepare FILE… --out store"):
        TokenStore.open(folder)


def test_what_was_not_written_by_effllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no effllm\.json"):
        TokenStore.open(tmp_path)


def test_a_manifest_without_the_file_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["train/tokens.bin"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"tokens\.bin is damaged: 12 bytes, None were written"):
        TokenStore.open(folder)


def test_an_unknown_split_is_a_setting_error(folder: Path) -> None:
    with pytest.raises(SettingError, match="unknown split 'trian'; did you mean 'train'"):
        TokenStore.open(folder, "trian")


def test_opening_reads_no_tokens(tmp_path: Path) -> None:
    folder = write(tmp_path / "store", DOCUMENTS, [])
    tokens = folder / "train" / "tokens.bin"
    with tokens.open("wb") as stream:  # a sparse file of 40 GB: reading it would take minutes
        stream.truncate(40_000_000_000)
    for name, size in (("starts.bin", 20_000_000_000),):
        with (folder / "train" / name).open("wb") as stream:
            stream.truncate(size)
    (folder / "train" / "documents.bin").write_bytes(np.array([0, 20_000_000_000], dtype="<i8").tobytes())
    manifest = json.loads((folder / MANIFEST).read_text())
    sizes = {"tokens.bin": 40_000_000_000, "starts.bin": 20_000_000_000, "documents.bin": 16}
    for name, size in sizes.items():
        manifest["files"][f"train/{name}"]["size_bytes"] = size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    store = TokenStore.open(folder)
    assert int(store.tokens[19_999_999_999]) == 0
