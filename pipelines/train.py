"""The train stage: the core's loop on workers of Ray Train around DeepSpeed, or in this process.

A worker is a plain function of one dict. Progress comes back through a board, the trained weights
as the function's value; the driver alone writes models/RUN.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import polars as pl
import torch
from tqdm import tqdm

from gram_core.compile import compiled
from gram_core.config import ConfigError, dump
from gram_core.errors import GramError
from gram_core.files import write_atomic
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.model.store import save_model
from gram_core.noise import GENERATOR
from gram_core.shape import TokenShape
from gram_core.tasks.base import Task
from gram_core.tasks.batches import Examples
from gram_core.train.checkpoint import Checkpoints, FolderStore, Store
from gram_core.train.engine import Engine, PlainEngine, Supervised
from gram_core.train.loop import TrainConfig, averaged, final_metrics, make_slots, train
from gram_core.train.objective import ObjectiveConfig, Terms
from pipelines import storage
from pipelines.compute import compute_with
from pipelines.dataset import examples, identifiers, publish, published
from pipelines.params import MODELS, WORK, Run, load_storage
from pipelines.provenance import computer, provenance
from pipelines.runtime import device_name, say, threads
from pipelines.storage import StorageConfig
from pipelines.stores import DriverStore, ObjectStore, kept

if TYPE_CHECKING:
    from pipelines.cluster import Board

# Settings of training that say how it is spread, not what comes of it.
SPREAD = ("engine", "workers", "accumulate", "zero_stage", "cores", "restarts")
# Times that Ray Train's workers may fail to begin: on a cluster that has to grow, where each time
# waits for a minute, twenty minutes.
BEGINNINGS = 20
Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Job:
    """A run's settings for training, checked by themselves and against each other."""

    name: str
    task: Task
    model: ModelConfig
    objective: ObjectiveConfig
    train: TrainConfig
    # Whose tables in data/ it reads.
    data: str
    # The groups of puzzles whose variants have learned identifiers.
    identifiers: tuple[str, ...] = ()

    @property
    def shape(self) -> TokenShape:
        """What the model must fit: the task's tokens, and the data's identifiers."""
        return replace(self.task.shape, puzzles=max(1, len(self.identifiers) * self.task.variants))

    @classmethod
    def of(cls, run: Run) -> "Job":
        """The job of one entry of params.yaml. Raises `ConfigError`."""
        job = cls(
            run.name,
            run.task,
            run.section("model", ModelConfig),
            run.section("objective", ObjectiveConfig),
            run.section("train", TrainConfig),
            run.task_name,
        )
        if run.task.identified and not job.model.prefix_tokens:
            raise ConfigError(
                f"{run.where}.model.prefix_tokens: 0 leaves the task's learned identifiers no "
                "place; use 16, as the paper does"
            )
        try:
            followers = job.train.prior_rows(job.model)
        except ConfigError as error:
            raise ConfigError(f"{run.where}.train: {error}") from None
        learns = job.objective.halt_weight > 0 or job.objective.value_weight > 0
        guided = job.model.guidance != "none"
        if guided and learns and job.objective.heads_on == "prior" and not followers:
            raise ConfigError(
                f"{run.where}.train.prior_slots: {job.train.prior_slots:g} of batch "
                f"{job.train.batch} leaves the halt and value heads nothing to learn from; use a "
                "larger share or batch, or objective.heads_on: posterior"
            )
        return job


@dataclass(frozen=True)
class Trained:
    """What training hands back: averaged weights, the logged rows, and what all workers that had a
    part in it computed on."""

    weights: dict[str, torch.Tensor]
    history: list[dict[str, float]]
    computers: Sequence[dict[str, Any]]


def build_module(job: Job, device: str) -> Supervised:
    """A fresh model with its objective, seeded by the run, compiled if the run asks for it."""
    torch.manual_seed(job.train.seed)
    task = job.task.on(device)
    model = GRAM(job.model, job.shape).to(device)
    module = Supervised(
        model,
        job.objective,
        task.verify if task.verifies else None,
        prior_rows=job.train.prior_rows(job.model),
        precision=job.train.precision,
    )
    if job.train.compile and job.train.zero_stage == 3:
        say("zero_stage 3 fetches weights as they are used: training without torch.compile")
        return module
    if not job.train.compile:
        return module
    return compiled(module, say, graphs=job.train.graphs)


def work(
    engine: Engine,
    job: Job,
    examples: Examples,
    store: Store,
    report: Report,
    computers: Sequence[dict[str, Any]],
    identity: str | None = None,
) -> Trained:
    """Train on this worker; every worker returns the same averaged weights. `computers` are the
    workers'; `identity` says which checkpoints in `store` are this run's, where its `fingerprint`
    shall not."""
    checkpoints = Checkpoints(store, identity or fingerprint(job, examples), computers)
    slots = make_slots(engine, examples, job.train)
    ema, progress = train(engine, slots, job.train, checkpoints, report)
    return Trained(averaged(engine, ema), progress.history, progress.workers)


