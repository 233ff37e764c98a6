"""Sudoku: symmetries, sources, the verifier, and what is refused."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_core import tables
from gram_core.config import ConfigError
from gram_core.tasks.base import TaskError
from gram_core.tasks.batches import Member
from gram_core.tasks.registry import make_task
from gram_core.tasks.sudoku import Sudoku, Symmetry, board_id, invariant, random_symmetry
from gram_core.tasks.sudoku_boards import SudokuBoards
from gram_core.tasks.sudoku_solver import dig, random_boards, solve

SHARED = Path(__file__).parents[4] / "shared" / "data"
SIZES = st.sampled_from([4, 6, 9])
SEEDS = st.integers(0, 2**32 - 1)


def sudoku(size: int, **source: Any) -> Sudoku:
    task = make_task({"kind": "sudoku", "size": size, "source": source}, "task")
    assert isinstance(task, Sudoku)
    return task


def complete(board: np.ndarray, size: int) -> bool:
    """Rows, columns and boxes by slicing."""
    height, width = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    square, whole = board.reshape(size, size), set(range(1, size + 1))
    boxes = [
        square[r : r + height, c : c + width]
        for r in range(0, size, height)
        for c in range(0, size, width)
    ]
    return all(set(unit.flat) == whole for unit in [*square, *square.T, *boxes])


@given(SIZES, SEEDS)
@settings(max_examples=60, deadline=None)
def test_symmetries_form_a_group_that_keeps_boards_complete(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    (board,) = random_boards(1, size, rng)
    a, b, c = (random_symmetry(size, rng) for _ in range(3))
    assert complete(board, size)
    assert complete(a(board), size)
    assert (a.inverse(a(board)) == board).all()
    assert (a(a.inverse(board)) == board).all()
    assert (a.after(b)(board) == a(b(board))).all()
    left, right = a.after(b).after(c), a.after(b.after(c))
    assert (left.cells == right.cells).all()
    assert (left.digits == right.digits).all()
    neutral = Symmetry(np.arange(size * size), np.arange(size + 1))
    assert (a.after(a.inverse).cells == neutral.cells).all()
    assert (a.after(a.inverse).digits == neutral.digits).all()


@given(SIZES, SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_puzzle_stays_one_with_its_answer_and_its_invariant(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    (board,) = random_boards(1, size, rng)
    puzzle = dig(board, size, 0, rng)
    a = random_symmetry(size, rng)
    solved = solve(a(puzzle)[None], size)
    assert solved.count[0] == 1
    assert (solved.solution[0] == a(board)).all()
    assert (invariant(puzzle[None], size) == invariant(a(puzzle)[None], size)).all()


def test_the_group_is_as_large_as_it_should_be() -> None:
    # 4x4: bands and rows 2 * 2^2, the same for columns, transposition: 128; digits 4!.
    rng = np.random.default_rng(0)
    drawn = [random_symmetry(4, rng) for _ in range(5000)]
    assert len({s.cells.tobytes() for s in drawn}) == 128
    assert len({s.digits.tobytes() for s in drawn}) == 24
    # 6x6: 3! * 2!^3 rows, 2! * 3!^2 columns, no transposition.
    drawn = [random_symmetry(6, rng) for _ in range(40_000)]
    assert len({s.cells.tobytes() for s in drawn}) == 48 * 72


def test_invariants_tell_puzzles_apart() -> None:
    rng = np.random.default_rng(1)
    boards = random_boards(300, 9, rng)
    puzzles = np.stack([dig(board, 9, 0, rng) for board in boards])
    assert len(np.unique(invariant(puzzles, 9))) == 300
    # Two puzzles that differ in the place of one clue only.
    moved = puzzles[:1].copy()
    free, full = np.flatnonzero(moved[0] == 0)[0], np.flatnonzero(moved[0])[0]
    moved[0, free], moved[0, full] = moved[0, full], 0
    assert invariant(moved, 9) != invariant(puzzles[:1], 9)


def test_variants_are_functions_of_the_row_and_the_number() -> None:
    task = make_task({"kind": "sudoku", "size": 6, "augmentations": 5}, "task")
    assert task.variants == 6
    rng = np.random.default_rng(0)
    (board,) = random_boards(1, 6, rng)
    puzzle = dig(board, 6, 0, rng)
    made = [task.vary(Member("a"), puzzle + 1, board + 1, variant) for variant in (1, 2, 3, 1)]
    assert (made[0][0] == made[3][0]).all()
    assert (made[0][1] == made[3][1]).all()
    assert len({inputs.tobytes() for inputs, _ in made}) == 3
    assert (task.vary(Member("b"), puzzle + 1, board + 1, 1)[0] != made[0][0]).any()
    for inputs, target in made:
        assert task.verify(torch.from_numpy(inputs)[None], torch.from_numpy(target)[None]).all()


@given(SIZES, SEEDS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_verify_is_the_rules(size: int, seed: int, spoil: bool) -> None:
    rng = np.random.default_rng(seed)
    (board,) = random_boards(1, size, rng)
    answer = board + 1
    inputs = np.where(rng.random(size * size) < 0.4, answer, 1).astype(np.uint8)
    if spoil:
        cells = rng.choice(size * size, 2, replace=False)
        answer[cells] = rng.integers(0, size + 2, 2)
    wanted = complete(answer.astype(int) - 1, size) and bool(
        ((inputs == 1) | (inputs == answer)).all()
    )
    task = sudoku(size, kind="generate")
    got = task.verify(torch.from_numpy(inputs)[None], torch.from_numpy(answer)[None])
    assert got.tolist() == [wanted]


def test_generated_puzzles_are_distinct_unique_and_split() -> None:
    split = sudoku(4, kind="generate", train=40, test=10, seed=3).generate(Path)
    ids = split.train["puzzle_id"].to_pylist() + split.test["puzzle_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 50
    digits = tables.tokens_numpy(split.train["inputs"]) - 1
    solved = solve(digits, 4)
    assert (solved.count == 1).all()
    assert (solved.solution + 1 == tables.tokens_numpy(split.train["target"])).all()
    # Twins, by every image of every test puzzle.
    rng = np.random.default_rng(0)
    drawn = [random_symmetry(4, rng) for _ in range(5000)]
    places = {s.cells.tobytes(): s.cells for s in drawn}.values()
    names = {s.digits.tobytes(): s.digits for s in drawn}.values()
    train = {puzzle.tobytes() for puzzle in digits}
    twins = [
        any(Symmetry(c, d)(puzzle).tobytes() in train for c in places for d in names)
        for puzzle in tables.tokens_numpy(split.test["inputs"]) - 1
    ]
    assert split.metadata["test_inputs_with_twin_in_train"] == sum(twins)
    again = sudoku(4, kind="generate", train=40, test=10, seed=3).generate(Path)
    assert again.train.equals(split.train)


def test_difficulty_is_the_number_of_guesses() -> None:
    split = sudoku(9, kind="generate", train=3, test=2, guesses=[5, 400]).generate(Path)
    guesses = solve(tables.tokens_numpy(split.train["inputs"]) - 1, 9).guesses
    assert ((guesses >= 5) & (guesses <= 400)).all()
    with pytest.raises(TaskError, match="ask for fewer, or widen"):
        sudoku(4, kind="generate", train=1, test=1, guesses=[50, 60]).generate(Path)


def write(path: Path, rows: dict[str, list[str]]) -> str:
    frame = pl.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    else:
        frame.write_csv(path)
    return str(path)


@pytest.fixture(scope="module")
def puzzles() -> dict[str, list[str]]:
    rng = np.random.default_rng(7)
    boards = random_boards(6, 9, rng)
    questions = [board_id(dig(board, 9, 26, rng)) for board in boards]
    return {
        "source": ["x"] * 6,
        "question": questions,
        "answer": [board_id(board) for board in boards],
        "rating": ["3"] * 6,
    }


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_files_are_read_and_drawn_from(
    suffix: str, puzzles: dict[str, list[str]], tmp_path: Path
) -> None:
    parts = {name: rows[:4] for name, rows in puzzles.items()}
    rest = {name: rows[4:] for name, rows in puzzles.items()}
    train, test = (
        write(tmp_path / f"{name}.{suffix}", rows) for name, rows in (("a", parts), ("b", rest))
    )
    whole = sudoku(9, kind="files", train_path=train, test_path=test).generate(Path)
    assert whole.train["puzzle_id"].to_pylist() == parts["question"]
    assert whole.test["puzzle_id"].to_pylist() == rest["question"]
    some = sudoku(9, kind="files", train_path=train, test_path=test, train=3, seed=1)
    drawn = some.generate(Path).train["puzzle_id"].to_pylist()
    assert len(drawn) == 3
    assert set(drawn) < set(parts["question"])
    with pytest.raises(TaskError, match="5 puzzles asked for, the table has 4"):
        sudoku(9, kind="files", train_path=train, test_path=test, train=5).generate(Path)


def spoilt(rows: dict[str, list[str]], column: str, row: int, text: str) -> dict[str, list[str]]:
    changed = {name: list(values) for name, values in rows.items()}
    changed[column][row] = text
    return changed


def test_what_is_wrong_is_named_with_its_row(puzzles: dict[str, list[str]], tmp_path: Path) -> None:
    question, answer = puzzles["question"][2], puzzles["answer"][2]
    clue = next(i for i, c in enumerate(question) if c != ".")
    other = str(int(question[clue]) % 9 + 1)
    swapped = answer.translate(str.maketrans("12", "21"))
    blank = "." * 81
    cases = {
        "row 3 has 80 characters": spoilt(puzzles, "question", 2, question[:80]),
        "row 3 has 'x'": spoilt(puzzles, "question", 2, "x" + question[1:]),
        "answer of row 3 has 79": spoilt(puzzles, "answer", 2, answer[:79]),
        "row 3 has several solutions": spoilt(puzzles, "question", 2, blank),
        "row 3 has another solution": spoilt(puzzles, "answer", 2, swapped),
        "row 3 has no solution": spoilt(
            puzzles, "question", 2, answer[:clue] + other + answer[clue + 1 :]
        ),
        "'answer' is missing": {"question": puzzles["question"]},
    }
    fine = write(tmp_path / "fine.csv", puzzles)
    for number, (message, rows) in enumerate(cases.items()):
        wrong = write(tmp_path / f"wrong{number}.csv", rows)
        task = sudoku(9, kind="files", train_path=wrong, test_path=fine)
        with pytest.raises(TaskError, match=message) as error:
            task.generate(Path)
        assert f"wrong{number}.csv" in str(error.value)
        assert "\n" not in str(error.value)


def test_damaged_files_are_named(puzzles: dict[str, list[str]], tmp_path: Path) -> None:
    fine = write(tmp_path / "fine.csv.gz", puzzles)
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(Path(fine).read_bytes()[:60])
    noise = tmp_path / "noise.parquet"
    noise.write_bytes(b"no parquet at all")
    empty = tmp_path / "empty.csv"
    empty.write_text("source,question,answer,rating\n")
    for path in (cut, noise, empty):
        task = sudoku(9, kind="files", train_path=str(path), test_path=fine)
        with pytest.raises(TaskError, match=path.name):
            task.generate(Path)


def test_a_test_puzzle_may_not_be_a_training_puzzle(
    puzzles: dict[str, list[str]], tmp_path: Path
) -> None:
    path = write(tmp_path / "all.csv", puzzles)
    with pytest.raises(TaskError, match="test puzzle 1 is a training puzzle too"):
        sudoku(9, kind="files", train_path=path, test_path=path).generate(Path)


def test_settings_that_cannot_be() -> None:
    for settings_, message in (
        ({"size": 5}, "size"),
        ({"source": {"kind": "web"}}, "source"),
        ({"source": {"kind": "generate", "guesses": [3, 1]}}, "guesses"),
        ({"source": {"kind": "files", "train_path": "a"}}, "test_path"),
        ({"source": {"kind": "generate", "number": 3}}, "number"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task({"kind": "sudoku", **settings_}, "tasks.s")
    full = {"size": 4, "source": {"kind": "generate", "clues": 16}}
    with pytest.raises(ConfigError, match="clues 16 leaves no cell of 16 blank"):
        make_task({"kind": "sudoku", **full}, "tasks.s")
    full["source"]["clues"] = 15
    make_task({"kind": "sudoku", **full}, "tasks.s")
    for unread in ({"clues": 9}, {"guesses": [0, 5]}):
        source = {"kind": "generate", **unread}
        with pytest.raises(ConfigError, match="clues and guesses are of puzzles"):
            make_task({"kind": "sudoku_boards", "size": 4, "source": source}, "tasks.s")


def test_the_hub_is_asked_for_its_two_files() -> None:
    asked = []

    def fetch(source: str) -> Path:
        asked.append(source)
        raise TaskError("not today")

    with pytest.raises(TaskError, match="not today"):
        sudoku(9, kind="hub", revision="v1").generate(fetch)
    assert asked == ["hf://datasets/sapientinc/sudoku-extreme@v1/train.csv"]


def test_parse_and_render() -> None:
    task = sudoku(4, kind="generate")
    tokens = task.parse("1.3.|..0.|4...|...2")
    assert tokens.tolist() == [2, 1, 4, 1, 1, 1, 1, 1, 5, 1, 1, 1, 1, 1, 1, 3]
    assert task.render(tokens) == "1.3.\n....\n4...\n...2"
    assert (task.parse(task.render(tokens)) == tokens).all()
    with pytest.raises(TaskError, match="15 cells, expected 16"):
        task.parse("." * 15)
    with pytest.raises(TaskError, match="row 2, column 1 has '5'"):
        task.parse("....5" + "." * 11)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared data files are not here")
@pytest.mark.parametrize(
    "name",
    [
        "sudoku_extreme_train_1000",
        "sudoku_extreme_valid_1000",
        pytest.param("sudoku_hard_lists", marks=pytest.mark.slow),
    ],
)
def test_every_real_puzzle_is_solved_and_agrees(name: str) -> None:
    from gram_core.tasks.sudoku import read_puzzles

    path = SHARED / f"{name}.csv.gz"
    puzzles, answers = read_puzzles(path, path.name, 9, None, 0)
    task = sudoku(9, kind="generate")
    tokens = (torch.from_numpy(b + np.uint8(1)) for b in (puzzles, answers))
    assert task.verify(*tokens).all()
    assert len(puzzles) in (1000, 97071)


# Unconditional boards


def boards_task(size: int, **source: Any) -> SudokuBoards:
    task = make_task({"kind": "sudoku_boards", "size": size, "source": source}, "task")
    assert isinstance(task, SudokuBoards)
    return task


def test_unconditional_rows_are_complete_boards_behind_one_empty_input() -> None:
    task = boards_task(4, kind="generate", train=100, test=30)
    split = task.generate(Path)
    assert not task.conditional
    train, test = (tables.tokens_numpy(part["target"]) for part in (split.train, split.test))
    assert len(np.unique(np.concatenate([train, test]), axis=0)) == 130
    for part in (split.train, split.test):
        assert (tables.tokens_numpy(part["inputs"]) == 1).all()
        assert set(part["puzzle_id"].to_pylist()) == {"." * 16}
        assert set(part["solution_count"].to_pylist()) == {288}
    both = torch.from_numpy(np.concatenate([train, test]))
    assert task.verify(torch.ones_like(both), both).all()
    with pytest.raises(TaskError, match="there are 288"):
        boards_task(4, kind="generate", train=280, test=9).generate(Path)


def test_unconditional_rows_come_from_the_answers_of_files(
    puzzles: dict[str, list[str]], tmp_path: Path
) -> None:
    train = write(tmp_path / "a.csv", {n: rows[:5] for n, rows in puzzles.items()})
    test = write(tmp_path / "b.csv", {n: rows[5:] for n, rows in puzzles.items()})
    split = boards_task(9, kind="files", train_path=train, test_path=test).generate(Path)
    assert sorted(split.train["group_id"].to_pylist()) == sorted(puzzles["answer"][:5])
    assert split.test["group_id"].to_pylist() == puzzles["answer"][5:]
    assert set(split.train["solution_count"].to_pylist()) == {0}
    with pytest.raises(TaskError, match="every test board is a training board"):
        boards_task(9, kind="files", train_path=train, test_path=train).generate(Path)


def test_unconditional_boards_parse_only_the_empty_board() -> None:
    task = boards_task(4, kind="generate")
    assert (task.parse("." * 16) == 1).all()
    assert (task.parse("blank") == 1).all()
    with pytest.raises(TaskError, match="empty board"):
        task.parse("1" + "." * 15)
    assert task.render(task.parse("." * 16)) == "....\n" * 3 + "...."
