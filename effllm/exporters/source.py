"""A transformers model loaded for export or compression: checked, in float32, with the head that the task needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import transformers

from effllm.errors import ArtifactError, Unsupported, first_line
from effllm.folder import ModelFolder, disguise, has_tokenizer
from effllm.hf import load_trained, quiet
from effllm.runtime.pooling import read_pooling
from effllm.runtime.tokenizer import TextTokenizer
from effllm.tasks import Head, Task

MODEL_TYPES = frozenset({"bert", "roberta", "distilbert", "electra", "xlm-roberta", "modernbert"})
"""The encoders whose export and compression are tested; others are refused by name."""
DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""The decoders whose compression is tested."""


@dataclass(frozen=True)
class Source:
    """A loaded model with its folder, task, head and fast tokenizer."""

    folder: ModelFolder
    task: Task
    model: Any
    tokenizer: Any
    head: Head

    def text_tokenizer(self) -> TextTokenizer:
        """Return the tokenizer as the engines' inputs are made with it."""
        keeps_end = self.tokenizer.truncation_side == "left"
        return TextTokenizer.of(self.tokenizer.backend_tokenizer, self.folder, keeps_end=keeps_end)


def load_source(folder: ModelFolder, task: Task) -> Source:
    """Load a checked folder's model (float32, eval mode, for encoders with eager attention) and tokenizer.

    The source's config names the model's class, also where the folder's does not.
    Raises ArtifactError when the tokenizer is missing or the weights do not fit, Unsupported when the model type is not
    known, is already quantised, or lacks trained weights that the task needs.
    """
    kind = str(folder.config["model_type"])
    known = DECODERS if task.causal else MODEL_TYPES
    if kind not in known:
        what = f" for {task.name}" if task.causal else ""
        raise Unsupported(f"{folder.path} is a {kind!r} model; effllm handles {', '.join(sorted(known))}{what}")
    if not has_tokenizer(folder.path):
        raise ArtifactError(f"{folder.path} has no tokenizer files (tokenizer.json, vocab.txt, …)")
    # Only an export needs the eager form, whose causal mask takes memory for each text.
    model = load_trained(folder, task.auto_class, attention="sdpa" if task.causal else "eager")
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        reason, file = first_line(error), folder.path / "tokenizer.json"
        hint = disguise(file) if file.is_file() else ""
        raise ArtifactError(
            f"the tokenizer of {folder.path} cannot be loaded by transformers{hint}: {reason}"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise Unsupported(f"{folder.path} has no fast tokenizer ({type(tokenizer).__name__} cannot be converted)")
    head = Head(
        labels=tuple(folder.labels_of(task.auto_class)),
        pooling=read_pooling(folder.path).mode,
        problem_type=folder.config.get("problem_type"),
    )
    if not folder.config.get("architectures"):
        named = folder.config | {"architectures": [type(model).__name__]}
        folder = dataclasses.replace(folder, config=named)
    return Source(folder, task, model, tokenizer, head)
