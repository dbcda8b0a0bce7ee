"""A model folder in the Hugging Face layout: found, checked and described without loading torch.

Every way in which such a folder is commonly broken (no config, no weights, a truncated or LFS-pointer file, a web page
saved under a model's name, pickled weights, remote code) is one ArtifactError or Unsupported, before any work is done.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effllm.errors import ArtifactError, Unsupported
from effllm.variant import MANIFEST

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ONNX_FILES = ("onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_q4.onnx", "model.onnx")
"""Where a folder's ONNX file lies, the first that is there."""
HUB_FILES = (
    *("*.json", "*.safetensors", "*.txt", "*.model", "tokenizer*"),
    *(f"{name}{data}" for name in ONNX_FILES for data in ("", "_data")),
)
"""What is fetched of a hub id, as patterns whose stars go through folders too."""
NOT_FETCHED = ("*/*.safetensors", "*/*.txt")
"""What of it is not: the weights of other models in folders of their own."""
POSITIONS_AFTER_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Model types whose position ids start after the padding id, as RoBERTa's do."""
LABEL_HEADS = ("ForSequenceClassification", "ForTokenClassification")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt")


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder: `path`, its `config.json`, what can be read off it, and its `hub_id` if it has one."""

    path: Path
    config: dict[str, Any]
    hub_id: str = ""

    @property
    def name(self) -> str:
        """What people call the model: its hub id, or its folder's name."""
        return self.hub_id or self.path.absolute().name

    @property
    def architecture(self) -> str:
        """The class name of the model, such as `BertForSequenceClassification`; empty when the config names none."""
        names = self.config.get("architectures") or [""]
        return str(names[0])

    @property
    def labels(self) -> list[str]:
        """The label names in the order of the logits; empty for models without a label head."""
        return self.labels_of(self.architecture)

    def labels_of(self, name: str) -> list[str]:
        """Return the label names where the model's class has that name, or is what that auto class chooses.

        transformers writes no names where a model has two labels and never named them.
        """
        id2label = self.config.get("id2label") or {}
        if not id2label and name.endswith(LABEL_HEADS):
            return ["LABEL_0", "LABEL_1"]
        return [str(id2label[key]) for key in sorted(id2label, key=int)]

    @property
    def hidden_size(self) -> int:
        """The width of the token states; 0 where the config does not say."""
        return int(self.config.get("hidden_size") or self.config.get("dim") or 0)

    @functools.cached_property
    def max_length(self) -> int:
        """The most tokens that the model takes, special tokens included."""
        limits = [10**9]
        positions = self.config.get("max_position_embeddings")
        if isinstance(positions, int) and positions > 0:
            after_padding = self.config.get("model_type") in POSITIONS_AFTER_PADDING
            limits.append(positions - (self.config.get("pad_token_id") or 0) - 1 if after_padding else positions)
        files = {"tokenizer_config.json": "model_max_length", "sentence_bert_config.json": "max_seq_length"}
        for name, key in files.items():
            value = read_json(self.path / name, {}).get(key)
            if isinstance(value, (int, float)) and 0 < value < 10**9:
                limits.append(int(value))
        return min(limits) if min(limits) < 10**9 else 512

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds safetensors weights (as opposed to an exported graph only)."""
        return any(self.path.glob("*.safetensors"))


def find(model: str | Path, files: Sequence[str] = HUB_FILES) -> Path:
    """Return the local folder of MODEL, a path or a hub id; a hub id is downloaded to the Hugging Face cache.

    Of a hub id's files, those that match a pattern of `files` are fetched. Raises ArtifactError when there is no such
    folder and the hub has none or cannot be reached.
    """
    text = str(model)
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be entered, a home of nobody
        raise ArtifactError(f"no model folder at {text!r}: {error}") from None
    if exists:
        raise ArtifactError(f"{model} is a file; expected a model folder or a hub id")
    if not HUB_ID.fullmatch(text) or text.startswith("."):
        raise ArtifactError(f"no model folder at {text!r}")
    return _download(text, files)


def _download(hub_id: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - half a second, needed for hub ids only

    try:
        path = Path(snapshot_download(hub_id, allow_patterns=list(files), ignore_patterns=list(NOT_FETCHED)))
        if (path / MANIFEST).is_file():  # which lists what it takes to be whole
            listed = list(read_json(path / MANIFEST, {}).get("files") or ())
            snapshot_download(hub_id, revision=path.name, allow_patterns=listed)
        return path
    except Exception as error:  # the hub client raises types of several libraries; each becomes one clear line
        reason = str(error).strip().splitlines()
        raise ArtifactError(
            f"no folder named {hub_id!r} here, and the hub did not give a model of that name: "
            f"{type(error).__name__}{': ' + reason[0] if reason else ''}"
        ) from error


def open_folder(model: str | Path, *, weights: bool = True) -> ModelFolder:
    """Find and check a model folder.

    With `weights`, its safetensors files must be present and whole. Raises ArtifactError for a missing or damaged file,
    Unsupported for pickled weights and remote code, which are never loaded.
    """
    path = find(model)
    try:
        if not (path / "config.json").is_file():
            raise ArtifactError(f"{path} has no config.json; it is not a model folder")
        config = read_json(path / "config.json")
        _check_config(path, config)
        if weights:
            _check_weights(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    return ModelFolder(path, config, "" if Path(model).expanduser() == path else str(model))


def _check_config(path: Path, config: Any) -> None:
    """Check the fields of `config.json` that effllm reads."""
    file = path / "config.json"
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ArtifactError(f"{file} does not describe a transformers model: it has no model_type")
    if config.get("auto_map"):
        raise Unsupported(f"{path} needs code from the model folder (auto_map); effllm does not run remote code")
    names, labels = config.get("architectures") or [], config.get("id2label") or {}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"{file}: architectures must be a list of class names, got {names!r}")
    if not isinstance(labels, dict) or not all(key.isdecimal() for key in labels):
        raise ArtifactError(f"{file}: id2label must map numbers to names, got {labels!r}")
    if not isinstance(config.get("pad_token_id") or 0, int):
        raise ArtifactError(f"{file}: pad_token_id must be a whole number, got {config['pad_token_id']!r}")


def read_json(path: Path, default: Any = None) -> Any:
    """Read a JSON file; a missing one gives `default` where that is not None, and a present one is of its type.

    Raises ArtifactError otherwise.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise ArtifactError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON{disguise(path)}: {error}") from None
    if default is not None and not isinstance(value, type(default)):
        raise ArtifactError(f"{path} must hold a JSON {'object' if isinstance(default, dict) else 'list'}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and tools to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "*.model"),
)
"""The files of a tokenizer, as patterns."""


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the files of a tokenizer in a folder, by name."""
    found = (file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern)))
    return {file.name: file for file in found if file.is_file()}


def has_tokenizer(path: Path) -> bool:
    """Return whether the folder holds a tokenizer, fast or slow."""
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
    return any((path / name).is_file() for name in names)


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index, {}).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ArtifactError(f"{index} has no weight_map from tensors to files")
        files = [path / name for name in sorted(set(shards.values()))]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = [name for name in PICKLES if (path / name).is_file()]
        if pickled:
            raise Unsupported(
                f"{path} holds only pickled weights ({pickled[0]}), which can run code when loaded; "
                "save the model again with save_pretrained to get safetensors"
            )
        raise ArtifactError(f"{path} has a config but no weights (no *.safetensors)")
    for file in files:
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """Check a safetensors file's header against its size; the format is an 8-byte length, a JSON header, the data."""
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; the index names it")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 0 < length <= min(size, 100_000_000) else b""
    try:
        tensors = json.loads(header)
        end = max((t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0)
        promised = 8 + length + end
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ArtifactError(f"{file} is not a safetensors file{disguise(file)}") from None
    if size != promised:
        raise ArtifactError(f"{file} is truncated or damaged: {size} bytes, its header promises {promised}")


def disguise(file: Path) -> str:
    """Say what a file that does not parse looks like: an LFS pointer, a web page, empty, or nothing known."""
    try:
        with file.open("rb") as stream:
            head = stream.read(200)
    except OSError:
        return ""
    if head.startswith(b"version https://git-lfs"):
        return " (it is a git-lfs pointer: run `git lfs pull`)"
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html")):
        return " (it is a web page saved under this name)"
    return " (it is empty)" if not head else ""
