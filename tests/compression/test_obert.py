"""oBERT and the Fisher objective: against brute force on small matrices, for every task."""

from __future__ import annotations

import pytest
import torch
from conftest import HEADS, make_model
from jobs import TEXTS, make_job

from effllm.compression import parse_method
from effllm.compression.fisher import per_example_gradients, probe_loss
from effllm.compression.layers import linears, weight_of
from effllm.compression.obert import in_blocks, saliency, surgery
from effllm.errors import SettingError
from effllm.tasks import TASKS, Head

CLASSIFICATION, HEAD = TASKS["text-classification"], Head()


def make_fisher(blocks: int, size: int, gradients: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    g = torch.randn(gradients, blocks, size) @ torch.randn(size, size)
    fisher = torch.einsum("mbi,mbj->bij", g, g) / gradients + 0.1 * torch.eye(size)
    return g, fisher


def test_scores_are_those_of_the_recursion_of_the_paper():
    g, fisher = make_fisher(3, 4)
    weight = torch.randn(2, 5)
    inverse = (torch.eye(4, dtype=torch.float64) / 0.1).repeat(3, 1, 1)
    for gradient in g.double():
        moved = (inverse @ gradient[:, :, None])[:, :, 0]
        share = len(g) + (gradient * moved).sum(1)
        inverse = inverse - moved[:, :, None] * moved[:, None, :] / share[:, None, None]
    flat = inverse.diagonal(dim1=1, dim2=2).flatten()[:10].view(2, 5)
    torch.testing.assert_close(saliency(weight, fisher), weight.double().square() / (2 * flat), rtol=1e-4, atol=0)


def test_no_other_weights_lose_less():
    _, fisher = make_fisher(3, 4)
    weight, keep = torch.randn(2, 5), torch.rand(2, 5) < 0.5
    best = surgery(weight, fisher, keep)

    def loss(candidate: torch.Tensor) -> torch.Tensor:
        change = in_blocks(candidate - weight, 4)
        return torch.einsum("bi,bij,bj->", change, fisher, change)

    assert not best[~keep].any()
    assert loss(best) < loss(weight * keep)
    point = best.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    assert gradient[keep].abs().max() < 1e-5 * gradient[~keep].abs().max()


@pytest.mark.parametrize("task", HEADS)
def test_prunes_every_task_without_labels(tmp_path, task):
    job = make_job(make_model(tmp_path / "model", task=task), tmp_path, texts=TEXTS[:4], task=task)
    parse_method("obert:sparsity=0.6,gradients=8,prunings=2,pattern=global").apply(job)
    weights = [linear.weight for linear in linears(job.model).values()]
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == int(total * 0.6)


def test_groups_of_layers_give_what_all_at_once_gives(classifier, tmp_path, monkeypatch):
    results = []
    for memory in (2**31, 1):
        monkeypatch.setattr("effllm.compression.obert.MEMORY_BYTES", memory)
        job = make_job(classifier, tmp_path, texts=TEXTS[:4])
        method = parse_method("obert:gradients=4")
        names = [name for group in method._groups(job) for name in group]
        results.append({n: b for group in method._groups(job) for n, b in method._fisher(job, group).items()})
        assert names == list(linears(job.model))
    for name, blocks in results[0].items():
        torch.testing.assert_close(blocks, results[1][name])


def test_gradients_are_those_of_the_texts_alone(classifier, tmp_path):
    job = make_job(classifier, tmp_path, texts=TEXTS[:2])
    weight = job.model.base_model.get_submodule("encoder.layer.1.output.dense").weight
    source = job.source
    found = list(per_example_gradients(job.model, source.task, source.head, job.encodings(), [weight], count=5, seed=3))
    assert len(found) == 5
    assert all(g.shape == weight.shape and g.abs().sum() > 0 for (g,) in found)
    assert weight.grad is None


def test_labels_are_drawn_as_often_as_the_model_expects_them():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(4000, 3).clone().requires_grad_()
    probe_loss(CLASSIFICATION, HEAD, {"logits": logits}, torch.ones(4000, 1, dtype=torch.bool), generator).backward()
    expected = logits[0].detach().softmax(0)
    drawn = (expected - logits.grad).round().mean(0)
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((drawn - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("name", ["token-classification", "question-answering", "feature-extraction"])
def test_padding_changes_nothing(name):
    torch.manual_seed(0)
    task, mask = TASKS[name], torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    shape = (2, 5) if name == "question-answering" else (2, 5, 7)
    outputs = {key: torch.randn(shape) for key in task.outputs}
    padded = {key: torch.cat([value, torch.full_like(value[:, :2], 9.0)], dim=1) for key, value in outputs.items()}
    short = probe_loss(task, HEAD, outputs, mask, torch.Generator().manual_seed(1))
    wide = torch.cat([mask, torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(probe_loss(task, HEAD, padded, wide, torch.Generator().manual_seed(1)), short)


def test_no_sparsity_changes_nothing(classifier, tmp_path):
    job = make_job(classifier, tmp_path, texts=TEXTS[:2])
    before = {name: weight_of(job.model, name).clone() for name in linears(job.model)}
    parse_method("obert:sparsity=0,gradients=2,prunings=1").apply(job)
    assert all(torch.equal(weight_of(job.model, name), weight) for name, weight in before.items())


@pytest.mark.parametrize("spec", ["block_size=0", "gradients=0", "dampening=0", "calibration=0", "prunings=0"])
def test_refuses(spec):
    with pytest.raises(SettingError, match=spec.split("=")[0]):
        parse_method(f"obert:{spec}")
