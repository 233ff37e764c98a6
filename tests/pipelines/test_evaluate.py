"""Evaluation through the pipeline: its own numbers and bounds by hand, damage named."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from workspace import contents, make_data, make_run, params, write_params

from gram_core import tables
from gram_core.errors import GramError
from gram_core.evaluate.bound import bound
from gram_core.evaluate.metrics import EvaluateConfig, ratio
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.model.store import load_model
from gram_core.noise import step_noise, trajectory_key
from gram_core.sample.trajectory import SampleConfig
from pipelines import evaluate as stage
from pipelines.dataset import examples, held_out
from pipelines.evaluate import evaluate, whole_puzzles
from pipelines.params import load_run

TABLE = Path("results/tiny/trajectories.parquet")
BOUNDS = ("bound", "bound_surrogate", "bound_reconstruction", "bound_divergence")


def test_deterministic_twin_gives_one_answer(data: Path) -> None:
    write_params(params(runs__tiny__model__guidance="none"))
    found = make_run()
    frame = pl.read_parquet(TABLE)
    distinct = frame.group_by("puzzle_id", "depth").agg(pl.col("prediction").n_unique())
    assert distinct["prediction"].to_list() == [1] * len(distinct)
    for name in ("coverage", "any_valid", "majority", "best_of_value"):
        assert found[f"{name}@3"] == found[f"{name}@1"]
    assert "bound" not in found


@pytest.mark.parametrize(
    ("changes", "bands"),
    [
        ({}, {"accuracy"}),
        ({"runs__tiny__model__guidance": "none"}, set()),
        ({"runs__tiny__sample__temperature": 0.0}, set()),
        ({"runs__tiny__sample__stop_when_verified": True, "runs__tiny__sample__depths": []}, set()),
    ],
)
def test_one_input_has_the_interval_of_different_trajectories_alone(
    folder: Path, changes: dict[str, Any], bands: set[str]
) -> None:
    """Copies of one trajectory are one draw, and one puzzle has none over puzzles."""
    boards = {"kind": "sudoku_boards", "size": 4,
              "source": {"kind": "generate", "train": 4, "test": 2}}  # fmt: skip
    write_params(params(tasks={"boards": boards}, runs__tiny__task="boards", **changes))
    run = load_run("tiny")
    row = {"puzzle_id": "a", "width": 3, "depth": run.section("sample", SampleConfig).depth,
           "solution_count": 288, "accuracy": 1.0, "valid_count": 3, "distinct": 1,
           "distinct_valid": 1, "selected_majority": True, "selected_value": True,
           "selected_first_halt": True, "mean_steps": 1.0}  # fmt: skip
    config = run.section("evaluate", EvaluateConfig)
    rows = pl.DataFrame([{**row, "width": n, "valid_count": n} for n in config.widths])
    model = GRAM(run.section("model", ModelConfig), run.task.shape)
    found = stage._common(run, model, rows, run.section("sample", SampleConfig), config)
    assert {name.removesuffix("_low") for name in found if name.endswith("_low")} == bands
    assert ("any_valid@3" in found) == ("runs__tiny__sample__stop_when_verified" in changes)


def test_evaluation_writes_the_contracts_keys(whole: Path) -> None:
    found = evaluate(load_run("tiny"))
    assert json.loads(Path("results/tiny/metrics.json").read_text()) == found
    names = ("any_valid", "majority", "best_of_value", "best_of_verifier", "first_halt", "coverage")
    for width in (1, 3):
        for name in (*names, "coverage_pairs", "distinct"):
            key = f"{name}@{width}"
            slack = 1e-9  # of the resamples' sums
            assert found[f"{key}_low"] - slack <= found[key] <= found[f"{key}_high"] + slack
    assert found["bound"] == pytest.approx(
        found["bound_reconstruction"] - found["bound_divergence"], rel=1e-6
    )
    assert found["bound"] < 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "other table", "absent"])
def test_damaged_tables_are_named_and_nothing_is_lost(whole: Path, damage: str) -> None:
    content = TABLE.read_bytes()
    before = {k: v for k, v in contents(whole / "results").items() if "trajectories" not in k}
    if damage == "truncated":
        TABLE.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        TABLE.write_bytes(b"")
    elif damage == "other table":
        TABLE.write_bytes(Path("data/queens/test.parquet").read_bytes())
    else:
        TABLE.unlink()
    with pytest.raises(GramError, match=r"trajectories\.parquet: ") as caught:
        evaluate(load_run("tiny"))
    assert "\n" not in str(caught.value)
    after = {k: v for k, v in contents(whole / "results").items() if "trajectories" not in k}
    assert after == before


def test_trajectories_of_other_settings_are_refused(whole: Path) -> None:
    write_params(params(runs__tiny__sample__width=4, runs__tiny__evaluate__widths=[4]))
    with pytest.raises(GramError, match="every puzzle, trajectory and depth once"):
        evaluate(load_run("tiny"))
    write_params(params(tasks__queens__split__seed=9))
    make_data()
    with pytest.raises(GramError, match="not in both this table and the test table"):
        evaluate(load_run("tiny"))


@pytest.mark.parametrize("rows", [1, 4, 9, 10, 1 << 16])
def test_puzzles_come_whole_however_the_table_is_read(
    whole: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """A puzzle has nine rows here, of three trajectories at three depths."""
    monkeypatch.setattr(tables, "batches", partial(tables.batches, rows=rows))
    parts = list(whole_puzzles(TABLE))
    assert pl.concat(parts).equals(pl.read_parquet(TABLE))
    of = [set(part["puzzle_id"]) for part in parts]
    assert sum(map(len, of)) == len(set.union(*of)), "each puzzle is in one part"
    assert max(map(len, parts)) < rows + 9, "and no more is held than was read and a puzzle"


def by_hand(rows: list[dict[str, Any]], width: int) -> dict[str, int]:
    """The trajectory of one puzzle that each selector chooses."""
    first = [row for row in rows if row["trajectory"] < width]
    votes = Counter(tuple(row["prediction"]) for row in first)
    return {
        "majority": min(
            first, key=lambda row: (-votes[tuple(row["prediction"])], row["trajectory"])
        )["trajectory"],
        "value": min(first, key=lambda row: (-row["value"], row["trajectory"]))["trajectory"],
    }


def test_tokens_are_held_against_the_one_known_answer(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all trajectories and of the selected ones, at the run's depth; padding does not count."""
    run = load_run("tiny")
    puzzles, _ = held_out(run.task_name, run.task, [])
    rng = np.random.default_rng(0)
    # The answer to each is made up: what the first trajectory says with some tokens other.
    known, frame = {}, pl.read_parquet(TABLE).filter(pl.col("depth") == 2)
    for row in frame.filter(pl.col("trajectory") == 0).to_dicts():
        answer = np.where(rng.random(25) < 0.3, rng.integers(0, 3, 25), row["prediction"])
        known[row["puzzle_id"]] = answer.astype(np.uint8)
    one = {name: {answer.tobytes()} for name, answer in known.items()}
    monkeypatch.setattr(stage, "held_out", lambda *_: (puzzles, one))
    found = evaluate(run)
    shares: dict[str, list[float]] = {}
    for name, answer in known.items():
        rows = frame.filter(pl.col("puzzle_id") == name).sort("trajectory").to_dicts()
        right = [
            [p == a for p, a in zip(row["prediction"], answer, strict=True) if a] for row in rows
        ]
        each = [sum(cells) / len(cells) for cells in right]
        shares.setdefault("token_accuracy", []).append(sum(each) / 3)
        for width in (1, 3):
            for selector, trajectory in by_hand(rows, width).items():
                key = f"token_accuracy_{selector}@{width}"
                shares.setdefault(key, []).append(each[trajectory])
    assert len(set(shares["token_accuracy_value@3"])) > 3
    for name, values in shares.items():
        assert found[name] == pytest.approx(np.mean(values), rel=1e-12), name
        label, _, width = name.partition("@")
        total = found[f"{label}_total" + (f"@{width}" if width else "")]
        assert total == pytest.approx(sum(values), rel=1e-12), name
    # With several answers to an input there is no one to hold tokens against.
    first = next(iter(one))
    one[first].add(bytes(25))
    assert not any("token" in name for name in evaluate(run))


