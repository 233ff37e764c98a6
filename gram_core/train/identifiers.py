"""The sparse optimiser of a table of learned identifiers (TRM's; gap G11).

A batch touches few of perhaps a million vectors. Those are gathered into a leaf of the graph, and
after the backward pass only they move: sign descent with decoupled decay. The sign is taken of an
identifier's summed gradient over all slots of all workers.

Shapes: B slots of one worker, D width.
"""

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gram_core.train.optim import OptimConfig


class Workers(Protocol):
    """What the optimiser needs of an engine."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The workers' tensors, one behind the other."""


class IdentifierOptimizer:
    """Moves the rows of `table`, the weight of `gram_core.model.encoders.Identifiers`."""

    def __init__(self, table: Float[Tensor, "P D"], config: OptimConfig) -> None:
        self.table = table
        self.config = config

    def leaf(self, puzzle: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """The identifiers' vectors as a leaf that gathers their gradient."""
        return self.table[puzzle].requires_grad_()

    @torch.no_grad()
    def step(
        self,
        puzzle: Int[Tensor, " B"],
        gradient: Float[Tensor, "B D"],
        workers: Workers,
        lr: float,
    ) -> None:
        """One step on the identifiers of `puzzle`, given the gradient of their leaves; `lr` is
        AdamW's present rate, whose schedule the identifiers' own rate follows."""
        touched, place = torch.unique(workers.gather(puzzle), return_inverse=True)
        summed = torch.zeros(len(touched), gradient.shape[1], device=gradient.device)
        summed.index_add_(0, place, workers.gather(gradient))
        rate = lr * self.config.identifier_lr / self.config.lr
        touched = touched.long()
        kept = self.table[touched] * (1.0 - rate * self.config.identifier_decay)
        self.table[touched] = kept - rate * summed.sign()
