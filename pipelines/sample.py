"""The sample stage: trajectories of every test puzzle, spread over Ray Data's workers.

A worker is a class that loads the model once and turns a block of puzzles into rows. A trajectory
is a function of weights, seed, puzzle and number, so how puzzles are cut into blocks and which
worker takes them does not show in the table.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from gram_core import tables
from gram_core.config import dump
from gram_core.errors import GramError
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.model.store import ModelError, load_model
from gram_core.sample.trajectory import SampleConfig, rollout
from gram_core.tasks.base import Task
from gram_core.tasks.batches import Puzzles
from pipelines.dataset import held_out
from pipelines.params import MODELS, RESULTS, Run
from pipelines.provenance import provenance
from pipelines.runtime import device_name, threads


class Sampler:
    """A model ready to sample; called with a batch of columns by Ray Data."""

    def __init__(
        self, model: GRAM, task: Task, config: SampleConfig, cores: int, board: Any = None
    ) -> None:
        torch.set_num_threads(cores)
        self.model = model.to(device_name())
        self.task = task
        self.config = config
        self.board = board

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Rows of the trajectories table for the puzzles of `batch` (`puzzle_id`, `inputs`,
        `puzzle`, its learned identifier, and `targets`, the known answers of each puzzle as one
        string of bytes)."""
        ids = [str(i) for i in batch["puzzle_id"]]
        inputs = torch.from_numpy(np.stack(list(batch["inputs"])).astype(np.uint8))
        post = self.board.post if self.board is not None else lambda finished: None
        size = inputs.shape[1]
        known = [
            {whole[i : i + size] for i in range(0, len(whole), size)} for whole in batch["targets"]
        ]
        puzzle = torch.from_numpy(np.asarray(batch["puzzle"], dtype=np.int32).copy())
        return self.rows(Puzzles(ids, inputs, puzzle), known, post)

    def rows(
        self, puzzles: Puzzles, known: list[set[bytes]], progress: Callable[[int], None]
    ) -> pa.Table:
        """The rows of some puzzles, in order of puzzle, trajectory and depth."""
        width = self.config.width
        result = rollout(self.model, puzzles, self.config, progress=progress)
        inputs = puzzles.inputs.repeat_interleave(width, dim=0)
        order = np.arange(len(inputs)).repeat(len(result.depths))
        depth = np.tile(np.arange(len(result.depths)), len(inputs))
        predictions = self.task.canonical(result.prediction[depth, order])
        exact = np.array(
            [
                prediction.tobytes() in known[job // width]
                for job, prediction in zip(order, predictions, strict=True)
            ]
        )
        valid = exact
        if self.task.verifies:
            valid = self.task.verify(inputs[order], torch.from_numpy(predictions)).numpy()
        return pa.table(
            {
                "puzzle_id": pa.array(np.array(puzzles.ids)[order // width]),
                "trajectory": order % width,
                "depth": np.array(result.depths)[depth],
                "seed": np.full(len(order), self.config.seed),
                "steps": result.steps[depth, order],
                "halted": result.halted[depth, order],
                "value": result.value[depth, order],
                "prediction": tables.tokens_array(predictions),
                "valid": valid,
                "exact": exact,
            }
        ).cast(tables.trajectories_schema(inputs.shape[1]))


def sample_run(run: Run) -> int:
    """Sample the run's test puzzles and write results/RUN/trajectories.parquet; returns the
    number of rows. Raises `ModelError` where models/RUN is not this run's."""
    config = run.section("sample", SampleConfig)
    wanted = dump(run.section("model", ModelConfig))
    folder = MODELS / run.name
    model, about = load_model(folder)
    if about.get("task") != dump(run.task.config) or about["model"] != wanted:
        raise ModelError(
            f"{folder / 'config.json'}: made with other model or task settings than "
            f"runs.{run.name} has now; train it again (dvc repro)"
        )
    puzzles, targets = held_out(run.task_name, run.task, about.get("identifiers", []))
    known = [targets[puzzle_id] for puzzle_id in puzzles.ids]
    total = len(puzzles.ids) * config.width
    with tqdm(total=total, desc=f"sample {run.name}", unit="trajectory") as bar:
        if config.workers == 0:
            sampler = Sampler(model, run.task, config, threads())
            table = sampler.rows(puzzles, known, bar.update)
        else:
            table = sample_on_ray(model, run.task, config, puzzles, known, bar.update)
    if len(table) != total * len(config.all_depths):
        raise GramError(f"sampling {run.name}: {len(table)} rows came back, expected {total}")
    path = RESULTS / run.name / "trajectories.parquet"
    schema = tables.trajectories_schema(run.task.length)
    settings = {"run": run.name, "sample": dump(config), "model": about["sha256"]}
    tables.write(path, table, schema, {**settings, **provenance()})
    return len(table)


def sample_on_ray(
    model: GRAM,
    task: Task,
    config: SampleConfig,
    puzzles: Puzzles,
    known: list[set[bytes]],
    progress: Callable[[int], None],
) -> pa.Table:
    """Spread blocks of puzzles over `sample.workers` actors; rows come back in order."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    from pipelines.cluster import Board, cluster

    workers = config.workers
    cores = max(1, threads() // workers)
    # Several batches a block: the batch stays full while its slots are refilled from the block.
    block = max(1, min(4 * config.batch // config.width, len(puzzles.ids) // workers))
    columns = pa.table(
        {
            "puzzle_id": puzzles.ids,
            "inputs": tables.tokens_array(puzzles.inputs.numpy()),
            "puzzle": puzzles.puzzle.numpy(),
            "targets": [b"".join(sorted(answers)) for answers in known],
        }
    )
    # Ready-made blocks need no task beside the actors, which may take every core there is.
    parts = [columns.slice(start, block) for start in range(0, len(columns), block)]
    with cluster():
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        board = Board()
        rows = ray.data.from_arrow(parts).map_batches(
            Sampler,
            fn_constructor_args=(model, task, config, cores, board),
            compute=ActorPoolStrategy(size=workers),
            num_cpus=cores,
            num_gpus=1 if device_name() == "cuda" else 0,
            batch_size=None,
        )
        try:
            with board.listening(progress):
                blocks = ray.get(rows.to_arrow_refs())
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, GramError):
                raise cause from None
            raise
    return _in_order(pa.concat_tables(blocks), puzzles.ids)


def _in_order(table: pa.Table, ids: Any) -> pa.Table:
    """Rows in the order of the puzzles, whatever order their blocks came back in."""
    place = {puzzle_id: i for i, puzzle_id in enumerate(ids)}
    order = np.array([place[puzzle_id] for puzzle_id in table["puzzle_id"].to_pylist()])
    return table.take(pa.array(np.argsort(order, kind="stable")))