def fingerprint(job: Job, examples: Examples) -> str:
    """Identifies all that the result of training depends on, but for code and machine."""
    digest = _settings(job)
    for tensor in (examples.inputs, examples.target, examples.puzzle):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _settings(job: Job) -> Any:
    """A digest begun with the settings that the result depends on."""
    settings = {name: dump(getattr(job, name)) for name in ("model", "objective", "train")}
    for name in SPREAD:
        del settings["train"][name]
    digest = hashlib.sha256()
    for part in (*settings.values(), dump(job.task.config), GENERATOR):
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest


def checkpoint_store(job: Job, place: StorageConfig) -> FolderStore | ObjectStore:
    """Where the checkpoints of a run lie in the end. One prefix may serve several checkouts and
    experiments at once, so there the settings have folders of their own."""
    if place.checkpoints:
        key = _settings(job).hexdigest()[:16]
        return ObjectStore(storage.join(place.checkpoints, job.name, key))
    return FolderStore(WORK / "checkpoints" / job.name)


def train_here(job: Job, place: StorageConfig, report: Report) -> Trained:
    """Train in this process with torch alone."""
    cores = job.train.cores or threads()
    compute_with(cores)
    module = build_module(job, device_name())
    engine = PlainEngine(module, job.train.optim, job.train.accumulate)
    rows = examples(job.data, job.task, "train", job.identifiers)
    return work(engine, job, rows, checkpoint_store(job, place), report, [computer(cores)])


def ray_worker(config: dict[str, Any]) -> Trained:
    """What each worker of Ray Train runs."""
    import ray

    from pipelines.engine import DeepSpeedEngine

    job: Job = config["job"]
    compute_with(config["cores"])
    engine = DeepSpeedEngine(build_module(job, device_name()), job.train)
    board: Board = config["board"]
    # Asked, not posted: where the driver cannot write the row, training ends.
    report: Report = board.ask if engine.rank == 0 else lambda row: None
    store: Store = config["store"] or DriverStore(board, ray.get(config["found"]))
    if isinstance(config["examples"], str):
        with published(config["examples"]) as folder:
            rows = examples(job.data, job.task, "train", job.identifiers, folder)
    else:
        rows = config["examples"]
    computers: list[Any] = [None] * engine.world
    torch.distributed.all_gather_object(computers, computer(config["cores"]))
    return work(engine, job, rows, store, report, computers)


def train_on_ray(job: Job, place: StorageConfig, report: Report) -> Trained:
    """Train on `train.workers` workers of Ray Train, each a DeepSpeed engine. Where a worker dies,
    all start again from the newest checkpoint, `train.restarts` times."""
    from ray.train import ControllerError, PreemptionError, WorkerGroupError

    from pipelines.cluster import check_gpus, cluster, has_gpus

    rows: Examples | str
    if place.datasets:
        rows = publish(job.data, place.datasets)
    else:
        rows = examples(job.data, job.task, "train", job.identifiers)
    store = checkpoint_store(job, place)
    with cluster():
        # Asked once: a cluster that has just lost its GPU node gets it back, or waits for it.
        on_gpu = has_gpus()
        check_gpus(job.train.workers, float(on_gpu))
        for restart in range(job.train.restarts + 1):
            try:
                return _fit(job, rows, store, report, on_gpu=on_gpu)
            except ControllerError as error:
                failure = error.controller_failure
                if not type(failure).__name__.startswith("WorkerGroupStartup"):
                    raise
                reason = " ".join(str(failure).split())[:300]
                raise GramError(f"train {job.name}: no worker could begin: {reason}") from error
            except (WorkerGroupError, PreemptionError) as error:
                # A machine that is taken away is a death as any other.
                failures = list(getattr(error, "worker_failures", {}).values())
                known = next((f for f in failures if isinstance(f, GramError)), None)
                if known is not None:
                    raise known from None
                if not all(map(_is_death, failures)):
                    raise  # one failed by itself, and others with it
                if restart == job.train.restarts:
                    raise GramError(
                        f"train {job.name}: a worker died, after {restart} restarts; start it "
                        "again to go on from the newest checkpoint"
                    ) from error
                say(
                    f"train {job.name}: a worker died; all go on from the newest checkpoint "
                    f"(restart {restart + 1} of {job.train.restarts})"
                )
    raise AssertionError("the last restart returns or raises")


