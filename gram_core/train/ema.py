"""The exponential moving average of the weights, which evaluation and sampling use (B.2)."""

from collections.abc import Iterable

import torch
from torch import Tensor


class EMA:
    """average <- decay * average + (1 - decay) * weights, after every optimiser step.

    With `warmup`, the decay at step t is at most (1 + t) / (10 + t), so that a run shorter than
    1 / (1 - decay) steps is not an average of its initial weights (gap G20). `weights` are read in
    place: all of them, or the shards that a worker holds.
    """

    def __init__(self, weights: Iterable[Tensor], decay: float, warmup: bool) -> None:
        self.decay = decay
        self.warmup = warmup
        self.steps = 0
        self.source = list(weights)
        self.average = [p.detach().clone().float() for p in self.source]

    def decay_now(self) -> float:
        """The decay that the next update uses."""
        warm = (1 + self.steps) / (10 + self.steps)
        return min(self.decay, warm) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights: one fused operation for all of them."""
        sources = [p.detach().float() for p in self.source]
        torch._foreach_lerp_(self.average, sources, 1.0 - self.decay_now())
        self.steps += 1
