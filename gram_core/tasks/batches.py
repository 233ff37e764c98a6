"""A dataset table as tensors, its variants, and the order in which training reads them.

The order is a function of (seed, position): a run that is stopped at a position goes on from it
with nothing else to remember, and N workers read disjoint rows of the same order.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

RETRIES = 8


class Member(NamedTuple):
    """A training row's group, and which of the group's `of` rows it is, from 0."""

    group: str
    number: int = 0
    of: int = 1


Vary = Callable[[Member, np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Examples:
    """Training rows: N of them, S tokens each, and each row's learned puzzle identifier.

    With `variants` V there are V N examples: number v N + r is variant v of row r, the row itself
    for v = 0. Variants are made by `vary` (`Task.vary`) from the rows' `members` when they are
    read, never stored. One whose input is in `held_out` gives way to another of the same row, and
    after some tries to the row itself. Where variants are `identified`, variant v of a row has the
    row's identifier plus v.
    """

    inputs: UInt8[Tensor, "N S"]
    target: UInt8[Tensor, "N S"]
    puzzle: Int[Tensor, " N"]
    variants: int = 1
    vary: Vary | None = None
    members: Sequence[Member] = ()
    held_out: frozenset[bytes] = frozenset()
    identified: bool = False

    def __len__(self) -> int:
        return len(self.inputs) * self.variants

    def take(self, numbers: np.ndarray) -> "Examples":
        """The examples of these numbers, one row each."""
        variant, row = np.divmod(numbers, len(self.inputs))
        index = torch.from_numpy(row)
        inputs, target = self.inputs[index], self.target[index]
        for place in np.flatnonzero(variant):
            made = self._variant(int(row[place]), int(variant[place]))
            inputs[place], target[place] = (torch.from_numpy(tokens) for tokens in made)
        puzzle = self.puzzle[index]
        if self.identified:
            puzzle += torch.from_numpy(variant.astype(np.int32))
        return Examples(inputs, target, puzzle)

    def _variant(self, row: int, variant: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.vary is not None, "examples with variants say how to make them"
        own = self.inputs[row].numpy(), self.target[row].numpy()
        for attempt in range(RETRIES):
            number = variant + attempt * self.variants
            inputs, target = self.vary(self.members[row], *own, number)
            if inputs.tobytes() not in self.held_out:
                return inputs, target
        return own


def members(groups: Iterable[str]) -> list[Member]:
    """The rows of these groups, one each, in their order."""
    rows = list(groups)
    of, seen = Counter(rows), Counter[str]()
    found = []
    for group in rows:
        found.append(Member(group, seen[group], of[group]))
        seen[group] += 1
    return found


@dataclass(frozen=True)
class Puzzles:
    """The inputs to solve, one row a puzzle, and each one's learned identifier."""

    ids: Sequence[str]
    inputs: UInt8[Tensor, "N S"]
    puzzle: Int[Tensor, " N"]

    @classmethod
    def of(cls, ids: Sequence[str], inputs: UInt8[Tensor, "N S"]) -> "Puzzles":
        """Puzzles of a task without identifiers of their own."""
        return cls(ids, inputs, torch.zeros(len(ids), dtype=torch.int32))


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
