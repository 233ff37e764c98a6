"""Two sampling workers of one thread against one, on the same work: `python -m benchmarks.workers`.

The work is the sample stage of a trained run over all its test inputs (default `nqueens8_gram`).
Each number of workers runs in a process of its own, in turn, three times. `wall` counts from the
asking for workers (Ray itself runs by then), `work` from the first finished trajectory to the last
block; Ray's share is the part of workers' wall time in which they computed nothing.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from gram_core.model.store import load_model
from gram_core.sample.trajectory import SampleConfig
from pipelines.blocks import BlockStore
from pipelines.cluster import cluster
from pipelines.dataset import held_out
from pipelines.params import MODELS, load_run
from pipelines.runtime import entry
from pipelines.sample import Job, sample_on_ray

REPEATS = 3
WIDTH = 20


def once(run_name: str, workers: int) -> dict[str, float]:
    """One measurement."""
    run = load_run(run_name)
    model, about = load_model(MODELS / run_name)
    puzzles, targets = held_out(run.task_name, run.task, about.get("identifiers", []))
    # Whether a run is compiled hangs on its length, and so on the number of workers.
    alike = {"width": WIDTH, "cores": 1, "compile": False, "max_concurrency": workers}
    section = run.section("sample", SampleConfig)
    config = msgspec.structs.replace(section, concurrency=workers, **alike)
    known = [targets[puzzle_id] for puzzle_id in puzzles.ids]
    job = Job(run_name, model, run.task, config, puzzles, known)
    folder = tempfile.mkdtemp()
    begun: list[float] = []
    with cluster():
        store = BlockStore(folder, "benchmark")
        wall, busy = sample_on_ray(
            job, job.blocks, store, lambda block, done: begun.append(time.perf_counter()),
            apart=False,
        )  # fmt: skip
    shutil.rmtree(folder)
    work = begun[-1] - begun[0]
    trajectories = len(puzzles.ids) * WIDTH
    return {"wall": wall, "busy": busy, "work": work, "trajectories": trajectories}


def main(arguments: Sequence[str]) -> None:
    """Measure in turn, and print the table."""
    run = arguments[0] if arguments else "nqueens8_gram"
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(REPEATS):
        for workers, rows in found.items():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.workers", "--once", run, str(workers)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{run}: {found[1][0]['trajectories']:,} trajectories, medians of {REPEATS}\n")
    print("| workers of one thread | work, s | wall, s | Ray's share of the wall time |")
    print("|---|---|---|---|")
    middle = {}
    for workers, rows in found.items():
        middle[workers] = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
        m = middle[workers]
        share = 1 - m["busy"] / workers / m["wall"]
        print(f"| {workers} | {m['work']:.1f} | {m['wall']:.1f} | {share:.0%} |")
    for key in ("work", "wall"):
        print(f"\n{key}: two workers are {middle[1][key] / middle[2][key]:.2f} times as fast")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        print(json.dumps(once(sys.argv[2], int(sys.argv[3]))))
    else:
        entry(main)
