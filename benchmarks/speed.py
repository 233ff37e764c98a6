"""Training and sampling against this machine's own limit: `python -m benchmarks.speed [WORD ...]`.

For the paper's size and a small one, in fp32 and bf16: seconds of one iteration of the training
loop (all of it: refill, noise, forward, backward, optimiser, average) and of a rollout at full
depth, analytic FLOPs, and the share of the GEMM limit: the best rate of `F.linear` at the shapes of
both sizes (on a GPU, at any of those or a large square), measured in the same turns. Every
measurement lives in a process of its own; they take turns, and medians are shown. Words limit what
is measured (`train small`, `bf16`), `--rows` says for which batches. Prints Markdown; a full run
writes benchmarks/latest.json (on a GPU docs/results/gpu/speed.json), or the file of `--out`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import flops
from gram_core.compile import compiled
from gram_core.errors import GramError
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.sample.trajectory import SampleConfig, SupervisionStep, rollout
from gram_core.tables import tokens_numpy
from gram_core.tasks.batches import Examples, Puzzles
from gram_core.tasks.nqueens import NQueens, NQueensConfig
from gram_core.train.engine import PlainEngine, Supervised
from gram_core.train.loop import TrainConfig, make_slots, train
from gram_core.train.objective import ObjectiveConfig
from pipelines.compute import compute_with
from pipelines.runtime import device_name, entry, environment, say, threads

LATEST = {"cpu": Path("benchmarks/latest.json"), "cuda": Path("docs/results/gpu/speed.json")}
TURNS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORDS = ("train", "sample", "paper", "small", *DTYPES)
# 8 x 8 boards: 64 positions. No prefix, as in the figures of others that are compared with.
MODELS = {
    "paper": ModelConfig(prefix_tokens=0),
    "small": ModelConfig(dim=128, heads=4, ffn=128, K=2, T=2, N_sup=4, prefix_tokens=0),
}
DEPTH = {"paper": 1, "small": 4}
WIDTH = 20
LENGTH = 64


@dataclass(frozen=True)
class Load:
    """What keeps a device busy: batches by phase and size (all in bf16, the largest in fp32 too),
    iterations of training in one turn, and FLOPs of one measurement of the limit."""

    rows: Mapping[tuple[str, str], tuple[int, ...]]
    steps: Mapping[str, int]
    limit: float


LOADS = {
    "cpu": Load(
        {("train", "paper"): (32,), ("train", "small"): (64,),
         ("sample", "paper"): (80,), ("sample", "small"): (80,)},
        {"paper": 2, "small": 10},
        2e10,
    ),
    "cuda": Load(
        {("train", "paper"): (32, 128, 256, 512), ("train", "small"): (64, 4096),
         ("sample", "paper"): (80, 640), ("sample", "small"): (80, 2560)},
        {"paper": 10, "small": 30},
        2e12,
    ),
}  # fmt: skip
SQUARE = 8192
CHECKED = 500  # iterations, at the most: as often as in a run by default weights are looked at


def boards() -> tuple[NQueens, Examples]:
    """The task of the benchmarks and its training rows."""
    task = NQueens(NQueensConfig()).on(device_name())
    table = task.generate(Path).train
    inputs, target = (torch.from_numpy(tokens_numpy(table[c]).copy()) for c in ("inputs", "target"))
    return task, Examples(inputs, target, torch.zeros(len(inputs), dtype=torch.int32))


def limit(dtype: str, turn: Callable[[float], None]) -> None:
    """Turns that give the best rate of `F.linear` over the shapes of both sizes, in FLOP/s."""
    device, kind = device_name(), DTYPES[dtype]
    load = LOADS[device]
    sizes = []
    for size, model in MODELS.items():
        rows = max(load.rows["train", size]) * LENGTH
        d, f = model.dim, model.ffn
        sizes += [(rows, d, 3 * d), (rows, d, 2 * f), (rows, f, d)]
    if device == "cuda":
        sizes.append((SQUARE, SQUARE, SQUARE))
    shapes = []
    for rows, fan_in, fan_out in sizes:
        x = torch.randn(rows, fan_in, device=device, dtype=kind)
        w = torch.randn(fan_out, fan_in, device=device, dtype=kind)
        shapes.append((x, w, 2 * rows * fan_in * fan_out))
    while True:
        best = 0.0
        for x, w, count in shapes:
            repeats = max(3, int(load.limit / count))
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


def training(size: str, dtype: str, batch: int, turn: Callable[[float], None]) -> None:
    """Turns that give the seconds of an iteration of the training loop."""
    task, examples = boards()
    model, steps = MODELS[size], LOADS[device_name()].steps[size]
    config = TrainConfig(
        steps=10**9, batch=batch, log_every=steps, checkpoint_every=CHECKED // steps * steps,
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
    warm = steps  # the first turn compiles

    def report(row: dict[str, float]) -> None:
        nonlocal start
        synchronise()
        if row["step"] > warm:
            turn((time.perf_counter() - start) / steps)
        start = time.perf_counter()

    train(engine, make_slots(engine, examples, config), config, None, report)


def sampling(size: str, dtype: str, batch: int, turn: Callable[[float], None]) -> None:
    """Turns that give the seconds of a rollout at full depth."""
    task, examples = boards()
    torch.manual_seed(0)
    model = GRAM(MODELS[size], task.shape).to(device_name()).eval()
    config = SampleConfig(
        width=WIDTH, depth=DEPTH[size], batch=batch, halting=False,
        precision="bf16" if dtype == "bf16" else "fp32",
    )  # fmt: skip
    count = batch // WIDTH
    puzzles = Puzzles.of([str(n) for n in range(count)], examples.inputs[:count])
    step = SupervisionStep(model, config)
    step = compiled(step, say, rows=step.rows)
    for _ in range(3):  # compiles; on a GPU also records
        rollout(model, puzzles, config, step=step)
    while True:
        synchronise()
        start = time.perf_counter()
        rollout(model, puzzles, config, step=step)
        synchronise()
        turn(time.perf_counter() - start)


def child(what: list[str]) -> None:
    """Measure in turns: a number for each line that comes in."""
    compute_with(int(what.pop()))

    def turn(value: float) -> None:
        print(value, flush=True)
        if not sys.stdin.readline():
            sys.exit()

    if what[0] == "limit":
        limit(what[1], turn)
    else:
        measure = training if what[0] == "train" else sampling
        measure(what[1], what[2], int(what[3]), turn)


class Child:
    """A process that measures when it is told to."""

    def __init__(self, *what: object) -> None:
        self.what = " ".join(map(str, what))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed", "--child", *map(str, what), str(threads())],
            env={**os.environ, **environment()}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.values: list[float] = []

    def warm(self) -> bool:
        """Wait for the first turn, which compiles, and forget it; whether it came."""
        came = self._read()
        self.values.clear()
        return came

    def _read(self) -> bool:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            self.values.append(float(line))
        else:
            say(f"left out, for its process ended: {self.what}")
        return bool(line)

    def measure(self) -> None:
        """One turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if not self._read():
            raise SystemExit("a measurement ended")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def started(what: Sequence[tuple[object, ...]]) -> dict[tuple[object, ...], Child]:
    """The processes, warm: on a CPU one after the other, on a GPU they compile at once. One that
    ends, for want of memory, say, is left out."""
    children: dict[tuple[object, ...], Child] = {}
    together = device_name() != "cpu"
    for one in what:
        children[one] = Child(*one)
        if not together and not children[one].warm():
            del children[one]
    return {one: c for one, c in children.items() if not together or c.warm()}


