"""Drawings of grids, graphs and images as inline SVG; chess boards are in `boards`.

Colours are CSS classes of the page. A drawing is a function of tokens and a label alone.
"""

from collections.abc import Iterable
from math import cos, isqrt, pi, sin

import numpy as np
from markupsafe import Markup

from gram_core.tasks import arc, digits, graph_coloring, sudoku
from gram_core.tasks.sudoku_solver import BOXES

Tokens = np.ndarray
CELL = 10


def svg(parts: Iterable[str], width: int, height: int, label: str) -> Markup:
    """The parts as one picture. They hold numbers and names of ours only; the label is escaped."""
    opening = Markup('<svg class="board" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return opening.format(width, height, label) + Markup("".join(parts) + "</svg>")  # noqa: S704


def sudoku_board(inputs: Tokens, answer: Tokens | None, label: str) -> Markup:
    """Digits in their boxes: givens in ink on a tint, placed ones in colour, those that stand
    twice in a unit red."""
    size = isqrt(len(inputs))
    height, width = BOXES[size]
    side = size * CELL
    shown = inputs if answer is None else answer
    grid = np.where(shown > sudoku.BLANK, shown.astype(int) - sudoku.BLANK, 0).reshape(size, size)
    given = (inputs > sudoku.BLANK).reshape(size, size)
    parts = [f'<rect class="sq-light" width="{side}" height="{side}"/>']
    cells = [(r, c) for r in range(size) for c in range(size)]
    parts += [
        f'<rect class="sq-given" x="{c * CELL}" y="{r * CELL}" width="{CELL}" height="{CELL}"/>'
        for r, c in cells
        if given[r, c]
    ]
    for step in range(1, size):
        across = "box-line" if step % height == 0 else "cell-line"
        down = "box-line" if step % width == 0 else "cell-line"
        at = step * CELL
        parts.append(f'<line class="{across}" x1="0" y1="{at}" x2="{side}" y2="{at}"/>')
        parts.append(f'<line class="{down}" x1="{at}" y1="0" x2="{at}" y2="{side}"/>')
    for r, c in cells:
        if not grid[r, c]:
            continue
        top, left = r - r % height, c - c % width
        units = (grid[r], grid[:, c], grid[top : top + height, left : left + width])
        twice = any((unit == grid[r, c]).sum() > 1 for unit in units)
        style = "attacked" if twice else "given" if given[r, c] else "placed"
        x, y = c * CELL + CELL // 2, r * CELL + CELL // 2
        parts.append(f'<text class="digit {style}" x="{x}" y="{y}">{grid[r, c]}</text>')
    return svg(parts, side, side, label)


def graph(inputs: Tokens, answer: Tokens | None, label: str) -> Markup:
    """Vertices on a circle in their colours; edges between two of one colour red."""
    vertices = (1 + isqrt(1 + 8 * len(inputs))) // 2
    places = [
        (50 + 38 * sin(2 * pi * v / vertices), 50 - 38 * cos(2 * pi * v / vertices))
        for v in range(vertices)
    ]
    colours = [0] * vertices
    if answer is not None:
        first = graph_coloring.FIRST_COLOUR
        colours = [max(0, int(token) - first + 1) for token in answer[:vertices]]
    parts = ['<rect class="sq-light" width="100" height="100"/>']
    edges = zip(*np.triu_indices(vertices, 1), inputs, strict=True)
    for i, j, token in edges:
        if token != graph_coloring.EDGE:
            continue
        clash = answer is not None and colours[i] == colours[j]
        ends = " ".join(
            f'{name}="{value:.1f}"'
            for name, value in zip(("x1", "y1", "x2", "y2"), places[i] + places[j], strict=True)
        )
        parts.append(f'<line class="{"clash" if clash else "edge"}" {ends}/>')
    for (x, y), colour in zip(places, colours, strict=True):
        parts.append(f'<circle class="vertex colour-{colour}" cx="{x:.1f}" cy="{y:.1f}" r="7"/>')
    return svg(parts, 100, 100, label)


def _cells(mask: np.ndarray) -> str:
    return "".join(f"M{c} {r}h1v1h-1z" for r, c in np.argwhere(mask))


def image(inputs: Tokens, answer: Tokens | None, label: str) -> Markup:
    """A binary image: white pixels in ink."""
    shown = inputs if answer is None else answer
    side = isqrt(len(shown))
    pixels = shown.reshape(side, side) == digits.WHITE
    parts = [f'<rect class="pixel-off" width="{side}" height="{side}"/>']
    parts.append(f'<path class="pixel-on" d="{_cells(pixels)}"/>')
    return svg(parts, side, side, label)


def arc_grid(inputs: Tokens, answer: Tokens | None, label: str) -> Markup:
    """An ARC grid in the usual ten colours; a cross where the answer is no grid."""
    grid = arc.decode(inputs if answer is None else answer)
    if not grid.size:
        return svg(['<path class="attack" d="M1 1L9 9M9 1L1 9"/>'], CELL, CELL, label)
    parts = [
        f'<path class="arc-{colour}" d="{_cells(grid == colour)}"/>'
        for colour in np.unique(grid).tolist()
    ]
    return svg(parts, grid.shape[1], grid.shape[0], label)
