"""A model that answers: tokenizer, engine and task under one name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effllm import machine
from effllm.errors import ArtifactError, SettingError, Unsupported
from effllm.folder import ONNX_FILES, ModelFolder, open_folder
from effllm.runtime.engine import Engine, open_engine
from effllm.runtime.pooling import read_pooling
from effllm.runtime.tokenizer import INPUTS, Encoding, TextTokenizer, pad_batch
from effllm.tasks import Example, Head, Task, task_of
from effllm.tasks.task import Outputs
from effllm.variant import Variant, is_variant


@dataclass(frozen=True)
class Answer:
    """A task's answer to one example, with the raw outputs it was made from and the tokens that were cut off."""

    value: Any
    outputs: list[Outputs]
    truncated_tokens: int


class Predictor:
    """A loaded model. `name` labels it in tables; answers come in the order of the examples."""

    def __init__(
        self,
        name: str,
        folder: ModelFolder,
        task: Task,
        tokenizer: TextTokenizer,
        engine: Engine,
        *,
        batch_dependent: bool = False,
    ) -> None:
        self.name = name
        self.folder = folder
        self.task = task
        self.tokenizer = tokenizer
        self.engine = engine
        self.batch_dependent = batch_dependent
        self.head = Head(
            labels=tuple(folder.labels_of(task.auto_class)),
            pooling=read_pooling(folder.path).mode,
            problem_type=folder.config.get("problem_type"),
        )

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        task: str | None = None,
        engine: str | None = None,
        file: str | None = None,
        threads: int | None = None,
        name: str | None = None,
        spin: bool = True,
    ) -> Predictor:
        """Load a model folder or hub id.

        An effllm folder is checked against its manifest first. The engine defaults to ONNX Runtime where the folder
        holds an ONNX file, else torch; `file` chooses among several ONNX files. `threads` defaults to the cores that
        this process may use; `spin` is `open_engine`'s. Raises ArtifactError, SettingError or Unsupported, never a
        half-loaded model.
        """
        folder = open_folder(model, weights=False)
        variant = Variant.open(folder.path) if is_variant(folder.path) else None
        chosen = task_of(folder, task or (variant.task if variant else None))
        torch = engine in {"torch", "torch-bf16"} or (chosen.causal and engine is None)
        onnx_file = None if torch else _onnx_file(folder.path, variant, file)
        if onnx_file is None:
            if engine not in {None, "torch", "torch-bf16"}:
                raise ArtifactError(f"{folder.path} holds no ONNX file; run `effllm export` first or use engine torch")
            folder = open_folder(model)
        engine = engine or ("torch" if onnx_file is None else "onnxruntime")
        loaded = open_engine(
            engine,
            onnx_file or folder.path,
            auto_class=chosen.auto_class,
            threads=threads or machine.usable_cores(),
            spin=spin,
        )
        unknown = [name for name in getattr(loaded, "inputs", ()) if name not in INPUTS]
        if unknown:
            known = ", ".join(INPUTS)
            hint = "; its weights run with engine torch" if folder.has_weights else ""
            raise Unsupported(f"{onnx_file} wants the input {unknown[0]!r}, effllm gives {known}{hint}")
        return cls(
            name or folder.name,
            folder,
            chosen,
            TextTokenizer.open(folder),
            loaded,
            batch_dependent=bool(variant and variant.batch_dependent),
        )

    def encode(self, examples: Iterable[Example]) -> list[list[Encoding]]:
        """Tokenise examples, each into the one or more inputs that its task makes of it."""
        return [self.task.encode(self.tokenizer, example) for example in examples]

    def run(self, encodings: Sequence[Encoding], batch_size: int | None = None) -> list[Outputs]:
        """Run encodings in batches of like length and return each one's own outputs, padding removed.

        A batch holds at most `batch_size` encodings, or as many as the task's token budget allows.
        """
        results: list[Outputs] = [{} for _ in encodings]
        for batch in batches([len(e) for e in encodings], self.task.batch_tokens, batch_size):
            for index, outputs in zip(batch, self.run_batch([encodings[i] for i in batch]), strict=True):
                results[index] = outputs
        return results

    def run_batch(self, encodings: Sequence[Encoding]) -> list[Outputs]:
        """Run encodings as one padded batch and return what the task keeps of each one's outputs, padding removed."""
        output = self.engine.run(pad_batch(encodings, self.tokenizer.pad_id))
        missing = [name for name in self.task.outputs if name not in output]
        if missing:
            raise ArtifactError(f"{self.name} has no output {missing[0]!r}; its outputs: {', '.join(output)}")
        return [
            self.task.condense(
                encoding,
                {
                    name: output[name][row, : len(encoding)] if self.task.per_token else output[name][row]
                    for name in self.task.outputs
                },
            )
            for row, encoding in enumerate(encodings)
        ]

    def answers(self, examples: Sequence[Example], chunk: int = 128, batch_size: int | None = None) -> Iterator[Answer]:
        """Answer examples in order, `chunk` of them in memory at a time."""
        for start in range(0, len(examples), chunk):
            part = examples[start : start + chunk]
            encoded = self.encode(part)
            outputs = self.run([e for group in encoded for e in group], batch_size)
            position = 0
            for example, group in zip(part, encoded, strict=True):
                own = outputs[position : position + len(group)]
                position += len(group)
                value = self.task.decode(example, group, own, self.head)
                yield Answer(value, own, sum(e.truncated_tokens for e in group))

    def encode_one(self, text: str, pair: str | None = None) -> list[Encoding]:
        """Tokenise one text or pair as `predict` does; `truncated_tokens` tells what was cut."""
        return self.task.encode(self.tokenizer, Example(text, pair))

    def predict(self, text: str, pair: str | None = None) -> Any:
        """Answer one text (or a pair: two sentences, or a question and its passage); see the task's `decode`."""
        if self.task.pairs == ("never" if pair is not None else "must"):
            raise SettingError(f"{self.task.name} takes {'one text' if pair is not None else 'two texts'}")
        return next(self.answers([Example(text, pair)])).value

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the unit-length embeddings of texts as a float32 array (texts, H); no texts make an array (0, H).

        Raises SettingError where the model's task is another, or for no texts where its config does not tell H.
        """
        if self.task.name not in {"feature-extraction", "sentence-similarity"}:
            raise SettingError(f"{self.name} answers {self.task.name}; embeddings need feature-extraction")
        examples = [Example(text) for text in texts]
        if not examples:
            if not self.folder.hidden_size:
                raise SettingError(f"{self.name}: no texts were given, and its config names no hidden_size")
            return np.empty((0, self.folder.hidden_size), dtype=np.float32)
        extraction = task_of(self.folder, "feature-extraction")
        view = Predictor(self.name, self.folder, extraction, self.tokenizer, self.engine)
        return np.stack([answer.value for answer in view.answers(examples)])


def batches(lengths: Sequence[int], max_tokens: int, max_size: int | None = None) -> Iterator[list[int]]:
    """Group indices by length so that each group, padded to its longest, has at most `max_tokens` tokens."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and ((len(group) + 1) * lengths[index] > max_tokens or len(group) == max_size):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _onnx_file(path: Path, variant: Variant | None, wanted: str | None) -> Path | None:
    if wanted is not None:
        file = path / wanted
        if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
            raise ArtifactError(f"{path} holds no file {wanted!r}")
        return file
    if variant:
        name = variant.manifest.get("model_file")
        return path / name if name else None
    return next((path / name for name in ONNX_FILES if (path / name).is_file()), None)


def open_predictor(
    model: str | Path, *, task: str | None = None, engine: str | None = None, threads: int | None = None
) -> Predictor:
    """Load a model folder or hub id and return what answers with it; see `Predictor.open`."""
    return Predictor.open(model, task=task, engine=engine, threads=threads)
