"""Optimizers, and their state as named tensors.

Every optimizer steps in place on the parameters that have a gradient, takes its learning rate from its groups' `lr`,
and holds its whole state in tensors, so that a checkpoint can keep it in safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from effllm.errors import ArtifactError, SettingError, unknown_name
from effllm.train.sharding import placed_like

Betas = tuple[float, float]
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
MOMENTUM = 0.95
"""Muon's, with Nesterov's look ahead, as in its source."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters as two groups, with and without weight decay.

    Norms, biases and other 1-D parameters are not decayed; matrices are, embeddings among them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    name: str, model: nn.Module, lr: float, weight_decay: float, betas: Betas, eps: float
) -> torch.optim.Optimizer:
    """Return the optimizer of that name over a model's trainable parameters.

    Raises SettingError for an unknown name, a value out of its range, and for `muon` when the model has no layers in an
    `nn.ModuleList`, as every encoder of transformers has them.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    for key, value in (("learning rate", lr), ("weight decay", weight_decay)):
        if not 0.0 <= value < float("inf"):
            raise SettingError(f"{key} must be a number of at least 0, got {value}")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise SettingError(f"betas must be at least 0 and below 1, got {betas}")
    if not 0.0 < eps < float("inf"):
        raise SettingError(f"eps must be above 0, got {eps}")
    return OPTIMIZERS[name](model, lr, weight_decay, betas, eps)


def _adamw(model: nn.Module, lr: float, weight_decay: float, betas: Betas, eps: float) -> torch.optim.Optimizer:
    groups = [group | {"state_names": ADAM_STATE} for group in parameter_groups(model, weight_decay)]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def _stableadamw(model: nn.Module, lr: float, weight_decay: float, betas: Betas, eps: float) -> torch.optim.Optimizer:
    return StableAdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps)


def _muon(model: nn.Module, lr: float, weight_decay: float, betas: Betas, eps: float) -> torch.optim.Optimizer:
    return MuonAdamW(model, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)


OPTIMIZERS: dict[str, Callable[[nn.Module, float, float, Betas, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "stableadamw": _stableadamw,
    "muon": _muon,
}


def _evaluated(closure: Any) -> Any:
    """Return what `closure` returns, run with gradients as torch's optimizers do; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class StableAdamW(torch.optim.Optimizer):
    """AdamW with AdaFactor's update clipping, tensor by tensor; needs no clipping of the gradient's norm.

    Written from algorithm 2 of Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language
    models". With m and v the moving averages, whose betas carry the bias correction, and lr the learning rate:

        rms = sqrt(mean(g² / max(v, eps²)))
        rate = lr / max(1, rms)
        θ = θ - rate · weight_decay · θ - rate · m / (sqrt(v) + eps)
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: Betas, eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "state_names": ADAM_STATE})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Change the parameters in place; returns what `closure` returns, where one is given."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        t = float(state["step"])
        beta1, beta2 = ((beta - beta**t) / (1 - beta**t) for beta in group["betas"])
        mean, square, eps = state["exp_avg"], state["exp_avg_sq"], group["eps"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        rms = (gradient.square() / square.clamp(min=eps**2)).mean().sqrt()
        rate = group["lr"] / rms.clamp(min=1.0)
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.sub_(rate * mean / (square.sqrt() + eps))


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside a model's layers, AdamW for everything else, as one optimizer.

    Muon (Jordan et al. 2024) moves a matrix by its momentum made orthogonal. The moves are scaled to the size of
    AdamW's (Liu et al. 2025, "Muon is scalable for LLM training"), so that learning rate and weight decay serve both.
    AdamW is torch's; Muon is written out because torch's iterates in bfloat16, which a processor without such
    instructions emulates, at many times a step's cost: here that is done on accelerators only.
    """

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float, betas: Betas, eps: float) -> None:
        matrices = _layer_matrices(model)
        if not matrices:
            raise SettingError("muon needs a model with layers in an nn.ModuleList; use adamw or stableadamw")
        chosen = set(matrices)
        others = [
            group | {"params": [p for p in group["params"] if p not in chosen], "state_names": ADAM_STATE}
            for group in parameter_groups(model, weight_decay)
        ]
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        muon_group = {"params": matrices, "lr": lr, "weight_decay": weight_decay, "state_names": ("momentum_buffer",)}
        super().__init__([muon_group, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Change the parameters in place; returns what `closure` returns, where one is given."""
        loss = _evaluated(closure)
        matrices, *others = self.param_groups
        for parameter in matrices["params"]:
            if parameter.grad is not None:
                self._move(parameter, parameter.grad, matrices["lr"], matrices["weight_decay"])
        # Loading a state dict replaces this object's state and groups, so AdamW is pointed at them at each step.
        self._adamw.state, self._adamw.param_groups = self.state, others
        self._adamw.step()
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(momentum, MOMENTUM)
        parameter.mul_(1 - lr * weight_decay)
        parameter.sub_(orthogonal(direction), alpha=lr * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix with the singular vectors of `matrix`, shape (rows, columns), and singular values near 1.

    Five steps of the quintic Newton-Schulz iteration of Jordan et al. 2024, whose coefficients lead every singular
    value into about 0.7 to 1.2. Computed in the matrix's dtype on the CPU and in bfloat16 elsewhere; a zero matrix
    stays zero.
    """
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def _layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable 2-D parameters, embeddings aside, of the modules in an `nn.ModuleList`, each one once."""
    modules = (m for outer in model.modules() if isinstance(outer, nn.ModuleList) for m in outer.modules())
    found = {
        p: None
        for m in modules
        if not isinstance(m, nn.Embedding)
        for p in m.parameters(recurse=False)
        if p.requires_grad and p.ndim == 2
    }
    return list(found)


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the state as tensors named `<parameter name>/<state name>`; empty before the first step.

    `model` is the unwrapped model, and `optimizer` one of `build_optimizer`, wrapped by accelerate or not. The tensors
    are the live ones where these are contiguous, and sharded ones are gathered: with FSDP every process must call this.
    """
    return {
        f"{name}/{key}": (value.full_tensor() if isinstance(value, DTensor) else value).detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace the optimizer's whole state by copies of what `state_tensors` returned; the same model and optimizer.

    Raises ArtifactError naming a tensor that is missing, not known or of another shape; nothing is then changed.
    """
    left = dict(tensors)
    names = {p: group["state_names"] for group in optimizer.param_groups for p in group["params"]}
    fused = {p: bool(group.get("fused")) for group in optimizer.param_groups for p in group["params"]}
    loaded: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        wanted = {f"{name}/{key}": key for key in names.get(parameter, ())}
        present = [key for key in wanted if key in left]
        if present and len(present) < len(wanted):
            missing = next(key for key in wanted if key not in left)
            raise ArtifactError(f"the optimizer's state has no {missing!r}, only {', '.join(present)}")
        for full in present:
            value, scalar = left.pop(full), wanted[full] == "step"
            expected = torch.Size() if scalar else parameter.shape
            if value.shape != expected:
                raise ArtifactError(f"{full!r} has shape {tuple(value.shape)}, expected {tuple(expected)}")
            device = torch.device("cpu") if scalar and not fused[parameter] else parameter.device
            copy = value.detach().clone().to(device) if scalar else placed_like(parameter, value)
            loaded.setdefault(parameter, {})[wanted[full]] = copy
    if left:
        raise ArtifactError(f"the optimizer's state has {next(iter(left))!r}, unknown to this model and optimizer")
    optimizer.state.clear()
    optimizer.state.update(loaded)
