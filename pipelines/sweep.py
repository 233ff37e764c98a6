"""Sweeps: Ray Tune over the function that trains a run; one table of all trials and reports.

What a sweep in progress keeps lies in .gram/sweeps or below `storage`; a sweep that was killed goes
on from there. Nothing else of the project reads a sweep's results: a person promotes them.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from gram_core import tables
from gram_core.config import dump
from gram_core.errors import GramError
from gram_core.tasks.base import Task
from gram_core.tasks.batches import Examples
from gram_core.train.checkpoint import META, Found
from gram_core.train.engine import PlainEngine
from gram_core.train.objective import Terms
from pipelines import storage
from pipelines.compute import compute_with
from pipelines.dataset import examples, identifiers
from pipelines.lock import alone
from pipelines.params import WORK, read_params, trials_file
from pipelines.provenance import computer, provenance
from pipelines.runtime import cluster_address, device_name, say
from pipelines.space import RANGES, SweepConfig, load_sweep, run_with, tune_space
from pipelines.train import Job, build_module, fingerprint, job_of, work

SETTINGS = "sweep.json"
COMPUTER = "computer"  # what a report was computed on
CRASHES = 2  # of a trial's process that it goes on after
# Checkpoints of a trial: what Tune has written of a sweep's state may be a few checkpoints old when
# it is killed, and is of no use if it names one that is gone.
KEPT = 10


class TrialStore:
    """A trial's checkpoints, kept by Ray Tune, and its reports: a `Store` and a `Report`. Each
    report says what it was computed on.

    Tune takes a checkpoint only together with a report, so the report of a checkpoint's iteration
    waits for it. What a trial was given to go on from it does not report again.
    """

    def __init__(self, every: int, steps: int, on: Mapping[str, Any]) -> None:
        from ray import tune

        self.every, self.steps = every, steps
        self.on = {COMPUTER: json.dumps(on)}
        self.pending: dict[str, float] | None = None
        self.found: Found | None = None
        self.seen = 0
        given = tune.get_checkpoint()
        if given is not None:
            with given.as_directory() as folder:
                files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
            if META in files:
                self.found = Found(str(given.path), files)
                self.seen = int(json.loads(files[META])["iteration"])

    def report(self, row: dict[str, float]) -> None:
        """One logged row of training."""
        from ray import tune

        step = int(row["step"])
        if step <= self.seen:
            return
        if step % self.every == 0 and step < self.steps:
            self.pending = row
        else:
            tune.report({**row, **self.on})

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        from ray import tune

        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                (Path(folder) / file).write_bytes(content)
            given = tune.Checkpoint.from_directory(folder)
            tune.report({**(self.pending or {}), **self.on}, checkpoint=given)
        self.pending = None

    def newest(self) -> Found | None:
        return self.found

    def clear(self) -> None:
        """Tune does it."""


def trial(
    values: dict[str, Any],
    *,
    params: Mapping[str, Any],
    config: SweepConfig,
    task: Task,
    groups: tuple[str, ...],
    rows: Examples,
) -> None:
    """What each trial runs: the run's training with the values that the sweep chose. The task comes
    with it: its verifier may be a module that this machine has not."""
    job = job_of(run_with(params, config, values, task=task), groups)
    compute_with(config.cpus)
    module = build_module(job, device_name(config.gpus))
    engine = PlainEngine(module, job.train.optim, job.train.accumulate)
    on = computer(config.cpus, config.gpus)
    store = TrialStore(job.train.checkpoint_every, job.train.steps, on)
    # Where PBT gives a trial another's checkpoint, settings differ: they do not identify it.
    work(engine, job, rows, store, store.report, [on], identity="sweep")


def sweep(name: str, *, resume: bool = False) -> int:
    """Run the sweep and write results/sweeps/NAME/trials.parquet; the number of its rows. With
    `resume`, go on with what a killed sweep left. Raises `GramError`."""
    with alone(f"sweep-{name}", f"sweep {name}"):
        return _sweep(name, resume=resume)


def _sweep(name: str, *, resume: bool) -> int:
    from ray import tune

    from pipelines.cluster import cluster, has_gpus

    config, params = load_sweep(name)
    job, rows = _checked(params, config)
    place = _place(name, config)
    filesystem, folder = _filesystem(place)
    about = {
        "sweep": dump(config),
        "run": params["runs"][config.run],
        "training": fingerprint(job, rows),
    }
    settings = json.dumps(about, sort_keys=True)
    # The table of trials, not the log of them; and Ctrl-C leaves the sweep to be resumed, where
    # Tune by itself would end it early as if it were done.
    # A report may lack the metric: a term that did not occur in its window. The state is written as
    # it changes: a trial that ended is not to run again.
    os.environ.update(
        {
            "RAY_AIR_NEW_OUTPUT": "0",
            "TUNE_DISABLE_SIGINT_HANDLER": "1",
            "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
            "TUNE_GLOBAL_CHECKPOINT_S": "0",
            "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        }
    )
    with cluster():
        gpus = float(has_gpus()) if config.gpus is None else config.gpus
        _fits(name, config, gpus)
        function = tune.with_resources(
            tune.with_parameters(
                trial,
                params=params,
                config=config,
                task=job.task,
                groups=job.identifiers,
                rows=rows,
            ),
            {"cpu": config.cpus, "gpu": gpus},
        )
        lying = storage.names(place)
        there = SETTINGS in lying
        if config.storage is not None and lying and not there:
            # It will be cleared: it must be ours.
            raise GramError(
                f"sweep {name}: {place} holds what is no sweep's ({lying[0]}); name another folder "
                f"or prefix in sweeps.{name}.storage, or empty it"
            )
        if resume and there and storage.read(storage.join(place, SETTINGS)).decode() != settings:
            raise GramError(
                f"sweep {name}: its settings or its data have changed since it began at "
                f"{place}; run it without --resume to begin anew"
            )
        # One that was killed before Tune began has nothing to go on with.
        begun = there and tune.Tuner.can_restore(f"{folder}/run", storage_filesystem=filesystem)
        if resume and begun:
            tuner = tune.Tuner.restore(
                f"{folder}/run",
                function,
                resume_unfinished=True,
                restart_errored=True,
                param_space=tune_space(config),
                storage_filesystem=filesystem,
            )
        else:
            if there and not resume:
                say(f"sweep {name}: begins anew; --resume would go on with what is at {place}")
            storage.remove(place)
            storage.write(storage.join(place, SETTINGS), settings.encode())
            tuner = _tuner(name, function, config, filesystem, folder)
        grid = tuner.fit()
    if grid.num_errors == len(grid):
        reason = " ".join(str(grid.errors[0]).split())[-200:]
        raise GramError(f"sweep {name}: every trial failed ({reason}); --resume tries them again")
    table = trials_table(name, grid)
    _write(name, config, table, _computers(grid))
    if grid.num_errors:
        say(
            f"sweep {name}: {grid.num_errors} of {len(grid)} trials failed; --resume tries them "
            "again"
        )
    else:
        storage.remove(place)
    return len(table)


def tables_of_all() -> list[str]:
    """Write a table without rows for each sweep of params.yaml that has none: DVC wants the outputs
    of a frozen stage, too. Returns the names of these. Raises `ConfigError`."""
    missing = [name for name in read_params().get("sweeps", {}) if not trials_file(name).exists()]
    for name in missing:
        config, _ = load_sweep(name)
        _write(name, config, tables.trials_schema().empty_table(), [])
    return missing


def _write(
    name: str, config: SweepConfig, table: pa.Table, computers: Iterable[Mapping[str, Any]]
) -> None:
    about = {
        "sweep": name,
        "run": config.run,
        "metric": config.metric,
        "mode": config.mode,
        "settings": dump(config),
        **provenance(config.seed, computers),
    }
    tables.write(trials_file(name), table, tables.trials_schema(), about)


def _place(name: str, config: SweepConfig) -> str:
    """Where the sweep in progress keeps its state: an s3:// address or an absolute path."""
    root = config.storage or str(WORK / "sweeps")
    path = storage.local(root)
    try:
        return storage.join(root if path is None else str(path.expanduser().absolute()), name)
    except RuntimeError:
        raise GramError(f"sweep {name}: storage {root}: there is no such user") from None