@pytest.mark.parametrize("rollout", ["prior", "posterior"])
def test_bounds_are_means_over_the_test_pairs_each_with_noise_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rollout: str
) -> None:
    changes = {
        "tasks__queens__remove": [3, 4],
        "runs__tiny__objective": {
            "beta": 1.5, "rollout": rollout, "cross_entropy": "stablemax",
        },
        "runs__tiny__evaluate__seed": 3,
    }  # fmt: skip
    write_params(params(**changes))
    make_data()
    run = load_run("tiny")
    monkeypatch.setattr(stage, "POSITIONS", 25 * 7)  # seven pairs at a time
    found = make_run()
    model, _ = load_model(Path("models/tiny"))
    pairs = examples(run.task_name, run.task, "test")
    assert len(pairs) > 14
    each: dict[str, list[float]] = {name: [] for name in BOUNDS}
    for row in range(len(pairs)):
        key = trajectory_key(3, f"bound of pair {row}", 0)
        of = bound(
            model, pairs.inputs[row : row + 1], pairs.target[row : row + 1],
            lambda n, key=key: step_noise(key, n, (2, 25, 16))[:, None],
            rollout=run.entry["objective"]["rollout"], likelihood="stablemax",
        )  # fmt: skip
        values = (of.full, of.surrogate, -of.reconstruction, of.divergence)
        for name, value in zip(BOUNDS, values, strict=True):
            each[name].append(float(value))
    inputs = [row.tobytes() for row in pairs.inputs.numpy()]
    several = [values for values in Counter(inputs).values() if values > 1]
    assert several, "intervals are over inputs, not pairs"
    for name, values in each.items():
        assert found[name] == pytest.approx(np.mean(values), rel=1e-5), name
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    # An input's pairs are resampled together.
    own = [[v for v, i in zip(each["bound"], inputs, strict=True) if i == name] for name in
           sorted(set(inputs))]  # fmt: skip
    sums, sizes = np.array([sum(values) for values in own]), np.array([len(v) for v in own])
    wanted = ratio(sums, sizes.astype(float), 100, 3, share=False)
    assert found["bound_low"] == pytest.approx(wanted.low, rel=1e-5)
    assert found["bound_high"] == pytest.approx(wanted.high, rel=1e-5)


def test_some_pairs_stand_for_all_where_there_are_more(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn from all over the table by the seed, each once."""
    seen: list[torch.Tensor] = []

    def noted(model: Any, inputs: torch.Tensor, target: torch.Tensor, *a: Any, **k: Any) -> Any:
        seen.append(torch.cat([inputs, target], 1))
        return bound(model, inputs, target, *a, **k)

    monkeypatch.setattr(stage, "bound", noted)
    pairs = examples("queens", load_run("tiny").task, "test")
    place = {
        torch.cat([i, t]).numpy().tobytes(): number
        for number, (i, t) in enumerate(zip(pairs.inputs, pairs.target, strict=True))
    }
    chosen = []
    for seed in (0, 1):
        seen.clear()
        write_params(params(runs__tiny__evaluate__bound_pairs=9, runs__tiny__evaluate__seed=seed))
        evaluate(load_run("tiny"))
        chosen.append([place[row.numpy().tobytes()] for row in torch.cat(seen)])
    for rows in chosen:
        assert len(set(rows)) == 9
        assert rows == sorted(rows)
        assert max(rows) > len(pairs) // 2
    assert chosen[0] != chosen[1]
