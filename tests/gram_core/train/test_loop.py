import math

import pytest
import torch

from gram_core.config import ConfigError, load
from gram_core.model.gram import ModelConfig
from gram_core.noise import training_noise
from gram_core.train.loop import (
    TrainConfig,
    TrainingError,
    averaged,
    final_metrics,
    kl_share,
    means,
    supervision_steps,
    transitions,
)
from gram_core.train.objective import ObjectiveConfig, Terms
from gram_core.train.optim import OptimConfig, learning_rate

# Reconstruction, KL and halt loss of the first five iterations. They guard refactorings, which may
# not change them. A deliberate change of the mathematics may, and then writes them anew.
GOLDEN = [
    (1.243722, 0.0, 0.00671530),
    (1.150331, 0.03340946, 0.00635934),
    (0.523847, 0.3558586, 0.00598121),
    (0.528428, 1.0818211, 0.00515962),
    (0.431903, 3.3328786, 0.00544453),
]


def test_the_loss_curve_is_the_recorded_one(make_run):
    run = make_run(steps=5).go()
    curve = [
        tuple(row[name] for name in ("reconstruction", "kl", "halt_loss")) for row in run.reported
    ]
    for row, golden in zip(curve, GOLDEN, strict=True):
        assert row == pytest.approx(golden, rel=1e-3, abs=1e-6)


