"""What a task is: where its puzzles come from, how they read as tokens, and what answers count.

A task is one file beside this one with a config class (tagged by its `kind`) and a class that
follows `Task`, and one entry in `gram_core.tasks.registry`.

Shapes: B a batch of puzzles, S tokens of an input, O tokens of an answer.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, UInt8
from torch import Tensor

from gram_core.config import Config
from gram_core.errors import GramError


class TaskError(GramError):
    """A puzzle or a task setting that cannot be used; one line that says what would be right."""


@dataclass(frozen=True)
class Split:
    """Dataset tables of one task, and counts that describe them."""

    train: pa.Table
    test: pa.Table
    metadata: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """The whole of what pipelines, training and evaluation ask of a task."""

    @property
    def config(self) -> Config:
        """The settings this task was made from."""

    @property
    def length(self) -> int:
        """S: tokens of an input, and of an answer."""

    @property
    def vocab(self) -> int:
        """Number of token values; 0 is padding and never scored."""

    @property
    def puzzles(self) -> int:
        """Number of learned puzzle identifiers."""

    def generate(self) -> Split:
        """The raw train and test tables. Raises `TaskError`."""

    def augment(self, train: pa.Table, test: pa.Table) -> Split:
        """The tables that training and sampling read; test rows are never augmented."""

    def verify(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> Bool[Tensor, " B"]:
        """Whether each answer solves its input: every rule holds and the givens are kept."""

    def parse(self, text: str) -> np.ndarray:
        """Input tokens uint8 [S] of a puzzle as a person types it. Raises `TaskError`."""

    def render(self, tokens: np.ndarray) -> str:
        """Tokens [S] in the same notation as `parse`, one line a row."""
