"""Counter-based Gaussian noise: a function of (seed, puzzle, trajectory, step) and of nothing else.

A trajectory keeps its noise whatever batch, worker or order it is computed in. The generator is
Philox (numpy), keyed by a hash of seed, puzzle and trajectory, with the supervision step as its
counter; nothing is consumed in sequence from one step to the next.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Key = np.ndarray  # two uint64 words


def trajectory_key(seed: int, puzzle_id: str, trajectory: int) -> Key:
    """The 128-bit Philox key of one trajectory of one puzzle."""
    text = f"{seed}\0{puzzle_id}\0{trajectory}".encode()
    return np.frombuffer(blake2b(text, digest_size=16).digest(), dtype=np.uint64)


def step_noise(key: Key, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise of `shape` for one supervision step of one trajectory."""
    # The step sits in the third counter word, 2^128 draws away from its neighbours.
    philox = np.random.Philox(key=key, counter=np.array([0, 0, step, 0], dtype=np.uint64))
    return np.random.Generator(philox).standard_normal(shape, dtype=np.float32)


def batch_noise(
    keys: Sequence[Key], steps: Sequence[int], shape: tuple[int, int, int]
) -> Float[Tensor, "T B L D"]:
    """Noise of a batch of trajectories, each at its own supervision step; `shape` is (T, L, D)."""
    transitions, length, dim = shape
    out = np.empty((transitions, len(keys), length, dim), dtype=np.float32)
    for row, (key, step) in enumerate(zip(keys, steps, strict=True)):
        out[:, row] = step_noise(key, step, shape)
    return torch.from_numpy(out)


def training_noise(
    seed: int, iteration: int, slots: Sequence[int], shape: tuple[int, int, int]
) -> Float[Tensor, "T B L D"]:
    """Standard normal noise of one training iteration for the slots of these numbers; `shape` is
    (T, L, D).

    Each slot's noise is seeded anew each iteration by its number among all slots of the run, so
    that a resumed run needs no generator state, and how many workers share the slots does not show.
    """
    out = torch.empty((len(slots), *shape))
    generator = torch.Generator()
    for row, slot in enumerate(slots):
        text = f"train\0{seed}\0{iteration}\0{slot}".encode()
        generator.manual_seed(int.from_bytes(blake2b(text, digest_size=8).digest()) >> 1)
        torch.randn(shape, generator=generator, out=out[row])
    return out.transpose(0, 1)
