"""The Fisher information of masks, ranking under minima, and exchange within a block, against brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from conftest import make_model
from jobs import make_job

from effllm.compression.calibrate import feeds
from effllm.compression.fisher import probe_loss, task_outputs
from effllm.compression.importance import Ranking, diagonal, mask_gradients, masking, predicted_loss, rearranged
from effllm.compression.slicing import blocks


def test_gradients_of_masks_are_those_of_finite_differences(tmp_path: Path) -> None:
    job = make_job(make_model(tmp_path / "model", "modernbert"), tmp_path)
    job.model.double()
    block = blocks(job.model, "heads")[1]
    got = mask_gradients(job, [block], seed=3)[block]
    generator, step = torch.Generator().manual_seed(3), 1e-4
    for row, feed in zip(got[:3], feeds(job.model, job.encodings()), strict=False):
        state, losses = generator.get_state(), []
        for unit, sign in itertools.product(range(block.count), (1, -1)):
            generator.set_state(state)
            mask = torch.ones(block.count, dtype=torch.float64)
            mask[unit] += sign * step
            with torch.no_grad(), masking(job.model, {block: mask}):
                task, head = job.source.task, job.source.head
                outputs = task_outputs(job.model, task, head, feed)
                losses.append(float(probe_loss(task, head, outputs, feed["attention_mask"] == 1, generator)))
        differences = torch.tensor(losses).view(-1, 2)
        # The loss is float32, so a difference of two carries 2 ulp of it, divided by the distance.
        expected = (differences[:, 0] - differences[:, 1]) / (2 * step)
        torch.testing.assert_close(row, expected.float(), rtol=1e-2, atol=4 * 2**-23 * float(differences.max()) / step)


def test_ranking_keeps_the_best_and_some_in_each_block() -> None:
    scores = [torch.tensor([5.0, 1.0, 4.0]), torch.tensor([0.1, 0.3, 0.2])]
    ranking = Ranking.of(scores, 1)
    assert [u.tolist() for u in ranking.keep(2)] == [[0], [1]]
    assert [u.tolist() for u in ranking.keep(4)] == [[0, 1, 2], [1]]
    assert ranking.lost.tolist() == pytest.approx([10.6, 5.6, 5.3, 1.3, 0.3, 0.1, 0.0])
    assert ranking.counts[-2].tolist() == [3, 2]
    tables = [torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 10.0, 20.0, 30.0])]
    assert ranking.cost(tables).tolist() == [0, 1, 11, 12, 13, 23, 33]


def test_equal_scores_keep_the_first() -> None:
    assert [u.tolist() for u in Ranking.of([torch.ones(3), torch.ones(3)], 1).keep(4)] == [[0, 1, 2], [0]]


def test_exchange_finds_units_that_stand_in_for_each_other() -> None:
    # Units 0 and 1 all but cancel each other, so that without both hardly anything is lost.
    g = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    gradients = torch.stack([g[:, 0], -1.1 * g[:, 0], 0.9 * g[:, 1], 1.2 * g[:, 1], 3 * g[:, 2]], dim=1)
    started = Ranking.of([diagonal(gradients)], 1).keep(3)[0]
    kept = rearranged(gradients, started)
    best = min(predicted_loss(gradients, torch.tensor(k)) for k in itertools.combinations(range(5), 3))
    assert predicted_loss(gradients, kept) == pytest.approx(best, abs=1e-12)
    assert predicted_loss(gradients, started) > best + 0.1


def test_exchange_never_makes_it_worse() -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (4, 9):
        gradients = torch.randn(30, size, generator=generator) @ torch.randn(size, size, generator=generator)
        for count in range(1, size + 1):
            started = Ranking.of([diagonal(gradients)], 1).keep(count)[0]
            kept = rearranged(gradients, started)
            assert len(kept) == count
            assert predicted_loss(gradients, kept) <= predicted_loss(gradients, started) + 1e-12
