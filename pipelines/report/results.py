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


UNCONDITIONAL = ("accuracy", "coverage")
# Numbers that only some tasks have, in shares where the explanation says nothing else.
OWN = {
    "token_accuracy": "Tokens right, one trajectory",
    "token_accuracy_majority": "Tokens right, majority vote",
    "token_accuracy_value": "Tokens right, best by value head",
    "conflicts": "Conflict edges a graph, one trajectory",
    "conflicts_majority": "Conflict edges a graph, majority vote",
    "conflicts_value": "Conflict edges a graph, best by value head",
    "conflicts_total": "Conflict edges over all test graphs, one trajectory",
    "conflicts_value_total": "Conflict edges over all test graphs, best by value head",
    "unique": "Distinct among the valid answers",
    "novel": "Not among the training answers, of the distinct valid ones",
    "distinct": "Distinct answers",
    "inception_score": "Inception Score",
    "inception_distance": "FID against the binarised training images",
    "classifier_score": "Classifier score (our classifier, not the paper's IS)",
    "classifier_score_real": "Classifier score of the held-out images",
    "classifier_distance": "Classifier distance (our classifier, not the paper's FID)",
    "classifier_distance_real": "Classifier distance of the held-out images",
}


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
class OwnRow:
    """A number of the task's own, a text a run."""

    title: str
    key: str
    cells: list[str]


def own_rows(task: TaskInputs, runs: Sequence[RunInputs]) -> list[OwnRow]:
    """The numbers that metrics.json has beside those of the other tables, at the largest width: in
    the order of `OWN`, those without a title there last."""
    elsewhere = {name for name, *_ in (*ROWS, *BOUNDS)} | {"steps"}
    elsewhere |= {"distinct"} if task.judged else set()
    hidden = ("_low", "_high", "_ideal", "_deterministic")
    found: dict[str, str] = {}
    for run in runs:
        for key in run.metrics:
            label, _, width = key.partition("@")
            if label in elsewhere or key.endswith(hidden) or label.endswith(hidden):
                continue
            if label.endswith("_total") and label not in OWN:
                continue
            if label == "pass":
                found[key] = key
            elif width in ("", str(run.width)):
                found.setdefault(label, key)
    order = {label: rank for rank, label in enumerate(OWN)}
    return [
        OwnRow(OWN.get(label, label), label, [_own_cell(run, label) for run in runs])
        for label in sorted(found, key=lambda label: order.get(label, len(order)))
    ]


def _own_cell(run: RunInputs, label: str) -> str:
    key = label if label in run.metrics else f"{label}@{run.width}"
    if key not in run.metrics:
        return NONE
    value = run.metrics[key]
    if f"{key}_low" not in run.metrics:
        return f"{value:.4g}"
    return f"{value:.4g} ({run.metrics[f'{key}_low']:.4g} – {run.metrics[f'{key}_high']:.4g})"


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
    value = f"{run.metric(key):.2f}"
    if f"{key}_low" not in run.metrics:  # one input, no interval over inputs
        return value
    return f"{value} ({run.metric(f'{key}_low'):.2f} – {run.metric(f'{key}_high'):.2f})"


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
    return Cell(run.metric(key), run.metrics.get(f"{key}_low"), run.metrics.get(f"{key}_high"))


def widths(runs: Sequence[RunInputs]) -> str:
    """N of the runs' numbers: one, or each run's."""
    if len({run.width for run in runs}) == 1:
        return str(runs[0].width)
    return ", ".join(f"{run.width} ({run.name})" for run in runs)


def metric_rows(task: TaskInputs, runs: Sequence[RunInputs]) -> list[MetricRow]:
    """The results table of one task's runs; without an input there is nothing to choose among
    answers for, and without a rule nothing is valid."""
    rows = []
    widest = max(runs, key=lambda run: run.width)
    alike = len({run.width for run in runs}) == 1  # a sampler's coverage is one of N
    # With one solution each, finding one is finding all.
    single = task.conditional and set(task.puzzles["solution_count"]) == {1}
    for name, title, explanation in ROWS:
        if single and name in ("accuracy_pairs", "coverage", "coverage_pairs"):
            continue
        if not task.judged or (not task.conditional and name not in UNCONDITIONAL):
            continue
        optional = name.startswith("coverage") or name == "accuracy_pairs"
        cells = [cell(run, name, optional=optional) for run in runs]
        ideal = solver = Cell(1.0)
        if name.startswith("coverage"):
            ideal = Cell(cell(widest, f"{name}_ideal", optional=True).share if alike else None)
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
    theirs = split_facts(task)["by"] != "orbit"
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
    "source": "",
}


def split_sentence(task: TaskInputs) -> str:
    """The split of a task and what of the test set training has seen in a mirror."""
    facts = split_facts(task)
    if not task.conditional:
        counts = [task.metadata.get(f"{part}_targets", NONE) for part in ("train", "test")]
        return f"Generated from nothing: {counts[0]:,} training and {counts[1]:,} held-out answers."
    text = SPLITS.get(str(facts["by"]), "Split not recorded")
    text += f"{'. ' if text else ''}{facts['test_inputs']:,} test inputs"
    if facts["train_inputs"] is not None:
        text += f", {facts['train_inputs']:,} training inputs"
    if facts["twins"] is not None:
        share = int(str(facts["twins"])) / max(1, int(str(facts["test_inputs"])))
        text += f"; {facts['twins']:,} of the test inputs ({share:.0%}) have a symmetric twin"
        text += " in training"
    if facts["single"] is not None:
        text += f", {facts['single']:,} have a single solution"
    return text + "."
