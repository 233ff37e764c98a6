"""A task's own numbers over trajectories, and what an unconditional task asks, by hand."""

import polars as pl
import pytest

from gram_core.evaluate.metrics import (
    EvaluateConfig,
    generated,
    measured,
    puzzle_table,
    selected,
    summarise,
    wilson,
)

# Two puzzles, three trajectories each: answer, value head, conflicts, validity.
ROWS = pl.DataFrame(
    {
        "puzzle_id": ["a"] * 3 + ["b"] * 3,
        "trajectory": [0, 1, 2] * 2,
        "prediction": [[1, 1], [2, 2], [2, 2], [1, 2], [2, 1], [1, 1]],
        "value": [0.9, 0.1, 0.2, 0.3, 0.5, 0.4],
        "conflicts": [3.0, 1.0, 1.0, 0.0, 4.0, 2.0],
        "valid": [False, False, False, True, False, False],
    },
    schema_overrides={"trajectory": pl.UInt32, "prediction": pl.Array(pl.UInt8, 2)},
)


def test_own_numbers_of_one_trajectory_and_of_the_selected_ones() -> None:
    found = measured(selected(ROWS, ["conflicts"], (1, 3)), EvaluateConfig())
    assert found["conflicts"] == pytest.approx((5 / 3 + 2) / 2)
    assert found["conflicts_total"] == pytest.approx(5 / 3 + 2)
    # Majority of a: the answer 2 2; of b: three answers, so the earliest.
    assert found["conflicts_majority@3"] == pytest.approx((1 + 0) / 2)
    assert found["conflicts_value@3"] == pytest.approx((3 + 4) / 2)
    assert found["conflicts_value_total@3"] == pytest.approx(7)
    assert found["conflicts_majority@1"] == found["conflicts_value@1"] == pytest.approx(1.5)
    assert found["conflicts_low"] <= found["conflicts"] <= found["conflicts_high"]
    assert measured(selected(ROWS, [], (1, 3)), EvaluateConfig()) == {}


def test_generated_answers_are_counted_once_and_held_against_the_known() -> None:
    rows = pl.DataFrame(
        {
            "trajectory": list(range(6)),
            "prediction": [[1, 1], [1, 1], [2, 1], [1, 2], [2, 2], [1, 1]],
            "valid": [True, True, True, True, False, True],
        }
    )
    found = generated(rows, {bytes([1, 1])}, EvaluateConfig(widths=(2, 6)))
    assert found == {
        "unique@2": 0.5,
        "novel@2": 0.0,
        "unique@6": pytest.approx(3 / 5),
        "novel@6": pytest.approx(2 / 3),
    }
    nothing = rows.with_columns(valid=pl.lit(False))
    assert generated(nothing, set(), EvaluateConfig(widths=(6,))) == {}


def test_the_interval_of_a_single_input_is_over_its_trajectories() -> None:
    rows = pl.DataFrame(
        {
            "puzzle_id": ["blank"] * 40,
            "trajectory": list(range(40)),
            "depth": [4] * 40,
            "prediction": [[i % 7] for i in range(40)],
            "valid": [i % 4 != 0 for i in range(40)],
            "value": [0.5] * 40,
            "halted": [True] * 40,
            "steps": [2] * 40,
        }
    )
    counts = pl.DataFrame({"puzzle_id": ["blank"], "solution_count": [288]})
    config = EvaluateConfig(widths=(40,))
    puzzles = puzzle_table(rows.lazy(), counts.lazy(), (40,))
    accuracy = summarise(puzzles, 40, 4, config)["accuracy"]
    assert accuracy.value == 0.75
    assert (accuracy.low, accuracy.high) == wilson(30, 40)
