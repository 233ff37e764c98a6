"""The report's figures: which panels stand together, under which legend, with which caption.

Takes the frames of `series` and makes charts of them; it knows no files and no HTML. `runs` are
all the page's runs in order: a run has one colour throughout.
"""

from collections.abc import Mapping, Sequence

import polars as pl

from pipelines.report import charts
from pipelines.report.layout import REFERENCE_KEYS, Figure, Key, Panel, run_keys
from pipelines.report.theme import OUTCOMES, REFERENCES

POINTS = 200  # a curve on the page; the CSV has every row
IDEAL, SOLVER = REFERENCES
TERMS = {
    "reconstruction": "Reconstruction, nats a token",
    "token_accuracy": "Token accuracy",
    "exact": "Exact match with the target",
    "valid": "Valid answers",
    "kl": "KL(posterior ‖ prior), nats a token",
}
METRICS = {
    "accuracy": "One trajectory valid",
    "any_valid": "Any of N valid",
    "majority": "Majority vote valid",
    "best_of_value": "Best of N by value head",
    "first_halt": "First to halt",
    "coverage": "Coverage, mean over inputs",
    "coverage_multi": "Coverage, several solutions",
}


def training(frame: pl.DataFrame, runs: Sequence[str]) -> Figure:
    """Posterior on the left, prior on the right, term by term on a common scale."""
    panels = []
    rows = [(term, term) for term in ("reconstruction", "token_accuracy", "exact")]
    for left, right in [*rows, ("kl", "valid")]:
        for path, term in (("posterior", left), ("prior", right)):
            part = frame.filter((pl.col("path") == path) & (pl.col("term") == term))
            if part.is_empty():
                continue
            share = term not in ("reconstruction", "kl")
            both = frame.filter(pl.col("term") == term)["value"].max()
            top = 1.0 if share else float(str(both)) or 1.0
            title = TERMS[term] if term == "kl" else f"{TERMS[term]} · {path}"
            spec = charts.curves(_thin(part), runs, title, share=share, top=top)
            panels.append(Panel(title, spec))
    caption = (
        "Left the posterior, which sees the answer, right the prior, which is all there is at "
        "inference: training has worked where the right column follows the left one, and failed "
        "through the private channel where only the left one is good. Shares are of trajectories "
        "that end, on both sides; so is the prior's cross-entropy, where the posterior's is over "
        "all supervision steps, the poor first ones too."
    )
    paths = frame["path"].unique().to_list()
    if len(paths) == 1:
        seen = {"prior": "is all there is at inference", "posterior": "sees the answer"}
        caption = f"The {paths[0]}, which {seen[paths[0]]}. Shares are of trajectories that end."
    return Figure(caption, panels, run_keys(runs, frame), "training.csv", columns=2)


def _thin(frame: pl.DataFrame) -> pl.DataFrame:
    """At most `POINTS` rows a run, the last one included."""
    back = pl.int_range(pl.len()).reverse().over("run")
    stride = (pl.len().over("run") + POINTS - 1) // POINTS
    return frame.filter(back % stride == 0)


def width(frame: pl.DataFrame, runs: Sequence[str]) -> Figure:
    """What more trajectories buy, for every way to use them."""
    names = ("any_valid", "best_of_value", "majority", "first_halt", "coverage", "coverage_multi")
    if "any_valid" in frame["metric"]:
        best = "the best of them by verifier is valid for"
        caption = _gain(frame, "width", "any_valid", best) + (
            " Bands are 95% intervals over puzzles; a deterministic run is flat because its "
            "trajectories are all the same."
        )
    else:  # one input: nothing is chosen
        caption = _gain(frame, "width", "coverage", "what is found of all answers is, of")
    return _scaling(frame, runs, "width", names, caption, "width_scaling.csv")


def depth(frame: pl.DataFrame, runs: Sequence[str], trained: Mapping[str, object]) -> Figure:
    """What more supervision steps buy, at the largest width; `trained` has the number of steps
    that each run was trained with."""
    shown = ", ".join(f"{run} {trained[run]}" for run in frame["run"].unique(maintain_order=True))
    caption = _gain(frame, "depth", "accuracy", "a single trajectory is valid for") + (
        f" Trained with {shown} steps: a curve that rises beyond shows a recursion that goes on "
        "improving its answer."
    )
    names = ("accuracy", "any_valid", "coverage_multi")
    return _scaling(frame, runs, "depth", names, caption, "depth_scaling.csv")


