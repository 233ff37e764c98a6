"""A task of one's own: files, verifier, symbols, and what is refused."""

import sys
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from gram_core import tables
from gram_core.config import ConfigError
from gram_core.tasks.base import TaskError
from gram_core.tasks.registry import make_task
from gram_core.tasks.table import Table

RULE = """
import numpy as np
import torch


def latin(inputs, answers):
    square = answers.reshape(-1, 3, 3)
    whole = [1, 2, 3]
    rows = (np.sort(square, axis=2) == whole).all((1, 2))
    columns = (np.sort(square, axis=1) == np.array(whole)[:, None]).all((1, 2))
    kept = ((inputs == 4) | (inputs == answers)).all(1)
    return rows & columns & kept


def wrong_shape(inputs, answers):
    return np.ones((len(answers), 2), bool)


def writes(inputs, answers):
    answers.reshape(-1, 3, 3).sort(axis=2)
    inputs[:] = 0
    return (answers.reshape(-1, 3, 3) == [1, 2, 3]).all((1, 2))


def uncompiled(inputs, answers):
    return (inputs == answers + 1).all(1) & (not torch.compiler.is_compiling())


def at_fault(inputs, answers):
    return {}["x"]


number = 3
"""


def squares() -> list[list[int]]:
    rows = list(permutations((1, 2, 3)))
    out = []
    for chosen in product(rows, repeat=3):
        if all(len({row[c] for row in chosen}) == 3 for c in range(3)):
            out.append([digit for row in chosen for digit in row])
    return out


