"""Text to token ids and back, with the `tokenizers` library alone.

A folder's `tokenizer.json` is read as it is; padding and truncation are done here, so that what was cut is known.
"""

from __future__ import annotations

import bisect
import dataclasses
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from effllm.errors import ArtifactError
from effllm.folder import ModelFolder, read_json


@dataclass(frozen=True)
class Encoding:
    """One model input of `T` tokens, unpadded.

    `special`, `word_ids`, `sequence_ids` and `offsets` (character positions in their own text) have one entry per
    token. `truncated_tokens` counts the tokens that did not fit. `masked_ids` maps the places that were masked for
    evaluation to their true ids; `mask_places` are all masked places.
    """

    ids: Sequence[int]
    type_ids: Sequence[int]
    special: Sequence[bool]
    word_ids: Sequence[int | None]
    sequence_ids: Sequence[int | None]
    offsets: Sequence[tuple[int, int]]
    tokenizer: TextTokenizer = field(repr=False, compare=False)
    truncated_tokens: int = 0
    masked_ids: Mapping[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def mask_places(self) -> list[int]:
        """The positions that hold the mask token."""
        return [i for i, token in enumerate(self.ids) if token == self.tokenizer.mask_id]

    def masked(self, ids: Sequence[int], masked_ids: Mapping[int, int]) -> Encoding:
        """Return a copy with other ids, remembering the true ids of the masked places."""
        return dataclasses.replace(self, ids=ids, masked_ids=masked_ids)

    def token_text(self, token: int) -> str:
        """Return the text of a token id."""
        return self.tokenizer.decode_token(token)


class TextTokenizer:
    """A fast tokenizer with the length limit of its model."""

    def __init__(
        self, backend: Tokenizer, max_length: int, mask_token: str | None, pad_id: int, *, keeps_end: bool = False
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.max_length = max_length
        self.mask_token = mask_token
        self.mask_id = backend.token_to_id(mask_token) if mask_token else None
        self.pad_id = pad_id
        self._apart = backend.encode_batch([["a", "a"]], is_pretokenized=True)[0].ids == backend.encode("a a").ids
        """Whether words that are given apart become the tokens that they are in a text. Byte-level tokens hold the
        space before a word, which a tokenizer without `add_prefix_space` would take every such word to lack."""
        self.keeps_end = keeps_end
        """Whether a text that is too long loses its beginning, as `truncation_side` "left" says."""
        self.max_windows = 0
        """The windows that a passage may make, 0 = any; they are counted before they are made."""

    @classmethod
    def open(cls, folder: ModelFolder) -> TextTokenizer:
        """Read a folder's tokenizer. Raises ArtifactError when there is none that can be read."""
        file = folder.path / "tokenizer.json"
        if not file.is_file():
            raise ArtifactError(f"{folder.path} has no tokenizer.json")
        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ArtifactError(f"{file} is not a tokenizer: {error}") from None
        return cls.of(backend, folder)

    @classmethod
    def of(cls, backend: Tokenizer, folder: ModelFolder, *, keeps_end: bool | None = None) -> TextTokenizer:
        """Wrap a tokenizer that is already loaded, with the limits and special tokens of a model folder.

        Which end of a text is cut is read from the folder and the tokenizer, unless `keeps_end` says so.
        """
        mask = None
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            value = read_json(folder.path / name, {}).get("mask_token")
            mask = mask or (value.get("content") if isinstance(value, dict) else value)
        if mask is None:
            mask = next((token for token in ("[MASK]", "<mask>") if backend.token_to_id(token) is not None), None)
        if keeps_end is None:
            side = read_json(folder.path / "tokenizer_config.json", {}).get("truncation_side")
            keeps_end = str(side or (backend.truncation or {}).get("direction")).lower() == "left"
        pad_id = int(folder.config.get("pad_token_id") or 0)
        return cls(backend, folder.max_length, mask, pad_id, keeps_end=keeps_end)

    @property
    def vocabulary_size(self) -> int:
        """The number of token ids, added tokens included."""
        return int(self._backend.get_vocab_size())

    def vocabulary(self) -> dict[str, int]:
        """Return all tokens with their ids, added tokens included."""
        return dict(self._backend.get_vocab())

    def decode_token(self, token: int) -> str:
        """Return the text of one token, without surrounding space."""
        return str(self._backend.decode([token], skip_special_tokens=False)).strip()

    def encode(self, text: str, pair: str | None = None) -> Encoding:
        """Encode a text or a pair, truncating the longer one first to `max_length` tokens."""
        return self._encode_truncated(text, pair)

    def pieces(self, text: str, most: int | None = None) -> list[tuple[int, str, bool, int, int]]:
        """Return every token of a text, none cut off: its id, text, whether it is special, first character and end.

        Raises OverflowError for a text of more than `most` tokens.
        """
        self._backend.no_truncation()
        raw = self._raw(text, None)
        if most is not None and len(raw) > most:
            raise OverflowError(f"{len(raw)} tokens are more than {most}")
        marks = zip(raw.ids, raw.tokens, raw.special_tokens_mask, raw.offsets, strict=True)
        return [(token, piece, bool(special), start, end) for token, piece, special, (start, end) in marks]

    def encode_words(self, words: Sequence[str]) -> Encoding:
        """Encode a text that is already split into words; `word_ids` and `offsets` refer to them."""
        if self._apart:
            return self._encode_truncated(list(words), None, is_pretokenized=True)
        numbered = [(number, word) for number, word in enumerate(words) if word]
        ends = [end - 1 for end in itertools.accumulate(len(word) + 1 for _, word in numbered)]
        whole = self._encode_truncated(" ".join(word for _, word in numbered), None)
        word_ids: list[int | None] = []
        offsets = []
        for sequence, (start, stop) in zip(whole.sequence_ids, whole.offsets, strict=True):
            if sequence is None:
                word_ids.append(None)
                offsets.append((start, stop))
                continue
            # A space belongs to the word after it.
            place = min(bisect.bisect_right(ends, max(start, stop - 1)), len(ends) - 1)
            number, word = numbered[place]
            first = ends[place] - len(word)
            word_ids.append(number)
            offsets.append((max(0, start - first), max(0, stop - first)))
        return dataclasses.replace(whole, word_ids=word_ids, offsets=offsets)

    def encode_windows(self, question: str, passage: str, length: int, stride: int) -> list[Encoding]:
        """Encode a question with each window of `length` tokens of a passage; windows overlap by `stride` tokens.

        A question that takes more than half of a window is cut to half of it; the first window tells by how many
        tokens. Raises OverflowError beyond `max_windows`.
        """
        self._backend.no_truncation()
        (ids,) = self._backend.encode_batch([question], add_special_tokens=False)
        lost = max(0, len(ids.ids) - length // 2)
        if lost:
            question = question[: ids.offsets[length // 2 - 1][1]]
        used = len(self._raw(question, ""))
        stride = max(0, min(stride, (length - used) // 2))
        if self.max_windows:
            (alone,) = self._backend.encode_batch([passage], add_special_tokens=False)
            windows = 1 + math.ceil(max(0, len(alone) - (length - used)) / max(1, length - used - stride))
            if windows > self.max_windows:
                raise OverflowError(f"makes {windows} windows, at most {self.max_windows} are taken")
        self._backend.enable_truncation(length, stride=stride, strategy="only_second")
        first = self._raw(question, passage)
        return [self._encoding(first, lost), *map(self._encoding, first.overflowing)]

    def encode_all(self, text: str, length: int) -> list[Encoding]:
        """Encode a text as windows of at most `length` tokens, at least 2, each from the last token of the one before.

        Special tokens stand where they stand in the whole text. A text of no tokens gives no window.
        """
        self._backend.no_truncation()
        whole = self._encoding(self._raw(text, None))
        parts = ("ids", "type_ids", "special", "word_ids", "sequence_ids", "offsets")
        starts = range(0, max(len(whole) - 1, min(len(whole), 1)), length - 1)
        return [dataclasses.replace(whole, **{p: getattr(whole, p)[s : s + length] for p in parts}) for s in starts]

    def _encode_truncated(self, text: Any, pair: str | None, *, is_pretokenized: bool = False) -> Encoding:
        """Encode and cut here: of a pair the library would make every part of one text with every part of the other."""
        self._backend.no_truncation()
        raw = self._raw(text, pair, is_pretokenized=is_pretokenized)
        if len(raw) <= self.max_length:
            return self._encoding(raw)
        places = raw.sequence_ids
        counts = places.count(0), places.count(1)
        kept = longest_first(*counts, max(0, self.max_length - (len(places) - sum(counts))))
        first = [places.index(which) if count else 0 for which, count in enumerate(counts)]
        if self.keeps_end:
            first = [begin + count - keep for begin, count, keep in zip(first, counts, kept, strict=True)]
        chosen = [index for index, p in enumerate(places) if p is None or 0 <= index - first[p] < kept[p]]
        return self._encoding(raw, sum(counts) - sum(kept), chosen)

    def _raw(self, text: Any, pair: str | None, *, is_pretokenized: bool = False) -> Any:
        """Encode as a batch of one: `encode` would hold the interpreter lock, seconds for a megabyte."""
        given = text if pair is None else (text, pair)
        return self._backend.encode_batch([given], is_pretokenized=is_pretokenized)[0]

    def _encoding(self, raw: Any, lost: int = 0, chosen: Sequence[int] | None = None) -> Encoding:
        """Wrap what the library gave, of it the chosen tokens."""

        def part(values: list[Any]) -> list[Any]:
            return values if chosen is None else [values[index] for index in chosen]

        return Encoding(
            ids=part(raw.ids),
            type_ids=part(raw.type_ids),
            special=[bool(s) for s in part(raw.special_tokens_mask)],
            word_ids=part(raw.word_ids),
            sequence_ids=part(raw.sequence_ids),
            offsets=part(raw.offsets),
            tokenizer=self,
            truncated_tokens=lost,
        )


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of two texts are kept where `room` are: the longer one is cut first, then both in turn.

    One token that is left over goes to the longer text, of two as long to the second.
    """
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    return (short, room - short) if first <= second else (room - short, short)


INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The arrays that `pad_batch` makes."""


def inputs_of(model: Any) -> tuple[str, ...]:
    """Return those of `INPUTS` that a transformers model takes: segments only where it tells them apart."""
    names = inspect.signature(model.forward).parameters
    apart = getattr(model.config, "type_vocab_size", 2) > 1
    return tuple(name for name in INPUTS if name in names and (apart or name != "token_type_ids"))


def pad_batch(encodings: Sequence[Encoding], pad_id: int) -> dict[str, np.ndarray]:
    """Stack encodings into int64 arrays (B, T_max) `input_ids`, `attention_mask`, `token_type_ids`, padded right."""
    width = max(len(e) for e in encodings)
    ids = np.full((len(encodings), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    types = np.zeros_like(ids)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding)] = encoding.ids
        types[row, : len(encoding)] = encoding.type_ids
        mask[row, : len(encoding)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
