"""The batch of slots: a fixed number of trajectories in progress, refilled as they end.

An iteration of training is one supervision step of every slot and one optimiser step. A slot
whose trajectory has halted, or has done N_sup supervision steps, takes a fresh example and starts
at z_0 (HRM's and TRM's carry). Everything here is part of the checkpoint.

Slots are numbered over the whole run, and what a slot reads depends on its number alone: however
many workers and parts share the slots, training is the same. Every worker keeps the books of all
slots, a few integers each, and the states of its own.

Shapes: B slots of one worker, S content positions, L all positions, D width, N supervision steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gram_core.model.gram import GRAM
from gram_core.model.recursion import State
from gram_core.tasks.batches import Examples, Order
from gram_core.train.objective import Batch, Supervision


@dataclass(frozen=True)
class Share:
    """Which of a run's slots a worker holds: those of worker `rank` of `world`, in `parts` batches
    one after the other (gradient accumulation)."""

    rank: int = 0
    world: int = 1
    parts: int = 1

    def numbers(self, count: int) -> np.ndarray:
        """The numbers of this worker's slots among `count`, part by part. Part q of all G takes
        q, q + G, q + 2G ...: each holds the same share of the slots that follow the prior, which
        are the first ones (`TrainConfig.prior_rows` sees to it that there is one)."""
        parts = self.world * self.parts
        first = self.rank * self.parts
        return np.arange(count).reshape(-1, parts).T[first : first + self.parts].reshape(-1)


class Slots:
    """`count` trajectories in progress, of which this worker holds its `share`.

    `steps` is the number of supervision steps of a whole trajectory. With `halting`, a trajectory
    whose halt head says so ends early, except that with probability `exploration` it must first
    do a random number of steps in 2..N_sup (gap G7). `gather` brings the workers' tensors
    together, one behind the other.
    """

    def __init__(
        self,
        model: GRAM,
        examples: Examples,
        count: int,
        steps: int,
        seed: int,
        share: Share = Share(),
        *,
        halting: bool = False,
        exploration: float = 0.1,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.model = model
        self.examples = examples
        self.seed = seed
        self.share = share
        self.halting = halting
        self.exploration = exploration
        self.gather = gather
        self.steps = steps
        self.order = Order(len(examples), seed)
        self.device = model.z0_h.device
        self.mine = share.numbers(count)
        # Of all slots.
        self.position = 0
        self.row = np.zeros(count, dtype=np.int64)
        self.step = np.zeros(count, dtype=np.int64)
        self.floor = np.ones(count, dtype=np.int64)
        # First trajectories are cut short by different amounts, so that slots end at different
        # iterations and every batch holds all depths.
        self.limit = 1 + np.arange(count, dtype=np.int64) % steps
        self.ended = np.ones(count, dtype=bool)
        # Of this worker's.
        own = len(self.mine)
        zero = model.initial_state(own)
        self.state = State(zero.h.clone(), zero.l.clone())
        self.trace = torch.zeros(own, steps, model.config.dim, device=self.device)
        self.inputs = torch.zeros(
            (own, examples.inputs.shape[1]), dtype=torch.uint8, device=self.device
        )
        self.target = torch.zeros_like(self.inputs)
        self.puzzle = torch.zeros(own, dtype=torch.int32, device=self.device)

    def __len__(self) -> int:
        return len(self.mine)

    def refill(self) -> None:
        """Give every ended slot its next example and z_0."""
        slots = np.flatnonzero(self.ended)
        count = len(slots)
        if not count:
            return
        fresh = self.position == 0
        self.row[slots] = self.order.take(self.position, count)
        self.position += count
        self.step[slots] = 0
        if not fresh:
            self.limit[slots] = self.steps
        if self.halting and self.steps > 1:
            draw = np.random.default_rng((self.seed, 1, self.position))
            explore = draw.random(count) < self.exploration
            floors = draw.integers(2, self.steps + 1, count)
            self.floor[slots] = np.where(explore, floors, 1)
        own = np.flatnonzero(self.ended[self.mine])
        self.ended[:] = False
        if not len(own):
            return
        # Not waited for, here and in `batch`: a copy to a GPU that blocks waits for all that it
        # still has to do.
        index = torch.from_numpy(own).to(self.device, non_blocking=True)
        examples = self.examples.take(self.row[self.mine[own]])
        zero = self.model.initial_state(len(own))
        self.state.h[index], self.state.l[index] = zero.h, zero.l
        self.trace[index] = 0.0
        for own_rows, fresh_rows in (
            (self.inputs, examples.inputs),
            (self.target, examples.target),
            (self.puzzle, examples.puzzle),
        ):
            own_rows[index] = fresh_rows.to(self.device, non_blocking=True)

    def part(self, number: int) -> slice:
        """This worker's slots that part `number` of its share takes."""
        size = len(self) // self.share.parts
        return slice(number * size, (number + 1) * size)

    def batch(self, number: int = 0) -> Batch:
        """The slots of one part as the objective takes them."""
        own = self.part(number)
        slots = self.mine[own]
        step = self.step[slots]
        may_halt = (step + 1 >= self.floor[slots]) & self.halting

        def onto(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device, non_blocking=True)

        return Batch(
            state=State(self.state.h[own], self.state.l[own]),
            inputs=self.inputs[own],
            target=self.target[own],
            puzzle=self.puzzle[own],
            step=onto(step),
            last=onto(step + 1 >= self.limit[slots]),
            may_halt=onto(may_halt),
            trace=self.trace[own],
        )

    def absorb(self, results: Sequence[Supervision]) -> None:
        """Take over the states after a supervision step of every part, and mark the slots that
        ended."""
        self.state = State(
            _joined([result.state.h for result in results]),
            _joined([result.state.l for result in results]),
        )
        self.trace = _joined([result.trace for result in results])
        self.step += 1
        if self.halting:
            ended = torch.cat([result.ended for result in results]).to(torch.uint8)
            self.ended = self._of_all(ended).cpu().numpy().astype(bool)
        else:
            # The steps say it, and nothing waits for the device.
            self.ended = self.step >= self.limit

    def _of_all(self, own: Tensor) -> Tensor:
        """The workers' slots in the order of their numbers."""
        together = self.gather(own)
        parts = self.share.world * self.share.parts
        by_part = together.reshape(parts, -1, *together.shape[1:])
        return by_part.transpose(0, 1).reshape(together.shape)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, of all slots of the run; every worker calls this."""
        return {
            "h": self._of_all(self.state.h),
            "l": self._of_all(self.state.l),
            "trace": self._of_all(self.trace),
            "row": torch.from_numpy(self.row),
            "step": torch.from_numpy(self.step),
            "floor": torch.from_numpy(self.floor),
            "limit": torch.from_numpy(self.limit),
            "ended": torch.from_numpy(self.ended),
            "position": torch.tensor(self.position),
        }

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, whoever shared the slots then; the examples themselves
        are read again by row."""
        mine = torch.from_numpy(self.mine)
        self.state = State(saved["h"][mine].to(self.device), saved["l"][mine].to(self.device))
        self.trace = saved["trace"][mine].to(self.device)
        self.row, self.step, self.floor, self.limit, self.ended = (
            saved[name].numpy().copy() for name in ("row", "step", "floor", "limit", "ended")
        )
        self.position = int(saved["position"])
        examples = self.examples.take(self.row[self.mine])
        self.inputs = examples.inputs.to(self.device)
        self.target = examples.target.to(self.device)
        self.puzzle = examples.puzzle.to(self.device)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts as one tensor; one alone as it is: nobody reads it any more where slots are
    refilled in place, for the backward and the optimiser's step are done."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
