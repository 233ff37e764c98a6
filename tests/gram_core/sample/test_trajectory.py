import numpy as np
import pytest
import torch

from gram_core.config import ConfigError, load
from gram_core.model.recursion import State
from gram_core.noise import step_noise, trajectory_key
from gram_core.precision import autocast
from gram_core.sample import trajectory
from gram_core.sample.trajectory import SampleConfig, rollout
from gram_core.tasks.batches import Puzzles


@pytest.fixture(scope="module")
def puzzles() -> Puzzles:
    inputs = torch.randint(1, 3, (7, 16), generator=torch.Generator().manual_seed(0))
    return Puzzles.of([f"p{i}" for i in range(7)], inputs.to(torch.uint8))


def config(**settings) -> SampleConfig:
    return SampleConfig(**{"width": 3, "depth": 4, "batch": 8, **settings})


def same(one, other) -> bool:
    """Whether two results agree: bit for bit, but for the value's last digits."""
    exact = all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("steps", "halted", "prediction")
    )
    return exact and np.allclose(one.value, other.value, atol=1e-5)


@torch.no_grad()
def alone(model, puzzles, p: int, j: int, depth: int, temperature: float = 1.0, seed: int = 0):
    """One trajectory by itself: steps used, halted, value and answer."""
    c = model.config
    state, e_x = model.initial_state(1), model.embed(puzzles.inputs[p : p + 1])
    for step in range(depth):
        key = trajectory_key(seed, puzzles.ids[p], j)
        noise = step_noise(key, step, (c.T, model.length, c.dim))
        for t in range(c.T):
            proposal = model.recursion(state, e_x)
            prior = model.prior(proposal.h)
            eps = prior.mean + prior.std * noise[t] * temperature
            state = State(proposal.h + eps, proposal.l)
        halts = bool(model.halt(state.h[:, 0])[0, 0] > 0)
        if halts:
            break
    answer = model.decode(state.h)[0].argmax(-1).numpy()
    return step + 1, halts, float(model.value(state.h[:, 0])), answer


