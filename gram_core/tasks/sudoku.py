"""Sudoku (paper, 4.1 and B.2): complete a board that has one solution.

Puzzles come from the Hub's Sudoku-Extreme, from files of the same columns, or are generated; every
one is solved, and one with no or several solutions is refused by name. Tokens: 0 padding, 1 blank,
digit d is d + 1. Boards of 4x4 and 6x6 (boxes of 2x2 and 2x3) go through the same code.

A variant of a training row is its image under a random symmetry, as in HRM and TRM: digits
relabelled, rows permuted within bands and columns within stacks, bands and stacks permuted, and
transposed where boxes are square.

Shapes: N puzzles, n the board's size, S = n * n cells, row-major; digits 1..n, 0 for a blank.
"""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from gram_core.config import Config, NonNegativeInt, PositiveInt, Seed
from gram_core.tables import dataset_schema, tokens_array
from gram_core.tasks.base import Fetch, Split, Task, TaskError
from gram_core.tasks.batches import Member
from gram_core.tasks.sudoku_solver import BOXES, Geometry, dig, random_boards, solve

BLANK = 1
COLUMNS = ("question", "answer")
Boards = tuple[np.ndarray, np.ndarray]  # puzzles and answers, uint8 [N, S] each
ATTEMPTS = 50  # of the generator, for each puzzle asked for


class Hub(Config, frozen=True, kw_only=True, tag="hub", tag_field="kind"):
    """A dataset repository of the Hub with train.csv and test.csv. `train` and `test` puzzles are
    drawn from them at random; without a number all are read."""

    repo: str = "sapientinc/sudoku-extreme"
    revision: str = "main"
    train: PositiveInt | None = 1000
    test: PositiveInt | None = None
    seed: Seed = 0

    def paths(self) -> dict[str, str]:
        """Where each part lies."""
        root = f"hf://datasets/{self.repo}@{self.revision}"
        return {part: f"{root}/{part}.csv" for part in ("train", "test")}


class Files(Config, frozen=True, kw_only=True, tag="files", tag_field="kind"):
    """CSV (gzip or not) or Parquet files, here or on s3://, with the columns question and answer.
    `train` and `test` puzzles are drawn from them at random; without a number all are read."""

    train_path: str
    test_path: str
    train: PositiveInt | None = None
    test: PositiveInt | None = None
    seed: Seed = 0

    def paths(self) -> dict[str, str]:
        """Where each part lies."""
        return {"train": self.train_path, "test": self.test_path}


class Generated(Config, frozen=True, kw_only=True, tag="generate", tag_field="kind"):
    """Puzzles made here: clues leave a random board while its solution stays unique and more than
    `clues` are left (0: until none can be spared). Kept are those that cost our solver between
    `guesses[0]` and `guesses[1]` guesses."""

    train: PositiveInt = 1000
    test: PositiveInt = 200
    clues: NonNegativeInt = 0
    guesses: tuple[NonNegativeInt, NonNegativeInt] = (0, 1_000_000)
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.guesses[0] > self.guesses[1]:
            raise ValueError(f"guesses {list(self.guesses)}: the first is above the second")


class SudokuConfig(Config, frozen=True, kw_only=True, tag="sudoku", tag_field="kind"):
    """Board size, where puzzles come from, and the symmetric images of each training puzzle that
    training draws beside the puzzle itself (the paper: 1000)."""

    size: Literal[4, 6, 9] = 9
    source: Hub | Files | Generated = Generated()
    augmentations: NonNegativeInt = 0

    def __post_init__(self) -> None:
        cells = self.size**2
        if isinstance(self.source, Generated) and self.source.clues >= cells:
            raise ValueError(
                f"source.clues {self.source.clues} leaves no cell of {cells} blank; use fewer"
            )


