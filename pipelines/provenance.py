"""What made a result: revision, versions, device and threads, written beside every result."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipelines.runtime import device_name, threads

MADE = ("dvc.lock", "models", "results")
PACKAGES = ("torch", "deepspeed", "ray", "pyarrow", "polars", "numpy")


def provenance() -> dict[str, Any]:
    """Git revision (with `+` where tracked files differ from it), package versions, device and
    threads."""
    return {
        "revision": revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device_name(),
        "threads": threads(),
    }


def revision() -> str:
    """The commit that the work tree is at; "unknown" outside a git checkout."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    # What a pipeline itself writes says nothing about the code.
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", *map(":!{}".format, MADE))
    return commit + ("+" if dirty else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
