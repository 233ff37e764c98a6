"""The sample stage: trajectories of every test puzzle, spread over Ray Data's workers.

A trajectory is a function of weights, seed, puzzle and number, so how puzzles are cut into blocks
and which worker takes them does not show in the table (but where the first accepted answer ends a
puzzle of several blocks). Blocks are kept as they finish; the table is put together from them.
"""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from gram_core import tables
from gram_core.config import ConfigError, dump
from gram_core.errors import GramError
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.model.store import ModelError, load_model
from gram_core.noise import GENERATOR
from gram_core.sample.trajectory import SampleConfig
from gram_core.tasks.base import Task
from gram_core.tasks.batches import Puzzles
from pipelines import storage
from pipelines.blocks import Block, BlockStore, cut, packed
from pipelines.cost import Cost, calibrate
from pipelines.dataset import held_out
from pipelines.params import MODELS, RESULTS, WORK, Run, load_storage
from pipelines.provenance import provenance
from pipelines.runtime import device_name, say, threads
from pipelines.sampler import Progress, Sampler

# Settings of sampling that say how it is spread, not what comes of it.
SPREAD = ("concurrency", "max_concurrency", "cores", "num_gpus", "compile")
# Compiling takes half a minute once, and saves a third of a run.
WORTH = 120.0  # seconds
LONG = 10.0  # seconds of a block that the bar should not stand still for
RETRIES = 16  # of a block whose workers die
PATIENCE = (0.1, 0.5)  # seconds that Ray Data's loop waits for blocks: its own, and at most


def sample_run(run: Run) -> int:
    """Sample the run's test puzzles and write results/RUN/trajectories.parquet; returns the
    number of rows. Goes on with the blocks that a former attempt had finished. Raises `ModelError`
    where models/RUN is not this run's."""
    config = run.section("sample", SampleConfig)
    if config.stop_when_verified and not run.task.verifies:
        raise ConfigError(
            f"{run.where}.sample.stop_when_verified: the task {run.task_name} has no rule to "
            "verify answers by; leave it out"
        )
    wanted = dump(run.section("model", ModelConfig))
    folder = MODELS / run.name
    model, about = load_model(folder)
    if about.get("task") != dump(run.task.config) or about["model"] != wanted:
        raise ModelError(
            f"{folder / 'config.json'}: made with other model or task settings than "
            f"runs.{run.name} has now; train it again (dvc repro)"
        )
    puzzles, targets = held_out(run.task_name, run.task, about.get("identifiers", []))
    known = [targets[puzzle_id] for puzzle_id in puzzles.ids]
    place = load_storage().trajectories
    address = storage.join(place or str(WORK / "samples"), run.name)
    job = Job(run.name, model, run.task, config, puzzles, known)
    store = BlockStore(address, job.key(about["sha256"]))
    todo = [block for block in job.blocks if block.number not in store.names]
    total = len(puzzles.ids) * config.width
    found = total - sum(block.trajectories for block in todo)
    if found:
        say(f"sample {run.name}: {found:,} of {total:,} trajectories found finished")
    with _Bar(run.name, total, found) as bar:
        if todo:
            how = sample_here if config.concurrency == 0 else sample_on_ray
            how(job, todo, store, bar, apart=place is not None)
    path = RESULTS / run.name / "trajectories.parquet"
    schema = tables.trajectories_schema(run.task.length)
    settings = {"run": run.name, "sample": dump(config), "model": about["sha256"]}
    made = {**settings, **provenance(config.seed, store.computers(job.blocks))}
    rows = tables.write_parts(path, store.tables(job.blocks), schema, made)
    wanted_rows = total * len(config.all_depths)
    if rows != wanted_rows:
        raise GramError(f"sampling {run.name}: {rows} rows came back, expected {wanted_rows}")
    store.clear()
    return rows


