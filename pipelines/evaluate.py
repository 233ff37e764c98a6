"""The evaluate stage: trajectories in, puzzles table, metrics and plot data out."""

import json
from pathlib import Path

import polars as pl

from gram_core import tables
from gram_core.config import ConfigError
from gram_core.evaluate.metrics import EvaluateConfig, metrics, puzzle_table, summarise
from gram_core.files import write_atomic
from gram_core.sample.trajectory import SampleConfig
from gram_core.tables import TableError
from pipelines.dataset import solution_counts
from pipelines.params import RESULTS, Run
from pipelines.provenance import provenance


def evaluate(run: Run) -> dict[str, float]:
    """results/RUN/puzzles.parquet, metrics.json and scaling.csv; returns the metrics.

    Raises `TableError` where the trajectories do not belong to the run's test puzzles.
    """
    config = run.section("evaluate", EvaluateConfig)
    sample = run.section("sample", SampleConfig)
    if max(config.widths) > sample.width:
        raise ConfigError(
            f"{run.where}.evaluate.widths: {max(config.widths)} is above sample.width "
            f"{sample.width}; draw that many trajectories or report fewer"
        )
    folder = RESULTS / run.name
    path = folder / "trajectories.parquet"
    frame = pl.from_arrow(tables.read(path, "trajectories"))
    assert isinstance(frame, pl.DataFrame)
    counts = solution_counts(run.task_name, run.task)
    _check(path, frame, counts.collect(), sample)
    puzzles = puzzle_table(frame.lazy(), counts, config.widths)
    found = metrics(puzzles, sample.depth, config)
    scaling = _scaling(puzzles, sample, config)
    about = {"run": run.name, **provenance()}
    tables.write(folder / "puzzles.parquet", puzzles.to_arrow(), tables.puzzles_schema(), about)
    write_atomic(folder / "scaling.csv", scaling.write_csv().encode())
    write_atomic(folder / "metrics.json", (json.dumps(found, indent=2) + "\n").encode())
    return found


def _check(path: Path, rows: pl.DataFrame, counts: pl.DataFrame, sample: SampleConfig) -> None:
    """Every test puzzle with every trajectory at every depth, once."""
    known, found = set(counts["puzzle_id"]), set(rows["puzzle_id"])
    if known != found:
        odd = sorted(known ^ found)[0]
        raise TableError(f"{path}: puzzle {odd!r} is not in both this table and the test table")
    wanted = len(known) * sample.width * len(sample.all_depths)
    if len(rows) != wanted or len(rows.unique(["puzzle_id", "trajectory", "depth"])) != wanted:
        raise TableError(
            f"{path}: {len(rows)} rows, expected {wanted}: every puzzle, trajectory and depth once"
        )


def _scaling(puzzles: pl.DataFrame, sample: SampleConfig, config: EvaluateConfig) -> pl.DataFrame:
    """Each metric at every width and depth, for `dvc plots`."""
    records = [
        (depth, width, name, e.value, e.low, e.high)
        for depth in sample.all_depths
        for width in config.widths
        for name, e in summarise(puzzles, width, depth, config).items()
    ]
    columns = ["depth", "width", "metric", "value", "low", "high"]
    return pl.DataFrame(records, schema=columns, orient="row")
