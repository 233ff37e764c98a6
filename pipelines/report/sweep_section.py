"""A sweep's part of the page: a sentence, two figures and the table of its best trials."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pipelines.report import sweep_charts
from pipelines.report.layout import Figure, Key, Panel
from pipelines.report.results import NONE, duration
from pipelines.report.sweep_axes import ABSENT, Axis, axis, is_log, short_names, show
from pipelines.report.sweeps import Sweep, Trial
from pipelines.report.theme import SHADES, shade

TABLE = "sweeps.csv"
SHOWN = 10  # trials in the table
BETTER = {"max": "larger", "min": "smaller"}


@dataclass(frozen=True)
class TrialRow:
    """A row of the table, as text."""

    number: int
    state: str
    outcome: str
    params: list[str]
    value: str
    step: int
    seconds: str
    best: bool


@dataclass(frozen=True)
class Section:
    """What the page shows of a sweep."""

    id: str
    name: str
    summary: str
    figures: list[Figure]
    keys: list[str]
    metric: str
    total: int
    rows: list[TrialRow]


def section(sweep: Sweep) -> Section:
    """Everything about one sweep."""
    shown = sweep.ranked()[:SHOWN]
    return Section(
        id=f"sweep-{quote(sweep.name, safe='')}",
        name=sweep.name,
        summary=summary(sweep),
        figures=_figures(sweep),
        keys=sweep.keys,
        metric=sweep.metric,
        total=len(sweep.trials),
        rows=[_row(sweep, trial) for trial in shown],
    )


def summary(sweep: Sweep) -> str:
    """The run, how its trials went, which was best, and what all took."""
    counts = Counter(sweep.outcome(trial) for trial in sweep.trials)
    full, early, failed = (counts.pop(o, 0) for o in ("ran to the end", "stopped early", "failed"))
    others = "".join(f", {count} {outcome}" for outcome, count in sorted(counts.items()))
    number = len(sweep.trials)
    best = sweep.best
    found = "no trial has one"
    if best is not None:
        found = f"trial {best.number} is best with {show(best.value)}"
    total = sum(t.seconds for t in sweep.trials if t.seconds < float("inf"))
    return (
        f"Run {sweep.run}, {number} trial{'s' if number != 1 else ''}: {full} ran to the end, "
        f"{early} stopped early (before the last of their steps), "
        f"{failed} failed{others}. Judged by {sweep.metric} as a trial reported it last, the "
        f"{BETTER[sweep.mode]} the better: {found}. "
        f"Wall time of all trials added up: {duration(total)}."
    )


def _row(sweep: Sweep, trial: Trial) -> TrialRow:
    return TrialRow(
        number=trial.number,
        state=trial.state,
        outcome=sweep.outcome(trial) if trial.state == "TERMINATED" else "",
        params=[show(trial.params.get(key, ABSENT)) for key in sweep.keys],
        value=_value(trial),
        step=trial.step,
        seconds=f"{trial.seconds:,.1f}",
        best=trial is sweep.best,
    )


def _value(trial: Trial) -> str:
    return NONE if trial.value is None else show(trial.value)


def _figures(sweep: Sweep) -> list[Figure]:
    """Parallel coordinates, and the best value over the trials where there are any values."""
    names = short_names(sweep.keys)
    axes = [
        axis(name, [trial.params.get(key, ABSENT) for trial in sweep.trials])
        for name, key in zip(names, sweep.keys, strict=True)
    ]
    values = [ABSENT if trial.place is None else trial.place for trial in sweep.trials]
    metric = axis(sweep.metric, values)
    rows = _chart_rows(sweep, metric)
    tips = {"number": "trial", "outcome": "state", "shown": sweep.metric}
    tips |= {f"param{i}": key for i, key in enumerate(sweep.keys)}
    figures = [_parallel(sweep, [*axes, metric], rows, tips)]
    places = [trial.place for trial in sweep.trials if trial.place is not None]
    if places:
        title = f"Best {sweep.metric} so far against trials"
        spec = sweep_charts.progress(rows, tips, sweep.metric, is_log(places), title)
        legend = [
            Key("best so far, and the best trial", sweep_charts.BEST),
            Key("a trial’s own value", shade(SHADES // 2), box=True),
        ]
        caption = (
            "The line is what the sweep would have found had it ended after so many trials; "
            "trials without a value have no dot."
        )
        figures.append(Figure(caption, [Panel(title, spec)], legend, TABLE, columns=1))
    return figures


def _chart_rows(sweep: Sweep, metric: Axis) -> list[dict[str, Any]]:
    """A row a trial for the charts, as they started."""
    so_far = sweep.best_so_far()
    rows = []
    for trial, place, best in zip(sweep.trials, metric.places, so_far, strict=True):
        rows.append(
            {
                "trial": trial.name,
                "number": trial.number,
                "outcome": sweep.outcome(trial),
                "shown": _value(trial),
                "value": trial.place,
                "best_so_far": best,
                "level": None if place is None else _level(place, sweep.mode),
                "best": trial is sweep.best,
                **{
                    f"param{i}": show(trial.params.get(key, ABSENT))
                    for i, key in enumerate(sweep.keys)
                },
            }
        )
    return rows


def _level(place: float, mode: str) -> int:
    """The shade of a place on the metric's axis: the better the stronger."""
    goodness = place if mode == "max" else 1 - place
    return min(int(goodness * SHADES), SHADES - 1)


def _parallel(
    sweep: Sweep,
    axes: Sequence[Axis],
    rows: Sequence[Mapping[str, Any]],
    tips: Mapping[str, str],
) -> Figure:
    title = f"Parameters and {sweep.metric} of every trial"
    spec = sweep_charts.parallel(axes, rows, tips, title)
    logs = [a.title for a in axes if a.scale is not None and a.scale.log]
    caption = (
        f"One line a trial, from its parameters to the {sweep.metric} it reported last; the ends "
        "of each axis are the smallest and the largest value tried, names and switches in their "
        "order, and a line breaks where a trial has no value."
        + (f" Logarithmic: {', '.join(logs)}." if logs else "")
    )
    return Figure(caption, [Panel(title, spec)], _legend(sweep, axes[-1]), TABLE, columns=1)


def _legend(sweep: Sweep, metric: Axis) -> list[Key]:
    """The best trial, the shades that occur by their ranges, and what has no value."""
    keys = []
    if sweep.best is not None:
        keys.append(Key(f"best: trial {sweep.best.number}", sweep_charts.BEST))
    others = [p for t, p in zip(sweep.trials, metric.places, strict=True) if t is not sweep.best]
    levels = {_level(place, sweep.mode) for place in others if place is not None}
    for level in sorted(levels, reverse=True):
        assert metric.scale is not None
        ends = [level / SHADES, (level + 1) / SHADES]
        low, high = sorted(metric.scale.at(e if sweep.mode == "max" else 1 - e) for e in ends)
        label = show(low, 3) if low == high else f"{show(low, 3)} to {show(high, 3)}"
        keys.append(Key(label, shade(level), box=True))
    if None in metric.places:
        keys.append(Key("no value", sweep_charts.NONE, "4 3"))
    return keys
