"""What the tests of fused operations share."""

from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gram_core.fused import library

# A value rounded to bfloat16 is off by 2^-8 at most, and by less on the whole; some are rounded on
# the way.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-7}

# What operations are compiled for: all that this processor has; 256 bits; and, in 256 bits, what
# lanes.h asks of AVX-512 and bfloat16, so that both are tested where the processor has neither.
HERE, AVX2 = "this processor", "AVX2"
EMULATED = pytest.param("AVX-512 emulated", marks=pytest.mark.slow)  # it compiles for minutes
WIDE = Path(__file__).with_name("wide.h")


@pytest.fixture
def fused_here():
    """The test is skipped where nothing is fused."""
    if not library.fuse():
        pytest.skip("nothing is fused here")


@pytest.fixture(params=[HERE, EMULATED])
def fusing(request, fused_here, monkeypatch):
    """The formats that operations are fused for, here and where AVX-512 is."""
    return compiled_for(request.param, monkeypatch)


@pytest.fixture(params=[HERE, AVX2, EMULATED])
def vectors(request, fused_here, monkeypatch):
    """The same, and for vectors of 256 bits."""
    return compiled_for(request.param, monkeypatch)


def compiled_for(kind, monkeypatch):
    if kind != HERE:
        emulated = kind != AVX2
        monkeypatch.setattr(library.process, "library", None)
        monkeypatch.setattr(library.process, "formats", ())
        monkeypatch.setattr(library, "_gxx", without_avx512(library._gxx, emulated))
        if emulated:
            digest = sha256(WIDE.read_bytes()).hexdigest()
            # -O3 takes ten minutes. Of more than -O1, what has products added unrounded, as FMAs.
            less = ("-O1", "-fexpensive-optimizations", "-include", str(WIDE), f"-DWIDE={digest}")
            monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-Wno-psabi", *less))
            monkeypatch.setattr(library, "COMPILING", 1200)
        assert library.fuse()
        half = (torch.bfloat16,) if emulated else ()
        assert library.process.formats == (torch.float32, *half)
    return library.process.formats


def without_avx512(gxx, emulated):
    def run(*arguments):
        said = gxx(*arguments, "-mno-avx512f")
        if emulated and "-dM" in arguments:
            return said.replace("__AMX_BF16__", "") + "#define __AVX512BF16__ 1\n"
        return said

    return run


@pytest.fixture
def halves(fusing):
    """The test is skipped where bfloat16 is not fused."""
    if torch.bfloat16 not in fusing:
        pytest.skip("no bfloat16 here")


@pytest.fixture
def bound():
    """The largest error of a number format, as a share."""
    return BOUND.__getitem__


@pytest.fixture
def error():
    """Root mean square of a value's error, as a share of the exact values'."""

    def of(value: Tensor, exact: Tensor) -> float:
        value, exact = value.detach(), exact.detach()
        rms = (value.double() - exact).square().mean().sqrt()
        return float(rms / exact.square().mean().sqrt())

    return of


@pytest.fixture
def poisoned():
    """Memory that torch gives out is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def separately(monkeypatch):
    """Calls a function where nothing is fused."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(library.process, "formats", ())
            return function(*arguments)

    return call