@dataclass(frozen=True)
class Job:
    """A run to sample: its model, puzzles and their known answers."""

    name: str
    model: GRAM
    task: Task
    config: SampleConfig
    puzzles: Puzzles
    known: Sequence[set[bytes]]

    @property
    def blocks(self) -> list[Block]:
        """All of its blocks."""
        return cut(len(self.puzzles.ids), self.config)

    def key(self, weights: str) -> str:
        """Identifies the cut and all that the rows depend on, but for code and machine."""
        settings = {k: v for k, v in dump(self.config).items() if k not in SPREAD}
        cuts = [astuple(block) for block in self.blocks]
        digest = hashlib.sha256()
        for part in (
            weights, settings, dump(self.task.config), list(self.puzzles.ids), GENERATOR, cuts
        ):  # fmt: skip
            digest.update(json.dumps(part, sort_keys=True).encode())
        digest.update(self.puzzles.inputs.numpy().tobytes())
        for answers in self.known:
            digest.update(b"".join(sorted(answers)))
        return digest.hexdigest()[:16]

    def part(self, block: Block) -> tuple[Puzzles, Sequence[set[bytes]]]:
        """A block's puzzles and their known answers."""
        span, whole = slice(block.start, block.stop), self.puzzles
        puzzles = Puzzles(whole.ids[span], whole.inputs[span], whole.puzzle[span])
        return puzzles, self.known[span]

    def columns(self, block: Block) -> pa.Table:
        """A block as a worker takes it."""
        puzzles, known = self.part(block)
        count = len(puzzles.ids)
        return pa.table(
            {
                "block": np.full(count, block.number),
                "first": np.full(count, block.first),
                "count": np.full(count, block.count),
                "puzzle_id": list(puzzles.ids),
                "inputs": tables.tokens_array(puzzles.inputs.numpy()),
                "puzzle": puzzles.puzzle.numpy(),
                "targets": [b"".join(sorted(answers)) for answers in known],
            }
        )


class _Bar:
    """A bar over trajectories, from the first that it hears of: finished blocks, and what is done
    of long ones in work. A block that begins again on another worker takes back what it had."""

    def __init__(self, name: str, total: int, found: int) -> None:
        self.settings = {"desc": f"sample {name}", "total": total, "initial": found}
        self.bar: Any = None
        self.done: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __call__(self, block: int, done: int) -> None:
        if self.bar is None:
            self.bar = tqdm(unit="trajectory", **self.settings)
        self.bar.update(done - self.done.get(block, 0))
        self.done[block] = done

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def sample_here(
    job: Job, todo: list[Block], store: BlockStore, progress: Progress, *, apart: bool
) -> None:
    """Finish the blocks in this process, which is nobody `apart`."""
    cores = job.config.cores or threads()
    cost = calibrate(job.model, job.puzzles, job.config, cores)
    say(f"sample {job.name}: {cost.line(1)}")
    compile = _worth_compiling(job, todo, cost, 1)
    sampler = Sampler(job.model, job.task, job.config, cores, compile=compile)
    for block in todo:
        rows = sampler.rows(*job.part(block), block, progress)
        name, content = packed(block.number, rows, sampler.computer)
        store.put(name, content)
        store.add(name, sampler.computer)


def _worth_compiling(job: Job, todo: list[Block], cost: Cost, workers: int) -> bool:
    if job.config.compile is not None:
        return job.config.compile
    left = sum(block.trajectories for block in todo)
    return left * cost.seconds / workers > WORTH


def patience(longest: float) -> float:
    """How long to wait for finished blocks, of which those left take a worker `longest` seconds at
    most. It holds the next one meanwhile, which may be a quarter of that: a fifth keeps it busy."""
    least, most = PATIENCE
    return min(max(least, longest / 5), most)


@dataclass(frozen=True)
class Spent:
    """Seconds of a pool of workers: `wall` from the asking for them on, `work` from when the first
    block began to the end of the last, `busy` what they spent on blocks, all together."""

    wall: float
    work: float
    busy: float


