from collections import defaultdict
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_core.config import ConfigError, load
from gram_core.shape import TokenShape
from gram_core.tables import tokens_numpy
from gram_core.tasks import base
from gram_core.tasks.base import TaskError
from gram_core.tasks.nqueens import (
    EMPTY,
    QUEEN,
    NQueens,
    NQueensConfig,
    SplitConfig,
    attack_lines,
    board_key,
    board_names,
    completions,
    orbit_key,
    solutions,
    symmetries,
    to_placement,
    to_tokens,
)


def peaceful(board) -> bool:
    """Whether no two queens (row -> column, -1: none) attack each other."""
    queens = [(row, column) for row, column in enumerate(board) if column >= 0]
    return all(
        c1 != c2 and abs(c1 - c2) != r2 - r1 for (r1, c1), (r2, c2) in combinations(queens, 2)
    )


def brute_solutions(n: int) -> list[tuple[int, ...]]:
    return [board for board in permutations(range(n)) if peaceful(board)]


def backtrack(board: list[int], row: int = 0) -> int:
    """In how many ways the rows without a queen can be filled."""
    if row == len(board):
        return 1
    if board[row] >= 0:
        return backtrack(board, row + 1)
    total = 0
    for column in range(len(board)):
        tried = [*board[:row], column, *board[row + 1 :]]
        total += backtrack(tried, row + 1) if peaceful(tried) else 0
    return total


def picture(placement) -> np.ndarray:
    n = len(placement)
    cells = np.zeros((n, n), dtype=int)
    for row, column in enumerate(placement):
        if column >= 0:
            cells[row, column] = 1
    return cells


def pairs(table: pa.Table) -> set[tuple[bytes, bytes]]:
    inputs, targets = tokens_numpy(table["inputs"]), tokens_numpy(table["target"])
    return {(x.tobytes(), y.tobytes()) for x, y in zip(inputs, targets, strict=True)}


def orbit(cells: np.ndarray) -> frozenset[bytes]:
    """All pictures that the symmetries of the square make of one."""
    return frozenset(np.rot90(c, k).tobytes() for c in (cells, cells.T) for k in range(4))


def orbits_by_input(table: pa.Table) -> dict[bytes, frozenset[bytes]]:
    cells = (tokens_numpy(table["inputs"]) == QUEEN).astype(int)
    size = int(cells.shape[1] ** 0.5)
    return {row.tobytes(): orbit(row.reshape(size, size)) for row in cells}


def inputs_of(table: pa.Table) -> dict[str, int]:
    """Solution counts by input."""
    ids, counts = table["puzzle_id"].to_pylist(), table["solution_count"].to_pylist()
    return dict(zip(ids, counts, strict=True))


@pytest.fixture(scope="module")
def eight():
    return NQueens(NQueensConfig()).generate(Path)


@pytest.fixture(scope="module")
def five():
    task = NQueens(NQueensConfig(size=5, remove=(2, 3, 4), split=SplitConfig(test=0.3)))
    return task, task.generate(Path)


# Enumeration


@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_solutions_are_those_of_trying_all_permutations_in_order(n):
    assert [tuple(board) for board in solutions(n).tolist()] == brute_solutions(n)


@pytest.mark.parametrize(("n", "count"), [(8, 92), (10, 724)])
def test_solutions_of_larger_boards_have_the_known_counts(n, count):
    found = solutions(n)
    assert len(np.unique(found, axis=0)) == len(found) == count
    assert all(peaceful(board) for board in found.tolist())


@pytest.mark.parametrize(
    ("n", "remove", "unique", "total", "most"),
    [
        (8, (5,), 4032, 5152, 4),
        (8, (6,), 1052, 2576, 8),
        (8, (7,), 64, 736, 18),
        (8, (5, 6, 7), 5148, 8464, 18),
        (10, (7, 8, 9), 43_420, 126_700, 93),
    ],
)
def test_completions_have_the_known_counts(n, remove, unique, total, most):
    partial, full = completions(n, remove)
    assert len(partial) == len(full) == total
    _, counts = np.unique(partial, axis=0, return_counts=True)
    assert len(counts) == unique
    assert counts.max() == most


