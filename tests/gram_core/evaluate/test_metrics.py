import math
from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_core.config import ConfigError, load
from gram_core.evaluate import metrics as metrics_module
from gram_core.evaluate.metrics import (
    EvaluateConfig,
    by_solution_count,
    metrics,
    puzzle_table,
    ratio,
    summarise,
    wilson,
)
from gram_core.tables import puzzles_schema, trajectories_schema
from gram_core.tasks.nqueens import board_key, completions

Row = dict[str, Any]
WIDTHS = (1, 2, 5)
QUICK = EvaluateConfig(widths=WIDTHS, resamples=100)


@st.composite
def trajectory_rows(draw) -> tuple[list[Row], dict[str, int]]:
    """Five trajectories of a few puzzles at two depths, with many ties; and solution counts.

    Answers are few, so that they repeat; the first `good` of them are valid."""
    rows, counts = [], {}
    for p in range(draw(st.integers(1, 4))):
        puzzle, good = f"p{p}", draw(st.integers(0, 3))
        counts[puzzle] = max(1, good) + draw(st.integers(0, 2))
        for depth in (2, 4):
            for trajectory in range(5):
                answer, halted = draw(st.integers(0, 3)), draw(st.booleans())
                steps = draw(st.integers(1, depth)) if halted else depth
                rows.append(
                    {
                        "puzzle_id": puzzle, "trajectory": trajectory, "depth": depth, "seed": 0,
                        "steps": steps, "halted": halted,
                        "value": draw(st.sampled_from([-1.0, 0.25, 0.5])),
                        "prediction": [answer, 1, 2], "valid": answer < good, "exact": False,
                    }
                )  # fmt: skip
    return draw(st.permutations(rows)), counts


def frames(rows: list[Row], counts: dict[str, int]) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """The two tables; the second with a puzzle in several rows, as in the dataset."""
    table = pl.from_arrow(pa.Table.from_pylist(rows, schema=trajectories_schema(3)))
    ids = [puzzle for puzzle in counts for _ in range(2)]
    puzzles = pl.DataFrame(
        {"puzzle_id": ids, "solution_count": [counts[p] for p in ids]},
        schema_overrides={"solution_count": pl.UInt32},
    )
    return table.lazy(), puzzles.lazy()


def brute_puzzle(rows: list[Row], count: int) -> Row:
    """One puzzle at one width and depth, in plain Python."""
    rows = sorted(rows, key=lambda r: r["trajectory"])
    answers = [tuple(r["prediction"]) for r in rows]
    votes = Counter(answers)
    majority = next(
        r for r, a in zip(rows, answers, strict=True) if votes[a] == max(votes.values())
    )
    value = next(r for r in rows if r["value"] == max(q["value"] for q in rows))
    runners = [r for r in rows if r["halted"]]
    fewest = min((r["steps"] for r in runners), default=0)
    runners = [r for r in runners if r["steps"] == fewest] or rows
    first = next(r for r in runners if r["value"] == max(q["value"] for q in runners))
    right = {a for r, a in zip(rows, answers, strict=True) if r["valid"]}
    return {
        "solution_count": count,
        "selected_majority": majority["valid"],
        "selected_value": value["valid"],
        "selected_first_halt": first["valid"],
        "accuracy": sum(r["valid"] for r in rows) / len(rows),
        "coverage": len(right) / count if count else None,
        "valid_count": sum(r["valid"] for r in rows),
        "distinct_valid": len(right),
        "distinct": len(set(answers)),
        "mean_steps": sum(r["steps"] for r in rows) / len(rows),
    }


def brute_table(rows: list[Row], counts: dict[str, int]) -> list[Row]:
    return [
        {"puzzle_id": puzzle, "width": width, "depth": depth}
        | brute_puzzle(
            [
                r
                for r in rows
                if (r["puzzle_id"], r["depth"]) == (puzzle, depth) and r["trajectory"] < width
            ],
            counts[puzzle],
        )
        for depth in (2, 4)
        for width in WIDTHS
        for puzzle in sorted(counts)
    ]


