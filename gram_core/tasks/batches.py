"""A dataset table as tensors, and the order in which training reads it.

The order is a function of (seed, position): a run that is stopped at a position goes on from it
with nothing else to remember, and N workers read disjoint rows of the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Training rows: N of them, S tokens each, and each row's learned puzzle identifier."""

    inputs: UInt8[Tensor, "N S"]
    target: UInt8[Tensor, "N S"]
    puzzle: Int[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Puzzles:
    """The inputs to solve, one row a puzzle."""

    ids: Sequence[str]
    inputs: UInt8[Tensor, "N S"]


class Order:
    """The endless sequence of shuffled epochs over `rows` rows."""

    def __init__(self, rows: int, seed: int) -> None:
        if rows < 1:
            raise ValueError("there is no training row to read")
        self.rows = rows
        self.seed = seed
        self._epoch = -1
        self._shuffled = np.empty(0, dtype=np.int64)

    def take(self, position: int, count: int) -> np.ndarray:
        """Row numbers at places position .. position + count - 1 of the sequence."""
        out = np.empty(count, dtype=np.int64)
        for i in range(count):
            epoch, place = divmod(position + i, self.rows)
            if epoch != self._epoch:
                self._shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
                self._epoch = epoch
            out[i] = self._shuffled[place]
        return out
