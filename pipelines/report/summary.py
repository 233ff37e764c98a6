"""The README's results table, from the metrics of the runs: `python -m pipelines.report.summary`.

Prints Markdown. A test holds the README to the committed metrics.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.params import MODELS, RESULTS, read_params
from pipelines.report.inputs import ReportError
from pipelines.runtime import entry

COLUMNS = (
    ("accuracy", "one trajectory"),
    ("any_valid", "any of N"),
    ("best_of_value", "best of N by value"),
    ("coverage", "coverage, mean"),
    ("coverage_multi", "coverage, several solutions"),
)
# What a task measures beside being valid, as it comes first in a run's metrics.
OWN = {
    "pass@2": "pass@2",
    "conflicts_value_total": "conflict edges, best by value",
    "novel": "new",
    "classifier_distance": "classifier distance",
    "classifier_distance_real": "held-out images",
    "token_accuracy": "tokens right",
}
NONE = "–"
PARTS = (RESULTS, MODELS)


@dataclass(frozen=True)
class Row:
    """A run in one line: N, its largest width, the numbers of `COLUMNS` in per cent with their
    intervals, and what its task measures beside them."""

    width: int
    cells: list[str]
    also: str


def row(found: Mapping[str, float]) -> Row:
    """The line of a run with these metrics."""
    # A run that stops at the first valid answer has no `distinct`.
    names = (re.fullmatch(r"(?:distinct|any_valid)@(\d+)", key) for key in found)
    width = max(int(name[1]) for name in names if name)
    also = [f"{title} {_number(found, name, width)}" for name, title in OWN.items()]
    cells = [_cell(found, name, width) for name, _ in COLUMNS]
    return Row(width, cells, ", ".join(text for text in also if not text.endswith(NONE)))


def table(root: Path, runs: Iterable[str]) -> list[str]:
    """One row a run, and last what a perfect deterministic solver gets on the first run's inputs.
    Raises `ReportError` where a run's metrics are missing."""
    titles = ["run", "N", *(title for _, title in COLUMNS), "also", "training"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    solver: list[str] = []
    for run in runs:
        found, training = (_read(root / folder / run / "metrics.json") for folder in PARTS)
        line = row(found)
        minutes = f"{training['train_seconds'] / 60:.1f} min"
        cells = " | ".join(line.cells)
        lines.append(f"| `{run}` | {line.width} | {cells} | {line.also} | {minutes} |")
        solver = solver or [_solver(found, name, line.width) for name, _ in COLUMNS]
    best = "a perfect deterministic solver, on the first run's inputs"
    lines.append(f"| {best} | | {' | '.join(solver)} | | |")
    return lines


def _read(path: Path) -> dict[str, float]:
    try:
        found: dict[str, float] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise ReportError(f"{path}: no metrics there; run dvc repro") from None
    return found


def _key(found: Mapping[str, float], name: str, width: int) -> str:
    """The key of a metric at this width or without one; empty where the run has none."""
    return next((key for key in (name, f"{name}@{width}") if key in found), "")


def _cell(found: Mapping[str, float], name: str, width: int) -> str:
    key = _key(found, name, width)
    if not key:
        return NONE
    if f"{key}_low" not in found:
        return f"{100 * found[key]:.1f}"
    low, high = 100 * found[f"{key}_low"], 100 * found[f"{key}_high"]
    return f"{100 * found[key]:.1f} ({low:.1f}–{high:.1f})"


def _number(found: Mapping[str, float], name: str, width: int) -> str:
    key = _key(found, name, width)
    if not key:
        return NONE
    share = not name.startswith(("conflicts", "classifier"))
    return f"{100 * found[key]:.1f}" if share else f"{found[key]:.3g}"


def _solver(found: Mapping[str, float], name: str, width: int) -> str:
    value = found.get(f"{name}_deterministic@{width}")
    if value is None and name.startswith("coverage"):
        return NONE
    return f"{100 * (1.0 if value is None else value):.1f}"


def main(arguments: Sequence[str]) -> None:
    """Print the table of the runs in params.yaml."""
    print("\n".join(table(Path(), read_params()["runs"])))


if __name__ == "__main__":
    entry(main)