def test_each_trajectory_is_the_one_rolled_out_alone(model, puzzles):
    result = rollout(model, puzzles, config(seed=5))
    assert result.prediction.shape == (1, 21, 16)
    for job in range(21):
        steps, halted, value, answer = alone(model, puzzles, job // 3, job % 3, 4, seed=5)
        assert result.steps[0, job] == steps
        assert result.halted[0, job] == halted
        assert result.value[0, job] == pytest.approx(value, abs=1e-5)
        assert np.array_equal(result.prediction[0, job], answer)
    # The comparison means something: some halt, some do not, at several steps.
    assert len(set(result.steps[0])) > 2
    assert 0 < result.halted.sum() < 21
    assert len(np.unique(result.prediction[0], axis=0)) > 10


def test_rows_that_fill_up_a_graph_s_number_change_nothing(model, puzzles, monkeypatch):
    expected, gpu = rollout(model, puzzles, config(batch=11)), torch.device("cuda")
    spare, seen = trajectory.spare_rows, []

    class Step(trajectory.SupervisionStep):
        def forward(self, state, e_x, noise):
            seen.append(len(e_x))
            # One layout, for a compiler would make code of its own for another.
            assert noise.shape[1] == len(e_x) and noise.transpose(0, 1).is_contiguous()
            return super().forward(state, e_x, noise)

    monkeypatch.setattr(
        trajectory, "spare_rows", lambda rows, slots, device: spare(rows, slots, gpu)
    )
    step = Step(model, config())
    assert same(rollout(model, puzzles, config(batch=11), step=step), expected)
    assert {11, 4} <= set(seen) <= {11, 8, 4, 2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_puzzles_are_embedded_as_in_training(model, puzzles, precision):
    seen = []

    class Step(trajectory.SupervisionStep):
        def forward(self, state, e_x, noise):
            seen.append(e_x)
            return super().forward(state, e_x, noise)

    settings = config(batch=1, depth=1, precision=precision)
    rollout(model, puzzles, settings, step=Step(model, settings))
    with torch.no_grad(), autocast(precision, torch.device("cpu")):
        expected = model.embed(puzzles.inputs[:1]).float()
    assert torch.equal(seen[0], expected)
    exact = torch.equal(expected, model.embed(puzzles.inputs[:1]))
    assert exact == (precision == "fp32")


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
@pytest.mark.parametrize("compaction", [True, False])
def test_batch_and_compaction_change_nothing(model, puzzles, batch, compaction):
    expected = rollout(model, puzzles, config())
    assert same(rollout(model, puzzles, config(batch=batch, compaction=compaction)), expected)


def test_the_order_of_puzzles_changes_nothing(model, puzzles):
    order = [3, 0, 6, 5, 1, 4, 2]
    shuffled = Puzzles.of([puzzles.ids[i] for i in order], puzzles.inputs[order])
    expected = rollout(model, puzzles, config())
    result = rollout(model, shuffled, config())
    for place, puzzle in enumerate(order):
        there, here = slice(3 * puzzle, 3 * puzzle + 3), slice(3 * place, 3 * place + 3)
        assert np.array_equal(result.prediction[:, here], expected.prediction[:, there])
        assert np.array_equal(result.steps[:, here], expected.steps[:, there])


def test_first_trajectory_goes_on_where_another_rollout_ended(model, puzzles):
    whole = rollout(model, puzzles, config(width=5))
    early = rollout(model, puzzles, config(width=2))
    late = rollout(model, puzzles, config(width=3), first_trajectory=2)
    joined = np.concatenate(
        [early.prediction.reshape(7, 2, 16), late.prediction.reshape(7, 3, 16)], axis=1
    )
    assert np.array_equal(joined, whole.prediction.reshape(7, 5, 16))


@pytest.mark.parametrize("halting", [True, False])
def test_one_rollout_answers_for_every_depth(model, puzzles, halting):
    several = rollout(model, puzzles, config(depth=2, depths=(4, 1), halting=halting))
    assert several.depths == (1, 2, 4)
    for k, depth in enumerate((1, 2, 4)):
        single = rollout(model, puzzles, config(depth=depth, halting=halting))
        for name in ("steps", "halted", "prediction"):
            assert np.array_equal(getattr(several, name)[k], getattr(single, name)[0]), name
        np.testing.assert_allclose(several.value[k], single.value[0], atol=1e-5)
    assert not np.array_equal(several.prediction[0], several.prediction[2])


@pytest.mark.parametrize(
    ("bias", "halting", "steps", "halted"),
    [(50.0, True, 1, True), (-50.0, True, 4, False), (50.0, False, 4, False)],
)
def test_a_trajectory_ends_when_the_halt_head_says_so(
    make_model, puzzles, bias, halting, steps, halted
):
    model = make_model(N_sup=4)
    with torch.no_grad():
        model.halt.map.bias.fill_(bias)
    result = rollout(model, puzzles, config(halting=halting))
    assert (result.steps == steps).all()
    assert (result.halted == halted).all()


@pytest.mark.parametrize(
    ("halting", "bias", "threshold", "halted"),
    [
        # The logits are fixed by hand: sigmoid(1) = 0.73, and 1 - (-1) = 2 with sigmoid 0.88.
        ("halt_only", (1.0, -1.0), 0.7, True),
        ("halt_only", (1.0, -1.0), 0.8, False),
        ("q_learning", (1.0, -1.0), 0.8, True),
        ("q_learning", (1.0, -1.0), 0.9, False),
    ],
)
def test_the_threshold_is_a_probability(make_model, puzzles, halting, bias, threshold, halted):
    model = make_model(halting=halting)
    with torch.no_grad():
        model.halt.map.weight.zero_()
        model.halt.map.bias.copy_(torch.tensor(bias))
    result = rollout(model, puzzles, config(halt_threshold=threshold))
    assert (result.halted == halted).all()


def test_one_that_halts_at_the_last_step_counts_as_halted(make_model, puzzles):
    model = make_model()
    with torch.no_grad():
        model.halt.map.bias.fill_(50.0)
    result = rollout(model, puzzles, config(depth=1))
    assert result.halted.all()


def test_a_deterministic_models_trajectories_are_one_trajectory(make_model, puzzles):
    model = make_model(guidance="none")
    one = rollout(model, puzzles, config(width=1))
    many = rollout(model, puzzles, config(width=4, seed=9))
    for name in ("steps", "halted", "value", "prediction"):
        expected = np.repeat(getattr(one, name), 4, axis=1)
        assert np.array_equal(getattr(many, name), expected), name
    state, e_x = model.initial_state(7), model.embed(puzzles.inputs)
    with torch.no_grad():
        for _ in range(4 * 2):
            state = model.recursion(state, e_x)
    assert np.array_equal(one.prediction[0], model.decode(state.h).argmax(-1).numpy())


def test_guide_only_trajectories_need_no_noise_and_are_all_equal(make_model, puzzles):
    model = make_model(guidance="guide_only")
    result = rollout(model, puzzles, config(halting=False))
    predictions = result.prediction.reshape(7, 3, 16)
    assert (predictions == predictions[:, :1]).all()
    state, e_x = model.initial_state(7), model.embed(puzzles.inputs)
    with torch.no_grad():
        for _ in range(4 * 2):
            proposal = model.recursion(state, e_x)
            state = State(proposal.h + model.prior_head.mean(proposal.h), proposal.l)
    assert np.array_equal(predictions[:, 0], model.decode(state.h).argmax(-1).numpy())


def test_temperature_scales_the_noise(model, puzzles):
    cold = rollout(model, puzzles, config(temperature=0.0, seed=1))
    assert np.array_equal(
        cold.prediction, rollout(model, puzzles, config(temperature=0.0)).prediction
    )
    predictions = cold.prediction.reshape(7, 3, 16)
    assert (predictions == predictions[:, :1]).all()
    warm = rollout(model, puzzles, config(temperature=0.5))
    assert np.array_equal(warm.prediction[0, 4], alone(model, puzzles, 1, 1, 4, 0.5)[3])
    assert not np.array_equal(warm.prediction, cold.prediction)


def test_seeds_draw_different_trajectories(model, puzzles):
    first, second = (rollout(model, puzzles, config(seed=s)) for s in (0, 1))
    assert not np.array_equal(first.prediction, second.prediction)


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize("guidance", ["full", "none"])
def test_progress_adds_up_to_the_number_of_trajectories(make_model, puzzles, guidance, compaction):
    counts: list[int] = []
    settings = config(batch=5, compaction=compaction)
    rollout(make_model(guidance=guidance), puzzles, settings, progress=counts.append)
    assert sum(counts) == 21
    assert min(counts) >= 0


def test_no_puzzles_give_no_trajectories(model, puzzles):
    empty = rollout(model, Puzzles.of([], puzzles.inputs[:0]), config())
    assert empty.prediction.shape == (1, 0, 16)


def test_bfloat16_rollouts_are_close_to_float32(model, puzzles):
    settings = {"depth": 1, "halting": False}
    wide = rollout(model, puzzles, config(**settings))
    narrow = rollout(model, puzzles, config(precision="bf16", **settings))
    assert (wide.prediction == narrow.prediction).mean() > 0.9
    assert not np.array_equal(wide.value, narrow.value)


def test_depths_are_sorted_and_unique():
    assert SampleConfig(depth=4, depths=(8, 2, 4)).all_depths == (2, 4, 8)


def rule(inputs: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Accepts about a quarter of all answers."""
    return (answers.int() + inputs).sum(-1) % 4 == 0


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize("halting", [True, False])
def test_stopping_when_verified_is_drawing_one_after_the_other(
    model, puzzles, batch, compaction, halting
):
    settings = config(
        width=6, batch=batch, compaction=compaction, halting=halting, stop_when_verified=True
    )
    result = rollout(model, puzzles, settings, verify=rule)
    drawn = 0
    for p in range(len(puzzles.ids)):
        accepted = False
        for j in range(6):
            row = p * 6 + j
            if accepted:
                assert result.steps[0, row] == 0
                assert not result.halted[0, row]
                assert not result.prediction[0, row].any()
                continue
            drawn += 1
            # The first step that the halt head or the rule ends it at, or the last one.
            for depth in range(1, 5):
                draw = alone if halting else unhalted
                halts, answer = draw(model, puzzles, p, j, depth)[1::2]
                accepted = bool(rule(puzzles.inputs[p : p + 1], torch.from_numpy(answer)[None]))
                if accepted or halts:
                    break
            assert result.steps[0, row] == depth
            assert result.halted[0, row] == (accepted or halts)
            assert np.array_equal(result.prediction[0, row], answer)
    assert 7 < drawn < 42, "some puzzles need several trajectories, some are spared some"


def unhalted(model, puzzles, p: int, j: int, depth: int):
    """`alone` for a trajectory whose halt head is not asked."""
    free = rollout(model, puzzles, config(width=6, depth=depth, halting=False))
    row = p * 6 + j
    return depth, False, 0.0, free.prediction[0, row]


def test_a_deterministic_model_that_is_verified_is_drawn_once(make_model, puzzles):
    twin = make_model(guidance="none")
    settings = config(stop_when_verified=True, depth=1)
    result = rollout(twin, puzzles, settings, verify=lambda i, a: torch.tensor([True] * len(a)))
    assert result.steps[0].reshape(7, 3).tolist() == [[1, 0, 0]] * 7
    none = rollout(twin, puzzles, settings, verify=lambda i, a: torch.tensor([False] * len(a)))
    assert none.steps[0].reshape(7, 3).tolist() == [[1, 1, 1]] * 7


def test_stopping_needs_a_rule_and_a_single_depth(model, puzzles):
    with pytest.raises(ValueError, match="there is no rule"):
        rollout(model, puzzles, config(stop_when_verified=True))
    with pytest.raises(ConfigError, match="stop_when_verified answers for depth 16 alone"):
        load(SampleConfig, {"stop_when_verified": True, "depths": [2]}, "sample")


@pytest.mark.parametrize("compaction", [True, False])
def test_progress_counts_those_given_up(model, puzzles, compaction):
    counts: list[int] = []
    settings = config(width=6, batch=5, compaction=compaction, stop_when_verified=True)
    rollout(model, puzzles, settings, progress=counts.append, verify=rule)
    assert sum(counts) == 42


@pytest.mark.parametrize("key", ["depth", "width", "batch"])
def test_nothing_to_sample_is_an_error_that_names_the_key(key):
    with pytest.raises(ConfigError, match=rf"^sample\.{key}: "):
        load(SampleConfig, {key: 0}, "sample")
