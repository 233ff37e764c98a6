import pytest
from torch import Tensor

from gram_core.config import ConfigError, dump
from gram_core.tasks.base import Task
from gram_core.tasks.nqueens import NQueens
from gram_core.tasks.registry import TASKS, make_task


def test_a_kind_and_its_settings_make_a_task():
    task = make_task({"kind": "nqueens", "size": 5, "remove": [2]}, "tasks.a")
    assert isinstance(task, NQueens)
    assert (task.config.size, task.config.remove) == (5, (2,))


def test_a_tasks_dumped_settings_make_it_again():
    task = make_task({"kind": "nqueens", "size": 5, "remove": [2]}, "tasks.a")
    assert make_task(dump(task.config), "x").config == task.config


@pytest.mark.parametrize("kind", ["nqueens", "sudoku_boards"])
def test_a_task_moves_with_its_rule_s_constants_and_stays(kind):
    def constants(task):
        for value in vars(task).values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, Task):
                yield from constants(value)

    task = make_task({"kind": kind}, "tasks.a")
    moved = task.on("meta")
    assert {tensor.device.type for tensor in constants(moved)} == {"meta"}
    assert {tensor.device.type for tensor in constants(task)} == {"cpu"}


@pytest.mark.parametrize("kind", TASKS)
def test_every_kind_is_the_tag_of_its_settings(kind):
    assert TASKS[kind][0].__struct_config__.tag == kind


KINDS = "nqueens, sudoku, sudoku_boards, graph_coloring, arc, digits, table"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"kind": "chess"}, f"tasks.a.kind: expected one of {KINDS}, got 'chess'"),
        ({"size": 5}, f"tasks.a.kind: expected one of {KINDS}, got None"),
        (None, f"tasks.a.kind: expected one of {KINDS}, got None"),
        ({"kind": "nqueens", "sise": 5}, "tasks.a.sise: unknown key; did you mean 'size'?"),
        ({"kind": "nqueens", "size": 3}, "tasks.a.size: Expected `int` >= 4"),
        ({"kind": "nqueens", "remove": [8]}, "tasks.a: remove: 8 queens of 8"),
    ],
)
def test_settings_that_make_no_task_are_one_line(mapping, message):
    with pytest.raises(ConfigError) as caught:
        make_task(mapping, "tasks.a")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_value_error_of_a_task_is_told_with_the_place(monkeypatch):
    def fail(config):
        raise ValueError("too big")

    monkeypatch.setitem(TASKS, "nqueens", (TASKS["nqueens"][0], fail))
    with pytest.raises(ConfigError, match=r"^tasks\.a: too big$"):
        make_task({"kind": "nqueens"}, "tasks.a")
