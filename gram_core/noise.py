"""Gaussian noise as a function of what it is for, and of nothing else.

The noise of a supervision step belongs to a key and a number: for sampling a hash of (seed, puzzle,
trajectory) and the step, for training a hash of (seed, iteration) and the slot. So a trajectory
keeps its noise whatever batch, worker or order it is computed in, and a resumed run needs no
generator's state.
"""

import math
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gram_core.philox import normal

Key = bytes
CPU = torch.device("cpu")
# Work in progress that was drawn otherwise is not gone on with.
GENERATOR = "philox4x32-10, box-muller"


def trajectory_key(seed: int, puzzle_id: str, trajectory: int) -> Key:
    """The key of one trajectory of one puzzle."""
    return _key(f"{seed}\0{puzzle_id}\0{trajectory}")


def step_noise(key: Key, step: int, shape: tuple[int, int, int]) -> Float[Tensor, "T L D"]:
    """Standard normal noise of one supervision step of one trajectory; `shape` is (T, L, D)."""
    return batch_noise([key], [step], shape)[:, 0]


def batch_noise(
    keys: Sequence[Key],
    steps: Sequence[int],
    shape: tuple[int, int, int],
    device: torch.device = CPU,
) -> Float[Tensor, "T B L D"]:
    """Noise of a batch of trajectories, each at its own supervision step, on `device`; `shape` is
    (T, L, D). Raises `ValueError` where the keys are not as many as the steps."""
    if len(keys) != len(steps):
        raise ValueError(f"{len(keys)} keys for {len(steps)} steps")
    return _drawn(keys, steps, shape, device)


def training_noise(
    seed: int,
    iteration: int,
    slots: Sequence[int],
    shape: tuple[int, int, int],
    device: torch.device = CPU,
) -> Float[Tensor, "T B L D"]:
    """Noise of one training iteration for the slots of these numbers among all slots of the run,
    on `device`; `shape` is (T, L, D). How many workers share the slots does not show."""
    return _drawn([_key(f"train\0{seed}\0{iteration}")] * len(slots), slots, shape, device)


def _key(text: str) -> Key:
    return blake2b(text.encode(), digest_size=16).digest()


def _drawn(
    keys: Sequence[Key],
    numbers: Sequence[int],
    shape: tuple[int, int, int],
    device: torch.device,
) -> Float[Tensor, "T B L D"]:
    """Standard normal noise, each row of its key and number."""
    # A row's words of the generator: two of key, then all but the first of the counter.
    words = np.frombuffer(b"".join(keys), dtype="<u4").reshape(len(keys), 4)
    streams = np.concatenate(
        [words[:, :2], np.array(numbers, dtype=np.uint32)[:, None], words[:, 2:]], axis=1
    )
    rows = normal(streams, math.prod(shape), device)
    return rows.reshape(len(keys), *shape).transpose(0, 1)
