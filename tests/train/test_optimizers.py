"""Optimizers: groups, updates against a NumPy re-computation, and state as named tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from effllm.errors import ArtifactError, SettingError
from effllm.train.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    load_state_tensors,
    orthogonal,
    parameter_groups,
    state_tensors,
)

LR, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.98), 1e-6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers are slower on several threads, and far slower where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=40, max_position_embeddings=12))
    return model.to(dtype).eval()


def gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Give every parameter a gradient drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (scale * noise).to(parameter.dtype)


def build(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(name, model, LR, DECAY, BETAS, EPS)


def decayed(name: str) -> bool:
    return "norm" not in name.lower() and not name.endswith("bias")


def adamw_in_numpy(start: np.ndarray, grads: list[np.ndarray], decay: float) -> np.ndarray:
    """Decoupled weight decay, algorithm 2 of Loshchilov and Hutter 2019."""
    theta, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, g in enumerate(grads, start=1):
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        corrected = m / (1 - BETAS[0] ** t) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
        theta = theta - LR * decay * theta - LR * corrected
    return theta


def stable_in_numpy(start: np.ndarray, grads: list[np.ndarray], decay: float) -> np.ndarray:
    """Algorithm 2 of Wortsman et al. 2023, one tensor."""
    theta, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, g in enumerate(grads, start=1):
        b1 = BETAS[0] * (1 - BETAS[0] ** (t - 1)) / (1 - BETAS[0] ** t)
        b2 = BETAS[1] * (1 - BETAS[1] ** (t - 1)) / (1 - BETAS[1] ** t)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        rate = LR / max(1.0, math.sqrt(np.mean(g**2 / np.maximum(v, EPS**2))))
        theta = theta - rate * decay * theta - rate * m / (np.sqrt(v) + EPS)
    return theta


@pytest.mark.parametrize(("name", "reference"), [("adamw", adamw_in_numpy), ("stableadamw", stable_in_numpy)])
def test_updates_equal_a_float64_recomputation(name: str, reference) -> None:
    model = tiny_bert(torch.float64)
    optimizer = build(name, model)
    start = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    grads: dict[str, list[np.ndarray]] = {n: [] for n in start}
    for step, scale in enumerate((1.0, 0.5, 20.0, 0.01, 3.0)):  # the jumps make the clipping bite
        gradients(model, step, scale)
        for n, p in model.named_parameters():
            grads[n].append(p.grad.numpy().copy())
        optimizer.step()
    for n, p in model.named_parameters():
        expected = reference(start[n], grads[n], DECAY if decayed(n) else 0.0)
        # a hundred or so roundings of 2**-53 on values of order one
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-13, err_msg=n)


def test_update_clipping_divides_the_step_by_its_rms() -> None:
    """A jump by 1000: v is (1 - beta2) g² but where g is small by chance; the clipping divides the step by v's root."""
    moved = {}
    for name in ("adamw", "stableadamw"):
        model = tiny_bert(torch.float64)
        optimizer = build_optimizer(name, model, LR, 0.0, BETAS, EPS)
        for step, scale in enumerate((0.01, 0.01, 0.01, 10.0)):
            before = model.cls.predictions.transform.dense.weight.detach().clone()
            gradients(model, step, scale)
            optimizer.step()
        moved[name] = float((model.cls.predictions.transform.dense.weight.detach() - before).norm())
    beta2 = BETAS[1] * (1 - BETAS[1] ** 3) / (1 - BETAS[1] ** 4)
    assert moved["stableadamw"] / moved["adamw"] == pytest.approx(math.sqrt(1 - beta2), rel=1e-3)


def test_muon_is_torchs_muon_and_adamw_on_their_shares() -> None:
    model, twin = tiny_bert(), tiny_bert()
    optimizer = build("muon", model)
    inside = [p for n, p in twin.named_parameters() if ".layer." in n and p.ndim == 2]
    outside = [(n, p) for n, p in twin.named_parameters() if not (".layer." in n and p.ndim == 2)]
    muon = torch.optim.Muon(inside, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in outside if decayed(n)], "weight_decay": DECAY},
            {"params": [p for n, p in outside if not decayed(n)], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=BETAS,
        eps=EPS,
        fused=True,
    )
    for step in range(4):
        gradients(model, step)
        gradients(twin, step)
        for group in optimizer.param_groups:
            group["lr"] = LR * (step + 1)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = LR * (step + 1)
        optimizer.step()
        muon.step()
        adamw.step()
    moves = LR * sum(range(1, 5)) * 0.2  # what a unit of the orthogonal direction moves, over all steps
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if decayed(n) and ".layer." in n:  # torch iterates in bfloat16, whose rounding five steps multiply
            assert (p - q).norm() <= 0.05 * moves * math.sqrt(max(p.shape)) * math.sqrt(min(p.shape)), n
        else:
            assert torch.equal(p, q), n
    assert len(inside) == 12


@pytest.mark.parametrize("shape", [(8, 8), (5, 32), (32, 5)])
def test_the_orthogonal_direction_keeps_singular_vectors_and_evens_the_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.mT @ orthogonal(matrix) @ v.mT
    values = turned.diagonal()
    assert (turned - values.diag()).abs().max() < 1e-9
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert not orthogonal(torch.zeros(shape)).any()


