"""Training and sampling against this machine's own limit: `python -m benchmarks.speed [WORD ...]`.

For the paper's size and a small one, in fp32 and bf16: seconds of one iteration of the training
loop (all of it: refill, noise, forward, backward, optimiser, average) and of a rollout at full
depth, analytic FLOPs, and the share of the GEMM limit: the best rate of `F.linear` at the shapes of
both sizes, measured in the same turns. Every measurement lives in a process of its own; they take
turns, and medians are shown. Words limit what is measured (`train small`, `bf16`). Prints Markdown;
a full run writes benchmarks/latest.json.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import flops
from gram_core.compile import compiled
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.sample.trajectory import SampleConfig, SupervisionStep, rollout
from gram_core.tables import tokens_numpy
from gram_core.tasks.batches import Examples, Puzzles
from gram_core.tasks.nqueens import NQueens, NQueensConfig
from gram_core.train.engine import PlainEngine, Supervised
from gram_core.train.loop import TrainConfig, make_slots, train
from gram_core.train.objective import ObjectiveConfig
from pipelines.runtime import device_name, entry, environment, say, threads

LATEST = Path("benchmarks/latest.json")
TURNS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# 8 x 8 boards: 64 positions. No prefix, as in the figures of others that are compared with.
MODELS = {
    "paper": ModelConfig(prefix_tokens=0),
    "small": ModelConfig(dim=128, heads=4, ffn=128, K=2, T=2, N_sup=4, prefix_tokens=0),
}
BATCH = {"paper": 32, "small": 64}
PUZZLES, WIDTH = 4, 20
# Work in one turn: some seconds on two cores.
STEPS = {"paper": 2, "small": 10}
DEPTH = {"paper": 1, "small": 4}
LENGTH = 64


def boards() -> tuple[NQueens, Examples]:
    """The task of the benchmarks and its training rows."""
    task = NQueens(NQueensConfig())
    table = task.generate(Path).train
    inputs, target = (torch.from_numpy(tokens_numpy(table[c]).copy()) for c in ("inputs", "target"))
    return task, Examples(inputs, target, torch.zeros(len(inputs), dtype=torch.int32))


def limit(dtype: str, turn: Callable[[float], None]) -> None:
    """Turns that give the best rate of `F.linear` over the shapes of both sizes, in FLOP/s."""
    device, kind = device_name(), DTYPES[dtype]
    shapes = []
    for size, model in MODELS.items():
        rows = BATCH[size] * LENGTH
        d, f = model.dim, model.ffn
        for fan_in, fan_out in ((d, 3 * d), (d, 2 * f), (f, d)):
            x = torch.randn(rows, fan_in, device=device, dtype=kind)
            w = torch.randn(fan_out, fan_in, device=device, dtype=kind)
            shapes.append((x, w, 2 * rows * fan_in * fan_out))
    while True:
        best = 0.0
        for x, w, count in shapes:
            repeats = max(3, int(2e10 / count))
            F.linear(x, w)
            synchronise()
            start = time.perf_counter()
            for _ in range(repeats):
                F.linear(x, w)
            synchronise()
            best = max(best, count * repeats / (time.perf_counter() - start))
        turn(best)


def synchronise() -> None:
    """Wait for the device's queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def training(
    size: str, dtype: str, turn: Callable[[float], None], batch: int | None = None
) -> None:
    """Turns that give the seconds of an iteration of the training loop."""
    task, examples = boards()
    model = MODELS[size]
    steps = STEPS[size]
    config = TrainConfig(
        steps=10**9, batch=batch or BATCH[size], log_every=steps, checkpoint_every=steps,
        precision="bf16" if dtype == "bf16" else "fp32",
    )  # fmt: skip
    torch.manual_seed(0)
    module = Supervised(
        GRAM(model, task.shape).to(device_name()),
        ObjectiveConfig(),
        task.verify,
        prior_rows=config.prior_rows(model),
        precision=config.precision,
    )
    engine = PlainEngine(compiled(module, say), config.optim)
    start = 0.0

    def report(row: dict[str, float]) -> None:
        nonlocal start
        synchronise()
        if row["step"] > steps:  # the first turn compiles
            turn((time.perf_counter() - start) / steps)
        start = time.perf_counter()

    train(engine, make_slots(engine, examples, config), config, None, report)


