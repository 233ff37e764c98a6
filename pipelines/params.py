"""params.yaml as checked objects: tasks and runs by name.

Reads the file once per process and checks only the section that is asked for, so that a mistake in
one run does not stop another. Knows the file's layout; each section's keys belong to the config
class beside its component.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gram_core.config import ConfigError, load
from gram_core.evaluate.metrics import EvaluateConfig
from gram_core.model.gram import ModelConfig
from gram_core.sample.trajectory import SampleConfig
from gram_core.tasks.base import Task
from gram_core.tasks.registry import make_task
from gram_core.train.loop import TrainConfig
from gram_core.train.objective import ObjectiveConfig

FILE = Path("params.yaml")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
RUN_KEYS = ("task", "model", "objective", "train", "sample", "evaluate")


@dataclass(frozen=True)
class Run:
    """One entry of `runs`, every section checked."""

    name: str
    task_name: str
    task: Task
    model: ModelConfig
    objective: ObjectiveConfig
    train: TrainConfig
    sample: SampleConfig
    evaluate: EvaluateConfig


def read_params(path: Path = FILE) -> dict[str, Any]:
    """The whole file as plain mappings. Raises `ConfigError` where it is not YAML, holds tags, or
    has other sections than `tasks` and `runs`."""
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a UTF-8 text file") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {' '.join(problem.split())}") from None
    if not isinstance(document, Mapping):
        raise ConfigError(f"{path}: expected the sections 'tasks' and 'runs', got {document!r}")
    for key in document:
        if key not in ("tasks", "runs"):
            raise ConfigError(f"{path}: unknown section {key!r}; known: tasks, runs")
    for section in ("tasks", "runs"):
        entries = document.get(section)
        if not isinstance(entries, Mapping) or not entries:
            raise ConfigError(f"{path}: section {section!r} must be a mapping with an entry")
        for name in entries:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ConfigError(
                    f"{path}: {section}: {name!r} cannot be a name; use letters, digits, - and _"
                )
    return dict(document)


def load_task(name: str, path: Path = FILE) -> Task:
    """The task `name`. Raises `ConfigError`."""
    return _task(read_params(path), name, path)


def load_run(name: str, path: Path = FILE) -> Run:
    """The run `name`, its sections checked by themselves and against each other. Raises
    `ConfigError`."""
    params = read_params(path)
    entry = _entry(params, "runs", name, path)
    where = f"{path}: runs.{name}"
    for key in entry:
        if key not in RUN_KEYS:
            raise ConfigError(f"{where}.{key}: unknown key; known keys: {', '.join(RUN_KEYS)}")
    task_name = entry.get("task")
    if not isinstance(task_name, str):
        raise ConfigError(f"{where}.task: expected the name of a task, got {task_name!r}")
    if task_name not in params["tasks"]:
        known = ", ".join(params["tasks"])
        raise ConfigError(f"{where}.task: no task {task_name!r} in 'tasks'; there are: {known}")

    def section(key: str) -> Mapping[str, Any]:
        value: Mapping[str, Any] = entry.get(key, {})
        return value

    run = Run(
        name=name,
        task_name=task_name,
        task=_task(params, task_name, path),
        model=load(ModelConfig, section("model"), f"{where}.model"),
        objective=load(ObjectiveConfig, section("objective"), f"{where}.objective"),
        train=load(TrainConfig, section("train"), f"{where}.train"),
        sample=load(SampleConfig, section("sample"), f"{where}.sample"),
        evaluate=load(EvaluateConfig, section("evaluate"), f"{where}.evaluate"),
    )
    _check_together(run, where)
    return run


def _check_together(run: Run, where: str) -> None:
    """Contradictions between sections."""
    widest = max(run.evaluate.widths)
    if widest > run.sample.width:
        raise ConfigError(
            f"{where}.evaluate.widths: {widest} is above sample.width {run.sample.width}; "
            "draw that many trajectories or report fewer"
        )
    learns = run.objective.halt_weight > 0 or run.objective.value_weight > 0
    guided = run.model.guidance != "none"
    if guided and learns and run.objective.heads_on == "prior" and not run.train.prior_slots:
        raise ConfigError(
            f"{where}.train.prior_slots: 0 leaves the halt and value heads nothing to learn from; "
            "use a share above 0, or objective.heads_on: posterior"
        )


def _task(params: Mapping[str, Any], name: str, path: Path) -> Task:
    return make_task(_entry(params, "tasks", name, path), f"{path}: tasks.{name}")


def _entry(params: Mapping[str, Any], section: str, name: str, path: Path) -> Mapping[str, Any]:
    if name not in params[section]:
        known = ", ".join(params[section])
        raise ConfigError(f"{path}: no entry {name!r} in {section!r}; there are: {known}")
    entry = params[section][name]
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{path}: {section}.{name}: expected a mapping, got {entry!r}")
    return entry
