"""Hyperparameter sweeps: reads their tables of trials and reduces each trial to one row.

A trial's value is the metric as the trial reported it last; one that reported none, or no finite
one, or failed, has no place among the others. Knows no charts and no HTML.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from gram_core import tables
from pipelines.report.inputs import ReportError, read_table

Row = dict[str, Any]
COLUMNS = {
    "sweep": pl.String,
    "run": pl.String,
    "trial": pl.String,
    "number": pl.UInt32,
    "state": pl.String,
    "outcome": pl.String,
    "reports": pl.UInt32,
    "step": pl.UInt32,
    "seconds": pl.Float64,
    "metric": pl.String,
    "mode": pl.String,
    "value": pl.Float64,
    "best_so_far": pl.Float64,
}


@dataclass(frozen=True)
class Trial:
    """A trial at its last report; `value` is None where it never reported the metric."""

    name: str
    number: int
    state: str
    params: dict[str, Any]
    reports: int
    step: int
    seconds: float
    value: float | None

    @property
    def place(self) -> float | None:
        """The value, where it compares with others': a failed trial's is of before it failed."""
        if self.state == "ERROR" or self.value is None or not math.isfinite(self.value):
            return None
        return self.value


@dataclass(frozen=True)
class Sweep:
    """A sweep and its trials in the order they started; `mode` says which metric is better, and
    `fixed` what every trial had in place of the run's own settings."""

    name: str
    run: str
    metric: str
    mode: str
    trials: tuple[Trial, ...]
    fixed: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def keys(self) -> list[str]:
        """The parameters searched, by dotted key."""
        return sorted({key for trial in self.trials for key in trial.params})

    @cached_property
    def longest(self) -> int:
        """The last step that a trial reported."""
        return max(trial.step for trial in self.trials)

    @cached_property
    def best(self) -> Trial | None:
        """The trial with the best value, the first of them; None where there is no value."""
        return next((trial for trial in self.ranked() if trial.place is not None), None)

    def ranked(self) -> list[Trial]:
        """Trials from the best to the worst, those without a value last, else as they started."""
        sign = 1 if self.mode == "min" else -1
        return sorted(self.trials, key=lambda t: math.inf if t.place is None else sign * t.place)

    def best_so_far(self) -> list[float | None]:
        """For each trial the best value up to it."""
        better = min if self.mode == "min" else max
        best: float | None = None
        so_far = []
        for trial in self.trials:
            if trial.place is not None:
                best = trial.place if best is None else better(best, trial.place)
            so_far.append(best)
        return so_far

    def outcome(self, trial: Trial) -> str:
        """How a trial went, in words."""
        if trial.state == "TERMINATED":
            end = trial.params.get("train.steps", self.longest)
            return "ran to the end" if trial.step == end else "stopped early"
        return "failed" if trial.state == "ERROR" else trial.state.lower()


def read_sweeps(root: Path) -> list[Sweep]:
    """Every sweep with trials in its table under `root`, by name."""
    paths = sorted((root / "results" / "sweeps").glob("*/trials.parquet"))
    return [sweep for sweep in map(read_sweep, paths) if sweep.trials]


def read_sweep(path: Path) -> Sweep:
    """The sweep of one table of trials. Raises `ReportError`."""
    table = read_table(path, "trials")
    made = tables.provenance(table)
    for key in ("run", "metric", "mode"):
        if not isinstance(made.get(key), str):
            raise ReportError(f"{path}: its provenance has no {key!r}")
    if made["mode"] not in ("max", "min"):
        raise ReportError(f"{path}: mode is {made['mode']!r}, expected 'max' or 'min'")
    by_trial: dict[str, list[Row]] = {}
    for row in sorted(table.to_pylist(), key=lambda row: (row["number"], row["step"])):
        by_trial.setdefault(row["trial"], []).append(row)
    trials = [_trial(path, rows, made["metric"]) for rows in by_trial.values()]
    fixed = made.get("settings", {}).get("fixed", {})
    return Sweep(path.parent.name, made["run"], made["metric"], made["mode"], tuple(trials), fixed)


def _trial(path: Path, rows: Sequence[Row], metric: str) -> Trial:
    """One trial out of its reports, the earliest first."""
    last = rows[-1]
    reported = [dict(row["metrics"]) for row in rows]
    values = [metrics[metric] for metrics in reported if metrics.get(metric) is not None]
    return Trial(
        name=last["trial"],
        number=last["number"],
        state=last["state"],
        params={key: _value(path, last["trial"], key, text) for key, text in last["params"]},
        reports=sum(map(bool, reported)),
        step=last["step"],
        seconds=last["seconds"],
        value=values[-1] if values else None,
    )


def _value(path: Path, trial: str, key: str, text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except ValueError:
        raise ReportError(f"{path}: trial {trial}: {key} is {text!r}, which is no JSON") from None


def frame(sweeps: Sequence[Sweep]) -> pl.DataFrame:
    """One row a trial, its parameters in columns `params.KEY`: text as it is, the rest as JSON,
    empty where the trial has none of that name."""
    keys = sorted({key for sweep in sweeps for key in sweep.keys})
    rows = [
        {
            "sweep": sweep.name,
            "run": sweep.run,
            "trial": trial.name,
            "number": trial.number,
            "state": trial.state,
            "outcome": sweep.outcome(trial),
            "reports": trial.reports,
            "step": trial.step,
            "seconds": trial.seconds,
            "metric": sweep.metric,
            "mode": sweep.mode,
            "value": trial.value,
            "best_so_far": best,
            **{f"params.{key}": _plain(value) for key, value in trial.params.items()},
        }
        for sweep in sweeps
        for trial, best in zip(sweep.trials, sweep.best_so_far(), strict=True)
    ]
    schema = {**COLUMNS, **{f"params.{key}": pl.String for key in keys}}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