def _checked(params: Mapping[str, Any], config: SweepConfig) -> tuple[Job, Examples]:
    """The run as it is without a trial's values, and its training rows."""
    run = run_with(params, config, {})
    groups = tuple(identifiers(run.task_name, run.task))
    return job_of(run, groups), examples(run.task_name, run.task, "train", groups)


def _filesystem(place: str) -> tuple[Any, str]:
    """Where Tune keeps a sweep: None and a path, or a file system and the path in it."""
    if storage.local(place) is not None:
        return None, str(storage.local(place))
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(storage.filesystem())), place.removeprefix("s3://")


def _fits(name: str, config: SweepConfig, gpus: float) -> None:
    """Raise where trials could run on machines that do not see this one's disk, or nowhere: Tune
    would wait for ever. A cluster may grow."""
    import ray

    where = f"params.yaml: sweeps.{name}"
    if cluster_address():
        if config.storage is None:
            raise GramError(
                f"{where}.storage: on a Ray cluster, which may have or get several machines, name "
                "an s3:// prefix, or a folder, that all of them reach"
            )
        return
    there = ray.cluster_resources()
    for key, wanted, kind in (("cpus", config.cpus, "CPU"), ("gpus", gpus, "GPU")):
        if wanted > there.get(kind, 0):
            raise GramError(
                f"{where}.{key}: a trial asks for {wanted:g}, and this machine's Ray has "
                f"{there.get(kind, 0):g}"
            )


