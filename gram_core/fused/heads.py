"""SwiGLUs of one input side by side on a CPU, forward and backward: the heads of a Gaussian.

Shapes: B batch, L positions, D width.
"""

import ctypes
from collections.abc import Sequence
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


def fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `heads` takes for what is `wanted` these weights: in float32, in widths of its, and
    of shapes that go together."""
    dim, ffn = x.shape[-1], weights[1].shape[-1]
    shapes = [(2 * ffn, dim), (dim, ffn)] * (len(weights) // 2)
    return (
        dim % (2 * VECTOR) == ffn % (2 * VECTOR) == 0
        and all(w.dtype == torch.float32 for w in weights)
        and [tuple(w.shape) for w in weights] == shapes
    )


def heads(x: Float[Tensor, "... D"], weights: Sequence[Tensor]) -> list[Float[Tensor, "... D"]]:
    """What SwiGLUs give of x, in float32: two `weights` each, [out, in], of gate and up, and down.
    For what `fits`. Their gradient has none."""
    out, _ = ops.heads(x.float(), list(weights), products() == torch.bfloat16)
    return list(out)


class _Call(ctypes.Structure):
    """HeadsCall of heads_call.h."""

    _fields_ = fields(
        "x *weights *out kept *out_grad x_back *weights_back",
        "positions dim ffn heads kept_numbers",
        "",
        "half threads",
    )


def _run(name: str, like: Tensor, weights: list[Tensor], half: bool, **others: Any) -> None:
    weights = [w.contiguous() for w in weights]
    dim = like.shape[-1]
    call(name, _Call(
        weights=array(weights), positions=like.numel() // dim, dim=dim, ffn=weights[1].shape[1],
        heads=len(weights) // 2, half=half, threads=torch.get_num_threads(), **others,
    ))  # fmt: skip


def _heads(x: Tensor, weights: list[Tensor], half: bool) -> tuple[list[Tensor], Tensor]:
    x = x.contiguous()
    out, kept = _like_heads(x, weights, half)
    _run(
        "gram_heads", x, weights, half, x=x.data_ptr(), out=array(out), kept=kept.data_ptr(),
        kept_numbers=kept.numel(),
    )  # fmt: skip
    return out, kept


def _like_heads(x: Tensor, weights: list[Tensor], half: bool) -> tuple[list[Tensor], Tensor]:
    count, positions = len(weights) // 2, x.shape[:-1]
    kept = x.new_empty(
        (*positions, count * 2 * weights[1].shape[1]),
        dtype=torch.bfloat16 if half else torch.float32,
    )
    return [x.new_empty(x.shape) for _ in range(count)], kept


def _heads_backward(
    grads: list[Tensor], x: Tensor, kept: Tensor, weights: list[Tensor], half: bool
) -> list[Tensor]:
    grads, x, kept = [grad.contiguous() for grad in grads], x.contiguous(), kept.contiguous()
    back, out = torch.empty_like(x), room_for_gradients(weights, x)
    _run(
        "gram_heads_backward", x, weights, half, x=x.data_ptr(), out_grad=array(grads),
        kept=kept.data_ptr(), kept_numbers=kept.numel(), x_back=back.data_ptr(),
        weights_back=array(out),
    )  # fmt: skip
    return [back, *out]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, weights, ctx.half = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # there would be one as large as what is kept
    ctx.save_for_backward(x, output[1], *weights)


def _back(ctx: Any, grads: list[Tensor | None], *_: Any) -> tuple[Tensor, list[Tensor], None]:
    x, kept, *weights = ctx.saved_tensors
    grads = [torch.zeros_like(x) if grad is None else grad for grad in grads]
    back, *of_weights = ops.heads_backward(grads, x, kept, weights, ctx.half)
    return back, of_weights, None


def _no_second(ctx: Any, grads: list[Tensor]) -> None:
    raise NotImplementedError("fused heads have no second derivative")


operations.define("heads(Tensor x, Tensor[] weights, bool half) -> (Tensor[], Tensor)")
operations.define(
    "heads_backward(Tensor[] grads, Tensor x, Tensor kept, Tensor[] weights, bool half) -> Tensor[]"
)
operations.impl("heads", _heads, "CPU")
operations.impl("heads_backward", _heads_backward, "CPU")
torch.library.register_fake(f"{NAMESPACE}::heads", _like_heads, lib=operations)
torch.library.register_fake(
    f"{NAMESPACE}::heads_backward",
    lambda grads, x, kept, weights, half: [
        x.new_empty(x.shape),
        *(w.new_empty(w.shape) for w in weights),
    ],
    lib=operations,
)
torch.library.register_autograd(f"{NAMESPACE}::heads_backward", _no_second, lib=operations)
torch.library.register_autograd(f"{NAMESPACE}::heads", _back, setup_context=_keep, lib=operations)
