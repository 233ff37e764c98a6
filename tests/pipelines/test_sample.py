"""Sampling and evaluation through the pipeline: workers do not show, damage does."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import ray
import torch
from ray.actor import ActorClass
from ray.remote_function import RemoteFunction
from workspace import make_run, params, write_params

from gram_core import tables
from gram_core.errors import GramError
from gram_core.model.store import load_model
from gram_core.sample.trajectory import SampleConfig, rollout
from gram_core.tasks.nqueens import NQueens
from pipelines.dataset import held_out
from pipelines.evaluate import evaluate
from pipelines.params import load_run
from pipelines.provenance import computer
from pipelines.runtime import environment, threads
from pipelines.sample import _Bar, patience, sample_run
from pipelines.train import train_run

TABLE = Path("results/tiny/trajectories.parquet")


def sampled(**changes: object) -> pl.DataFrame:
    """The trajectories that these sample settings give."""
    write_params(params(**{f"runs__tiny__sample__{key}": value for key, value in changes.items()}))
    sample_run(load_run("tiny"))
    frame = pl.from_arrow(tables.read(TABLE, "trajectories"))
    assert isinstance(frame, pl.DataFrame)
    return frame


def test_table_has_every_puzzle_trajectory_and_depth(whole: Path) -> None:
    frame = sampled()
    puzzles = pl.read_parquet("data/queens/test.parquet")["puzzle_id"].n_unique()
    keys = frame.select("puzzle_id", "trajectory", "depth")
    assert len(keys.unique()) == len(keys) == puzzles * 3 * 3
    assert frame["depth"].unique().sort().to_list() == [1, 2, 3]
    assert (frame["steps"] <= frame["depth"]).all()


def test_the_table_says_what_the_rollout_did(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column, at every depth; of every second puzzle the first answer is a known one."""
    from pipelines import sample

    write_params(params())
    run = load_run("tiny")
    config = run.section("sample", SampleConfig)
    puzzles, _ = held_out(run.task_name, run.task, [])
    model, _ = load_model(Path("models/tiny"))
    result = rollout(model, puzzles, config)
    known = {
        name: {result.prediction[-1, i * 3].tobytes() if i % 2 else bytes(25)}
        for i, name in enumerate(puzzles.ids)
    }
    monkeypatch.setattr(sample, "held_out", lambda *_: (puzzles, known))
    frame = sampled().sort("puzzle_id", "trajectory", "depth")
    rows = frame.to_dicts()
    place = {name: i for i, name in enumerate(puzzles.ids)}
    for row in rows:
        i, k = place[row["puzzle_id"]], result.depths.index(row["depth"])
        job = 3 * i + row["trajectory"]
        answer = np.array(row["prediction"], np.uint8)
        assert answer.tolist() == result.prediction[k, job].tolist()
        assert (row["steps"], row["halted"]) == (result.steps[k, job], result.halted[k, job])
        assert row["value"] == pytest.approx(result.value[k, job], abs=1e-5)
        assert row["exact"] == (answer.tobytes() in known[row["puzzle_id"]])
        valid = run.task.verify(puzzles.inputs[i][None], torch.from_numpy(answer)[None])
        assert row["valid"] == bool(valid)
    assert {row["exact"] for row in rows} == {True, False}
    assert {row["steps"] for row in rows} == {1, 2, 3}


def test_batch_and_compaction_do_not_show(whole: Path) -> None:
    # Of the 13,500 tokens of seed 0 one has its best two logits 6e-6 apart: less than what three
    # steps of so small a model make of the last bit of torch's products, fused or not (3e-5).
    one = sampled(batch=1, seed=1)
    for other in (sampled(batch=64, seed=1), sampled(batch=7, compaction=False, seed=1)):
        # Matrix products of another batch size may round otherwise; answers may not change.
        assert other.drop("value").equals(one.drop("value"))
        assert other["value"].to_list() == pytest.approx(one["value"].to_list(), abs=1e-5)


