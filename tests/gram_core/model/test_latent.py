import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from gram_core.model.gram import GRAM, ModelConfig
from gram_core.model.latent import Gaussian, GaussianHead, balanced_kl, kl
from gram_core.shape import TokenShape


def gaussian(seed: int, shape=(2, 3, 4)) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator)
    std = 0.2 + torch.rand(shape, generator=generator)
    return Gaussian(mean.requires_grad_(), std.requires_grad_())


def normal(g: Gaussian) -> Normal:
    return Normal(g.mean, g.std)


def test_kl_is_that_of_torch_distributions_summed_over_width():
    q, p = gaussian(1), gaussian(2)
    expected = kl_divergence(normal(q), normal(p)).sum(-1)
    assert kl(q, p).shape == (2, 3)
    torch.testing.assert_close(kl(q, p), expected)


def test_kl_is_the_mean_log_ratio_of_samples():
    q, p = gaussian(1, (1, 1, 4)), gaussian(2, (1, 1, 4))
    torch.manual_seed(0)
    x = normal(q).sample((200_000,))
    ratio = (normal(q).log_prob(x) - normal(p).log_prob(x)).sum(-1).flatten().detach()
    # Five standard errors of the mean.
    tolerance = 5 * float(ratio.std()) / math.sqrt(len(ratio))
    assert abs(float(ratio.mean() - kl(q, p).detach())) < tolerance
    assert tolerance < 0.1 * kl(q, p).item()


def test_kl_of_equal_gaussians_is_zero_and_otherwise_positive():
    q, p = gaussian(1), gaussian(2)
    torch.testing.assert_close(kl(q, q), torch.zeros(2, 3), atol=1e-6, rtol=0)
    assert (kl(q, p) > 0).all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # Triton's
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("made", [lambda f: f, torch.compile], ids=["plain", "compiled"])
def test_equal_gaussians_have_no_gradient_to_the_bit(device, made):
    """What rounding leaves AdamW would make whole steps of: a fresh model is in this state."""
    torch.manual_seed(0)
    std = torch.rand(50, 40).mul(12).sub(8).exp().to(device)  # 3e-4 to 50
    q, p = (
        Gaussian(torch.ones_like(std, requires_grad=True), std.clone().requires_grad_())
        for _ in range(2)
    )
    made(kl)(q, p).sum().backward()
    for parameter in (q.mean, q.std, p.mean, p.std):
        assert not parameter.grad.any()


@pytest.mark.parametrize("posterior", ["sum", "concat"])
@pytest.mark.parametrize("sigma", ["softplus", "exp"])
@pytest.mark.parametrize("sigma_init", [0.05, 0.1, 0.3])
def test_a_fresh_model_has_no_gradient_of_its_divergence(posterior, sigma, sigma_init):
    torch.manual_seed(0)
    config = ModelConfig(
        dim=32, heads=2, ffn=32, layers=1, posterior=posterior, sigma=sigma, sigma_init=sigma_init
    )
    model = GRAM(config, TokenShape(4, vocab=3))
    u, e_y = torch.randn(2, 3, model.length, 32).unbind()
    q, p = model.posterior(u, e_y), model.prior(u)
    balanced_kl(q, p, 0.8).sum().backward()
    for head in (model.posterior_head, model.prior_head):
        assert all(not parameter.grad.any() for parameter in head.parameters())


def test_kl_of_bfloat16_parameters_is_computed_in_float32():
    q, p = gaussian(1), gaussian(2)
    q = Gaussian(q.mean.bfloat16(), q.std.bfloat16())
    exact = kl_divergence(Normal(q.mean.float(), q.std.float()), normal(p)).sum(-1)
    torch.testing.assert_close(kl(q, p), exact)


def test_point_masses_diverge_by_half_their_squared_distance():
    q, p = gaussian(1), gaussian(2)
    half = 0.5 * ((q.mean - p.mean) ** 2).sum(-1)
    torch.testing.assert_close(kl(Gaussian(q.mean, None), Gaussian(p.mean, None)), half)
    unit = torch.ones_like(q.mean)
    torch.testing.assert_close(
        half, kl_divergence(Normal(q.mean, unit), Normal(p.mean, unit)).sum(-1)
    )


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.8, 1.0])
def test_balanced_kl_has_the_value_of_kl_and_weighted_gradients(balance):
    q, p = gaussian(1), gaussian(2)
    result = balanced_kl(q, p, balance)
    torch.testing.assert_close(result, kl_divergence(normal(q), normal(p)).sum(-1))
    result.sum().backward()
    # The plain gradients, by autograd through torch.distributions on fresh leaves.
    q_free, p_free = gaussian(1), gaussian(2)
    kl_divergence(normal(q_free), normal(p_free)).sum().backward()
    for weight, ours, plain in ((1 - balance, q, q_free), (balance, p, p_free)):
        torch.testing.assert_close(ours.mean.grad, weight * plain.mean.grad)
        torch.testing.assert_close(ours.std.grad, weight * plain.std.grad)


