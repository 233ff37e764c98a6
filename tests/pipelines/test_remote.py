"""DVC's remote on S3: what comes back is what was pushed, through faults and outages too."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkout import commit, copy_code, git
from s3 import FaultProxy, S3Server
from workspace import PARAMS, contents, write_params

from pipelines.params import read_params
from pipelines.report.build import build
from pipelines.runtime import environment

pytestmark = pytest.mark.s3
MADE = ("data", "models", "results", "report")


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    """A server of the test's own with the remote's bucket in it."""
    with S3Server(tmp_path / "s3") as server:
        server.bucket("remote")
        yield server


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose pipeline is not the point: a folder of files, not pushed yet."""
    path = tmp_path_factory.mktemp("origin")
    folder = path / "files"
    folder.mkdir()
    draw = random.Random(0)
    for size in range(200_000, 200_024):
        (folder / str(size)).write_bytes(draw.randbytes(size))
    git(path, "init", "-q")
    well(dvc(path, "init", "-q"))
    well(dvc(path, "remote", "add", "-q", "-d", "s3", "s3://remote/dvc"))
    well(dvc(path, "add", "-q", "files"))
    commit(path)
    return path


@pytest.fixture(scope="module")
def project(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with one task and one run, whose results are DVC's but not pushed yet."""
    path = tmp_path_factory.mktemp("project")
    copy_code(path)
    shutil.copytree(done, path, dirs_exist_ok=True)
    write_params({**PARAMS, "sweeps": {}}, path)
    profile = path / "pipelines/conf/profile/tiny.yaml"
    profile.write_text("# @package _global_\n" + (path / "params.yaml").read_text())
    build(path, read_params(path / "params.yaml")["runs"], path / "report")
    git(path, "init", "-q")
    well(dvc(path, "remote", "add", "-q", "-d", "s3", "s3://remote/dvc"))
    well(dvc(path, "commit", "-q", "-f"))
    commit(path)
    return path


def clone(source: Path, path: Path) -> Path:
    """What git carries: no cache, no outputs."""
    subprocess.run(["git", "clone", "-q", source, path], check=True)
    return path


def whole(source: Path, path: Path) -> Path:
    """Cache and outputs too."""
    shutil.copytree(source, path)
    return path


def dvc(
    path: Path, *arguments: str, client: dict[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """A command that must end within `timeout` seconds."""
    process = start(path, *arguments, client=client)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(path: Path, *arguments: str, client: dict[str, str] | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["dvc", *arguments],
        cwd=path, env={**os.environ, **environment(), **(client or {})},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def well(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """It failed and said why in one line."""
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if message in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("ERROR: ")
    assert "Traceback" not in done.stdout + done.stderr


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def outputs(folder: Path) -> dict[str, bytes]:
    """What DVC or git carries: all but DVCLive's last row."""
    return {k: v for k, v in contents(folder).items() if not k.endswith("live/metrics.json")}


def until(reached: Callable[[], bool]) -> None:
    for _ in range(1200):
        if reached():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that within a minute")


def holding(text: str, folder: Path) -> list[Path]:
    """The files below a folder that hold `text`, git's and DVC's own included."""
    return [path for path in files(folder) if text.encode() in path.read_bytes()]


def test_pipeline_comes_back_whole_and_runs_nothing(
    project: Path, s3: S3Server, tmp_path: Path
) -> None:
    source = whole(project, tmp_path / "source")
    client = s3.environment()
    said = well(dvc(source, "push", client=client))
    other = clone(source, tmp_path / "pulled")
    said += well(dvc(other, "pull", client=client))
    for folder in MADE:
        assert outputs(other / folder) == outputs(source / folder)
    said += (status := well(dvc(other, "status", client=client)))
    assert "up to date" in status
    empty = clone(source, tmp_path / "empty")
    said += (repro := well(dvc(empty, "repro", "--pull", client=client)))
    assert "Running stage" not in repro
    assert contents(empty / "report") == contents(source / "report")
    # Nothing that was said or written gives the credentials away.
    assert s3.secret not in said
    for path in (source, other, empty):
        assert holding(s3.secret, path) == []


@pytest.mark.parametrize("command", ["push", "pull"])
@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_refused(
    origin: Path, s3: S3Server, tmp_path: Path, command: str, wrong: str
) -> None:
    path = whole(origin, tmp_path / "path") if command == "push" else clone(origin, tmp_path / "c")
    client = {**s3.environment(), wrong: "not-the-right-one"}
    done = dvc(path, command, client=client, timeout=60)
    refused(done, "Forbidden")
    for secret in (s3.secret, "not-the-right-one"):
        assert secret not in done.stdout + done.stderr
        assert holding(secret, path) == []
    assert files(s3.folder) == []


@pytest.mark.parametrize("command", ["push", "pull"])
def test_missing_bucket_is_named(origin: Path, s3: S3Server, tmp_path: Path, command: str) -> None:
    (s3.folder / "remote").rmdir()
    path = whole(origin, tmp_path / "path") if command == "push" else clone(origin, tmp_path / "c")
    done = dvc(path, command, client=s3.environment(), timeout=60)
    refused(done, "bucket does not exist" if command == "push" else "failed to pull data")
    assert s3.secret not in done.stdout + done.stderr
    assert files(s3.folder) == []


def test_changed_object_does_not_reach_the_workspace(
    origin: Path, s3: S3Server, tmp_path: Path
) -> None:
    well(dvc(whole(origin, tmp_path / "source"), "push", client=s3.environment()))
    changed = next(path for path in files(s3.folder) if path.suffix != ".dir")
    right = changed.read_bytes()
    changed.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    path = clone(origin, tmp_path / "path")
    well(dvc(path, "remote", "modify", "s3", "verify", "true"))
    refused(dvc(path, "pull", client=s3.environment()), "failed to pull data")
    assert files(path / "files") == []
    assert not [kept for kept in files(path / ".dvc/cache") if kept.name == changed.name]
    changed.write_bytes(right)
    well(dvc(path, "pull", client=s3.environment()))
    assert contents(path / "files") == contents(origin / "files")


@pytest.mark.slow
def test_object_changed_on_its_way_does_not_reach_the_workspace(
    origin: Path, s3: S3Server, tmp_path: Path
) -> None:
    well(dvc(whole(origin, tmp_path / "source"), "push", client=s3.environment()))
    path = clone(origin, tmp_path / "path")
    well(dvc(path, "remote", "modify", "s3", "verify", "true"))
    with FaultProxy(s3, every=10**6, corrupt=r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$") as proxy:
        refused(dvc(path, "pull", client=proxy.environment()), "failed to pull data")
        assert proxy.counts["corrupt"] > 0
    assert files(path / "files") == []
    well(dvc(path, "pull", client=s3.environment()))
    assert contents(path / "files") == contents(origin / "files")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "slow"])
def test_faults_are_retried(origin: Path, s3: S3Server, tmp_path: Path, fault: str) -> None:
    with FaultProxy(s3, every=5, faults=[fault]) as proxy:
        well(dvc(whole(origin, tmp_path / "source"), "push", client=proxy.environment()))
        pushed = proxy.counts[fault]
        path = clone(origin, tmp_path / "path")
        well(dvc(path, "pull", client=proxy.environment()))
    assert pushed > 0
    assert proxy.counts[fault] > pushed
    assert contents(path / "files") == contents(origin / "files")
    assert "up to date" in well(dvc(path, "status"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["push", "pull"])
@pytest.mark.parametrize("outage", ["brief", "lasting"])
def test_outage_in_the_middle_is_made_good(
    origin: Path, s3: S3Server, tmp_path: Path, command: str, outage: str
) -> None:
    path = whole(origin, tmp_path / "path")
    arriving = s3.folder / "remote"
    if command == "pull":
        well(dvc(path, "push", client=s3.environment()))
        path = clone(origin, tmp_path / "pulled")
        arriving = path / ".dvc/cache/files"
    with FaultProxy(s3, every=1, faults=["slow"], delay=0.5) as proxy:
        process = start(path, command, "-j", "2", client=proxy.environment())
        try:
            until(lambda: len(files(arriving)) >= 4)
            s3.stop()
            proxy.stop()
            assert process.poll() is None
            assert len(files(arriving)) < 24
            if outage == "brief":
                time.sleep(1)
                s3.start()
                proxy.start()
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert "Traceback" not in out + err
    assert s3.secret not in out + err
    if outage == "lasting":
        assert process.returncode != 0
        s3.start()
    if process.returncode != 0:
        assert [line for line in err.splitlines() if line.startswith("ERROR: ")], err
    well(dvc(path, command, client=s3.environment()))
    fresh = clone(origin, tmp_path / "fresh")
    well(dvc(fresh, "pull", client=s3.environment()))
    for folder in (path, fresh):
        assert contents(folder / "files") == contents(origin / "files")


@pytest.mark.slow
def test_queued_experiment_is_run_and_pushed(project: Path, s3: S3Server, tmp_path: Path) -> None:
    client = s3.environment()
    source = whole(project, tmp_path / "source")
    well(dvc(source, "push", client=client))
    lab = clone(source, tmp_path / "lab")
    well(dvc(lab, "pull", client=client))
    changes = ("-S", "profile=tiny", "-S", "runs.tiny.train.steps=14")
    said = well(dvc(lab, "exp", "run", "--queue", "-n", "other", *changes, client=client))
    said += well(dvc(lab, "exp", "run", "--run-all", client=client, timeout=300))
    said += well(dvc(lab, "exp", "push", "origin", "other", client=client))
    fresh = clone(source, tmp_path / "fresh")
    said += well(dvc(fresh, "exp", "pull", "origin", "other", client=client))
    said += well(dvc(fresh, "exp", "apply", "other", client=client))
    assert "up to date" in well(dvc(fresh, "status"))
    assert read_params(fresh / "params.yaml")["runs"]["tiny"]["train"]["steps"] == 14
    weights = "models/tiny/model.safetensors"
    assert (fresh / weights).read_bytes() != (source / weights).read_bytes()
    # The stages had the credentials in their environment.
    assert s3.secret not in said
    for path in (lab, fresh):
        assert holding(s3.secret, path) == []
