"""The vocabulary of a tokenizer's folder: its special tokens, and the tokens that may replace others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from conftest import ARCHITECTURES, make_tokenizer
from tokenizers import AddedToken, models

from effllm.data.vocabulary import Vocabulary
from effllm.errors import ArtifactError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMES = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def write(folder: Path, tokens, *, added=(), special=SPECIAL, config=None, special_map=None) -> Path:
    backend = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    backend.add_special_tokens([t for t in special if t in tokens])
    backend.add_tokens([AddedToken(t) for t in added])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
        if content is not None:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_special_tokens_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(architecture)
    tokenizer.save_pretrained(tmp_path)
    vocabulary = Vocabulary.read(tmp_path)
    assert vocabulary.size == len(tokenizer)
    ids = (vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id, vocabulary.pad_id)
    names = ("cls_token_id", "sep_token_id", "mask_token_id", "pad_token_id")
    assert ids == tuple(getattr(tokenizer, name) for name in names)
    assert vocabulary.special_ids == tuple(sorted(tokenizer.all_special_ids))
    ordinary = set(vocabulary.ordinary.tolist())
    assert ordinary == set(range(len(tokenizer))) - set(tokenizer.all_special_ids)


def test_a_real_bert_has_no_unused_place_to_draw(minilm: Path) -> None:
    vocabulary = Vocabulary.read(minilm)
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.mask_id) == (30522, 0, 103)
    assert vocabulary.special_ids == (0, 100, 101, 102, 103)
    assert len(vocabulary.ordinary) == 30522 - 5 - 994
    assert vocabulary.ordinary[0] == 999


def test_cls_falls_back_to_bos_and_sep_to_eos(tmp_path: Path) -> None:
    config = {"bos_token": "<begin>", "eos_token": {"content": "<end>"}, "pad_token": "[PAD]", "mask_token": "[MASK]"}
    tokens = ["[PAD]", "<begin>", "<end>", "[MASK]", "a", "b"]
    vocabulary = Vocabulary.read(write(tmp_path, tokens, special=("[PAD]",), config=config))
    assert (vocabulary.cls_id, vocabulary.sep_id) == (1, 2)
    assert vocabulary.special_ids == (0, 1, 2, 3)
    assert vocabulary.ordinary.tolist() == [4, 5]


def test_names_are_found_in_either_file_and_without_any(tmp_path: Path) -> None:
    tokens = [*SPECIAL, "a"]
    plain = Vocabulary.read(write(tmp_path / "none", tokens))
    assert plain == Vocabulary(6, 2, 3, 4, 0, (0, 1, 2, 3, 4), plain.ordinary)
    tokens = [token.replace("[", "<").replace("]", ">").lower() for token in tokens]
    names = {key: value.replace("[", "<").replace("]", ">").lower() for key, value in NAMES.items()}
    for file in ("config", "special_map"):
        assert plain == Vocabulary.read(write(tmp_path / file, tokens, special=("<unk>",), **{file: names}))
    with pytest.raises(ArtifactError, match="has no cls token"):
        Vocabulary.read(write(tmp_path / "neither", tokens, special=tokens[:5]))


def test_added_and_unused_tokens_replace_nothing(tmp_path: Path) -> None:
    tokens = [*SPECIAL, "a", "[unused0]", "[unused17]", "<unused_3>", "b", "unused"]
    config = {**NAMES, "extra_special_tokens": {"image": "b"}, "additional_special_tokens": [{"content": "[X]"}]}
    folder = write(tmp_path, tokens, added=("added", "[X]"), config=config)
    vocabulary = Vocabulary.read(folder)
    assert vocabulary.size == len(tokens) + 2
    assert [tokens[i] for i in vocabulary.ordinary] == ["a", "unused"]
    assert {tokens.index("b"), len(tokens) + 1} <= set(vocabulary.special_ids)


@pytest.mark.parametrize("role", ["cls", "sep", "mask", "pad"])
def test_a_missing_special_token_is_named(role: str, tmp_path: Path) -> None:
    tokens = [t for t in [*SPECIAL, "a"] if t != f"[{role.upper()}]"]
    names = {key: value for key, value in NAMES.items() if key != f"{role}_token"}
    with pytest.raises(ArtifactError, match=f"has no {role} token.* is named"):
        Vocabulary.read(write(tmp_path, tokens, config=names))
    with pytest.raises(ArtifactError, match=rf"has no {role} token.*'\[{role.upper()}\]' is not in its vocabulary"):
        Vocabulary.read(write(tmp_path, tokens, config=NAMES))


def test_a_name_that_is_not_in_the_vocabulary_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no cls token.*'<first>' is not in its vocabulary"):
        Vocabulary.read(write(tmp_path, [*SPECIAL, "a"], config={**NAMES, "cls_token": "<first>"}))


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no tokenizer\.json"):
        Vocabulary.read(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"'])
def test_a_damaged_tokenizer_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is not a tokenizer") as caught:
        Vocabulary.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_only_special_tokens_are_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing to learn"):
        Vocabulary.read(write(tmp_path, list(SPECIAL)))
