"""Unconditional Sudoku (paper, D.5): an empty board in, any complete board out.

Training rows are complete boards: the answers of a Sudoku source, or random ones. All inputs are
the one empty board; an answer counts where every unit is complete. Tokens are Sudoku's.
"""

from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, UInt8
from torch import Tensor

from gram_core.config import Config
from gram_core.tables import dataset_schema, tokens_array
from gram_core.tasks.base import Fetch, Split, Task, TaskError
from gram_core.tasks.sudoku import BLANK, Files, Generated, Hub, Sudoku, SudokuConfig, board_id
from gram_core.tasks.sudoku_solver import random_boards

# Complete boards of each size (9x9 has 6.67e21, more than a count can hold: 0, unknown).
BOARDS = {4: 288, 6: 28_200_960, 9: 0}
ATTEMPTS = 50  # of the generator, for each board asked for


class SudokuBoardsConfig(Config, frozen=True, kw_only=True, tag="sudoku_boards", tag_field="kind"):
    """Board size, and where complete boards come from: the answers of a Sudoku source, or as many
    different random boards as `source` asks for."""

    size: Literal[4, 6, 9] = 9
    source: Hub | Files | Generated = Generated()

    def __post_init__(self) -> None:
        plain, source = Generated(), self.source
        if isinstance(source, Generated) and (source.clues, source.guesses) != (
            plain.clues,
            plain.guesses,
        ):
            raise ValueError("source: clues and guesses are of puzzles; leave them out for boards")


class SudokuBoards(Task):
    """The unconditional Sudoku task."""

    conditional = False

    def __init__(self, config: SudokuBoardsConfig) -> None:
        self.config: SudokuBoardsConfig = config
        self._sudoku = Sudoku(SudokuConfig(size=config.size, source=config.source))
        self.length = self._sudoku.length
        self.vocab = self._sudoku.vocab

    def generate(self, fetch: Fetch) -> Split:
        """Different complete boards; no test board is a training board. Raises `TaskError`."""
        source = self.config.source
        if isinstance(source, Generated):
            boards = self._random(source)
            train, test = boards[: source.train], boards[source.train :]
        else:
            parts = self._sudoku.read(fetch)
            train, test = (np.unique(answers, axis=0) for _, answers in parts)
            known = {board.tobytes() for board in train}
            test = np.array([board for board in test if board.tobytes() not in known])
            if not len(test):
                raise TaskError("every test board is a training board; use other files")
        metadata = {
            "train_targets": len(train),
            "test_targets": len(test),
            "boards": BOARDS[self.config.size],
        }
        return Split(self._table(train), self._table(test), metadata)

    def _random(self, source: Generated) -> np.ndarray:
        """Different random boards uint8 [train + test, S]. Raises `TaskError`."""
        wanted, size = source.train + source.test, self.config.size
        if BOARDS[size] and wanted > BOARDS[size]:
            raise TaskError(
                f"source: {wanted} boards asked for, there are {BOARDS[size]} of {size}x{size}"
            )
        rng = np.random.default_rng(source.seed)
        found: dict[bytes, None] = {}
        for _ in range(ATTEMPTS * wanted):
            found[random_boards(1, size, rng).tobytes()] = None
            if len(found) == wanted:
                return np.frombuffer(b"".join(found), np.uint8).reshape(wanted, -1)
        raise TaskError(
            f"source: {wanted} boards asked for, {ATTEMPTS * wanted} attempts gave {len(found)} "
            "different ones; ask for fewer"
        )

    def _table(self, boards: np.ndarray) -> pa.Table:
        blank = np.full_like(boards, BLANK)
        ids = [board_id(blank[0] - BLANK)] * len(boards)
        counts = [BOARDS[self.config.size]] * len(boards)
        return pa.table(
            {
                "puzzle_id": ids,
                "inputs": tokens_array(blank),
                "target": tokens_array(boards + BLANK),
                "solution_count": pa.array(counts, pa.uint32()),
                "group_id": [board_id(board) for board in boards],
                "augmentation": [""] * len(boards),
            },
            schema=dataset_schema(self.length, self.length),
        )

    def verify(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> Bool[Tensor, " B"]:
        """Every row, column and box complete."""
        return self._sudoku.verify(inputs, answers)

    def parse(self, text: str) -> np.ndarray:
        """The empty board, or the word `blank`; a board with a digit is refused, for nothing here
        learned to keep it."""
        board = self._sudoku.parse("." * self.length if text.strip() == "blank" else text)
        if (board != BLANK).any():
            raise TaskError("this task makes boards from nothing; give the empty board")
        return board

    def render(self, tokens: np.ndarray) -> str:
        """One line a row; `.` for a blank, `?` for padding."""
        return self._sudoku.render(tokens)