def _is_death(failure: BaseException) -> bool:
    """Whether a worker was lost, rather than failed by itself. Ray Train wraps it in an error of
    its own, which it does not export; and where a survivor speaks first, it says that the other
    end of a connection is gone."""
    from ray.exceptions import RayError

    if isinstance(failure, RayError) or hasattr(failure, "health_check_failure"):
        return True
    cut_off = isinstance(failure, torch.distributed.DistError) or "gloo" in str(failure)
    return cut_off and isinstance(failure, RuntimeError)


def _fit(
    job: Job,
    rows: Examples | str,
    store: FolderStore | ObjectStore,
    report: Report,
    *,
    on_gpu: bool,
) -> Trained:
    """One start of the workers, until they are done or one of them is lost."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from pipelines.cluster import Board, worker_cores
    from pipelines.trainer import Trainer

    board = Board()
    cores = worker_cores(job.train.workers, job.train.cores, gpus=float(on_gpu))
    here = isinstance(store, FolderStore)

    def receive(message: Any) -> None:
        if not (isinstance(store, FolderStore) and kept(message, store)):
            report(message)

    trainer = Trainer(
        ray_worker,
        train_loop_config={
            "job": job,
            "examples": rows,
            "board": board,
            "cores": cores,
            "store": None if here else store,
            "found": ray.put(store.newest() if here else None),
        },
        scaling_config=ScalingConfig(
            num_workers=job.train.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": cores, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=str((WORK / "ray").absolute()),
            # Started again by Ray itself, workers would go on from what was found before the first
            # start, and what was saved since would be lost.
            failure_config=FailureConfig(
                max_failures=0,
                max_preemption_failures=0,
                controller_failure_limit=BEGINNINGS - 1,
            ),
        ),
    )
    try:
        with board.listening(receive):
            trained: Trained = trainer.fit().return_value
    except SystemExit:
        # Ray's own answer to Ctrl-C, with the exit code of success.
        raise KeyboardInterrupt from None
    return trained


class Progress:
    """Shows logged rows as they come: a bar with rate and time left, and DVCLive's files."""

    def __init__(self, job: Job, folder: Path) -> None:
        from dvclive import Live  # a second, which no worker shall wait for

        self.bar = tqdm(total=job.train.steps, desc=f"train {job.name}", unit="step")
        self.live = Live(
            str(folder), save_dvc_exp=False, dvcyaml=None, report=None, monitor_system=False
        )

    def __enter__(self) -> Self:
        return self

    def __call__(self, row: dict[str, float]) -> None:
        if row["step"] <= self.bar.n:
            return  # told again after a restart
        self.bar.update(int(row["step"]) - self.bar.n)
        shown = {k: row[k] for k in ("reconstruction", "kl", "prior_valid") if k in row}
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
        self.live.step = int(row["step"])
        try:
            for name, value in row.items():
                if name != "step":
                    self.live.log_metric(name, value, timestamp=False)
            self.live.make_summary()
        except OSError as error:
            raise GramError(f"{self.live.dir}: not written: {error.strerror}") from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()


def job_of(run: Run, groups: Sequence[str]) -> Job:
    """The run's job with the identifiers of its data. Raises `ConfigError`."""
    return replace(Job.of(run), identifiers=tuple(groups))


def train_run(run: Run) -> dict[str, float]:
    """Train the run and write models/RUN; goes on from the run's newest checkpoint if a former
    attempt was cut off. Returns the final metrics."""
    job = job_of(run, identifiers(run.task_name, run.task))
    place = load_storage()
    start = time.monotonic()
    how = train_here if job.train.engine == "plain" else train_on_ray
    with Progress(job, MODELS / run.name / "live") as progress:
        trained = how(job, place, progress)
    seconds = time.monotonic() - start
    found = _write(job, trained, seconds)
    checkpoint_store(job, place).clear()
    return found


def _write(job: Job, trained: Trained, seconds: float) -> dict[str, float]:
    task = job.task
    model = GRAM(job.model, job.shape)
    model.load_state_dict(trained.weights)
    folder = MODELS / job.name
    columns = ["step", "lr", *Terms.names]
    history = pl.DataFrame(
        [[row.get(name) for name in columns] for row in trained.history],
        schema=dict.fromkeys(columns, pl.Float64),
        orient="row",
    )
    found = {
        **final_metrics(trained.history),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": job.train.steps,
        "train_seconds": round(seconds, 1),
    }
    write_atomic(folder / "history.csv", history.write_csv().encode())
    write_atomic(folder / "metrics.json", (json.dumps(found, indent=2) + "\n").encode())
    about = {
        "run": job.name,
        "task": dump(task.config),
        "identifiers": list(job.identifiers),
        "objective": dump(job.objective),
        "train": dump(job.train),
        "provenance": provenance(job.train.seed, trained.computers),
    }
    save_model(folder, model, about)
    return found
