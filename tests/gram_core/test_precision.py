from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gram_core import precision
from gram_core.precision import autocast, native, wide_products

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_products_are_computed_in_the_named_precision(precision, dtype):
    x = torch.ones(2, 2)
    with autocast(precision, CPU):
        assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "avx2": True}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert native(CPU) == expected
    with autocast("auto", CPU):
        assert torch.is_autocast_enabled("cpu") == (expected == "bf16")


def test_auto_is_fp32_where_torch_does_not_know_the_processor(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert native(CPU) == "fp32"


AMD = {"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": False}


@pytest.fixture
def processor(monkeypatch) -> Iterator[Any]:
    """Makes the machine one with the given features, without a GPU, on which torch is as it is by
    default."""
    before = torch.get_float32_matmul_precision()

    def be(features: dict[str, object]) -> None:
        torch.set_float32_matmul_precision("highest")
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    yield be
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(64, 64), (3, 64, 64), (300, 128)])
def test_wide_products_are_those_of_float32(processor, shape):
    # Whatever this machine is: a factor rounded to bf16 would be off by up to 2^-8 of it.
    processor(AMD)
    wide_products()
    torch.manual_seed(0)
    a, b = torch.randn(shape), torch.randn(*shape[:-2], shape[-1], 96)
    exact = a.double() @ b.double()
    bound = (a.abs().double() @ b.abs().double()) * shape[-1] * 2.0**-24
    assert torch.all(((a @ b).double() - exact).abs() <= bound)


def test_products_are_widened_where_they_stay_exact(processor, monkeypatch):
    processor(AMD)
    monkeypatch.setattr(precision, "_exact", lambda: True)
    assert wide_products()
    assert torch.get_float32_matmul_precision() == "medium"


def test_permission_to_round_is_taken_back_where_torch_makes_use_of_it(processor, monkeypatch):
    processor(AMD)
    plain = torch.Tensor.__matmul__

    def rounding(a, b):
        if torch.get_float32_matmul_precision() == "highest":
            return plain(a, b)
        return plain(a.bfloat16(), b.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not wide_products()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    "features",
    [
        {**AMD, "cpu_name": "Intel(R) Xeon(R)"},
        {**AMD, "avx512_f": False},
        {**AMD, "amx_tile": True},
        {},
    ],
)
def test_other_processors_keep_torch_as_it_is(processor, features):
    processor(features)
    assert not wide_products()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_machine_with_a_gpu_keeps_torch_as_it_is(processor, monkeypatch):
    processor(AMD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not wide_products()
    assert torch.get_float32_matmul_precision() == "highest"
