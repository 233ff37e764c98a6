"""How sampling is cut: every trajectory once, and small blocks at the end."""

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gram_core.sample.trajectory import SampleConfig
from pipelines import blocks
from pipelines.blocks import BlockStore, cut, packed
from pipelines.dataset import held_out
from pipelines.params import load_run
from pipelines.provenance import provenance
from pipelines.sample import Job


@pytest.mark.parametrize(
    ("puzzles", "width", "batch"),
    [
        (773, 20, 64),
        (10, 3, 2),
        (1, 1000, 32),
        (1, 5000, 256),
        (3, 1, 1),
        (1, 1, 512),
        (7, 900, 8),
        (88, 2000, 256),
        (40, 5000, 64),
    ],
)
def test_every_trajectory_is_of_one_block(puzzles: int, width: int, batch: int) -> None:
    found = np.zeros((puzzles, width), dtype=int)
    parts = cut(puzzles, SampleConfig(width=width, batch=batch))
    assert max(part.trajectories for part in parts) <= blocks.BATCHES * batch
    for part in parts:
        found[part.start : part.stop, part.first : part.first + part.count] += 1
    assert (found == 1).all()
    assert [part.number for part in parts] == list(range(len(parts)))


def test_blocks_get_smaller_at_the_end() -> None:
    sizes = [part.trajectories for part in cut(773, SampleConfig(width=20, batch=64))]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 1020  # a sixteenth of all in whole batches, of them whole puzzles
    assert sizes[-3] == 240  # four batches, of them whole puzzles


def test_only_the_last_puzzle_of_many_ends_in_small_blocks() -> None:
    parts = cut(40, SampleConfig(width=5000, batch=64))
    small = {part.start for part in parts if part.count < 5000 - 4 * 1024}
    assert small == {39}


@pytest.mark.parametrize(
    ("width", "stops", "parts"), [(500, True, 2), (500, False, 14), (1000, True, 4)]
)
def test_a_puzzle_that_an_answer_ends_is_of_one_block(width: int, stops: bool, parts: int) -> None:
    config = SampleConfig(width=width, batch=40, stop_when_verified=stops)
    assert len(cut(2, config)) == parts


@pytest.mark.usefixtures("data")
def test_blocks_of_another_cut_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from gram_core.model.gram import GRAM, ModelConfig

    run = load_run("tiny")
    puzzles, targets = held_out(run.task_name, run.task, [])
    model = GRAM(run.section("model", ModelConfig), run.task.shape)
    known = [targets[puzzle_id] for puzzle_id in puzzles.ids]
    job = Job("tiny", model, run.task, run.section("sample", SampleConfig), puzzles, known)
    before = job.key("weights")
    assert job.key("weights") == before
    # Who does the work does not matter; what comes of it does.
    spread = {"concurrency": 2, "max_concurrency": 4, "cores": 1, "num_gpus": 0.0, "compile": True}
    for changes, found in ((spread, True), ({"seed": 1}, False), ({"halting": False}, False)):
        other = replace(job, config=msgspec.structs.replace(job.config, **changes))
        assert (other.key("weights") == before) is found
    monkeypatch.setattr(blocks, "BLOCKS", 2)
    assert job.key("weights") != before


def test_a_table_tells_what_its_blocks_were_computed_on_each_kind_once(tmp_path: Path) -> None:
    """Also those that a former attempt had finished, on another machine."""
    store, parts = BlockStore(str(tmp_path), "key"), cut(4, SampleConfig(width=1, batch=1))
    here, there = {"device": "cpu", "threads": 1}, {"device": "cuda, H200", "threads": 8}
    for number in (0, 1):
        name, content = packed(number, pa.table({"x": [number]}), there)
        store.put(name, content)
        store.add(name, there)
    # An older program's says nothing.
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": [2]}), sink)
    digest = hashlib.sha256(sink.getvalue()).hexdigest()[:16]
    store.put(f"block-000002-{digest}.parquet", sink.getvalue())
    again = BlockStore(str(tmp_path), "key")
    assert sorted(again.names) == [0, 1, 2]
    name, content = packed(3, pa.table({"x": [3]}), here)
    again.put(name, content)
    assert again.add(name, here) == 3
    assert provenance(0, again.computers(parts))["workers"] == [here, there]
    assert [table["x"][0].as_py() for table in again.tables(parts)] == [0, 1, 2, 3]
