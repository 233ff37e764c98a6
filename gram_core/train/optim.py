"""AdamW's parameter groups and the learning-rate schedule (B.2; gaps G10, G16)."""

import math
from typing import Any, Literal

import torch
from torch import nn

from gram_core.config import Config, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat
from gram_core.model.encoders import Identifiers


class OptimConfig(Config, frozen=True, kw_only=True):
    """AdamW. Betas and warm-up are HRM's and TRM's; the paper gives neither. `identifier_lr` and
    `identifier_decay` are those of a table of learned identifiers (TRM's for ARC; gap G11)."""

    lr: PositiveFloat = 1e-4
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    weight_decay: NonNegativeFloat = 1.0
    decay_all: bool = False
    clip: NonNegativeFloat = 1.0
    warmup: NonNegativeInt = 2000
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: Fraction = 0.1
    identifier_lr: PositiveFloat = 1e-2
    identifier_decay: NonNegativeFloat = 0.1


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Weight decay on matrices only (embeddings, biases and heads' vectors are left alone), or on
    everything with `decay_all`."""
    tables = (nn.Embedding, Identifiers)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, tables)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        matrix = parameter.dim() >= 2 and id(parameter) not in embeddings
        (decayed if matrix or config.decay_all else free).append(parameter)
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups, one fused kernel a step."""
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


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
