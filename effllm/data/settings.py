"""The settings of `prepare`: flags, manifest entries and documentation are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from effllm.errors import SettingError


@dataclass(frozen=True)
class PrepareSettings:
    """How to prepare a corpus."""

    tokenizer: str = field(
        default="wordpiece", metadata={"help": "wordpiece, bpe or unigram to train one, or a folder or hub id"}
    )
    vocab_size: int = field(default=8192, metadata={"help": "how many tokens a trained tokenizer has"})
    case: Literal["auto", "keep", "lower"] = field(
        default="auto", metadata={"help": "what a trained tokenizer does to case; auto lowers it for wordpiece"}
    )
    max_length: int = field(default=512, metadata={"help": "the length limit of a trained tokenizer, in tokens"})
    sample_mb: int = field(default=20, metadata={"help": "the most text to train the tokenizer on, in MB"})
    min_characters: int = field(default=50, metadata={"help": "drop documents with fewer characters, spaces aside"})
    min_letters: float = field(default=0.5, metadata={"help": "drop documents with a smaller share of letters"})
    max_repetition: float = field(
        default=0.5, metadata={"help": "drop documents of which a larger share has occurred in them before"}
    )
    near_duplicates: float = field(
        default=0.8, metadata={"help": "drop documents this similar (Jaccard) to an earlier one; 1 = equal ones only"}
    )
    dev_share: float = field(default=0.01, metadata={"help": "the share of the documents that go to the split dev"})
    seed: int = field(default=0, metadata={"help": "chooses the documents of dev and the tokenizer's sample"})

    def __post_init__(self) -> None:
        for name, least in {"vocab_size": 1, "max_length": 8, "sample_mb": 1, "min_characters": 0}.items():
            if getattr(self, name) < least:
                raise SettingError(f"{flag(name)} must be at least {least}, got {getattr(self, name)}")
        for name, low in {"min_letters": 0.0, "max_repetition": 0.0, "dev_share": 0.0, "near_duplicates": 0.5}.items():
            if not low <= getattr(self, name) <= 1:
                raise SettingError(f"{flag(name)} must be between {low:g} and 1, got {getattr(self, name)}")
        if self.dev_share == 1:
            raise SettingError("--dev-share must be below 1: nothing would be left to train on")

    @property
    def lowercase(self) -> bool:
        """Whether a trained tokenizer lowers case."""
        return self.case == "lower" or (self.case == "auto" and self.tokenizer == "wordpiece")


def flag(name: str) -> str:
    """Return a setting's flag on the command line."""
    return f"--{name.replace('_', '-')}"
