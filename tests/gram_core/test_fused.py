"""The fused operations against float64 references of other making; and where they are not used."""

import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gram_core.fused import operations as fused
from gram_core.model.layers import NORM_EPS, Attention, SequenceMixer, Stack, SwiGLU, rope_table

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def fusing():
    """The formats that operations are fused for here; the test is skipped where there is none."""
    if not fused.fuse():
        pytest.skip("nothing is fused here")
    return fused._process.formats


@pytest.fixture
def halves(fusing):
    """The test is skipped where bfloat16 is not fused."""
    if torch.bfloat16 not in fusing:
        pytest.skip("no bfloat16 here")


@pytest.fixture(params=["this processor", "AVX2"])
def vectors(request, monkeypatch, fusing):
    """The operations as compiled for all that this processor has, and for 256 bits."""
    if request.param == "AVX2":
        monkeypatch.setattr(fused, "_process", fused._Process())
        monkeypatch.setattr(fused, "FLAGS", (*fused.FLAGS, "-mno-avx512f"))
        monkeypatch.setattr(fused, "_gxx", without_avx512(fused._gxx))
        assert fused.fuse()
        assert fused._process.formats == (torch.float32,)
    return fused._process.formats


def without_avx512(gxx):
    return lambda *arguments: gxx(*arguments, "-mno-avx512f")


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


