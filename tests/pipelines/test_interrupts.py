"""Ctrl-C in any stage, and two `dvc repro` at once: the next `dvc repro` ends as if nothing was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from checkout import commit, copy_code, git
from ruamel.yaml import YAML
from workspace import params, write_params

STAGES = ("generate", "augment", "train", "sample", "evaluate", "report")
METRICS = "results/tiny/metrics.json"
SETTINGS = {
    "tasks__queens__size": 6,
    "runs__tiny__train__steps": 300,
    "runs__tiny__train__checkpoint_every": 60,
    "runs__tiny__sample__width": 20,
    "runs__tiny__evaluate__widths": [1, 20],
}


def undisturbed(path: Path, **changes: Any) -> Path:
    """A checkout with every stage done and DVC's knowledge of it, made without interruption."""
    copy_code(path)
    write_params(params(sweeps={}, **{**SETTINGS, **changes}), path)
    git(path, "init", "-q")
    commit(path)
    done = dvc(path, "repro")
    assert done.returncode == 0, done.stdout
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("reference"))


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command with a process group of its own, as a shell gives it."""
    # A user's environment has none of the stages' settings, so that they start Python twice.
    return subprocess.Popen(
        ["dvc", *arguments],
        cwd=path, env={**os.environ, "PYTHONPATH": str(path)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip


def dvc(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(path, *arguments)
    out, _ = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, out, out)


def before(stage: str, reference: Path, path: Path) -> Path:
    """A copy of the reference in which `stage` and what follows it was never run."""
    shutil.copytree(reference, path)
    lock = path / "dvc.lock"
    document = YAML(typ="safe", pure=True).load(lock.read_text())
    for name in list(document["stages"]):
        if STAGES.index(name.split("@")[0]) < STAGES.index(stage):
            continue
        for out in document["stages"].pop(name)["outs"]:
            made = path / out["path"]
            shutil.rmtree(made) if made.is_dir() else made.unlink()
    with lock.open("w") as file:
        YAML(typ="safe", pure=True).dump(document, file)
    # Else DVC would take the results from there without running anything.
    shutil.rmtree(path / ".dvc/cache/runs", ignore_errors=True)
    return path


def outcome(path: Path) -> dict[str, Any]:
    """All that a run leaves but times and provenance."""
    found: dict[str, Any] = {}
    for folder in ("data", "models", "results"):
        for file in (path / folder).rglob("*"):
            name = str(file.relative_to(path))
            if file.suffix == ".parquet":
                found[name] = pq.read_table(file)
            elif file.suffix == ".csv":
                found[name] = file.read_text()
            elif file.name == "metrics.json" and "live" not in name:
                metrics = json.loads(file.read_text())
                found[name] = {k: v for k, v in metrics.items() if "seconds" not in k}
    return found


def command(process: psutil.Process) -> list[str]:
    """Its words; none where it has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def process_of(stage: str, repro: subprocess.Popen[str]) -> psutil.Process:
    """The stage's process, as soon as there is one below `repro`."""
    for _ in range(12000):
        assert repro.poll() is None, repro.stdout and repro.stdout.read()
        for child in psutil.Process(repro.pid).children(recursive=True):
            if command(child)[1:3] == ["-m", f"stages.{stage}"]:
                return child
        time.sleep(0.005)
    raise AssertionError(f"{stage} was not started within a minute")


def loaded(process: psutil.Process) -> bool:
    """It has begun to load what it works with."""
    return "polars" in Path(f"/proc/{process.pid}/maps").read_text()


def until(reached: Callable[[], bool], process: psutil.Process) -> None:
    for _ in range(12000):
        if reached():
            return
        assert process.is_running(), "it ended before it came to that"
        time.sleep(0.005)
    raise AssertionError("it did not come to that within a minute")


def interrupt(path: Path, stage: str, moment: Callable[[psutil.Process], None]) -> str:
    """`dvc repro` with Ctrl-C at a moment of a stage; what was printed."""
    repro = start(path, "repro")
    try:
        process = process_of(stage, repro)
        moment(process)
        assert process.is_running()
        os.killpg(repro.pid, signal.SIGINT)
        out, _ = repro.communicate(timeout=60)
    finally:
        if repro.poll() is None:
            os.killpg(repro.pid, signal.SIGKILL)
    assert repro.returncode != 0
    # In the instant after DVC started the stage, DVC itself is interrupted.
    assert "ERROR: failed to reproduce" in out or "ERROR: interrupted by the user" in out, out
    return out


