"""Training a tokenizer from text: WordPiece, byte-level BPE or Unigram, the same bytes for the same text every time.

The trainers of `tokenizers` walk hash tables whose order is new in each process. For WordPiece no id depends on that
order once the trainer is given its whole alphabet, `##` forms included; byte-level BPE starts from a fixed alphabet;
Unigram is trained by SentencePiece, which sorts what it counts.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from effllm.data.characters import code_points
from effllm.errors import MissingExtra, SettingError
from effllm.folder import write_json

COVERAGE = 0.9999
"""The share of the text's characters that the alphabet of WordPiece and Unigram is to cover; others are unknown."""
LEAST_COVERAGE = 0.995
"""The share that it must cover."""
ALPHABET_SHARE = 0.9
"""The most of a vocabulary that single characters take beyond `LEAST_COVERAGE`; Chinese has thousands of rare ones."""
MIN_FREQUENCY = 2
BYTES = 256
LINE_CHARACTERS = 2000
"""The longest piece of text that SentencePiece is given; it leaves out longer ones than its own limit, in bytes."""
THREADS = 4
"""SentencePiece sums its counts by thread, so the number is fixed and not the machine's."""

Texts = Callable[[], Iterable[str]]
"""Reads the training texts from their beginning, each time it is called."""


@dataclass(frozen=True)
class Trained:
    """A trained tokenizer with its special tokens by part, in the order of their ids, which begin at 0."""

    backend: Tokenizer
    special: dict[str, str]
    settings: dict[str, Any]


def train_tokenizer(kind: str, vocabulary_size: int, texts: Texts, *, lowercase: bool) -> Trained:
    """Train a tokenizer of exactly `vocabulary_size` tokens; `kind` is one of `TRAINERS`.

    Raises SettingError when the size is below what the kind needs for these texts or above what they support, and
    MissingExtra for Unigram without the package sentencepiece.
    """
    trained = TRAINERS[kind](vocabulary_size, texts, lowercase)
    backend, special = trained.backend, trained.special
    if (size := backend.get_vocab_size()) < vocabulary_size:
        raise SettingError(
            f"--vocab-size {vocabulary_size} is more than the text supports: {kind} finds {size} tokens in it; "
            f"pass --vocab-size {size} or less, or give more text"
        )
    backend.add_special_tokens(
        # As in RoBERTa, the mask takes the place of a word with its leading space.
        [AddedToken(token, lstrip=part == "mask" and kind != "wordpiece") for part, token in special.items()]
    )
    cls, sep = special["cls"], special["sep"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
    return trained


def _wordpiece(size: int, texts: Texts, lowercase: bool) -> Trained:
    """Train WordPiece with BERT's normaliser and pre-tokeniser, to which Han characters and punctuation stand alone."""
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    normalizer, splitter = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()

    def within_words(character: str) -> bool:
        return len(splitter.pre_tokenize_str(normalizer.normalize_str(f"a{character}"))) == 1

    def tokens(character: str) -> list[str]:
        return [character, f"##{character}"] if within_words(character) else [character]

    alphabet, spare = _alphabet("wordpiece", size, len(special), normalizer, texts(), lambda c: len(tokens(c)))
    first = [*special.values(), *(token for character in alphabet for token in tokens(character))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=MIN_FREQUENCY, show_progress=False, special_tokens=first, limit_alphabet=0
    )

    def tokenizer(model: Any) -> Tokenizer:
        made = Tokenizer(model)
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=lowercase), splitter
        made.decoder = decoders.WordPiece()
        return made

    learner = tokenizer(models.WordPiece(unk_token=special["unk"]))
    learner.train_from_iterator(_covered(normalizer, texts(), alphabet), trainer)
    # A tokenizer of its own for the vocabulary: the learner holds the alphabet as special tokens.
    vocabulary = learner.get_vocab(with_added_tokens=False)
    for token in [token for character in spare for token in tokens(character)][: size - len(vocabulary)]:
        vocabulary[token] = len(vocabulary)
    backend = tokenizer(models.WordPiece(vocabulary, unk_token=special["unk"]))
    settings = {"do_lower_case": lowercase, "strip_accents": None, "tokenize_chinese_chars": True}
    return Trained(backend, special, {"tokenizer_class": "BertTokenizer", **settings})


def _bpe(size: int, texts: Texts, lowercase: bool) -> Trained:
    """Train byte-level BPE, to which no text is unknown, and which gives back the text that it was given."""
    special = _roberta_tokens()
    if size < len(special) + BYTES:
        raise _too_small("bpe", size, len(special), BYTES, "bytes")
    backend = Tokenizer(models.BPE())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        show_progress=False,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts(), trainer)
    return Trained(backend, special, _generic(special))