def sampling(size: str, dtype: str, turn: Callable[[float], None]) -> None:
    """Turns that give the seconds of a rollout at full depth."""
    task, examples = boards()
    torch.manual_seed(0)
    model = GRAM(MODELS[size], task.shape).to(device_name()).eval()
    config = SampleConfig(
        width=WIDTH, depth=DEPTH[size], batch=PUZZLES * WIDTH, halting=False,
        precision="bf16" if dtype == "bf16" else "fp32",
    )  # fmt: skip
    puzzles = Puzzles.of([str(n) for n in range(PUZZLES)], examples.inputs[:PUZZLES])
    step = compiled(SupervisionStep(model, config), say, dynamic=True)
    rollout(model, puzzles, config, step=step)
    while True:
        synchronise()
        start = time.perf_counter()
        rollout(model, puzzles, config, step=step)
        synchronise()
        turn(time.perf_counter() - start)


def child(what: list[str]) -> None:
    """Measure in turns: a number for each line that comes in."""
    torch.set_num_threads(int(what.pop()))

    def turn(value: float) -> None:
        print(value, flush=True)
        if not sys.stdin.readline():
            sys.exit()

    if what[0] == "limit":
        limit(what[1], turn)
    elif what[0] == "train":
        training(what[1], what[2], turn)
    else:
        sampling(what[1], what[2], turn)


class Child:
    """A process that measures when it is told to."""

    def __init__(self, what: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed", "--child", *what, str(threads())],
            env={**os.environ, **environment()}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.values: list[float] = []
        self._read()
        self.values.clear()  # the first turn warms up

    def _read(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a measurement ended: {self.process.args!r}")
        self.values.append(float(line))

    def measure(self) -> None:
        """One turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._read()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(phase: str, size: str) -> int:
    """FLOPs of what is timed."""
    model = MODELS[size]
    if phase == "train":
        rows = BATCH[size]
        prior = TrainConfig(batch=rows).prior_rows(model)
        return flops.training_step(model, LENGTH, rows, prior)
    return DEPTH[size] * flops.sampling_step(model, LENGTH, PUZZLES * WIDTH)


def supervised(phase: str, size: str) -> int:
    """Supervision steps, of one sample each, in what is timed."""
    return BATCH[size] if phase == "train" else PUZZLES * WIDTH * DEPTH[size]


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table and write it."""
    cases = [
        (phase, size, dtype)
        for phase in ("train", "sample")
        for size in MODELS
        for dtype in DTYPES
        if all(word in (phase, size, dtype) for word in arguments)
    ]
    limits = {dtype: Child(["limit", dtype]) for dtype in sorted({case[2] for case in cases})}
    children = {case: Child(case) for case in cases}
    for _ in range(TURNS):
        for measured in (*limits.values(), *children.values()):
            measured.measure()
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    print(f"{device_name()}, {threads()} threads, load {load:.1f}, medians of {TURNS} turns\n")
    print("| phase | size | dtype | seconds | supervision steps a second | GFLOP | GFLOP/s "
          "| GEMM limit | share |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for (phase, size, dtype), measured in children.items():
        best = statistics.median(limits[dtype].values)
        seconds = statistics.median(measured.values)
        count = work(phase, size)
        rate = supervised(phase, size) / seconds
        share = count / seconds / best
        rows.append(
            {
                "phase": phase, "size": size, "dtype": dtype, "device": device_name(),
                "threads": threads(), "seconds": seconds, "flops": count, "gemm_limit": best,
                "share": share, "supervision_steps_per_second": rate, "load": load,
            }
        )  # fmt: skip
        print(f"| {phase} | {size} | {dtype} | {seconds:.3f} | {rate:.0f} | {count / 1e9:.1f} "
              f"| {count / seconds / 1e9:.0f} | {best / 1e9:.0f} | {share:.0%} |")  # fmt: skip
    for measured in (*limits.values(), *children.values()):
        measured.close()
    if len(rows) == 8:
        LATEST.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        entry(main)