@given(trajectory_rows())
@settings(max_examples=25, deadline=None)
def test_the_puzzle_table_is_the_reduction_in_plain_python(case):
    rows, counts = case
    table = puzzle_table(*frames(rows, counts), WIDTHS)
    assert set(table.columns) == set(puzzles_schema().names)
    expected = brute_table(rows, counts)
    assert len(table) == len(expected)
    for row, wanted in zip(table.to_dicts(), expected, strict=True):
        assert row == pytest.approx(wanted)


@given(trajectory_rows())
@settings(max_examples=25, deadline=None)
def test_the_summary_is_the_sums_in_plain_python(case):
    rows, counts = case
    table = puzzle_table(*frames(rows, counts), WIDTHS)
    for width in WIDTHS:
        at = [r for r in brute_table(rows, counts) if (r["width"], r["depth"]) == (width, 4)]
        n, pairs = len(at), sum(r["solution_count"] for r in at)
        several = [r for r in at if r["solution_count"] > 1]
        expected = {
            "accuracy": sum(r["accuracy"] for r in at) / n,
            "accuracy_pairs": sum(r["accuracy"] * r["solution_count"] for r in at) / pairs,
            "any_valid": sum(r["valid_count"] > 0 for r in at) / n,
            "best_of_verifier": sum(r["distinct_valid"] > 0 for r in at) / n,
            "majority": sum(r["selected_majority"] for r in at) / n,
            "best_of_value": sum(r["selected_value"] for r in at) / n,
            "first_halt": sum(r["selected_first_halt"] for r in at) / n,
            "distinct": sum(r["distinct"] for r in at) / n,
            "steps": sum(r["mean_steps"] for r in at) / n,
            "coverage": sum(r["coverage"] for r in at) / n,
            "coverage_pairs": sum(r["distinct_valid"] for r in at) / pairs,
            "coverage_deterministic": sum(1 / r["solution_count"] for r in at) / n,
            "coverage_pairs_deterministic": n / pairs,
        }
        if several:
            total = sum(r["solution_count"] for r in several)
            expected["coverage_multi"] = sum(r["distinct_valid"] for r in several) / total
            expected["coverage_multi_deterministic"] = len(several) / total
        found = summarise(table, width, 4, QUICK)
        ideals = {name for name in found if name.endswith("_ideal")}
        assert set(found) - ideals == set(expected)
        assert len(ideals) == (3 if several else 2)
        for name, value in expected.items():
            assert found[name].value == pytest.approx(value), name
            assert found[name].low - 1e-9 <= value <= found[name].high + 1e-9, name


def small_case(counts: dict[str, int]) -> pl.DataFrame:
    """Trajectory j of puzzle p gives answer j % (p + 1); all of them are valid."""
    rows = [
        {
            "puzzle_id": puzzle, "trajectory": j, "depth": 4, "seed": 0, "steps": 4,
            "halted": False, "value": 0.0, "prediction": [j % (p + 1), 1, 2], "valid": True,
            "exact": False,
        }
        for p, puzzle in enumerate(counts)
        for j in range(5)
    ]  # fmt: skip
    return puzzle_table(*frames(rows, counts), WIDTHS)


def test_where_solution_counts_are_unknown_there_is_no_coverage():
    table = small_case({"a": 0, "b": 0})
    assert table["coverage"].null_count() == len(table)
    found = summarise(table, 5, 4, QUICK)
    assert found["distinct"].value == 1.5
    assert not [name for name in found if name.startswith("coverage") or name == "accuracy_pairs"]


def test_a_width_or_depth_that_was_not_sampled_is_an_error():
    table = small_case({"a": 1})
    for width, depth in ((3, 4), (5, 8)):
        with pytest.raises(ValueError, match=f"no puzzle at width {width} and depth {depth}"):
            summarise(table, width, depth, QUICK)