def test_more_boards_than_memory_holds_are_refused(monkeypatch):
    """Ten solutions of five queens, each of them without one, two ... four."""
    pairs = 10 * (5 + 10 + 10 + 5)
    remove = (1, 2, 3, 4)
    monkeypatch.setattr(base, "memory", lambda: 2.0 * pairs * 25)
    assert len(completions(5, remove)[0]) == pairs
    monkeypatch.setattr(base, "memory", lambda: 2.0 * pairs * 25 - 1)
    with pytest.raises(TaskError, match=r"^300 pairs need .* memory and more, .*smaller size"):
        completions(5, remove)


@pytest.mark.parametrize(("bound", "found"), [("1000\n", 1000), ("max\n", None), (None, None)])
def test_the_memory_is_this_machine_s_or_the_container_s(monkeypatch, tmp_path, bound, found):
    if bound is not None:
        (tmp_path / "memory.max").write_text(bound)
    monkeypatch.setattr(base, "CONTAINER", tmp_path / "memory.max")
    wanted = psutil.virtual_memory().total if found is None else found
    assert base.memory() == wanted


def test_every_completion_of_a_small_board_is_there_and_nothing_else():
    partial, full = completions(6, (3, 5))
    made = {(tuple(p), tuple(f)) for p, f in zip(partial.tolist(), full.tolist(), strict=True)}
    expected = {
        (tuple(-1 if row in gone else column for row, column in enumerate(board)), board)
        for board in brute_solutions(6)
        for k in (3, 5)
        for gone in combinations(range(6), k)
    }
    assert made == expected
    assert len(partial) == len(expected)


@pytest.mark.parametrize(
    ("n", "remove", "checked"), [(6, (2, 3, 4, 5), None), (7, (4, 5, 6), None), (8, (5, 6, 7), 60)]
)
def test_each_input_has_as_many_completions_as_backtracking_finds(n, remove, checked, rng):
    boards, counts = np.unique(completions(n, remove)[0], axis=0, return_counts=True)
    chosen = range(len(boards)) if checked is None else rng.choice(len(boards), checked)
    for i in chosen:
        assert counts[i] == backtrack(boards[i].tolist())
    assert n == 6 or len(set(counts[list(chosen)].tolist())) > 2


# Boards


@given(st.integers(4, 9).flatmap(lambda n: st.tuples(st.just(n), st.lists(
    st.lists(st.integers(-1, n - 1), min_size=n, max_size=n), min_size=1, max_size=5
))))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_tokens_and_placements_are_the_same_boards(case):
    n, rows = case
    boards = np.array(rows)
    tokens = to_tokens(boards)
    expected = [np.where(picture(b) == 1, QUEEN, EMPTY).reshape(-1) for b in rows]
    assert np.array_equal(tokens, expected)
    assert np.array_equal(to_placement(tokens, n), boards)
    # Equal names and keys for equal boards, different ones for different boards.
    different = len({tuple(b) for b in rows})
    assert (
        len(set(board_names(boards).to_pylist()))
        == len(set(board_key(boards).tolist()))
        == different
    )


def test_a_boards_name_gives_the_column_of_each_queen():
    assert board_names(np.array([[2, -1, -1, 0]])).to_pylist() == ["2..0"]
    last = np.array([[-1] * 14 + [14]])
    assert board_names(last).to_pylist() == [".............." + "e"]


def test_keys_of_the_largest_board_do_not_overflow():
    boards = np.array([[14] * 15, [14] * 14 + [13], [-1] * 15])
    # In digits of base 16: fifteen times f; the same with a last digit e; zero.
    assert board_key(boards).tolist() == [16**15 - 1, 16**15 - 2, 0]


def test_symmetries_are_those_of_the_picture_on_the_square():
    # Only boards with a queen at most in each row and column stay placements when turned.
    boards = np.array([[2, -1, -1, 0, -1], [1, 3, 0, 2, 4], [-1, -1, 2, -1, -1]])
    images = symmetries(boards)
    assert images.shape == (8, 3, 5)
    assert np.array_equal(images[0], boards)
    for i, board in enumerate(boards):
        cells = picture(board)
        assert {picture(image).tobytes() for image in images[:, i]} == orbit(cells)
        # The first four are quarter turns, one after the other, all the same way round.
        turns = [picture(image) for image in images[:4, i]]
        assert all(np.array_equal(turns[k], np.rot90(cells, -k)) for k in range(4))


