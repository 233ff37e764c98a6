"""`gram reproduce REV`: a clean worktree, what can be pulled, and the comparison."""

import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from checkout import PIPELINE, commit, copy_code, git
from workspace import PARAMS, child_environment, write_params

from gram_core.errors import GramError
from pipelines.lock import alone
from pipelines.reproduce import (
    Difference,
    _metrics,
    _numbers,
    _tell_packages,
    compare,
    reproduce,
)

METRICS = Path("results/tiny/metrics.json")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of its own whose one run is built and committed."""
    path = tmp_path_factory.mktemp("built")
    copy_code(path, (*PIPELINE, "requirements.lock"))
    before = Path.cwd()
    os.chdir(path)
    try:
        write_params(PARAMS)
        git(path, "init", "-q")
        commit(path)
        environment = {**child_environment(), "PYTHONPATH": str(path)}
        subprocess.run(["dvc", "repro"], env=environment, check=True, capture_output=True)
        commit(path, "built")
    finally:
        os.chdir(before)
    return path


@pytest.fixture
def at(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(built)
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)
    return built


def compared() -> int:
    """How many of the run's metrics are held against the recorded ones."""
    return sum(not name.endswith(("_low", "_high")) for name in json.loads(METRICS.read_text()))


def test_what_the_cache_has_is_not_run_again(at: Path, capfd: pytest.CaptureFixture) -> None:
    assert reproduce("HEAD", []) == 0
    out = capfd.readouterr().out
    assert "Running stage" not in out
    assert "0 outside; no stage had to be run: " in out
    assert not list(Path(".gram/reproduce").iterdir())


@pytest.mark.slow
def test_forced_it_is_built_anew_and_agrees(at: Path, capfd: pytest.CaptureFixture) -> None:
    assert reproduce("HEAD", ["tiny"], force=True) == 0
    captured = capfd.readouterr()
    assert "evaluate@tiny" in captured.out
    total = compared()
    assert f"{total} metrics compared: {total} equal" in captured.out
    ran = captured.out.count("Running stage")
    assert ran and f"; {ran} stages were run" in captured.out


def test_a_metric_that_was_never_reached_is_told(at: Path, capfd: pytest.CaptureFixture) -> None:
    text = METRICS.read_text()
    recorded = json.loads(text)
    recorded["coverage@3"] = recorded["coverage@3_low"] = recorded["coverage@3_high"] = 0.99
    METRICS.write_text(json.dumps(recorded, indent=2) + "\n")
    commit(at, "too good")
    try:
        assert reproduce("HEAD", []) == 1
        out = capfd.readouterr().out
        assert "tiny: coverage@3: recorded 0.99 [0.99, 0.99], found 0" in out
        assert "1 outside" in out
    finally:
        git(at, "reset", "-q", "--hard", "HEAD~1")
        METRICS.write_text(text)


def test_results_of_no_run_are_not_compared_with_themselves(
    at: Path, capfd: pytest.CaptureFixture
) -> None:
    former = Path("results/former/metrics.json")
    former.parent.mkdir()
    former.write_text('{"accuracy": 1.0}\n')
    git(at, "add", "--force", str(former))
    commit(at, "a run that was")
    try:
        assert reproduce("HEAD", []) == 0
        captured = capfd.readouterr()
        assert "note: no run of params.yaml, so not compared: former" in captured.err
        total = compared()
        assert f"{total} metrics compared: {total} equal" in captured.out
        with pytest.raises(GramError, match="no metrics of former are recorded"):
            _metrics(Path(), ["former"])
    finally:
        git(at, "reset", "-q", "--hard", "HEAD~1")


def test_packages_other_than_the_locked_ones_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that are installed in another version; an absent one only if every result names it."""
    have = {"torch": "2.13.0+cpu", "numpy": "2.0.0", "numba": "0.60.0"}

    def installed(name: str) -> str:
        if name not in have:
            raise PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr("importlib.metadata.version", installed)
    _tell_packages(tmp_path)
    locked = ["torch==2.13.0", "numpy==2.0.0", "numba==0.61.0", "ray==2.60.0", "ruff==1.0"]
    (tmp_path / "requirements.lock").write_text("\n".join(locked) + "\n")
    _tell_packages(tmp_path)
    told = "numba 0.60.0 (locked 0.61.0), ray absent (locked 2.60.0)"
    assert capsys.readouterr().err == f"note: packages other than the revision's lock: {told}\n"


@pytest.mark.parametrize("content", ["<<<<<<< HEAD", "[1]", '{"a": "b"}', '{"a": null}', "\xff"])
def test_recorded_metrics_that_are_none_are_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tiny" / "metrics.json"
    path.parent.mkdir()
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(GramError, match=r"^HEAD: metrics\.json of tiny: "):
        _numbers(path, "HEAD")


def test_other_revisions_and_runs_are_refused(at: Path) -> None:
    with pytest.raises(GramError, match="nowhere: no such revision"):
        reproduce("nowhere", [])
    with pytest.raises(GramError, match="no metrics of nobody are recorded"):
        reproduce("HEAD", ["nobody"])
    with pytest.raises(GramError, match="HEAD~1: has no recorded metrics of any run"):
        reproduce("HEAD~1", [])
    assert not list(Path(".gram/reproduce").iterdir())


def test_one_at_a_time(at: Path) -> None:
    """Beside another it would take away the worktree that is in use."""
    revision = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True)
    with (
        alone(f"reproduce-{revision[:12]}", "this"),
        pytest.raises(GramError, match="another gram reproduce of this revision is running in"),
    ):
        reproduce("HEAD", [])
    assert reproduce("HEAD", []) == 0


def test_the_checkout_stays_as_it_was(at: Path) -> None:
    changed = METRICS.read_text() + "\n"
    METRICS.write_text(changed)
    try:
        assert reproduce("HEAD", []) == 0
        assert METRICS.read_text() == changed
    finally:
        git(at, "checkout", "-q", str(METRICS))


def test_intervals_decide(tmp_path: Path) -> None:
    path = Path("results/a/metrics.json")
    recorded = {path: {"x": 0.5, "x_low": 0.4, "x_high": 0.6, "n": 3.0, "train_seconds": 9.0}}
    found = {"x": 0.59, "x_low": 0.0, "x_high": 1.0, "n": 3.0}
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(json.dumps(found))
    rows = {row.name: row for row in compare(recorded, tmp_path)}
    assert rows.keys() == {"x", "n"}
    assert all(row.within for row in rows.values())
    for name, value, within in (("x", 0.61, False), ("x", 0.4, True), ("n", 3.1, False)):
        (tmp_path / path).write_text(json.dumps({**found, name: value}))
        (row,) = (row for row in compare(recorded, tmp_path) if row.name == name)
        assert row.within is within
    (tmp_path / path).unlink()
    assert not any(row.within for row in compare(recorded, tmp_path))
    assert "found missing" in Difference("a", "x", 1.0, None, 0.0, 2.0).line()