def test_metrics_are_flat_keys_with_intervals_and_widths():
    table = small_case({"a": 1, "b": 2, "c": 4})
    flat = metrics(table, 4, QUICK)
    for width in WIDTHS:
        found = summarise(table, width, 4, QUICK)
        for end in ("value", "low", "high"):
            key = f"coverage@{width}" + ("" if end == "value" else f"_{end}")
            assert flat[key] == getattr(found["coverage"], end)
    assert flat["coverage@5"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert flat["coverage_multi@5"] == pytest.approx(5 / 6)
    assert flat["accuracy"] == 1.0
    assert "accuracy@5" not in flat
    assert all(f"{key}_low" in flat for key in flat if not key.endswith(("_low", "_high")))


def test_by_solution_count_groups_puzzles_by_their_number_of_solutions():
    table = small_case({"a": 1, "b": 2, "c": 4, "d": 4})
    rows = by_solution_count(table, 5, 4, QUICK).to_dicts()
    found = {(r["solution_count"], r["metric"]): (r["puzzles"], r["value"]) for r in rows}
    # Puzzle number p has p + 1 distinct valid answers among five.
    assert found[1, "coverage"] == (1, 1.0)
    assert found[2, "coverage"] == (1, 1.0)
    assert found[4, "coverage"] == (2, (3 / 4 + 1) / 2)
    assert found[4, "accuracy"] == (2, 1.0)
    assert [r["solution_count"] for r in rows] == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    for row in rows:  # a single puzzle says nothing of others
        interval = row["low"], row["high"]
        if row["puzzles"] == 1:
            assert interval == (None, None)
        else:
            assert interval[0] <= row["value"] <= interval[1]


# Intervals


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe (1998), Table I, method 3: Wilson's score interval.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, count, low, high):
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=50, deadline=None)
def test_wilson_solves_the_score_equation(case):
    successes, count = case
    share = successes / count
    for bound in wilson(successes, count):
        # (share - p)^2 = z^2 p (1 - p) / n, but for the ends 0 and 1 that are cut off.
        assert (share - bound) ** 2 == pytest.approx(
            1.959963984540054**2 * bound * (1 - bound) / count, abs=1e-9
        )


