"""What the tests of fused operations share."""

import pytest
import torch
from torch import Tensor

from gram_core.fused import library

# A value rounded to bfloat16 is off by 2^-8 at most, and by less on the whole; some are rounded on
# the way.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.fixture
def fusing():
    """The formats that operations are fused for here; the test is skipped where there is none."""
    if not library.fuse():
        pytest.skip("nothing is fused here")
    return library.process.formats


@pytest.fixture
def halves(fusing):
    """The test is skipped where bfloat16 is not fused."""
    if torch.bfloat16 not in fusing:
        pytest.skip("no bfloat16 here")


@pytest.fixture(params=["this processor", "AVX2"])
def vectors(request, monkeypatch, fusing):
    """The formats of the operations as compiled for all that this processor has, and for 256
    bits."""
    if request.param == "AVX2":
        monkeypatch.setattr(library.process, "library", None)
        monkeypatch.setattr(library.process, "formats", ())
        monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-mno-avx512f"))
        monkeypatch.setattr(library, "_gxx", without_avx512(library._gxx))
        assert library.fuse()
        assert library.process.formats == (torch.float32,)
    return library.process.formats


def without_avx512(gxx):
    return lambda *arguments: gxx(*arguments, "-mno-avx512f")


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