def test_orbit_keys_are_equal_exactly_within_an_orbit():
    boards = np.unique(completions(5, (2, 3))[0], axis=0)
    by_key, by_orbit = defaultdict(set), defaultdict(set)
    for i, key in enumerate(orbit_key(boards).tolist()):
        by_key[key].add(i)
        by_orbit[orbit(picture(boards[i]))].add(i)
    assert set(map(frozenset, by_key.values())) == set(map(frozenset, by_orbit.values()))
    assert len(by_key) < len(boards)


def test_attack_lines_are_rows_columns_and_diagonals():
    lines = attack_lines(4)
    assert lines.shape == (16, 4 + 4 + 7 + 7)
    for a, b in combinations(range(16), 2):
        (r1, c1), (r2, c2) = divmod(a, 4), divmod(b, 4)
        attacked = r1 == r2 or c1 == c2 or abs(r1 - r2) == abs(c1 - c2)
        assert bool((lines[a] * lines[b]).any()) == attacked


# Tables


def test_the_default_split_has_the_papers_sizes(eight):
    train, test = inputs_of(eight.train), inputs_of(eight.test)
    assert (len(train), len(test)) == (4375, 773)
    assert not set(train) & set(test)
    assert len(eight.train) + len(eight.test) == 8464


def test_metadata_counts_what_is_in_the_tables(eight):
    train, test, m = inputs_of(eight.train), inputs_of(eight.test), eight.metadata
    assert (m["inputs"], m["pairs"]) == (5148, 8464)
    assert (m["train_inputs"], m["test_inputs"]) == (len(train), len(test))
    assert (m["train_pairs"], m["test_pairs"]) == (len(eight.train), len(eight.test))
    assert m["test_single_solution_inputs"] == sum(count == 1 for count in test.values())
    assert m["max_solutions"] == 18
    single = sum(count == 1 for count in (train | test).values()) / 5148
    assert single == pytest.approx(0.655, abs=0.001)


def test_every_row_is_a_solved_input_with_its_true_count(five):
    task, split = five
    for table in (split.train, split.test):
        inputs = torch.from_numpy(tokens_numpy(table["inputs"]).copy())
        targets = torch.from_numpy(tokens_numpy(table["target"]).copy())
        assert task.verify(inputs, targets).all()
        ids = table["puzzle_id"].to_pylist()
        assert ids == board_names(to_placement(inputs.numpy(), 5)).to_pylist()
        assert table["group_id"].to_pylist() == ids
        assert set(table["augmentation"].to_pylist()) == {""}
        for name, count in inputs_of(table).items():
            assert count == ids.count(name)
            assert count == backtrack([-1 if c == "." else int(c) for c in name])
    assert not pairs(split.train) & pairs(split.test)
    assert len(pairs(split.train) | pairs(split.test)) == split.metadata["pairs"]


def test_a_split_is_a_function_of_its_seed(five):
    task, split = five
    again = NQueens(task.config).generate(Path)
    assert again.train.equals(split.train)
    assert again.test.equals(split.test)
    other = NQueensConfig(size=5, remove=(2, 3, 4), split=SplitConfig(test=0.3, seed=1))
    assert not NQueens(other).generate(Path).test.equals(split.test)


def test_a_split_by_orbit_keeps_every_orbit_on_one_side():
    config = NQueensConfig(size=5, remove=(2, 3, 4), split=SplitConfig(by="orbit", test=0.3))
    split = NQueens(config).generate(Path)
    train, test = (set(orbits_by_input(t).values()) for t in (split.train, split.test))
    assert not train & test
    assert split.metadata["orbits"] == len(train | test)
    assert split.metadata["test_inputs_with_twin_in_train"] == 0
    # Whole orbits, of up to eight inputs, up to the 30% of 225 inputs, rounded up.
    assert 60 <= split.metadata["test_inputs"] <= 68


def test_a_split_by_input_tells_how_many_test_inputs_have_a_twin(five):
    _, split = five
    train, test = (orbits_by_input(table) for table in (split.train, split.test))
    twins = sum(orbit in set(train.values()) for orbit in test.values())
    assert split.metadata["test_inputs_with_twin_in_train"] == twins > 0


# Augmentation


