"""Prior rollouts: N trajectories for each of many puzzles on one device (paper, section 2 and A.1).

All trajectories are rows of one batch. A trajectory that halts, or has done its supervision steps,
leaves the batch and the next one in the queue takes its place, so that compute goes only to live
rows. One rollout to the largest depth answers for every smaller depth too: at depth d a
trajectory's answer is the one it halted with, or the one it held at step d.

Shapes: J trajectories in all, M rows in the batch, S content positions, L all positions, D width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from gram_core.config import Config, Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Seed
from gram_core.model.gram import GRAM
from gram_core.model.recursion import State
from gram_core.noise import Key, batch_noise, trajectory_key
from gram_core.precision import Precision, autocast, resolve
from gram_core.shape import Verifier
from gram_core.tasks.batches import Puzzles


class SampleConfig(Config, frozen=True, kw_only=True):
    """How trajectories are drawn. `depth` is the one that metrics.json reports, `depths` others
    that the same rollout answers for; `temperature` scales the prior's noise (gap G18). A
    trajectory halts where the halt head's probability is above `halt_threshold`.

    With `stop_when_verified`, a trajectory also halts where the task's rule accepts its answer, and
    the puzzle's later trajectories are not drawn: their rows have 0 steps and no answer. What is
    drawn is what drawing one after the other would have drawn. It answers for one depth.

    How a run is spread does not show in its results: `concurrency` is the number of Ray's workers,
    0 to sample in the calling process, and `max_concurrency` the number that the pool may grow to;
    each has `cores` CPU cores (by default, all there are shared out) and `num_gpus` GPUs (1 where
    there are any). `compile` says whether the supervision step is compiled: by default where the
    whole run is expected to take minutes."""

    seed: Seed = 0
    width: PositiveInt = 20
    depth: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 16
    depths: tuple[Annotated[int, msgspec.Meta(ge=1, le=65535)], ...] = ()
    batch: PositiveInt = 256
    halting: bool = True
    halt_threshold: Fraction = 0.5
    compaction: bool = True
    stop_when_verified: bool = False
    temperature: NonNegativeFloat = 1.0
    precision: Precision = "fp32"
    compile: bool | None = None
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
        if self.stop_when_verified and self.depths not in ((), (self.depth,)):
            raise ValueError(
                f"stop_when_verified answers for depth {self.depth} alone; leave depths empty"
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


class _Queue:
    """The trajectories still to begin, in order: puzzle by puzzle; or, where the first answer that
    is accepted ends a puzzle, all first trajectories, then all second ones."""

    def __init__(self, puzzles: int, width: int, *, until_verified: bool) -> None:
        jobs = np.arange(puzzles * width)
        self.left = jobs.reshape(puzzles, width).T.reshape(-1) if until_verified else jobs
        self.width = width
        # Of each puzzle, the lowest trajectory whose answer was accepted.
        self.accepted = np.full(puzzles, width)

    def __len__(self) -> int:
        return len(self.left)

    def take(self, room: int) -> np.ndarray:
        """The next ones that are wanted, so many at most."""
        taken, self.left = self.left[:room], self.left[room:]
        return taken

    def accept(self, jobs: np.ndarray) -> int:
        """The answers of these were accepted; how many that had not begun are given up."""
        np.minimum.at(self.accepted, jobs // self.width, jobs % self.width)
        before = len(self.left)
        self.left = self.left[~self.idle(self.left)]
        return before - len(self.left)

    def idle(self, jobs: np.ndarray) -> np.ndarray:
        """Which of these come after one whose answer was accepted."""
        found: np.ndarray = jobs % self.width > self.accepted[jobs // self.width]
        return found


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

    def advance(
        self, step: "SupervisionStep", noise: Tensor | None, spare: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take a supervision step, with so many spare rows; answers, values and wishes to halt."""
        rows = len(self)

        def filled(tensor: Tensor) -> Tensor:
            return F.pad(tensor, (0, 0, 0, 0, 0, spare)) if spare else tensor

        state = State(filled(self.state.h), filled(self.state.l))
        state, *told = step(state, filled(self.e_x), noise)
        self.state = State(state.h[:rows], state.l[:rows])
        prediction, value, wants = (tensor[:rows].cpu().numpy() for tensor in told)
        return prediction, value, wants

    def drop_done(self) -> None:
        """Keep the rows still on their way."""
        keep = np.flatnonzero(~self.done)
        index = torch.from_numpy(keep).to(self.e_x.device)
        self.state = State(self.state.h[index], self.state.l[index])
        self.e_x = self.e_x[index]
        self.job, self.step, self.done = self.job[keep], self.step[keep], self.done[keep]


def spare_rows(rows: int, slots: int, device: torch.device) -> int:
    """Rows that nobody reads: on a GPU, where a graph is recorded for each number of rows, those
    that fill up a power of two, or all slots; at least two rows, for the compiler takes one alone
    for a case of its own."""
    if device.type != "cuda":
        return 0
    return min(slots, 1 << max(1, (rows - 1).bit_length())) - rows


