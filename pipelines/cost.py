"""What a sampling run will cost, from a short calibration: printed before it begins."""

import copy
import time
from dataclasses import dataclass

import msgspec
import torch

from gram_core.model.gram import GRAM
from gram_core.sample.trajectory import SampleConfig, rollout
from gram_core.tasks.batches import Puzzles
from pipelines.compute import compute_with
from pipelines.runtime import device_name

# The calibration draws a batch of trajectories, or so many where a batch is smaller; but at most
# one in SHARE of all.
ENOUGH = 256
SHARE = 20


@dataclass(frozen=True)
class Cost:
    """Trajectories in all, supervision steps that one takes on average, and seconds of one worker
    a trajectory, with the number of trajectories that say so."""

    trajectories: int
    depth: int
    steps: float
    seconds: float
    measured: int

    def line(self, workers: int) -> str:
        """For a person."""
        steps = self.trajectories * self.steps
        return (
            f"{self.trajectories:,} trajectories of at most {self.depth} supervision steps, "
            f"about {steps:,.0f} steps in all: {self.trajectories * self.seconds / workers:,.0f} s "
            f"on {workers} worker{'s' * (workers > 1)} (calibrated on {self.measured})"
        )


def calibrate(model: GRAM, puzzles: Puzzles, config: SampleConfig, cores: int) -> Cost:
    """Draw a few trajectories of puzzles spread over the whole, on this machine with `cores`
    threads."""
    before = torch.get_num_threads()
    compute_with(cores)
    try:
        total = len(puzzles.ids) * config.width
        budget = min(max(config.batch, ENOUGH), max(1, total // SHARE))
        width = min(config.width, budget)
        rows = torch.linspace(0, len(puzzles.ids) - 1, max(1, budget // width)).long()
        few = Puzzles(
            [puzzles.ids[row] for row in rows.tolist()],
            puzzles.inputs[rows],
            puzzles.puzzle[rows],
        )
        # A copy: the job's own model goes to workers that may have another device.
        model = copy.deepcopy(model).to(device_name(config.num_gpus))
        # What the first verified answer will save cannot be told from a few.
        config = msgspec.structs.replace(config, stop_when_verified=False)
        # The first call of every kind pays for what later ones reuse.
        rollout(model, few, msgspec.structs.replace(config, width=1, depth=1, depths=()))
        start = time.perf_counter()
        drawn = rollout(model, few, msgspec.structs.replace(config, width=width))
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(before)
        if torch.cuda.is_available():
            # The GPU may be a worker's, too, which wants what torch would keep of it.
            del model
            torch.cuda.empty_cache()
    measured = len(few.ids) * width
    return Cost(
        trajectories=total,
        depth=config.all_depths[-1],
        steps=float(drawn.steps[-1].mean()),
        seconds=seconds / measured,
        measured=measured,
    )
