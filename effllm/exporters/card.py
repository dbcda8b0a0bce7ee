"""The README.md of an exported folder: what it is, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effllm.folder import ModelFolder
from effllm.report import markdown_table
from effllm.rows import Row

LOADERS = {
    "feature-extraction": "ORTModelForFeatureExtraction",
    "sentence-similarity": "ORTModelForFeatureExtraction",
    "fill-mask": "ORTModelForMaskedLM",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    "question-answering": "ORTModelForQuestionAnswering",
}


def model_card(content: Mapping[str, Any], folder: ModelFolder) -> str:
    """Return the card of a folder with the given manifest content, in Markdown with the hub's metadata header."""
    embeds = content["task"] in {"feature-extraction", "sentence-similarity"}
    how = " + ".join(step["method"] for step in content["steps"] if "method" in step) or "float32 export"
    graph = content["model_file"]
    lines = [
        "---",
        f"pipeline_tag: {content['task']}",
        f"library_name: {'sentence-transformers' if embeds else 'onnx' if graph else 'transformers'}",
        f"tags: [{'onnx, ' if graph else ''}effllm]",
        "---",
        "",
        f"# {content['parent']['name']} ({how})",
        "",
        f"Made by effllm from `{content['parent']['name']}` for {content['task']}: {folder.architecture}, "
        + (f"ONNX opset {content['opset']}, file `{graph}`, " if graph else "")
        + f"at most {content['max_length']} tokens.",
        "",
        *(f"- {note}" for note in content["notes"]),
        "",
    ]
    if content["batch_dependent"]:
        spread = content["details"].get("batch_spread")
        measured = f" (measured: up to {spread['largest']:.2g} {spread['unit']})" if spread else ""
        lines += [f"**An answer can depend on the other texts of its batch**{measured}.", ""]
    rows = [Row(**row) for row in content["rows"]]
    lines += ["## Measured", "", markdown_table(rows), ""]
    lines += ["## Load", "", "```python", "import effllm", 'model = effllm.open(".")', "```", ""]
    if not graph:
        lines += _from_pretrained(folder)
    elif embeds:
        lines += [
            "```python",
            "from sentence_transformers import SentenceTransformer",
            f'model = SentenceTransformer(".", backend="onnx", model_kwargs={{"file_name": "{graph}"}})',
            "```",
            "",
        ]
    else:
        lines += [
            "```python",
            f"from optimum.onnxruntime import {LOADERS[content['task']]}",
            f'model = {LOADERS[content["task"]]}.from_pretrained(".", file_name="{graph}")',
            "```",
            "",
        ]
    return "\n".join(lines)


def _from_pretrained(folder: ModelFolder) -> list[str]:
    """Return how transformers loads the folder: with an import of effllm where its sizes need it."""
    special = (folder.config.get("quantization_config") or {}).get("quant_method") == "effllm"
    return [
        "```python",
        *(["import effllm.hf  # gives the pruned layers their sizes"] if special else []),
        f"from transformers import {folder.architecture}",
        f'model = {folder.architecture}.from_pretrained(".")',
        "```",
        "",
    ]
