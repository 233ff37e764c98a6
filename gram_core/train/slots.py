"""The batch of slots: a fixed number of trajectories in progress, refilled as they end.

An iteration of training is one supervision step of every slot and one optimiser step. A slot
whose trajectory has halted, or has done N_sup supervision steps, takes a fresh example and starts
at z_0 (HRM's and TRM's carry). Everything here is part of the checkpoint.

Shapes: B slots, S content positions, L all positions, D width, N supervision steps.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gram_core.model.gram import GRAM
from gram_core.model.recursion import State
from gram_core.tasks.batches import Examples, Order
from gram_core.train.objective import Batch, Supervision


@dataclass(frozen=True)
class Reading:
    """Which share of the order of examples a worker reads."""

    seed: int
    rank: int = 0
    world: int = 1


class Slots:
    """B trajectories in progress, over the examples of one worker.

    `steps` is the number of supervision steps of a whole trajectory. With `halting`, a trajectory
    whose halt head says so ends early, except that with probability `exploration` it must first
    do a random number of steps in 2..N_sup (gap G7).
    """

    def __init__(
        self,
        model: GRAM,
        examples: Examples,
        count: int,
        steps: int,
        reading: Reading,
        *,
        halting: bool = False,
        exploration: float = 0.1,
    ) -> None:
        self.model = model
        self.examples = examples
        self.reading = reading
        self.halting = halting
        self.exploration = exploration
        self.steps = steps
        self.order = Order(len(examples), reading.seed)
        self.device = model.z0_h.device
        self.position = 0
        self.row = np.zeros(count, dtype=np.int64)
        self.step = np.zeros(count, dtype=np.int64)
        self.floor = np.ones(count, dtype=np.int64)
        # First trajectories are cut short by different amounts, so that slots end at different
        # iterations and every batch holds all depths.
        self.limit = 1 + np.arange(count, dtype=np.int64) % steps
        self.ended = np.ones(count, dtype=bool)
        zero = model.initial_state(count)
        self.state = State(zero.h.clone(), zero.l.clone())
        self.trace = torch.zeros(count, steps, model.config.dim, device=self.device)
        shape = (count, examples.inputs.shape[1])
        self.inputs = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self.target = torch.zeros_like(self.inputs)
        self.puzzle = torch.zeros(count, dtype=torch.int32, device=self.device)

    def __len__(self) -> int:
        return len(self.row)

    def refill(self) -> None:
        """Give every ended slot its next example and z_0."""
        slots = np.flatnonzero(self.ended)
        if not len(slots):
            return
        count, world = len(slots), self.reading.world
        fresh = self.position == 0
        places = self.order.take(self.position * world, count * world)[self.reading.rank :: world]
        self.position += count
        self.row[slots] = places
        self.step[slots] = 0
        if not fresh:
            self.limit[slots] = self.steps
        if self.halting and self.steps > 1:
            draw = np.random.default_rng((self.reading.seed, 1, self.reading.rank, self.position))
            explore = draw.random(count) < self.exploration
            floors = draw.integers(2, self.steps + 1, count)
            self.floor[slots] = np.where(explore, floors, 1)
        index = torch.from_numpy(slots).to(self.device)
        examples = self.examples.take(places)
        zero = self.model.initial_state(count)
        self.state.h[index], self.state.l[index] = zero.h, zero.l
        self.trace[index] = 0.0
        self.inputs[index] = examples.inputs.to(self.device)
        self.target[index] = examples.target.to(self.device)
        self.puzzle[index] = examples.puzzle.to(self.device)
        self.ended[:] = False

    def batch(self) -> Batch:
        """The slots as the objective takes them."""
        return Batch(
            state=self.state,
            inputs=self.inputs,
            target=self.target,
            puzzle=self.puzzle,
            step=torch.from_numpy(self.step).to(self.device, non_blocking=True),
            last=torch.from_numpy(self.step + 1 >= self.limit).to(self.device, non_blocking=True),
            may_halt=torch.from_numpy(self._may_halt()).to(self.device, non_blocking=True),
            trace=self.trace,
        )

    def _may_halt(self) -> np.ndarray:
        """Where the halt head may end the trajectory with the coming supervision step."""
        allowed: np.ndarray = (self.step + 1 >= self.floor) & self.halting
        return allowed

    def absorb(self, result: Supervision) -> None:
        """Take over the state after a supervision step and mark the slots that ended."""
        self.state = State(result.state.h.clone(), result.state.l.clone())
        self.trace = result.trace.clone()
        self.step += 1
        # Without halting the steps say it, and nothing waits for the device.
        self.ended = result.ended.cpu().numpy() if self.halting else self.step >= self.limit

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors."""
        return {
            "h": self.state.h,
            "l": self.state.l,
            "trace": self.trace,
            "row": torch.from_numpy(self.row),
            "step": torch.from_numpy(self.step),
            "floor": torch.from_numpy(self.floor),
            "limit": torch.from_numpy(self.limit),
            "ended": torch.from_numpy(self.ended),
            "position": torch.tensor(self.position),
        }

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; the examples themselves are read again by row."""
        self.state = State(saved["h"].to(self.device), saved["l"].to(self.device))
        self.trace = saved["trace"].to(self.device)
        self.row, self.step, self.floor, self.limit, self.ended = (
            saved[name].numpy().copy() for name in ("row", "step", "floor", "limit", "ended")
        )
        self.position = int(saved["position"])
        examples = self.examples.take(self.row)
        self.inputs = examples.inputs.to(self.device)
        self.target = examples.target.to(self.device)
        self.puzzle = examples.puzzle.to(self.device)
