"""Two sampling workers of one thread against one, on the same work: `python -m benchmarks.workers`.

The work is the sample stage of a trained run over all its test inputs (default `nqueens8_gram`).
Each number of workers runs in a process of its own, in turn, three times. `wall` counts from the
asking for workers (Ray itself runs by then), `work` from when the first block begins to the end of
the last; Ray's share is the part of workers' wall time in which they computed nothing.

Two processors, of a virtual machine above all, are not always twice one. So in each turn the first
six blocks, which are alike, are also sampled without Ray, by one process of one thread and by two:
`bare`, the limit of what two workers can be.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from gram_core.model.store import load_model
from gram_core.sample.trajectory import SampleConfig
from pipelines.blocks import Block, BlockStore
from pipelines.cluster import cluster
from pipelines.dataset import held_out
from pipelines.params import MODELS, load_run
from pipelines.runtime import entry
from pipelines.sample import Job, sample_on_ray
from pipelines.sampler import Sampler

REPEATS = 3
WIDTH = 20
ALIKE = 6  # blocks that bare processes sample


def prepared(run_name: str, workers: int) -> Job:
    """The work, for so many workers of one thread."""
    run = load_run(run_name)
    model, about = load_model(MODELS / run_name)
    puzzles, targets = held_out(run.task_name, run.task, about.get("identifiers", []))
    # Whether a run is compiled hangs on its length, and so on the number of workers.
    alike = {"width": WIDTH, "cores": 1, "compile": False}
    spread = {"concurrency": workers, "max_concurrency": workers}
    config = msgspec.structs.replace(run.section("sample", SampleConfig), **alike, **spread)
    known = [targets[puzzle_id] for puzzle_id in puzzles.ids]
    return Job(run_name, model, run.task, config, puzzles, known)


def on_ray(run_name: str, workers: int) -> dict[str, float]:
    """One measurement of workers."""
    job = prepared(run_name, workers)
    folder = tempfile.mkdtemp()
    with cluster():
        store = BlockStore(folder, "benchmark")
        spent = sample_on_ray(job, job.blocks, store, lambda block, done: None, apart=False)
    shutil.rmtree(folder)
    return {**asdict(spent), "trajectories": len(job.puzzles.ids) * WIDTH}


def share(run_name: str, first: int, shares: int) -> None:
    """A bare process: its share of the first blocks, once it is told to begin; says when it is
    ready and when it is done."""
    job = prepared(run_name, 1)
    sampler = Sampler(job.model, job.task, job.config, 1)

    def sample(block: Block) -> None:
        sampler.rows(*job.part(block), block, lambda number, done: None)

    sample(job.blocks[0])
    print("ready", flush=True)
    sys.stdin.readline()
    for block in job.blocks[:ALIKE][first::shares]:
        sample(block)
    print("done", flush=True)


def bare(run_name: str, shares: int) -> float:
    """Seconds that so many bare processes need."""
    command = [sys.executable, "-m", "benchmarks.workers", "--share", run_name]
    processes = [
        subprocess.Popen(
            [*command, str(first), str(shares)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for first in range(shares)
    ]  # fmt: skip

    def wait(word: str) -> None:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{word}\n", "a bare process ended"

    wait("ready")
    start = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("begin\n")
        process.stdin.flush()
    wait("done")
    seconds = time.perf_counter() - start
    for process in processes:
        process.communicate()
    return seconds


def main(arguments: Sequence[str]) -> None:
    """Measure in turn, and print the table."""
    run = arguments[0] if arguments else "nqueens8_gram"
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(REPEATS):
        for workers, rows in found.items():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.workers", "--once", run, str(workers)],
                stdout=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
            if done.returncode:  # it has said why
                raise SystemExit(done.returncode)
            rows.append({**json.loads(done.stdout.splitlines()[-1]), "bare": bare(run, workers)})
    print(f"{run}: {found[1][0]['trajectories']:,} trajectories, medians of {REPEATS}\n")
    print("| workers of one thread | work, s | wall, s | Ray's share of the wall time | bare, s |")
    print("|---|---|---|---|---|")
    middle = {}
    for workers, rows in found.items():
        middle[workers] = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
        m = middle[workers]
        idle = 1 - m["busy"] / workers / m["wall"]
        print(f"| {workers} | {m['work']:.1f} | {m['wall']:.1f} | {idle:.0%} | {m['bare']:.1f} |")
    for key in ("work", "wall", "bare"):
        turns = [one[key] / two[key] for one, two in zip(found[1], found[2], strict=True)]
        print(f"\n{key}: two are {middle[1][key] / middle[2][key]:.2f} times as fast as one "
              f"(by turn {', '.join(f'{turn:.2f}' for turn in turns)})")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        print(json.dumps(on_ray(sys.argv[2], int(sys.argv[3]))))
    elif sys.argv[1:2] == ["--share"]:
        share(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        entry(main)
