"""Sweeps: searches and schedulers, a killed one, the table, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from ruamel.yaml import YAML
from s3 import S3Server
from workspace import REPOSITORY, child_environment, make_data, params, write_params

from gram_core import tables
from gram_core.config import ConfigError
from gram_core.errors import GramError
from pipelines.cluster import cluster
from pipelines.lock import alone
from pipelines.params import FILE, read_params
from pipelines.promote import promotion
from pipelines.provenance import computer
from pipelines.space import load_sweep, run_with
from pipelines.sweep import (
    _computers,
    _fits,
    _optuna,
    _place,
    _scheduler,
    _texts,
    sweep,
    trials_table,
)

TABLE = Path("results/sweeps/lr/trials.parquet")
SPACE = {"train.optim.lr": {"loguniform": [1e-3, 1e-2]}, "objective.beta": {"choice": [0.5, 2.0]}}


def document(**settings: Any) -> dict[str, Any]:
    """params.yaml with a sweep of the tiny run."""
    whole = params()
    whole["sweeps"] = {"lr": {"run": "tiny", "space": SPACE, "trials": 3, **settings}}
    return whole


def rows() -> list[dict[str, Any]]:
    """The table of trials, its maps as mappings."""
    found: list[dict[str, Any]] = tables.read(TABLE, "trials").to_pylist()
    for row in found:
        row["params"] = {key: json.loads(value) for key, value in row["params"]}
        row["metrics"] = dict(row["metrics"])
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with a sweep done, and the Ray it ran on."""
    path = tmp_path_factory.mktemp("swept")
    patch = pytest.MonkeyPatch()
    patch.chdir(path)
    write_params(document())
    make_data()
    try:
        with cluster(cpus=2):
            sweep("lr")
            yield path
    finally:
        patch.undo()


