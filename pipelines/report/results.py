"""The report's tables: all metrics with their intervals, the paper's numbers, facts of the runs.

Turns numbers into cells; the layout is the template's. Values are shares in 0..1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.report import paper
from pipelines.report.inputs import RunInputs, TaskInputs
from pipelines.report.series import metric_key, split_facts

NONE = "–"
# name, title, explanation; both reference solvers get 1 where nothing else is recorded.
ROWS = (
    ("accuracy", "One trajectory, per input", "share of the N trajectories that are valid"),
    ("accuracy_pairs", "One trajectory, pair-weighted", "inputs count by number of solutions"),
    ("any_valid", "Any of N", "at least one trajectory is valid"),
    ("majority", "Majority vote", "the commonest answer is valid"),
    ("best_of_value", "Best of N by value head", "the answer the model itself rates highest"),
    ("first_halt", "First to halt", "the answer of the trajectory that stopped first"),
    ("best_of_verifier", "Best of N by verifier", "picked by checking: equals any of N"),
    ("coverage", "Coverage, mean over inputs", "found ÷ existing solutions, averaged over inputs"),
    ("coverage_pairs", "Coverage, pooled pairs", "found ÷ existing, summed over all inputs"),
    ("coverage_multi", "Coverage, pooled, several solutions", "inputs with two or more only"),
)


@dataclass(frozen=True)
class Cell:
    """A share with its interval; `share` None where the metric does not apply."""

    share: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """Per cent with one decimal."""
        return NONE if self.share is None else f"{100 * self.share:.1f}"

    @property
    def interval(self) -> str:
        """The interval in per cent; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"{100 * self.low:.1f} – {100 * self.high:.1f}"


@dataclass(frozen=True)
class MetricRow:
    """One metric: a cell a run, then the two reference solvers."""

    title: str
    explanation: str
    cells: list[Cell]
    ideal: Cell
    solver: Cell
    group: bool = False


BOUNDS = (
    ("bound", "Full bound on log p(y | x)", "Eq. 13: final reconstruction less all divergence"),
    ("bound_reconstruction", "Final reconstruction", "log p(y | z) after the last step"),
    ("bound_divergence", "Divergence", "KL of posterior from prior over the whole trajectory"),
    ("bound_surrogate", "Surrogate", "Eq. 14: mean over the supervision steps"),
)


@dataclass(frozen=True)
class Likelihood:
    """One quantity of the likelihood's bounds, a text a run, in nats a pair."""

    title: str
    explanation: str
    cells: list[str]


def likelihood_rows(runs: Sequence[RunInputs]) -> list[Likelihood]:
    """The bounds of the runs that have them; no rows where none does."""
    return [
        Likelihood(title, explanation, [_nats(run, key) for run in runs])
        for key, title, explanation in BOUNDS
        if any(key in run.metrics for run in runs)
    ]


def _nats(run: RunInputs, key: str) -> str:
    if key not in run.metrics:
        return NONE
    low, high = run.metric(f"{key}_low"), run.metric(f"{key}_high")
    return f"{run.metric(key):.2f} ({low:.2f} – {high:.2f})"


@dataclass(frozen=True)
class Comparison:
    """Our runs and the paper's methods on one task."""

    runs: list[tuple[str, str, list[Cell]]] = field(default_factory=list)
    published: tuple[paper.Published, ...] = ()


def cell(run: RunInputs, name: str, *, optional: bool = False) -> Cell:
    """A metric of `run` at its largest width. Raises `ReportError` for a missing one that is not
    optional (coverage is: it needs the number of solutions)."""
    key = metric_key(name, run.width)
    if optional and key not in run.metrics:
        return Cell()
    return Cell(run.metric(key), run.metric(f"{key}_low"), run.metric(f"{key}_high"))


def metric_rows(runs: Sequence[RunInputs]) -> list[MetricRow]:
    """The results table of one task's runs."""
    rows = []
    widest = max(runs, key=lambda run: run.width)
    for name, title, explanation in ROWS:
        optional = name.startswith("coverage") or name == "accuracy_pairs"
        cells = [cell(run, name, optional=optional) for run in runs]
        ideal = solver = Cell(1.0)
        if name.startswith("coverage"):
            ideal = Cell(cell(widest, f"{name}_ideal", optional=True).share)
            solver = Cell(cell(widest, f"{name}_deterministic", optional=True).share)
        if any(c.share is not None for c in cells):
            group = name in ("any_valid", "coverage")
            rows.append(MetricRow(title, explanation, cells, ideal, solver, group))
    return rows


COMPARED = (
    "accuracy",
    "accuracy_pairs",
    "best_of_value",
    "coverage",
    "coverage_pairs",
    "coverage_multi",
)


def comparison(task: TaskInputs, runs: Sequence[RunInputs]) -> Comparison:
    """Our runs beside the paper's methods; no rows of theirs where the paper has no such task or
    the split is another than the paper's."""
    ours = [
        (run.name, parameters(run), [cell(run, name, optional=True) for name in COMPARED])
        for run in runs
    ]
    size = task.settings.get("size", 8 if task.kind == "nqueens" else None)
    theirs = split_facts(task)["by"] in ("input", None)
    return Comparison(ours, paper.published(task.kind, size) if theirs else ())


def parameters(run: RunInputs) -> str:
    """The parameter count as a person writes it."""
    count = run.training.get("parameters")
    if count is None:
        return NONE
    return f"{count / 1e6:.2f}M" if count >= 1e5 else f"{count / 1e3:.1f}k"


def duration(seconds: float | None) -> str:
    """Seconds as minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def run_facts(run: RunInputs) -> list[str]:
    """What was trained and sampled, in the order of `FACTS`."""
    model = run.model
    steps = max(run.history["step"].to_list())
    return [
        parameters(run),
        str(model.get("guidance", NONE)),
        f"{model.get('dim', NONE)}",
        f"{model.get('K', NONE)} / {model.get('T', NONE)} / {model.get('N_sup', NONE)}",
        f"{steps:,}",
        str(run.train.batch),
        duration(run.training.get("train_seconds")),
        f"{run.width} × {run.depth}",
    ]


FACTS = (
    "Parameters",
    "Guidance",
    "Width D",
    "K / T / N_sup",
    "Optimiser steps",
    "Batch",
    "Training time",
    "Trajectories × depth",
)


SPLITS = {
    "input": "Split by unique input, as in the paper",
    "orbit": "Split by symmetry orbit: all mirror images of an input fall on one side",
}


def split_sentence(task: TaskInputs) -> str:
    """The split of a task and what of the test set training has seen in a mirror."""
    facts = split_facts(task)
    text = SPLITS.get(str(facts["by"]), "Split not recorded")
    text += f". {facts['test_inputs']:,} test inputs"
    if facts["train_inputs"] is not None:
        text += f", {facts['train_inputs']:,} training inputs"
    if facts["twins"] is not None:
        share = int(str(facts["twins"])) / max(1, int(str(facts["test_inputs"])))
        text += f"; {facts['twins']:,} of the test inputs ({share:.0%}) have a symmetric twin"
        text += " in training"
    if facts["single"] is not None:
        text += f", {facts['single']:,} have a single solution"
    return text + "."
