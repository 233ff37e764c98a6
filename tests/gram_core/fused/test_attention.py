"""Fused attention against a float64 reference of other making."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gram_core.fused import attention as fused
from gram_core.fused import library
from gram_core.model.layers import Attention, rope_table


def reference(qkv: Tensor, heads: int, base: float) -> Tensor:
    """Attention in float64: rotation as complex numbers, torch's own products and softmax."""
    length = qkv.shape[1]
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.double().chunk(3, dim=-1)
    )
    half = q.shape[-1] // 2
    angle = torch.outer(
        torch.arange(length, dtype=torch.float64),
        base ** (-torch.arange(half, dtype=torch.float64) / half),
    )
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    mixed = F.scaled_dot_product_attention(turned(q), turned(k), v)
    return mixed.transpose(1, 2).flatten(2)


LENGTHS = [1, 5, 16, 63, 64, 65, 97]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("channels", fused.CHANNELS)
def test_attention_and_its_gradient_are_the_exact_ones(vectors, error, bound, channels, length):
    heads, batch = 2, 3
    for kind in vectors:
        torch.manual_seed(length)
        qkv = torch.randn(batch, length, 3 * heads * channels).to(kind).requires_grad_()
        grad = torch.randn(batch, length, heads * channels).to(kind)
        rope = rope_table(length, channels, 100.0)
        assert fused.fits(qkv, rope, heads)
        out = fused.attend(qkv, rope, heads)
        out.backward(grad)
        wide = qkv.detach().double().requires_grad_()
        exact = reference(wide, heads, 100.0)
        exact.backward(grad.double())
        assert out.dtype == qkv.grad.dtype == kind
        assert error(out, exact) < bound(kind)
        for mine, theirs in zip(qkv.grad.chunk(3, -1), wide.grad.chunk(3, -1), strict=True):
            if length == 1 and theirs.abs().max() < 1e-12:  # one weight, which is one: no gradient
                assert mine.abs().max() < 1e-5
            else:
                assert error(mine, theirs) < 2 * bound(kind)


def test_large_scores_neither_overflow_nor_lose_the_largest(vectors, error):
    heads, length, channels = 1, 20, 16
    qkv = torch.randn(1, length, 3 * channels)
    qkv[..., : 2 * channels] *= 60  # scores of thousands
    out = fused.attend(qkv, rope_table(length, channels, 100.0), heads)
    assert torch.isfinite(out).all()
    assert error(out, reference(qkv, heads, 100.0)) < 1e-4


def test_a_number_that_is_none_is_seen_in_its_row_alone(vectors):
    qkv = torch.randn(2, 9, 3 * 32)
    qkv[0, 4, 0] = math.nan  # a query
    out = fused.attend(qkv, rope_table(9, 16, 100.0), 2)
    assert out[0, 4, :16].isnan().all()
    assert not out[0, 4, 16:].isnan().any() and not out[1].isnan().any()
    assert not out[0, :4].isnan().any()


def test_it_is_well_behaved_in_graphs(fusing):
    rope = rope_table(9, 16, 100.0)
    qkv = torch.randn(2, 9, 96, requires_grad=True)
    torch.library.opcheck(library.ops.attend.default, (qkv, rope, 2))
    grad = torch.randn(2, 9, 32)
    for laid_out in (qkv.detach(), torch.randn(2, 96, 9).transpose(1, 2)):
        torch.library.opcheck(library.ops.attend_backward.default, (grad, laid_out, rope, 2))


def test_what_does_not_fit_is_computed_by_separate_operations(monkeypatch):
    library.fuse()
    x, rope = torch.randn(2, 5, 96), rope_table(5, 16, 100.0)
    assert fused.fits(x, rope, 2) == bool(library.process.formats)
    assert not fused.fits(x.double(), rope, 2)
    assert not fused.fits(x, rope_table(5, 8, 100.0), 4)
    assert not fused.fits(x, rope_table(6, 16, 100.0), 2)  # of another length
    assert not fused.fits(x[..., :92], rope, 2)
    assert not fused.fits(x.to("meta"), rope, 2)
    assert not fused.fits(x[0], rope, 2)
    layer = Attention(32, heads=2, length=5, rope_base=100)
    whole = layer(x[..., :32])
    monkeypatch.setattr(library.process, "formats", ())
    torch.testing.assert_close(layer(x[..., :32]), whole, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_is_refused(fusing):
    qkv = torch.randn(1, 5, 96, requires_grad=True)
    out = fused.attend(qkv, rope_table(5, 16, 100.0), 2)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_a_model_cast_to_bfloat16_whole_is_computed_as_such(halves, error, bound):
    """Its table of positions is bfloat16, too, which the operations do not read."""
    layer = Attention(64, heads=2, length=9, rope_base=100)
    x = torch.randn(2, 9, 64)
    exact = layer.double()(x.double())
    out = layer.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert error(out, exact) < 4 * bound(torch.bfloat16)


def test_what_no_file_is_compiled_for_is_an_error(fusing):
    with pytest.raises(ValueError, match="no format, width or size"):
        fused.attend(torch.randn(1, 4, 72), rope_table(4, 24, 100.0), 1)


LITTLE = """
import resource, sys, torch
from gram_core.fused.library import fuse, ops
from gram_core.model.layers import rope_table
assert fuse()
torch.set_num_threads(2)
length = 30_000  # whose weights take gigabytes
qkv, rope = torch.randn(1, length, 48), rope_table(length, 16, 100.0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
try:
    ops.attend_backward(torch.randn(1, length, 16), qkv, rope, 1)
except MemoryError as error:
    print(error)
"""


def test_no_memory_is_an_error(fused_here):
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    done = subprocess.run([sys.executable, "-c", LITTLE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no memory for gram_core/fused\n"), done.stderr
