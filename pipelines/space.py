"""Sweeps as params.yaml describes them: which settings of a run are searched, and how.

Checks before anything runs: every value that a sweep can choose is tried on the run's settings, and
of a grid every combination, to a thousand. Knows Ray Tune only where it makes its search space.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from gram_core.config import Config, ConfigError, NonNegativeFloat, PositiveInt, Seed, load
from gram_core.tasks.base import Task
from gram_core.train.objective import Terms
from pipelines.params import FILE, Run, entry_of, read_params, run_of
from pipelines.storage import check
from pipelines.train import SPREAD, Job

RANGES = ("uniform", "loguniform")
LISTS = ("choice", "grid")
# What PBT may change in the middle of a trial: nothing that shapes the weights or the slots.
MUTABLE = ("train.optim.", "objective.", "train.prior_slots", "train.ema")
SHAPING = ("train.optim.name",)  # what an optimiser remembers is no other's
SECTIONS = ("model.", "objective.", "train.")
# Of how training is spread a trial, which is one process, has this alone.
PARTS = "accumulate"
COMBINATIONS = 1000


class SweepConfig(Config, frozen=True, kw_only=True):
    """One entry of `sweeps`. `space` gives for settings of the run (`train.optim.lr`) one of
    `uniform: [low, high]`, `loguniform: [low, high]`, `choice: [...]`, `grid: [...]`; `fixed`
    settles others for every trial. `trials` are how many are drawn (of a grid: how often it is gone
    through). ASHA judges after `grace` reports and keeps one in `reduction`; PBT copies the better
    every `grace` reports. A trial has `cpus` and `gpus` (one where there are any);
    `concurrent` bounds how many run at once. `storage` is where a sweep in progress keeps its
    state: an s3:// prefix, or a folder that all machines see; by default one of this checkout."""

    run: str
    space: dict[str, dict[str, Any]]
    fixed: dict[str, Any] = msgspec.field(default_factory=dict)
    search: Literal["random", "grid", "optuna"] = "random"
    scheduler: Literal["none", "asha", "pbt"] = "none"
    metric: str = "prior_valid"
    mode: Literal["max", "min"] = "max"
    trials: PositiveInt = 8
    seed: Seed = 0
    grace: PositiveInt = 2
    reduction: PositiveInt = 3
    cpus: PositiveInt = 1
    gpus: NonNegativeFloat | None = None
    concurrent: PositiveInt | None = None
    storage: str | None = None

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("space: has no setting to search")
        for key, spec in self.space.items():
            _check_spec(f"space.{key}", spec)
        kinds = {key: next(iter(spec)) for key, spec in self.space.items()}
        if self.search == "grid" and set(kinds.values()) != {"grid"}:
            odd = next(key for key, kind in kinds.items() if kind != "grid")
            raise ValueError(f"space.{odd}: search: grid takes only 'grid', not {kinds[odd]!r}")
        if self.search == "optuna" and "grid" in kinds.values():
            odd = next(key for key, kind in kinds.items() if kind == "grid")
            raise ValueError(f"space.{odd}: search: optuna takes no 'grid'; use 'choice'")
        keys = sorted([*self.space, *self.fixed])
        for key, other in itertools.pairwise(keys):
            if other == key or other.startswith(f"{key}."):
                raise ValueError(f"{other}: is given twice, in space or fixed, also by {key}")
        for key in keys:
            if key in [f"train.{name}" for name in SPREAD if name != PARTS]:
                raise ValueError(f"{key}: a trial is one process on `cpus` cores; leave it out")
        if self.metric not in Terms.names:
            raise ValueError(
                f"metric: expected one of {', '.join(Terms.names)}, got {self.metric!r}"
            )
        if self.scheduler == "pbt":
            if self.search == "optuna":
                raise ValueError("scheduler: pbt searches by itself; use search: random")
            for key in self.space:
                if not key.startswith(MUTABLE) or key in SHAPING:
                    raise ValueError(
                        f"space.{key}: scheduler: pbt can change only {', '.join(MUTABLE)} (but "
                        f"{', '.join(SHAPING)}) of a trial in progress"
                    )
        if self.reduction < 2:
            raise ValueError("reduction: at least 2")
        if self.storage is not None:
            check(self.storage)


