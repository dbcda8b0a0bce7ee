"""Trained tokenizers are the same bytes every time, load in transformers, and keep the promises of their kind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from effllm.data import tokenizer_training
from effllm.data.english import english_sentences
from effllm.data.tokenizer_training import TRAINERS, Trained, save_tokenizer, train_tokenizer
from effllm.data.vocabulary import Vocabulary
from effllm.errors import MissingExtra, SettingError

CHINESE = ["這條河發源於城北的丘陵,流經三個湖泊後入海。", "河谷很早就有人居住,磨坊如今大多成了博物館。", "Hello 世界!"]
SIZES = {"wordpiece": 700, "bpe": 600, "unigram": 500}
IDS = {
    "wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "bpe": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "unigram": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}
QUESTIONS = [
    "The statement returns a value, don't it?",
    "  Two  spaces\nand a line end ",
    "北京 is 大 (30 % of it).",
    "café naïve Ünïcode",
    "",
]


def texts() -> list[str]:
    return [*english_sentences()[:700], *CHINESE * 5]


def train(kind: str, size: int | None = None, sample: list[str] | None = None, *, lowercase: bool = False) -> Trained:
    return train_tokenizer(kind, size or SIZES[kind], lambda: sample or texts(), lowercase=lowercase)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("tokenizers")
    for kind in TRAINERS:
        save_tokenizer(train(kind, lowercase=kind == "wordpiece"), parent / kind, 128)
    return {kind: parent / kind for kind in TRAINERS}


TRAIN_AND_HASH = """
import hashlib, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from effllm.data.tokenizer_training import save_tokenizer
from test_tokenizer_training import train
save_tokenizer(train(sys.argv[1]), Path(sys.argv[2]), 128)
"""


@pytest.mark.parametrize("kind", TRAINERS)
def test_two_processes_write_the_same_bytes(kind: str, tmp_path: Path) -> None:
    digests = []
    for seed in ("1", "2"):
        target = tmp_path / seed
        command = [sys.executable, "-c", TRAIN_AND_HASH, kind, str(target), str(Path(__file__).parent)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in target.iterdir()})
    assert digests[0] == digests[1]
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} <= set(digests[0])


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_size_and_the_special_ids_are_fixed(kind: str, folders: dict[str, Path]) -> None:
    backend = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    assert backend.get_vocab_size() == SIZES[kind]
    assert sorted(backend.get_vocab().values()) == list(range(SIZES[kind]))
    assert [backend.id_to_token(i) for i in range(5)] == IDS[kind]
    vocabulary = Vocabulary.read(folders[kind])
    assert vocabulary.size == SIZES[kind]
    assert vocabulary.special_ids == (0, 1, 2, 3, 4)
    assert vocabulary.ordinary.tolist() == list(range(5, SIZES[kind]))


@pytest.mark.parametrize("kind", TRAINERS)
def test_transformers_loads_the_same_tokenizer(kind: str, folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folders[kind])
    backend = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    assert loaded.model_max_length == 128
    assert len(loaded) == SIZES[kind]
    names = IDS[kind]
    assert [loaded.cls_token, loaded.sep_token, loaded.pad_token, loaded.mask_token, loaded.unk_token] == (
        [names[2], names[3], names[0], names[4], names[1]]
        if kind == "wordpiece"
        else [names[0], names[2], names[1], names[4], names[3]]
    )
    mask = names[4]
    for text in [*QUESTIONS, f"The {mask} returns", *texts()[:50]]:
        assert loaded(text)["input_ids"] == backend.encode(text).ids
    pair = loaded("one text", "another text")
    assert pair["token_type_ids"] == backend.encode("one text", "another text").type_ids
    cls, sep = loaded.cls_token_id, loaded.sep_token_id
    inner = [loaded(text, add_special_tokens=False)["input_ids"] for text in ("one text", "another text")]
    assert pair["input_ids"] == [cls, *inner[0], sep, *inner[1], sep]
    assert pair["token_type_ids"] == [0] * (len(inner[0]) + 2) + [1] * (len(inner[1]) + 1)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_class_is_one_that_transformers_4_knows(kind: str, folders: dict[str, Path]) -> None:
    config = json.loads((folders[kind] / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == ("BertTokenizer" if kind == "wordpiece" else "PreTrainedTokenizerFast")
    if kind == "wordpiece":
        backend = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
        lines = (folders[kind] / "vocab.txt").read_text(encoding="utf-8").split("\n")
        assert lines == [backend.id_to_token(i) for i in range(SIZES[kind])] + [""]


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_byte_level_bpe_gives_every_text_back(folders: dict[str, Path], text: str) -> None:
    backend = Tokenizer.from_file(str(folders["bpe"] / "tokenizer.json"))
    backend.encode_special_tokens = True
    assert backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_transformers_gives_bpe_text_back_too(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folders["bpe"])
    for text in [*QUESTIONS, *texts()]:
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text


def test_word_pieces_split_han_and_punctuation_and_lower_case(folders: dict[str, Path]) -> None:
    backend = Tokenizer.from_file(str(folders["wordpiece"] / "tokenizer.json"))
    tokens = backend.encode("河谷,A Returns", add_special_tokens=False).tokens
    assert tokens[:4] == ["河", "谷", ",", "a"]
    assert not any(token.startswith("##") and ord(token[2]) > 0x3000 for token in backend.get_vocab())
    assert sum(token.startswith("##") for token in backend.get_vocab()) > 26
    kept = train("wordpiece", lowercase=False).backend
    assert "A" in kept.encode("A").tokens


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_mask_takes_the_place_of_a_word_with_its_space(kind: str, folders: dict[str, Path]) -> None:
    backend = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    with_word = backend.encode("a value is returned")
    place = next(i for i, token in enumerate(with_word.tokens) if token.lstrip("Ġ▁") == "is")
    masked = list(with_word.ids)
    masked[place] = backend.token_to_id("<mask>")
    assert backend.encode("a value <mask> returned").ids == masked


@pytest.mark.parametrize("kind", TRAINERS)
def test_lower_case(kind: str) -> None:
    lowered, kept = train(kind, lowercase=True).backend, train(kind).backend
    assert lowered.encode("The VALUE").ids == lowered.encode("the value").ids
    assert kept.encode("The VALUE").ids != kept.encode("the value").ids


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("bpe", 260, "--vocab-size 260 is too small: bpe needs at least 261 tokens for this text"),
        ("wordpiece", 50, "--vocab-size 50 is too small: wordpiece needs at least"),
        ("unigram", 50, "--vocab-size 50 is too small: unigram needs at least"),
    ],
)
def test_a_size_too_small_is_a_setting_error(kind: str, size: int, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        train(kind, size)
    assert message in str(caught.value)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert train(kind, least).backend.get_vocab_size() == least
    with pytest.raises(SettingError, match="is too small"):
        train(kind, least - 1)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_size_larger_than_the_text_supports_is_a_setting_error(kind: str) -> None:
    sample = english_sentences()[:30]
    with pytest.raises(SettingError, match="is more than the text supports") as caught:
        train(kind, 20_000, sample)
    found = int(str(caught.value).split(" finds ")[1].split()[0])
    assert f"pass --vocab-size {found} or less, or give more text" in str(caught.value)
    assert train(kind, found, sample).backend.get_vocab_size() == found


def test_unigram_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtra, match=r"pip install 'effllm\[unigram\]'"):
        train("unigram")


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_the_rarest_characters_are_unknown(kind: str) -> None:
    rng = random.Random(0)
    common = ["".join(rng.choices("abcdefgh ", k=50)) for _ in range(2000)]
    sample = [*common, *[chr(0x4E00 + i) for i in range(5)], *["z"] * 100]
    backend = train(kind, 100, sample).backend
    unknown = backend.token_to_id(IDS[kind][1] if kind == "wordpiece" else "<unk>")
    characters = {token.strip("#▁") for token in backend.get_vocab()}
    assert "z" in characters
    assert not any("\u4e00" <= c[:1] <= "\u9fff" for c in characters)
    assert unknown in backend.encode("\u4e00").ids


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_small_vocabulary_leaves_out_the_rarest_of_many_characters(kind: str) -> None:
    han = [chr(0x4E00 + i) for i in range(400)]
    sample = [c * 400 + " " + "abc abd abe bcd cde " * 2 for c in han[:150]] + [" ".join(han[150:]), "the ace " * 50]
    trained = train(kind, 300, sample)
    characters = {token for token in trained.backend.get_vocab() if token in han}
    assert set(han[:150]) <= characters
    assert 250 < len(characters) < 290  # what the few words leave free is filled with characters
    assert trained.backend.get_vocab_size() == 300
    pieces = [token for token in trained.backend.get_vocab() if len(token.strip("#▁")) > 1]
    assert len(pieces) > 5
    if kind == "wordpiece":  # Han characters have no form within words
        assert not any(f"##{c}" in trained.backend.get_vocab() for c in han)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_what_the_words_leave_free_is_filled_with_rarer_characters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_training, "ALPHABET_SHARE", 0.3)
    han = [chr(0x4E00 + i) for i in range(140)]
    sample = [" ".join(han[:40])] * 600 + [" ".join(han[40:])]
    backend = train(kind, 130, sample).backend
    assert backend.get_vocab_size() == 130
    kept = [c for c in han if backend.token_to_id(c) is not None]
    assert kept[:40] == han[:40]
    assert len(kept) > 45


def test_long_texts_are_given_to_sentencepiece_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_training, "LINE_CHARACTERS", 20)
    pieces: Callable = tokenizer_training._pieces
    sample = ["a few words that are longer than twenty characters", "x" * 45, "", "short", "河" * 41]
    for text in sample:
        parts = list(pieces([text]))
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 20
    assert list(pieces(sample[:1])) == ["a few words that", " are longer than", " twenty characters"]
