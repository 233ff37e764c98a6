"""The solver against plain backtracking written another way, and against known numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_core.tasks.sudoku_solver import BOXES, Geometry, dig, random_boards, solve


def backtrack(board: list[int], size: int, limit: int) -> list[list[int]]:
    """All solutions up to `limit`: first empty cell, digits in turn, conflicts by looking."""
    height, width = BOXES[size]
    if 0 not in board:
        return [list(board)]
    place = board.index(0)
    row, column = divmod(place, size)
    seen = set()
    for other, digit in enumerate(board):
        r, c = divmod(other, size)
        same_box = r // height == row // height and c // width == column // width
        if r == row or c == column or same_box:
            seen.add(digit)
    out: list[list[int]] = []
    for digit in range(1, size + 1):
        if digit not in seen and len(out) < limit:
            board[place] = digit
            out += backtrack(board, size, limit - len(out))
            board[place] = 0
    return out


def consistent(board: list[int], size: int) -> bool:
    """Whether no unit holds a digit twice."""
    for cells in Geometry.of(size).cells_of:
        digits = [board[c] for c in cells if board[c]]
        if len(digits) != len(set(digits)):
            return False
    return True


def test_there_are_288_boards_of_4x4() -> None:
    found = solve(np.zeros((1, 16), np.uint8), 4, limit=10_000)
    assert found.count.tolist() == [288]


@pytest.mark.slow
def test_there_are_28200960_boards_of_6x6() -> None:
    found = solve(np.zeros((1, 36), np.uint8), 6, limit=100_000_000)
    assert found.count.tolist() == [28_200_960]


@given(st.sampled_from([4, 6]), st.data())
@settings(max_examples=150, deadline=None)
def test_agrees_with_backtracking(size: int, data: st.DataObject) -> None:
    cells = size * size
    given_cells = data.draw(st.dictionaries(st.integers(0, cells - 1), st.integers(1, size)))
    board = [given_cells.get(cell, 0) for cell in range(cells)]
    limit = 3
    found = solve(np.array([board], np.uint8), size, limit)
    wanted = backtrack(board, size, limit) if consistent(board, size) else []
    assert found.count[0] == len(wanted)
    if not wanted:
        assert not found.solution.any()
    elif len(wanted) < limit:
        assert found.solution[0].tolist() in wanted


def test_a_known_puzzle_of_9x9() -> None:
    # Wikipedia's example of a Sudoku.
    rows = (
        "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79",
        "534678912672195348198342567859761423426853791713924856961537284287419635345286179",
    )
    question, answer = (
        np.array([[int(c) for c in row.replace(".", "0")]], np.uint8) for row in rows
    )
    found = solve(question, 9)
    assert found.count.tolist() == [1]
    assert (found.solution == answer).all()
    assert found.guesses.tolist() == [0]


def test_several_solutions_are_counted_to_the_limit() -> None:
    board = np.zeros((1, 81), np.uint8)
    assert [int(solve(board, 9, limit).count[0]) for limit in (1, 2, 5)] == [1, 2, 5]


@pytest.mark.parametrize("size", sorted(BOXES))
def test_random_boards_are_complete_and_differ(size: int) -> None:
    boards = random_boards(50, size, np.random.default_rng(0))
    for board in boards.tolist():
        assert 0 not in board
        assert consistent(board, size)
    assert len(np.unique(boards, axis=0)) > 25
    assert (random_boards(50, size, np.random.default_rng(0)) == boards).all()


def test_every_board_of_4x4_can_come() -> None:
    boards = random_boards(6000, 4, np.random.default_rng(1))
    assert len(np.unique(boards, axis=0)) == 288


@pytest.mark.parametrize("size", sorted(BOXES))
def test_a_dug_puzzle_is_unique_and_spares_no_clue(size: int) -> None:
    rng = np.random.default_rng(3)
    (board,) = random_boards(1, size, rng)
    puzzle = dig(board, size, 0, rng)
    assert ((puzzle == 0) | (puzzle == board)).all()
    found = solve(puzzle[None], size)
    assert found.count[0] == 1
    assert (found.solution[0] == board).all()
    for cell in np.flatnonzero(puzzle):
        fewer = puzzle.copy()
        fewer[cell] = 0
        assert solve(fewer[None], size).count[0] == 2


def test_digging_stops_at_the_clues_asked_for() -> None:
    rng = np.random.default_rng(3)
    (board,) = random_boards(1, 9, rng)
    assert np.count_nonzero(dig(board, 9, 40, rng)) == 40
    # More than there are cells: nothing is taken away.
    for clues in (81, 82, 1000):
        assert np.count_nonzero(dig(board, 9, clues, rng)) == 81
