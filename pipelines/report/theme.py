"""Colours, dashes and type of every chart, as names of the page's CSS variables.

The values, light and dark, are in templates/style.css. Knows no data.
"""

from typing import Any

Spec = dict[str, Any]
DASHES: tuple[list[float], ...] = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
PALETTE = 6
SHADES = 5
REFERENCES: dict[str, list[float]] = {
    "ideal uniform sampler": [5, 3],
    "perfect deterministic solver": [1.5, 3],
}
OUTCOMES = {
    "halted, valid": "var(--valid)",
    "halted, not valid": "var(--invalid)",
    "halted": "var(--muted)",  # of a task without a rule
    "reached the limit": "var(--faint)",
}
CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "gridColor": "var(--rule)",
        "domainColor": "var(--axis)",
        "tickColor": "var(--axis)",
        "tickSize": 4,
        "labelPadding": 5,
    },
}
SHARE = {"domain": [0, 1], "nice": False}


def colour(number: int) -> str:
    """The colour of the page's run `number`."""
    return f"var(--run-{number % PALETTE})"


def dash(number: int) -> list[float]:
    """The dash of the page's run `number`: colour is never the only difference."""
    return list(DASHES[number % len(DASHES)])


def shade(level: int) -> str:
    """The colour of a level of a sequential scale, 0 (weak) to `SHADES` - 1 (strong)."""
    return f"var(--shade-{level})"