@dataclass(frozen=True)
class Symmetry:
    """A map of boards to boards that keeps the rules: `cells` says where each cell's content comes
    from, `digits` what each digit becomes (`digits[0]` is 0)."""

    cells: np.ndarray  # int64 [S]
    digits: np.ndarray  # int64 [n + 1]

    def __call__(self, boards: np.ndarray) -> np.ndarray:
        """The images of boards [..., S] of digits."""
        image: np.ndarray = self.digits[boards[..., self.cells]].astype(np.uint8)
        return image

    def after(self, first: "Symmetry") -> "Symmetry":
        """This symmetry applied to the images of another."""
        return Symmetry(first.cells[self.cells], self.digits[first.digits])

    @property
    def inverse(self) -> "Symmetry":
        """The symmetry that undoes this one."""
        return Symmetry(np.argsort(self.cells), np.argsort(self.digits))


def random_symmetry(size: int, rng: np.random.Generator) -> Symmetry:
    """A symmetry drawn uniformly."""
    height, width = BOXES[size]

    def lines(block: int) -> np.ndarray:
        blocks = np.arange(size).reshape(-1, block)
        mixed: np.ndarray = rng.permuted(blocks, axis=1)[rng.permutation(len(blocks))].reshape(-1)
        return mixed

    cells = lines(height)[:, None] * size + lines(width)
    if height == width and rng.random() < 0.5:
        cells = cells.T
    digits = np.concatenate([[0], rng.permutation(size) + 1])
    return Symmetry(cells.reshape(-1), digits)


def invariant(puzzles: np.ndarray, size: int) -> np.ndarray:
    """A uint64 for each puzzle [N, S] that no symmetry changes: colour refinement over cells,
    lines, boxes, bands, stacks and digits. Equivalent puzzles share it; others seldom do."""
    geometry = Geometry.of(size)
    height, width = BOXES[size]
    count = len(puzzles)
    with np.errstate(over="ignore"):
        colour = _mix((puzzles > 0).astype(np.uint64) + np.uint64(1))
        for _ in range(4):
            lines = _mix(colour[:, geometry.cells_of].sum(-1, dtype=np.uint64))
            digit = np.zeros((count, size + 1), dtype=np.uint64)
            np.add.at(digit, (np.arange(count)[:, None], puzzles), colour)
            digit = _mix(digit ^ np.uint64(0xD161))
            rows, columns, boxes = np.split(lines, 3, axis=1)
            bands = _mix(rows.reshape(count, -1, height).sum(-1, dtype=np.uint64))
            stacks = _mix(columns.reshape(count, -1, width).sum(-1, dtype=np.uint64))
            across = _mix(rows + bands.repeat(height, axis=1))
            along = _mix(columns + stacks.repeat(width, axis=1))
            if height != width:
                along = _mix(along ^ np.uint64(0xA107))
            row, column, box = (geometry.unit_of[:, k] - k * size for k in range(3))
            seen = np.take_along_axis(digit, puzzles.astype(np.int64), axis=1)
            seen = np.where(puzzles > 0, seen, np.uint64(0))
            near = across[:, row] + along[:, column] + _mix(boxes ^ np.uint64(0xB0C5))[:, box]
            colour = _mix(colour + _mix(near) + _mix(seen))
        whole: np.ndarray = _mix(colour.sum(1, dtype=np.uint64))
    return whole


