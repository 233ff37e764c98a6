"""The number format that matrix products are computed in; weights stay float32 masters."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "auto"]


def native(device: torch.device) -> Literal["fp32", "bf16"]:
    """What `auto` means on `device`: bf16 where its matrix units take it, which doubles the speed;
    elsewhere bf16 is emulated and slower than fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Older versions of torch do not say; fp32 is right on every processor.
    features: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if fast else "fp32"


def resolve(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """`precision` with `auto` decided for `device`."""
    return native(device) if precision == "auto" else precision


def wide_products() -> bool:
    """Have this process multiply float32 matrices with all lanes of an AMD processor's AVX-512;
    whether it does.

    MKL, with which torch multiplies them, keeps to AVX2 on AMD: half of the lanes. oneDNN does not,
    but torch asks it only where it may round the factors to bf16 ("medium"). It does so with AMX
    alone, which AMD does not have; that products stay those of float32 is looked at all the same,
    and the permission taken back where they do not. Where torch sees a GPU nothing is changed, for
    "medium" is also about that. Twice as fast on Zen 5; not measured on Zen 4, whose AVX-512 is no
    wider than two AVX2.
    """
    features: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    amd = str(features.get("cpu_name", "")).startswith("AMD") and features.get("avx512_f")
    if not amd or features.get("amx_tile") or torch.cuda.is_available():
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if _exact():
        return True
    torch.set_float32_matmul_precision(before)
    return False


def _exact() -> bool:
    """Whether a product of float32 matrices keeps all bits of its factors: times one, they are what
    they were. The size is one that oneDNN takes, and whose factors bf16 could not hold."""
    factors = 1 + torch.arange(256 * 256).view(256, 256) * 2.0**-20
    one = torch.eye(256)
    return bool(torch.equal(factors @ one, factors) and torch.equal(one @ factors, factors))


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context that computes in `precision` on `device`."""
    bf16 = resolve(precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
