"""A small synthetic workspace: true solutions and corrupted ones instead of a trained model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from gram_core import tables
from gram_core.config import load
from gram_core.evaluate.metrics import EvaluateConfig, metrics, puzzle_table
from gram_core.tasks.nqueens import EMPTY, QUEEN, NQueens
from gram_core.tasks.registry import make_task
from gram_core.train.objective import Terms

Settings = Mapping[str, Any]
TASK = {"kind": "nqueens", "size": 7, "remove": [5, 6], "split": {"by": "input", "test": 0.4}}
SAMPLE = {"width": 5, "depth": 4, "depths": [2, 8]}
EVALUATE = {"widths": [1, 2, 5], "resamples": 100}
RUNS = {
    "gram": {"task": "queens", "train": {"batch": 8}, "sample": SAMPLE, "evaluate": EVALUATE},
    "twin": {"task": "queens", "train": {"batch": 8}, "sample": SAMPLE, "evaluate": EVALUATE},
}


def write_workspace(
    root: Path,
    runs: Settings = RUNS,
    task: Settings = TASK,
    skill: float = 0.35,
    counted: bool = True,
) -> None:
    """Fill `root` with what the stages would leave behind; a run called `twin` is deterministic.
    `counted` says whether the numbers of solutions are known."""
    queens = make_task(task, "task")
    assert isinstance(queens, NQueens)
    split = queens.generate(Path)
    schema = tables.dataset_schema(queens.length, queens.length)
    test = split.test
    if not counted:
        unknown = pa.array([0] * len(test), pa.uint32())
        test = test.set_column(3, "solution_count", unknown)
    tables.write(root / "data/queens/test.parquet", test, schema, {"task": task})
    path = root / "data/queens/raw/metadata.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(split.metadata))
    for number, (name, settings) in enumerate(runs.items()):
        _write_model(root / "models" / name, name == "twin")
        rows = _trajectories(queens, test, settings["sample"], name == "twin", number, skill)
        folder = root / "results" / name
        made = {"run": name, "revision": "0123456789abcdef0123"}
        tables.write(
            folder / "trajectories.parquet", rows, tables.trajectories_schema(queens.length), made
        )
        config = load(EvaluateConfig, settings["evaluate"], f"runs.{name}.evaluate")
        frames = [pl.from_arrow(rows), pl.from_arrow(test)]
        assert all(isinstance(frame, pl.DataFrame) for frame in frames)
        puzzles = puzzle_table(*(frame.lazy() for frame in frames), config.widths)  # type: ignore
        tables.write(folder / "puzzles.parquet", puzzles.to_arrow(), tables.puzzles_schema(), made)
        numbers = metrics(puzzles, settings["sample"]["depth"], config)
        (folder / "metrics.json").write_text(json.dumps(numbers))


def _write_model(folder: Path, deterministic: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = {"guidance": "none" if deterministic else "full", "dim": 16, "K": 2, "T": 2, "N_sup": 4}
    (folder / "config.json").write_text(json.dumps({"version": 1, "model": model}))
    numbers = {"reconstruction": 0.01, "parameters": 123456.0, "train_seconds": 300.0}
    (folder / "metrics.json").write_text(json.dumps(numbers))
    lines = [",".join(["step", "lr", *Terms.names])]
    for step in range(50, 2001, 50):
        fast, slow = 1 - np.exp(-step / 300), 1 / (1 + np.exp(-(step - 1000) / 200))
        values: dict[str, float] = {
            "reconstruction": 0.3 * (1 - (slow if deterministic else fast)),
            "token_accuracy": 0.8 + 0.2 * (slow if deterministic else fast),
            "exact": slow * 0.7 if deterministic else fast,
        }
        # As training does: a run without guidance has both, the loss over all slots.
        values |= {"prior_reconstruction": 0.4 - 0.2 * slow, "prior_valid": 0.6 * slow}
        values |= {"prior_token_accuracy": 0.8 + 0.1 * slow, "prior_exact": 0.4 * slow}
        if not deterministic:
            values["kl"] = 9 * fast * (1.4 - slow)
        cells = [str(values[name]) if name in values else "" for name in Terms.names]
        lines.append(",".join([str(step), "0.001", *cells]))
    (folder / "history.csv").write_text("\n".join(lines) + "\n")


def _trajectories(
    task: NQueens, test: pa.Table, sample: Settings, deterministic: bool, seed: int, skill: float
) -> pa.Table:
    """Each trajectory is right from some step on; before that a queen or two stand elsewhere."""
    rng = np.random.default_rng(seed)
    inputs, targets = tables.tokens_numpy(test["inputs"]), tables.tokens_numpy(test["target"])
    ids = np.array(test["puzzle_id"].to_pylist())
    depths = sorted({sample["depth"], *sample["depths"]})
    records: list[tuple[Any, ...]] = []
    given: list[np.ndarray] = []
    for name in np.unique(ids):
        answers = targets[ids == name]
        shares = rng.dirichlet(np.full(len(answers), 0.8))
        once = None
        for trajectory in range(sample["width"]):
            if once is None or not deterministic:
                solved_at = rng.geometric(skill / 2)
                ends = min(solved_at + 1, depths[-1]) if rng.random() < 0.8 else depths[-1]
                right = answers[rng.choice(len(answers), p=shares)]
                once = (solved_at, ends, right, _corrupt(right, inputs[ids == name][0], rng))
            solved_at, ends, right, wrong = once
            for depth in depths:
                steps = min(depth, ends)
                token = right if steps >= solved_at else wrong
                value = 0.5 + 0.3 * (steps >= solved_at) + 0.1 * rng.standard_normal()
                halted = ends <= depth and ends < depths[-1]
                records.append((name, trajectory, depth, 0, steps, halted, value))
                given.append(np.concatenate([inputs[ids == name][0], token]))
    both = np.stack(given)
    before, after = np.split(both, 2, axis=1)
    valid = task.verify(torch.from_numpy(before), torch.from_numpy(after)).numpy()
    names = ["puzzle_id", "trajectory", "depth", "seed", "steps", "halted", "value"]
    columns: dict[str, Any] = dict(zip(names, map(list, zip(*records, strict=True)), strict=True))
    columns |= {"prediction": tables.tokens_array(after), "valid": valid, "exact": valid}
    return pa.table(columns)


def _corrupt(board: np.ndarray, given: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move one or two queens, mostly not the given ones."""
    wrong = board.copy()
    placed = np.flatnonzero((board == QUEEN) & ((given != QUEEN) | (rng.random() < 0.1)))
    for cell in rng.choice(placed, min(len(placed), int(rng.integers(1, 3))), replace=False):
        wrong[cell] = EMPTY
        wrong[rng.choice(np.flatnonzero(wrong == EMPTY))] = QUEEN
    return wrong


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that tests only read."""
    root = tmp_path_factory.mktemp("workspace")
    write_workspace(root)
    return root


@pytest.fixture(scope="session")
def make_workspace() -> Callable[..., None]:
    """`write_workspace`, for tests that need one of their own."""
    return write_workspace


@pytest.fixture(scope="session")
def runs() -> Settings:
    """params.yaml's `runs` of the workspace."""
    return RUNS
