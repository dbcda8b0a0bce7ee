"""The README.md of an exported folder: what it is, what was measured, how to load it."""

from __future__ import annotations

import json
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


def repository_card(content: Mapping[str, Any], form: str, name: str) -> str:
    """Return the card of a model repository in a server's form: what it is, how to start and to call it."""
    title = {"triton": "Triton Inference Server", "kserve": "KServe"}[form]
    lines = [
        f"# {name} for {title}",
        "",
        f"Made by effllm from `{content['parent']['name']}` for {content['task']}, at most "
        f"{content['max_length']} tokens.",
        "",
    ]
    lines += [*(f"- {note}" for note in content["notes"]), ""] if content["notes"] else []
    return "\n".join([*lines, *(_triton(content, name) if form == "triton" else _kserve(content, name))])


def _triton(content: Mapping[str, Any], name: str) -> list[str]:
    together = (
        "An answer can depend on the other texts of its batch, so each request holds one text (`max_batch_size: 1`)."
        if content["batch_dependent"]
        else "Answers do not depend on their batch. Triton joins requests of equal length; pad within a request."
    )
    return [
        "`tritonserver --model-repository=.` in this folder. It needs a Triton whose ONNX Runtime is 1.17 or newer.",
        "",
        f"Triton runs tensors (`{name}/metadata.json`); `{name}/tokenizer/` makes them of texts. {together} "
        'Set the threads with `parameters { key: "intra_op_thread_count" value { string_value: "2" } }`.',
        "",
        "```python",
        "import numpy as np, tokenizers, tritonclient.http as triton",
        "",
        f'tokens = tokenizers.Tokenizer.from_file("{name}/tokenizer/tokenizer.json").encode("A text.")',
        "arrays = {",
        '    "input_ids": tokens.ids,',
        '    "attention_mask": tokens.attention_mask,',
        '    "token_type_ids": tokens.type_ids,',
        "}",
        'client, inputs = triton.InferenceServerClient("localhost:8000"), []',
        f'for wanted in client.get_model_metadata("{name}")["inputs"]:',
        '    inputs.append(triton.InferInput(wanted["name"], [1, len(tokens.ids)], "INT64"))',
        '    inputs[-1].set_data_from_numpy(np.array([arrays[wanted["name"]]], dtype=np.int64))',
        f'answer = client.infer("{name}", inputs)',
        "```",
        "",
    ]


def _kserve(content: Mapping[str, Any], name: str) -> list[str]:
    pair = content["task"] == "question-answering"
    single = "A [MASK] text." if content["task"] == "fill-mask" else "A text."
    texts = {"text": "Where does she live?", "text_pair": "Ada lives in Paris."} if pair else {"text": single}
    inputs = [{"name": key, "shape": [1], "datatype": "BYTES", "data": [text]} for key, text in texts.items()]
    return [
        "1. Build the image from `examples/serving/Dockerfile` of effllm and push it where the cluster can pull it.",
        "2. Put the folder `model/` where the cluster can read it: a volume, S3, …",
        "3. Write both places into `service.yaml`, and `kubectl apply -f service.yaml`.",
        "",
        "It speaks the Open Inference Protocol, version 2, with texts as BYTES:",
        "",
        "```",
        f"curl $ADDRESS/v2/models/{name}        # what it takes and gives",
        f"curl $ADDRESS/v2/models/{name}/infer -H 'content-type: application/json' \\",
        f"  -d '{json.dumps({'inputs': inputs})}'",
        "```",
        "",
    ]


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
