"""How much heads and neurons matter: the Fisher information of a mask variable on each, which is 1 where it is there.

Written from Kwon et al. 2022, "A fast post-training pruning framework for transformers". Around the whole model, the
loss of taking units out is about half of (1 - m)ᵀ I (1 - m), where I is the mean of g gᵀ over texts, and g the gradient
by the mask variables at 1. Its diagonal ranks the units of all layers (section 4.1); within a layer the whole of it
tells which units can stand in for each other (section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effllm.compression.fisher import per_example_gradients
from effllm.compression.method import WeightsJob
from effllm.compression.slicing import Block


@contextmanager
def masking(model: Any, masks: Mapping[Block, torch.Tensor]) -> Iterator[None]:
    """Multiply what enters each block's output layer, unit by unit, with a mask (count,) while the context lasts."""
    handles = []
    for block, mask in masks.items():

        def scale(_: nn.Module, args: Any, mask: torch.Tensor = mask, size: int = block.size) -> Any:
            return (args[0] * mask.repeat_interleave(size),)

        handles.append(model.base_model.get_submodule(block.output).register_forward_pre_hook(scale))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mask_gradients(job: WeightsJob, chosen: Sequence[Block], seed: int) -> dict[Block, torch.Tensor]:
    """Return for each block the gradients by its mask variables, (texts, count), float32, a row for each text."""
    masks = {block: torch.ones(block.count, requires_grad=True) for block in chosen}
    encodings = job.encodings()
    with masking(job.model, masks):
        rows = list(
            per_example_gradients(
                job.model,
                job.source.task,
                job.source.head,
                encodings,
                list(masks.values()),
                count=len(encodings),
                seed=seed,
                track=job.track,
                what="Fisher information",
            )
        )
    return {block: torch.stack(column) for block, column in zip(chosen, zip(*rows, strict=True), strict=True)}


def diagonal(gradients: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of the Fisher information from gradients (texts, count): (count,), float64."""
    return gradients.double().square().mean(dim=0)


def predicted_loss(gradients: torch.Tensor, kept: torch.Tensor) -> float:
    """Return half of (1 - m)ᵀ I (1 - m) for one block, where `kept` are the numbers of the units that stay."""
    gone = torch.ones(gradients.shape[1], dtype=torch.float64)
    gone[kept] = 0
    return float((gradients.double() @ gone).square().mean()) / 2


@dataclass(frozen=True)
class Ranking:
    """The units of several blocks, n in all, from the one to keep first to the one to drop first.

    `block` and `unit` (n,) say which; `lost` (n + 1,) is the score of the others when the first so many stay, `counts`
    (n + 1, blocks) how many units each block then has.
    """

    block: torch.Tensor
    unit: torch.Tensor
    lost: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, scores: Sequence[torch.Tensor], least: int) -> Ranking:
        """Rank by score over all blocks, after the `least` best of each block, which no block can do without."""
        block = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
        unit = torch.cat([torch.arange(len(s)) for s in scores])
        value = torch.cat(list(scores)).double()
        place = torch.cat([s.argsort(descending=True, stable=True).argsort() for s in scores])
        order = value.argsort(descending=True, stable=True)
        order = order[(place[order] >= least).to(torch.int8).argsort(stable=True)]
        member = torch.nn.functional.one_hot(block[order], len(scores))
        counts = torch.cat([torch.zeros_like(member[:1]), member.cumsum(0)])
        lost = torch.cat([value[order].flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        return cls(block[order], unit[order], lost, counts)

    def keep(self, count: int) -> list[torch.Tensor]:
        """Return for each block the numbers of its units among the first `count`, ascending."""
        chosen = self.block[:count], self.unit[:count]
        return [chosen[1][chosen[0] == i].sort().values for i in range(self.counts.shape[1])]

    def cost(self, tables: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what the first so many units cost, (n + 1,); a block's table says what so many of its units cost."""
        return torch.stack([table[self.counts[:, i]] for i, table in enumerate(tables)]).sum(dim=0)


def rearranged(gradients: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return as many units of one block with a predicted loss that is not larger, ascending.

    Units that are out, the most important first, change places with the one that lowers the loss most, where one does
    (Kwon et al. 2022, section 4.2). `gradients` are (texts, count), `kept` the units to start from.
    """
    fisher = gradients.double().T @ gradients.double() / len(gradients)
    own = fisher.diagonal()
    stays = torch.zeros(len(fisher), dtype=torch.bool)
    stays[kept] = True
    pull = fisher[:, ~stays].sum(dim=1)
    out = (~stays).nonzero()[:, 0]
    for i in out[own[out].argsort(descending=True, stable=True)]:
        # (1 - m)ᵀ I (1 - m) after i comes in and j goes out, minus the same before.
        change = own[i] - 2 * pull[i] + own + 2 * pull - 2 * fisher[i]
        j = int(torch.where(stays, change, torch.inf).argmin())
        if change[j] < -1e-12 * own.sum():
            stays[i], stays[j] = True, False
            pull += fisher[:, j] - fisher[:, i]
    return stays.nonzero()[:, 0]
