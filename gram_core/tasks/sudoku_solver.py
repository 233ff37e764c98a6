"""An exact solver of Sudoku by bit masks, compiled by numba: counts solutions, proves uniqueness,
fills random boards and takes clues away.

A node of the search fixes a cell that has one candidate left or a digit that has one place left in
a unit; where there is neither it guesses on the cell with the fewest candidates. A digit d is the
bit 1 << (d - 1), 0 an empty cell.

Shapes: n the board's size (4, 6, 9), S = n * n cells, row-major; N boards.
"""

from dataclasses import dataclass

import numba
import numpy as np

# Height and width of a box for each size of board.
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


@dataclass(frozen=True)
class Geometry:
    """Rows, columns and boxes of a board: for each cell its units, for each unit its cells."""

    size: int
    unit_of: np.ndarray  # int64 [S, 3]
    cells_of: np.ndarray  # int64 [3 n, n]

    @classmethod
    def of(cls, size: int) -> "Geometry":
        """The geometry of a size in `BOXES`."""
        height, width = BOXES[size]
        row, column = np.divmod(np.arange(size * size), size)
        box = row // height * (size // width) + column // width
        unit_of = np.stack([row, size + column, 2 * size + box], axis=1)
        cells_of = np.stack([np.flatnonzero((unit_of == u).any(1)) for u in range(3 * size)])
        return cls(size, unit_of, cells_of)


@dataclass(frozen=True)
class Solved:
    """What the search found for N boards; `guesses` counts its branches until it stopped."""

    count: np.ndarray  # int64 [N]: solutions, at most the limit
    guesses: np.ndarray  # int64 [N]
    solution: np.ndarray  # uint8 [N, S]: the first solution, 0 where there is none


def solve(boards: np.ndarray, size: int, limit: int = 2) -> Solved:
    """Search each board (uint8 [N, S], 0 empty) until `limit` solutions are found."""
    geometry = Geometry.of(size)
    order = np.tile(np.arange(size, dtype=np.int64), (size * size, 1))
    return Solved(*_solve_all(boards, geometry.unit_of, geometry.cells_of, order, limit))


