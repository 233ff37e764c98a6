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
    ("any_valid@20", "any of 20"),
    ("best_of_value@20", "best of 20 by value"),
    ("coverage@20", "coverage, mean"),
    ("coverage_multi@20", "coverage, several solutions"),
)


def table(root: Path, runs: Iterable[str]) -> list[str]:
    """One row a run, in per cent with 95% intervals over puzzles, then the perfect deterministic
    solver on the first run's inputs. Raises `ReportError` where a run's metrics are missing."""
    lines = ["| run | " + " | ".join(title for _, title in COLUMNS) + " | training |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    solver: list[str] = []
    for run in runs:
        found, training = (_read(root / folder / run / "metrics.json") for folder in PARTS)
        cells = [_cell(found, key) for key, _ in COLUMNS]
        lines.append(
            f"| `{run}` | {' | '.join(cells)} | {training['train_seconds'] / 60:.1f} min |"
        )
        solver = solver or [_solver(found, key) for key, _ in COLUMNS]
    lines.append(f"| a perfect deterministic solver | {' | '.join(solver)} | |")
    return lines


PARTS = (RESULTS, MODELS)


def _read(path: Path) -> dict[str, float]:
    try:
        found: dict[str, float] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise ReportError(f"{path}: no metrics there; run dvc repro") from None
    return found


def _cell(found: dict[str, float], key: str) -> str:
    low, high = 100 * found[f"{key}_low"], 100 * found[f"{key}_high"]
    return f"{100 * found[key]:.1f} ({low:.1f}–{high:.1f})"


def _solver(found: dict[str, float], key: str) -> str:
    name, _, width = key.partition("@")
    share = found.get(f"{name}_deterministic@{width}", 1.0)
    return f"{100 * share:.1f}"


def main(arguments: Sequence[str]) -> None:
    """Print the table of the runs in params.yaml."""
    print("\n".join(table(Path(), read_params()["runs"])))


if __name__ == "__main__":
    entry(main)