def work(phase: str, size: str, rows: int) -> int:
    """FLOPs of what is timed."""
    model = MODELS[size]
    if phase == "train":
        prior = TrainConfig(batch=rows).prior_rows(model)
        return flops.training_step(model, LENGTH, rows, prior)
    return DEPTH[size] * flops.sampling_step(model, LENGTH, rows)


def supervised(phase: str, size: str, rows: int) -> int:
    """Supervision steps, of one sample each, in what is timed."""
    return rows if phase == "train" else rows * DEPTH[size]


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed")
    parser.add_argument("words", nargs="*", metavar="WORD", help=f"what to measure: {WORDS}")
    parser.add_argument("--rows", nargs="+", type=int, help="batches, in place of the usual ones")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args(arguments)
    for word in options.words:
        if word not in WORDS:
            parser.error(f"unknown word {word!r}; known: {', '.join(WORDS)}")
    for rows in options.rows or ():
        check_rows(parser, rows, sampled="train" not in options.words)
    usual = LOADS[device_name()].rows
    cases = [
        (phase, size, dtype, rows)
        for phase in ("train", "sample")
        for size in MODELS
        for dtype in DTYPES
        if all(word in (phase, size, dtype) for word in options.words)
        for rows in options.rows or usual[phase, size][0 if dtype == "bf16" else -1 :]
    ]
    if not cases:
        parser.error(f"nothing is {' and '.join(options.words)} at once")
    kinds = sorted({case[2] for case in cases})
    children = started([*(("limit", kind) for kind in kinds), *cases])
    if any(("limit", kind) not in children for kind in kinds):
        raise GramError("the limit itself could not be measured; is the device's memory taken?")
    for _ in range(TURNS):
        for measured in children.values():
            measured.measure()
    medians = {what: statistics.median(measured.values) for what, measured in children.items()}
    found: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    print(f"{device()}, {threads()} threads, load {load:.1f}, medians of {TURNS} turns\n")
    print("| phase | size | dtype | rows | seconds | supervision steps a second | GFLOP | GFLOP/s "
          "| GEMM limit | share |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for case in (case for case in cases if case in medians):
        phase, size, dtype, rows = case
        seconds, best, count = medians[case], medians["limit", dtype], work(phase, size, rows)
        rate = supervised(phase, size, rows) / seconds
        share = count / seconds / best
        found.append(
            {
                "phase": phase, "size": size, "dtype": dtype, "device": device(), "rows": rows,
                "threads": threads(), "seconds": seconds, "flops": count, "gemm_limit": best,
                "share": share, "supervision_steps_per_second": rate, "load": load,
            }
        )  # fmt: skip
        print(f"| {phase} | {size} | {dtype} | {rows} | {seconds:.4g} | {rate:.0f} "
              f"| {count / 1e9:.1f} | {count / seconds / 1e9:.0f} | {best / 1e9:.0f} "
              f"| {share:.0%} |")  # fmt: skip
    for measured in children.values():
        measured.close()
    whole = not options.words and not options.rows and len(found) == len(cases)
    out = options.out or (LATEST[device_name()] if whole else None)
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n")


def check_rows(parser: argparse.ArgumentParser, rows: int, *, sampled: bool) -> None:
    """Refuse a batch that cannot be measured."""
    if rows < 2:
        parser.error(f"--rows {rows}: a batch has at least 2")
    if sampled and rows % WIDTH:
        parser.error(f"--rows {rows}: sampling takes multiples of {WIDTH}")


def device() -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        entry(main)
