"""The number format that matrix products are computed in; weights stay float32 masters."""

from contextlib import AbstractContextManager, nullcontext
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


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context that computes in `precision` on `device`."""
    if precision == "auto":
        precision = native(device)
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
