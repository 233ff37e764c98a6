"""What the report reads: the files that training, sampling and evaluation left behind.

Knows the paths and the tables' schemas; it knows nothing of figures or HTML. A file that is
missing, damaged or without a number the page needs raises `ReportError`, one line naming it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from gram_core import tables
from gram_core.config import ConfigError, load
from gram_core.errors import GramError
from gram_core.evaluate.metrics import EvaluateConfig
from gram_core.sample.trajectory import SampleConfig
from gram_core.tasks.base import Task
from gram_core.tasks.registry import make_task
from gram_core.train.loop import TrainConfig


class ReportError(GramError):
    """The report cannot be built; one line that names the file or setting at fault."""


@dataclass(frozen=True)
class TaskInputs:
    """A task's test set. `settings` is its entry in params.yaml, empty where nobody recorded it."""

    name: str
    settings: Mapping[str, Any]
    metadata: Mapping[str, Any]
    test: pa.Table
    puzzles: pl.DataFrame  # puzzle_id, solution_count: one row a puzzle

    @property
    def kind(self) -> str:
        """What the registry calls the task; empty where unknown."""
        return str(self.settings.get("kind", ""))

    @property
    def task(self) -> Task | None:
        """The task itself; None where its settings are unknown or no longer hold."""
        try:
            return make_task(self.settings, self.name)
        except ConfigError:
            return None

    @property
    def conditional(self) -> bool:
        """Whether answers answer an input."""
        return self.task is None or self.task.conditional

    @property
    def judged(self) -> bool:
        """Whether there is a notion of a valid answer."""
        return self.task is None or self.task.verifies or self.task.conditional


@dataclass(frozen=True)
class RunInputs:
    """One run: settings, training history, metrics and trajectories."""

    name: str
    task: str
    model: Mapping[str, Any]
    train: TrainConfig
    training: Mapping[str, float]
    history: pl.DataFrame
    metrics: Mapping[str, float]
    metrics_path: Path
    puzzles: pl.DataFrame
    trajectories: pl.DataFrame
    revision: str
    depth: int
    evaluate: EvaluateConfig

    @property
    def width(self) -> int:
        """N: the largest width reported."""
        return max(self.evaluate.widths)

    @property
    def depths(self) -> list[int]:
        """Every depth sampled, ascending."""
        return [int(depth) for depth in self.puzzles["depth"].unique().sort()]

    @property
    def guided(self) -> bool:
        """Whether the model has a prior and a posterior at all."""
        return self.model.get("guidance") != "none"

    def metric(self, key: str) -> float:
        """A number of results/RUN/metrics.json. Raises `ReportError` where it is not there."""
        if key not in self.metrics:
            raise ReportError(f"{self.metrics_path}: has no {key!r}; run evaluate@{self.name}")
        return self.metrics[key]


def read_run(root: Path, name: str, settings: Mapping[str, Any]) -> RunInputs:
    """Everything about the run that `settings`, its entry in params.yaml, describes."""
    models, results = root / "models" / name, root / "results" / name
    config = _json(models / "config.json", f"train@{name}")
    if not isinstance(config.get("model"), Mapping):
        raise ReportError(f"{models / 'config.json'}: has no 'model' settings")
    where = f"runs.{name}"
    try:
        sample = load(SampleConfig, settings.get("sample", {}), f"{where}.sample")
        train = load(TrainConfig, settings.get("train", {}), f"{where}.train")
        evaluate = load(EvaluateConfig, settings.get("evaluate", {}), f"{where}.evaluate")
    except ConfigError as error:
        raise ReportError(str(error)) from None
    trajectories = read_table(results / "trajectories.parquet", "trajectories")
    made = tables.provenance(trajectories)
    run = RunInputs(
        name=name,
        task=str(settings.get("task", "")),
        model=config["model"],
        train=train,
        training=_json(models / "metrics.json", f"train@{name}"),
        history=_history(models / "history.csv", f"train@{name}"),
        metrics=_json(results / "metrics.json", f"evaluate@{name}"),
        metrics_path=results / "metrics.json",
        puzzles=_frame(read_table(results / "puzzles.parquet", "puzzles")),
        trajectories=_frame(trajectories),
        revision=str(made.get("revision", "")),
        depth=sample.depth,
        evaluate=evaluate,
    )
    for column, wanted in (("depth", {run.depth}), ("width", set(evaluate.widths))):
        missing = wanted - set(run.puzzles[column].to_list())
        if missing:
            path = results / "puzzles.parquet"
            raise ReportError(f"{path}: has no {column} {min(missing)}; run evaluate@{name}")
    return run


def read_task(root: Path, name: str, settings: Mapping[str, Any]) -> TaskInputs:
    """The test set of the task `name`. Where `settings` is empty, they are what the test
    table says made it."""
    folder = root / "data" / name
    test = read_table(folder / "test.parquet", "dataset")
    metadata = _json(folder / "raw" / "metadata.json", f"generate@{name}")
    made = tables.provenance(test)
    recorded = settings or made.get("task")
    puzzles = pl.DataFrame(
        {
            "puzzle_id": test["puzzle_id"].to_pylist(),
            "solution_count": test["solution_count"].to_pylist(),
        },
        schema={"puzzle_id": pl.String, "solution_count": pl.UInt32},
    )
    known = recorded if isinstance(recorded, Mapping) else {}
    return TaskInputs(name, known, metadata, test, puzzles.unique().sort("puzzle_id"))


def _json(path: Path, stage: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file; run {stage} (dvc repro)") from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ReportError(f"{path}: expected a JSON object")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _history(path: Path, stage: str) -> pl.DataFrame:
    if not path.is_file():
        raise ReportError(f"{path}: no such file; run {stage} (dvc repro)")
    try:
        frame = pl.read_csv(path, infer_schema=False)
        frame = frame.select(pl.all().cast(pl.Float64)).with_columns(pl.col("step").cast(pl.Int64))
    except pl.exceptions.PolarsError as error:
        raise ReportError(
            f"{path}: not a training history ({str(error).splitlines()[0]})"
        ) from None
    if frame.is_empty():
        raise ReportError(f"{path}: the training history has no rows")
    if not frame.select(pl.all_horizontal(pl.all().is_finite().all())).item():
        raise ReportError(f"{path}: the training history has numbers that are not finite")
    return frame


def read_table(path: Path, kind: str) -> pa.Table:
    """The table `kind` at `path`. Raises `ReportError` where it is missing or damaged."""
    try:
        return tables.read(path, kind)
    except tables.TableError as error:
        raise ReportError(str(error)) from None


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