def test_stopping_when_verified_draws_until_one_is_valid(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small a model is never right: a rule that accepts about a third of all answers.
    monkeypatch.setattr(NQueens, "verify", lambda self, i, a: (a.int() * i).sum(-1) % 3 == 0)
    changes = {"runs__tiny__sample__depths": [], "runs__tiny__sample__stop_when_verified": True}
    write_params(params(**changes))
    sample_run(load_run("tiny"))
    frame = pl.read_parquet(TABLE)
    for _, rows in frame.sort("trajectory").group_by("puzzle_id"):
        valid = rows["valid"].to_list()
        last = valid.index(True) if True in valid else 2
        assert [steps > 0 for steps in rows["steps"]] == [j <= last for j in range(3)]
    assert 0 < frame.filter(pl.col("trajectory") == 1)["steps"].sum() < len(frame) // 3 * 2
    found = evaluate(load_run("tiny"))
    names = {name.partition("@")[0].removesuffix("_low").removesuffix("_high") for name in found}
    assert {"any_valid", "best_of_verifier", "steps"} <= names
    assert not names & {"accuracy", "coverage", "majority", "best_of_value"}
    assert set(pl.read_csv("results/tiny/scaling.csv")["metric"]) == {
        "any_valid", "best_of_verifier", "steps",
    }  # fmt: skip
    first = frame.filter(pl.col("trajectory") == 0)["valid"].mean()
    assert found["any_valid@1"] == pytest.approx(first)


@pytest.mark.ray
def test_workers_do_not_show(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipelines import cluster

    boards: list[cluster.Board] = []
    begin = cluster.Board

    def counted() -> cluster.Board:
        boards.append(begin())
        return boards[-1]

    monkeypatch.setattr(cluster, "Board", counted)
    here = sampled()
    capfd.readouterr()
    two = sampled(concurrency=2)
    assert "100%|" in capfd.readouterr().err, "the bar hears of finished blocks"
    assert not boards, "short blocks need no messages"
    monkeypatch.setattr("pipelines.sample.LONG", 0.0)
    one = sampled(concurrency=1)
    assert "100%|" in capfd.readouterr().err, "the bar hears from within long blocks"
    assert len(boards) == 1
    made = tables.provenance(tables.read(TABLE, "trajectories"))
    assert made["workers"] == [computer(threads())], "one worker has every core"
    for other in (one, two):
        assert other.drop("value").equals(here.drop("value"))
        assert other["value"].to_list() == pytest.approx(here["value"].to_list(), abs=1e-5)


@pytest.mark.ray
def test_workers_that_ask_for_a_gpu_sample_too(whole: Path) -> None:
    """Ray counts one here that torch does not see: what is asked of Ray is what it is on a GPU."""
    here = sampled()
    ray.init(
        "local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": environment()},
    )  # fmt: skip
    try:
        there = sampled(concurrency=1)
    finally:
        ray.shutdown()
    assert there.drop("value").equals(here.drop("value"))


def test_the_wait_that_is_lengthened_is_the_one_that_ray_reads() -> None:
    from ray.data._internal.execution import streaming_executor_state as executor

    read = executor.process_completed_tasks.__code__.co_names
    assert "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S" in read


@pytest.mark.ray
def test_ray_runs_nothing_beside_the_workers(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A task needs a process of its own, which starts beside the workers and stays; so does an
    # actor.
    asked: list[str] = []

    def note(kind: type, name: Callable[[Any], str]) -> None:
        original = kind._remote

        def noted(self: Any, *arguments: object, **options: object) -> object:
            asked.append(name(self))
            return original(self, *arguments, **options)

        monkeypatch.setattr(kind, "_remote", noted)

    note(RemoteFunction, lambda function: function._function_name)
    note(ActorClass, lambda actor: actor.__ray_metadata__.class_name)
    sampled(concurrency=1, max_concurrency=2)
    assert asked == ["MapWorker(MapBatches(Sampler))"] * 2, "and the pool grows where blocks wait"


def test_workers_import_nothing_that_only_the_stage_needs() -> None:
    program = (
        "import sys, pipelines.sampler\n"
        "print([name for name in ('pipelines.params', 'networkx', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_block_begun_again_takes_back_what_the_bar_had() -> None:
    with _Bar("tiny", 12, 2) as bar:
        seen = []
        for done in (5, 2, 9):
            bar(1, done)
            seen.append(bar.bar.n)
    assert seen == [7, 4, 11]


def test_workers_of_short_blocks_are_not_kept_waiting() -> None:
    assert [patience(seconds) for seconds in (0.01, 1.5, 60)] == pytest.approx([0.1, 0.3, 0.5])


@pytest.mark.ray
def test_the_pace_follows_what_is_left(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest: list[float] = []

    def noted(seconds: float) -> float:
        longest.append(seconds)
        return patience(seconds)

    monkeypatch.setattr("pipelines.sample.patience", noted)
    sampled(concurrency=1)
    assert longest == sorted(longest, reverse=True)
    assert longest[0] > 0 == longest[-1]


def test_damaged_weights_are_named(whole: Path) -> None:
    path = whole / "models/tiny/model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    table = TABLE.read_bytes()
    with pytest.raises(GramError, match="does not match the checksum"):
        sample_run(load_run("tiny"))
    assert TABLE.read_bytes() == table


@pytest.mark.parametrize("guidance", ["stochastic_only", "guide_only"])
def test_ablated_guidance_runs_through(data: Path, guidance: str) -> None:
    write_params(params(runs__tiny__model__guidance=guidance))
    found = make_run()
    assert ("bound" in found) == (guidance == "stochastic_only")


def test_flat_recursion_without_deep_supervision_runs_through(data: Path) -> None:
    write_params(
        params(runs__tiny__model__hierarchical=False, runs__tiny__model__deep_supervision=False)
    )
    found = train_run(load_run("tiny"))
    assert found["steps"] == 12
    sample_run(load_run("tiny"))
    assert evaluate(load_run("tiny"))["bound"] < 0


def test_a_cluster_that_is_not_there_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(GramError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 ") as caught:
        sampled(concurrency=1)
    assert "\n" not in str(caught.value)