def _unigram(size: int, texts: Texts, lowercase: bool) -> Trained:
    """Train Unigram (Kudo 2018) on NFKC text with SentencePiece's word marker."""
    try:
        import sentencepiece  # noqa: PLC0415 - needed for this kind only
    except ImportError:
        raise MissingExtra("sentencepiece", "unigram", "training a unigram tokenizer") from None
    special = _roberta_tokens()
    steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])]
    normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(r"\s+"), " ")])
    alphabet, spare = _alphabet("unigram", size, len(special) + 1, normalizer, texts(), lambda _: 1)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_pieces(_covered(normalizer, texts(), alphabet)),
        model_writer=model,
        model_type="unigram",
        vocab_size=size - len(special) + 1,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        max_sentence_length=4 * LINE_CHARACTERS + 1,
        num_threads=THREADS,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    learnt = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(learnt.id_to_piece(i), learnt.get_score(i)) for i in range(1, learnt.get_piece_size())]
    least = min(score for _, score in pieces)
    pieces += [(character, least) for character in spare[: size - len(special) - len(pieces)]]
    scored = [*((token, 0.0) for token in special.values()), *pieces]
    backend = Tokenizer(models.Unigram(scored, unk_id=list(special).index("unk"), byte_fallback=False))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Trained(backend, special, _generic(special))


TRAINERS: dict[str, Callable[[int, Texts, bool], Trained]] = {"wordpiece": _wordpiece, "bpe": _bpe, "unigram": _unigram}
"""Kind -> what trains it: (vocabulary size, texts, lower-case) to a tokenizer."""


def _roberta_tokens() -> dict[str, str]:
    return {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}


def _generic(special: dict[str, str]) -> dict[str, Any]:
    tokens = {"bos_token": special["cls"], "eos_token": special["sep"]}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}


def _too_small(kind: str, size: int, special: int, single: int, what: str) -> SettingError:
    return SettingError(
        f"--vocab-size {size} is too small: {kind} needs at least {special + single} tokens for this text "
        f"({special} special ones and {single} single {what})"
    )


def _alphabet(
    kind: str, size: int, special: int, normalizer: Any, texts: Iterable[str], cost: Callable[[str], int]
) -> tuple[list[str], list[str]]:
    """Return the commonest visible characters of the normalised texts, sorted, and spare ones, the commonest first.

    Both together cover `COVERAGE` of the text. The first are those that fit into `ALPHABET_SHARE` of the vocabulary, at
    `cost` tokens each; the others fill what is left. Raises SettingError when `LEAST_COVERAGE` does not fit.
    """
    counts = np.zeros(0x110000, dtype=np.int64)
    for text in texts:
        found, times = np.unique(code_points(normalizer.normalize_str(text)), return_counts=True)
        counts[found] += times
    counts[[code for code in counts.nonzero()[0] if chr(code).isspace()]] = 0
    by_count = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    covered = np.cumsum(counts[by_count])
    costs = np.cumsum([cost(chr(code)) for code in by_count])
    wanted, least = (int(np.searchsorted(covered, share * counts.sum())) + 1 for share in (COVERAGE, LEAST_COVERAGE))
    if len(costs) and costs[least - 1] > size - special:
        raise _too_small(kind, size, special, int(costs[least - 1]), "characters")
    fitting = int(np.searchsorted(costs, ALPHABET_SHARE * (size - special), side="right"))
    taken = min(wanted, max(least, fitting))
    return [chr(code) for code in sorted(by_count[:taken])], [chr(code) for code in by_count[taken:wanted]]


def _covered(normalizer: Any, texts: Iterable[str], alphabet: list[str]) -> Iterator[str]:
    """Yield the normalised texts with a space for each character that is not in the alphabet.

    `normalizer` must not be that of the tokenizer that is being trained: training locks it.
    """
    known = np.zeros(0x110000, dtype=bool)
    known[[ord(c) for c in alphabet]] = True
    for text in texts:
        codes = code_points(normalizer.normalize_str(text)).copy()
        codes[~known[codes]] = ord(" ")
        yield codes.tobytes().decode("utf-32-le")


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into pieces of at most `LINE_CHARACTERS`, at spaces where there are any."""
    for text in texts:
        start = 0
        while len(text) - start > LINE_CHARACTERS:
            end = text.rfind(" ", start + 1, start + LINE_CHARACTERS)
            end = start + LINE_CHARACTERS if end < 0 else end
            yield text[start:end]
            start = end
        yield text[start:]


def save_tokenizer(trained: Trained, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and its settings under a class name that transformers 4 and 5 know.

    Raises OSError when the disk is full.
    """
    folder.mkdir()
    (folder / "tokenizer.json").write_text(trained.backend.to_str(pretty=True), encoding="utf-8")
    tokens = {f"{part}_token": token for part, token in trained.special.items()}
    settings = {"model_max_length": max_length, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    write_json(
        folder / "tokenizer_config.json",
        {**tokens, **trained.settings, **settings, "clean_up_tokenization_spaces": False},
    )
    write_json(folder / "special_tokens_map.json", tokens)
    if trained.settings["tokenizer_class"] == "BertTokenizer":
        vocabulary = json.loads(trained.backend.to_str())["model"]["vocab"]
        lines = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
        (folder / "vocab.txt").write_text(lines, encoding="utf-8")