def at_once(process: psutil.Process) -> None:
    """While Python itself starts."""


def while_loading(process: psutil.Process) -> None:
    until(lambda: loaded(process), process)


def a_second_later(process: psutil.Process) -> None:
    while_loading(process)
    time.sleep(1)


def completes_as(reference: Path, path: Path) -> None:
    done = dvc(path, "repro")
    assert done.returncode == 0, done.stdout
    assert json.loads(dvc(path, "status", "--json").stdout) == {}
    found, expected = outcome(path), outcome(reference)
    # Threads may add up in another order: the last digits of the bounds are the machine's.
    assert found.pop(METRICS) == pytest.approx(expected.pop(METRICS), rel=1e-5)
    assert found == expected
    assert (path / "report/index.html").is_file()


def test_interrupted_training_goes_on(reference: Path, tmp_path: Path) -> None:
    path = before("train", reference, tmp_path / "path")
    checkpoints = path / ".gram/checkpoints/tiny"

    def in_training(process: psutil.Process) -> None:
        until(lambda: bool(list(checkpoints.glob("step-*"))), process)

    out = interrupt(path, "train", in_training)
    assert "error: interrupted" in out
    assert "Traceback" not in out
    assert not (path / "models/tiny/metrics.json").exists()
    assert list(checkpoints.glob("step-*"))
    completes_as(reference, path)


def test_an_interrupt_waits_until_polars_is_imported(tmp_path: Path) -> None:
    """Within its import polars, here one that interrupts itself, would end in a traceback."""
    (tmp_path / "polars.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('imported whole')\n"
    )
    program = tmp_path / "program.py"
    program.write_text("from pipelines.runtime import entry\nentry(lambda _: print('went on'))\n")
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "imported whole\n"
    assert done.stderr == "error: interrupted\n"
    assert done.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_stage_is_done_again(reference: Path, tmp_path: Path, stage: str) -> None:
    path = before(stage, reference, tmp_path / "path")
    for moment in (at_once, while_loading, a_second_later):
        out = interrupt(path, stage, moment)
        # Nothing of ours can run while Python itself starts.
        if "Fatal Python error: init_" not in out:
            assert "Traceback" not in out, out
        assert moment is at_once or "error: interrupted" in out, out
    completes_as(reference, path)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference with training and sampling on Ray."""
    changes = {"runs__tiny__train__engine": "deepspeed", "runs__tiny__sample__concurrency": 1}
    return undisturbed(tmp_path_factory.mktemp("spread"), **changes)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("stage", ["train", "sample"])
def test_interrupted_ray_leaves_nothing_running(spread: Path, tmp_path: Path, stage: str) -> None:
    path = before(stage, spread, tmp_path / "path")
    checkpoints = path / ".gram/checkpoints/tiny"
    children: list[psutil.Process] = []

    def at_work(process: psutil.Process) -> None:
        def begun() -> bool:
            children[:] = process.children(recursive=True)
            if stage == "train":
                return bool(list(checkpoints.glob("step-*")))
            return any("Sampler" in " ".join(command(child)) for child in children)

        until(begun, process)

    out = interrupt(path, stage, at_work)
    assert children
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert "Traceback" not in out, out
    assert "error: interrupted" in out, out
    completes_as(spread, path)


@pytest.mark.slow
def test_second_repro_beside_a_running_one(reference: Path, tmp_path: Path) -> None:
    path = before("train", reference, tmp_path / "path")
    first = start(path, "repro")
    try:
        while_loading(process_of("train", first))
        second = dvc(path, "repro")
        assert first.poll() is None
        out, _ = first.communicate(timeout=400)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == 0, out
    assert second.returncode != 0
    assert "Traceback" not in second.stdout
    assert "is busy, it is being blocked by" in second.stdout, second.stdout
    completes_as(reference, path)