def test_without_augmentation_the_tables_stay_as_they_are(five):
    task, split = five
    result = task.augment(split.train, split.test)
    assert result.train is split.train
    assert result.test is split.test


def test_augmenting_all_completions_makes_nothing_new_and_never_a_test_input(five):
    _, split = five
    dihedral = NQueens(NQueensConfig(size=5, remove=(2, 3, 4), augment="dihedral"))
    result = dihedral.augment(split.train, split.test)
    assert pairs(result.train) == pairs(split.train)
    assert result.metadata["augmented_pairs"] == 0
    # Every image is a training pair already, or its input is a test input.
    images, test_inputs = 0, {x for x, _ in pairs(split.test)}
    partial = to_placement(tokens_numpy(split.train["inputs"]), 5)
    for image in symmetries(partial)[1:]:
        images += sum(x.tobytes() in test_inputs for x in to_tokens(image))
    assert result.metadata["dropped_equal_to_test"] == images > 0
    assert result.metadata["dropped_doubles"] == 7 * len(split.train) - images


def test_augmenting_some_pairs_adds_their_missing_images_once(five):
    _, split = five
    task = NQueens(NQueensConfig(size=5, remove=(2, 3, 4), augment="dihedral"))
    few = split.train.slice(0, 3)
    result = task.augment(few, split.test)
    test_inputs = {x for x, _ in pairs(split.test)}
    expected = set()
    for x, y in zip(tokens_numpy(few["inputs"]), tokens_numpy(few["target"]), strict=True):
        for flip in (False, True):
            for k in range(4):
                a, b = (np.rot90(t.reshape(5, 5).T if flip else t.reshape(5, 5), k) for t in (x, y))
                if a.tobytes() not in test_inputs:
                    expected.add((a.tobytes(), b.tobytes()))
    assert pairs(result.train) == expected
    assert len(result.train) == len(expected) > 3
    assert result.metadata["augmented_pairs"] == len(expected) - 3
    assert result.test is split.test
    # A row made from another says which, and by which symmetry; counts stay.
    made = result.train.slice(3).to_pylist()
    groups = set(few["group_id"].to_pylist())
    assert {row["group_id"] for row in made} <= groups
    assert all(row["augmentation"].startswith("dihedral:") for row in made)
    for row in made:
        name = row["puzzle_id"]
        assert row["solution_count"] == backtrack([-1 if c == "." else int(c) for c in name])


# Verifying


def solves(inputs: np.ndarray, answer: np.ndarray, n: int) -> bool:
    """The rules, cell by cell."""
    queens = [divmod(i, n) for i, token in enumerate(answer) if token == QUEEN]
    if len(queens) != n or any(token not in (EMPTY, QUEEN) for token in answer):
        return False
    if any(x == QUEEN and y != QUEEN for x, y in zip(inputs, answer, strict=True)):
        return False
    return not any(
        r1 == r2 or c1 == c2 or abs(r1 - r2) == abs(c1 - c2)
        for (r1, c1), (r2, c2) in combinations(queens, 2)
    )


@pytest.mark.parametrize("n", [4, 5, 6])
def test_verify_is_the_rules_on_random_and_on_nearly_right_boards(n, rng):
    task = NQueens(NQueensConfig(size=n, remove=(1,)))
    full = to_tokens(solutions(n))
    answers, inputs = [], []
    for _ in range(400):
        answer = full[rng.integers(len(full))].copy()
        given_queens = np.flatnonzero(answer == QUEEN)
        given_board = np.full(n * n, EMPTY, dtype=np.uint8)
        given_board[rng.choice(given_queens, rng.integers(0, n), replace=False)] = QUEEN
        # None, one or two cells go wrong: a queen moved away, one too many, padding, nonsense.
        for _ in range(rng.integers(0, 3)):
            answer[rng.integers(n * n)] = rng.choice([0, 1, 2, 3])
        if rng.random() < 0.2:
            given_board[rng.integers(n * n)] = QUEEN
        answers.append(answer)
        inputs.append(given_board)
    found = task.verify(torch.from_numpy(np.array(inputs)), torch.from_numpy(np.array(answers)))
    expected = [solves(x, y, n) for x, y in zip(inputs, answers, strict=True)]
    assert found.tolist() == expected
    assert 50 < sum(expected) < 350


