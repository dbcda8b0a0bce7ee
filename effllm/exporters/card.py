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
    step = content["steps"][-1]
    how = step.get("method", "float32 export")
    lines = [
        "---",
        f"pipeline_tag: {content['task']}",
        f"library_name: {'sentence-transformers' if embeds else 'onnx'}",
        "tags: [onnx, effllm]",
        "---",
        "",
        f"# {content['parent']['name']} ({how})",
        "",
        f"Made by effllm from `{content['parent']['name']}` for {content['task']}: {folder.architecture}, ONNX opset "
        f"{content['opset']}, file `{content['model_file']}`, at most {content['max_length']} tokens.",
        "",
        *(f"- {note}" for note in content["notes"]),
        "",
    ]
    if content["batch_dependent"]:
        spread = content["details"]["batch_spread"]
        lines += [
            f"**An answer can depend on the other texts of its batch** (measured: up to {spread['largest']:.2g} "
            f"{spread['unit']}).",
            "",
        ]
    rows = [Row(**row) for row in content["rows"]]
    lines += ["## Measured", "", markdown_table(rows), ""]
    lines += ["## Load", "", "```python", "import effllm", 'model = effllm.open(".")', "```", ""]
    file = content["model_file"]
    if embeds:
        lines += [
            "```python",
            "from sentence_transformers import SentenceTransformer",
            f'model = SentenceTransformer(".", backend="onnx", model_kwargs={{"file_name": "{file}"}})',
            "```",
            "",
        ]
    else:
        lines += [
            "```python",
            f"from optimum.onnxruntime import {LOADERS[content['task']]}",
            f'model = {LOADERS[content["task"]]}.from_pretrained(".", file_name="{file}")',
            "```",
            "",
        ]
    return "\n".join(lines)
