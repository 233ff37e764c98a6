"""SwiGLUs of one input side by side on a CPU, forward and backward: the heads of a Gaussian.

Shapes: B batch, L positions, D width.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gram_core.fused.library import (
    NAMESPACE,
    VECTOR,
    array,
    call,
    fields,
    operations,
    ops,
    products,
    room_for_gradients,
)


@dataclass(frozen=True)
class Heads:
    """The heads of a Gaussian, SwiGLUs: gate and up, and down, [out, in], of its mean and of its
    deviation, which is floor + softplus(. + offset), or floor and the exponential of it; nothing
    for a head that is not."""

    mean: Sequence[Tensor] = ()
    std: Sequence[Tensor] = ()
    offset: float = 0.0
    floor: float = 0.0
    exponential: bool = False


def fits(x: Tensor, heads: Heads) -> bool:
    """Whether `gaussian` takes for what is `wanted` these weights: in float32, in widths of its,
    and of shapes that go together."""
    weights = [*heads.mean, *heads.std]
    if not weights:
        return False
    dim, ffn = x.shape[-1], weights[1].shape[-1]
    shapes = [(2 * ffn, dim), (dim, ffn)] * (len(weights) // 2)
    return (
        dim % (2 * VECTOR) == ffn % (2 * VECTOR) == 0
        and all(w.dtype == torch.float32 for w in weights)
        and [tuple(w.shape) for w in weights] == shapes
    )


def gaussian(
    x: Float[Tensor, "... D"], heads: Heads
) -> tuple[Float[Tensor, "... D"] | None, Float[Tensor, "... D"] | None]:
    """Mean and deviation that the heads give of x, in float32. For what `fits`. Their gradient has
    none."""
    out, _, _ = ops.heads(
        x.float(), [*heads.mean, *heads.std], bool(heads.std), heads.offset, heads.floor,
        heads.exponential, products() == torch.bfloat16,
    )  # fmt: skip
    return out[0] if heads.mean else None, out[-1] if heads.std else None


class _Call(ctypes.Structure):
    """HeadsCall of heads_call.h."""

    _fields_ = fields(
        "x *weights *out kept slope *out_grad x_back *weights_back",
        "positions dim ffn heads kept_numbers",
        "offset floor",
        "exponential half threads",
    )


def _run(name: str, like: Tensor, weights: list[Tensor], **others: Any) -> None:
    weights = [w.contiguous() for w in weights]
    dim = like.shape[-1]
    call(name, _Call(
        weights=array(weights), positions=like.numel() // dim, dim=dim, ffn=weights[1].shape[1],
        heads=len(weights) // 2, threads=torch.get_num_threads(), **others,
    ))  # fmt: skip


def _heads(
    x: Tensor,
    weights: list[Tensor],
    deviates: bool,
    offset: float,
    floor: float,
    exponential: bool,
    half: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    x = x.contiguous()
    out, kept, slope = _like_heads(x, weights, deviates, offset, floor, exponential, half)
    _run(
        "gram_heads", x, weights, x=x.data_ptr(), out=array(out), kept=kept.data_ptr(),
        slope=slope.data_ptr() if deviates else None, offset=offset, floor=floor,
        exponential=exponential, half=half, kept_numbers=kept.numel(),
    )  # fmt: skip
    return out, kept, slope


def _like_heads(
    x: Tensor,
    weights: list[Tensor],
    deviates: bool,
    offset: float,
    floor: float,
    exponential: bool,
    half: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    count, positions = len(weights) // 2, x.shape[:-1]
    kept = x.new_empty(
        (*positions, count * 2 * weights[1].shape[1]),
        dtype=torch.bfloat16 if half else torch.float32,
    )
    slope = x.new_empty(x.shape if deviates else 0)
    return [x.new_empty(x.shape) for _ in range(count)], kept, slope


def _heads_backward(
    grads: list[Tensor],
    x: Tensor,
    kept: Tensor,
    slope: Tensor,
    weights: list[Tensor],
    half: bool,
) -> list[Tensor]:
    deviates = slope.numel() > 0
    if deviates and slope.shape != x.shape:
        raise ValueError(f"a slope of shape {tuple(slope.shape)} for an input of {tuple(x.shape)}")
    grads, x = [grad.contiguous() for grad in grads], x.contiguous()
    kept, slope = kept.contiguous(), slope.contiguous()
    back, out = torch.empty_like(x), room_for_gradients(weights, x)
    _run(
        "gram_heads_backward", x, weights, x=x.data_ptr(), out_grad=array(grads),
        kept=kept.data_ptr(), slope=slope.data_ptr() if deviates else None,
        x_back=back.data_ptr(), weights_back=array(out), half=half, kept_numbers=kept.numel(),
    )  # fmt: skip
    return [back, *out]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor, Tensor]) -> None:
    x, weights, *_, ctx.half = inputs
    _, kept, slope = output
    ctx.mark_non_differentiable(kept, slope)
    ctx.set_materialize_grads(False)  # there would be one as large as what is kept
    ctx.save_for_backward(x, kept, slope, *weights)


def _back(ctx: Any, grads: list[Tensor | None], *_: Any) -> tuple[Any, ...]:
    x, kept, slope, *weights = ctx.saved_tensors
    grads = [torch.zeros_like(x) if grad is None else grad for grad in grads]
    back, *of_weights = ops.heads_backward(grads, x, kept, slope, weights, ctx.half)
    return back, of_weights, None, None, None, None, None


def _no_second(ctx: Any, grads: list[Tensor]) -> None:
    raise NotImplementedError("fused heads have no second derivative")


operations.define(
    "heads(Tensor x, Tensor[] weights, bool deviates, float offset, float floor, bool exponential,"
    " bool half) -> (Tensor[], Tensor, Tensor)"
)
operations.define(
    "heads_backward(Tensor[] grads, Tensor x, Tensor kept, Tensor slope, Tensor[] weights,"
    " bool half) -> Tensor[]"
)
operations.impl("heads", _heads, "CPU")
operations.impl("heads_backward", _heads_backward, "CPU")
torch.library.register_fake(f"{NAMESPACE}::heads", _like_heads, lib=operations)
torch.library.register_fake(
    f"{NAMESPACE}::heads_backward",
    lambda grads, x, kept, slope, weights, *_: [
        x.new_empty(x.shape),
        *(w.new_empty(w.shape) for w in weights),
    ],
    lib=operations,
)
torch.library.register_autograd(f"{NAMESPACE}::heads_backward", _no_second, lib=operations)
torch.library.register_autograd(f"{NAMESPACE}::heads", _back, setup_context=_keep, lib=operations)
