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


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context that computes in `precision` on `device`."""
    bf16 = resolve(precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
