"""How cost grows: `python -m benchmarks.scaling`.

Three training iterations and one rollout of a small model, uncompiled, with one quantity at a time
doubled: batch, width (trajectories a puzzle), depth (supervision steps), D and L. Shows seconds,
and the exponent of a straight line through them in log-log. Prints Markdown.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gram_core.model.gram import GRAM, ModelConfig
from gram_core.sample.trajectory import SampleConfig, rollout
from gram_core.shape import TokenShape
from gram_core.tasks.batches import Examples, Puzzles
from gram_core.train.engine import PlainEngine, Supervised
from gram_core.train.loop import TrainConfig, make_slots, train
from gram_core.train.objective import ObjectiveConfig
from pipelines.compute import compute_with
from pipelines.runtime import device_name, entry, threads

TURNS = 3
BASE = {"batch": 32, "width": 20, "depth": 2, "D": 128, "L": 64}
GRID = {
    ("train", "batch"): (16, 32, 64, 128),
    ("train", "D"): (64, 128, 256, 512),
    ("train", "L"): (32, 64, 128, 256),
    ("sample", "width"): (10, 20, 40, 80),
    ("sample", "depth"): (1, 2, 4, 8),
    ("sample", "D"): (64, 128, 256, 512),
    ("sample", "L"): (32, 64, 128, 256),
}
PUZZLES = 2


def model_of(at: dict[str, int]) -> GRAM:
    """A small GRAM of this width and length."""
    torch.manual_seed(0)
    config = ModelConfig(dim=at["D"], heads=4, ffn=at["D"], K=2, T=2, N_sup=4, prefix_tokens=0)
    return GRAM(config, TokenShape(at["L"], 3)).to(device_name())


def tokens(rows: int, length: int) -> torch.Tensor:
    """Any inputs."""
    return torch.randint(1, 3, (rows, length)).to(torch.uint8)


def training(at: dict[str, int]) -> Callable[[], Any]:
    """What trains three iterations."""
    config = TrainConfig(steps=3, batch=at["batch"], log_every=3, checkpoint_every=3)
    model = model_of(at)
    module = Supervised(
        model, ObjectiveConfig(), None, prior_rows=config.prior_rows(model.config), precision="fp32"
    )
    engine = PlainEngine(module, config.optim)
    rows = Examples(tokens(256, at["L"]), tokens(256, at["L"]), torch.zeros(256, dtype=torch.int32))
    return lambda: train(engine, make_slots(engine, rows, config), config, None, lambda row: None)


def sampling(at: dict[str, int]) -> Callable[[], Any]:
    """What draws the trajectories of some puzzles to full depth."""
    model = model_of(at).eval()
    config = SampleConfig(
        width=at["width"], depth=at["depth"], batch=PUZZLES * at["width"], halting=False
    )
    puzzles = Puzzles.of([str(n) for n in range(PUZZLES)], tokens(PUZZLES, at["L"]))
    return lambda: rollout(model, puzzles, config)


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the table."""
    compute_with(threads())
    print(f"{device_name()}, {threads()} threads, fp32, uncompiled; at {BASE}\n")
    print("| phase | quantity | seconds | exponent |\n|---|---|---|---|")
    for (phase, quantity), values in GRID.items():
        calls = {
            value: (training if phase == "train" else sampling)({**BASE, quantity: value})
            for value in values
        }
        seconds: dict[int, list[float]] = {value: [] for value in values}
        for turn in range(TURNS + 1):
            for value, call in calls.items():
                start = time.perf_counter()
                call()
                if turn:
                    seconds[value].append(time.perf_counter() - start)
        middle = [statistics.median(seconds[value]) for value in values]
        exponent = np.polyfit(np.log(values), np.log(middle), 1)[0]
        shown = ", ".join(f"{v}: {s:.3f}" for v, s in zip(values, middle, strict=True))
        print(f"| {phase} | {quantity} | {shown} | {exponent:.2f} |", flush=True)


if __name__ == "__main__":
    entry(main)