@pytest.mark.parametrize(
    "answer",
    [
        ".Q..|...Q|Q...|....",  # a queen short
        ".Q..|...Q|Q...|.Q..",  # two in a column
        "Q...|..Q.|...Q|.Q..",  # two on a diagonal
        "..Q.|Q...|...Q|.Q..",  # right, but the given queen is gone
    ],
)
def test_verify_refuses(answer, queens4):
    given_queen = torch.from_numpy(queens4.parse(".Q..|....|....|...."))[None]
    right = torch.from_numpy(queens4.parse(".Q..|...Q|Q...|..Q."))[None]
    assert queens4.verify(given_queen, right).item()
    assert not queens4.verify(given_queen, torch.from_numpy(queens4.parse(answer))[None]).item()


def test_verify_refuses_padding_and_unknown_tokens_in_an_answer(queens4):
    right = torch.from_numpy(queens4.parse(".Q..|...Q|Q...|..Q."))[None]
    for token in (0, 3):
        wrong = right.clone()
        wrong[0, 0] = token
        assert not queens4.verify(right, wrong).item()
    # Padding in the input asks nothing of the answer.
    assert queens4.verify(torch.zeros_like(right), right).item()


# Reading and writing


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=5, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_rendered_board_is_read_as_the_same_board(rows):
    task = NQueens(NQueensConfig(size=5, remove=(1,)))
    tokens = np.where(np.array(rows), QUEEN, EMPTY).astype(np.uint8).reshape(-1)
    text = task.render(tokens)
    assert text == "\n".join("".join("Q" if queen else "." for queen in row) for row in rows)
    for divider in ("\n", "|", "/", " | ", "\r\n", "\n\n"):
        read = task.parse(text.replace("\n", divider))
        assert read.dtype == np.uint8
        assert np.array_equal(read, tokens)


def test_small_letters_are_queens_and_padding_is_a_question_mark(queens4):
    assert queens4.parse("q...|....|....|....")[0] == QUEEN
    assert queens4.render(np.array([0, 1, 2] + [1] * 13)).startswith("?.Q.\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q...|....|....", "board has 3 rows, expected 4"),
        ("", "board has 0 rows, expected 4"),
        ("Q...|....|....|....|....", "board has 5 rows, expected 4"),
        ("Q...|...|....|....", "row 2 '...' has 3 cells, expected 4"),
        ("Q...|....|.....|....", "row 3 '.....' has 5 cells, expected 4"),
        ("Q...|....|....|..x.", "row 4 has 'x'; use Q for a queen, . for empty"),
        ("Q...|.1..|....|....", "row 2 has '1'; use Q for a queen"),
    ],
)
def test_a_malformed_board_is_one_line_that_says_where(text, message, queens4):
    with pytest.raises(TaskError) as caught:
        queens4.parse(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# Settings


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"size": 3}, r"^task\.size: .*>= 4"),
        ({"size": 16}, r"^task\.size: .*<= 15"),
        ({"remove": []}, r"^task: remove: name at least one"),
        ({"remove": [0]}, r"^task: remove: 0 queens of 8; .* use 1\.\.7"),
        ({"remove": [5, 8]}, r"^task: remove: 8 queens of 8"),
        ({"remove": [5, 5]}, r"^task: remove: \[5, 5\] names a number twice"),
        ({"split": {"by": "puzzle"}}, r"^task\.split\.by: "),
        ({"split": {"test": 1.5}}, r"^task\.split\.test: "),
        ({"augment": "colour"}, r"^task\.augment: "),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings_, message):
    with pytest.raises(ConfigError, match=message):
        load(NQueensConfig, {"kind": "nqueens", **settings_}, "task")


@pytest.mark.parametrize(
    ("by", "test", "side"),
    [("input", 0.0, "test"), ("input", 1.0, "training"), ("orbit", 1e-6, "test")],
)
def test_a_split_that_leaves_a_side_empty_is_refused(by, test, side):
    config = NQueensConfig(size=5, remove=(2,), split=SplitConfig(by=by, test=test))
    with pytest.raises(TaskError, match=f"leaves the {side} set empty"):
        NQueens(config).generate(Path)


def test_the_task_tells_a_model_its_shape():
    task = NQueens(NQueensConfig(size=6, remove=(1,)))
    assert task.shape == TokenShape(36, 3)
