"""Fused heads and their gradient against float64 twins; and where they are not used."""

import copy

import pytest
import torch

from gram_core.fused import heads as fused
from gram_core.fused import library
from gram_core.model.latent import GaussianHead
from gram_core.model.layers import SwiGLU, side_by_side


def weights_of(parts):
    return [w for part in parts for w in part.weights()]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("batch", "length", "dim", "ffn"),
    [(3, 64, 128, 128), (2, 33, 64, 96), (1, 5, 32, 32), (19, 81, 32, 64), (1, 1, 32, 32)],
)
def test_heads_and_their_gradient_are_the_exact_ones(
    vectors, error, bound, batch, length, dim, ffn, count
):
    torch.manual_seed(0)
    parts = [SwiGLU(dim, ffn, dim) for _ in range(count)]
    twins = [copy.deepcopy(part).double() for part in parts]
    for kind in vectors:
        x = torch.randn(batch, length, dim).requires_grad_()
        wide = x.detach().double().requires_grad_()
        grads = torch.randn(count, batch, length, dim)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            assert library.wanted(x) and fused.fits(x, weights_of(parts))
            out = side_by_side(parts, x)
        exact = [twin(wide) for twin in twins]
        torch.autograd.backward(out, list(grads))
        torch.autograd.backward(exact, list(grads.double()))
        for mine, theirs in zip(out, exact, strict=True):
            assert mine.dtype == torch.float32
            assert error(mine, theirs) < 2 * bound(kind)
        assert error(x.grad, wide.grad) < 2 * bound(kind)
        for part, twin in zip(parts, twins, strict=True):
            for mine, theirs in zip(part.parameters(), twin.parameters(), strict=True):
                assert error(mine.grad, theirs.grad) < 2 * bound(kind)
                mine.grad = theirs.grad = None


def test_one_output_alone_has_its_gradient(fusing, error, bound):
    parts = [SwiGLU(32, 32, 32) for _ in range(2)]
    x = torch.randn(2, 5, 32, requires_grad=True)
    side_by_side(parts, x)[1].sum().backward()
    twin = copy.deepcopy(parts[1]).double()
    wide = x.detach().double().requires_grad_()
    twin(wide).sum().backward()
    assert error(x.grad, wide.grad) < bound(torch.float32)
    assert error(parts[1].down.weight.grad, twin.down.weight.grad) < bound(torch.float32)
    assert not parts[0].down.weight.grad.any()


def test_they_are_well_behaved_in_graphs(fusing):
    weights = [w.detach().requires_grad_() for w in weights_of([SwiGLU(32, 64, 32)] * 2)]
    x = torch.randn(2, 32, 5).transpose(1, 2).requires_grad_()
    torch.library.opcheck(library.ops.heads.default, (x, weights, False))
    with torch.no_grad():
        out, kept = library.ops.heads(x, weights, False)
        torch.library.opcheck(
            library.ops.heads_backward.default,
            ([*out], x.detach(), kept, [w.detach() for w in weights], False),
        )


def test_what_was_kept_of_another_size_is_refused(fusing):
    weights, x = weights_of([SwiGLU(32, 64, 32)] * 2), torch.randn(2, 5, 32)
    with torch.no_grad():
        out, kept = library.ops.heads(x, weights, False)
        with pytest.raises(ValueError, match="no format, width or size"):
            library.ops.heads_backward([*out], x, kept[..., 1:], weights, False)


def test_what_does_not_fit_is_computed_one_after_the_other(monkeypatch):
    library.fuse()
    x = torch.randn(2, 5, 32)
    parts = [SwiGLU(32, 64, 32) for _ in range(2)]
    assert fused.fits(x, weights_of(parts))
    assert not fused.fits(x, weights_of([SwiGLU(32, 64, 16)]))  # of another width than its input
    assert not fused.fits(x, weights_of([part.double() for part in copy.deepcopy(parts)]))
    assert not fused.fits(x[..., :16], weights_of([SwiGLU(16, 64, 16)]))
    assert not fused.fits(x, weights_of([SwiGLU(32, 16, 32)]))
    whole = side_by_side(parts, x)
    monkeypatch.setattr(library.process, "formats", ())
    for mine, theirs in zip(side_by_side(parts, x), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guidance", ["full", "stochastic_only", "guide_only"])
def test_a_gaussians_heads_are_told_apart(fusing, guidance):
    head = GaussianHead(
        32, 32, 32, guidance=guidance, sigma="exp", sigma_init=0.5, sigma_floor=1e-3
    )
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
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
    (out,) = side_by_side([SwiGLU(32, 32, 32)], x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