def error(value: Tensor, exact: Tensor) -> float:
    """Root mean square, as a share of the exact values'."""
    value, exact = value.detach(), exact.detach()
    return float((value.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


# A value rounded to bfloat16 is off by 2^-8 at most, and by less on the whole; some are rounded on
# the way.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
LENGTHS = [1, 5, 16, 63, 64, 65, 97]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("channels", fused.CHANNELS)
def test_attention_and_its_gradient_are_the_exact_ones(vectors, channels, length):
    heads, batch = 2, 3
    for kind in vectors:
        torch.manual_seed(length)
        qkv = torch.randn(batch, length, 3 * heads * channels).to(kind).requires_grad_()
        grad = torch.randn(batch, length, heads * channels).to(kind)
        rope = rope_table(length, channels, 100.0)
        assert fused.fits_attention(qkv, rope, heads)
        out = fused.attend(qkv, rope, heads)
        out.backward(grad)
        wide = qkv.detach().double().requires_grad_()
        exact = reference(wide, heads, 100.0)
        exact.backward(grad.double())
        assert out.dtype == qkv.grad.dtype == kind
        assert error(out, exact) < BOUND[kind]
        for mine, theirs in zip(qkv.grad.chunk(3, -1), wide.grad.chunk(3, -1), strict=True):
            if length == 1 and theirs.abs().max() < 1e-12:  # one weight, which is one: no gradient
                assert mine.abs().max() < 1e-5
            else:
                assert error(mine, theirs) < 2 * BOUND[kind]


def test_large_scores_neither_overflow_nor_lose_the_largest(vectors):
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


def float64_twin(stack: Stack, core: str, length: int, heads: int, dim: int, ffn: int) -> Stack:
    twin = Stack(
        core, layers=len(stack.blocks), dim=dim, heads=heads, ffn=ffn, length=length, rope_base=100
    )
    twin.load_state_dict(stack.state_dict())
    return twin.double()  # whose weights no fused operation takes


@pytest.mark.parametrize("core", ["attention", "mixer"])
@pytest.mark.parametrize(
    ("batch", "length", "dim", "heads", "ffn"),
    [
        (3, 64, 128, 4, 128),
        (5, 16, 64, 4, 32),
        (2, 81, 48, 3, 80),
        (9, 7, 32, 1, 16),
        (1, 1, 16, 1, 16),
    ],
)
def test_a_stack_without_gradients_is_the_exact_one(vectors, core, batch, length, dim, heads, ffn):
    torch.manual_seed(0)
    stack = Stack(core, layers=2, dim=dim, heads=heads, ffn=ffn, length=length, rope_base=100)
    twin = float64_twin(stack, core, length, heads, dim, ffn)
    a, b = torch.randn(2, batch, length, dim)
    with torch.no_grad():
        exact = twin(a.double(), b.double())
        for kind in vectors:
            half = kind == torch.bfloat16
            for first in {a.dtype, kind}:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    assert fits(stack, a.to(first), b)
                    out = stack(a.to(first), b)
                assert out.dtype == kind
                assert error(out, exact) < (2 * BOUND[kind] if half else BOUND[kind])


def fits(stack: Stack, a: Tensor, b: Tensor) -> bool:
    """Whether `stack` is fused for these."""
    weights = [w for block in stack.blocks for w in block.weights()]
    rope = getattr(stack.blocks[0].mixing, "rope", None)
    return fused.wants_stack(a, b) and fused.fits_stack(a, weights, rope, stack.heads)


@pytest.mark.parametrize("core", ["attention", "mixer"])
def test_rows_do_not_depend_on_their_company_nor_on_threads(fusing, core):
    stack = Stack(core, layers=2, dim=64, heads=4, ffn=48, length=10, rope_base=100)
    a, b = torch.randn(2, 23, 10, 64)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(1)
            whole = stack(a, b)
            assert torch.equal(stack(a[4:9], b[4:9]), whole[4:9])
            torch.set_num_threads(3)
            assert torch.equal(stack(a, b), whole)
    finally:
        torch.set_num_threads(before)


def test_the_operations_are_well_behaved_in_graphs(fusing):
    rope = rope_table(9, 16, 100.0)
    qkv = torch.randn(2, 9, 96, requires_grad=True)
    torch.library.opcheck(torch.ops.gram.attend.default, (qkv, rope, 2))
    grad = torch.randn(2, 9, 32)
    for laid_out in (qkv.detach(), torch.randn(2, 96, 9).transpose(1, 2)):
        torch.library.opcheck(torch.ops.gram.attend_backward.default, (grad, laid_out, rope, 2))
    stack = Stack("attention", layers=1, dim=32, heads=2, ffn=16, length=9, rope_base=100)
    weights = [w.detach() for block in stack.blocks for w in block.weights()]
    a, b = torch.randn(2, 2, 9, 32)
    torch.library.opcheck(
        torch.ops.gram.stack.default, (a, b, weights, rope, 2, NORM_EPS, False)
    )  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
def test_compiled_it_is_one_graph_with_the_same_bits(fusing, half):
    stack = Stack("attention", layers=2, dim=32, heads=2, ffn=16, length=9, rope_base=100)
    a, b = torch.randn(2, 3, 9, 32)

    def both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            first = stack(a, b)
        return first, stack(first, b)  # without gradients, and with

    compiled = torch.compile(both, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=half and torch.bfloat16 in fusing):
        first, second = both(a, b)
        one, two = compiled(a, b)
    assert torch.equal(first, one)
    assert second.requires_grad and two.requires_grad
    torch.testing.assert_close(
        two, second, rtol=2e-2 if half else 1e-4, atol=2e-2 if half else 1e-5
    )


def test_what_does_not_fit_is_computed_by_separate_operations(monkeypatch):
    fused.fuse()
    x, rope = torch.randn(2, 5, 96), rope_table(5, 16, 100.0)
    assert fused.fits_attention(x, rope, 2) == bool(fused._process.formats)
    assert not fused.fits_attention(x.double(), rope, 2)
    assert not fused.fits_attention(x, rope_table(5, 8, 100.0), 4)
    assert not fused.fits_attention(x, rope_table(6, 16, 100.0), 2)  # of another length
    assert not fused.fits_attention(x[..., :92], rope, 2)
    assert not fused.fits_attention(x.to("meta"), rope, 2)
    assert not fused.fits_attention(x[0], rope, 2)
    stack = Stack("attention", layers=1, dim=32, heads=2, ffn=16, length=5, rope_base=100)
    a, b = torch.randn(2, 2, 5, 32)
    assert not fits(stack, a, b)  # gradients are wanted
    with torch.no_grad():
        assert fits(stack, a, b) == bool(fused._process.formats)
        assert not fits(stack, a, b.double())
        assert not fits(stack, a, b[:1])
        assert not fits(stack, a[0], b[0])
        whole = stack(a, b)
        monkeypatch.setattr(fused._process, "formats", ())
        torch.testing.assert_close(stack(a, b), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("core", ["attention", "mixer"])
@pytest.mark.parametrize("shape", [(2, 4, 32), (2, 20, 32), (2, 0, 32), (2, 9, 64)])
def test_what_a_stack_is_not_made_for_is_refused_as_without(core, shape):
    """No numbers, and nothing read beyond a weight or a table."""
    fused.fuse()
    stack = Stack(core, layers=2, dim=32, heads=2, ffn=16, length=9, rope_base=100)
    with torch.no_grad():
        assert not fits(stack, torch.randn(shape), torch.randn(shape))
        with pytest.raises(RuntimeError):
            stack(torch.randn(shape), torch.randn(shape))


def test_weights_that_zero_has_cut_up_are_left_to_their_modules(monkeypatch):
    """A look at them would gather all of a stack's at once, and none of its modules be called."""
    fused.fuse()
    stack = Stack("mixer", layers=1, dim=32, heads=2, ffn=16, length=9, rope_base=100)
    called = []
    stack.blocks[0].channels.down.register_forward_hook(lambda *_: called.append(1))
    monkeypatch.setattr(SwiGLU, "weights", lambda self: pytest.fail("looked at"))
    for parameter in stack.parameters():
        parameter.ds_status = "cut up"
    with torch.no_grad():
        stack(*torch.randn(2, 2, 9, 32))
    assert called


def test_bfloat16_without_autocast_is_float32s_products(halves):
    stack = Stack("mixer", layers=2, dim=32, heads=2, ffn=16, length=9, rope_base=100)
    a, b = torch.randn(2, 2, 9, 32)
    a = a.bfloat16()
    with torch.no_grad():
        assert fits(stack, a, b)
        out = stack(a, b)
        exact = float64_twin(stack, "mixer", 9, 2, 32, 16)(a.double(), b.double())
    assert out.dtype == torch.float32
    assert error(out, exact) < BOUND[torch.float32]


def test_a_second_derivative_is_refused(fusing):
    qkv = torch.randn(1, 5, 96, requires_grad=True)
    out = fused.attend(qkv, rope_table(5, 16, 100.0), 2)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_a_model_cast_to_bfloat16_whole_is_computed_as_such(halves):
    """Its table of positions is bfloat16, too, which the operations do not read."""
    layer = Attention(64, heads=2, length=9, rope_base=100)
    x = torch.randn(2, 9, 64)
    exact = layer.double()(x.double())
    out = layer.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert error(out, exact) < 4 * BOUND[torch.bfloat16]


def test_weights_come_in_the_order_of_the_products():
    mixer = SequenceMixer(5, 8)
    assert [tuple(w.shape) for w in mixer.weights()] == [(16, 5), (5, 8)]
    assert [tuple(w.shape) for w in Attention(16, 2, 5, 100).weights()] == [(48, 16), (16, 16)]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has fused nothing, and a place where nothing is compiled."""
    monkeypatch.setattr(fused, "_process", fused._Process())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    return tmp_path


def test_without_a_compiler_nothing_is_fused_and_nothing_is_said(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fused.fuse()
    assert fused._process.formats == ()


@needs_gxx
def test_a_processor_without_avx2_is_left_alone(fresh, monkeypatch):
    monkeypatch.setattr(fused, "_gxx", lambda *arguments: "#define __SSE2__ 1")
    assert not fused.fuse()


@pytest.fixture
def compiler(fresh, monkeypatch):
    """Puts a g++ before all others that knows AVX2, and compiles by a script of ours."""

    def put(compiling: str) -> None:
        path = fresh / "g++"
        path.write_text(
            f'#!/bin/sh\ncase "$*" in *dM*) echo "#define __AVX2__ 1"; exit;; esac\n{compiling}\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(fresh), prepend=os.pathsep)

    return put


def kept(folder: Path) -> list[Path]:
    """What compiling has left."""
    return list((folder / "built" / "gram").iterdir())


def test_a_compiler_that_fails_is_told_in_one_line_and_leaves_nothing(fresh, compiler):
    compiler('echo "note: long" >&2; echo "fatal error: no such header" >&2; exit 1')
    with pytest.warns(UserWarning, match="nothing is fused.*fatal error: no such header") as seen:
        assert not fused.fuse()
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    assert kept(fresh) == []


def test_a_compiler_that_fails_silently_is_told_too(fresh, compiler):
    compiler("echo >&2; exit 1")
    with pytest.warns(UserWarning, match="nothing is fused.*exit status 1"):
        assert not fused.fuse()


def test_a_library_that_is_none_is_told_in_one_line(fresh, compiler):
    compiler('while [ "$1" != -o ]; do shift; done; echo no > "$2"')
    with pytest.warns(UserWarning, match="nothing is fused"):
        assert not fused.fuse()
    assert fused._process.library is None
    assert kept(fresh) == []


def test_a_damaged_library_is_compiled_anew(fusing, fresh):
    assert fused.fuse()
    (library,) = kept(fresh)
    library.unlink()  # not written over: this process has it mapped
    library.write_text("no")
    fused._process.library = None
    assert fused.fuse()
    assert library.stat().st_size > 1000


def test_it_is_compiled_once_for_a_source(fusing, fresh, monkeypatch):
    assert fused.fuse()
    (library,) = kept(fresh)
    written = library.stat().st_mtime_ns
    fused._process.library = None
    assert fused.fuse()
    assert library.stat().st_mtime_ns == written
    monkeypatch.setattr(fused, "FLAGS", (*fused.FLAGS, "-g0"))
    fused._process.library = None
    assert fused.fuse()
    assert len(kept(fresh)) == 2


def test_what_no_file_is_compiled_for_is_an_error(fusing):
    with pytest.raises(ValueError, match="no format or width"):
        fused.attend(torch.randn(1, 4, 72), rope_table(4, 24, 100.0), 1)


LITTLE = """
import resource, sys, torch
from gram_core.fused import operations as fused
from gram_core.model.layers import rope_table
assert fused.fuse()
torch.set_num_threads(2)
length = 30_000  # whose weights take gigabytes
qkv, rope = torch.randn(1, length, 48), rope_table(length, 16, 100.0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
try:
    torch.ops.gram.attend_backward(torch.randn(1, length, 16), qkv, rope, 1)
except MemoryError as error:
    print(error)
"""


def test_no_memory_is_an_error(fusing):
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    done = subprocess.run([sys.executable, "-c", LITTLE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no memory for gram_core/fused\n"), done.stderr


def test_one_openmp_runtime_serves_torch_and_the_operations(fusing):
    """Two would keep two sets of threads, which wait for each other's cores."""
    code = (
        "import torch; from gram_core.fused import operations as fused; assert fused.fuse()\n"
        "from gram_core.model.layers import rope_table\n"
        "torch.randn(300, 300) @ torch.randn(300, 300)\n"
        "fused.attend(torch.randn(4, 8, 48), rope_table(8, 16, 100.0), 1)\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split()[-1] for line in lines if 'omp.so' in line or 'omp5.so' in line}))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