def test_beta_grows_over_the_warm_up(make_run):
    config = TrainConfig(kl_from=0.2, kl_warmup=4)
    assert [kl_share(config, i) for i in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert kl_share(TrainConfig(), 0) == 1.0
    # The first iteration, with a share of zero, teaches what it would with beta zero.
    silent = make_run(steps=3, kl_warmup=2).go()
    free = make_run(steps=3)
    free.engine.module.objective = ObjectiveConfig(beta=0.0)
    free.go()
    assert silent.reported[:2] == free.reported[:2]
    assert silent.reported[2] != free.reported[2]


def test_training_fits_a_few_boards(make_run):
    losses = [row["reconstruction"] for row in make_run(steps=40).go().reported]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


COSINE = {
    "seed": 3,
    "ema_warmup": False,
    "optim": OptimConfig(lr=1e-2, warmup=1, schedule="cosine", clip=0.01),
}


@pytest.mark.parametrize("settings", [{}, COSINE], ids=["defaults", "others"])
def test_an_iteration_is_one_supervision_step_and_one_optimiser_step(make_run, settings):
    """Three iterations, with the parts called by hand in the order that the loop promises."""
    run, hand = make_run(steps=3, **settings).go(), make_run(steps=3, **settings)
    seed = settings.get("seed", 0)
    assert run.slots.seed == run.slots.order.seed == seed
    assert run.engine.clip == hand.config.optim.clip
    model = hand.engine.model
    average = [p.detach().clone() for p in model.parameters()]
    for iteration in range(3):
        hand.slots.refill()
        noise = training_noise(seed, iteration, range(6), (2, 18, 16))
        result = hand.engine.forward(hand.slots.batch(), noise)
        hand.engine.step(result.loss, learning_rate(hand.config.optim, iteration, 3))
        warm = (1 + iteration) / (10 + iteration) if hand.config.ema_warmup else 1.0
        decay = min(0.9, warm)
        for a, p in zip(average, model.parameters(), strict=True):
            a.copy_(decay * a + (1 - decay) * p.detach())
        hand.slots.absorb([result])
    for ours, theirs in zip(
        run.engine.model.parameters(), hand.engine.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    # What is handed out is the average, and not the weights that training ended with.
    given = averaged(run.engine, run.ema)
    names = [name for name, _ in model.named_parameters()]
    for name, ours, theirs in zip(names, run.ema.average, average, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert torch.equal(given[name], ours)
    assert any(not torch.equal(given[name], p) for name, p in model.named_parameters())


def test_a_logged_row_is_the_mean_of_the_iterations_since_the_last(make_run):
    single = make_run(steps=5).go().reported
    joined = make_run(steps=5, log_every=3, checkpoint_every=3).go().reported
    assert [row["step"] for row in joined] == [3, 5]
    for row, part in zip(joined, (single[:3], single[3:]), strict=True):
        # Every iteration has as many charged rows, so the mean of means is the mean.
        expected = sum(one["kl"] for one in part) / len(part)
        assert row["kl"] == pytest.approx(expected, rel=1e-5)
        assert row["lr"] == part[-1]["lr"]


def test_the_halt_head_ends_trajectories_where_the_settings_say_so(make_run):
    def ended(**settings):
        run = make_run(model_settings={"N_sup": 4}, halt_bias=50.0, steps=1, **settings).go()
        return run.slots.ended.tolist()

    # The first trajectories are cut short after 1, 2, 3, 4, 1 and 2 steps.
    first = [True, False, False, False, True, False]
    assert ended() == first
    assert ended(halting=True, exploration=0.0) == [True] * 6
    assert ended(halting=True, exploration=1.0) == first  # two steps at least, but for the limit


def test_the_carry_outlives_an_iteration(make_run):
    run = make_run(steps=2)
    run.go()
    # After two iterations of N_sup = 2, the slots that were not cut short have ended.
    assert run.slots.step.tolist() == [1, 2, 1, 2, 1, 2]
    assert run.slots.ended.tolist() == [False, True] * 3


def test_without_deep_supervision_a_trajectory_is_one_iteration(make_run):
    run = make_run(model_settings={"deep_supervision": False}, steps=2).go()
    assert run.slots.ended.all()
    assert run.slots.steps == 1
    config = ModelConfig(deep_supervision=False, T=3, N_sup=16)
    assert (supervision_steps(config), transitions(config)) == (1, 48)
    assert (supervision_steps(ModelConfig()), transitions(ModelConfig())) == (16, 3)


def test_a_loss_that_is_not_finite_stops_training(make_run):
    run = make_run()
    with torch.no_grad():
        run.engine.model.decoder.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"not finite at iteration 1: .*train\.optim\.lr") as e:
        run.go()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 10, "workers": 3}, "batch 10 must be a multiple of workers 3"),
        ({"log_every": 50, "checkpoint_every": 70}, "checkpoint_every 70 must be a multiple"),
        ({"engine": "plain", "workers": 2}, "engine: plain is one process"),
        ({"zero_stage": 2, "optim": {"name": "muon"}}, "zero_stage 2 shards matrices"),
        ({"prior_slots": 1.0}, "prior_slots 1 leaves no slot"),
        ({"prior_slots": 1.5}, "<= 1"),
        ({"steps": 0}, ">= 1"),
        ({"ema": 1.0}, "< 1"),
        ({"seed": 2**63}, "9223372036854775807"),
        ({"precision": "fp16"}, "fp16"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(TrainConfig, settings, "params.yaml: runs.a.train")
    assert str(caught.value).startswith("params.yaml: runs.a.train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "workers", "share", "guidance", "rows"),
    [
        (768, 1, 0.125, "full", 96),
        (768, 8, 0.125, "full", 12),
        (4, 1, 0.125, "full", 1),
        (4, 1, 0.99, "full", 3),
        (1, 1, 0.5, "full", 0),
        (768, 1, 0.0, "full", 0),
        (768, 1, 0.125, "none", 0),
    ],
)
def test_prior_rows_are_the_share_but_never_none_and_never_all(
    batch, workers, share, guidance, rows
):
    config = TrainConfig(batch=batch, workers=workers, prior_slots=share)
    assert config.prior_rows(ModelConfig(guidance=guidance)) == rows


@pytest.mark.parametrize("spread", [{"workers": 4}, {"accumulate": 4}, {"workers": 16}])
def test_parts_that_cannot_hold_equally_many_prior_slots_are_refused(spread):
    """2 slots of 16 follow the prior: one each in two parts; in four, more of them would."""
    assert TrainConfig(batch=16, workers=2).prior_rows(ModelConfig()) == 1
    config = TrainConfig(batch=16, **spread)
    with pytest.raises(ConfigError, match="batch 16 has 2 slots that follow the prior") as error:
        config.prior_rows(ModelConfig())
    assert "\n" not in str(error.value)
    assert config.prior_rows(ModelConfig(guidance="none")) == 0


def test_terms_that_did_not_occur_are_left_out_of_a_row():
    stacked = torch.zeros(len(Terms.names), 2)
    stacked[Terms.names.index("kl")] = torch.tensor([6.0, 4.0])
    assert means(stacked) == {"kl": 1.5}


def test_final_metrics_are_means_of_the_last_rows_that_have_the_term():
    history = [{"step": i, "lr": 1.0, "kl": float(i)} for i in range(10)]
    history[8]["exact"] = 0.5
    history[1]["prior_exact"] = 0.7
    assert final_metrics(history) == {"kl": 7.0, "exact": 0.5}
    assert final_metrics(history, last=2)["kl"] == 8.5
    assert final_metrics(history[:2], last=5)["kl"] == 0.5
