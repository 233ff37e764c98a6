import math

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from gram_core.evaluate.bound import bound
from gram_core.model.recursion import State

LENGTH = 4


@pytest.fixture(scope="module")
def model(make_model):
    """Two supervision steps of two transitions, with prior and posterior a few nats apart."""
    return make_model(length=LENGTH, stir=0.03).eval()


def pair(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One puzzle and its answer, a padded position among it, many times."""
    inputs, target = torch.tensor([1, 2, 1, 2]), torch.tensor([2, 2, 0, 1])
    return inputs.byte().expand(rows, -1), target.byte().expand(rows, -1)


def draws(model, rows: int, seed: int) -> list[torch.Tensor]:
    """Noise of every supervision step."""
    c = model.config
    generator = torch.Generator().manual_seed(seed)
    shape = (c.T, rows, model.length, c.dim)
    noise = [torch.randn(shape, generator=generator) for _ in range(c.N_sup)]
    return noise if c.deep_supervision else [torch.cat(noise)]


def log_likelihood(model, h: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """log p(y | z), summed over the tokens that are not padding."""
    log_p = Categorical(logits=model.decode(h)).log_prob(target.long())
    return (log_p * (target != 0)).sum(-1)


@torch.no_grad()
def walk(model, inputs, target, noise, rollout: str):
    """A trajectory by torch.distributions: the log-likelihood after each supervision step, and of
    each transition that follows the posterior its log p / q and its KL."""
    state = model.initial_state(len(inputs))
    e_x, e_y = model.embed(inputs), model.embed_answer(target)
    likelihoods, steps = [], []
    for block in noise:
        ratios, divergences = [], []
        for t, draw in enumerate(block):
            proposal = model.recursion(state, e_x)
            p, q = model.prior(proposal.h), model.posterior(proposal.h, e_y)
            p, q = Normal(p.mean, p.std), Normal(q.mean, q.std)
            by_prior = rollout == "every" or (rollout == "prior" and t < len(block) - 1)
            chosen = p if by_prior else q
            eps = chosen.mean + chosen.stddev * draw
            if not by_prior:
                ratios.append((p.log_prob(eps) - q.log_prob(eps)).sum((-1, -2)))
                divergences.append(kl_divergence(q, p).sum((-1, -2)))
            state = State(proposal.h + eps, proposal.l)
        likelihoods.append(log_likelihood(model, state.h, target))
        steps.append((ratios, divergences))
    return likelihoods, steps


def full_samples(model, rollout: str, rows: int, seed: int) -> torch.Tensor:
    """Samples of log p(y | z) + sum of log p(eps) / q(eps), with no closed form in them."""
    inputs, target = pair(rows)
    likelihoods, steps = walk(model, inputs, target, draws(model, rows, seed), rollout)
    return likelihoods[-1] + torch.stack([r for ratios, _ in steps for r in ratios]).sum(0)


def bound_of(model, rows: int, seed: int, rollout: str = "prior", likelihood: str = "softmax"):
    inputs, target = pair(rows)
    noise = draws(model, rows, seed)
    return bound(model, inputs, target, lambda n: noise[n], rollout=rollout, likelihood=likelihood)


@pytest.mark.parametrize("rollout", ["prior", "posterior"])
def test_the_full_bound_is_the_mean_log_ratio_of_trajectories(model, rollout):
    ours = bound_of(model, 4000, seed=0, rollout=rollout)
    samples = full_samples(model, rollout, 4000, seed=1)
    # Five standard errors of the difference of two independent means.
    tolerance = 5 * math.sqrt((ours.full.var() + samples.var()) / 4000)
    assert abs(float(ours.full.mean() - samples.mean())) < tolerance
    # Without the divergence, or with that of one transition too few, it would be off by more.
    count = 2 if rollout == "prior" else 4
    assert float(ours.divergence.mean()) / count > 2 * tolerance


@pytest.mark.parametrize("rollout", ["prior", "posterior"])
def test_the_full_bound_is_below_the_log_likelihood(model, rollout):
    rows = 20_000
    inputs, target = pair(rows)
    likelihoods, _ = walk(model, inputs, target, draws(model, rows, 2), "every")
    p = likelihoods[-1].exp()
    log_p = float(p.mean().log())
    # The delta method: the standard error of log(mean) is the relative one of the mean.
    ours = bound_of(model, 4000, seed=0, rollout=rollout)
    error = float(p.std() / p.mean()) / math.sqrt(rows) + float(ours.full.std()) / math.sqrt(4000)
    assert float(ours.full.mean()) < log_p + 5 * error
    # Were the divergence added instead of taken away, it would not be a bound.
    assert float((ours.divergence - ours.reconstruction).mean()) > log_p + 5 * error


@pytest.mark.parametrize("rollout", ["prior", "posterior"])
@pytest.mark.parametrize("deep", [True, False])
def test_parts_and_surrogate_are_their_definitions(make_model, rollout, deep):
    model = make_model(length=LENGTH, N_sup=3, deep_supervision=deep)
    inputs, target = pair(5)
    noise = draws(model, 5, seed=3)
    likelihoods, steps = walk(model, inputs, target, noise, rollout)
    ours = bound(model, inputs, target, lambda n: noise[n], rollout=rollout, likelihood="softmax")
    divergence = torch.stack([d for _, divergences in steps for d in divergences]).sum(0)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours.reconstruction, -likelihoods[-1], **close)
    torch.testing.assert_close(ours.divergence, divergence, **close)
    torch.testing.assert_close(ours.full, likelihoods[-1] - divergence, **close)
    assert len(likelihoods) == (3 if deep else 1)
    each = [
        likelihood - divergences[-1]
        for likelihood, (_, divergences) in zip(likelihoods, steps, strict=True)
    ]
    torch.testing.assert_close(ours.surrogate, torch.stack(each).mean(0), **close)


def test_with_one_transition_in_all_the_surrogate_is_the_full_bound(make_model):
    model = make_model(length=LENGTH, T=1, N_sup=1)
    ours = bound_of(model, 3, seed=0)
    torch.testing.assert_close(ours.surrogate, ours.full)


def test_stochastic_only_has_a_bound_and_stablemax_another(make_model):
    model = make_model(length=LENGTH, guidance="stochastic_only")
    softmax, stablemax = (bound_of(model, 3, 0, likelihood=k) for k in ("softmax", "stablemax"))
    assert torch.isfinite(softmax.full).all()
    assert torch.equal(softmax.divergence, stablemax.divergence)
    assert not torch.isclose(softmax.reconstruction, stablemax.reconstruction).any()


@pytest.mark.parametrize("guidance", ["none", "guide_only"])
def test_point_masses_have_no_bound(make_model, guidance):
    with pytest.raises(ValueError, match=f"guidance '{guidance}' has no density"):
        bound_of(make_model(length=LENGTH, guidance=guidance), 2, 0)