@pytest.fixture
def at(swept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(swept)
    return swept


@pytest.mark.ray
def test_table_has_a_row_a_trial_and_report(at: Path) -> None:
    found = rows()
    assert [(row["number"], row["step"]) for row in found] == [
        (number, step) for number in range(3) for step in (2, 4, 6, 8, 10, 12)
    ]
    for row in found:
        assert row["state"] == "TERMINATED"
        assert row["sweep"] == "lr"
        assert 1e-3 <= row["params"]["train.optim.lr"] <= 1e-2
        assert row["params"]["objective.beta"] in (0.5, 2.0)
        assert row["metrics"]["reconstruction"] > 0
        assert row["seconds"] > 0
    assert len({row["params"]["train.optim.lr"] for row in found}) == 3
    made = tables.provenance(tables.read(TABLE, "trials"))
    assert (made["run"], made["metric"], made["mode"]) == ("tiny", "prior_valid", "max")
    assert made["seed"] == 0 and made["packages"]["ray"] != "absent"
    assert made["workers"] == [computer(1)], "a trial has one core"
    assert not Path(".gram/sweeps/lr").exists(), "what was in progress is gone"


@pytest.mark.ray
def test_a_trial_trains_as_the_run_with_its_values_does(at: Path) -> None:
    from pipelines.train import train_run

    row = rows()[-1]
    config, whole = load_sweep("lr")
    train_run(run_with(whole, config, row["params"]))
    history = pl.read_csv("models/tiny/history.csv")
    for name in ("reconstruction", "kl"):
        assert history[name][-1] == pytest.approx(row["metrics"][name], rel=1e-4)


@pytest.mark.ray
def test_a_sweep_is_not_resumed_on_other_data(
    at: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    whole = document()
    write_params(whole)
    make_data()
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.sweep._tuner", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep("lr")
    whole["tasks"]["queens"]["split"]["seed"] = 1
    write_params(whole)
    make_data()
    with pytest.raises(GramError, match="its settings or its data have changed"):
        sweep("lr", resume=True)
    assert Path(".gram/sweeps/lr/sweep.json").exists()
    # On its own data it begins, for it was stopped before there was anything to go on with.
    whole["tasks"]["queens"]["split"]["seed"] = 0
    write_params(whole)
    make_data()
    assert sweep("lr", resume=True) == 18


def test_a_report_without_the_metric_does_not_end_optunas_search() -> None:
    """A term that did not occur in a report's window is left out of it."""
    from ray import tune

    search = _optuna(0)
    search.set_search_properties("prior_valid", "max", {"x": tune.uniform(0, 1)})
    assert search.suggest("a") is not None
    search.on_trial_result("a", {"training_iteration": 1, "kl": 2.0})
    search.on_trial_result("a", {"training_iteration": 2, "prior_valid": 0.25})
    search.on_trial_complete("a", {"training_iteration": 2, "prior_valid": 0.25})
    (trial,) = search._ot_study.trials
    assert trial.intermediate_values == {2: 0.25}
    assert trial.value == 0.25


def test_reports_tell_what_they_were_computed_on() -> None:
    """Those of an older program, and trials without any, tell nothing."""
    here, there = {"machine": "here", "threads": 1}, {"machine": "there", "threads": 2}
    frames = [
        None,
        pd.DataFrame(),
        pd.DataFrame({"step": [2]}),
        pd.DataFrame({"step": [2, 4, 6], "computer": [None, json.dumps(here), json.dumps(here)]}),
        pd.DataFrame({"step": [2, 4], "computer": [json.dumps(there), json.dumps(here)]}),
    ]
    told = _computers([SimpleNamespace(metrics_dataframe=frame) for frame in frames])
    assert told == [here, there, here]


def test_a_report_has_the_values_of_its_time() -> None:
    """PBT changes a trial's values on its way; Tune's configuration is the last one."""
    frame = pd.DataFrame(
        {
            "step": [2, 4], "timestamp": [10, 20], "time_total_s": [1.0, 2.0],
            "reconstruction": [0.5, 0.25], "config/train.optim.lr": [0.001, 0.0012],
        }
    )  # fmt: skip
    config = {"train.optim.lr": 0.0012, "train.batch": 8}
    result = SimpleNamespace(config=config, metrics_dataframe=frame, error=None)
    found = trials_table("lr", [result]).to_pylist()
    assert [dict(row["params"]) for row in found] == [
        {"train.optim.lr": "0.001", "train.batch": "8"},
        {"train.optim.lr": "0.0012", "train.batch": "8"},
    ]


@pytest.mark.ray
def test_the_best_trial_is_a_patch_that_applies(at: Path) -> None:
    patch = promotion("lr")
    best = max(
        (row for row in rows() if row["step"] == 12),
        key=lambda row: (row["metrics"].get("prior_valid", -1.0), -row["number"]),
    )
    before = Path("params.yaml").read_text()
    try:
        subprocess.run(["git", "apply", "-"], input=patch, text=True, check=True, cwd=at)
        after = YAML(typ="safe").load(Path("params.yaml").read_text())
        wanted = YAML(typ="safe").load(before)
        run = wanted["runs"]["tiny"]
        run["train"]["optim"]["lr"] = best["params"]["train.optim.lr"]
        run["objective"]["beta"] = best["params"]["objective.beta"]
        assert after == wanted
    finally:
        Path("params.yaml").write_text(before)
    assert "-S runs.tiny.train.optim.lr=" in patch


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"search": "optuna", "concurrent": 1},
        # One after the other, so that what each is judged by does not depend on the machine.
        {
            "scheduler": "asha", "grace": 1, "trials": 6, "reduction": 2, "concurrent": 1,
            "metric": "reconstruction", "mode": "min",
        },
        {"scheduler": "pbt", "grace": 2, "trials": 2},
        {
            "search": "grid",
            "trials": 1,
            "space": {"model.T": {"grid": [1, 2]}, "train.optim.lr": {"grid": [0.001, 0.002]}},
        },
    ],
    ids=["optuna", "asha", "pbt", "grid"],
)  # fmt: skip
def test_searches_and_schedulers(at: Path, settings: dict[str, Any]) -> None:
    before = TABLE.read_bytes()
    try:
        write_params(document(**settings))
        sweep("lr")
        found = rows()
        trials = {row["number"]: row["params"] for row in found}
        last = {row["number"]: row["step"] for row in found}
        assert all(row["state"] == "TERMINATED" for row in found)
        keys = [(row["number"], row["step"]) for row in found]
        assert len(set(keys)) == len(keys)
        if settings.get("search") == "grid":
            assert {(p["model.T"], p["train.optim.lr"]) for p in trials.values()} == {
                (1, 0.001), (1, 0.002), (2, 0.001), (2, 0.002),
            }  # fmt: skip
        else:
            assert len(trials) == settings.get("trials", 3)
        if settings.get("scheduler") == "asha":
            assert max(last.values()) == 12
            assert min(last.values()) < 12, "some were stopped early"
        else:
            assert set(last.values()) == {12}
    finally:
        write_params(document())
        TABLE.write_bytes(before)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(folder: Path) -> None:
    settings = {"trials": 6, "fixed": {"train.steps": 200}, "concurrent": 1}
    write_params(document(**settings))
    make_data()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "sweep", "lr"],
        env=child_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    progress = Path(".gram/sweeps/lr/run")

    def finished() -> set[int]:
        """Trials that Tune has noted as ended: a moment after their last report, until when they
        are in progress, and go on from a checkpoint."""
        for path in progress.glob("experiment_state-*.json"):
            try:
                trials = [json.loads(t) for t, _ in json.loads(path.read_text())["trial_data"]]
            except ValueError:  # it is just being written
                continue
            ended = (t["trial_id"] for t in trials if t["status"] == "TERMINATED")
            return {int(name.rpartition("_")[2]) for name in ended}
        return set()

    while len(finished()) < 2 and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(6)  # Ray's own processes end once they miss the driver
    assert not TABLE.exists()
    had = {}
    for number in finished():
        (path,) = progress.glob(f"trial_*_{number:05d}_*/result.json")
        last = json.loads(path.read_text().splitlines()[-1])
        assert last["step"] == 200
        had[number] = last["time_total_s"]
    assert 2 <= len(had) < 6
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "sweep", "lr", "--resume"],
        env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows()
    assert [(row["number"], row["step"]) for row in found] == [
        (number, step) for number in range(6) for step in range(2, 201, 2)
    ]
    # A trial that was done was not run again: its last report took as long as before the kill.
    seconds = {row["number"]: row["seconds"] for row in found if row["step"] == 200}
    assert {number: seconds[number] for number in had} == had


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_a_sweep_that_keeps_its_state_in_s3(folder: Path, tmp_path_factory: Any) -> None:
    with S3Server(tmp_path_factory.mktemp("objects") / "buckets") as server:
        server.bucket("sweeps")
        write_params(document(storage="s3://sweeps/here", trials=2))
        make_data()
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "sweep", "lr"],
            env={**child_environment(), **server.environment()},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(rows()) == 12
        for path in Path().rglob("*"):
            assert not path.is_file() or server.secret.encode() not in path.read_bytes(), path
        assert server.secret not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"run": "nobody"}, "no entry 'nobody' in 'runs'"),
        ({"space": {}}, "space: has no setting to search"),
        ({"space": {"train.optim.lr": {"normal": [0, 1]}}}, "expected one of uniform, loguniform"),
        ({"space": {"train.optim.lr": {"uniform": [1, 0]}}}, r"expected \[low, high\]"),
        ({"space": {"train.optim.lr": {"loguniform": [0, 1]}}}, "low must be above 0"),
        ({"space": {"train.optim.lr": {"choice": []}}}, "expected a list"),
        (
            {"space": {"train.optim.rate": {"choice": [1]}}},
            "train.optim: Object contains unknown field `rate`",
        ),
        ({"space": {"sample.width": {"choice": [1]}}}, "a sweep chooses among model"),
        ({"space": {"train.steps": {"choice": [-1]}}}, r"train.steps: Expected `int` >= 1"),
        ({"space": {"train.batch.size": {"choice": [1]}}}, "batch is no section"),
        ({"search": "grid"}, "search: grid takes only 'grid'"),
        ({"search": "optuna", "space": {"model.T": {"grid": [1]}}}, "takes no 'grid'"),
        ({"scheduler": "pbt", "space": {"model.T": {"choice": [1]}}}, "pbt can change only"),
        ({"scheduler": "pbt", "search": "optuna"}, "pbt searches by itself"),
        (
            {"scheduler": "pbt", "space": {"train.optim.name": {"choice": ["adamw", "muon"]}}},
            r"pbt can change only .* \(but train.optim.name\)",
        ),
        ({"space": {"train.batch": {"uniform": [8, 96]}}}, "Expected `int`, got `float`"),
        ({"metric": "speed"}, "metric: expected one of reconstruction"),
        ({"storage": "ftp://x/y"}, "cannot use ftp://"),
        ({"trails": 3}, "did you mean 'trials'"),
        ({"fixed": {"train.colour": 1}}, "train.colour: unknown key"),
        ({"fixed": {"train.workers": 2}}, "train.workers: a trial is one process on `cpus` cores"),
        ({"space": {"train.cores": {"choice": [1]}}}, "train.cores: a trial is one process"),
        ({"fixed": {"train.optim.lr": 0.1}}, "train.optim.lr: is given twice"),
        ({"fixed": {"train.optim": {}}}, "train.optim.lr: is given twice, .* by train.optim$"),
        ({"scheduler": "pbt", "grace": 3}, r"every 6 iterations .* train.checkpoint_every is 4"),
        (
            {"scheduler": "pbt", "grace": 6, "fixed": {"train.checkpoint_every": 12}},
            "train.checkpoint_every is 12 of 12 steps",
        ),
        ({"metric": "kl", "fixed": {"model.guidance": "none"}}, "never reports kl"),
        (
            {"fixed": {"train.prior_slots": 0, "objective.heads_on": "posterior"}},
            "metric: a run of these settings never reports prior_valid",
        ),
        (
            {
                "search": "grid",
                "space": {
                    "objective.kl": {"grid": ["last", "every"]},
                    "objective.rollout": {"grid": ["posterior", "prior"]},
                },
            },
            "kl: every charges the uncharged transitions",
        ),
        (
            {"space": {"train.optim.lr": {"choice": [0.1, None]}, "train.ema": {"choice": [0.9]}}},
            "train.optim.lr: Expected `float`, got `null`",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(
    folder: Path, settings: dict[str, Any], words: str
) -> None:
    write_params(document(**settings))
    with pytest.raises(ConfigError, match=words) as caught:
        load_sweep("lr")
    assert "\n" not in str(caught.value)
    assert "params.yaml: " in str(caught.value)


def test_odd_settings_that_may_be(folder: Path) -> None:
    """What numpy and Tune by themselves would end with a traceback."""
    write_params(document(search="optuna", scheduler="asha", seed=2**32 + 1, grace=2_000_000))
    config, _ = load_sweep("lr")
    _optuna(config.seed)
    _scheduler(config)
    write_params(document(metric="prior_valid", fixed={"model.guidance": "none"}))
    assert load_sweep("lr")[0].metric == "prior_valid", "every slot of a twin follows its prior"
    write_params(document(storage="~nobody_of_this_name/x"))
    with pytest.raises(GramError, match=r"^sweep lr: storage ~nobody_of_this_name/x: there is no"):
        _place("lr", load_sweep("lr")[0])


def test_one_sweep_of_a_name_at_a_time(folder: Path) -> None:
    """Another would clear what the first one keeps of itself."""
    write_params(document())
    with alone("sweep-lr", "this"), pytest.raises(GramError, match="sweep lr is running in this"):
        sweep("lr")


def test_an_unknown_sweep_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no entry 'lr' in 'sweeps'; there are: none"):
        load_sweep("lr")


def test_promotion_without_a_table_is_one_line(folder: Path) -> None:
    write_params(document())
    with pytest.raises(GramError, match=r"trials\.parquet: no such table"):
        promotion("lr")


def trials(*trials: tuple[str, str, float], key: str = "train.optim.lr", run: str = "tiny") -> None:
    """Write the sweep's table: of each trial its state, a value of `key`, and what it reported."""
    rows = [
        {"sweep": "lr", "trial": f"lr_{number}", "number": number, "state": state, "step": 2,
         "seconds": 1.0, "params": [(key, value)], "metrics": [("prior_valid", reported)]}
        for number, (state, value, reported) in enumerate(trials)
    ]  # fmt: skip
    about = {"run": run, "metric": "prior_valid", "mode": "max"}
    table = pa.Table.from_pylist(rows, schema=tables.trials_schema())
    tables.write(TABLE, table, tables.trials_schema(), about)


def test_a_failed_trial_is_not_promoted(folder: Path) -> None:
    """Its last report is of before it failed."""
    write_params(document())
    trials(("TERMINATED", "0.25", 0.5), ("ERROR", "0.75", 0.6))
    assert "lr_0, best of 2 trials: prior_valid 0.5" in promotion("lr")
    assert "0.75" not in promotion("lr")
    trials(("ERROR", "0.75", 0.6))
    with pytest.raises(GramError, match="sweep lr: has no trial, or none with a value"):
        promotion("lr")


def test_promotion_says_how_to_try_it(folder: Path) -> None:
    """Hydra overrides what is written out, and appends what is not."""
    write_params(document())
    trials(("TERMINATED", "1", 0.5), key="train.steps")
    assert "dvc exp run -S runs.tiny.train.steps=1\n" in promotion("lr")
    assert "exploration" not in read_params()["runs"]["tiny"]["train"]
    trials(("TERMINATED", "0.5", 0.5), key="train.exploration")
    assert "dvc exp run -S +runs.tiny.train.exploration=0.5\n" in promotion("lr")


def test_promotion_of_what_is_there_is_no_patch(folder: Path) -> None:
    Path("params.yaml").write_text((REPOSITORY / FILE).read_text())
    steps = read_params()["runs"]["nqueens8_gram"]["train"]["steps"]
    trials(("TERMINATED", json.dumps(steps), 0.5), key="train.steps", run="nqueens8_gram")
    told = promotion("lr")
    assert "params.yaml has these values already" in told and "git apply" not in told
    assert all(line.startswith("#") for line in told.splitlines())


def test_promotion_keeps_the_committed_files_form(folder: Path) -> None:
    """A patch of the real params.yaml touches the promoted lines alone."""
    Path("params.yaml").write_text((REPOSITORY / FILE).read_text())
    trial = {
        "sweep": "nqueens8", "trial": "a", "number": 0, "state": "TERMINATED", "step": 5,
        "seconds": 1.0, "params": [("train.optim.lr", "0.5")], "metrics": [("prior_valid", 1.0)],
    }  # fmt: skip
    about = {
        "run": "nqueens8_gram", "metric": "prior_valid", "mode": "max",
        "settings": {"fixed": {"train.steps": 600}},
    }  # fmt: skip
    table = pa.Table.from_pylist([trial], schema=tables.trials_schema())
    path = Path("results/sweeps/nqueens8/trials.parquet")
    tables.write(path, table, tables.trials_schema(), about)
    changed = [
        line for line in promotion("nqueens8").splitlines()
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]  # fmt: skip
    committed = read_params()["runs"]["nqueens8_gram"]["train"]["optim"]["lr"]
    assert changed == [f"-        lr: {committed}", "+        lr: 0.5"]
    assert "every trial also had train.steps=600" in promotion("nqueens8")


def test_a_trial_takes_the_task_that_the_driver_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verifier may be a module that lies on the driver's machine alone."""
    from pipelines import params, sweep

    write_params(document())
    make_data()
    config, whole = load_sweep("lr")
    job, rows = sweep._checked(whole, config)
    worked = []

    def nowhere(*_: object) -> None:
        raise AssertionError("made anew")

    monkeypatch.setattr(params, "make_task", nowhere)
    monkeypatch.setattr(sweep, "TrialStore", lambda *_: SimpleNamespace(report=None))
    monkeypatch.setattr(sweep, "work", lambda engine, job, *_, **__: worked.append(job))
    sweep.trial({}, params=whole, config=config, task=job.task, groups=(), rows=rows)
    assert worked[0].task is job.task


def test_a_place_that_holds_something_else_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(document(storage="../place", fixed={}))
    with pytest.raises(ConfigError, match=r"must not contain '\.\.'"):
        load_sweep("lr")
    monkeypatch.setattr("pipelines.cluster.cluster", nullcontext)
    monkeypatch.setattr("pipelines.cluster.has_gpus", lambda: False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    write_params(document(storage="place"))
    make_data()
    thesis = Path("place/lr/thesis.tex")
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with pytest.raises(GramError, match=r"place/lr holds what is no sweep's \(thesis\.tex\)"):
        sweep("lr")
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cpus": 3}, "sweeps.lr.cpus: a trial asks for 3, and this machine's Ray has 2"),
        ({"gpus": 0.5}, "sweeps.lr.gpus: a trial asks for 0.5, and this machine's Ray has 0"),
    ],
)
def test_a_trial_that_fits_nowhere_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: str
) -> None:
    """Tune would wait for ever."""
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    write_params(document(**settings))
    config, _ = load_sweep("lr")
    with pytest.raises(GramError, match=words):
        _fits("lr", config, config.gpus or 0.0)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")  # which may grow, but has disks apart
    with pytest.raises(GramError, match=r"sweeps\.lr\.storage: on a Ray cluster"):
        _fits("lr", config, 0.0)
    write_params(document(**settings, storage="s3://sweeps/here"))
    _fits("lr", load_sweep("lr")[0], 9.0)


