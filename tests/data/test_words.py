"""Words begin where the text says so, whatever tokenizer cuts it."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from effllm.data.words import token_starts, word_starts

SENTENCES = [
    "The quick brown fox doesn't jump over 12.5 lazy dogs!",
    "she sells sea-shells on the café's shore, naïve & über",
    "北京是中国的首都,很大。我们在北京学习中文。",
    "東京タワーは高い mixed with English",
]


def spoken(text: str) -> list[str]:
    """Return the words of a text as `word_starts` cuts it."""
    words: list[str] = []
    for character, start in zip(text, word_starts(text), strict=True):
        if start:
            words.append(character)
        elif not character.isspace():
            words[-1] += character
    return words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, world!", ["Hello", ",", "world", "!"]),
        ("don't 3.5% e-mail", ["don", "'", "t", "3", ".", "5", "%", "e", "-", "mail"]),
        (" two  spaces\nand\tmore ", ["two", "spaces", "and", "more"]),
        ("abc123 x_y", ["abc123", "x", "_", "y"]),
        ("北京abc大", ["北", "京", "abc", "大"]),
        ("カタカナ と かな", ["カ", "タ", "カ", "ナ", "と", "か", "な"]),
        ("한국어 텍스트", ["한국어", "텍스트"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
        ("ລາວ", ["ລ", "າ", "ວ"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("e\u0301a \u0301b", ["e\u0301a", "\u0301b"]),
        ("か\u3099a", ["か\u3099", "a"]),
        ("a+b=c 5€", ["a", "+", "b", "=", "c", "5", "€"]),
        ("👩\u200d🚀!", ["👩\u200d", "🚀", "!"]),
        ("", []),
        (" \n", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert spoken(text) == words


def kind_of(character: str) -> str:
    """Class a character by its Unicode name and category, apart from the table that is tested."""
    if character.isspace():
        return "space"
    name = unicodedata.name(character, "")
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Cf":
        return "mark"
    scripts = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA LETTER", "KATAKANA LETTER", "THAI CHARACTER")
    if name.startswith(scripts) and category[0] == "L":
        return "lone"
    return "punctuation" if category[0] in "PS" else "letter"


ALPHABET = st.sampled_from("aBé1٣ \n\t.,'—€_中国ひカไท한글\u0301\u3099\u0e31\u200d\u0416ß")


@given(st.text(ALPHABET, max_size=30))
def test_words_are_cut_by_the_rules_one_character_at_a_time(text: str) -> None:
    expected = []
    before = "space"  # the class of the last character that is no mark
    for place, character in enumerate(text):
        kind = kind_of(character)
        if kind == "mark" and place and not text[place - 1].isspace():
            expected.append(False)
            continue
        kind = "letter" if kind == "mark" else kind
        expected.append(kind in {"lone", "punctuation"} or (kind == "letter" and before != "letter"))
        before = kind
    assert word_starts(text).tolist() == expected


def trained(kind: str) -> Tokenizer:
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=140, special_tokens=["[UNK]"], show_progress=False)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=140, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="prefix" in kind)
        if "trimmed" in kind:
            backend.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return backend


KINDS = ("wordpiece", "unigram", "bpe", "bpe prefix", "bpe trimmed", "bpe prefix trimmed")
BACKENDS = {kind: trained(kind) for kind in KINDS}


def cut(kind: str, texts: list[str]) -> list[list[tuple[str, int]]]:
    encodings = BACKENDS[kind].encode_batch(texts, add_special_tokens=False)
    starts = token_starts(texts, encodings)
    return [list(zip(e.tokens, s.tolist(), strict=True)) for e, s in zip(encodings, starts, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_begins_once_and_where_the_text_says(kind: str) -> None:
    for text, tokens in zip(SENTENCES, cut(kind, SENTENCES), strict=True):
        spans = BACKENDS[kind].encode(text, add_special_tokens=False).offsets
        places = [start + len(text[start:end]) - len(text[start:end].lstrip()) for start, end in spans]
        whole = [text[start:end].strip() for start, end in spans]
        begun = set()
        for i, (_, start) in enumerate(tokens):
            marker = not whole[i] and i + 1 < len(tokens) and not tokens[i + 1][1]
            begun |= {places[i + marker]} if start and (whole[i] or marker) else set()
        wanted = set(word_starts(text).nonzero()[0].tolist())
        inside = {p for start, end in spans for p in range(start + 1, end) if not text[start:p].isspace()}
        assert wanted - inside <= begun <= wanted
        assert tokens[0][1] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_starts_do_not_depend_on_the_texts_of_the_batch(kind: str) -> None:
    texts = [*SENTENCES, "", " ", "a", "\n", "é"]
    together = cut(kind, texts)
    assert together == [cut(kind, [text])[0] for text in texts]
    assert [len(tokens) for tokens in together][-5] == 0
    assert token_starts([], []) == []


def test_pieces_of_a_character_share_its_word() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["x"], trainer)
    text = "中é a国"
    encodings = [backend.encode(text)]
    assert len(encodings[0]) == 3 + 2 + 1 + 1 + 3
    #                        中       é     Ġ  a  国
    assert token_starts([text], encodings)[0].tolist() == [1, 0, 0, 1, 0, 1, 0, 1, 0, 0]


def fixed(merges: list[tuple[str, str]], *, prefix: bool, trim: bool) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


MERGES = [("Ġ", "a"), ("b", "c"), ("Ġa", "bc"), ("Ċ", "Ċ")]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    ("text", "prefix", "tokens", "starts"),
    [
        ("abc abc", False, ["a", "bc", "Ġabc"], [1, 0, 1]),
        ("abc abc", True, ["Ġabc", "Ġabc"], [1, 1]),
        ("a b", False, ["a", "Ġ", "b"], [1, 1, 0]),  # the marker alone begins the word
        ("b", True, ["Ġ", "b"], [1, 0]),
        ("a ,b", False, ["a", "Ġ", ",", "b"], [1, 1, 0, 1]),
        ("a\nb", False, ["a", "Ċ", "b"], [1, 1, 1]),  # a line end is a word of its own
        ("a\n\nb", False, ["a", "Ċ", "Ċ", "b"], [1, 1, 1, 1]),
        ("a\n b", False, ["a", "Ċ", "Ġ", "b"], [1, 1, 1, 0]),
        ("a\n\n abc", False, ["a", "ĊĊ", "Ġabc"], [1, 1, 1]),
        ("b ", False, ["b", "Ġ"], [1, 1]),
        ("bcbc", False, ["bc", "bc"], [1, 0]),
        ("b.c", False, ["b", ".", "c"], [1, 1, 1]),
    ],
)
def test_leading_space_markers(text: str, prefix: bool, tokens: list[str], starts: list[int], trim: bool) -> None:
    encoding = fixed(MERGES, prefix=prefix, trim=trim).encode(text, add_special_tokens=False)
    assert encoding.tokens == tokens
    assert token_starts([text], [encoding])[0].tolist() == starts


@pytest.mark.parametrize(
    ("text", "tokens", "starts"),
    [
        ("ab ab", ["▁ab", "▁ab"], [1, 1]),
        ("abb", ["▁ab", "b"], [1, 0]),
        ("b ab", ["▁", "b", "▁ab"], [1, 0, 1]),
        ("ab 中国人", ["▁ab", "▁", "中国", "人"], [1, 1, 0, 1]),
        ("中", ["▁", "中"], [1, 0]),
        ("ab,b", ["▁ab", ",", "b"], [1, 1, 1]),
        ("ab q", ["▁ab", "▁", "q"], [1, 1, 0]),  # q is unknown
    ],
)
def test_unigram_pieces(text: str, tokens: list[str], starts: list[int]) -> None:
    pieces = ["<unk>", "▁", "▁ab", "b", "中国", "人", "中", ","]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    encoding = backend.encode(text)
    assert encoding.tokens == tokens
    assert token_starts([text], [encoding])[0].tolist() == starts


def test_word_pieces() -> None:
    pieces = ["[UNK]", "un", "##aff", "##able", "北", "京", ",", "don", "'", "t", "it", "cafe"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    text = "Unaffable 北京,don't café xyzzy\n\nit"
    encoding = backend.encode(text)
    expected = [
        *[("un", 1), ("##aff", 0), ("##able", 0), ("北", 1), ("京", 1), (",", 1), ("don", 1), ("'", 1), ("t", 1)],
        *[("cafe", 1), ("[UNK]", 1), ("it", 1)],
    ]
    assert list(zip(encoding.tokens, token_starts([text], [encoding])[0].tolist(), strict=True)) == expected


@settings(deadline=None)
@given(st.text(ALPHABET, max_size=20))
@pytest.mark.parametrize("kind", KINDS)
def test_any_text_has_a_start_for_each_word_that_no_other_word_begins_with(kind: str, text: str) -> None:
    tokens = cut(kind, [text])[0]
    if tokens:
        assert tokens[0][1] == 1
    assert sum(start for _, start in tokens) >= min(1, len(text.strip()) if kind != "wordpiece" else 0)
