"""The train stage: the core's loop on workers of Ray Train around DeepSpeed, or in this process.

A worker is a plain function of one dict. Progress comes back through a board, the trained weights
as the function's value; the driver alone writes models/RUN.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import polars as pl
import torch
from dvclive import Live
from tqdm import tqdm

from gram_core.config import ConfigError, dump
from gram_core.errors import GramError
from gram_core.files import write_atomic
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.model.store import save_model
from gram_core.shape import TokenShape
from gram_core.tasks.base import Task
from gram_core.tasks.batches import Examples
from gram_core.train.checkpoint import Checkpoints
from gram_core.train.engine import Engine, PlainEngine, Supervised, compiled
from gram_core.train.loop import TrainConfig, final_metrics, make_slots, train
from gram_core.train.objective import ObjectiveConfig, Terms
from pipelines.dataset import examples, identifiers
from pipelines.params import MODELS, Run
from pipelines.provenance import provenance
from pipelines.runtime import device_name, say, threads

WORK = Path(".gram")
Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Job:
    """A run's settings for training, checked by themselves and against each other."""

    name: str
    task: Task
    model: ModelConfig
    objective: ObjectiveConfig
    train: TrainConfig
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
        )
        if run.task.identified and not job.model.prefix_tokens:
            raise ConfigError(
                f"{run.where}.model.prefix_tokens: 0 leaves the task's learned identifiers no "
                "place; use 16, as the paper does"
            )
        learns = job.objective.halt_weight > 0 or job.objective.value_weight > 0
        guided = job.model.guidance != "none"
        if guided and learns and job.objective.heads_on == "prior" and not job.train.prior_slots:
            raise ConfigError(
                f"{run.where}.train.prior_slots: 0 leaves the halt and value heads nothing to "
                "learn from; use a share above 0, or objective.heads_on: posterior"
            )
        return job


@dataclass(frozen=True)
class Trained:
    """What training hands back: averaged weights, and the logged rows."""

    weights: dict[str, torch.Tensor]
    history: list[dict[str, float]]


def build_module(job: Job, device: str) -> Supervised:
    """A fresh model with its objective, seeded by the run, compiled if the run asks for it."""
    torch.manual_seed(job.train.seed)
    task = job.task
    model = GRAM(job.model, job.shape).to(device)
    module = Supervised(
        model,
        job.objective,
        task.verify if task.verifies else None,
        prior_rows=job.train.prior_rows(job.model),
        precision=job.train.precision,
    )
    return compiled(module, say) if job.train.compile else module


def work(
    engine: Engine, job: Job, examples: Examples, checkpoints: Checkpoints, report: Report
) -> Trained:
    """Train on this worker; every worker returns the same averaged weights."""
    slots = make_slots(engine, examples, job.train)
    ema, progress = train(engine, slots, job.train, checkpoints, report)
    ema.copy_to(engine.model.parameters())
    weights = {name: t.detach().cpu() for name, t in engine.model.state_dict().items()}
    return Trained(weights, progress.history)


def fingerprint(job: Job, examples: Examples) -> str:
    """Identifies all that the result of training depends on, but for code and machine."""
    digest = hashlib.sha256()
    for part in (job.model, job.objective, job.train, job.task.config):
        digest.update(json.dumps(dump(part), sort_keys=True).encode())
    for tensor in (examples.inputs, examples.target, examples.puzzle):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def train_here(job: Job, examples: Examples, folder: Path, report: Report) -> Trained:
    """Train in this process with torch alone."""
    torch.set_num_threads(threads())
    engine = PlainEngine(build_module(job, device_name()), job.train.optim)
    checkpoints = Checkpoints(folder, fingerprint(job, examples))
    return work(engine, job, examples, checkpoints, report)


def ray_worker(config: dict[str, Any]) -> Trained:
    """What each worker of Ray Train runs."""
    from pipelines.engine import DeepSpeedEngine

    job: Job = config["job"]
    torch.set_num_threads(config["threads"])
    engine = DeepSpeedEngine(build_module(job, device_name()), job.train)
    checkpoints = Checkpoints(config["folder"], fingerprint(job, config["examples"]))
    report: Report = config["board"].post if engine.rank == 0 else lambda row: None
    return work(engine, job, config["examples"], checkpoints, report)


def train_on_ray(job: Job, examples: Examples, folder: Path, report: Report) -> Trained:
    """Train on `train.workers` workers of Ray Train, each a DeepSpeed engine."""
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    from pipelines.cluster import Board, cluster

    workers = job.train.workers
    per_worker = max(1, threads() // workers)
    on_gpu = device_name() == "cuda"
    with cluster():
        board = Board()
        trainer = TorchTrainer(
            ray_worker,
            train_loop_config={
                "job": job,
                "examples": examples,
                "folder": folder.absolute(),
                "board": board,
                "threads": per_worker,
            },
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=on_gpu,
                resources_per_worker={"CPU": per_worker, **({"GPU": 1} if on_gpu else {})},
            ),
            run_config=RunConfig(name=job.name, storage_path=str((WORK / "ray").absolute())),
        )
        try:
            with board.listening(report):
                result = trainer.fit()
        except WorkerGroupError as error:
            first = next(iter(error.worker_failures.values()))
            if isinstance(first, GramError):
                raise first from None
            raise
    trained: Trained = result.return_value
    return trained


class Progress:
    """Shows logged rows as they come: a bar with rate and time left, and DVCLive's files."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.bar = tqdm(total=job.train.steps, desc=f"train {job.name}", unit="step")
        self.live = Live(
            str(folder), save_dvc_exp=False, dvcyaml=None, report=None, monitor_system=False
        )

    def __enter__(self) -> Self:
        return self

    def __call__(self, row: dict[str, float]) -> None:
        self.bar.update(int(row["step"]) - self.bar.n)
        shown = {k: row[k] for k in ("reconstruction", "kl", "prior_valid") if k in row}
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
        self.live.step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self.live.log_metric(name, value, timestamp=False)
        self.live.make_summary()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()


def train_run(run: Run) -> dict[str, float]:
    """Train the run and write models/RUN; goes on from the run's newest checkpoint if a former
    attempt was cut off. Returns the final metrics."""
    groups = identifiers(run.task_name, run.task)
    job = replace(Job.of(run), identifiers=tuple(groups))
    rows = examples(run.task_name, run.task, "train", groups)
    folder = WORK / "checkpoints" / run.name
    start = time.monotonic()
    how = train_here if job.train.engine == "plain" else train_on_ray
    with Progress(job, MODELS / run.name / "live") as progress:
        trained = how(job, rows, folder, progress)
    seconds = time.monotonic() - start
    found = _write(job, trained, seconds)
    Checkpoints(folder, "").clear()
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
        "provenance": provenance(),
    }
    save_model(folder, model, about)
    return found
