"""Prior rollouts: N trajectories for each of many puzzles on one device (paper, section 2 and A.1).

All trajectories are rows of one batch. A trajectory that halts, or has done its supervision steps,
leaves the batch and the next one in the queue takes its place, so that compute goes only to live
rows. One rollout to the largest depth answers for every smaller depth too: at depth d a
trajectory's answer is the one it halted with, or the one it held at step d.

Shapes: J trajectories in all, M rows in the batch, S content positions, L all positions, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from gram_core.config import Config, Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from gram_core.model.gram import GRAM
from gram_core.model.recursion import State
from gram_core.noise import batch_noise, trajectory_key
from gram_core.precision import Precision, autocast
from gram_core.tasks.batches import Puzzles


class SampleConfig(Config, frozen=True, kw_only=True):
    """How trajectories are drawn. `depth` is the one that metrics.json reports, `depths` others
    that the same rollout answers for; `temperature` scales the prior's noise (gap G18). A
    trajectory halts where the halt head's probability is above `halt_threshold`.

    How a run is spread does not show in its results: `concurrency` is the number of Ray's workers,
    0 to sample in the calling process, and `max_concurrency` the number that the pool may grow to;
    each has `cores` CPU cores (by default, all there are shared out) and `num_gpus` GPUs (1 where
    there are any)."""

    seed: NonNegativeInt = 0
    width: PositiveInt = 20
    depth: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 16
    depths: tuple[Annotated[int, msgspec.Meta(ge=1, le=65535)], ...] = ()
    batch: PositiveInt = 256
    halting: bool = True
    halt_threshold: Fraction = 0.5
    compaction: bool = True
    temperature: NonNegativeFloat = 1.0
    precision: Precision = "fp32"
    concurrency: NonNegativeInt = 1
    max_concurrency: PositiveInt | None = None
    cores: PositiveInt | None = None
    num_gpus: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and not 1 <= self.concurrency <= self.max_concurrency:
            raise ValueError(
                f"max_concurrency {self.max_concurrency} must be at least concurrency "
                f"{self.concurrency}, and that at least 1"
            )

    @property
    def workers(self) -> tuple[int, int]:
        """The least and the most workers."""
        return self.concurrency, self.max_concurrency or self.concurrency

    @property
    def all_depths(self) -> tuple[int, ...]:
        """Every depth to report, ascending."""
        return tuple(sorted({self.depth, *self.depths}))


@dataclass(frozen=True)
class Trajectories:
    """Results, puzzle-major: J = puzzles x width rows for each of K depths."""

    depths: tuple[int, ...]
    steps: np.ndarray  # int64 [K, J]
    halted: np.ndarray  # bool [K, J]
    value: np.ndarray  # float32 [K, J]
    prediction: np.ndarray  # uint8 [K, J, S]


class _Live:
    """The rows in the batch: which trajectory each is, and its state."""

    def __init__(self, model: GRAM, puzzles: Puzzles, width: int) -> None:
        self.model = model
        self.puzzles = puzzles
        self.width = width
        self.job = np.empty(0, dtype=np.int64)
        self.step = np.empty(0, dtype=np.int64)
        self.done = np.empty(0, dtype=bool)
        self.state = model.initial_state(0)
        self.e_x = self.state.h

    def __len__(self) -> int:
        return len(self.job)

    def admit(self, jobs: np.ndarray) -> None:
        """Append fresh trajectories at z_0."""
        row = torch.from_numpy(jobs // self.width)
        inputs, puzzle = self.puzzles.inputs[row], self.puzzles.puzzle[row]
        e_x = self.model.embed(inputs.to(self.e_x.device), puzzle.to(self.e_x.device))
        zero = self.model.initial_state(len(jobs))
        self.state = State(torch.cat([self.state.h, zero.h]), torch.cat([self.state.l, zero.l]))
        self.e_x = torch.cat([self.e_x, e_x.to(self.e_x.dtype)])
        self.job = np.concatenate([self.job, jobs])
        self.step = np.concatenate([self.step, np.zeros(len(jobs), dtype=np.int64)])
        self.done = np.concatenate([self.done, np.zeros(len(jobs), dtype=bool)])

    def drop_done(self) -> None:
        """Keep the rows still on their way."""
        keep = np.flatnonzero(~self.done)
        index = torch.from_numpy(keep).to(self.e_x.device)
        self.state = State(self.state.h[index], self.state.l[index])
        self.e_x = self.e_x[index]
        self.job, self.step, self.done = self.job[keep], self.step[keep], self.done[keep]


@torch.inference_mode()
def rollout(
    model: GRAM,
    puzzles: Puzzles,
    config: SampleConfig,
    *,
    first_trajectory: int = 0,
    progress: Callable[[int], None] = lambda finished: None,
) -> Trajectories:
    """Draw `config.width` trajectories of every puzzle, numbered from `first_trajectory`.

    The result is a function of (weights, seed, puzzle id, trajectory number): batch size,
    compaction and neighbours do not enter. A deterministic model's trajectories are all equal, so
    one is computed and repeated. `progress` is called with the number of trajectories finished.
    """
    width = config.width if model.config.stochastic else 1
    depths = config.all_depths
    jobs = len(puzzles.ids) * width
    size = puzzles.inputs.shape[1]
    out = Trajectories(
        depths,
        steps=np.zeros((len(depths), jobs), dtype=np.int64),
        halted=np.zeros((len(depths), jobs), dtype=bool),
        value=np.zeros((len(depths), jobs), dtype=np.float32),
        prediction=np.zeros((len(depths), jobs, size), dtype=np.uint8),
    )
    keys = (
        [
            trajectory_key(config.seed, puzzles.ids[job // width], first_trajectory + job % width)
            for job in range(jobs)
        ]
        if model.config.stochastic
        else []
    )
    live, queued = _Live(model, puzzles, width), 0
    while queued < jobs or len(live):
        if queued < jobs and (config.compaction or not len(live)):
            room = min(config.batch - len(live), jobs - queued)
            live.admit(np.arange(queued, queued + room))
            queued += room
        live.state, prediction, value, wants = _supervision_step(model, live, keys, config)
        live.step += 1
        halts = wants & config.halting & ~live.done
        for k, depth in enumerate(depths):
            write = ~live.done & ((live.step == depth) | (halts & (live.step < depth)))
            job = live.job[write]
            out.steps[k, job] = live.step[write]
            out.halted[k, job] = halts[write]
            out.value[k, job] = value[write]
            out.prediction[k, job] = prediction[write]
        ends = ~live.done & (halts | (live.step == depths[-1]))
        live.done |= ends
        progress(int(ends.sum()) * (config.width // width))
        if config.compaction or live.done.all():
            live.drop_done()
    return out if width == config.width else _repeat(out, config.width)


def _supervision_step(
    model: GRAM, live: _Live, keys: Sequence[np.ndarray], config: SampleConfig
) -> tuple[State, UInt8[np.ndarray, "M S"], Float[np.ndarray, " M"], Bool[np.ndarray, " M"]]:
    """T transitions of every row, then answer, value and halt decision."""
    shape = (model.config.T, model.length, model.config.dim)
    noise: Tensor | None = None
    if keys:
        noise = batch_noise([keys[job] for job in live.job.tolist()], live.step.tolist(), shape)
        noise = noise.to(live.e_x.device) * config.temperature
    state = live.state
    with autocast(config.precision, live.e_x.device):
        for t in range(model.config.T):
            state = model.prior_transition(state, live.e_x, None if noise is None else noise[t])
        prediction = model.decode(state.h).argmax(-1).to(torch.uint8)
    feature = model.feature(state.h)
    wants = model.wants_halt(model.halt(feature), config.halt_threshold)
    # States may leave autocast in bfloat16; the queue admits float32 ones.
    state = State(state.h.float(), state.l.float())
    return state, prediction.cpu().numpy(), model.value(feature).cpu().numpy(), wants.cpu().numpy()


def _repeat(one: Trajectories, width: int) -> Trajectories:
    def rep(array: np.ndarray) -> np.ndarray:
        return array.repeat(width, axis=1)

    return Trajectories(
        one.depths, rep(one.steps), rep(one.halted), rep(one.value), rep(one.prediction)
    )
