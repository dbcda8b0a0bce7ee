"""Losses are sums: whatever the split of a batch and its padding, loss and gradient are the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from effllm.train.losses import LOSSES

HEADS = {
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
    "sentence-similarity": "Model",
}
PARTITIONS = (
    [[0, 1, 2, 3, 4, 5, 6, 7]],
    [[0, 1, 2], [3], [4, 5, 6, 7]],
    [[k] for k in range(8)],
    [[7, 0], [3, 5, 1], [2, 4, 6]],
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers are slower on several threads, and far slower where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str, task: str, dtype: torch.dtype, labels: int = 3) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared |= {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0}
    shared |= {"num_labels": labels} if "classification" in task else {}
    name = {"bert": "Bert", "modernbert": "ModernBert"}[family]
    if family == "modernbert":
        shared |= {"cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
        shared |= {"local_attention": 8, "global_attn_every_n_layers": 2}
    config = getattr(transformers, f"{name}Config")(**shared)
    head = HEADS[task]
    model = getattr(transformers, f"{name}{'Model' if head == 'Model' else f'For{head}'}")(config)
    return model.to(dtype).eval()


def examples(task: str, labels: int = 3) -> list[list[tuple[list[int], dict]]]:
    """Return eight examples of uneven lengths, each a list of (ids, target): two for a pair of sentences."""
    rng = np.random.default_rng(0)
    found = []
    for length in (3, 9, 4, 17, 5, 6, 12, 7):
        inputs = []
        for _ in range(2 if task == "sentence-similarity" else 1):
            own = length + len(inputs)
            ids = [1, *(int(i) for i in rng.integers(5, 40, own - 2)), 2]
            tagged = np.where(rng.random(own) < 0.6, rng.integers(0, 3, own), -100)
            tagged[1] = 0
            target = {
                "text-classification": {"labels": int(rng.integers(0, 3)) if labels > 1 else float(rng.normal())},
                "token-classification": {"labels": tagged},
                "question-answering": {"start": int(rng.integers(0, own)), "end": int(rng.integers(0, own))},
                "sentence-similarity": {"score": float(length) / 20},
            }[task]
            inputs.append((ids, target))
        found.append(inputs)
    return found


def batch(task: str, chosen: list, dtype: torch.dtype, extra: int = 0):
    """Pad examples, the first sentences before the second ones, and stack their targets."""
    rows = [example[k] for k in range(len(chosen[0])) for example in chosen]
    width = max(len(ids) for ids, _ in rows) + extra
    ids = torch.tensor([own + [0] * (width - len(own)) for own, _ in rows])
    mask = torch.tensor([[1] * len(own) + [0] * (width - len(own)) for own, _ in rows])
    targets = {}
    for name, first in rows[0][1].items():
        if isinstance(first, np.ndarray):
            stacked = [[*t[name].tolist(), *[-100] * (width - len(t[name]))] for _, t in rows]
            targets[name] = torch.tensor(stacked)
        else:
            targets[name] = torch.tensor([t[name] for _, t in rows], dtype=dtype if isinstance(first, float) else None)
    return ids, mask, targets


def loss_of(model: nn.Module, task: str, chosen: list, dtype: torch.dtype, extra: int = 0):
    ids, mask, targets = batch(task, chosen, dtype, extra)
    output = dict(model(input_ids=ids, attention_mask=mask))
    if task == "sentence-similarity":
        states, real = output["last_hidden_state"], mask[:, :, None]
        output = {"embedding": (states * real).sum(dim=1) / real.sum(dim=1)}
    return LOSSES[task](output, targets, mask == 1)


def total(model: nn.Module, task: str, partition: list[list[int]], dtype: torch.dtype, labels: int, extra: int = 0):
    """Return loss, count and gradient, summed over the parts of a batch."""
    everything = examples(task, labels)
    model.zero_grad()
    loss, count = 0.0, 0
    for part in partition:
        summed, terms = loss_of(model, task, [everything[k] for k in part], dtype, extra)
        summed.backward()
        loss, count = loss + float(summed.detach()), count + int(terms)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss, count, gradient


CASES = [(task, 3) for task in LOSSES] + [("text-classification", 1)]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize(("task", "labels"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_loss_and_gradient_do_not_depend_on_the_split(
    family: str, task: str, labels: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = build(family, task, dtype, labels)
    whole, count, gradient = total(model, task, PARTITIONS[0], dtype, labels)
    for partition in PARTITIONS[1:]:
        loss, terms, split = total(model, task, partition, dtype, labels)
        assert terms == count
        assert loss == pytest.approx(whole, rel=tolerance)
        assert (split - gradient).norm() <= tolerance * gradient.norm()
    loss, terms, padded = total(model, task, PARTITIONS[0], dtype, labels, extra=5)
    assert (terms, loss) == (count, pytest.approx(whole, rel=tolerance))
    assert (padded - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "question-answering"])
def test_without_padding_the_mean_is_that_of_transformers(task: str) -> None:
    model = build("bert", task, torch.float64)
    for example in examples(task):
        ids, mask, targets = batch(task, [example], torch.float64)
        names = {"start": "start_positions", "end": "end_positions"}
        output = model(input_ids=ids, attention_mask=mask, **{names.get(n, n): t for n, t in targets.items()})
        summed, count = LOSSES[task](output, targets, mask == 1)
        assert float((summed / count).detach()) == pytest.approx(float(output.loss.detach()), rel=1e-14)


def test_a_regression_is_the_squared_error() -> None:
    outputs, targets = {"logits": torch.tensor([[1.0], [3.0]])}, {"labels": torch.tensor([0.5, 5.0])}
    summed, count = LOSSES["text-classification"](outputs, targets, torch.ones(2, 1, dtype=torch.bool))
    assert (float(summed), int(count)) == (0.25 + 4.0, 2)


def test_several_labels_are_what_transformers_makes_of_them() -> None:
    model = build("bert", "text-classification", torch.float64, 3)
    model.config.problem_type = "multi_label_classification"
    ids, labels = torch.tensor([[1, 7, 9, 2], [1, 30, 8, 2]]), torch.tensor([[1.0, 0, 1], [0, 0, 0]]).double()
    output = model(input_ids=ids, labels=labels)
    summed, count = LOSSES["text-classification"](output, {"labels": labels}, torch.ones_like(ids) == 1)
    assert int(count) == 2
    assert float((summed / count).detach()) == pytest.approx(float(output.loss.detach()), rel=1e-14)


def test_classes_are_in_nats() -> None:
    outputs, targets = {"logits": torch.zeros(2, 4)}, {"labels": torch.tensor([0, 3])}
    summed, count = LOSSES["text-classification"](outputs, targets, torch.ones(2, 1, dtype=torch.bool))
    assert float(summed / count) == pytest.approx(np.log(4), rel=1e-6)


def test_a_pair_counts_twice_and_its_mean_is_the_squared_error_of_the_cosine() -> None:
    a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    targets = {"score": torch.tensor([0.5, 0.5, 0.5, 0.5])}
    summed, count = LOSSES["sentence-similarity"](
        {"embedding": torch.cat([a, b])}, targets, torch.ones(4, 1, dtype=torch.bool)
    )
    assert int(count) == 4
    assert float(summed / count) == pytest.approx((0.5**2 + 0.5**2) / 2, rel=1e-6)


def test_tokens_without_a_label_are_no_terms() -> None:
    logits = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0))
    outputs, targets = {"logits": logits}, {"labels": torch.tensor([[-100, 1, -100]])}
    summed, count = LOSSES["token-classification"](outputs, targets, torch.ones(1, 3, dtype=torch.bool))
    assert int(count) == 1
    assert torch.equal(summed, functional.cross_entropy(logits[0, 1:2], torch.tensor([1])))
    summed, count = LOSSES["token-classification"](
        outputs, {"labels": torch.full((1, 3), -100)}, torch.ones(1, 3, dtype=torch.bool)
    )
    assert (float(summed), int(count)) == (0.0, 0)


@pytest.mark.parametrize("task", LOSSES)
def test_half_precision_outputs_are_summed_in_single_precision(task: str) -> None:
    model = build("bert", task, torch.bfloat16)
    summed, _ = loss_of(model, task, examples(task), torch.float32)
    assert summed.dtype == torch.float32
