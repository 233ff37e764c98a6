"""A checkout of its own with the project's code in it, for tests that run DVC."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from workspace import REPOSITORY

# What the pipeline is made of.
PIPELINE = (".dvc", ".dvcignore", ".gitignore", "dvc.yaml", "gram_core", "pipelines", "stages")


def copy_code(path: Path, names: Sequence[str] = PIPELINE) -> None:
    """The files of the work tree that git knows or would take, below these names."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *names],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        source = REPOSITORY / name
        if source.is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, path / name)


def git(path: Path, *arguments: str) -> None:
    """A git command that must end well."""
    own = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *own, *arguments], cwd=path, check=True, capture_output=True)


def commit(path: Path, message: str = "start") -> None:
    """All that is there."""
    git(path, "add", "-A")
    git(path, "commit", "-qm", message)
