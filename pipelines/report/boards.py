"""How puzzles and answers are shown: one small renderer a kind of task, text for all others.

A renderer gets the input's tokens and an answer's (None: draw the input itself) and returns
inline SVG. Colours are CSS classes of the page; the only shared drawing is the symbol `#queen`.
To show another task, write its renderer and add it to `RENDERERS`.
"""

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import numpy as np
from markupsafe import Markup

from gram_core.config import ConfigError
from gram_core.tasks.nqueens import QUEEN
from gram_core.tasks.registry import make_task
from pipelines.report import drawings

Tokens = np.ndarray
Renderer = Callable[[Tokens, Tokens | None, str], Markup]
CELL = 10


def nqueens(inputs: Tokens, answer: Tokens | None, label: str) -> Markup:
    """A chess board: givens in ink, placed queens in colour, attacking ones red and joined by a
    line, a given that the answer dropped as a dashed ring."""
    n = isqrt(len(inputs))
    given = {divmod(int(cell), n) for cell in np.flatnonzero(inputs == QUEEN)}
    shown = inputs if answer is None else answer
    queens = [divmod(int(cell), n) for cell in np.flatnonzero(shown == QUEEN)]
    attacks = attacking_pairs(queens)
    attacked = {square for pair in attacks for square in pair}
    side = n * CELL
    parts = [f'<rect class="sq-light" width="{side}" height="{side}"/>']
    dark = "".join(
        f"M{c * CELL} {r * CELL}h{CELL}v{CELL}h-{CELL}z"
        for r in range(n)
        for c in range(n)
        if (r + c) % 2
    )
    parts.append(f'<path class="sq-dark" d="{dark}"/>')
    for row, column in sorted(given):
        corner = f'x="{column * CELL}" y="{row * CELL}"'
        parts.append(f'<rect class="sq-given" {corner} width="{CELL}" height="{CELL}"/>')
    for (r0, c0), (r1, c1) in attacks:
        ends = [v * CELL + CELL // 2 for v in (c0, r0, c1, r1)]
        parts.append('<line class="attack" x1="{}" y1="{}" x2="{}" y2="{}"/>'.format(*ends))
    for row, column in sorted(given - set(queens)):
        centre = f'cx="{column * CELL + CELL // 2}" cy="{row * CELL + CELL // 2}"'
        parts.append(f'<circle class="dropped" {centre} r="3.6"/>')
    for row, column in queens:
        style = "given" if (row, column) in given else "placed"
        style += " attacked" if (row, column) in attacked else ""
        corner = f'x="{column * CELL}" y="{row * CELL}"'
        size = f'width="{CELL}" height="{CELL}"'
        parts.append(f'<use href="#queen" class="{style}" {corner} {size}/>')
    return drawings.svg(parts, side, side, label)


def attacking_pairs(
    queens: list[tuple[int, int]],
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Neighbouring queens on a common row, column or diagonal; queens between block the view."""
    pairs = []
    lines: tuple[Callable[[tuple[int, int]], int], ...] = (
        lambda q: q[0],
        lambda q: q[1],
        lambda q: q[0] + q[1],
        lambda q: q[0] - q[1],
    )
    for line in lines:
        last: dict[int, tuple[int, int]] = {}
        for queen in sorted(queens):
            if line(queen) in last:
                pairs.append((last[line(queen)], queen))
            last[line(queen)] = queen
    return pairs


RENDERERS: dict[str, Renderer] = {
    "nqueens": nqueens,
    "sudoku": drawings.sudoku_board,
    "sudoku_boards": drawings.sudoku_board,
    "graph_coloring": drawings.graph,
    "arc": drawings.arc_grid,
    "digits": drawings.image,
}


def renderer(settings: Mapping[str, Any]) -> Renderer:
    """The renderer of the task that `settings` describes: its own, else the text that the task
    itself renders, else the bare tokens."""
    own = RENDERERS.get(str(settings.get("kind", "")))
    if own is not None:
        return own
    try:
        write: Callable[[Tokens], str] = make_task(settings, "task").render
    except ConfigError:

        def write(tokens: Tokens) -> str:
            return " ".join(map(str, tokens.tolist()))

    def text(inputs: Tokens, answer: Tokens | None, label: str) -> Markup:
        shown = write(inputs if answer is None else answer)
        return Markup('<pre class="board" role="img" aria-label="{}">{}</pre>').format(label, shown)

    return text
