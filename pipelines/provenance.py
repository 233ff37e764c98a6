"""What made a result: seed, revision, versions, computers and environment, written beside every
result."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipelines.runtime import device_name, environment, threads

MADE = ("dvc.lock", "models", "results")
PACKAGES = ("torch", "deepspeed", "ray", "dvc", "pyarrow", "polars", "numpy")
# Only these variables are told: an environment holds credentials too.
VARIABLES = (*environment(), "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def provenance(
    seed: int | None = None, workers: Iterable[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Seed, git revision (with `+` where tracked files differ from it), package versions, this
    process's `computer`, the variables of the environment that bear on a result, and, where
    `workers` did the work, their computers, each kind once."""
    made = {
        "seed": seed,
        "revision": revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        **computer(threads()),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if workers is not None:
        made["workers"] = list({json.dumps(worker): worker for worker in workers}.values())
    return made


def computer(cores: int, gpus: float | None = None) -> dict[str, Any]:
    """What this process computes on, with `cores` threads and of `gpus` what it was given."""
    import torch

    device = device_name(gpus)
    if device == "cuda":
        device = f"{device}, {torch.cuda.get_device_name()}"
    machine = f"{platform.system()} {platform.machine()}, {_processor()}"
    return {"machine": machine, "device": device, "threads": cores}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def revision() -> str:
    """The commit that the work tree is at; "unknown" outside a git checkout."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    # What a pipeline itself writes says nothing about the code.
    others = [f":(top,exclude){path}" for path in MADE]
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *others)
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
