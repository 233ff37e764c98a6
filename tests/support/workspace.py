"""A small params.yaml and the stages over it, in the working folder of a test."""

import copy
import io
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file

from pipelines.dataset import augment, generate
from pipelines.evaluate import evaluate
from pipelines.params import load_run, load_task
from pipelines.runtime import environment
from pipelines.sample import sample_run
from pipelines.train import train_run

REPOSITORY = Path(__file__).parents[2]
PARAMS: dict[str, Any] = {
    "tasks": {
        "queens": {
            "kind": "nqueens",
            "size": 5,
            "remove": [2, 3],
            "split": {"by": "input", "test": 0.3, "seed": 0},
        }
    },
    "runs": {
        "tiny": {
            "task": "queens",
            "model": {
                "core": "mixer", "dim": 16, "ffn": 32, "heads": 2, "K": 1, "T": 2, "N_sup": 2,
                "prefix_tokens": 0, "head_input": "mean", "guidance": "full",
            },
            "objective": {"beta": 1.5},
            "train": {
                "steps": 12, "batch": 8, "ema": 0.9, "log_every": 2, "checkpoint_every": 4,
                "compile": False, "engine": "plain",
                "optim": {"lr": 2.0e-3, "weight_decay": 0.1, "warmup": 2, "schedule": "cosine"},
            },
            "sample": {"width": 3, "depth": 2, "depths": [1, 3], "batch": 16, "concurrency": 0},
            "evaluate": {"widths": [1, 3], "resamples": 100},
        }
    },
    "sweeps": {},
}  # fmt: skip


def params(**changes: Any) -> dict[str, Any]:
    """PARAMS with values replaced; `runs__tiny__train__steps=3` names a key."""
    document = copy.deepcopy(PARAMS)
    for path, value in changes.items():
        *parents, key = path.split("__")
        node = document
        for parent in parents:
            node = node[parent]
        node[key] = value
    return document


def write_params(document: Mapping[str, Any], folder: Path = Path()) -> None:
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(dict(document), text)
    (folder / "params.yaml").write_text(text.getvalue())


def make_data(name: str = "queens") -> None:
    generate(name, load_task(name))
    augment(name, load_task(name))


def make_run(name: str = "tiny") -> dict[str, float]:
    """Train, sample and evaluate."""
    train_run(load_run(name))
    sample_run(load_run(name))
    return evaluate(load_run(name))


def trained(name: str = "tiny") -> tuple[dict[str, float], dict[str, object]]:
    """Final metrics of a training but for its time, and the weights as lists."""
    metrics = json.loads(Path("models", name, "metrics.json").read_text())
    weights = load_file(Path("models", name, "model.safetensors"))
    metrics.pop("train_seconds")
    return metrics, {key: tensor.tolist() for key, tensor in weights.items()}


def may_mount() -> bool:
    """Whether this process may make mount namespaces, and mount disks of its own in them."""
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return done.returncode == 0


def copy_to_work_in(source: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a workspace that others share, as the working folder of a test."""
    shutil.copytree(source, path)
    monkeypatch.chdir(path)
    return path


def child_environment() -> dict[str, str]:
    """For a stage in a process of its own, whose working folder is not the repository."""
    return {**os.environ, **environment(), "PYTHONPATH": str(REPOSITORY)}


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder, to see that nothing changed."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
