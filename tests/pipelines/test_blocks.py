"""How sampling is cut: every trajectory once, and small blocks at the end."""

import numpy as np
import pytest

from gram_core.sample.trajectory import SampleConfig
from pipelines import blocks
from pipelines.blocks import cut
from pipelines.dataset import held_out
from pipelines.params import load_run
from pipelines.sample import Job


@pytest.mark.parametrize(
    ("puzzles", "width", "batch"),
    [(773, 20, 64), (10, 3, 2), (1, 1000, 32), (1, 5000, 256), (3, 1, 1), (1, 1, 512), (7, 900, 8)],
)
def test_every_trajectory_is_of_one_block(puzzles: int, width: int, batch: int) -> None:
    found = np.zeros((puzzles, width), dtype=int)
    parts = cut(puzzles, SampleConfig(width=width, batch=batch))
    for part in parts:
        found[part.start : part.stop, part.first : part.first + part.count] += 1
    assert (found == 1).all()
    assert [part.number for part in parts] == list(range(len(parts)))
    assert max(part.trajectories for part in parts) <= max(blocks.BATCHES * batch, width)


def test_blocks_get_smaller_at_the_end() -> None:
    sizes = [part.trajectories for part in cut(773, SampleConfig(width=20, batch=64))]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 960  # a sixteenth of all, in whole puzzles
    assert sizes[-3] == 240  # less than four batches, in whole puzzles


@pytest.mark.parametrize(("stops", "parts"), [(True, 2), (False, 18)])
def test_a_puzzle_that_an_answer_ends_is_of_one_block(stops: bool, parts: int) -> None:
    config = SampleConfig(width=500, batch=40, stop_when_verified=stops)
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
    monkeypatch.setattr(blocks, "BLOCKS", 2)
    assert job.key("weights") != before
