"""What stopping early saves, on a trained run.

`python -m benchmarks.halting [RUN] [DEPTH] [TURNS] [--rows N]`: all test inputs of the run
(`nqueens8_gram`, which `make repro` trains), 20 trajectories, to DEPTH supervision steps (the run's
largest depth), TURNS times (3), N rows at a time (the run's `sample.batch`), in this process,
compiled on a GPU. Full depth halts nothing. Without compaction rows that halted stay
in the batch until all have; with it they leave, and the answers are the same. Then the trajectories
up to the first valid answer of each input (`sample.stop_when_verified`), and the share of the time
that drawing noise takes. Medians of the turns; prints Markdown.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from benchmarks.speed import device
from gram_core.compile import compiled
from gram_core.config import ConfigError
from gram_core.model.store import load_model
from gram_core.noise import batch_noise, trajectory_key
from gram_core.sample.trajectory import SampleConfig, SupervisionStep, Trajectories, rollout
from pipelines.compute import compute_with
from pipelines.dataset import held_out
from pipelines.params import MODELS, load_run
from pipelines.runtime import device_name, entry, say, threads

TURNS = 3
WIDTH = 20


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def main(arguments: Sequence[str]) -> None:
    """Measure in turns, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.halting")
    parser.add_argument("run", nargs="?", default="nqueens8_gram")
    parser.add_argument("depth", nargs="?", type=int)
    parser.add_argument("turns", nargs="?", type=int, default=TURNS)
    parser.add_argument("--rows", type=int)
    options = parser.parse_args(arguments)
    if options.turns < 1 or (options.depth is not None and options.depth < 1):
        parser.error("DEPTH and TURNS are at least 1")
    run = load_run(options.run)
    compute_with(threads())
    model, about = load_model(MODELS / run.name)
    model = model.to(device_name()).eval()
    puzzles, _ = held_out(run.task_name, run.task, about.get("identifiers", []))
    base = run.section("sample", SampleConfig)
    depth = options.depth or max(base.all_depths)
    base = msgspec.structs.replace(
        base, width=WIDTH, depth=depth, depths=(), halting=True, batch=options.rows or base.batch
    )
    if not run.task.verifies:
        raise ConfigError(f"the task of {run.name} has no rule to verify answers by")
    if not model.config.stochastic:
        raise ConfigError(f"{run.name} has one trajectory; choose a run with guidance full")
    ways = {
        "full depth": msgspec.structs.replace(base, halting=False),
        "halting without compaction": msgspec.structs.replace(base, compaction=False),
        "halting and compaction": base,
        "and stop at the first valid answer": msgspec.structs.replace(
            base, stop_when_verified=True
        ),
    }
    step = SupervisionStep(model, base)
    if model.z0_h.is_cuda:
        step = compiled(step, say, rows=step.rows)
        for config in [*ways.values()] * 3:  # compiles, and records each number of rows
            rollout(model, puzzles, config, step=step, verify=run.task.verify)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Trajectories] = {}
    for _ in range(options.turns):
        for name, config in ways.items():
            draw = partial(rollout, model, puzzles, config, step=step, verify=run.task.verify)
            taken, found[name] = timed(draw)
            seconds[name].append(taken)
    total = len(puzzles.ids) * WIDTH
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    full = middle["full depth"]
    print(f"{run.name}: {total:,} trajectories to depth {depth}, {base.batch} rows, "
          f"{device()}, {threads()} threads, medians of {options.turns} turns\n")  # fmt: skip
    # Wanted ones: what is done where a puzzle is answered need not be drawn.
    print("| sampling | seconds | wanted trajectories a second | ratio | steps a trajectory |")
    print("|---|---|---|---|---|")
    for name, s in middle.items():
        steps = found[name].steps.mean()
        print(f"| {name} | {s:.1f} | {total / s:,.0f} | {full / s:.2f} | {steps:.2f} |")
    one, other = (found[name] for name in list(ways)[1:3])
    same = (one.prediction == other.prediction).all(-1).mean()
    agree = np.array_equal(one.steps, other.steps)
    print(f"\nanswers alike with and without compaction: {same:.2%}, steps alike: {agree}")
    steps = int(found["halting and compaction"].steps.sum())
    shape = (model.config.T, model.length, model.config.dim)
    keys = [trajectory_key(0, str(row), 0) for row in range(base.batch)]

    def drawn() -> float:
        # Reading a number waits for a device that has them still to draw.
        return sum(
            float(batch_noise(keys, [step] * len(keys), shape, model.z0_h.device)[0, 0, 0, 0])
            for step in range(10)
        )

    each, _ = timed(drawn)
    noise = each / 10 / base.batch * steps
    print(f"noise: {noise / middle['halting and compaction']:.1%} of the time with compaction")


if __name__ == "__main__":
    entry(main)
