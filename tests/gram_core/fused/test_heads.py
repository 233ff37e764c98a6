"""Fused heads and their gradient against float64 twins; and where they are not used."""

import copy

import pytest
import torch

from gram_core.fused import heads as fused
from gram_core.fused import library
from gram_core.model.latent import GaussianHead

SHAPES = [(3, 64, 128, 128), (2, 33, 64, 96), (1, 5, 32, 32), (19, 81, 32, 64), (1, 1, 32, 32)]


def head_of(dim=32, ffn=32, *, guidance="full", sigma="softplus", floor=1e-3, spread=0.2):
    """A head that gives something: its last maps are zero at first."""
    head = GaussianHead(
        dim, dim, ffn, guidance=guidance, sigma=sigma, sigma_init=0.5, sigma_floor=floor
    )
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return head


def given(head, x):
    """Mean and deviation, those that there are."""
    told = head(x)
    mean = () if head.mean is None else (told.mean,)
    return [*mean, *(() if told.std is None else (told.std,))]


def exactly(twin, x):
    """The same of a twin in float64, as the paper has it."""
    out = [] if twin.mean is None else [twin.mean(x)]
    if twin.raw_std is not None:
        raw = twin.raw_std(x) + twin.offset
        out.append(twin.floor + (raw.exp() if twin.sigma == "exp" else (1 + raw.exp()).log()))
    return out


@pytest.mark.parametrize("sigma", ["softplus", "exp"])
@pytest.mark.parametrize("guidance", ["full", "stochastic_only", "guide_only"])
@pytest.mark.parametrize(("batch", "length", "dim", "ffn"), SHAPES)
def test_heads_and_their_gradient_are_the_exact_ones(
    vectors, error, bound, batch, length, dim, ffn, guidance, sigma
):
    torch.manual_seed(0)
    head = head_of(dim, ffn, guidance=guidance, sigma=sigma, spread=dim**-0.5 / 2)
    twin = copy.deepcopy(head).double()
    for kind in vectors:
        x = torch.randn(batch, length, dim).requires_grad_()
        wide = x.detach().double().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            assert library.wanted(x) and fused.fits(x, head.fused())
            out = given(head, x)
        exact = exactly(twin, wide)
        grads = torch.randn(len(out), batch, length, dim)
        torch.autograd.backward(out, list(grads))
        torch.autograd.backward(exact, list(grads.double()))
        for mine, theirs in zip(out, exact, strict=True):
            assert mine.dtype == torch.float32
            assert error(mine, theirs) < 2 * bound(kind)
        assert error(x.grad, wide.grad) < 2 * bound(kind)
        for mine, theirs in zip(head.parameters(), twin.parameters(), strict=True):
            assert error(mine.grad, theirs.grad) < 2 * bound(kind)
            mine.grad = theirs.grad = None


@pytest.mark.parametrize("sigma", ["softplus", "exp"])
def test_deviations_of_any_size_and_their_slopes(vectors, sigma):
    """Large and small ones, against float64: relative errors, of the slope too."""
    head = head_of(guidance="stochastic_only", sigma=sigma, floor=1e-30)
    with torch.no_grad():
        head.raw_std.gate_up.weight.zero_()
        head.raw_std.gate_up.weight[:32] = 40 * torch.eye(32)  # silu(40 x) = 40 x where x > 1
        head.raw_std.gate_up.weight[32:] = torch.eye(32) / 40
        head.raw_std.down.weight.copy_(torch.linspace(-16, 16, 32).diag())
    x = torch.linspace(1, 2, 7 * 32).reshape(1, 7, 32).requires_grad_()
    std = head(x).std
    std.sum().backward()
    wide = x.detach().double().requires_grad_()
    raw = torch.linspace(-16, 16, 32).double() * wide.square() + head.offset
    exact = raw.exp() if sigma == "exp" else torch.nn.functional.softplus(raw, threshold=500)
    exact.sum().backward()
    assert exact.min() < 1e-24 and exact.max() > 60
    torch.testing.assert_close(std.double(), exact.detach(), rtol=2e-5, atol=0)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2e-5, atol=0)