@pytest.fixture
def latin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Latin squares of order 3 with all but the first row hidden (4 is a hidden cell)."""
    (tmp_path / "my_rules.py").write_text(RULE)
    (tmp_path / "my_rules_at_fault.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    full = squares()
    assert len(full) == 12
    rows = {"inputs": [s[:3] + [4] * 6 for s in full], "target": full}
    path = tmp_path / "latin.parquet"
    pl.DataFrame(rows).write_parquet(path)
    return {
        "kind": "table",
        "length": 9,
        "vocab": 5,
        "train": str(path),
        "test_share": 0.34,
        "verifier": "my_rules:latin",
        "symbols": "123.",
        "columns": 3,
        "complete": True,
    }


def task_of(settings: dict[str, Any], **changes: Any) -> Table:
    task = make_task({**settings, **changes}, "tasks.latin")
    assert isinstance(task, Table)
    return task


def test_inputs_are_held_out_whole(latin: dict[str, Any]) -> None:
    split = task_of(latin).generate(Path)
    assert (len(split.train), len(split.test)) == (8, 4)
    train, test = (set(part["puzzle_id"].to_pylist()) for part in (split.train, split.test))
    assert len(train) == 4
    assert len(test) == 2
    assert not train & test
    assert set(split.test["solution_count"].to_pylist()) == {2}
    again = task_of(latin).generate(Path)
    assert again.test.equals(split.test)
    other = task_of(latin, seed=1).generate(Path)
    assert not other.test.equals(split.test)


def test_counts_are_unknown_unless_the_files_are_complete(latin: dict[str, Any]) -> None:
    split = task_of(latin, complete=False).generate(Path)
    assert set(split.test["solution_count"].to_pylist()) == {0}


def test_the_verifier_decides(latin: dict[str, Any]) -> None:
    task = task_of(latin)
    test = task.generate(Path).test
    inputs, target = (
        torch.from_numpy(tables.tokens_numpy(test[c]).copy()) for c in ("inputs", "target")
    )
    assert task.verifies
    assert task.verify(inputs, target).all()
    assert not task.verify(inputs, target.roll(1, 1)).any()


def test_a_verifier_that_writes_changes_nothing(latin: dict[str, Any]) -> None:
    plain, written = (task_of(latin, verifier=f"my_rules:{rule}") for rule in ("latin", "writes"))
    rows = plain.generate(Path)
    assert written.generate(Path).train.equals(rows.train)
    inputs, target = (
        torch.from_numpy(tables.tokens_numpy(rows.test[c]).copy()) for c in ("inputs", "target")
    )
    before = inputs.clone(), target.clone()
    assert written.verify(inputs, target).all()
    assert torch.equal(inputs, before[0]) and torch.equal(target, before[1])


def test_a_compiled_caller_leaves_the_verifier_uncompiled(latin: dict[str, Any]) -> None:
    task = task_of(latin, verifier="my_rules:uncompiled")
    verify, seen = task.verify, torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    compiled = torch.compile(lambda tokens: verify(tokens + 1, tokens), backend="eager")
    assert compiled(seen).tolist() == [True, True, True]


def test_pairs_that_are_there_twice_count_once(latin: dict[str, Any]) -> None:
    rows = pl.read_parquet(latin["train"])
    pl.concat([rows, rows[:5]]).write_parquet(latin["train"])
    split = task_of(latin).generate(Path)
    assert split.metadata == {"train_pairs": len(split.train), "test_pairs": len(split.test)}
    assert len(split.train) + len(split.test) == 12


def test_without_a_verifier_nothing_is_verified(latin: dict[str, Any]) -> None:
    assert not task_of(latin, verifier=None).verifies


def test_a_test_file_stands_by_itself(latin: dict[str, Any], tmp_path: Path) -> None:
    full = squares()
    other = tmp_path / "test.parquet"
    pl.DataFrame({"inputs": [[4] * 3 + s[3:] for s in full[:2]], "target": full[:2]}).write_parquet(
        other
    )
    split = task_of(latin, test=str(other)).generate(Path)
    assert (len(split.train), len(split.test)) == (12, 2)
    with pytest.raises(TaskError, match="row 1 is a training input too"):
        task_of(latin, test=latin["train"]).generate(Path)


def test_parse_and_render(latin: dict[str, Any]) -> None:
    task = task_of(latin)
    tokens = task.parse("123|...|3.1")
    assert tokens.tolist() == [1, 2, 3, 4, 4, 4, 3, 4, 1]
    assert task.render(tokens) == "123\n...\n3.1"
    plain = task_of(latin, symbols=None, columns=None)
    assert plain.render(plain.parse("1 2 3 4 4 4 3 4 0")) == "1 2 3 4 4 4 3 4 0"
    for text, message in (("12x", "no symbol"), ("123", "3 tokens, expected 9")):
        with pytest.raises(TaskError, match=message):
            task.parse(text)
    with pytest.raises(TaskError, match="'5' is no token"):
        plain.parse("5 " * 9)
    with pytest.raises(TaskError, match="is no token"):
        plain.parse("1" * 5000 + " 1" * 8)  # longer than Python reads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"symbols": "12"}, "symbols"),
        ({"symbols": "1123"}, "4 different characters"),
        ({"symbols": "11234"}, "4 different characters"),
        ({"symbols": "12 3"}, "none of them blank"),
        ({"symbols": "12|3"}, "none of them blank"),
        ({"verifier": "my_rules_at_fault:latin"}, "cannot be imported \\(ZeroDivisionError"),
        ({"verifier": ":latin"}, "verifier: ':latin' cannot be imported"),
        ({"verifier": "my_rules"}, "package.module:function"),
        ({"verifier": "my_rules:missing"}, "cannot be imported"),
        ({"verifier": "no_such_module:f"}, "cannot be imported"),
        ({"verifier": "my_rules:number"}, "not a function"),
        ({"vocab": 1}, "vocab"),
    ],
)
def test_settings_that_cannot_be(
    latin: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(latin, **changes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"inputs": [[1] * 9]}, "'target' is missing"),
        ({"inputs": [[1] * 8], "target": [[1] * 9]}, "inputs of row 1 has 8 tokens"),
        ({"inputs": [[4] * 9], "target": [[1] * 8 + [7]]}, "target of row 1 has token 7"),
        ({"inputs": [[4] * 9], "target": [[1] * 8 + [None]]}, "target of row 1 has token -1"),
        ({"inputs": [[4] * 9], "target": [[1] * 8 + [0]]}, "target of row 1 has token 0, padding"),
        ({"inputs": ["x"], "target": ["y"]}, "expected lists"),
        ({"inputs": [[1.7] * 9], "target": [[1] * 9]}, "'inputs' is .*, expected lists of whole"),
        ({"inputs": [[True] * 9], "target": [[1] * 9]}, "'inputs' is .*, expected lists of whole"),
        (
            {"inputs": [[[4] * 3] * 3], "target": [[1] * 9]},
            "'inputs' is .*, expected lists of whole",
        ),
        ({"inputs": [[4] * 9], "target": [[1] * 9]}, "target of row 1 is not valid"),
        ({"inputs": [], "target": []}, "no rows"),
    ],
)
def test_files_that_do_not_fit_are_named(
    latin: dict[str, Any], rows: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd.parquet"
    pl.DataFrame(rows).write_parquet(path)
    with pytest.raises(TaskError, match=message) as error:
        task_of(latin, train=str(path)).generate(Path)
    assert "odd.parquet" in str(error.value)


def test_damage_empty_splits_and_odd_verifiers(latin: dict[str, Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"not parquet")
    with pytest.raises(TaskError, match="not a readable Parquet"):
        task_of(latin, train=str(bad)).generate(Path)
    with pytest.raises(TaskError, match="leaves one side empty"):
        task_of(latin, test_share=0.01).generate(Path)
    with pytest.raises(TaskError, match="verifier my_rules:at_fault: raised KeyError: 'x'"):
        task_of(latin, verifier="my_rules:at_fault").generate(Path)
    with pytest.raises(TaskError, match="expected bool"):
        task_of(latin, verifier="my_rules:wrong_shape").generate(Path)


def test_an_answer_may_be_checked_on_tensors_of_any_row_count(latin: dict[str, Any]) -> None:
    task = task_of(latin)
    empty = torch.zeros(0, 9, dtype=torch.uint8)
    assert task.verify(empty, empty).shape == (0,)
    assert np.array(squares()).shape == (12, 9)
