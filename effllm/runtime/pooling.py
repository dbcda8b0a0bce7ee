"""How a sentence-embedding folder pools: read from the module files of sentence-transformers, old and new."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effllm.errors import ArtifactError, Unsupported
from effllm.folder import read_json

MODE_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Pooling mode -> its boolean key in the old `1_Pooling/config.json`."""


@dataclass(frozen=True)
class Pooling:
    """How token states become one vector; the mean where the folder does not say.

    `include_prompt` is for sentence-transformers, which then pools the tokens of a prompt too; effllm knows no prompts.
    """

    mode: str = "mean"
    normalize: bool = False
    include_prompt: bool = True


def read_pooling(folder: Path) -> Pooling:
    """Read a folder's pooling.

    Raises Unsupported for modules other than transformer, pooling and normalisation, and where sentence-transformers
    would change the texts, by lower-casing them or by a prompt before each.
    """
    modules = read_json(folder / "modules.json", [])
    _check_texts_stay(folder)
    mode, normalize, include_prompt = "mean", False, True
    for module in modules:
        if not isinstance(module, dict) or not isinstance(module.get("path", ""), str):
            raise ArtifactError(f"{folder / 'modules.json'} must list modules with a type and a path")
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            config = read_json(folder / module.get("path", "") / "config.json")
            mode = _mode(config, folder)
            include_prompt = config.get("include_prompt") is not False
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise Unsupported(f"{folder}: module {kind!r} is not supported (Transformer, Pooling and Normalize are)")
    return Pooling(mode, normalize, include_prompt)


def _check_texts_stay(folder: Path) -> None:
    lowers = read_json(folder / "sentence_bert_config.json", {}).get("do_lower_case")
    if lowers and not read_json(folder / "tokenizer_config.json", {}).get("do_lower_case"):
        raise Unsupported(
            f"{folder}: sentence_bert_config.json has texts lower-cased, which the tokenizer does not do; make the "
            "tokenizer lower-case and set do_lower_case to false"
        )
    prompt = read_json(folder / "config_sentence_transformers.json", {}).get("default_prompt_name")
    if prompt:
        raise Unsupported(
            f"{folder}: config_sentence_transformers.json puts the prompt {prompt!r} before every text, effllm embeds "
            "texts as they are; set default_prompt_name to null and write the prompt into your texts"
        )


def _mode(config: Any, folder: Path) -> str:
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder}: the pooling configuration must be a JSON object")
    named = config.get("pooling_mode")
    found = [named] if isinstance(named, str) else [m for m, key in MODE_KEYS.items() if config.get(key) is True]
    if len(found) != 1 or found[0] not in MODE_KEYS:
        raise Unsupported(f"{folder}: pooling {found or 'none'} is not supported (one of {', '.join(MODE_KEYS)})")
    return str(found[0])
