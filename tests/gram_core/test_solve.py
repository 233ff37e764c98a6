from pathlib import Path

import numpy as np
import pytest
import torch

from gram_core.config import ConfigError
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.model.store import ModelError, save_model
from gram_core.sample.trajectory import SampleConfig, rollout
from gram_core.shape import TokenShape
from gram_core.solve import Solver, puzzle_name
from gram_core.tasks.arc import Arc, ArcConfig
from gram_core.tasks.base import TaskError
from gram_core.tasks.batches import Puzzles

TASK = {"kind": "nqueens", "size": 4, "remove": [1, 2, 3]}
PUZZLE = ".Q..|....|....|...."
RIGHT = ".Q..|...Q|Q...|..Q."


@pytest.fixture
def folder(tmp_path, make_model) -> Path:
    save_model(tmp_path / "run", make_model(N_sup=3), {"task": TASK})
    return tmp_path / "run"


def test_a_folder_is_all_that_solving_takes(folder):
    solver = Solver.load(folder)
    assert solver.sample == SampleConfig(depth=3), "sampled to the depth it was trained to"
    answers = solver.solve(PUZZLE, width=30)
    assert sum(answer.count for answer in answers) == 30
    assert len({answer.tokens.tobytes() for answer in answers}) == len(answers) > 1
    assert Solver.load(str(folder)).solve(PUZZLE, width=30)[0].text == answers[0].text


def test_answers_are_those_of_the_rollout_counted(folder):
    solver = Solver.load(folder)
    tokens = solver.task.parse(PUZZLE)
    puzzles = Puzzles.of([puzzle_name(tokens)], torch.from_numpy(tokens)[None])
    drawn = rollout(solver.model, puzzles, SampleConfig(depth=3, width=20, seed=4))
    for answer in solver.solve(PUZZLE, seed=4):
        same = (drawn.prediction[0] == answer.tokens).all(1)
        assert answer.count == same.sum()
        assert answer.value == drawn.value[0, same].max()
        assert answer.text == solver.task.render(answer.tokens)


def test_settings_override_the_runs_sampling(folder):
    solver = Solver.load(folder, SampleConfig(depth=3, depths=(1, 9)))
    tokens = solver.task.parse(PUZZLE)
    puzzles = Puzzles.of([puzzle_name(tokens)], torch.from_numpy(tokens)[None])

    def counts(**settings) -> dict[bytes, int]:
        return {a.tokens.tobytes(): a.count for a in solver.solve(PUZZLE, **settings)}

    for depth in (1, 2):
        drawn = rollout(solver.model, puzzles, SampleConfig(depth=depth)).prediction[0]
        unique, number = np.unique(drawn, axis=0, return_counts=True)
        expected = {u.tobytes(): n for u, n in zip(unique, number.tolist(), strict=True)}
        assert counts(depth=depth) == expected
    assert counts(depth=1) != counts(depth=2)
    assert sum(counts(width=3).values()) == 3


def test_verified_answers_come_first_then_the_commonest_then_the_most_valued(folder, monkeypatch):
    solver = Solver.load(folder)
    right = solver.task.parse(RIGHT)
    wrong = [
        solver.task.parse(t)
        for t in ("Q...|....|....|....", ".Q..|....|....|....", "....|....|....|....")
    ]
    order = [wrong[0], wrong[0], right, wrong[1], wrong[1], wrong[2]]
    values = np.array([[0.1, 0.2, 0.0, 0.9, 0.3, 1.0]], dtype=np.float32)

    class Drawn:
        prediction = np.stack(order)[None]
        value = values
        steps = np.ones((1, 6), dtype=np.int64)

    monkeypatch.setattr("gram_core.solve.rollout", lambda *a, **k: Drawn)
    answers = solver.solve(PUZZLE, width=6)
    assert [a.text.replace("\n", "|") for a in answers] == [
        RIGHT, ".Q..|....|....|....", "Q...|....|....|....", "....|....|....|....",
    ]  # fmt: skip
    assert [a.verified for a in answers] == [True, False, False, False]
    assert [a.count for a in answers] == [1, 2, 2, 1]
    assert [a.value for a in answers] == pytest.approx([0.0, 0.9, 0.2, 1.0])