def random_boards(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Complete boards uint8 [N, S]: the first that the search meets when it tries the digits of
    every cell in random order, relabelled. Every board can come, not all equally often."""
    geometry = Geometry.of(size)
    cells = size * size
    boards = np.zeros((count, cells), dtype=np.uint8)
    empty = np.zeros((1, cells), dtype=np.uint8)
    for number in range(count):
        order = rng.permuted(np.tile(np.arange(size), (cells, 1)), axis=1)
        _, _, found = _solve_all(empty, geometry.unit_of, geometry.cells_of, order, 1)
        boards[number] = (rng.permutation(size) + 1)[found[0] - 1]
    return boards


def dig(board: np.ndarray, size: int, clues: int, rng: np.random.Generator) -> np.ndarray:
    """A puzzle with `board` as its one solution: clues are taken away in random order while the
    solution stays unique and more than `clues` are left. With `clues` 0 no clue can be spared."""
    geometry = Geometry.of(size)
    order = np.tile(np.arange(size, dtype=np.int64), (size * size, 1))
    cells = rng.permutation(size * size)
    puzzle: np.ndarray = _dig(board, cells, clues, geometry.unit_of, geometry.cells_of, order)
    return puzzle


@numba.njit(cache=True)
def _search(board, unit_of, cells_of, order, limit, solution):  # type: ignore[no-untyped-def]
    """Depth-first search of one board; returns (solutions found, guesses)."""
    cells, size = unit_of.shape[0], cells_of.shape[1]
    full = (1 << size) - 1
    used = np.zeros(3 * size, dtype=np.int64)  # digits in each unit
    value = np.zeros(cells, dtype=np.int64)  # bit of each cell, 0 empty
    left = cells
    for cell in range(cells):
        if board[cell]:
            bit = 1 << (board[cell] - 1)
            for k in range(3):
                if used[unit_of[cell, k]] & bit:
                    return 0, 0
                used[unit_of[cell, k]] |= bit
            value[cell] = bit
            left -= 1
    trail = np.empty(cells, dtype=np.int64)  # cells in the order they were filled
    filled = 0
    # Of each open guess: how much was filled before it, its cell, the candidates still to try.
    mark = np.empty(cells, dtype=np.int64)
    guess = np.empty(cells, dtype=np.int64)
    rest = np.empty(cells, dtype=np.int64)
    depth, found, guesses = 0, 0, 0
    while True:
        dead, cell, bit = False, -1, 0
        if left == 0:
            if found == 0:
                for i in range(cells):
                    digit, word = 1, value[i]
                    while word > 1:
                        word >>= 1
                        digit += 1
                    solution[i] = digit
            found += 1
            if found == limit:
                return found, guesses
            dead = True
        else:
            best, fewest, options = -1, size + 1, 0
            for i in range(cells):
                if value[i]:
                    continue
                free = full & ~(used[unit_of[i, 0]] | used[unit_of[i, 1]] | used[unit_of[i, 2]])
                count, word = 0, free
                while word:
                    word &= word - 1
                    count += 1
                if count < fewest:
                    best, fewest, options = i, count, free
                    if count <= 1:
                        break
            if fewest == 0:
                dead = True
            elif fewest == 1:
                cell, bit = best, options
            else:
                for u in range(3 * size):
                    once, twice = 0, 0
                    for j in range(size):
                        i = cells_of[u, j]
                        if value[i] == 0:
                            free = full & ~(
                                used[unit_of[i, 0]] | used[unit_of[i, 1]] | used[unit_of[i, 2]]
                            )
                            twice |= once & free
                            once |= free
                    if once | used[u] != full:
                        dead = True
                        break
                    single = once & ~twice
                    if single:
                        bit = single & -single
                        for j in range(size):
                            i = cells_of[u, j]
                            if value[i] == 0 and bit & ~(
                                used[unit_of[i, 0]] | used[unit_of[i, 1]] | used[unit_of[i, 2]]
                            ):
                                cell = i
                        break
                if not dead and cell < 0:
                    mark[depth], guess[depth], rest[depth] = filled, best, options
                    depth += 1
                    guesses += 1
        if dead:
            # Back to the last guess that has a candidate left.
            while depth and rest[depth - 1] == 0:
                depth -= 1
            if depth == 0:
                return found, guesses
        if dead or cell < 0:
            while filled > mark[depth - 1]:
                filled -= 1
                i = trail[filled]
                for k in range(3):
                    used[unit_of[i, k]] &= ~value[i]
                value[i] = 0
                left += 1
            cell = guess[depth - 1]
            for k in range(size):
                bit = 1 << order[cell, k]
                if rest[depth - 1] & bit:
                    break
            rest[depth - 1] &= ~bit
        value[cell] = bit
        for k in range(3):
            used[unit_of[cell, k]] |= bit
        trail[filled] = cell
        filled += 1
        left -= 1


@numba.njit(cache=True)
def _solve_all(boards, unit_of, cells_of, order, limit):  # type: ignore[no-untyped-def]
    number = boards.shape[0]
    count = np.zeros(number, dtype=np.int64)
    guesses = np.zeros(number, dtype=np.int64)
    solution = np.zeros(boards.shape, dtype=np.uint8)
    for i in range(number):
        count[i], guesses[i] = _search(boards[i], unit_of, cells_of, order, limit, solution[i])
    return count, guesses, solution


@numba.njit(cache=True)
def _dig(board, cells, clues, unit_of, cells_of, order):  # type: ignore[no-untyped-def]
    puzzle = board.copy()
    scratch = np.zeros(len(board), dtype=np.uint8)
    left = len(board)
    for cell in cells:
        if left <= clues:
            break
        puzzle[cell] = 0
        if _search(puzzle, unit_of, cells_of, order, 2, scratch)[0] == 1:
            left -= 1
        else:
            puzzle[cell] = board[cell]
    return puzzle
