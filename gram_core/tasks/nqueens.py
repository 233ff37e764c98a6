"""N-Queens completion (paper, C.2.1): complete a board from which some queens were removed.

Every solution of the board is enumerated, every subset of the allowed size removed, so that all
completions of every input are known. Tokens: 0 padding, 1 empty, 2 queen.

A board is held as its placement, the queen's column in each row (-1: none), and named by it:
`2.....4.` has queens in the first row, third column, and in the seventh row, fifth column.

Shapes: N boards, n the board's size, S = n * n cells, row-major.
"""

from itertools import combinations
from math import comb
from typing import Annotated, Literal

import msgspec
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from gram_core.config import Config, Fraction, Seed
from gram_core.tables import dataset_schema, tokens_array, tokens_numpy
from gram_core.tasks.base import Fetch, Split, Task, TaskError, check_rows

EMPTY, QUEEN = 1, 2
DIGITS = "0123456789abcde"


class SplitConfig(Config, frozen=True, kw_only=True):
    """How inputs are held out: each input by itself as in the paper, or whole symmetry orbits."""

    by: Literal["input", "orbit"] = "input"
    test: Fraction = 0.15
    seed: Seed = 0


class NQueensConfig(Config, frozen=True, kw_only=True, tag="nqueens", tag_field="kind"):
    """Board size, the numbers of queens to remove, the split, and augmentation."""

    # Boards above 15 have millions of solutions; enumerating their completions is out of reach.
    size: Annotated[int, msgspec.Meta(ge=4, le=15)] = 8
    remove: tuple[int, ...] = (5, 6, 7)
    split: SplitConfig = SplitConfig()
    augment: Literal["none", "dihedral"] = "none"

    def __post_init__(self) -> None:
        if not self.remove:
            raise ValueError("remove: name at least one number of queens to remove")
        for k in self.remove:
            if not 1 <= k < self.size:
                raise ValueError(
                    f"remove: {k} queens of {self.size}; a board must lose at least 1 and keep "
                    f"at least 1, so use 1..{self.size - 1}"
                )
        if len(set(self.remove)) < len(self.remove):
            raise ValueError(f"remove: {list(self.remove)} names a number twice")


def solutions(n: int) -> np.ndarray:
    """All solutions, int8 [count, n], in lexicographic order.

    Grown row by row over all partial boards at once; attacked columns and diagonals are bits.
    """
    boards = np.zeros((1, 0), dtype=np.int8)
    columns = down = up = np.zeros(1, dtype=np.int64)
    for _ in range(n):
        free = ~(columns | down | up)
        parent, column = np.nonzero(free[:, None] & (1 << np.arange(n)))
        bit = 1 << column
        boards = np.concatenate([boards[parent], column[:, None].astype(np.int8)], axis=1)
        columns = columns[parent] | bit
        down, up = (down[parent] | bit) << 1, (up[parent] | bit) >> 1
    return boards


