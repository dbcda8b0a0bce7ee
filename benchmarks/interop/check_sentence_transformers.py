"""Load each folder with sentence-transformers and print its answers as JSON.

Runs in two environments: version 6 with the torch backend, version 5.2 with the ONNX backend, which is optimum's.
"""

from __future__ import annotations

from typing import Any

import torch
from plan import answer_plan
from sentence_transformers import CrossEncoder, SentenceTransformer

PACKAGES = ("sentence-transformers", "transformers", "tokenizers", "onnxruntime")


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Return the embedding of each text, or a cross-encoder's logits of each pair."""
    # The dense file is what the library finds by itself; the quantised one is asked for by name.
    named = {"model_kwargs": {"file_name": case["file"]}} if "quantized" in (case["file"] or "") else {}
    options = {"backend": case["backend"], "device": "cpu", "local_files_only": True, **named}
    if case["task"] == "text-classification":
        loaded = f"CrossEncoder, {case['backend']}"
        scores = CrossEncoder(case["folder"], **options).predict(case["inputs"], activation_fn=torch.nn.Identity())
        return {"loaded": loaded, "outputs": [{"logits": row.tolist()} for row in scores]}
    model = SentenceTransformer(case["folder"], **options)
    modules = "+".join(type(module).__name__ for module in model)
    vectors = model.encode([text for (text,) in case["inputs"]], convert_to_numpy=True)
    return {"loaded": f"{modules}, {case['backend']}", "outputs": [{"embedding": row.tolist()} for row in vectors]}


if __name__ == "__main__":
    answer_plan(answer, PACKAGES)