def test_stopping_when_verified_leaves_out_what_was_not_drawn(folder, monkeypatch):
    solver = Solver.load(folder)
    right = torch.from_numpy(solver.task.parse(RIGHT))
    # An untrained model's third trajectory is made to be right.
    true = solver.task.verify
    made = iter(range(99))
    monkeypatch.setattr(solver.task, "verify", lambda i, a: true(i, a) | (next(made) == 2))
    answers = solver.solve(PUZZLE, batch=1, depth=1, stop_when_verified=True, width=9)
    assert sum(a.count for a in answers) == 3
    assert not torch.equal(right, torch.from_numpy(answers[0].tokens))
    # Graphs of a rule; a picture has none.
    monkeypatch.setattr(type(solver.task), "verifies", False)
    with pytest.raises(ConfigError, match="no rule to verify"):
        solver.solve(PUZZLE, stop_when_verified=True)


def test_the_same_board_in_other_spellings_is_the_same_puzzle(folder):
    solver = Solver.load(folder)
    spellings = (PUZZLE, PUZZLE.replace("|", "\n"), PUZZLE.lower())
    texts = [[a.text for a in solver.solve(spelling)] for spelling in spellings]
    assert texts[0] == texts[1] == texts[2]


def test_puzzles_have_names_of_their_own():
    first, second = np.array([1, 2, 1, 1], np.uint8), np.array([1, 1, 2, 1], np.uint8)
    assert puzzle_name(first) == "01020101"
    assert puzzle_name(first) != puzzle_name(second)


def test_a_deterministic_model_has_one_answer(tmp_path, make_model):
    save_model(tmp_path, make_model(guidance="none"), {"task": TASK})
    (answer,) = Solver.load(tmp_path).solve(PUZZLE, width=7)
    assert answer.count == 7


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"depth": 0}, "depth"), ({"batch": 0}, "batch"), ({"width": -1}, "width"),
     ({"depth": "3"}, "depth"), ({"depths": [2]}, "of one depth"), ({"widht": 3}, "width")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(folder, settings, key):
    with pytest.raises(ConfigError, match=key):
        Solver.load(folder).solve(PUZZLE, **settings)


def test_a_malformed_puzzle_is_refused(folder):
    with pytest.raises(TaskError, match="board has 1 rows, expected 4"):
        Solver.load(folder).solve("Q...")


def test_a_model_without_a_task_or_of_an_unknown_one_is_refused(tmp_path, make_model):
    save_model(tmp_path, make_model(), {})
    with pytest.raises(ModelError, match=r"config\.json: names no task"):
        Solver.load(tmp_path)
    save_model(tmp_path, make_model(), {"task": {"kind": "chess"}})
    with pytest.raises(ConfigError, match=r"config\.json: task\.kind: expected one of nqueens"):
        Solver.load(tmp_path)


def test_an_identified_task_answers_for_the_groups_it_was_trained_on():
    task = Arc(ArcConfig(augmentations=1))
    torch.manual_seed(0)
    config = ModelConfig(
        core="mixer", dim=8, heads=2, ffn=8, layers=1, K=1, T=1, N_sup=1, prefix_tokens=1
    )
    model = GRAM(config, TokenShape(task.length, task.vocab, puzzles=4)).eval()
    assert model.puzzle is not None
    torch.nn.init.normal_(model.value.map.weight)
    solver = Solver(model, task, SampleConfig(depth=1, halting=False), ["one", "two"])
    first = solver.solve("two: 01|10", width=2)
    assert not any(answer.verified for answer in first)
    # "two" is the second group of two variants each: identifier 2, and no other, matters.
    model.puzzle.weight[[0, 1, 3]] = 5.0
    again = solver.solve("two: 01|10", width=2)
    assert [a.value for a in again] == [a.value for a in first]
    model.puzzle.weight[2] = 5.0
    assert [a.value for a in solver.solve("two: 01|10", width=2)] != [a.value for a in first]
    with pytest.raises(TaskError, match="no identifier for 'three'"):
        solver.solve("three: 01|10")