def test_muon_survives_torchs_own_state_dict() -> None:
    model, twin = tiny_bert(), tiny_bert()
    first, second = build("muon", model), build("muon", twin)
    gradients(model, 0)
    first.step()
    twin.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch would share the tensors
    for m, o in ((model, first), (twin, second)):
        gradients(m, 1)
        o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_and_biases_are_not_decayed_and_every_parameter_is_there_once(name: str) -> None:
    model = tiny_bert()
    frozen = model.bert.embeddings.token_type_embeddings.weight
    frozen.requires_grad_(False)
    optimizer = build(name, model)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    expected = {p: DECAY if decayed(n) else 0.0 for n, p in model.named_parameters() if p is not frozen}
    assert decay == expected


def test_tied_weights_are_one_parameter() -> None:
    model = tiny_bert()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    parameters = [p for group in parameter_groups(model, DECAY) for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_state_goes_through_safetensors_and_the_run_continues_bit_for_bit(name: str, steps: int, tmp_path) -> None:
    model = tiny_bert()
    optimizer = build(name, model)
    for step in range(steps):
        gradients(model, step)
        model.bert.embeddings.token_type_embeddings.weight.grad = None  # a parameter that was never stepped on
        optimizer.step()
    tensors = state_tensors(optimizer, model)
    assert bool(tensors) == bool(steps)
    save_file(tensors, tmp_path / "optimizer.safetensors")

    twin = tiny_bert()
    twin.load_state_dict(model.state_dict())
    other = build(name, twin)
    gradients(twin, 99)
    if steps != 1:
        other.step()  # whatever was there before is replaced
        twin.load_state_dict(model.state_dict())
    load_state_tensors(other, twin, load_file(tmp_path / "optimizer.safetensors"))
    again = state_tensors(other, twin)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) and again[key].dtype == tensors[key].dtype for key in tensors)
    for step in range(3):
        for m, o in ((model, optimizer), (twin, other)):
            gradients(m, 50 + step)
            o.step()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_state_tensors_are_named_after_the_parameters() -> None:
    model = tiny_bert()
    optimizer = build("adamw", model)
    gradients(model, 0)
    optimizer.step()
    tensors = state_tensors(optimizer, model)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert tensors[f"{name}/exp_avg"].shape == (16, 16)
    assert float(tensors[f"{name}/step"]) == 1.0
    assert len(tensors) == 3 * len(list(model.parameters()))


def test_loading_does_not_tie_the_optimizer_to_the_tensors_it_was_given() -> None:
    model = tiny_bert()
    optimizer = build("adamw", model)
    gradients(model, 0)
    optimizer.step()
    tensors = {key: value.clone() for key, value in state_tensors(optimizer, model).items()}
    kept = {key: value.clone() for key, value in tensors.items()}
    load_state_tensors(optimizer, model, tensors)
    optimizer.step()
    assert all(torch.equal(tensors[key], kept[key]) for key in tensors)


def test_state_of_an_accelerated_optimizer() -> None:
    from accelerate import Accelerator

    model = tiny_bert()
    optimizer = Accelerator(cpu=True).prepare(build("muon", model))
    gradients(model, 0)
    optimizer.step()
    tensors = {key: value.clone() for key, value in state_tensors(optimizer, model).items()}
    gradients(model, 1)
    optimizer.step()
    load_state_tensors(optimizer, model, tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in state_tensors(optimizer, model).items())


def some_state(name: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    model = tiny_bert()
    optimizer = build(name, model)
    gradients(model, 0)
    optimizer.step()
    return model, optimizer, {key: value.clone() for key, value in state_tensors(optimizer, model).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("bert.embeddings.word_embeddings.weight/exp_avg"),
            "has no 'bert.*word_embeddings.weight/exp_avg'",
        ),
        (lambda t: t.update({"nothing/exp_avg": torch.zeros(1)}), "has 'nothing/exp_avg', unknown"),
        (lambda t: t.update({"cls.predictions.bias/exp_avg": torch.zeros(3)}), r"shape \(3,\), expected \(40,\)"),
        (lambda t: t.update({"cls.predictions.bias/step": torch.zeros(1)}), r"shape \(1,\), expected \(\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message: str) -> None:
    model, optimizer, tensors = some_state()
    kept = {key: value.clone() for key, value in tensors.items()}
    change(tensors)
    with pytest.raises(ArtifactError, match=message):
        load_state_tensors(optimizer, model, tensors)
    assert all(torch.equal(value, kept[key]) for key, value in state_tensors(optimizer, model).items())


def test_the_state_of_another_optimizer_is_refused() -> None:
    _, _, tensors = some_state("adamw")
    model, optimizer, _ = some_state("muon")
    with pytest.raises(ArtifactError, match="unknown to this model and optimizer"):
        load_state_tensors(optimizer, model, tensors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        ({"lr": -1.0}, "learning rate must be"),
        ({"lr": math.nan}, "learning rate must be"),
        ({"weight_decay": math.inf}, "weight decay must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"eps": 0.0}, "eps must be"),
    ],
)
def test_values_out_of_range_are_named(settings: dict, message: str) -> None:
    values = {"name": "adamw", "lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS} | settings
    with pytest.raises(SettingError, match=message):
        build_optimizer(model=tiny_bert(), **values)


def test_muon_without_layers_is_refused() -> None:
    with pytest.raises(SettingError, match="muon needs a model with layers"):
        build("muon", nn.Linear(2, 2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_is_called_with_gradients_on(name: str) -> None:
    model = tiny_bert()
    optimizer = build(name, model)
    weight = model.bert.embeddings.word_embeddings.weight

    def closure() -> torch.Tensor:
        loss = (weight**2).sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    assert float(optimizer.step(closure).detach()) == pytest.approx(float((before**2).sum()))
    assert not torch.equal(weight, before)
