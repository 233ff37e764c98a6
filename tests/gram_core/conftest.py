"""Tiny models and batches, with every weight stirred so that no term is zero by initialisation."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gram_core.model.gram import GRAM, ModelConfig
from gram_core.shape import TokenShape
from gram_core.tasks.batches import Examples
from gram_core.tasks.nqueens import NQueens, NQueensConfig, completions, to_tokens

TINY: dict[str, Any] = {
    "dim": 16, "heads": 2, "ffn": 16, "layers": 1, "K": 1, "T": 2, "N_sup": 2,
    "prefix_tokens": 2, "sigma_init": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by being shared between threads, most on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., GRAM]:
    """A tiny model; `stir` is the size of the noise on the weights that start at zero."""

    def make(length: int = 16, seed: int = 0, stir: float = 0.1, **settings: Any) -> GRAM:
        torch.manual_seed(seed)
        model = GRAM(ModelConfig(**{**TINY, **settings}), TokenShape(length, vocab=3))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(0.0, stir)
        return model

    return make


@pytest.fixture(scope="session")
def queens4() -> NQueens:
    """The smallest board with solutions."""
    return NQueens(NQueensConfig(size=4, remove=(1, 2, 3)))


@pytest.fixture(scope="session")
def examples() -> Examples:
    """All 28 pairs of an incomplete 4x4 board and a completion."""
    partial, full = completions(4, (1, 2, 3))
    puzzle = torch.zeros(len(partial), dtype=torch.int32)
    return Examples(torch.from_numpy(to_tokens(partial)), torch.from_numpy(to_tokens(full)), puzzle)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