def test_one_output_alone_has_its_gradient(fusing, error, bound):
    head = head_of()
    twin = copy.deepcopy(head).double()
    for which in ("mean", "std"):
        x = torch.randn(2, 5, 32, requires_grad=True)
        wide = x.detach().double().requires_grad_()
        getattr(head(x), which).sum().backward()
        getattr(twin(wide), which).sum().backward()
        assert error(x.grad, wide.grad) < bound(torch.float32)
        mine, other = (head.mean, head.raw_std) if which == "mean" else (head.raw_std, head.mean)
        theirs = twin.mean if which == "mean" else twin.raw_std
        assert error(mine.down.weight.grad, theirs.down.weight.grad) < bound(torch.float32)
        assert not other.down.weight.grad.any()
        head.zero_grad()
        twin.zero_grad()


@pytest.mark.parametrize("deviates", [False, True])
def test_they_are_well_behaved_in_graphs(fusing, deviates):
    heads = head_of(ffn=64).fused()
    weights = [w.detach().requires_grad_() for w in (*heads.mean, *heads.std)]
    x = torch.randn(2, 32, 5).transpose(1, 2).requires_grad_()
    arguments = (x, weights, deviates, 0.5, 1e-3, False, False)
    torch.library.opcheck(library.ops.heads.default, arguments)
    with torch.no_grad():
        out, kept, slope = library.ops.heads(*arguments)
        torch.library.opcheck(
            library.ops.heads_backward.default,
            ([*out], x.detach(), kept, slope, [w.detach() for w in weights], False),
        )


def test_what_was_kept_of_another_size_is_refused(fusing):
    heads = head_of().fused()
    weights, x = [*heads.mean, *heads.std], torch.randn(2, 5, 32)
    with torch.no_grad():
        out, kept, slope = library.ops.heads(x, weights, True, 0.5, 1e-3, False, False)
        with pytest.raises(ValueError, match="no format, width or size"):
            library.ops.heads_backward([*out], x, kept[..., 1:], slope, weights, False)
        with pytest.raises(ValueError, match="a slope of shape"):
            library.ops.heads_backward([*out], x, kept, slope[1:], weights, False)


def test_what_does_not_fit_is_computed_one_after_the_other(monkeypatch):
    library.fuse()
    x = torch.randn(2, 5, 32)
    head = head_of(ffn=64)
    assert fused.fits(x, head.fused())
    other = GaussianHead(32, 16, 64, guidance="full", sigma="exp", sigma_init=0.5, sigma_floor=1e-3)
    assert not fused.fits(x, other.fused())  # of another width than its input
    assert not fused.fits(x, fused.Heads())
    assert not fused.fits(x, copy.deepcopy(head).double().fused())
    assert not fused.fits(x[..., :16], head_of(16, 64).fused())
    assert not fused.fits(x, head_of(32, 16).fused())
    whole = head(x)
    monkeypatch.setattr(library.process, "formats", ())
    alone = head(x)
    torch.testing.assert_close(alone.mean, whole.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.std, whole.std, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guidance", ["full", "stochastic_only", "guide_only"])
def test_a_gaussians_heads_are_told_apart(fusing, guidance):
    head = head_of(guidance=guidance, sigma="exp")
    x = torch.randn(2, 5, 32)
    told = head(x)
    if guidance == "stochastic_only":
        assert not told.mean.any()
    else:
        torch.testing.assert_close(told.mean, head.mean(x), rtol=1e-5, atol=1e-6)
    if guidance == "guide_only":
        assert told.std is None
    else:
        std = 1e-3 + (head.raw_std(x) + head.offset).exp()
        torch.testing.assert_close(told.std, std, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_is_refused(fusing):
    x = torch.randn(1, 5, 32, requires_grad=True)
    mean = head_of(guidance="guide_only")(x).mean
    (grad,) = torch.autograd.grad(mean.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