def _gain(frame: pl.DataFrame, over: str, metric: str, what: str) -> str:
    """The first half of a caption: how `metric` moves from each run's smallest to its largest x,
    which is said once where it is the same for all."""
    values, spans = [], []
    ordered = frame.filter(pl.col("metric") == metric).sort(over)
    for run in frame["run"].unique(maintain_order=True):
        own = ordered.filter(pl.col("run") == run)
        first, last = own[over][0], own[over][-1]
        spans.append(f"from {first} to {last}" if first < last else f"at {first}")
        values.append(f"{run} {own['value'][0]:.0%} → {own['value'][-1]:.0%}")
    unit = "trajectories" if over == "width" else "supervision steps"
    if len(set(spans)) > 1:
        each = "; ".join(f"{value} {span}" for value, span in zip(values, spans, strict=True))
        return f"With {unit}, {what} {each}."
    return f"{spans[0].capitalize()} {unit}, {what} {'; '.join(values)}."


def _scaling(
    frame: pl.DataFrame,
    runs: Sequence[str],
    over: str,
    names: Sequence[str],
    caption: str,
    table: str,
) -> Figure:
    panels = []
    for name in names:
        part = frame.filter(pl.col("metric") == name)
        if not part.is_empty():
            lines = _reference_lines(frame, over, name)
            spec = charts.scaling(part, runs, over, METRICS[name], lines)
            panels.append(Panel(METRICS[name], spec))
    return Figure(caption, panels, run_keys(runs, frame) + REFERENCE_KEYS, table)


def _reference_lines(frame: pl.DataFrame, over: str, name: str) -> pl.DataFrame:
    """What the metric would be for the two ideal solvers, where the runs agree on it: at one N."""
    parts = [
        frame.filter(pl.col("metric") == f"{name}_{suffix}")
        .group_by(over)
        .agg(pl.col("value").first())
        .sort(over)
        .with_columns(reference=pl.lit(reference))
        for suffix, reference in (("ideal", IDEAL), ("deterministic", SOLVER))
    ]
    lines = pl.concat(parts)
    return lines.clear() if over == "depth" and frame["width"].n_unique() > 1 else lines


def solutions(frame: pl.DataFrame, runs: Sequence[str]) -> Figure:
    """Accuracy and coverage by the number of solutions."""
    panels = []
    for name in ("accuracy", "any_valid", "coverage"):
        part = frame.filter(pl.col("metric") == name)
        if part.is_empty():
            continue
        lines = [
            part.group_by("solution_count")
            .agg(value=pl.col(column).max(), reference=pl.lit(reference))
            .sort("solution_count")
            for column, reference in (("ideal", IDEAL), ("deterministic", SOLVER))
        ]
        if name != "coverage":
            shown = lines[0]
        else:  # a sampler's at one N
            shown = pl.concat(lines if part["width"].n_unique() == 1 else lines[1:])
        title = METRICS[name].partition(",")[0]
        panels.append(Panel(title, charts.by_count(part, runs, title, shown)))
    caption = (
        "Puzzles grouped by how many solutions they have: a deterministic solver's coverage falls "
        "as one over that number (dotted), a good sampler's stays near the ideal uniform sampler's "
        "(dashed); few puzzles have many solutions, hence the wide intervals, or for a single "
        "puzzle none, on the right."
    )
    return Figure(caption, panels, run_keys(runs, frame) + REFERENCE_KEYS, "by_solution_count.csv")


def halting(frame: pl.DataFrame, limits: Mapping[str, int]) -> Figure:
    """When trajectories end; `limits` has each run's largest depth."""
    panels = []
    for run, limit in limits.items():
        part = frame.filter(pl.col("run") == run)
        title = f"{run}: share of trajectories"
        panels.append(Panel(title, charts.histogram(part, limit, title)))
    seen = set(frame["outcome"])
    keys = [Key(label, colour, box=True) for label, colour in OUTCOMES.items() if label in seen]
    halted = frame.filter(pl.col("outcome") != "reached the limit")
    shares = {run: halted.filter(pl.col("run") == run)["share"].sum() for run in limits}
    told = "; ".join(f"{run} {share:.0%}" for run, share in shares.items())
    caption = (
        f"The step at which each trajectory stopped, at the largest depth sampled; halted by "
        f"itself: {told}."
    )
    return Figure(caption, panels, keys, "halting.csv", columns=2)