def sample_on_ray(
    job: Job, todo: list[Block], store: BlockStore, progress: Progress, *, apart: bool
) -> Spent:
    """Finish the blocks on a pool of Ray Data's actors, which grows and shrinks within its
    bounds. A block whose worker dies is begun again on another, `RETRIES` times. With `apart`, the
    workers put finished blocks where they belong by themselves."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data._internal.execution import streaming_executor_state as executor
    from ray.util.annotations import RayDeprecationWarning

    from pipelines.alone import few_actors
    from pipelines.cluster import Board, check_gpus, cluster, has_gpus, worker_cores

    config = job.config
    least, most = config.workers
    with few_actors(), cluster():
        gpus = config.num_gpus if config.num_gpus is not None else float(has_gpus())
        check_gpus(least, gpus)
        cores = worker_cores(most, config.cores, least, gpus)
        measure = calibrate
        if gpus and device_name() != "cuda":
            # This machine is not one of those that will do the work.
            remote = ray.remote(num_cpus=cores, num_gpus=gpus)(calibrate)
            measure = lambda *arguments: ray.get(remote.remote(*arguments))  # noqa: E731
        cost = measure(job.model, job.puzzles, config, cores)
        say(f"sample {job.name}: {cost.line(most)}")
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True
        # Blocks are wanted as they finish; their order is in their names.
        context.execution_options.preserve_order = False
        sizes = {block.number: block.trajectories for block in todo}
        left = set(sizes)

        def longest() -> float:
            return cost.seconds * max((sizes[number] for number in left), default=0)

        def pace() -> None:
            # Ray Data's loop looks for finished blocks ten times a second, which keeps five per
            # cent of a core busy; for blocks that take seconds that is too often.
            executor.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = patience(longest())

        # Each process of Ray's costs the workers a per cent of a core, and each message some more.
        board = Board() if longest() > LONG else None
        # Ready-made blocks, of which Ray Data asks nothing by tasks: these would need processes of
        # their own, which stay, and cores beside the actors', which may take every one there is.
        blocks = ray.data.from_blocks([job.columns(block) for block in todo])
        with warnings.catch_warnings():
            # Ray means to name this bound otherwise, and has no other name for it yet.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            # Without a size, which `map_batches` itself refuses for workers with GPUs: a batch is a
            # whole block.
            finished = blocks.map_batches_internal(
                Sampler,
                fn_constructor_args=(
                    job.model, job.task, config, cores, board, store if apart else None,
                ),
                fn_constructor_kwargs={"compile": _worth_compiling(job, todo, cost, most)},
                compute=ActorPoolStrategy(
                    min_size=least, max_size=most, max_tasks_in_flight_per_actor=2
                ),
                num_cpus=cores,
                num_gpus=gpus,
                batch_size=None,
                max_task_retries=RETRIES,
            )  # fmt: skip
        start, busy = time.perf_counter(), 0.0
        began, ended = math.inf, 0.0
        pace()
        hear = board.listening(lambda message: progress(*message)) if board else nullcontext()
        try:
            with hear:
                # One ahead, a finished block would be heard of when the next one is.
                parts = finished.iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=0
                )
                for row in (row for part in parts for row in part.to_pylist()):
                    busy += row["seconds"]
                    began = min(began, row["began"])
                    ended = max(ended, row["began"] + row["seconds"])
                    if not apart:
                        store.put(row["name"], row["content"])
                    number = store.add(row["name"], json.loads(row["computer"]))
                    left.discard(number)
                    if board is None:
                        progress(number, sizes[number])
                    pace()
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, GramError):
                raise cause from None
            if getattr(error, "actor_init_failed", False):
                # Of the text that Ray wraps it in, the last line is what happened.
                reason = str(error).strip().splitlines()[-1].strip()
                raise GramError(
                    f"sample {job.name}: no worker could begin: {reason[:300]}"
                ) from error
            if isinstance(error, ray.exceptions.RayActorError):
                raise GramError(
                    f"sample {job.name}: the workers of a block died {RETRIES + 1} times; is there "
                    "too little memory for sample.batch? What is finished is kept"
                ) from error
            raise
        wall = time.perf_counter() - start
    say(f"sample {job.name}: {wall:.1f} s, {1 - busy / most / wall:.0%} of it Ray's")
    return Spent(wall, ended - began, busy)