def _mix(words: np.ndarray) -> np.ndarray:
    """A well-mixed function of uint64 words (the finaliser of splitmix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed


def read_puzzles(path: Path, name: str, size: int, count: int | None, seed: int) -> Boards:
    """Puzzles and answers, uint8 [N, S], of a CSV or Parquet file; `count` of them at random.

    `name` is the source in the user's spelling. Raises `TaskError` that names the row (the first
    is 1) for a damaged file, a missing column, a board that is none, an answer that is not the
    puzzle's, and a puzzle with no or several solutions.
    """
    try:
        if ".parquet" in path.suffixes:
            rows = pl.read_parquet(path, glob=False)
        else:
            rows = pl.read_csv(path, infer_schema=False, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TaskError(f"{name}: not a readable table ({reason[:120]})") from None
    for column in COLUMNS:
        if column not in rows.columns:
            raise TaskError(
                f"{name}: column {column!r} is missing; there are {', '.join(rows.columns)}"
            )
        if rows[column].dtype != pl.String:
            raise TaskError(f"{name}: column {column!r} is {rows[column].dtype}, expected text")
    if rows.is_empty():
        raise TaskError(f"{name}: the table has no rows")
    if count is not None and count > len(rows):
        raise TaskError(f"{name}: {count} puzzles asked for, the table has {len(rows)}")
    chosen = np.arange(len(rows))
    if count is not None:
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))
    rows = rows[chosen]
    puzzles, answers = (_boards(rows[c], chosen, size, f"{name}: {c}") for c in COLUMNS)
    solved = solve(puzzles, size)
    for wrong, problem in (
        (solved.count == 0, "has no solution"),
        (solved.count > 1, "has several solutions, a puzzle must have one"),
        ((solved.solution != answers).any(1), "has another solution than its answer"),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            board = rows["question"][row]
            raise TaskError(f"{name}: puzzle of row {chosen[row] + 1} {problem}: {board}")
    return puzzles, answers


def _boards(column: pl.Series, rows: np.ndarray, size: int, name: str) -> np.ndarray:
    """Text boards as digits uint8 [N, S]."""
    cells = size * size
    lengths = column.str.len_bytes().fill_null(0).to_numpy()
    if (lengths != cells).any():
        row = int((lengths != cells).argmax())
        raise TaskError(
            f"{name} of row {rows[row] + 1} has {lengths[row]} characters, expected {cells}"
        )
    signs = np.frombuffer(column.str.join("").item().encode(), np.uint8).reshape(-1, cells)
    digits = np.where(signs == ord("."), ord("0"), signs) - ord("0")
    bad = (digits > size).any(1)
    if bad.any():
        row = int(bad.argmax())
        sign = chr(signs[row][digits[row] > size][0])
        raise TaskError(
            f"{name} of row {rows[row] + 1} has {sign!r}; use 1-{size}, and '.' or 0 for a blank"
        )
    return digits.astype(np.uint8)


def generate_puzzles(config: Generated, size: int) -> Boards:
    """Distinct puzzles with their answers, uint8 [train + test, S]. Raises `TaskError` where too
    few turn up."""
    rng = np.random.default_rng(config.seed)
    wanted = config.train + config.test
    found: dict[bytes, np.ndarray] = {}
    for _ in range(ATTEMPTS * wanted):
        (board,) = random_boards(1, size, rng)
        puzzle = dig(board, size, config.clues, rng)
        guesses = solve(puzzle[None], size).guesses[0]
        if config.guesses[0] <= guesses <= config.guesses[1]:
            found.setdefault(puzzle.tobytes(), board)
        if len(found) == wanted:
            break
    else:
        raise TaskError(
            f"source: {wanted} puzzles asked for, but {ATTEMPTS * wanted} attempts gave "
            f"{len(found)} different ones; ask for fewer, or widen clues and guesses"
        )
    puzzles = np.frombuffer(b"".join(found), np.uint8).reshape(wanted, -1)
    return puzzles, np.stack(list(found.values()))


def board_id(board: np.ndarray) -> str:
    """The board's name: its cells, `.` for a blank."""
    return "".join(".123456789"[digit] for digit in board)


