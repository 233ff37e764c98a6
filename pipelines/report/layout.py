"""What a figure is made of: panels, a legend, a caption. The template lays these out."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from pipelines.report.theme import REFERENCES, Spec, colour, dash


@dataclass(frozen=True)
class Panel:
    """One chart under its title."""

    title: str
    spec: Spec


@dataclass(frozen=True)
class Key:
    """An entry of a figure's legend: a swatch drawn as a line or a box."""

    label: str
    colour: str
    dash: str = ""
    box: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels in rows of `columns`, with a caption and the CSV that holds their data."""

    caption: str
    panels: list[Panel]
    legend: list[Key]
    table: str
    columns: int = 3


def run_keys(runs: Sequence[str], frame: pl.DataFrame) -> list[Key]:
    """The legend that tells the runs in `frame` apart; colours go by the place in `runs`."""
    shown = set(frame["run"])
    return [
        Key(name, colour(i), " ".join(map(str, dash(i))))
        for i, name in enumerate(runs)
        if name in shown
    ]


REFERENCE_KEYS = [
    Key(name, "var(--muted)", " ".join(map(str, marks))) for name, marks in REFERENCES.items()
]