def test_storage_is_the_same_place_for_tune_and_for_us(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/of/somebody")
    for given, wanted in (
        (None, f"{folder}/.gram/sweeps/lr"),
        ("shared/sweeps", f"{folder}/shared/sweeps/lr"),
        ("~/sweeps", "/home/of/somebody/sweeps/lr"),
        ("file:///mnt/x", "/mnt/x/lr"),
        ("s3://sweeps/here", "s3://sweeps/here/lr"),
    ):
        write_params(document(storage=given))
        assert _place("lr", load_sweep("lr")[0]) == wanted


def test_reports_that_cannot_be_read_back_are_not_left_out(folder: Path) -> None:
    """Tune leaves a file of reports that it cannot read out, in silence."""
    unread = SimpleNamespace(
        metrics_dataframe=pd.DataFrame(), metrics={"training_iteration": 4, "step": 4},
        config={}, error=None, path="there/run/trial",
    )  # fmt: skip
    with pytest.raises(GramError, match="trial 0 cannot be read back from there/run/trial"):
        trials_table("lr", [unread])


def test_a_setting_that_was_null_for_a_time_is_null_in_the_table() -> None:
    # A column of a data frame has NaN where other rows have numbers.
    values = {"a": float("nan"), "b": np.float64("nan"), "c": np.int64(3), "d": "x", "e": None}
    assert dict(_texts(values)) == {"a": "null", "b": "null", "c": "3", "d": '"x"', "e": "null"}
