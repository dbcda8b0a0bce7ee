"""Dropout is a function of the sequence: the same alone, padded, packed, and however a batch is split."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_config, make_model
from runs import assert_same_run, assert_same_trace, finish, run_references, settings
from test_finetune import run, tagged, write_jsonl
from torch.nn import functional

from effllm.data.draws import DROPOUT, draw, mix, stream_keys
from effllm.data.vocabulary import Vocabulary
from effllm.runtime.tokenizer import Encoding, TextTokenizer
from effllm.train import dropout
from effllm.train.attention import NAME, register, sequence_index
from effllm.train.dropout import SequenceDropout
from effllm.train.loop import to_tensors
from effllm.train.models import build_model
from effllm.train.objectives import MaskedLanguageModel
from effllm.train.pretrain import PretrainSource
from effllm.train.settings import FinetuneSettings
from effllm.train.supervised import INPUT_KEYS, Item, Passes, SupervisedSource, Terms

KEYS = stream_keys(DROPOUT, 7, 0, np.arange(3)).view(np.int64)
RATE = 0.25


def keys(*chosen: int) -> torch.Tensor:
    return torch.from_numpy(KEYS[list(chosen)])


def test_the_words_are_those_of_the_draws() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    assert np.array_equal(dropout.mix(torch.from_numpy(words.view(np.int64))).numpy().view(np.uint64), mix(words))


def test_what_is_dropped_is_drawn_from_the_key_the_call_and_the_place() -> None:
    x = torch.ones(3, 5, 10)
    with SequenceDropout(keys(0, 1, 2)):
        functional.dropout(x, RATE)
        second = functional.dropout(x, RATE)
    rows, columns = np.arange(5)[:, None], np.arange(10)
    words = draw(KEYS.view(np.uint64)[:, None, None], 1, (rows << 12) + columns // 4)
    draws = (words >> (columns % 4 * 16).astype(np.uint64)).astype(np.uint16).view(np.int16)
    expected = np.where(draws >= round(RATE * 65536) - 32768, np.float32(1 / (1 - RATE)), np.float32(0))
    np.testing.assert_array_equal(second.numpy(), expected)


def test_the_rate_is_kept_and_calls_rows_and_heads_are_independent() -> None:
    with SequenceDropout(keys(0, 1)):
        states, probabilities = torch.ones(2, 64, 128), torch.ones(2, 4, 64, 64)
        found = [functional.dropout(x, RATE) != 0 for x in (states, states, probabilities)]
    for kept in found:
        assert float(kept.float().mean()) == pytest.approx(1 - RATE, abs=5 * (RATE * (1 - RATE) / kept.numel()) ** 0.5)
    agreement = [found[0] == found[1], found[0][0] == found[0][1], found[2][:, 0] == found[2][:, 1]]
    agreement += [found[0][:, 0] == found[0][:, 1], found[2][:, :, :, 0] == found[2][:, :, :, 1]]
    chance = RATE**2 + (1 - RATE) ** 2
    for same in agreement:
        assert float(same.float().mean()) == pytest.approx(chance, abs=5 * (0.25 / same.numel()) ** 0.5)


def test_evaluation_and_a_rate_of_nothing_or_all_are_as_in_torch() -> None:
    x = torch.randn(2, 4, 8)
    with SequenceDropout(keys(0, 1)):
        assert torch.equal(functional.dropout(x, 0.5, training=False), x)
        assert torch.equal(functional.dropout(x, 0.0), x)
        assert not functional.dropout(x, 1.0).any()
        same = functional.scaled_dot_product_attention(*[x[:, None]] * 3)
    assert torch.equal(same, functional.scaled_dot_product_attention(*[x[:, None]] * 3))


def test_a_gradient_flows_where_something_is_kept() -> None:
    x = torch.randn(2, 4, 8, requires_grad=True)
    with SequenceDropout(keys(0, 1)):
        functional.dropout(x, RATE).sum().backward()
    with SequenceDropout(keys(0, 1)):
        kept = functional.dropout(torch.ones_like(x), RATE)
    torch.testing.assert_close(x.grad, kept)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_attention_drops_probabilities(mask: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64).unbind()
    seen = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    seen[1, ..., 4:] = False
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    given = {"none": None, "bool": seen, "float": bias}[mask]
    with SequenceDropout(keys(0, 1)):
        got = functional.scaled_dot_product_attention(q, k, v, given, RATE, scale=0.3)
    with SequenceDropout(keys(0, 1)):
        kept = functional.dropout(torch.ones(2, 4, 6, 6, dtype=torch.float64), RATE)
    logits = q @ k.transpose(-2, -1) * 0.3 + (0 if mask == "none" else bias)
    torch.testing.assert_close(got, (logits.softmax(-1) * kept) @ v, rtol=1e-5, atol=1e-6)  # softmax is in float32


@pytest.mark.parametrize("shape", [(4, 5, 8), (1, 5, 8), (5,), (2, 3, 4, 5, 6), (2, 8, 20_000)])
def test_on_what_belongs_to_no_sequence_it_is_pytorchs_own(shape: tuple[int, ...]) -> None:
    found = []
    for keyed in (False, True):
        torch.manual_seed(3)
        with SequenceDropout(keys(0, 1)) if keyed else contextlib.nullcontext():
            found.append(functional.dropout(torch.ones(shape), 0.5))
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(3, 5, 10), (3, 2, 7, 13), (3, 1030), (3, 4, 1), (3, 0, 8), (1, 9, 24)])
@pytest.mark.parametrize("rate", [1, 6554, 65535])
def test_the_kernel_keeps_what_torch_keeps(shape: tuple[int, ...], rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2]) if shape[0] == 1 else None
    own = keys(0, 0, 0, 0, 1, 1, 2, 2, 2) if shape[0] == 1 else keys(0, 1, 2)
    found = []
    for devices in ((), (device,)):
        monkeypatch.setattr(dropout, "KERNEL_DEVICES", devices)
        at = device if devices else "cpu"
        given = (own.to(at), None if places is None else places.to(at), shape, 4, rate)
        found.append(torch.ops.effllm.kept(*given).cpu())
    assert found[0].shape == shape
    assert found[1].is_contiguous()
    assert torch.equal(*found)


def test_a_packed_row_may_be_longer_than_any_sequence() -> None:
    lengths = [9000, 8000, 3000]
    positions = torch.cat([torch.arange(n) for n in lengths])
    with SequenceDropout(keys(0, 1, 2), positions, torch.tensor(lengths)):
        row = functional.dropout(torch.ones(1, sum(lengths), 4), RATE)
    for n, part in enumerate(row[0].split(lengths)):
        with SequenceDropout(keys(n)):
            assert torch.equal(part, functional.dropout(torch.ones(1, lengths[n], 4), RATE)[0])


def test_grouped_heads_drop_as_many_heads_of_their_own() -> None:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    with SequenceDropout(keys(0, 1)):
        got = functional.scaled_dot_product_attention(q, k, v, dropout_p=RATE, enable_gqa=True)
    with SequenceDropout(keys(0, 1)):
        every = [x.repeat_interleave(2, 1) for x in (k, v)]
        torch.testing.assert_close(got, functional.scaled_dot_product_attention(q, *every, dropout_p=RATE))


def test_kernels_get_other_seeds_in_each_call() -> None:
    drawn = SequenceDropout(keys(0, 1))
    first, second = drawn.seeds(), drawn.seeds()
    assert not set(first.tolist()) & set(second.tolist())
    assert torch.equal(SequenceDropout(keys(1)).seeds(), first[1:])


def dropping(architecture: str, attention: str) -> Any:
    """A small random model in train mode that drops everywhere it can."""
    config = make_config(architecture, 300, None)
    config.update(dict.fromkeys(dropout.rates(config.to_dict()), RATE))
    torch.manual_seed(0)
    return transformers.AutoModelForMaskedLM.from_config(config, attn_implementation=attention).train()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sequence_gets_the_same_alone_padded_and_packed(architecture: str) -> None:
    register()
    lengths = [12, 5, 9]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 90, (n,), generator=generator) for n in lengths]
    padded = dropping(architecture, "sdpa")
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    together = torch.nn.utils.rnn.pad_sequence(ids, True, padded.config.pad_token_id)
    with SequenceDropout(keys(0, 1, 2)):
        states = padded.base_model(input_ids=together, attention_mask=mask.long())[0]
    others = []
    for n, one in enumerate(ids):
        with SequenceDropout(keys(n)):
            alone = padded.base_model(input_ids=one[None], attention_mask=torch.ones(1, len(one), dtype=torch.int64))[0]
        torch.testing.assert_close(states[n, : len(one)], alone[0], rtol=1e-4, atol=1e-5)
        with SequenceDropout(keys((n + 1) % 3)):
            others.append(padded.base_model(input_ids=one[None])[0])
        assert not torch.allclose(others[-1], alone, atol=1e-2)
    if architecture not in {"bert", "modernbert"}:
        return
    packed, positions = dropping(architecture, NAME), torch.cat([torch.arange(n) for n in lengths])
    index = torch.from_numpy(sequence_index(np.array(lengths)))
    with SequenceDropout(keys(0, 1, 2), positions, torch.tensor(lengths)):
        row = packed.base_model(input_ids=torch.cat(ids)[None], position_ids=positions[None], sequence_index=index)[0]
    for n, part in enumerate(row[0].split(lengths)):
        torch.testing.assert_close(states[n, : lengths[n]], part, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def dropping_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs of small masked-LMs that drop."""
    root, shared = tmp_path_factory.mktemp("configs"), {"num_hidden_layers": 2, "hidden_size": 32}
    shared |= {"num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 300, "max_position_embeddings": 64}
    bert = transformers.BertConfig(**shared, hidden_dropout_prob=RATE, attention_probs_dropout_prob=RATE)
    rates = {"attention_dropout": RATE, "mlp_dropout": RATE, "embedding_dropout": RATE}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    modern = transformers.ModernBertConfig(**shared, **rates, **ends)
    for name, config in (("bert", bert), ("modernbert", modern)):
        config.save_pretrained(root / name)
    return {name: root / name for name in ("bert", "modernbert")}


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_pretraining_with_dropout_does_not_depend_on_accumulation_or_workers(
    tokens: Path, tmp_path: Path, dropping_config: dict[str, Path], name: str
) -> None:
    model = str(dropping_config[name])
    finish(tokens, tmp_path / "whole", model=model)
    finish(tokens, tmp_path / "parts", model=model, accumulate=4)
    finish(tokens, tmp_path / "workers", model=model, workers=2)
    assert_same_trace(tmp_path / "parts", tmp_path / "whole")
    assert_same_run(tmp_path / "workers", tmp_path / "whole")


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_in_the_kernels_it_does_not_depend_on_the_batch_either(
    tokens: Path, dropping_config: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run_references(monkeypatch)
    vocabulary, found = Vocabulary.read(tokens / "tokenizer"), []
    model = MaskedLanguageModel(build_model(str(dropping_config[name]), vocabulary, 32, "mlm", 0)).train()
    for accumulate in (1, 4):
        parts = PretrainSource(tokens, settings(accumulate=accumulate)).micro_batches(0, 0, 1)
        with torch.no_grad():
            losses = [float(model(**to_tensors(part.arrays, torch.device("cpu")))[0]) for part in parts]
        found.append(sum(losses))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_an_example_has_its_key_whatever_batch_it_is_in() -> None:
    made = [Encoding([5] * n, [0] * n, [], [], [], [], cast(TextTokenizer, None)) for n in range(9, 2, -1)]
    items = [Item((one, one), ({}, {})) for one in made]
    own = draw(stream_keys(DROPOUT, 3, 0, np.arange(7)), INPUT_KEYS, 0).view(np.int64)
    expected = dict(zip(range(9, 2, -1), own, strict=True))
    for batch_size, pass_tokens in ((7, 20), (7, 1000), (3, 1000)):
        settings = FinetuneSettings(batch_size=batch_size, seed=3)
        source = SupervisedSource(items, settings, 0, Terms((), per_token=False), Passes(pass_tokens, 64))
        for batch in (b for step in range(7 // batch_size) for b in source.micro_batches(step, 0, 1)):
            first, second = np.split(batch.arrays["dropout_keys"], 2)
            lengths = batch.arrays["attention_mask"].sum(1)[: len(first)]
            assert first.tolist() == [expected[n] for n in lengths]
            assert not set(first) & set(second)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_fine_tuning_with_dropout_does_not_depend_on_its_passes(tmp_path: Path, architecture: str) -> None:
    task, file = "token-classification", write_jsonl(tmp_path / "data.jsonl", tagged())
    base = make_model(tmp_path / "base", architecture, "feature-extraction")
    found = []
    for number, pass_tokens in enumerate((30, 100_000)):
        chosen = {"dropout": RATE, "pass_tokens": pass_tokens, "precision": "fp32", "steps": 6, "epsilon": 1e-4}
        steps = run(base, tmp_path / str(number), task, file, settings=chosen)
        found.append([(step.record.loss, step.record.gradient_norm) for step in steps])
    for few, many in zip(*found, strict=True):
        assert few == pytest.approx(many, rel=1e-4)
