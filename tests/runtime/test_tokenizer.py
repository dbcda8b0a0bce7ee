"""What is cut off texts that are too long."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import WORDS, make_model, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from effllm.folder import open_folder
from effllm.runtime.tokenizer import INPUTS, TextTokenizer, inputs_of, longest_first
from effllm.runtime.torch import TorchEngine

TEXTS = [" ".join(WORDS[(7 * count + i) % len(WORDS)] for i in range(count)) for count in (0, 1, 2, 3, 4, 5, 9, 14)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model", "bert", "feature-extraction")


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@pytest.mark.parametrize("length", [6, 9, 12, 17])
@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_and_pairs_are_cut_as_the_library_cuts_them(architecture: str, length: int, side: str) -> None:
    backend = make_tokenizer(architecture).backend_tokenizer
    library = copy.deepcopy(backend)
    library.enable_truncation(length, strategy="longest_first", direction=side)
    tokenizer = TextTokenizer(backend, length, None, 0, keeps_end=side == "left")
    cut = 0
    for text in TEXTS:
        for pair in (None, *TEXTS):
            given = (text,) if pair is None else (text, pair)
            found, expected = tokenizer.encode(*given), library.encode(*given)
            assert list(found.ids) == expected.ids, given
            assert list(found.type_ids) == expected.type_ids
            assert list(found.sequence_ids) == expected.sequence_ids
            assert list(found.word_ids) == expected.word_ids
            assert list(found.offsets) == expected.offsets
            assert list(found.special) == [bool(s) for s in expected.special_tokens_mask]
            whole = TextTokenizer(copy.deepcopy(backend), 10**6, None, 0).encode(*given)
            assert found.truncated_tokens == len(whole) - len(found)
            cut += bool(found.truncated_tokens)
    assert cut > 10


@pytest.mark.parametrize("where", ["tokenizer_config.json", "tokenizer.json"])
def test_a_folder_says_which_end_of_a_text_is_cut(tmp_path: Path, where: str) -> None:
    folder = make_model(tmp_path / "model", "bert", "feature-extraction")
    file = folder / where
    content = json.loads(file.read_text())
    truncation = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    content |= {"truncation_side": "left"} if where == "tokenizer_config.json" else {"truncation": truncation}
    file.write_text(json.dumps(content))
    tokenizer = TextTokenizer.open(open_folder(folder))
    library = transformers.AutoTokenizer.from_pretrained(folder)
    text = " ".join(WORDS) * 2
    assert list(tokenizer.encode(text).ids) == library(text, truncation=True, max_length=64)["input_ids"]
    assert tokenizer.keeps_end


def test_words_are_cut_too(folder: Path) -> None:
    tokenizer = TextTokenizer(make_tokenizer("bert").backend_tokenizer, 6, None, 0)
    found = tokenizer.encode_words(list(WORDS[:20]))
    assert len(found) == 6
    assert found.special[0]
    assert found.special[-1]
    assert found.truncated_tokens > 0


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_words_have_the_tokens_that_they_have_in_a_text(prefix: bool, trim: bool) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    words = ["Ada", "Lovelace,", "", "x", "北京", "Ada"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["[CLS]"])
    backend.train_from_iterator(["Ada Lovelace met Ada Lovelace"] * 3, trainer)
    library = copy.deepcopy(backend)
    found = TextTokenizer(backend, 64, None, 0).encode_words(words)
    assert list(found.ids) == library.encode(" ".join(filter(None, words))).ids
    assert set(found.word_ids) == {0, 1, 3, 4, 5}
    assert list(found.word_ids) == sorted(found.word_ids)
    for word in (0, 1, 4, 5):
        places = [offset for offset, own in zip(found.offsets, found.word_ids, strict=True) if own == word]
        assert (min(places)[0], max(place[1] for place in places)) == (0, len(words[word]))


def test_words_are_cut_where_a_text_is_joined() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(["a b"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    found = TextTokenizer(backend, 5, None, 0).encode_words(["aaaa", "b", "c"])
    assert list(found.word_ids) == [0, 0, 0, 0, 1]
    assert found.truncated_tokens > 0
    assert len(TextTokenizer(backend, 5, None, 0).encode_words([])) == 0


def test_nothing_makes_all_parts_of_a_pair(folder: Path) -> None:
    """The library would make every overflow of one text with every overflow of the other: gigabytes for two pages."""

    class Backend:
        def __init__(self, backend: Any) -> None:
            self.backend = backend

        def __getattr__(self, name: str) -> Any:
            assert name != "enable_truncation"
            return getattr(self.backend, name)

    tokenizer = TextTokenizer.open(open_folder(folder))
    tokenizer._backend = Backend(tokenizer._backend)
    long = "fox " * 5000
    found = tokenizer.encode(long, long)
    assert len(found) == tokenizer.max_length
    assert found.truncated_tokens == 10_000 + 3 - tokenizer.max_length


@pytest.mark.parametrize(
    ("first", "second", "room", "kept"),
    [
        (3, 4, 7, (3, 4)),
        (3, 9, 7, (3, 4)),
        (9, 3, 7, (4, 3)),
        (9, 9, 7, (3, 4)),
        (10, 9, 7, (4, 3)),
        (0, 9, 7, (0, 7)),
        (5, 5, 0, (0, 0)),
    ],
)
def test_the_longer_text_is_cut_first(first: int, second: int, room: int, kept: tuple[int, int]) -> None:
    assert longest_first(first, second, room) == kept


def test_more_pieces_than_wanted_are_refused_before_they_are_read(folder: Path) -> None:
    tokenizer = TextTokenizer.open(open_folder(folder))
    assert len(tokenizer.pieces("fox fox", 4)) == 4
    with pytest.raises(OverflowError, match="5 tokens are more than 4"):
        tokenizer.pieces("fox fox fox", 4)


def test_windows_are_counted_before_they_are_made(folder: Path) -> None:
    tokenizer = TextTokenizer.open(open_folder(folder))
    for words in (1, 40, 50, 51, 90, 91, 200):
        made = len(tokenizer.encode_windows("who is ada", "fox " * words, 64, 16))
        tokenizer.max_windows = made
        assert len(tokenizer.encode_windows("who is ada", "fox " * words, 64, 16)) == made
        tokenizer.max_windows = made - 1
        if made > 1:
            with pytest.raises(OverflowError, match=f"makes {made} windows, at most {made - 1} are taken"):
                tokenizer.encode_windows("who is ada", "fox " * words, 64, 16)
        tokenizer.max_windows = 0


def test_segments_are_for_models_that_tell_them_apart() -> None:
    for segments, names in ((1, INPUTS[:2]), (2, INPUTS)):
        config = transformers.RobertaConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, type_vocab_size=segments
        )
        model = transformers.RobertaModel(config)
        assert inputs_of(model) == names
        assert TorchEngine(model).inputs == names