def _check_spec(where: str, spec: Mapping[str, Any]) -> None:
    if len(spec) != 1 or next(iter(spec)) not in RANGES + LISTS:
        raise ValueError(f"{where}: expected one of {', '.join(RANGES + LISTS)}, got {spec!r}")
    kind, values = next(iter(spec.items()))
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{where}.{kind}: expected a list, got {values!r}")
    if kind in RANGES:
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(values) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
            raise ValueError(f"{where}.{kind}: expected [low, high], got {list(values)!r}")
        if kind == "loguniform" and numbers[0] <= 0:
            raise ValueError(f"{where}.loguniform: low must be above 0, got {numbers[0]}")


def load_sweep(name: str, path: Path = FILE) -> tuple[SweepConfig, dict[str, Any]]:
    """The sweep `name`, and params.yaml as it was read. Raises `ConfigError`, also where a value of
    its space is no setting of its run."""
    params = read_params(path)
    where = f"{path}: sweeps.{name}"
    config = load(SweepConfig, entry_of(params, "sweeps", name, path), where)
    for values in _extremes(config):
        try:
            _check_trial(config, Job.of(run_with(params, config, values, path)))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return config, params


def _check_trial(config: SweepConfig, job: Job) -> None:
    """Raise `ConfigError` where a trial would never report the metric, or has no checkpoints when
    PBT asks for them."""
    train = job.train
    twin = job.model.guidance == "none"
    follows = twin or train.prior_rows(job.model) > 0
    if (config.metric == "kl" and twin) or (config.metric.startswith("prior_") and not follows):
        raise ConfigError(f"metric: a run of these settings never reports {config.metric}")
    often = config.grace * train.log_every
    if config.scheduler == "pbt" and (
        often % train.checkpoint_every or train.checkpoint_every >= train.steps
    ):
        raise ConfigError(
            f"scheduler: pbt goes on from checkpoints every {often} iterations (grace times "
            f"train.log_every), but train.checkpoint_every is {train.checkpoint_every} of "
            f"{train.steps} steps; use one that {often} is a multiple of"
        )


def _extremes(config: SweepConfig) -> Iterator[dict[str, Any]]:
    """Choices that together try the ends of every range and every listed value; of a grid all, to
    `COMBINATIONS`."""
    lists: dict[str, list[Any]] = {}
    for key, spec in config.space.items():
        ((kind, values),) = spec.items()
        # What is drawn from a range is a float, its ends too.
        lists[key] = [float(v) for v in values] if kind in RANGES else list(values)
    if config.search == "grid" and math.prod(map(len, lists.values())) <= COMBINATIONS:
        for chosen in itertools.product(*lists.values()):
            yield dict(zip(lists, chosen, strict=True))
        return
    for row in range(max(map(len, lists.values()))):
        yield {key: values[row % len(values)] for key, values in lists.items()}


def run_with(
    params: Mapping[str, Any],
    config: SweepConfig,
    values: Mapping[str, Any],
    path: Path = FILE,
    task: Task | None = None,
) -> Run:
    """The sweep's run with the settings of one trial, which change no task: with `task` where it
    has been made already. Raises `ConfigError`."""
    document = copy.deepcopy(dict(params))
    entry = entry_of(document, "runs", config.run, path)
    for key, value in {**config.fixed, **values}.items():
        put(entry, key, value)
    # A trial is one process; how it is spread is the sweep's affair.
    put(entry, "train.engine", "plain")
    for key in ("train.workers", "train.zero_stage"):
        put(entry, key, int(key == "train.workers"))
    put(entry, "train.cores", config.cpus)
    return run_of(document, config.run, path, task)


def put(entry: Any, key: str, value: Any) -> None:
    """Set a dotted key of a run's entry. Raises `ConfigError` where it is no key of a run's
    training."""
    if not key.startswith(SECTIONS):
        raise ConfigError(f"{key}: a sweep chooses among {', '.join(f'{s}*' for s in SECTIONS)}")
    *parents, last = key.split(".")
    node = entry
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {parent} is no section")
    node[last] = value


def tune_space(config: SweepConfig) -> dict[str, Any]:
    """The space as Ray Tune takes it."""
    from ray import tune

    make = {
        "uniform": lambda values: tune.uniform(*values),
        "loguniform": lambda values: tune.loguniform(*values),
        "choice": tune.choice,
        "grid": tune.grid_search,
    }
    found = {key: next(iter(spec.items())) for key, spec in config.space.items()}
    return {key: make[kind](values) for key, (kind, values) in found.items()}
