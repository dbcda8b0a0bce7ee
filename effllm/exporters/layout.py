"""The folder that every tool loads: ONNX Runtime, sentence-transformers, optimum-onnx, fastembed, transformers.js, TEI.

Besides the ONNX files it holds the config, the fast tokenizer with a real length limit and the old file formats that
these tools still read: boolean pooling keys, the old module paths, `max_seq_length`, `special_tokens_map.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effllm.exporters.source import Source
from effllm.folder import read_json, write_json
from effllm.runtime.pooling import MODE_KEYS, Pooling, read_pooling

TOKENIZER_CLASSES = {
    "bert": ("BertTokenizer", "WordPiece"),
    "distilbert": ("DistilBertTokenizer", "WordPiece"),
    "electra": ("ElectraTokenizer", "WordPiece"),
    "roberta": ("RobertaTokenizer", "BPE"),
    "xlm-roberta": ("XLMRobertaTokenizer", "Unigram"),
}
"""Model type -> the tokenizer class that transformers 4 and transformers.js know, and the kind of model it wraps."""
KEPT = ("prompts", "similarity_fn_name")
"""What stays of `config_sentence_transformers.json`."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def write_layout(source: Source, target: Path) -> None:
    """Write everything but the ONNX files and the manifest into `target`."""
    _write_config(source, target)
    _write_tokenizer(source, target)
    if source.task.any_model:
        _write_modules(source, target)


def _write_config(source: Source, target: Path) -> None:
    config = dict(source.folder.config)
    for name in ("_name_or_path", "quantization_config"):  # an ONNX graph has its sizes and codes in itself
        config.pop(name, None)
    write_json(target / "config.json", config)


def _write_tokenizer(source: Source, target: Path) -> None:
    """Write the fast tokenizer and its settings under a class name of transformers 4, with a real length limit."""
    tokenizer = source.tokenizer
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(target / "tokenizer.json"))
    tokens = {name: str(getattr(tokenizer, name)) for name in SPECIAL_TOKENS if getattr(tokenizer, name, None)}
    settings: dict[str, Any] = {
        key: value
        for key, value in read_json(source.folder.path / "tokenizer_config.json", {}).items()
        if key not in {"name_or_path", "tokenizer_file", "special_tokens_map_file", "auto_map", "backend", "is_local"}
    }
    if isinstance(settings.get("extra_special_tokens"), list):  # as transformers 5 writes it; 4 expects a mapping there
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings |= tokens
    settings["model_max_length"] = source.folder.max_length
    settings["truncation_side"] = tokenizer.truncation_side
    settings |= class_settings(str(source.folder.config["model_type"]), json.loads(backend.to_str()))
    settings["model_input_names"] = list(tokenizer.model_input_names)
    write_json(target / "tokenizer_config.json", settings)
    write_json(target / "special_tokens_map.json", tokens)
    for name in ("vocab.txt", "vocab.json", "merges.txt"):
        if (source.folder.path / name).is_file():
            shutil.copyfile(source.folder.path / name, target / name)


def class_settings(model_type: str, backend: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer's class name and what the class, in transformers 4, would otherwise set by its own defaults.

    `backend` is the content of `tokenizer.json`. Where its parts are not those of the model type's class, the class is
    the generic one, which changes nothing but the leading space.
    """
    name, kind = TOKENIZER_CLASSES.get(model_type, ("", ""))
    before = backend.get("pre_tokenizer") or {}
    space = {"add_prefix_space": before["add_prefix_space"]} if "add_prefix_space" in before else {}
    generic = {"tokenizer_class": "PreTrainedTokenizerFast", **space}
    if not name or backend["model"].get("type") != kind or (kind == "BPE" and before.get("type") != "ByteLevel"):
        return generic
    if kind != "WordPiece":
        return {"tokenizer_class": name, **space}
    normalizer = backend.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer":
        return generic
    return {
        "tokenizer_class": name,
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
    }


def _write_modules(source: Source, target: Path) -> None:
    pooling = read_pooling(source.folder.path)
    modules = ["Transformer", "Pooling", *(["Normalize"] if pooling.normalize else [])]
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    write_json(
        target / "modules.json",
        [
            {"idx": i, "name": str(i), "path": paths[name], "type": f"sentence_transformers.models.{name}"}
            for i, name in enumerate(modules)
        ],
    )
    (target / "1_Pooling").mkdir()
    write_json(target / "1_Pooling" / "config.json", pooling_config(pooling, source.folder.hidden_size))
    if pooling.normalize:
        (target / "2_Normalize").mkdir()
        write_json(target / "2_Normalize" / "config.json", {})
    write_json(
        target / "sentence_bert_config.json", {"max_seq_length": source.folder.max_length, "do_lower_case": False}
    )
    known = read_json(source.folder.path / "config_sentence_transformers.json", {})
    write_json(
        target / "config_sentence_transformers.json",
        {"prompts": {}, **{key: known[key] for key in KEPT if key in known}, "default_prompt_name": None},
    )


def pooling_config(pooling: Pooling, width: int) -> dict[str, Any]:
    """Return `1_Pooling/config.json` in the old form with one boolean per mode."""
    return {
        "word_embedding_dimension": width,
        **{key: mode == pooling.mode for mode, key in MODE_KEYS.items()},
        "include_prompt": pooling.include_prompt,
    }
