"""A trained encoder with the head that a task needs, ready to fine-tune."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import transformers

from effllm.errors import ArtifactError, SettingError, Unsupported
from effllm.folder import ModelFolder, read_json
from effllm.hf import load_folder
from effllm.tasks import Head, Task
from effllm.tasks.multi_label import MULTI_LABEL
from effllm.tasks.task import label_index
from effllm.tasks.text_classification import gives_each_label
from effllm.train.distil import CAPTURING, register
from effllm.train.dropout import rates

FINETUNED = ("text-classification", "token-classification", "question-answering", "sentence-similarity")


def load_for_task(folder: ModelFolder, task: Task, head: Head, *, dropout: float, seed: int) -> Any:
    """Return the model with the task's head, float32.

    The head is the folder's own as far as it fits: its last layer is put in the order of `head.labels` where it has the
    same ones, and drawn by the seed where it has others. They are one name for a regression head, which any head with
    one output is, and none for tasks without labels. `dropout` of -1 leaves the config's. Raises
    Unsupported for a task that is not fine-tuned or a model that another tool quantised, ArtifactError when weights of
    the encoder are missing or have other sizes than the config says.
    """
    check_task(task)
    register()
    torch.manual_seed(seed)
    settings = {**_label_settings(task, head), **_dropout_settings(folder, dropout)}
    model, info = load_folder(folder, task.auto_class, attention=CAPTURING, new_head=True, settings=settings)
    unfit = sorted(key for key, *_ in info["mismatched_keys"] if _is_encoder(key, model))
    if unfit:
        raise ArtifactError(f"{folder.path}: the size of {unfit[0]} in the weights is not what config.json says")
    missing = sorted(key for key in info["missing_keys"] if _is_encoder(key, model))
    if missing:
        raise ArtifactError(f"{folder.path} lacks weights of its encoder, such as {missing[0]}")
    drawn = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if len(head.labels) > 1:
        # A checkpoint's labels stand in its own config, where `folder` may still have those that the run began with.
        _fit_last_layer(
            model, ModelFolder(folder.path, read_json(folder.path / "config.json")).labels, head.labels, drawn
        )
    if task.name == "sentence-similarity":  # pooled from the token states; no loss would ever reach the pooler
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("pooler" not in name)
    return model


def check_task(task: Task) -> None:
    """Raise Unsupported for a task that is not fine-tuned."""
    if task.name not in FINETUNED:
        raise Unsupported(f"{task.name} is not fine-tuned; the tasks are {', '.join(FINETUNED)}")


def _label_settings(task: Task, head: Head) -> dict[str, Any]:
    if task.name not in {"text-classification", "token-classification"}:
        return {}
    settings: dict[str, Any] = {
        "id2label": dict(enumerate(head.labels)),
        "label2id": {label: index for index, label in enumerate(head.labels)},
    }
    kind = "single_label_classification" if len(head.labels) > 1 else "regression"
    kind = MULTI_LABEL if gives_each_label(task, head) else kind
    return settings | ({"problem_type": kind} if task.name == "text-classification" else {})


def _dropout_settings(folder: ModelFolder, dropout: float) -> dict[str, float]:
    """Return the config's dropout probabilities, by whatever names the architecture gives them, set to `dropout`."""
    if dropout < 0:
        return {}
    config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False).to_dict()
    return dict.fromkeys(rates(config), dropout)


def _fit_last_layer(model: Any, own: Sequence[str], labels: Sequence[str], drawn: Collection[str]) -> None:
    """Put the rows of the head's last layer in the order of `labels`, or draw it anew where `own` are others.

    Nothing is done where the layer is among the weights that were drawn when the model was loaded.
    """
    encoder = f"{model.base_model_prefix}."
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.startswith(encoder)]
    name = linears[-1]
    if f"{name}.weight" in drawn:
        return
    layer = model.get_submodule(name)
    rows = _places(labels, own)
    if rows is None:
        fresh = type(model)._from_config(model.config)  # what a layer is drawn from is the architecture's own
        layer.load_state_dict(fresh.get_submodule(name).state_dict())
        return
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[rows])


def _places(labels: Sequence[str], own: Sequence[str]) -> list[int] | None:
    """Return where each label stands in `own`, as examples are read; None where the two are not the same labels."""
    try:
        places = [label_index(label, own) for label in labels]
    except SettingError:
        return None
    return places if sorted(places) == list(range(len(own))) else None


def _is_encoder(key: str, model: Any) -> bool:
    """Return whether a weight belongs to the encoder's layers or embeddings, and not to a head or pooler."""
    prefix = f"{model.base_model_prefix}."
    inside = key.startswith(prefix) or model.base_model is model
    return inside and "pooler" not in key
