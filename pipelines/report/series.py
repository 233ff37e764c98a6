"""The numbers behind each figure, as data frames: what goes to tables/*.csv and into the charts.

Everything about metrics comes from `gram_core.evaluate.metrics`; nothing here knows of charts,
colours or HTML.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import polars as pl

from gram_core.evaluate.metrics import WIDTHLESS, by_solution_count, summarise
from pipelines.report.inputs import RunInputs, TaskInputs

# The terms of the training objective that are logged on both paths.
SHARED_TERMS = ("reconstruction", "token_accuracy", "exact")
INTERVAL = {"value": pl.Float64, "low": pl.Float64, "high": pl.Float64}


def results(runs: Sequence[RunInputs]) -> pl.DataFrame:
    """Every number of each run's metrics.json: run, metric (as there), value, low, high."""
    records: list[tuple[str, str, float, float | None, float | None]] = []
    for run in runs:
        for key in run.metrics:
            if f"{key}_low" in run.metrics:
                bounds = (run.metrics[f"{key}_low"], run.metrics.get(f"{key}_high"))
                records.append((run.name, key, run.metrics[key], *bounds))
            elif not key.endswith(("_low", "_high")):
                records.append((run.name, key, run.metrics[key], None, None))
    schema = {"run": pl.String, "metric": pl.String, **INTERVAL}
    return pl.DataFrame(records, schema=schema, orient="row")


def training(runs: Sequence[RunInputs], judged: Collection[str]) -> pl.DataFrame:
    """run, path, term, step, value; what is valid for `judged` runs alone. The path is `posterior`
    (it sees the answer) or `prior` (as at inference); a model without guidance only has the latter,
    whose terms are over slots at the end of their trajectories (its loss is over all slots)."""
    frames = []
    for run in runs:
        terms = (*SHARED_TERMS, "valid") if run.name in judged else SHARED_TERMS
        names = {f"prior_{name}": ("prior", name) for name in terms}
        if run.guided:
            names |= {name: ("posterior", name) for name in (*SHARED_TERMS, "kl")}
        for column, (path, term) in names.items():
            if column in run.history.columns:
                frames.append(
                    run.history.select(
                        run=pl.lit(run.name),
                        path=pl.lit(path),
                        term=pl.lit(term),
                        step="step",
                        value=column,
                    ).drop_nulls()
                )
    return pl.concat(frames)


def scaling(runs: Sequence[RunInputs], over: str) -> pl.DataFrame:
    """run, width, depth, metric, value, low, high: over every width at the run's depth, or over
    every depth at its largest width."""
    records = []
    for run in runs:
        if over == "width":
            points: Iterable[tuple[int, int]] = (
                (w, run.depth) for w in sorted(run.evaluate.widths)
            )
        else:
            points = ((run.width, depth) for depth in run.depths)
        for width, depth in points:
            for name, e in summarise(run.puzzles, width, depth, run.evaluate).items():
                records.append((run.name, width, depth, name, e.value, e.low, e.high))
    schema = {"run": pl.String, "width": pl.Int64, "depth": pl.Int64, "metric": pl.String}
    return pl.DataFrame(records, schema={**schema, **INTERVAL}, orient="row")


def unchosen(frame: pl.DataFrame, runs: Sequence[str]) -> pl.DataFrame:
    """The rows of `scaling`, of `runs` those alone that a task with one input has: there is nothing
    to choose an answer for, and an interval over one puzzle says nothing."""
    its = pl.col("run").is_in(runs)
    kept = pl.col("metric").is_in(["accuracy", "coverage", "coverage_ideal"])
    bands = [pl.when(~its).then(pl.col(name)).alias(name) for name in ("low", "high")]
    return frame.filter(~its | kept).with_columns(*bands)


def by_solutions(runs: Sequence[RunInputs]) -> pl.DataFrame:
    """run, width, solution_count, puzzles, metric, value, low, high, and what an `ideal` uniform
    sampler of the true solutions and a perfect `deterministic` solver get at this width."""
    frames = []
    for run in runs:
        frame = by_solution_count(run.puzzles, run.width, run.depth, run.evaluate)
        count = pl.col("solution_count").cast(pl.Float64)
        bounds = {"ideal": 1 - (1 - 1 / count) ** run.width, "deterministic": 1 / count}
        covers = pl.col("metric") == "coverage"
        frames.append(
            frame.filter(count > 0).select(
                pl.lit(run.name).alias("run"),
                pl.lit(run.width).alias("width"),
                pl.all(),
                *(pl.when(covers).then(e).otherwise(1.0).alias(n) for n, e in bounds.items()),
            )
        )
    return pl.concat(frames)


def halting(runs: Sequence[RunInputs], judged: Collection[str]) -> pl.DataFrame:
    """run, steps, outcome, trajectories, share: when trajectories end at the largest depth, and of
    `judged` runs in what."""
    frames = []
    for run in runs:
        said = ("halted, valid", "halted, not valid") if run.name in judged else ("halted",) * 2
        outcome = (
            pl.when(~pl.col("halted"))
            .then(pl.lit("reached the limit"))
            .when("valid")
            .then(pl.lit(said[0]))
            .otherwise(pl.lit(said[1]))
        )
        rows = run.trajectories.filter(pl.col("depth") == run.trajectories["depth"].max())
        frames.append(
            rows.group_by("steps", outcome.alias("outcome"))
            .agg(trajectories=pl.len())
            .sort("steps", "outcome")
            .select(
                pl.lit(run.name).alias("run"),
                pl.all(),
                (pl.col("trajectories") / len(rows)).alias("share"),
            )
        )
    return pl.concat(frames)


def split_facts(task: TaskInputs) -> dict[str, object]:
    """The split and its counts, where they were recorded."""
    split = task.settings.get("split", {})
    by = split.get("by", "input") if isinstance(split, Mapping) and task.kind else None
    by = by if task.kind in ("nqueens", "") else "source"
    return {
        "by": by,
        "test_inputs": task.metadata.get("test_inputs", len(task.puzzles)),
        "train_inputs": task.metadata.get("train_inputs"),
        "twins": task.metadata.get("test_inputs_with_twin_in_train"),
        "single": task.metadata.get("test_single_solution_inputs"),
    }


def metric_key(name: str, width: int) -> str:
    """The key of metrics.json that holds the metric `name` at a width."""
    return name if name in WIDTHLESS else f"{name}@{width}"
