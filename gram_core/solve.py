"""Three lines from a trained run to the answers of a puzzle.

    from gram_core.solve import Solver
    solver = Solver.load("models/nqueens8_gram")
    answers = solver.solve("Q.......|........|........|...Q....|" + "|".join(["........"] * 4))

Needs torch and a model folder; knows nothing of pipelines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gram_core.config import ConfigError, dump, load
from gram_core.model.gram import GRAM
from gram_core.model.store import ModelError, load_model
from gram_core.sample.trajectory import SampleConfig, rollout
from gram_core.tasks.base import Task, TaskError
from gram_core.tasks.batches import Puzzles
from gram_core.tasks.registry import make_task


@dataclass(frozen=True)
class Answer:
    """One distinct answer of the trajectories."""

    tokens: np.ndarray
    verified: bool
    count: int
    value: float
    text: str


class Solver:
    """A trained model with its task."""

    def __init__(
        self, model: GRAM, task: Task, sample: SampleConfig, groups: Sequence[str] = ()
    ) -> None:
        self.model = model
        self.task = task
        self.sample = sample
        self.groups = groups

    @classmethod
    def load(
        cls,
        folder: str | Path,
        sample: SampleConfig | None = None,
        device: torch.device | None = None,
    ) -> "Solver":
        """The model and task of a run's folder, e.g. `models/nqueens8_gram`. How the run itself is
        sampled stands in params.yaml, not there: pass it as `sample`; by default it samples as
        `SampleConfig` says, halting included, to the depth that it was trained to.

        Raises `ModelError` for a missing or damaged model.
        """
        path = Path(folder)
        model, about = load_model(path, device)
        if "task" not in about:
            raise ModelError(f"{path / 'config.json'}: names no task")
        task = make_task(about["task"], f"{path / 'config.json'}: task")
        config = sample or SampleConfig(depth=model.config.N_sup)
        return cls(model, task, config, about.get("identifiers", []))

    def solve(self, puzzle: str, width: int = 20, **settings: Any) -> list[Answer]:
        """The distinct answers of `width` trajectories: verified ones first, then by the number
        of trajectories that agree, then by value. `settings` override `sample`
        (`depth`, `seed`, `halting`, ...). Raises `TaskError` for a malformed puzzle and
        `ConfigError` for a setting that cannot be."""
        tokens = self.task.parse(puzzle)
        inputs = torch.from_numpy(tokens)[None]
        if "depths" in settings:
            raise ConfigError("solve.depths: an answer is of one depth; use depth")
        changes = {"depths": (), "width": width, **settings}
        config = load(SampleConfig, {**dump(self.sample), **changes}, "solve")
        identifier = torch.tensor([self._identifier(puzzle)], dtype=torch.int32)
        verify = self.task.verify if self.task.verifies else None
        if config.stop_when_verified and verify is None:
            raise ConfigError(
                "solve.stop_when_verified: this task has no rule to verify answers by"
            )
        puzzles = Puzzles([puzzle_name(tokens)], inputs, identifier)
        result = rollout(self.model, puzzles, config, verify=verify)
        drawn = result.steps[0] > 0
        predictions = self.task.canonical(result.prediction[0, drawn])
        valid = torch.zeros(len(predictions), dtype=torch.bool)
        if verify is not None:
            valid = verify(inputs.expand(len(predictions), -1), torch.from_numpy(predictions))
        groups: dict[bytes, list[int]] = {}
        for row, prediction in enumerate(predictions):
            groups.setdefault(prediction.tobytes(), []).append(row)
        answers = [
            Answer(
                tokens=predictions[rows[0]],
                verified=bool(valid[rows[0]]),
                count=len(rows),
                value=float(result.value[0, drawn][rows].max()),
                text=self.task.render(predictions[rows[0]]),
            )
            for rows in groups.values()
        ]
        return sorted(answers, key=lambda a: (not a.verified, -a.count, -a.value))

    def _identifier(self, puzzle: str) -> int:
        if not self.task.identified:
            return 0
        group = self.task.group(puzzle)
        if group not in self.groups:
            raise TaskError(f"this model has no identifier for {group!r}: it was not trained on it")
        return self.groups.index(group) * self.task.variants


def puzzle_name(tokens: np.ndarray) -> str:
    """The identifier that keys the noise of a puzzle that comes from no table."""
    return bytes(tokens).hex()