def test_shares_of_puzzles_get_wilsons_interval():
    right = np.array([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    estimate = ratio(right, np.ones(10), 100, 0)
    assert (estimate.value, estimate.low, estimate.high) == (0.8, *wilson(8, 10))


def test_the_bootstrap_interval_is_that_of_resampling_puzzles(rng):
    numerator, denominator = rng.random(40), 1.0 + rng.integers(0, 5, 40)
    estimate = ratio(numerator, denominator, 4000, 0)
    draws = []
    for _ in range(4000):
        chosen = rng.integers(0, 40, 40)
        draws.append(numerator[chosen].sum() / denominator[chosen].sum())
    low, high = np.quantile(draws, (0.025, 0.975))
    # The difference of two quantiles of 4000 draws has a standard error of 1.5% of the interval's
    # width; a 90% interval would be off by 8% of it at each end.
    width = high - low
    assert estimate.value == pytest.approx(numerator.sum() / denominator.sum())
    assert estimate.low == pytest.approx(low, abs=0.05 * width)
    assert estimate.high == pytest.approx(high, abs=0.05 * width)


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says(rng):
    hits = 0
    for _ in range(400):
        denominator = 1.0 + rng.integers(0, 4, 60)
        numerator = rng.binomial(denominator.astype(int), 0.3) / 1.0
        estimate = ratio(numerator, denominator, 300, 0)
        hits += estimate.low <= 0.3 <= estimate.high
    # 95% of 400, less three standard errors and the percentile interval's small-sample loss.
    assert 0.89 < hits / 400 < 0.99


def test_means_that_are_no_shares_are_resampled_even_where_all_are_0_or_1(rng):
    counts = rng.integers(0, 2, 50).astype(float)
    share, mean = (ratio(counts, np.ones(50), 500, 0, share=s) for s in (True, False))
    assert (share.low, share.high) == wilson(counts.sum(), 50)
    assert (mean.low, mean.high) != (share.low, share.high)
    # A count of at least one of what there is cannot lie below one.
    ones = ratio(np.ones(50), np.ones(50), 500, 0, share=False)
    assert (ones.low, ones.value, ones.high) == (1.0, 1.0, 1.0)


def test_distinct_answers_and_steps_are_no_shares():
    alike = solved([1, 2, 3], width=1)
    found = summarise(alike.with_columns(mean_steps=pl.lit(1.0)), 1, 4, QUICK)
    for name in ("distinct", "steps"):
        assert (found[name].low, found[name].high) == (1.0, 1.0), name
    assert found["accuracy"].low == wilson(3, 3)[0] < 1


def test_all_resamples_are_those_of_one_draw_and_need_a_byte_a_number(monkeypatch, rng):
    weights = metrics_module._bootstrap_weights(300, 200, 7)
    whole = np.random.default_rng(7).multinomial(300, np.full(300, 1 / 300), 200)
    assert weights.itemsize == 1 and (weights == whole).all()
    numerator, denominator = rng.random(300), 1.0 + rng.integers(0, 3, 300)
    one = ratio(numerator, denominator, 200, 7)
    monkeypatch.setattr(metrics_module, "CELLS", 1000)  # three resamples at a time
    parts = ratio(numerator, denominator, 200, 7)
    assert (parts.low, parts.high) == pytest.approx((one.low, one.high), rel=1e-12)


def test_a_resample_without_any_counted_puzzle_does_no_harm():
    numerator, denominator = np.array([1.0, 0, 0]), np.array([2.0, 0, 0])
    estimate = ratio(numerator, denominator, 200, 0)
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)


# What an ideal sampler and a perfect deterministic solver get


def board_counts(n: int, remove: tuple[int, ...]) -> list[int]:
    return Counter(board_key(completions(n, remove)[0]).tolist()).values()


def solved(counts: list[int], width: int, found: int = 1) -> pl.DataFrame:
    """A solver whose trajectories are all valid and give `found` answers to each puzzle."""
    size = len(counts)
    return pl.DataFrame(
        {
            "puzzle_id": [str(i) for i in range(size)], "width": [width] * size,
            "depth": [4] * size, "solution_count": counts, "accuracy": [1.0] * size,
            "selected_majority": [True] * size, "selected_value": [True] * size,
            "selected_first_halt": [True] * size, "coverage": [found / c for c in counts],
            "valid_count": [width] * size, "distinct_valid": [found] * size,
            "distinct": [found] * size, "mean_steps": [4.0] * size,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("n", "remove", "mean", "pooled", "multi", "ideal"),
    [(8, (5, 6, 7), 0.80, 0.61, 0.35, 0.997), (10, (7, 8, 9), 0.59, 0.34, 0.25, 0.987)],
)
def test_a_deterministic_solver_covers_what_enumeration_says(n, remove, mean, pooled, multi, ideal):
    found = summarise(solved(list(board_counts(n, remove)), 20), 20, 4, QUICK)
    for suffix in ("", "_deterministic"):
        assert found[f"coverage{suffix}"].value == pytest.approx(mean, abs=0.005)
        assert found[f"coverage_pairs{suffix}"].value == pytest.approx(pooled, abs=0.005)
        assert found[f"coverage_multi{suffix}"].value == pytest.approx(multi, abs=0.005)
    assert found["coverage_ideal"].value == pytest.approx(ideal, abs=0.0005)


def test_the_ideal_is_what_uniform_draws_from_the_solutions_cover(rng):
    counts, width, games = [1, 2, 3, 7, 18], 5, 4000
    found = summarise(solved(counts, width), width, 4, QUICK)
    covered = np.array(
        [[len(set(rng.integers(0, c, width).tolist())) for c in counts] for _ in range(games)]
    )
    c = np.array(counts)
    readings = {
        "coverage_ideal": (covered / c).mean(1),
        "coverage_pairs_ideal": covered.sum(1) / c.sum(),
        "coverage_multi_ideal": covered[:, 1:].sum(1) / c[1:].sum(),
    }
    for name, draws in readings.items():
        # Five standard errors of the simulation's mean.
        tolerance = 5 * draws.std() / math.sqrt(games)
        assert found[name].value == pytest.approx(draws.mean(), abs=tolerance)


@pytest.mark.parametrize(
    ("settings_", "key"), [({"widths": [0]}, "widths"), ({"resamples": 10}, "resamples")]
)
def test_settings_out_of_range_name_the_key(settings_, key):
    with pytest.raises(ConfigError, match=rf"^evaluate\.{key}"):
        load(EvaluateConfig, settings_, "evaluate")


@pytest.mark.parametrize("widths", [[], [5, 5], [1, 5, 1]])
def test_a_width_counts_once(widths: list[int]) -> None:
    """Twice the same puzzles would make every interval too narrow."""
    with pytest.raises(ConfigError, match="widths: expected one or more, each once"):
        load(EvaluateConfig, {"widths": widths}, "evaluate")
