"""Load each folder as a custom model of fastembed and print its embeddings as JSON. Runs in fastembed's environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from plan import answer_plan

PACKAGES = ("fastembed", "tokenizers", "onnxruntime")


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Return the embedding of each text."""
    folder = Path(case["folder"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = f"effllm/{case['name']}"
    TextEmbedding.add_custom_model(
        model=name,
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf=name),
        dim=config["hidden_size"],
        model_file=case["file"],
    )
    model = TextEmbedding(model_name=name, specific_model_path=str(folder))
    vectors = model.embed([text for (text,) in case["inputs"]])
    return {"loaded": "TextEmbedding", "outputs": [{"embedding": vector.tolist()} for vector in vectors]}


if __name__ == "__main__":
    answer_plan(answer, PACKAGES)
