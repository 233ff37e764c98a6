"""The evaluate stage: trajectories in, puzzles table, metrics and plot data out."""

import json
from pathlib import Path

import polars as pl

from gram_core import tables
from gram_core.evaluate.metrics import metrics, puzzle_table, summarise
from gram_core.model.store import write_atomic
from gram_core.tables import TableError
from pipelines.dataset import solution_counts
from pipelines.params import Run
from pipelines.provenance import provenance

RESULTS = Path("results")


def evaluate(run: Run) -> dict[str, float]:
    """results/RUN/puzzles.parquet, metrics.json and scaling.csv; returns the metrics.

    Raises `TableError` where the trajectories do not belong to the run's test puzzles.
    """
    folder = RESULTS / run.name
    path = folder / "trajectories.parquet"
    frame = pl.from_arrow(tables.read(path, "trajectories"))
    assert isinstance(frame, pl.DataFrame)
    counts = solution_counts(run.task_name, run.task)
    _check(path, frame, counts.collect(), run)
    puzzles = puzzle_table(frame.lazy(), counts, run.evaluate.widths)
    found = metrics(puzzles, run.sample.depth, run.evaluate)
    scaling = _scaling(puzzles, run)
    about = {"run": run.name, **provenance()}
    tables.write(folder / "puzzles.parquet", puzzles.to_arrow(), tables.puzzles_schema(), about)
    write_atomic(folder / "scaling.csv", scaling.write_csv().encode())
    write_atomic(folder / "metrics.json", (json.dumps(found, indent=2) + "\n").encode())
    return found


def _check(path: Path, rows: pl.DataFrame, counts: pl.DataFrame, run: Run) -> None:
    """Every test puzzle with every trajectory at every depth, once."""
    known, found = set(counts["puzzle_id"]), set(rows["puzzle_id"])
    if known != found:
        odd = sorted(known ^ found)[0]
        raise TableError(f"{path}: puzzle {odd!r} is not in both this table and the test table")
    wanted = len(known) * run.sample.width * len(run.sample.all_depths)
    if len(rows) != wanted or len(rows.unique(["puzzle_id", "trajectory", "depth"])) != wanted:
        raise TableError(
            f"{path}: {len(rows)} rows, expected {wanted}: every puzzle, trajectory and depth once"
        )


def _scaling(puzzles: pl.DataFrame, run: Run) -> pl.DataFrame:
    """Each metric at every width and depth, for `dvc plots`."""
    records = [
        (depth, width, name, e.value, e.low, e.high)
        for depth in run.sample.all_depths
        for width in run.evaluate.widths
        for name, e in summarise(puzzles, width, depth, run.evaluate).items()
    ]
    columns = ["depth", "width", "metric", "value", "low", "high"]
    return pl.DataFrame(records, schema=columns, orient="row")