class Sudoku(Task):
    """The Sudoku task."""

    def __init__(self, config: SudokuConfig) -> None:
        self.config: SudokuConfig = config
        self.length = config.size**2
        self.vocab = config.size + 2
        self.variants = 1 + config.augmentations
        self._cells_of = torch.from_numpy(Geometry.of(config.size).cells_of)

    def generate(self, fetch: Fetch) -> Split:
        """Puzzles of the source with their solutions. Raises `TaskError`."""
        size = self.config.size
        train, test = self.read(fetch)
        known = {puzzle.tobytes() for puzzle in train[0]}
        for number, puzzle in enumerate(test[0], 1):
            if puzzle.tobytes() in known:
                raise TaskError(
                    f"test puzzle {number} is a training puzzle too: {board_id(puzzle)}"
                )
        alike = np.isin(invariant(test[0], size), invariant(train[0], size))
        metadata = {
            "train_inputs": len(train[0]),
            "test_inputs": len(test[0]),
            "train_mean_clues": float((train[0] > 0).sum(1).mean()),
            "test_mean_clues": float((test[0] > 0).sum(1).mean()),
            "train_mean_guesses": float(solve(train[0], size).guesses.mean()),
            "test_mean_guesses": float(solve(test[0], size).guesses.mean()),
            "test_inputs_with_twin_in_train": int(alike.sum()),
        }
        return Split(self._table(*train), self._table(*test), metadata)

    def read(self, fetch: Fetch) -> tuple[Boards, Boards]:
        """Puzzles and answers of the training and of the test part. Raises `TaskError`."""
        source, size = self.config.source, self.config.size
        if isinstance(source, Generated):
            puzzles, answers = generate_puzzles(source, size)
            cut = source.train
            return (puzzles[:cut], answers[:cut]), (puzzles[cut:], answers[cut:])
        wanted = {"train": source.train, "test": source.test}
        train, test = (
            read_puzzles(fetch(path), path, size, wanted[part], source.seed)
            for part, path in source.paths().items()
        )
        return train, test

    def _table(self, puzzles: np.ndarray, answers: np.ndarray) -> pa.Table:
        ids = [board_id(puzzle) for puzzle in puzzles]
        return pa.table(
            {
                "puzzle_id": ids,
                "inputs": tokens_array(puzzles + BLANK),
                "target": tokens_array(answers + BLANK),
                "solution_count": pa.array([1] * len(ids), pa.uint32()),
                "group_id": ids,
                "augmentation": [""] * len(ids),
            },
            schema=dataset_schema(self.length, self.length),
        )

    def vary(
        self, row: Member, inputs: np.ndarray, target: np.ndarray, variant: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The row under the symmetry that its puzzle (the group) and the variant's number draw."""
        digest = blake2b(row.group.encode() + variant.to_bytes(8), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))
        symmetry = random_symmetry(self.config.size, rng)
        return symmetry(inputs - BLANK) + BLANK, symmetry(target - BLANK) + BLANK

    def verify(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> Bool[Tensor, " B"]:
        """Every given kept, every row, column and box complete."""
        size = self.config.size
        digits = (answers > BLANK) & (answers <= BLANK + size)
        # n powers of two add up to 2^n - 1 only when each is there once.
        bits = torch.where(digits, 1 << (answers.int() - BLANK - 1).clamp(min=0), 0)
        sums = bits[:, self._cells_of.to(answers.device)].sum(-1)
        kept = ((inputs <= BLANK) | (answers == inputs)).all(-1)
        return (sums == (1 << size) - 1).all(-1) & kept

    def parse(self, text: str) -> np.ndarray:
        """Cells in one line or rows divided by `|`, `/` or line breaks; `.` or 0 for a blank,
        uint8 [S]. Boards that break a rule are accepted: that is for the search to find."""
        size = self.config.size
        cells = "".join(text.replace("|", " ").replace("/", " ").split())
        if len(cells) != self.length:
            raise TaskError(f"board has {len(cells)} cells, expected {self.length}")
        allowed = ".0" + "".join(str(d) for d in range(1, size + 1))
        for place, cell in enumerate(cells):
            if cell not in allowed:
                row, column = divmod(place, size)
                raise TaskError(
                    f"row {row + 1}, column {column + 1} has {cell!r}; use 1-{size}, and . or 0 "
                    "for a blank"
                )
        digits = [0 if cell == "." else int(cell) for cell in cells]
        return np.array(digits, dtype=np.uint8) + np.uint8(BLANK)

    def render(self, tokens: np.ndarray) -> str:
        """One line a row; `.` for a blank, `?` for padding."""
        signs = np.array(list("?.123456789"))[np.asarray(tokens)]
        return "\n".join("".join(row) for row in signs.reshape(-1, self.config.size))
