"""Softmax attention with rotary positions, forward and backward, a head at a time on a CPU.

As operations of torch's a head's scores go through memory four times.

Shapes: B batch, L positions, D width, Q = 3 D, E half of a head's channels.
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gram_core.fused.library import NAMESPACE, call, fields, operations, ops, process

CHANNELS = (16, 32, 64, 128)  # of a head, that attention is compiled for


def fits(qkv: Tensor, rope: Tensor, heads: int) -> bool:
    """Whether `attend` takes them: on a CPU, in a process with `fuse`, in one of its formats and
    widths, and of shapes that go together."""
    if not qkv.is_cpu or qkv.dtype not in process.formats or qkv.dim() != 3:
        return False
    channels = 2 * rope.shape[-1]
    return (
        channels in CHANNELS
        and qkv.shape[2] == 3 * heads * channels
        and rope.shape[:2] == (2, qkv.shape[1])
    )


def attend(
    qkv: Float[Tensor, "B L Q"], rope: Float[Tensor, "2 L E"], heads: int
) -> Float[Tensor, "B L D"]:
    """Softmax attention between rotated queries and keys, in the format of `qkv`; `rope` is the
    table of `gram_core.model.layers.rope_table`. For what `fits`. Its gradient has none."""
    out: Tensor = ops.attend(qkv, rope, heads)
    return out


class _Call(ctypes.Structure):
    """AttentionCall of attention_call.h."""

    _fields_ = fields("qkv table grad out", "batch length heads channels", "", "half threads")


def _call(qkv: Tensor, rope: Tensor, heads: int, grad: Tensor | None, out: Tensor) -> Tensor:
    batch, length, width = qkv.shape
    call("gram_attend", _Call(
        qkv.data_ptr(), rope.data_ptr(), None if grad is None else grad.data_ptr(), out.data_ptr(),
        batch, length, heads, width // (3 * heads),
        qkv.dtype == torch.bfloat16, torch.get_num_threads(),
    ))  # fmt: skip
    return out


def _attend(qkv: Tensor, rope: Tensor, heads: int) -> Tensor:
    qkv, rope = qkv.contiguous(), rope.float().contiguous()
    return _call(qkv, rope, heads, None, _like_attended(qkv, rope, heads))


def _attend_backward(grad: Tensor, qkv: Tensor, rope: Tensor, heads: int) -> Tensor:
    qkv, rope, grad = qkv.contiguous(), rope.float().contiguous(), grad.contiguous()
    return _call(qkv, rope, heads, grad, qkv.new_empty(qkv.shape))


def _like_attended(qkv: Tensor, rope: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    qkv, rope, ctx.heads = inputs
    ctx.save_for_backward(qkv, rope)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return ops.attend_backward(grad, *ctx.saved_tensors, ctx.heads), None, None


def _no_second(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError("fused attention has no second derivative")


operations.define("attend(Tensor qkv, Tensor rope, int heads) -> Tensor")
operations.define("attend_backward(Tensor grad, Tensor qkv, Tensor rope, int heads) -> Tensor")
operations.impl("attend", _attend, "CPU")
operations.impl("attend_backward", _attend_backward, "CPU")
torch.library.register_fake(f"{NAMESPACE}::attend", _like_attended, lib=operations)
torch.library.register_fake(
    f"{NAMESPACE}::attend_backward",
    lambda grad, qkv, rope, heads: qkv.new_empty(qkv.shape),
    lib=operations,
)
torch.library.register_autograd(f"{NAMESPACE}::attend_backward", _no_second, lib=operations)
torch.library.register_autograd(f"{NAMESPACE}::attend", _back, setup_context=_keep, lib=operations)