class SupervisionStep(nn.Module):
    """What a rollout runs again and again: T prior transitions of every row, then answer, value and
    halt decision. A module, so that it can be compiled as one graph."""

    def __init__(self, model: GRAM, config: SampleConfig) -> None:
        super().__init__()
        self.model = model
        self.threshold = config.halt_threshold
        # Decided here: a compiled graph cannot ask the processor.
        self.precision = resolve(config.precision, model.z0_h.device)

    def forward(
        self,
        state: State,
        e_x: Float[Tensor, "M L D"],
        noise: Float[Tensor, "T M L D"] | None,
    ) -> tuple[State, UInt8[Tensor, "M S"], Float[Tensor, " M"], Bool[Tensor, " M"]]:
        """The state, answer, value and wish to halt of each row; a deterministic model needs no
        noise."""
        model = self.model
        with autocast(self.precision, e_x.device):
            state = model.prior_transitions(state, e_x, noise, model.config.T)
            prediction = model.decode(state.h).argmax(-1).to(torch.uint8)
        feature = model.feature(state.h)
        wants = model.wants_halt(model.halt(feature), self.threshold)
        # States may leave autocast in bfloat16; the queue admits float32 ones.
        state = State(state.h.float(), state.l.float())
        return state, prediction, model.value(feature), wants

    @staticmethod
    def rows(state: State, e_x: Tensor, noise: Tensor | None) -> Iterable[tuple[Tensor, int]]:
        """The arguments that have M rows, each with the axis along which they are."""
        along = [(state.h, 0), (state.l, 0), (e_x, 0)]
        return along if noise is None else [*along, (noise, 1)]


@torch.inference_mode()
def rollout(
    model: GRAM,
    puzzles: Puzzles,
    config: SampleConfig,
    *,
    first_trajectory: int = 0,
    progress: Callable[[int], None] = lambda finished: None,
    step: SupervisionStep | None = None,
    verify: Verifier | None = None,
) -> Trajectories:
    """Draw `config.width` trajectories of every puzzle, numbered from `first_trajectory`.

    The result is a function of (weights, seed, puzzle id, trajectory number): batch size,
    compaction and neighbours do not enter. A deterministic model's trajectories are all equal, so
    one is computed and repeated. `progress` is called with the number of trajectories finished;
    `step` is a `SupervisionStep` of the same model and settings, where one was compiled; `verify`
    the task's rule, which `stop_when_verified` needs (`ValueError` without one).
    """
    if config.stop_when_verified and verify is None:
        raise ValueError("stop_when_verified: there is no rule to verify answers by")
    step = step or SupervisionStep(model, config)
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
    live = _Live(model, puzzles, width)
    queue = _Queue(len(puzzles.ids), width, until_verified=config.stop_when_verified)
    while len(queue) or len(live):
        if len(queue) and (config.compaction or not len(live)):
            with autocast(step.precision, live.e_x.device):  # as training embeds
                live.admit(queue.take(config.batch - len(live)))
        spare = spare_rows(len(live), config.batch, live.e_x.device)
        noise = _noise(model, live, keys, config, spare)
        prediction, value, wants = live.advance(step, noise, spare)
        live.step += 1
        halts = wants & config.halting & ~live.done
        given_up = 0
        if config.stop_when_verified and verify is not None:
            row = torch.from_numpy(live.job // width)
            accepted = verify(puzzles.inputs[row], torch.from_numpy(prediction)).numpy()
            halts |= accepted & ~live.done
            given_up = queue.accept(live.job[accepted & ~live.done])
            idle = queue.idle(live.job) & ~live.done
            given_up += int((idle & ~halts).sum())
            live.done |= idle & ~halts
        for k, depth in enumerate(depths):
            write = ~live.done & ((live.step == depth) | (halts & (live.step < depth)))
            job = live.job[write]
            out.steps[k, job] = live.step[write]
            out.halted[k, job] = halts[write]
            out.value[k, job] = value[write]
            out.prediction[k, job] = prediction[write]
        ends = ~live.done & (halts | (live.step == depths[-1]))
        live.done |= ends
        progress((int(ends.sum()) + given_up) * (config.width // width))
        if config.compaction or live.done.all():
            live.drop_done()
    if width < config.width:
        out = _repeat(out, config.width)
    if config.stop_when_verified:
        # Some that nobody wants any more had ended before it was known.
        number = np.tile(np.arange(config.width), len(puzzles.ids))
        idle = (queue.accepted < width).repeat(config.width)
        idle &= number > queue.accepted.repeat(config.width)
        for array in (out.steps, out.halted, out.value, out.prediction):
            array[:, idle] = 0
    return out


def _noise(
    model: GRAM, live: _Live, keys: Sequence[Key], config: SampleConfig, spare: int
) -> Float[Tensor, "T M L D"] | None:
    """What the prior's transitions of the next supervision step draw; for spare rows, too, so that
    it always lies in memory in the same way."""
    if not keys:
        return None
    shape = (model.config.T, model.length, model.config.dim)
    mine = [keys[job] for job in live.job.tolist()]
    mine, steps = mine + mine[:1] * spare, live.step.tolist() + [0] * spare
    noise = batch_noise(mine, steps, shape, live.e_x.device)
    return noise if config.temperature == 1 else noise * config.temperature


def _repeat(one: Trajectories, width: int) -> Trajectories:
    def rep(array: np.ndarray) -> np.ndarray:
        return array.repeat(width, axis=1)

    return Trajectories(
        one.depths, rep(one.steps), rep(one.halted), rep(one.value), rep(one.prediction)
    )
