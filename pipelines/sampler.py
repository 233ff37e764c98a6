"""What a sampling worker does: turn blocks of puzzles into rows, with a model that it loads once.

A worker of Ray's imports this module and what it names. Each worker pays for that before its first
block, so nothing is imported here that only the stage needs.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import torch

from gram_core import tables
from gram_core.compile import compiled
from gram_core.model.gram import GRAM
from gram_core.noise import batch_noise
from gram_core.sample.trajectory import SampleConfig, SupervisionStep, rollout
from gram_core.tasks.base import Task
from gram_core.tasks.batches import Puzzles
from pipelines.blocks import Block, BlockStore, packed
from pipelines.compute import compute_with
from pipelines.provenance import computer
from pipelines.runtime import device_name, say

Progress = Callable[[int, int], None]  # of a block's number: so many trajectories are finished
TELL = 2.0  # seconds between two signs of life of a worker in a block


class Sampler:
    """A model ready to sample. Called by Ray Data with a batch of columns, it gives one row a
    finished block: its name, when it began, the seconds it took, what it was computed on, and its
    content unless it put that into `store` itself."""

    def __init__(
        self,
        model: GRAM,
        task: Task,
        config: SampleConfig,
        cores: int,
        board: Any = None,
        store: BlockStore | None = None,
        *,
        compile: bool = False,
    ) -> None:
        compute_with(cores)
        self.model = model.to(device_name(config.num_gpus))
        step = SupervisionStep(self.model, config)
        self.step = compiled(step, say, rows=step.rows) if compile else step
        self.task = task
        self.config = config
        self.board = board
        self.store = store
        self.told = 0.0
        self.computer = computer(cores, config.num_gpus)
        if model.config.stochastic and self.model.z0_h.device.type == "cpu":
            # Loading the processor's compiled generator takes half a second, which is no block's.
            batch_noise([bytes(16)], [0], (1, 1, 1))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Finish the blocks in `batch`: `puzzle_id`, `inputs`, `puzzle` (its learned identifier)
        and `targets` (the known answers of each puzzle as one string of bytes), and for each row
        its `block` and which trajectories that is: `first`, `count`."""
        post = self.board.post if self.board is not None else lambda message: None
        columns = ("name", "began", "seconds", "computer", "content")
        finished: dict[str, list[Any]] = {column: [] for column in columns}
        for number in np.unique(batch["block"]):
            began, start = time.time(), time.perf_counter()
            mine = {key: column[batch["block"] == number] for key, column in batch.items()}
            ids = [str(i) for i in mine["puzzle_id"]]
            inputs = torch.from_numpy(np.stack(list(mine["inputs"])).astype(np.uint8))
            size = inputs.shape[1]
            known = [
                {whole[i : i + size] for i in range(0, len(whole), size)}
                for whole in mine["targets"]
            ]
            puzzle = torch.from_numpy(np.asarray(mine["puzzle"], dtype=np.int32).copy())
            first, count = int(mine["first"][0]), int(mine["count"][0])
            block = Block(int(number), 0, len(ids), first, count)
            rows = self.rows(
                Puzzles(ids, inputs, puzzle), known, block, lambda n, done: post((n, done))
            )
            name, content = packed(block.number, rows, self.computer)
            if self.store is not None:
                self.store.put(name, content)
            finished["name"].append(name)
            finished["began"].append(began)
            finished["seconds"].append(time.perf_counter() - start)
            finished["computer"].append(json.dumps(self.computer))
            finished["content"].append(b"" if self.store is not None else content)
        return finished

    def rows(
        self, puzzles: Puzzles, known: Sequence[set[bytes]], block: Block, progress: Progress
    ) -> pa.Table:
        """The rows of a block over these puzzles, in order of puzzle, trajectory and depth."""
        width, done = block.count, 0
        config = msgspec.structs.replace(self.config, width=width)

        def ended(trajectories: int) -> None:
            nonlocal done
            done += trajectories
            # Telling costs a message through Ray: not at each step, but the last in any case.
            if time.monotonic() - self.told > TELL or done == block.trajectories:
                self.told = time.monotonic()
                progress(block.number, done)

        result = rollout(
            self.model,
            puzzles,
            config,
            first_trajectory=block.first,
            progress=ended,
            step=self.step,
            verify=self.task.verify if self.task.verifies else None,
        )
        inputs = puzzles.inputs.repeat_interleave(width, dim=0)
        order = np.arange(len(inputs)).repeat(len(result.depths))
        depth = np.tile(np.arange(len(result.depths)), len(inputs))
        predictions = self.task.canonical(result.prediction[depth, order])
        exact = np.array(
            [
                prediction.tobytes() in known[job // width]
                for job, prediction in zip(order.tolist(), predictions, strict=True)
            ]
        )
        valid = exact
        if self.task.verifies:
            valid = self.task.verify(inputs[order], torch.from_numpy(predictions)).numpy()
        # One that was not drawn has no answer, whatever a rule says of nothing.
        drawn = result.steps[depth, order] > 0
        exact, valid = exact & drawn, valid & drawn
        return pa.table(
            {
                "puzzle_id": pa.array(np.array(puzzles.ids)[order // width]),
                "trajectory": block.first + order % width,
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
