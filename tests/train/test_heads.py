"""The head that a model is fine-tuned with, the folder's own as far as its labels are those of the data, and frozen
where no loss reaches it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, LABELS, make_model

from effllm.folder import open_folder
from effllm.hf import load
from effllm.tasks import TASKS, Head
from effllm.train.heads import load_for_task
from effllm.train.settings import FinetuneSettings
from effllm.train.supervised import SupervisedModel, freeze_unreached

TASK = TASKS["text-classification"]
INPUTS = {"input_ids": torch.tensor([[2, 7, 11, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}


def logits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The logits of one text by the names of their labels."""
    with torch.no_grad():
        found = model.eval()(**INPUTS).logits
    return {name: found[..., index] for index, name in model.config.id2label.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("task", LABELS)
def test_labels_in_another_order_keep_their_logits(architecture: str, task: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", architecture, task)
    labels = sorted(LABELS[task], reverse=True)
    model = load_for_task(open_folder(folder), TASKS[task], Head(tuple(labels)), dropout=0.0, seed=0)
    own, permuted = logits(load(folder)), logits(model)
    assert list(permuted) == labels != list(own)
    for name in labels:
        torch.testing.assert_close(permuted[name], own[name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_as_many_other_labels_get_a_new_last_layer(architecture: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", architecture)
    heads = []
    for labels in (LABELS["text-classification"], ["anger", "joy", "fear"]):
        model = load_for_task(open_folder(folder), TASK, Head(tuple(labels)), dropout=0.0, seed=0)
        heads.append({name: p for name, p in model.named_parameters() if len(p) == 3})
    kept, drawn = heads
    assert kept.keys() == drawn.keys()
    weight, bias = drawn.values()
    assert not any(torch.isclose(a, b).any() for a, b in zip(kept.values(), drawn.values(), strict=True))
    assert 0 < float(weight.detach().std()) < 0.3
    assert not bias.detach().any()


def test_a_pooler_that_a_task_does_not_use_is_frozen() -> None:
    """SqueezeBERT always has one; two processes would wait for its gradient."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.SqueezeBertConfig(vocab_size=50, embedding_size=16, num_labels=3, **shape)
    model = transformers.SqueezeBertForTokenClassification(config)
    module = SupervisedModel(model, TASKS["token-classification"], Head(("a", "b", "c")), FinetuneSettings())
    freeze_unreached(module)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"transformer.pooler.dense.weight", "transformer.pooler.dense.bias"}


def test_numbers_are_the_places_of_the_folders_labels(classifier: Path) -> None:
    model = load_for_task(open_folder(classifier), TASK, Head(("0", "1", "2")), dropout=0.0, seed=0)
    assert torch.equal(model.classifier.weight, load(classifier).classifier.weight)


def test_a_regression_keeps_the_one_output_of_the_folder(classifier: Path, tmp_path: Path) -> None:
    load_for_task(open_folder(classifier), TASK, Head(("score",)), dropout=0.0, seed=0).save_pretrained(tmp_path)
    model = load_for_task(open_folder(tmp_path), TASK, Head(("rating",)), dropout=0.0, seed=0)
    assert torch.equal(model.classifier.weight, load(tmp_path).classifier.weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("component", ["hidden", "attention"])
def test_what_no_loss_reaches_is_frozen(architecture: str, component: str, tmp_path: Path) -> None:
    folder = open_folder(make_model(tmp_path / "model", architecture))
    student, teacher = (
        load_for_task(folder, TASK, Head(tuple(LABELS["text-classification"])), dropout=0.0, seed=0) for _ in range(2)
    )
    settings = FinetuneSettings(**{"label_weight": 0.0, "distil_logits": 0.0, f"distil_{component}": 1.0})
    module = SupervisedModel(student, TASK, Head(), settings, teacher)
    freeze_unreached(module)
    ids = torch.tensor([[2, 7, 11, 3, 0], [2, 40, 12, 13, 3]])
    module(ids, (ids > 0).long(), torch.zeros_like(ids)).sum().backward()
    reached = {name for name, p in module.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in module.named_parameters() if p.requires_grad}
    assert any("embeddings" in name for name in reached)
    assert not any("classifier" in name for name in reached)
