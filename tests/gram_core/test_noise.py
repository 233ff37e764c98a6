import math

import numpy as np
import pytest
import torch

from gram_core.noise import batch_noise, step_noise, training_noise, trajectory_key

SHAPE = (2, 3, 4)


def draw(seed: int = 0, puzzle: str = "a", trajectory: int = 0, step: int = 0) -> torch.Tensor:
    return step_noise(trajectory_key(seed, puzzle, trajectory), step, SHAPE)


def test_noise_is_a_pure_function_of_its_keys():
    first = draw()
    draw(step=5)
    torch.randn(7)
    assert torch.equal(first, draw())
    assert first.shape == SHAPE
    assert first.dtype == torch.float32


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"puzzle": "b"}, {"trajectory": 1}, {"step": 1}, {"puzzle": "a0"}]
)
def test_each_key_changes_all_of_the_noise(other):
    assert not (draw() == draw(**other)).any()


def test_keys_whose_digits_run_together_are_different():
    keys = [trajectory_key(1, "1", 11), trajectory_key(1, "11", 1), trajectory_key(11, "1", 1)]
    assert len(set(keys)) == 3


def test_noise_is_standard_normal_and_uncorrelated_between_steps():
    key, count = trajectory_key(0, "a", 0), 200_000
    x, y = (step_noise(key, step, (2, 100, count // 200)).double() for step in (0, 1))
    # Standard errors: mean 1/sqrt(n), variance sqrt(2/n), fourth moment sqrt(96/n); five of each.
    assert abs(x.mean()) < 5 / math.sqrt(count)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert abs((x * y).mean()) < 5 / math.sqrt(count)


def test_steps_do_not_read_the_same_stream_at_an_offset():
    key = trajectory_key(0, "a", 0)
    first, second = (step_noise(key, step, (1, 10, 100)).numpy() for step in (0, 1))
    # Two float32 normals out of a thousand may be equal by chance; a shifted stream repeats all.
    assert np.isin(second, first).mean() < 0.01


def test_batch_noise_gives_each_row_its_own_noise_whatever_its_neighbours():
    keys = [trajectory_key(0, "a", t) for t in range(3)]
    steps = [4, 0, 2]
    out = batch_noise(keys, steps, SHAPE)
    assert out.shape == (2, 3, 3, 4)
    for row in range(3):
        assert torch.equal(out[:, row], step_noise(keys[row], steps[row], SHAPE))
    swapped = batch_noise(keys[::-1], steps[::-1], SHAPE)
    assert torch.equal(swapped.flip(1), out)


def test_threads_change_nothing(monkeypatch):
    keys, steps = [trajectory_key(0, "a", t) for t in range(7)], list(range(7))
    alone = batch_noise(keys, steps, SHAPE)
    monkeypatch.setattr("gram_core.philox.PARALLEL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(batch_noise(keys, steps, SHAPE), alone)
    with torch.inference_mode():
        assert torch.equal(batch_noise(keys, steps, SHAPE), alone)


def test_a_step_missing_for_a_row_is_an_error():
    with pytest.raises(ValueError, match="2 keys for 1 steps"):
        batch_noise([trajectory_key(0, "a", 0)] * 2, [0], SHAPE)


def test_training_noise_is_pure_and_differs_by_seed_iteration_and_slot():
    first = training_noise(0, 0, [0, 3], SHAPE)
    assert first.shape == (2, 2, 3, 4)
    torch.manual_seed(123)
    assert torch.equal(first, training_noise(0, 0, [0, 3], SHAPE))
    for other in ((1, 0, [0]), (0, 1, [0]), (0, 0, [3])):
        assert not (first[:, :1] == training_noise(*other, SHAPE)).any()


def test_training_noise_of_a_slot_has_no_neighbours():
    together = training_noise(0, 5, [2, 0, 7], SHAPE)
    for place, slot in enumerate([2, 0, 7]):
        assert torch.equal(together[:, place : place + 1], training_noise(0, 5, [slot], SHAPE))


def test_training_and_sampling_draw_from_streams_of_their_own():
    assert not (training_noise(0, 0, [0], SHAPE)[:, 0] == draw()).any()


def test_training_noise_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    training_noise(0, 0, [0], SHAPE)
    assert torch.equal(torch.rand(3), expected)


def test_training_noise_is_standard_normal():
    x = training_noise(0, 3, range(100), (2, 10, 100)).double()
    assert abs(float(x.mean())) < 5 / math.sqrt(200_000)
    assert abs(float(x.var()) - 1) < 5 * math.sqrt(2 / 200_000)
    # And independent from slot to slot.
    ones = x.transpose(0, 1).flatten(1)
    cross = (ones[:-1] * ones[1:]).mean()
    assert abs(float(cross)) < 5 / math.sqrt(99 * 2000)


def test_noise_is_independent_within_a_row():
    x = step_noise(trajectory_key(0, "a", 0), 0, (1, 400, 500)).double().flatten()
    # Pairs and groups lie apart by multiples of a quarter row; neighbours come of other counters.
    for lag in (1, 2, 50_000, 100_000, 150_000):
        correlation = (x[:-lag] * x[lag:]).mean()
        assert abs(float(correlation)) < 5 / math.sqrt(len(x) - lag)
