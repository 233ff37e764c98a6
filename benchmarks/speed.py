"""Speed as ratios: `python -m benchmarks.speed`; docs/performance.md has a table of one machine.

The training step of the CPU profile's GRAM run, changed in one respect at a time, each in a process
of its own; then sampling with and without compaction. Prints a Markdown table. Needs data/nqueens8
(`dvc repro augment@nqueens8`).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch

from gram_core.noise import training_noise
from gram_core.sample.trajectory import SampleConfig, rollout
from gram_core.tasks.batches import Puzzles
from gram_core.train.engine import PlainEngine
from gram_core.train.loop import make_slots, transitions
from pipelines.dataset import examples, held_out
from pipelines.params import load_run
from pipelines.runtime import ALLOCATOR, PATIENT, entry, threads
from pipelines.train import Job, build_module

RUN = "nqueens8_gram"
STEPS, WARM = 60, 6
BASE: dict[str, Any] = {"compile": True, "precision": "auto", "threads": threads(), "env": {}}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without torch.compile": {"compile": False},
    "in fp32": {"precision": "fp32"},
    "on one thread": {"threads": 1},
    "waiting threads spin": {"env": {"OMP_WAIT_POLICY": "ACTIVE"}},
    "waiting threads sleep": {"env": {"OMP_WAIT_POLICY": "PASSIVE"}},
    "glibc's own allocator settings": {"env": dict.fromkeys(ALLOCATOR, None)},
}


def training(compile: bool, precision: str, cores: int) -> float:
    """Optimiser steps a second."""
    torch.set_num_threads(cores)
    job = Job.of(load_run(RUN))
    train = msgspec.structs.replace(job.train, precision=precision, compile=compile)
    job = replace(job, train=train)
    engine = PlainEngine(build_module(job, "cpu"), train.optim)
    slots = make_slots(engine, examples("nqueens8", job.task, "train"), train)
    shape = (transitions(job.model), engine.model.length, job.model.dim)
    numbers = slots.mine.tolist()
    start = 0.0
    for iteration in range(WARM + STEPS):
        if iteration == WARM:
            start = time.perf_counter()
        slots.refill()
        noise = training_noise(0, iteration, numbers, shape)
        result = engine.forward(slots.batch(), noise)
        engine.step(result.loss, 1e-3)
        slots.absorb([result])
    return STEPS / (time.perf_counter() - start)


def sampling(compaction: bool) -> float:
    """Trajectories a second, where half of all halt at each step."""
    torch.set_num_threads(threads())
    run = load_run(RUN)
    job = Job.of(run)
    model = build_module(job, "cpu").model.eval()
    # Features of an untrained model are centred, so a zero bias halts about half.
    torch.nn.init.normal_(model.halt.map.weight)
    torch.nn.init.zeros_(model.halt.map.bias)
    puzzles, _ = held_out(run.task_name, run.task)
    few = Puzzles.of(puzzles.ids[:60], puzzles.inputs[:60])
    config = SampleConfig(width=20, depth=16, batch=256, compaction=compaction)
    start = time.perf_counter()
    rollout(model, few, config)
    return 60 * 20 / (time.perf_counter() - start)


def child(arguments: dict[str, Any]) -> float:
    """Run one measurement in a process with the environment it asks for."""
    environment = {**os.environ, **ALLOCATOR, **PATIENT}
    for name, value in arguments.pop("env", {}).items():
        if value is None:
            environment.pop(name, None)
        else:
            environment.pop("GOMP_SPINCOUNT", None)
            environment[name] = value
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", json.dumps(arguments)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def main(arguments: Sequence[str]) -> None:
    """Measure everything and print the table."""
    print("| training step | steps a second | ratio |\n|---|---|---|", flush=True)
    base = 0.0
    for name, change in VARIANTS.items():
        rate = child({"what": "training", **BASE, **change})
        base = base or rate
        print(f"| {name} | {rate:.1f} | {rate / base:.2f} |", flush=True)
    print("\n| sampling, halting on | trajectories a second | ratio |\n|---|---|---|", flush=True)
    with_compaction = child({"what": "sampling", "compaction": True})
    without = child({"what": "sampling", "compaction": False})
    print(f"| with compaction | {with_compaction:.0f} | 1.00 |")
    print(f"| without | {without:.0f} | {without / with_compaction:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asked = json.loads(sys.argv[1])
        if asked["what"] == "training":
            print(training(asked["compile"], asked["precision"], asked["threads"]))
        else:
            print(sampling(asked["compaction"]))
    else:
        entry(main)
