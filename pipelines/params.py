"""params.yaml as checked objects: tasks and runs by name; and where their artifacts lie.

Checks only the entry that is asked for, so that a mistake in one run does not stop another. Knows
the file's layout; each section's keys belong to the config class beside its component.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from gram_core.config import Config, ConfigError, load
from gram_core.tasks.base import Task
from gram_core.tasks.registry import make_task
from pipelines.storage import StorageConfig

FILE = Path("params.yaml")
DATA, MODELS, RESULTS = Path("data"), Path("models"), Path("results")
WORK = Path(".gram")  # what is in progress
DEEPEST = 50  # levels of params.yaml, which has six
C = TypeVar("C", bound=Config)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
SECTIONS = ("tasks", "runs", "sweeps", "storage")
RUN_KEYS = ("task", "model", "objective", "train", "sample", "evaluate")


@dataclass(frozen=True)
class Run:
    """One entry of `runs`. Each stage checks the sections that it uses, so that a stage depends
    on no code of a later one."""

    name: str
    task_name: str
    task: Task
    entry: Mapping[str, Any]
    where: str

    def section(self, key: str, cls: type[C]) -> C:
        """The section `key` as its config class. Raises `ConfigError`."""
        return load(cls, self.entry.get(key, {}), f"{self.where}.{key}")


def _refuse(text: str, path: Path) -> None:
    """Raises `ConfigError` for YAML with tags, or so deep that its reader takes minutes."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        tag = getattr(event, "tag", None)
        fault = f"tag {tag}" if tag is not None else f"more than {DEEPEST} levels"
        if tag is not None or depth > DEEPEST:
            line = event.start_mark.line + 1
            raise ConfigError(
                f"{path}, line {line}: not valid YAML: {fault}, which is not read here"
            )


def read_params(path: Path = FILE) -> dict[str, Any]:
    """The whole file as plain mappings. Raises `ConfigError` where it is not YAML, holds tags, has
    more than `DEEPEST` levels, lacks the sections `tasks` or `runs`, or has others than these,
    `sweeps` and `storage`."""
    try:
        text = path.read_text()
        _refuse(text, path)
        document = YAML(typ="safe", pure=True).load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a UTF-8 text file") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {' '.join(problem.split())}") from None
    except ConfigError:
        raise
    except ValueError as error:  # a date or number that is none
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(document, Mapping):
        raise ConfigError(
            f"{path}: expected the sections 'tasks' and 'runs', got a {type(document).__name__}"
        )
    for key in document:
        if key not in SECTIONS:
            raise ConfigError(f"{path}: unknown section {key!r}; known: {', '.join(SECTIONS)}")
    for section in ("tasks", "runs", "sweeps"):
        entries = document.get(section, {} if section == "sweeps" else None)
        if not isinstance(entries, Mapping) or (section != "sweeps" and not entries):
            raise ConfigError(f"{path}: section {section!r} must be a mapping with an entry")
        for name in entries:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ConfigError(
                    f"{path}: {section}: {name!r} cannot be a name; use letters, digits, - and _"
                )
    return dict(document)


def trials_file(sweep: str) -> Path:
    """Where a sweep's table lies."""
    return RESULTS / "sweeps" / sweep / "trials.parquet"


def load_task(name: str, path: Path = FILE) -> Task:
    """The task `name`. Raises `ConfigError`."""
    return _task(read_params(path), name, path)


def load_storage(path: Path = FILE) -> StorageConfig:
    """Where workers read and write by themselves. Raises `ConfigError`."""
    section = read_params(path).get("storage", {})
    if not isinstance(section, Mapping):  # which may hold a credential: it is not repeated
        raise ConfigError(
            f"{path}: storage: expected a mapping of settings, got a {type(section).__name__}"
        )
    return load(StorageConfig, section, f"{path}: storage")


def load_run(name: str, path: Path = FILE) -> Run:
    """The run `name`, its task checked. Raises `ConfigError`."""
    return run_of(read_params(path), name, path)


def run_of(
    params: Mapping[str, Any], name: str, path: Path = FILE, task: Task | None = None
) -> Run:
    """The run `name` of what `read_params` gave; with `task` where it has been made already.
    Raises `ConfigError`."""
    entry = entry_of(params, "runs", name, path)
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

    return Run(name, task_name, task or _task(params, task_name, path), entry, where)


def _task(params: Mapping[str, Any], name: str, path: Path) -> Task:
    return make_task(entry_of(params, "tasks", name, path), f"{path}: tasks.{name}")


def entry_of(params: Mapping[str, Any], section: str, name: str, path: Path) -> Mapping[str, Any]:
    """The entry `name` of a section. Raises `ConfigError`."""
    entries = params.get(section) or {}
    if name not in entries:
        known = ", ".join(entries) or "none"
        raise ConfigError(f"{path}: no entry {name!r} in {section!r}; there are: {known}")
    entry = params[section][name]
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{path}: {section}.{name}: expected a mapping, got {entry!r}")
    return entry
