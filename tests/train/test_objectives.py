"""The head on masked positions gives the gradient of the head on all, in less memory; pairs are read per sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_config
from test_attention import random_model
from torch.nn import functional

from effllm.errors import SettingError, Unsupported
from effllm.train.attention import NAME, register, sequence_index
from effllm.train.objectives import MaskedLanguageModel

LENGTHS = [20, 9, 13]


def packed_batch(vocabulary: int = 300) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    total = sum(LENGTHS)
    masked = torch.sort(torch.randperm(total, generator=generator)[: total // 4]).values
    return {
        "input_ids": torch.randint(5, vocabulary, (total,), generator=generator),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]),
        "type_ids": torch.zeros(total, dtype=torch.int64),
        "sequence_index": torch.from_numpy(sequence_index(np.array(LENGTHS))),
        "masked_positions": masked,
        "labels": torch.randint(5, vocabulary, (len(masked),), generator=generator),
        "pair_labels": torch.tensor([1, 0, -100]),
    }


def unpacked_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a dense head over each sequence alone."""
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["masked_positions"]] = batch["labels"]
    total = torch.zeros(())
    for ids, own in zip(batch["input_ids"].split(LENGTHS), labels.split(LENGTHS), strict=True):
        total = total + functional.cross_entropy(model(input_ids=ids[None]).logits[0], own, reduction="sum")
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_the_dense_head(architecture: str) -> None:
    register()
    batch = packed_batch()
    dense, sparse = random_model(architecture, "eager"), random_model(architecture, NAME)
    expected = unpacked_loss(dense, batch)
    expected.backward()
    got = MaskedLanguageModel(sparse)(**batch)[0]
    got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    own = dict(sparse.named_parameters())
    for name, parameter in dense.named_parameters():
        reference = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        found = own[name].grad if own[name].grad is not None else torch.zeros_like(parameter)
        assert (found - reference).norm() <= 1e-5 * reference.norm() + 1e-6, name


def saved_bytes(run: Any) -> int:
    """The bytes that autograd keeps for the backward pass."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def test_the_head_keeps_at_most_35_percent_of_the_dense_memory_at_20_percent_masks() -> None:
    register()
    config = transformers.BertConfig(
        vocab_size=8192, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation=NAME)
    total = 512
    ids = torch.randint(5, 8192, (total,))
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(128).repeat(4),
        "type_ids": torch.zeros_like(ids),
        "sequence_index": torch.arange(512).view(4, 128),
        "pair_labels": torch.full((4,), -100),
    }
    few, everything = torch.arange(0, total, 5), torch.arange(total)
    module = MaskedLanguageModel(model)
    sparse = saved_bytes(lambda: module(**batch, masked_positions=few, labels=ids[few]))
    dense = saved_bytes(lambda: module(**batch, masked_positions=everything, labels=ids))
    assert sparse <= 0.35 * dense


def test_pairs_are_read_from_the_first_token_of_each_sequence() -> None:
    register()
    torch.manual_seed(0)
    dense, sparse = (
        transformers.AutoModelForPreTraining.from_config(
            make_config("bert", 300, None), attn_implementation=implementation
        ).eval()
        for implementation in ("eager", NAME)
    )
    sparse.load_state_dict(dense.state_dict())
    batch = packed_batch()
    logits = torch.cat([dense(input_ids=i[None]).seq_relationship_logits for i in batch["input_ids"].split(LENGTHS)])
    expected = functional.cross_entropy(logits, batch["pair_labels"], reduction="sum")
    sums = MaskedLanguageModel(sparse, "mlm+sop")(**batch)
    assert sums[1].item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_objective_that_the_model_has_no_head_for_is_refused() -> None:
    with pytest.raises(Unsupported, match="pair head"):
        MaskedLanguageModel(random_model("modernbert", "eager"), "mlm+sop")
    with pytest.raises(SettingError, match="objective"):
        MaskedLanguageModel(random_model("bert", "eager"), "nsp")
