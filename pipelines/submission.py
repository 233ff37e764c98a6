"""An ARC run's submission in the form of the ARC Prize, from its trajectories."""

import json
from collections import Counter
from pathlib import Path

import polars as pl

from gram_core import tables
from gram_core.errors import GramError
from gram_core.files import write_atomic
from gram_core.sample.trajectory import SampleConfig
from gram_core.tasks.arc import Arc, check_submission, submission
from pipelines.dataset import test_table
from pipelines.params import RESULTS, Run


def write_submission(run: Run, path: Path) -> int:
    """Write the two best-voted answers to each test input; returns the number of tasks. Raises
    `GramError` where the run is not of an ARC task."""
    if path.is_dir():
        raise GramError(f"{path}: is a folder; name a file to write")
    if not isinstance(run.task, Arc):
        raise GramError(f"{run.where}: task {run.task_name!r} is not of kind arc")
    frame = pl.from_arrow(tables.read(RESULTS / run.name / "trajectories.parquet", "trajectories"))
    assert isinstance(frame, pl.DataFrame)
    depth = run.section("sample", SampleConfig).depth
    document = submission(run.task.votes(frame.filter(pl.col("depth") == depth)))
    inputs = {
        i.rpartition("/")[0] for i in test_table(run.task_name, run.task)["puzzle_id"].to_pylist()
    }
    check_submission(document, Counter(name.rpartition("/")[0] for name in inputs))
    write_atomic(path, (json.dumps(document) + "\n").encode())
    return len(document)
