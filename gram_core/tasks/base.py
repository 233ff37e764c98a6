"""What a task is: where its puzzles come from, how they read as tokens, and what answers count.

A task is one file beside this one with a config class (tagged by its `kind`) and a subclass of
`Task`, and one entry in `gram_core.tasks.registry`.

Shapes: B a batch of puzzles, S tokens of an input and of an answer, N rows of a table.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from gram_core.config import Config
from gram_core.errors import GramError
from gram_core.shape import TokenShape
from gram_core.tasks.batches import Member

Fetch = Callable[[str], Path]
"""A source as the user names it (a path, `s3://...`, `hf://...`) -> a file on this machine."""


CONTAINER = Path("/sys/fs/cgroup/memory.max")


class TaskError(GramError):
    """A puzzle or a task setting that cannot be used; one line that says what would be right."""


def memory() -> float:
    """Bytes of this machine's memory, or container's; infinite where it does not say."""
    bound = math.inf
    if hasattr(os, "sysconf"):
        bound = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # no container, or no bound ("max")
        bound = min(bound, float(int(CONTAINER.read_text())))
    return bound


def check_rows(rows: int, length: int, setting: str) -> None:
    """Raise `TaskError` where so many rows of two times `length` tokens, the least that a dataset
    takes, are more than this machine's memory; `setting` is what would make them fewer."""
    bytes_of_rows = 2.0 * rows * length
    if bytes_of_rows > memory():
        raise TaskError(
            f"{rows:,} pairs need {bytes_of_rows / 1e9:,.0f} GB of memory and more, this machine "
            f"has {memory() / 1e9:,.0f}; {setting}"
        )


@dataclass(frozen=True)
class Split:
    """Dataset tables of one task, and counts that describe them."""

    train: pa.Table
    test: pa.Table
    metadata: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """The whole of what pipelines, training and evaluation ask of a task. Token 0 is padding: in a
    target it is never scored."""

    config: Config
    length: int
    vocab: int
    # Height, width and side of a patch, where tokens are the pixels of an image.
    image: tuple[int, int, int] | None = None
    # Variants of a training row that training may draw.
    variants: int = 1
    # Whether each variant of each group of rows has a learned identifier of its own.
    identified: bool = False
    # Whether answers answer an input; an unconditional task has one, empty input.
    conditional: bool = True
    # Whether `verify` has rules to check; without, an answer is valid where it is a known target.
    verifies: bool = True

    @property
    def shape(self) -> TokenShape:
        """What a model for this task must fit."""
        return TokenShape(self.length, self.vocab, image=self.image)

    @abstractmethod
    def generate(self, fetch: Fetch) -> Split:
        """The raw train and test tables; `fetch` brings sources here. Raises `TaskError`."""

    def augment(self, train: pa.Table, test: pa.Table) -> Split:
        """The tables that training and sampling read; test rows are never augmented."""
        return Split(train, test)

    def vary(
        self, row: Member, inputs: np.ndarray, target: np.ndarray, variant: int
    ) -> tuple[Any, Any]:
        """Variant number 1 or above of one training row, two uint8 arrays [S]: streamed
        augmentation, a function of its arguments alone. The row's group is its `group_id`."""
        raise NotImplementedError("a task with more than one variant says what they are")

    @abstractmethod
    def verify(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> Bool[Tensor, " B"]:
        """Whether each answer solves its input: every rule holds and the givens are kept."""

    def measure(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> dict[str, Float[Tensor, " B"]]:
        """The task's own numbers for each answer, beside being valid."""
        return {}

    def on(self, device: torch.device | str) -> Self:
        """The same task with the constants of its rule on `device`: a CUDA graph cannot hold the
        copying of them there."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
            elif isinstance(value, Task):
                setattr(moved, name, value.on(device))
        return moved

    def score(self, trajectories: pl.DataFrame, test: pa.Table) -> dict[str, np.ndarray]:
        """Numbers that no single answer has: from the trajectories of the test table at one depth,
        one number a group for each name."""
        return {}

    def canonical(self, answers: np.ndarray) -> np.ndarray:
        """Answers uint8 [B, S] with those that mean the same made equal."""
        return answers

    def group(self, text: str) -> str:
        """The group of a puzzle as a person types it, where groups have identifiers."""
        return ""

    @abstractmethod
    def parse(self, text: str) -> np.ndarray:
        """Input tokens uint8 [S] of a puzzle as a person types it. Raises `TaskError`."""

    @abstractmethod
    def render(self, tokens: np.ndarray) -> str:
        """Tokens [S] in the same notation as `parse`, one line a row."""
