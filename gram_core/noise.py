"""Gaussian noise as a function of what it is for, and of nothing else.

The noise of a supervision step is drawn by a generator of its own, seeded by a hash: for sampling
of (seed, puzzle, trajectory, step), for training of (seed, iteration, slot). So a trajectory keeps
its noise whatever batch, worker or order it is computed in, and a resumed run needs no generator's
state. The generator is torch's on the CPU, Mersenne's twister, which takes 32 bits of a seed: of
many steps a few have the noise of another puzzle's, which no statistic here can tell.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor

Key = bytes
# Fewer numbers than this are not worth a second thread.
PARALLEL = 1 << 18


def trajectory_key(seed: int, puzzle_id: str, trajectory: int) -> Key:
    """The key of one trajectory of one puzzle."""
    return blake2b(f"{seed}\0{puzzle_id}\0{trajectory}".encode(), digest_size=16).digest()


def step_noise(key: Key, step: int, shape: tuple[int, int, int]) -> Float[Tensor, "T L D"]:
    """Standard normal noise of one supervision step of one trajectory; `shape` is (T, L, D)."""
    return batch_noise([key], [step], shape)[:, 0]


def batch_noise(
    keys: Sequence[Key], steps: Sequence[int], shape: tuple[int, int, int]
) -> Float[Tensor, "T B L D"]:
    """Noise of a batch of trajectories, each at its own supervision step; `shape` is (T, L, D)."""
    pairs = zip(keys, steps, strict=True)
    return _drawn([_seed(key + step.to_bytes(4)) for key, step in pairs], shape)


def training_noise(
    seed: int, iteration: int, slots: Sequence[int], shape: tuple[int, int, int]
) -> Float[Tensor, "T B L D"]:
    """Noise of one training iteration for the slots of these numbers among all slots of the run;
    `shape` is (T, L, D). How many workers share the slots does not show."""
    text = f"train\0{seed}\0{iteration}\0".encode()
    return _drawn([_seed(text + str(slot).encode()) for slot in slots], shape)


def _seed(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest()) >> 1


def _drawn(seeds: Sequence[int], shape: tuple[int, int, int]) -> Float[Tensor, "T B L D"]:
    """Standard normal noise, row by row from generators of these seeds."""
    # A tensor of inference mode could not be written by other threads.
    with torch.inference_mode(False):
        out = torch.empty((len(seeds), *shape))
    threads = torch.get_num_threads()
    if threads == 1 or out.numel() < PARALLEL:
        _fill(out, seeds)
    else:
        cut = -(-len(seeds) // threads)
        starts = range(0, len(seeds), cut)
        pieces = [out[start : start + cut] for start in starts]
        list(_pool(threads).map(_fill, pieces, [seeds[s : s + cut] for s in starts]))
    return out.transpose(0, 1)


def _fill(out: Float[Tensor, "B T L D"], seeds: Sequence[int]) -> None:
    generator = torch.Generator()
    for row, seed in zip(out, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "noise")
