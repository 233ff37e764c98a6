"""Rebuilding a revision: `gram reproduce REV`.

In a clean worktree of REV, DVC pulls what this checkout's cache or the remote has and reruns what
they have not; then every metric is compared with the one recorded at REV, by its interval.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gram_core.errors import GramError
from pipelines.lock import alone
from pipelines.params import FILE, WORK, read_params
from pipelines.provenance import PACKAGES
from pipelines.runtime import say

# What differs from one rebuild to the next and means nothing.
VOLATILE = ("train_seconds",)


@dataclass(frozen=True)
class Difference:
    """One metric as recorded and as found; `low` and `high` are the recorded interval, where the
    metric has one."""

    run: str
    name: str
    recorded: float
    found: float | None
    low: float
    high: float

    @property
    def within(self) -> bool:
        """Whether the found value lies in the recorded interval."""
        slack = 1e-9 * max(1.0, abs(self.recorded))
        return self.found is not None and self.low - slack <= self.found <= self.high + slack

    def line(self) -> str:
        """For a person."""
        found = "missing" if self.found is None else f"{self.found:.6g}"
        return (
            f"{self.run}: {self.name}: recorded {self.recorded:.6g} "
            f"[{self.low:.6g}, {self.high:.6g}], found {found}"
        )


def reproduce(revision: str, runs: Sequence[str], *, force: bool = False) -> int:
    """Rebuild and compare; the exit code: 1 where a metric lies outside its recorded interval.
    Raises `GramError` where the revision or the rebuild fails."""
    commit = _git(Path(), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if not commit:
        raise GramError(f"{revision}: no such revision in this repository")
    top = Path(_git(Path(), "rev-parse", "--show-toplevel"))
    tree = top / WORK / "reproduce" / commit[:12]
    with alone(f"reproduce-{commit[:12]}", "another gram reproduce of this revision", top):
        return _compared(revision, commit, top, tree, runs, force=force)


def _compared(
    revision: str, commit: str, top: Path, tree: Path, runs: Sequence[str], *, force: bool
) -> int:
    _remove(top, tree)
    if _run(["git", "worktree", "add", "--detach", "--force", str(tree), commit], top):
        raise GramError(f"{revision}: git could not make a worktree at {tree}")
    try:
        recorded = {path: _numbers(tree / path, revision) for path in _metrics(tree, runs)}
        if not recorded:
            raise GramError(f"{revision}: has no recorded metrics of any run")
        _tell_packages(tree)
        _share(top, tree)
        ran = _rebuild(tree, runs, force=force)
        rows = list(compare(recorded, tree))
    finally:
        _remove(top, tree)
    outside = [row for row in rows if not row.within]
    for row in outside:
        print(row.line())
    exact = sum(row.found == row.recorded for row in rows)
    print(
        f"{revision} ({commit[:12]}): {len(rows)} metrics compared: {exact} equal, "
        f"{len(rows) - exact - len(outside)} within their interval, {len(outside)} outside; "
        + (
            f"{ran} stages were run, the others' outputs are the recorded ones"
            if ran
            else "no stage had to be run: these are the recorded outputs; --force makes them anew"
        )
    )
    return 1 if outside else 0


def _numbers(path: Path, revision: str) -> dict[str, float]:
    """The metrics recorded at a revision. Raises `GramError` where they cannot be read."""
    try:
        return {name: float(value) for name, value in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise GramError(f"{revision}: {path.name} of {path.parent.name}: {error}") from None


def compare(recorded: dict[Path, dict[str, float]], tree: Path) -> Iterator[Difference]:
    """Each recorded metric with the one in the rebuilt tree. One without an interval of its own
    must be the same, to the last digits."""
    for path, metrics in recorded.items():
        file = tree / path
        found = json.loads(file.read_text()) if file.is_file() else {}
        for name, value in metrics.items():
            if name in VOLATILE or name.endswith(("_low", "_high")):
                continue
            low = metrics.get(f"{name}_low", value)
            high = metrics.get(f"{name}_high", value)
            yield Difference(path.parent.name, name, value, found.get(name), low, high)


def _metrics(tree: Path, runs: Sequence[str]) -> list[Path]:
    """What was recorded: what evaluation says of each run. (Training's own numbers are those of a
    few last batches, and have no interval.) What is no run any more nothing would make anew."""
    there = sorted(path.relative_to(tree) for path in tree.glob("results/*/metrics.json"))
    known = read_params(tree / FILE)["runs"]
    paths = [path for path in there if path.parent.name in known]
    left = [path.parent.name for path in there if path not in paths]
    if left:
        say(f"note: no run of {FILE}, so not compared: {', '.join(left)}")
    unknown = set(runs) - {path.parent.name for path in paths}
    if unknown:
        raise GramError(f"no metrics of {', '.join(sorted(unknown))} are recorded there")
    return [path for path in paths if not runs or path.parent.name in runs]


def _tell_packages(tree: Path) -> None:
    """Say which installed packages are not those that the revision locks, and which of those that
    bear on every result are absent."""
    from importlib.metadata import PackageNotFoundError, version

    lock = tree / "requirements.lock"
    if not lock.is_file():
        return
    locked = dict(line.split("==") for line in lock.read_text().splitlines() if "==" in line)
    others = []
    for name, wanted in locked.items():
        try:
            have = version(name).partition("+")[0]
        except PackageNotFoundError:
            have = "absent" if name in PACKAGES else wanted
        if have != wanted:
            others.append(f"{name} {have} (locked {wanted})")
    if others:
        say(f"note: packages other than the revision's lock: {', '.join(others)}")


def _share(top: Path, tree: Path) -> None:
    """Let the worktree use this checkout's DVC cache and the settings that only this machine has,
    remotes among them."""
    own = top / ".dvc" / "config.local"
    if own.is_file():
        shutil.copy(own, tree / ".dvc" / "config.local")
    cache = subprocess.run(
        [_dvc(), "cache", "dir"], cwd=top, capture_output=True, text=True, check=False
    ).stdout.strip()
    if cache and _run([_dvc(), "cache", "dir", "--local", str((top / cache).resolve())], tree):
        raise GramError("dvc: the worktree cannot use this checkout's cache")


def _rebuild(tree: Path, runs: Sequence[str], *, force: bool) -> int:
    """Bring or make all outputs; how many stages were run."""
    targets = [f"evaluate@{run}" for run in runs]
    remotes = subprocess.run(
        [_dvc(), "remote", "list"], cwd=tree, capture_output=True, text=True, check=False
    ).stdout
    if not force:
        # Outputs persist, so `dvc repro` takes none from the cache by itself.
        bring = "pull" if remotes.strip() else "checkout"
        deps = ["--with-deps"] if targets else []
        if _run([_dvc(), bring, "--quiet", "--allow-missing", *deps, *targets], tree):
            say(f"dvc {bring} did not bring everything; the rest is run")
    command = [_dvc(), "repro", *(["--force"] if force else []), *targets]
    say(f"in {tree}: {' '.join(['dvc', *command[1:]])}")
    ran = 0
    with subprocess.Popen(
        command, cwd=tree, env=_environment(tree), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            ran += line.startswith("Running stage")
    if process.returncode:
        raise GramError(
            f"dvc repro ended with exit code {process.returncode} in the worktree; see above"
        )
    return ran


def _dvc() -> str:
    beside = Path(sys.executable).with_name("dvc")
    return str(beside) if beside.is_file() else "dvc"


def _run(command: Sequence[str], folder: Path) -> int:
    """Run a command with the worktree's own code; its exit code."""
    return subprocess.run(command, cwd=folder, env=_environment(folder), check=False).returncode


def _environment(folder: Path) -> dict[str, str]:
    # Stages call `python`, which is this one, environment active or not.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PYTHONPATH": str(folder.resolve()), "PATH": path}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _remove(top: Path, tree: Path) -> None:
    """Take away a worktree, one that a killed command left too."""
    if tree.exists():
        _git(top, "worktree", "remove", "--force", str(tree))
        shutil.rmtree(tree, ignore_errors=True)