def _tuner(name: str, function: Any, config: SweepConfig, filesystem: Any, folder: str) -> Any:
    from ray import tune
    from ray.tune.search import BasicVariantGenerator

    most = config.concurrent or 0
    if config.search == "optuna":
        from ray.tune.search import ConcurrencyLimiter

        search: Any = _optuna(config.seed)
        if most:
            search = ConcurrencyLimiter(search, max_concurrent=most)
    else:
        search = BasicVariantGenerator(max_concurrent=most, random_state=config.seed)
    return tune.Tuner(
        function,
        param_space=tune_space(config),
        tune_config=tune.TuneConfig(
            metric=config.metric,
            mode=config.mode,
            num_samples=config.trials,
            search_alg=search,
            scheduler=_scheduler(config),
        ),
        run_config=tune.RunConfig(
            name="run",
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=CRASHES),
            # PBT goes back to checkpoints that are no longer the newest.
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=None if config.scheduler == "pbt" else KEPT
            ),
            verbose=1,
            progress_reporter=tune.CLIReporter(
                metric_columns={"step": "step", config.metric: config.metric, "time_total_s": "s"},
                parameter_columns={key: key.rpartition(".")[2] for key in config.space},
                max_progress_rows=30,
                max_report_frequency=10,
            ),
        ),
    )


def _optuna(seed: int) -> Any:
    """Optuna's search, which by itself fails on a report without the metric."""
    from ray.tune.search.optuna import OptunaSearch

    class Search(OptunaSearch):
        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            if self.metric in result:
                super().on_trial_result(trial_id, result)

    return Search(seed=seed % 2**32)  # numpy's


def _scheduler(config: SweepConfig) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler, PopulationBasedTraining

    if config.scheduler == "asha":
        return AsyncHyperBandScheduler(
            grace_period=config.grace,
            reduction_factor=config.reduction,
            max_t=max(1_000_000, config.grace),
        )
    if config.scheduler == "pbt":
        # Of a list PBT takes a neighbour; a range it stretches, and must be kept in.
        space = tune_space(config)
        ranges = {k: v for k, v in space.items() if next(iter(config.space[k])) in RANGES}
        lists = {k: list(next(iter(s.values()))) for k, s in config.space.items()}
        mutations = {**lists, **ranges}

        def kept(values: dict[str, Any]) -> dict[str, Any]:
            for key in ranges:
                low, high = lists[key]
                values[key] = min(high, max(low, values[key]))
            return values

        return PopulationBasedTraining(
            time_attr="training_iteration",
            perturbation_interval=config.grace,
            hyperparam_mutations=mutations,
            custom_explore_fn=kept,
            require_attrs=False,
            synch=False,
        )
    return None


def _begun(result: Any) -> float:
    """When a trial began, as its first report says; those that made none come last."""
    frame = result.metrics_dataframe
    if frame is None or frame.empty:
        return math.inf
    first = frame.iloc[0]
    return float(first["timestamp"] - first["time_total_s"])


def _computers(grid: Any) -> list[dict[str, Any]]:
    """What the trials' reports were computed on."""
    frames = [result.metrics_dataframe for result in grid]
    told = [frame[COMPUTER].dropna() for frame in frames if frame is not None and COMPUTER in frame]
    return [json.loads(text) for column in told for text in column.unique()]


def trials_table(name: str, grid: Any) -> pa.Table:
    """One row a trial and report, trials in the order of their beginning. A report that was made
    again after a crash counts once, as it was made last."""
    rows: list[dict[str, Any]] = []
    # A sweep that was resumed lists the trials that it went on with first.
    for number, result in enumerate(sorted(grid, key=_begun)):
        values = dict(result.config or {})
        common = {
            "sweep": name,
            "trial": f"{name}_{number:05d}",
            "number": number,
            "state": "ERROR" if result.error else "TERMINATED",
        }
        frame = result.metrics_dataframe
        if (frame is None or frame.empty) and "training_iteration" in (result.metrics or {}):
            # Tune leaves out what it cannot read, in silence.
            raise GramError(
                f"sweep {name}: the reports of trial {number} cannot be read back from "
                f"{result.path}; nothing was removed, --resume reads them again"
            )
        reports = {} if frame is None else {int(r["step"]): r for r in frame.to_dict("records")}
        for step, report in sorted(reports.items()):
            told = {k: float(report[k]) for k in Terms.names if k in report}
            # A column of the frame has a gap where a term did not occur.
            metrics = [(k, v) for k, v in told.items() if not math.isnan(v)]
            seconds = float(report["time_total_s"])
            # Those of the time of the report: PBT changes a trial's values on its way.
            then = {key: report.get(f"config/{key}", value) for key, value in values.items()}
            own = {"params": _texts(then), "step": step, "seconds": seconds, "metrics": metrics}
            rows.append({**common, **own})
        if not reports:
            none: dict[str, Any] = {"step": 0, "seconds": 0.0, "metrics": []}
            rows.append({**common, "params": _texts(values), **none})
    return pa.Table.from_pylist(rows, schema=tables.trials_schema())


def _texts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Values as JSON, numbers of a data frame among them, whose gaps are nulls."""

    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and math.isnan(value) else value

    return [(key, json.dumps(plain(value))) for key, value in values.items()]
