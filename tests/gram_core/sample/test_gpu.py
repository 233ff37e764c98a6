"""Sampling on a GPU, compiled into CUDA graphs, gives a CPU's trajectories."""

import copy

import numpy as np
import pytest
import torch

from gram_core.compile import compiled
from gram_core.noise import batch_noise, trajectory_key
from gram_core.sample.trajectory import SampleConfig, SupervisionStep, rollout
from gram_core.tasks.batches import Puzzles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
]


@pytest.mark.parametrize("compaction", [True, False])
def test_trajectories_are_those_of_a_cpu(model, compaction):
    inputs = torch.randint(1, 3, (9, 16), generator=torch.Generator().manual_seed(0))
    puzzles = Puzzles.of([f"p{i}" for i in range(9)], inputs.to(torch.uint8))
    config = SampleConfig(width=5, depth=4, batch=12, compaction=compaction)
    expected = rollout(model, puzzles, config)
    there = copy.deepcopy(model).to("cuda")
    said: list[str] = []
    step = SupervisionStep(there, config)
    step = compiled(step, said.append, rows=step.rows)
    for _ in range(3):  # compiled, recorded, replayed
        found = rollout(there, puzzles, config, step=step)
        for name in ("steps", "halted", "prediction"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        np.testing.assert_allclose(found.value, expected.value, atol=1e-5)
    assert said == []
    assert len(set(expected.steps[0])) > 1


def test_noise_is_that_of_a_cpu_but_for_rounding():
    keys = [trajectory_key(0, str(number), 0) for number in range(5)]
    drawn = [batch_noise(keys, range(5), (2, 7, 33), torch.device(d)) for d in ("cpu", "cuda")]
    assert drawn[1].is_cuda
    torch.testing.assert_close(drawn[1].cpu(), drawn[0], rtol=1e-4, atol=1e-5)