def completions(n: int, remove: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of a partial board and one of its completions, two int8 arrays [N, n]. Raises
    `TaskError` where they are more than this machine's memory."""
    full = solutions(n)
    pairs = len(full) * sum(comb(n, k) for k in remove)
    check_rows(pairs, n * n, "ask for a smaller size, or remove other numbers of queens")
    partial = []
    for k in sorted(remove):
        for removed in combinations(range(n), k):
            board = full.copy()
            board[:, removed] = -1
            partial.append(board)
    return np.concatenate(partial), np.tile(full, (len(partial), 1))


def board_key(boards: np.ndarray) -> np.ndarray:
    """One int64 a board, equal for equal boards: its placement as digits of base n + 1."""
    n = boards.shape[1]
    key = np.zeros(len(boards), dtype=np.int64)
    for column in boards.T:
        key *= n + 1
        key += column
        key += 1
    return key


def symmetries(boards: np.ndarray) -> np.ndarray:
    """The boards under the eight symmetries of the square, [8, N, n]; the first is the identity.

    Numbers 0-3 turn by that many quarters, 4-7 transpose first.
    """

    def transpose(placement: np.ndarray) -> np.ndarray:
        out = np.full_like(placement, -1)
        board, row = np.nonzero(placement >= 0)
        out[board, placement[board, row]] = row
        return out

    def flip(placement: np.ndarray) -> np.ndarray:
        return np.where(placement >= 0, boards.shape[1] - 1 - placement, -1)

    images = []
    for start in (boards, transpose(boards)):
        turned = start
        for _ in range(4):
            images.append(turned)
            turned = flip(transpose(turned))
    return np.stack(images)


def orbit_key(boards: np.ndarray) -> np.ndarray:
    """One int64 a board, equal for boards that a symmetry of the square maps to each other."""
    n = boards.shape[1]
    row, column = np.divmod(np.arange(n * n), n)
    single = np.full((n * n, n), -1)
    single[np.arange(n * n), row] = column
    # A board's key is the sum of its queens' keys, and so is that of its image.
    parts = np.stack([board_key(image) for image in symmetries(single)]).reshape(-1, n, n)
    parts = np.pad(parts, ((0, 0), (0, 0), (1, 0)))  # a row without a queen adds nothing
    places = np.ascontiguousarray(boards.T) + 1
    keys: np.ndarray = np.full(len(boards), np.iinfo(np.int64).max)
    for part in parts:
        image = part[0][places[0]]
        for r in range(1, n):
            image += part[r][places[r]]
        np.minimum(keys, image, out=keys)
    return keys


def board_names(boards: np.ndarray) -> pa.StringArray:
    """The boards' names: a digit a row, `.` for a row without a queen."""
    count, n = boards.shape
    letters = np.frombuffer(f".{DIGITS}".encode(), dtype=np.uint8)[boards + 1]
    offsets = np.arange(0, count * n + 1, n, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(letters))


def to_tokens(boards: np.ndarray) -> np.ndarray:
    """Placements [N, n] as cell tokens uint8 [N, S]."""
    count, n = boards.shape
    rows = np.full((n + 1, n), EMPTY, dtype=np.uint8)
    rows[np.arange(1, n + 1), np.arange(n)] = QUEEN
    # Not rows[boards + 1], which takes nine times as long.
    return np.take(rows, boards + 1, axis=0).reshape(count, n * n)


def to_placement(tokens: np.ndarray, n: int) -> np.ndarray:
    """Cell tokens [N, S] of boards with at most one queen a row as placements [N, n]."""
    queens = tokens.reshape(-1, n, n) == QUEEN
    return np.where(queens.any(-1), queens.argmax(-1), -1).astype(np.int64)


def attack_lines(n: int) -> np.ndarray:
    """Rows, columns and both diagonals as a 0/1 matrix float32 [S, lines]."""
    row, column = np.divmod(np.arange(n * n), n)
    groups = (row, column, row + column, row - column + n - 1)
    return np.concatenate([(g[:, None] == np.unique(g)).astype(np.float32) for g in groups], axis=1)


class NQueens(Task):
    """The N-Queens completion task."""

    vocab = 3

    def __init__(self, config: NQueensConfig) -> None:
        self.config: NQueensConfig = config
        self.length = config.size**2
        self._lines = torch.from_numpy(attack_lines(config.size))

    def generate(self, fetch: Fetch) -> Split:
        """All completions, split by unique input or by symmetry orbit. Raises `TaskError` where
        the test share leaves one side empty."""
        config = self.config
        partial, full = completions(config.size, config.remove)
        keys, first, inverse, counts = np.unique(
            board_key(partial), return_index=True, return_inverse=True, return_counts=True
        )
        inputs = partial[first]
        orbits = orbit_key(inputs)
        held_out = self._hold_out(keys, orbits)
        if held_out.all() or not held_out.any():
            side = "training" if held_out.all() else "test"
            raise TaskError(
                f"split.test {config.split.test} of {len(keys)} inputs leaves the {side} set "
                "empty; use a share strictly between 0 and 1 that leaves both sides an input"
            )
        order = np.argsort(inverse, kind="stable")
        columns = {
            "inputs": partial[order],
            "target": full[order],
            "solution_count": counts[inverse][order],
        }
        test_rows = held_out[inverse][order]
        train_orbits = np.unique(orbits[~held_out])
        metadata = {
            "inputs": len(keys),
            "pairs": len(partial),
            "train_inputs": int((~held_out).sum()),
            "train_pairs": int((~test_rows).sum()),
            "test_inputs": int(held_out.sum()),
            "test_pairs": int(test_rows.sum()),
            "orbits": len(np.unique(orbits)),
            "test_inputs_with_twin_in_train": int(np.isin(orbits[held_out], train_orbits).sum()),
            "test_single_solution_inputs": int((counts[held_out] == 1).sum()),
            "max_solutions": int(counts.max()),
        }
        return Split(self._table(columns, ~test_rows), self._table(columns, test_rows), metadata)

    def _hold_out(self, keys: np.ndarray, orbits: np.ndarray) -> np.ndarray:
        """Which inputs are test inputs, bool [inputs]."""
        split = self.config.split
        rng = np.random.default_rng(split.seed)
        # The paper's counts (4375 and 773 of 5148) round the training side down.
        quota = len(keys) - int(len(keys) * (1 - split.test) + 1e-9)
        held_out = np.zeros(len(keys), dtype=bool)
        if split.by == "input":
            held_out[rng.permutation(len(keys))[:quota]] = True
            return held_out
        labels, member = np.unique(orbits, return_inverse=True)
        order = rng.permutation(len(labels))
        sizes = np.bincount(member)[order]
        chosen = order[np.cumsum(sizes) <= quota]
        return np.isin(member, chosen)

    def _table(self, columns: dict[str, np.ndarray], rows: np.ndarray) -> pa.Table:
        """Placements and their number of solutions as rows of a dataset."""
        inputs = columns["inputs"][rows]
        ids = board_names(inputs)
        return pa.table(
            {
                "puzzle_id": ids,
                "inputs": tokens_array(to_tokens(inputs)),
                "target": tokens_array(to_tokens(columns["target"][rows])),
                "solution_count": pa.array(columns["solution_count"][rows], pa.uint32()),
                "group_id": ids,
                "augmentation": pa.array([""] * len(ids)),
            },
            schema=dataset_schema(self.length, self.length),
        )

    def augment(self, train: pa.Table, test: pa.Table) -> Split:
        """Training rows under the square's symmetries. Images whose input is a test input are
        dropped, and so are pairs that are there already: the full enumeration is closed under
        the symmetries, so on it this only confirms that nothing new can be made."""
        if self.config.augment == "none":
            return Split(train, test)
        n = self.config.size
        partial = to_placement(tokens_numpy(train["inputs"]), n)
        full = to_placement(tokens_numpy(train["target"]), n)
        test_keys = np.unique(board_key(to_placement(tokens_numpy(test["inputs"]), n)))
        tables = [train]
        seen = set(zip(board_key(partial).tolist(), board_key(full).tolist(), strict=True))
        dropped_test = dropped_double = 0
        images = zip(symmetries(partial), symmetries(full), strict=True)
        for number, (image, answer) in list(enumerate(images))[1:]:
            keys, answers = board_key(image), board_key(answer)
            leaks = np.isin(keys, test_keys)
            fresh = np.zeros(len(keys), dtype=bool)
            for row in np.flatnonzero(~leaks):
                pair = (int(keys[row]), int(answers[row]))
                fresh[row] = pair not in seen
                seen.add(pair)
            dropped_test += int(leaks.sum())
            dropped_double += int((~leaks & ~fresh).sum())
            columns = {
                "inputs": image,
                "target": answer,
                "solution_count": train["solution_count"].to_numpy(),
            }
            made = self._table(columns, fresh)
            made = made.set_column(4, "group_id", train["group_id"].filter(pa.array(fresh)))
            names = pa.array([f"dihedral:{number}"] * len(made))
            tables.append(made.set_column(5, "augmentation", names))
        augmented = pa.concat_tables([t.cast(tables[0].schema) for t in tables])
        counts = {
            "augmented_pairs": len(augmented) - len(train),
            "dropped_equal_to_test": dropped_test,
            "dropped_doubles": dropped_double,
        }
        return Split(augmented, test, counts)

    def verify(
        self, inputs: UInt8[Tensor, "B S"], answers: UInt8[Tensor, "B S"]
    ) -> Bool[Tensor, " B"]:
        """n queens, no two on a line, every given queen kept, every cell queen or empty."""
        queens = answers == QUEEN
        # Counts up to n are exact in float32, which every device multiplies fast.
        lines = queens.float() @ self._lines.to(answers.device)
        peaceful = (lines <= 1).all(-1) & (queens.sum(-1) == self.config.size)
        kept = (queens | (inputs != QUEEN)).all(-1)
        return peaceful & kept & (queens | (answers == EMPTY)).all(-1)

    def parse(self, text: str) -> np.ndarray:
        """Rows of `Q` and `.` divided by `|`, `/` or line breaks, uint8 [S]. Queens that attack
        each other are accepted: that no answer exists is for the search to find."""
        n = self.config.size
        rows = [row.strip() for row in text.replace("|", "\n").replace("/", "\n").split("\n")]
        rows = [row for row in rows if row]
        if len(rows) != n:
            raise TaskError(f"board has {len(rows)} rows, expected {n} (divide them with '|')")
        for number, row in enumerate(rows, 1):
            if len(row) != n:
                raise TaskError(f"row {number} {row!r} has {len(row)} cells, expected {n}")
            wrong = sorted(set(row) - set("Qq."))
            if wrong:
                raise TaskError(f"row {number} has {wrong[0]!r}; use Q for a queen, . for empty")
        cells = np.array([[cell in "Qq" for cell in row] for row in rows])
        return np.where(cells, QUEEN, EMPTY).astype(np.uint8).reshape(-1)

    def render(self, tokens: np.ndarray) -> str:
        """One line a row, `Q`, `.` or `?` for padding."""
        signs = np.array(["?", ".", "Q"])[np.asarray(tokens)]
        n = self.config.size
        return "\n".join("".join(row) for row in signs.reshape(n, n))