def test_gradients_of_a_sample_agree_with_finite_differences():
    g, noise = gaussian(1), torch.randn(2, 3, 4)
    g.sample(noise).square().sum().backward()
    step = 1e-3
    for name in ("mean", "std"):
        slope = torch.zeros_like(g.mean)
        for index in range(g.mean.numel()):
            ends = []
            for sign in (1, -1):
                parts = {"mean": g.mean.detach().double(), "std": g.std.detach().double()}
                parts[name].view(-1)[index] += sign * step
                ends.append((parts["mean"] + parts["std"] * noise).square().sum())
            slope.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(getattr(g, name).grad, slope, rtol=1e-3, atol=1e-4)


def test_samples_have_the_moments_of_the_gaussian():
    torch.manual_seed(0)
    g = Gaussian(torch.tensor([[[1.5, -2.0]]]), torch.tensor([[[0.5, 3.0]]]))
    draws = g.sample(torch.randn(100_000, 1, 2)).squeeze(1)
    torch.testing.assert_close(draws.mean(0), g.mean[0, 0], atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std(0), g.std[0, 0], rtol=0.02, atol=0)


def test_a_point_mass_samples_its_mean():
    mean = torch.randn(2, 3, 4)
    for noise in (torch.randn(2, 3, 4), None):
        assert torch.equal(Gaussian(mean, None).sample(noise), mean)


def test_another_gaussian_needs_noise():
    with pytest.raises(ValueError, match="needs noise"):
        gaussian(1).sample(None)


def test_a_detached_gaussian_is_equal_and_without_gradient():
    g = gaussian(1)
    cut = g.detach()
    assert torch.equal(cut.mean, g.mean)
    assert torch.equal(cut.std, g.std)
    assert not cut.mean.requires_grad
    assert not cut.std.requires_grad
    assert Gaussian(g.mean, None).detach().std is None


def head(guidance="full", sigma="softplus", sigma_init=0.1, floor=0.01) -> GaussianHead:
    return GaussianHead(
        4, 4, 8, guidance=guidance, sigma=sigma, sigma_init=sigma_init, sigma_floor=floor
    )


@pytest.mark.parametrize("sigma", ["softplus", "exp"])
@pytest.mark.parametrize("sigma_init", [0.05, 0.1, 2.0])
def test_a_fresh_head_has_mean_zero_and_deviation_sigma_init(sigma, sigma_init):
    g = head(sigma=sigma, sigma_init=sigma_init)(torch.randn(2, 3, 4))
    assert not g.mean.any()
    torch.testing.assert_close(g.std, torch.full_like(g.std, sigma_init))


@pytest.mark.parametrize(
    ("sigma", "link"), [("softplus", lambda r: math.log1p(math.exp(r))), ("exp", math.exp)]
)
def test_the_deviation_is_the_link_of_its_network_above_the_floor(sigma, link):
    part = head(sigma=sigma)
    torch.manual_seed(0)
    torch.nn.init.normal_(part.raw_std.down.weight)
    x = torch.randn(1, 1, 4)
    # The offset that the network's zero stands for: the one whose link is sigma_init - floor.
    offset = {"softplus": math.log(math.exp(0.09) - 1), "exp": math.log(0.09)}[sigma]
    expected = [0.01 + link(r + offset) for r in part.raw_std(x).flatten().tolist()]
    torch.testing.assert_close(part(x).std.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("sigma", ["softplus", "exp"])
def test_the_deviation_never_falls_below_the_floor(sigma):
    part = head(sigma=sigma)
    part.offset = -200.0
    torch.testing.assert_close(part(torch.randn(1, 1, 4)).std, torch.full((1, 1, 4), 0.01))


def test_guide_only_has_no_deviation_and_stochastic_only_no_mean():
    x = torch.randn(2, 3, 4)
    assert head("guide_only")(x).std is None
    stochastic = head("stochastic_only")
    torch.nn.init.normal_(stochastic.raw_std.down.weight)
    g = stochastic(x)
    assert not g.mean.any()
    assert g.std.std().item() > 0
    assert stochastic.mean is None
