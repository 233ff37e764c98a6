from dataclasses import replace

import pytest
import torch

from gram_core.config import ConfigError, load
from gram_core.train.objective import ObjectiveConfig, Terms, supervise

# Model settings, objective settings, slots that follow the prior.
CASES = {
    "rollout prior": ({}, {}, 2),
    "no prior slots": ({}, {}, 0),
    "rollout posterior": ({}, {"rollout": "posterior"}, 2),
    "kl at every transition": ({}, {"rollout": "posterior", "kl": "every"}, 2),
    "kl mean over width": ({}, {"kl_reduction": "mean"}, 2),
    "free bits": ({}, {"free_bits": 0.9, "kl_reduction": "mean"}, 1),
    "unbalanced": ({}, {"balance": 0.5}, 1),
    "stablemax": ({}, {"cross_entropy": "stablemax"}, 2),
    "guidance none": ({"guidance": "none"}, {}, 0),
    "guide only": ({"guidance": "guide_only"}, {}, 2),
    "stochastic only": ({"guidance": "stochastic_only"}, {}, 2),
    "concat posterior": ({"posterior": "concat", "sigma": "exp"}, {}, 2),
    "one loss through the whole trajectory": ({"deep_supervision": False}, {}, 2),
    "whole trajectory under the posterior": (
        {"deep_supervision": False},
        {"rollout": "posterior", "kl": "every"},
        2,
    ),
    "q learning": ({"halting": "q_learning", "head_input": "mean"}, {}, 4),
    "heads on the posterior": ({}, {"heads_on": "posterior"}, 2),
    "heads on the posterior without prior slots": ({}, {"heads_on": "posterior"}, 0),
    "value learns token accuracy": ({}, {"value_target": "token", "halt_target": "exact"}, 4),
    "value learns exactness": ({}, {"value_target": "exact"}, 4),
    "flat mixer without prefix": (
        {"hierarchical": False, "core": "mixer", "prefix_tokens": 0},
        {},
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_supervise_is_equation_14_example_by_example(
    case, make_model, make_batch, reference, verify
):
    settings, objective, prior_rows = CASES[case]
    model = make_model(N_sup=3, **settings)
    config = ObjectiveConfig(beta=0.4, halt_weight=0.7, value_weight=0.3, **objective)
    batch, noise = make_batch(model, 6 if not model.config.deep_supervision else 3)

    result = supervise(model, config, verify, batch, noise, prior_rows)
    expected = reference(model, config, batch, noise, prior_rows)

    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.state.h, expected.h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.trace, expected.trace, rtol=1e-4, atol=1e-5)
    for name, (total, count) in zip(Terms.names, result.terms.tolist(), strict=True):
        wanted = expected.terms.get(name, (0.0, 0.0))
        assert (total, count) == pytest.approx(wanted, rel=1e-4, abs=1e-6), name

    # The gradients too, of every parameter: what is detached, and where, is part of the equation.
    parameters = list(model.parameters())
    ours = torch.autograd.grad(result.loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected.loss, parameters, allow_unused=True)
    for (name, _), g, e in zip(model.named_parameters(), ours, theirs, strict=True):
        zero = torch.zeros(())
        if g is None or e is None:
            g, e = (zero if x is None else x.abs().max() for x in (g, e))
        # Rounding errors of a sum are relative to its largest terms.
        atol = 1e-4 * float(e.abs().max()) + 1e-7
        torch.testing.assert_close(g, e, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_the_cases_tell_the_settings_apart(make_model, make_batch, verify):
    """Were two settings to give one loss on this batch, the test above would prove nothing."""
    losses = set()
    cases = [
        ({}, {}),
        ({}, {"rollout": "posterior"}),
        ({}, {"rollout": "posterior", "kl": "every"}),
    ]
    cases += [({}, {key: value}) for key, value in (("free_bits", 3.0), ("beta", 0.1))]
    cases += [({}, {"cross_entropy": "stablemax"}), ({}, {"value_target": "token"})]
    cases += [({"halting": "q_learning"}, {}), ({}, {"heads_on": "posterior"})]
    for settings, objective in cases:
        model = make_model(N_sup=3, **settings)
        batch, noise = make_batch(model, 3)
        config = ObjectiveConfig(**{"beta": 0.4, **objective})
        losses.add(round(supervise(model, config, verify, batch, noise, 3).loss.item(), 5))
    assert len(losses) == len(cases)


def test_balance_changes_no_loss(make_model, make_batch, verify):
    model = make_model(N_sup=3)
    batch, noise = make_batch(model)
    losses = [
        supervise(model, ObjectiveConfig(balance=b), verify, batch, noise, 2).loss.item()
        for b in (0.0, 0.5, 1.0)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_what_a_padded_target_position_predicts_changes_no_loss(make_model, make_batch, verify):
    model = make_model(N_sup=3, core="mixer", prefix_tokens=0)
    batch, noise = make_batch(model)
    batch.target[:, 5] = 0
    # The only way from that position's noise to the loss is its own logits.
    config = ObjectiveConfig(beta=0.0, halt_weight=0.0, value_weight=0.0)
    other = noise.clone()
    other[-1, :, 5] += 10.0
    losses = [supervise(model, config, verify, batch, n, 0).loss.item() for n in (noise, other)]
    assert losses[0] == losses[1]
    other[-1, :, 6] += 10.0
    assert supervise(model, config, verify, batch, other, 0).loss.item() != losses[0]


def test_an_answer_is_exact_whatever_it_says_where_the_target_is_padded(
    make_model, make_batch, verify
):
    model = make_model(N_sup=3, guidance="none")
    batch, noise = make_batch(model)
    after = supervise(model, ObjectiveConfig(), verify, batch, noise, 0).state
    # Take the model's own answers for targets, pad half of each, and get two of them wrong.
    batch.target[:] = model.decode(after.h).argmax(-1).clamp(min=1).byte()
    batch.target[:, ::2] = 0
    right = model.decode(after.h).argmax(-1)[:, 1::2] == batch.target[:, 1::2]
    expected = right.all(1)
    expected[[0, 3]] = False
    batch.target[[0, 3], 1] = 3 - batch.target[[0, 3], 1]
    terms = supervise(model, ObjectiveConfig(), verify, batch, noise, 0).terms
    recorded = dict(zip(Terms.names, terms.tolist(), strict=True))
    assert recorded["exact"] == [float((expected & batch.last).sum()), 4.0]
    assert recorded["exact"][0] > 0


def test_a_trajectory_ends_by_its_steps_or_where_the_halt_head_may_and_does(
    make_model, make_batch, verify
):
    model = make_model(N_sup=3)
    batch, noise = make_batch(model)
    may = torch.tensor([False, True, True, False, True, True])
    with torch.no_grad():
        model.halt.map.bias.zero_()
    result = supervise(model, ObjectiveConfig(), verify, replace(batch, may_halt=may), noise, 2)
    logit = result.state.h[:, 0] @ model.halt.map.weight[0]
    expected = batch.last | (may & (logit > 0))
    assert result.ended.tolist() == expected.tolist()
    # The decision matters for a slot that would go on, and is refused to one that may not.
    assert (expected & ~batch.last).any()
    # What is recorded at the end of a trajectory counts the halted ones.
    recorded = dict(zip(Terms.names, result.terms.tolist(), strict=True))
    assert recorded["value_loss"][1] == float(expected[:2].sum())
    assert recorded["exact"][1] == float(expected[2:].sum())


def test_the_mean_of_a_term_is_over_the_examples_in_where():
    terms = Terms(torch.zeros(()))
    value = torch.tensor([1.0, 2.0, 6.0])
    chosen = torch.tensor([True, False, True])
    assert terms.mean("kl", value, chosen) == 3.5
    assert terms.mean("exact", value) == 3.0
    assert terms.mean("value_loss", value, torch.zeros(3, dtype=torch.bool)) == 0.0
    recorded = dict(zip(Terms.names, terms.stacked().tolist(), strict=True))
    assert recorded["kl"] == [7.0, 2.0]
    assert recorded["exact"] == [9.0, 3.0]
    assert recorded["value_loss"] == [0.0, 0.0]
    assert recorded["halt_loss"] == [0.0, 0.0]


def test_a_term_that_is_reduced_already_is_refused():
    with pytest.raises(AssertionError, match="one number an example"):
        Terms(torch.zeros(())).mean("kl", torch.zeros(2, 3))


def test_charging_transitions_that_follow_the_prior_is_a_contradiction():
    with pytest.raises(ConfigError, match=r"^params\.yaml: objective: kl: every .*use kl: last"):
        load(ObjectiveConfig, {"kl": "every"}, "params.yaml: objective")


def test_a_share_of_beta_is_beta_times_the_share(make_model, make_batch, verify):
    model = make_model(N_sup=3)
    batch, noise = make_batch(model)
    part = supervise(
        model, ObjectiveConfig(beta=2.0), verify, replace(batch, kl_share=0.3), noise, 2
    )
    whole = supervise(model, ObjectiveConfig(beta=0.6), verify, batch, noise, 2)
    none = supervise(model, ObjectiveConfig(beta=2.0), verify, batch, noise, 2)
    torch.testing.assert_close(part.loss, whole.loss)
    assert not torch.allclose(part.loss, none.loss)


def test_where_there_is_no_rule_valid_means_exact(make_model, make_batch):
    """What the answers are is set, so that some are exact and others are not."""
    model = make_model(N_sup=3)
    batch, noise = make_batch(model)
    answers = supervise(model, ObjectiveConfig(), None, batch, noise, 4).state
    with torch.no_grad():
        given = model.decode(answers.h).argmax(-1).to(torch.uint8)
    batch = replace(batch, target=torch.cat([given[:2], batch.target[2:]]))
    unruled = supervise(model, ObjectiveConfig(), None, batch, noise, 4)
    exact = ObjectiveConfig(halt_target="exact", value_target="exact")
    ruled = supervise(model, exact, lambda inputs, answers: inputs[:, 0] > 99, batch, noise, 4)
    torch.testing.assert_close(unruled.loss, ruled.loss)
    terms = dict(zip(Terms.names, unruled.terms.tolist(), strict=True))
    assert terms["prior_valid"] == terms["prior_exact"] == [1.0, 3.0]
