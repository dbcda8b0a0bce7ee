"""`effllm predict`."""

from __future__ import annotations

import json
from typing import Any

import click

from effllm.cli.options import TASK


@click.command(
    epilog="""\b
Examples:
  effllm predict bert "The quick brown fox [MASK] over the lazy dog."
  effllm predict sst2-int8 "A quiet, lovely film." "Two hours that I want back."
  effllm predict squad-int8 --pair "Where does she live?" "Ada moved to Paris in 1840."
  effllm predict minilm-int8 --pair "A cat sits." "A kitten is sitting."
"""
)
@click.argument("model")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT…")
@click.option("--pair", is_flag=True, help="Take the texts two by two: question and passage, or two sentences.")
@TASK
@click.option("--json", "as_json", is_flag=True, help="Print one JSON value per answer.")
def predict(model: str, texts: tuple[str, ...], pair: bool, task: str | None, as_json: bool) -> None:
    """Answer TEXT… with MODEL."""
    from effllm.cli.console import say
    from effllm.errors import SettingError
    from effllm.runtime.predictor import Predictor

    if pair and len(texts) % 2:
        raise SettingError("--pair takes an even number of texts")
    if any(not text.strip() for text in texts):
        raise SettingError("a text is empty")
    if pair and task is None:
        task = _pair_task(model)
    predictor = Predictor.open(model, task=task)
    inputs = list(zip(texts[::2], texts[1::2], strict=True)) if pair else [(text, None) for text in texts]
    for text, second in inputs:
        answer = predictor.predict(text, second)
        click.echo(json.dumps(_plain(answer), ensure_ascii=False) if as_json else _readable(answer))
        cut = sum(e.truncated_tokens for e in predictor.encode_one(text, second))
        if cut:
            say(f"{cut} tokens were cut; the model takes {predictor.tokenizer.max_length}")


def _pair_task(model: str) -> str | None:
    """Return sentence-similarity for embedding models, whose own task takes single texts."""
    from effllm.folder import open_folder
    from effllm.tasks import task_of
    from effllm.variant import is_variant, read_manifest

    folder = open_folder(model, weights=False)
    name = read_manifest(folder.path)["task"] if is_variant(folder.path) else task_of(folder).name
    return "sentence-similarity" if name == "feature-extraction" else None


def _plain(value: Any) -> Any:
    """Return an answer as JSON values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in {"embeddings", "index", "logits"}}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _readable(answer: Any) -> str:
    """Return an answer as text."""
    if hasattr(answer, "tolist"):
        shown = ", ".join(f"{x:.4f}" for x in answer[:6])
        return f"embedding of {len(answer)} numbers: [{shown}, …]  (--json prints all)"
    if "answer" in answer:
        return f"{answer['answer']!r}  (characters {answer['start']}–{answer['end']}, score {answer['score']:.2f})"
    if "similarity" in answer:
        return f"similarity {answer['similarity']:.4f}"
    if "perplexity" in answer:
        return "perplexity {perplexity:.2f} over {tokens} tokens".format(**answer)
    return _named(answer)


def _named(answer: Any) -> str:
    """Return an answer of a model's own names, which someone else chose, without what would steer a terminal."""
    from effllm.report.text import plain

    if "masks" in answer:
        return "\n".join(
            "  ".join(f"{plain(c['token'])} ({c['score']:.3f})" for c in mask["candidates"]) for mask in answer["masks"]
        )
    if "words" in answer:
        return "\n".join(
            f"{word}\t{plain(tag)}\t{score:.3f}"
            for word, tag, score in zip(answer["words"], answer["tags"], answer["scores"], strict=True)
        )
    likeliest = f"{plain(answer['label'])}  ({answer['score']:.4f})"
    labels = answer.get("labels")
    return likeliest if labels is None else f"{plain(', '.join(labels)) or 'none'}  (likeliest: {likeliest})"
