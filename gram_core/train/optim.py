"""The optimiser, AdamW or Muon, and the learning-rate schedule (B.2; gaps G10, G16)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gram_core.config import (
    Config,
    Decay,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
)
from gram_core.model.encoders import Identifiers
from gram_core.model.gram import GRAM
from gram_core.model.heads import HaltHead, ValueHead


class OptimConfig(Config, frozen=True, kw_only=True):
    """`adamw` as in the paper; or `muon`, which steps the matrices between hidden vectors along the
    orthogonal factor of their momentum and leaves the rest to AdamW, with one `lr` and one decay
    for both. Betas and warm-up are HRM's and TRM's; the paper gives neither. `head_lr` is the rate
    of the halt and value heads, by default `lr`: they send no gradient into the core, and a short
    run ends before they have learned at its rate. `identifier_lr` and `identifier_decay` are those
    of a table of learned identifiers (TRM's for ARC; gap G11). All follow one schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 1e-4
    head_lr: PositiveFloat | None = None
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    momentum: Decay = 0.95
    weight_decay: NonNegativeFloat = 1.0
    decay_all: bool = False
    clip: NonNegativeFloat = 1.0
    warmup: NonNegativeInt = 2000
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: Fraction = 0.1
    identifier_lr: PositiveFloat = 1e-2
    identifier_decay: NonNegativeFloat = 0.1


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Weight decay on matrices only (embeddings and biases are left alone), or on everything with
    `decay_all`. With `head_lr` a third group, the halt and value heads', has a rate of its own and
    no decay but with `decay_all`."""
    tables, judges = (nn.Embedding, Identifiers), (HaltHead, ValueHead)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, tables)}
    apart = [m for m in model.modules() if isinstance(m, judges) and config.head_lr is not None]
    heads = [parameter for head in apart for parameter in head.parameters()]
    chosen = {id(parameter) for parameter in heads}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if id(parameter) in chosen:
            continue
        matrix = parameter.dim() >= 2 and id(parameter) not in embeddings
        (decayed if matrix or config.decay_all else free).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    if config.head_lr is not None:
        decay = config.weight_decay if config.decay_all else 0.0
        share = config.head_lr / config.lr
        groups.append({"params": heads, "weight_decay": decay, "share": share})
    return groups


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of the next step: `lr`, or a group's share of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("share", 1.0)


class Muon(torch.optim.Muon):
    """torch's Muon, with all matrices of a shape orthogonalised together and in float32: for many
    small ones four times as fast as one by one. With Nesterov's momentum, and updates of AdamW's
    usual size, so that a rate means the same to both."""

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> None:
        super().__init__(
            matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in of_shape.items():
                gradients = [p.grad for p in parameters if p.grad is not None]
                momenta = [self._momentum(p) for p in parameters]
                torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])
                # Nesterov's: the gradient with the momentum that already has it.
                ahead = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
                factors = orthogonal(ahead, group["ns_coefficients"], group["ns_steps"])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, factors.unbind(), alpha=-rate)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def orthogonal(
    matrices: Float[Tensor, "B M N"], coefficients: tuple[float, float, float], steps: int
) -> Float[Tensor, "B M N"]:
    """Nearly the orthogonal factor of each matrix's polar decomposition: its singular vectors, with
    singular values of 0.7 to 1.2 for most. Newton and Schulz's iteration with a quintic (Jordan et
    al., "Muon", 2024)."""
    a, b, c = coefficients
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x: Tensor = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW, stepped as one: groups and state are those of both."""

    def __init__(self, model: GRAM, config: OptimConfig) -> None:
        matrices = hidden_matrices(model)
        chosen = {id(matrix) for matrix in matrices}
        groups = parameter_groups(model, config)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
        muon = Muon(
            matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, _adamw(groups, config))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self.parts:
            part.step()


def hidden_matrices(model: GRAM) -> list[nn.Parameter]:
    """The matrices that map hidden vectors to hidden vectors: all of the recursion's and of the
    Gaussian heads'; not what tokens come in or go out by, nor the heads on one vector."""
    parts = (model.recursion, model.prior_head, model.posterior_head)
    return [p for part in parts if part is not None for p in part.parameters() if p.dim() == 2]


def make_optimizer(model: GRAM, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names, over all of the model's parameters."""
    if config.name == "muon":
        return MuonAdamW(model, config)
    return _adamw(parameter_groups(model, config), config)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW, one fused kernel a step."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """The rate of optimiser step `step` (from 0) of `total`: linear warm-up, then constant, or a
    cosine down to `final_lr` times the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, total - config.warmup)
    shape = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr + (1.0 - config.final_lr) * shape)
