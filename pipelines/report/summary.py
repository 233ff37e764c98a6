"""The README's results table, from the metrics of the runs: `python -m pipelines.report.summary`.

Prints Markdown. A test holds the README to the committed metrics.
"""

import json
from collections.abc import Iterable, Sequence
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
    "conflicts_value_total": "conflict edges, best by value",
    "novel": "new",
    "classifier_distance": "classifier distance",
    "classifier_distance_real": "held-out images",
    "token_accuracy": "tokens right",
}
NONE = "–"
PARTS = (RESULTS, MODELS)


def table(root: Path, runs: Iterable[str]) -> list[str]:
    """One row a run, in per cent with 95% intervals over puzzles, N being the run's largest width,
    and after the runs of a task that has inputs with several solutions what a perfect
    deterministic solver gets there. Raises `ReportError` where a run's metrics are missing."""
    titles = ["run", "N", *(title for _, title in COLUMNS), "also", "training"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    solver: list[str] = []
    for run in runs:
        found, training = (_read(root / folder / run / "metrics.json") for folder in PARTS)
        width = max(int(key.partition("@")[2]) for key in found if key.startswith("distinct@"))
        cells = [_cell(found, name, width) for name, _ in COLUMNS]
        also = ", ".join(
            f"{title} {_number(found, name, width)}"
            for name, title in OWN.items()
            if _key(found, name, width)
        )
        minutes = f"{training['train_seconds'] / 60:.1f} min"
        lines.append(f"| `{run}` | {width} | {' | '.join(cells)} | {also} | {minutes} |")
        solver = solver or [_solver(found, name, width) for name, _ in COLUMNS]
    lines.append(f"| a perfect deterministic solver on the first | | {' | '.join(solver)} | | |")
    return lines


def _read(path: Path) -> dict[str, float]:
    try:
        found: dict[str, float] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise ReportError(f"{path}: no metrics there; run dvc repro") from None
    return found


def _key(found: dict[str, float], name: str, width: int) -> str:
    """The key of a metric at this width or without one; empty where the run has none."""
    return next((key for key in (name, f"{name}@{width}") if key in found), "")


def _cell(found: dict[str, float], name: str, width: int) -> str:
    key = _key(found, name, width)
    if not key:
        return NONE
    low, high = 100 * found[f"{key}_low"], 100 * found[f"{key}_high"]
    return f"{100 * found[key]:.1f} ({low:.1f}–{high:.1f})"


def _number(found: dict[str, float], name: str, width: int) -> str:
    value = found[_key(found, name, width)]
    return f"{value:.3g}" if name.startswith(("conflicts", "classifier")) else f"{100 * value:.1f}"


def _solver(found: dict[str, float], name: str, width: int) -> str:
    return f"{100 * found.get(f'{name}_deterministic@{width}', 1.0):.1f}"


def main(arguments: Sequence[str]) -> None:
    """Print the table of the runs in params.yaml."""
    print("\n".join(table(Path(), read_params()["runs"])))


if __name__ == "__main__":
    entry(main)
