"""Load each folder with optimum-onnx's ORTModelFor… and print its answers as JSON. Runs in optimum's environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optimum.onnxruntime
import torch
from plan import answer_plan
from transformers import AutoTokenizer

CLASSES = {
    "feature-extraction": "ORTModelForFeatureExtraction",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    "question-answering": "ORTModelForQuestionAnswering",
    "fill-mask": "ORTModelForMaskedLM",
}
PACKAGES = ("optimum-onnx", "transformers", "tokenizers", "onnxruntime")


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Return the model's outputs for each input, without padding, and its label names."""
    name = CLASSES[case["task"]]
    # The dense file is what optimum finds by itself; the quantised one is asked for by name.
    named = {} if case["file"] == "onnx/model.onnx" else {"subfolder": "onnx", "file_name": Path(case["file"]).name}
    model = getattr(optimum.onnxruntime, name).from_pretrained(case["folder"], **named)
    tokenizer = AutoTokenizer.from_pretrained(case["folder"])
    batch = tokenizer(*map(list, zip(*case["inputs"], strict=True)), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        raw = model(**batch)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    outputs = []
    for row, length in enumerate(lengths):
        if case["task"] == "feature-extraction":
            mean = raw.last_hidden_state[row, :length].numpy().mean(axis=0)
            outputs.append({"embedding": (mean / np.linalg.norm(mean)).tolist()})
        else:
            per_text = case["task"] == "text-classification"
            outputs.append({key: (raw[key][row] if per_text else raw[key][row, :length]).tolist() for key in raw})
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return {"loaded": name, "outputs": outputs, "labels": labels}


if __name__ == "__main__":
    answer_plan(answer, PACKAGES)
