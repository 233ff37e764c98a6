"""Whole transitions on a CPU: all that lies between a group of sequences' state before and after
stays in the caches of one processor core.

Without gradients: any number of transitions that follow the prior (all of sampling, and training's
before the last of a supervision step). With gradients: the deterministic half of one, which keeps
what its backward reads.

Shapes: B batch, L positions, D width, E half of a head's channels, T transitions.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gram_core.fused.attention import CHANNELS
from gram_core.fused.heads import Heads
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
class Stacks:
    """f_H and f_L: four `weights` a block, [out, in], f_H's blocks first, then f_L's if there is
    one: of qkv and out, or of the positions' gate and up and down; of the channels' gate and up and
    down. `rope` is attention's table (none: SwiGLU over positions), `cycles` are K."""

    weights: Sequence[Tensor]
    rope: Float[Tensor, "2 L E"] | None
    blocks: int
    heads: int
    cycles: int
    eps: float

    def arguments(self) -> tuple[list[Tensor], Tensor | None, list[int]]:
        """As the operations take them."""
        return list(self.weights), self.rope, [self.blocks, self.heads, self.cycles]


def fits(h: Tensor, stacks: Stacks, prior: Heads | None = None) -> bool:
    """Whether what is `wanted` takes these weights, with gradients if these are enabled: in
    float32, in widths of its, and of shapes that go together."""
    weights, rope = stacks.weights, stacks.rope
    _, length, dim = h.shape
    hidden, ffn = weights[1].shape[-1], weights[3].shape[-1]
    vector = 2 * VECTOR if torch.is_grad_enabled() else VECTOR
    if rope is None:
        first = [(2 * hidden, length), (length, hidden)]
        fit = hidden % vector == 0
    else:
        channels = 2 * rope.shape[-1]
        first = [(3 * dim, dim), (dim, dim)]
        fit = channels in CHANNELS and dim == stacks.heads * channels and rope.shape[1] == length
    channel = [(2 * ffn, dim), (dim, ffn)]
    shapes = [*first, *channel] * (len(weights) // 4)
    if prior is not None:
        weights = [*weights, *prior.mean, *prior.std]
        shapes += channel * ((len(prior.mean) + len(prior.std)) // 2)
    return (
        fit
        and stacks.cycles > 0
        and dim % vector == ffn % vector == 0
        and all(w.dtype == torch.float32 for w in weights)
        and [tuple(w.shape) for w in weights] == shapes
    )


def transitions(
    h: Float[Tensor, "B L D"],
    low: Float[Tensor, "B L D"],
    e_x: Float[Tensor, "B L D"],
    noise: Float[Tensor, "T B L D"] | None,
    count: int,
    stacks: Stacks,
    prior: Heads,
    ahead: int = 0,
    more: int = 0,
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B L D"]]:
    """(h, l) after `count` transitions, of the first `ahead` rows after `more` of them more, in
    float32; `noise` for a prior with a deviation. For what is `wanted` and `fits`. No gradients."""
    out: tuple[Tensor, Tensor] = ops.transitions(
        h.float(), low.float(), e_x.float(), noise, [count, ahead, more], *stacks.arguments(),
        stacks.eps,
        list(prior.mean), list(prior.std), prior.offset, prior.floor, prior.exponential,
        products() == torch.bfloat16,
    )  # fmt: skip
    return out


def recursion(
    h: Float[Tensor, "B L D"],
    low: Float[Tensor, "B L D"],
    e_x: Float[Tensor, "B L D"],
    stacks: Stacks,
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B L D"]]:
    """(u, l), the deterministic half of a transition, in float32. For what is `wanted` and `fits`.
    Its gradient has none."""
    if not torch.is_grad_enabled():
        return transitions(h, low, e_x, None, 1, stacks, Heads())
    u, low, _, _ = ops.recursion(
        h.float(), low.float(), e_x.float(), *stacks.arguments(), stacks.eps,
        products() == torch.bfloat16,
    )  # fmt: skip
    return u, low


class _Call(ctypes.Structure):
    """TransitionCall of transition_call.h."""

    _fields_ = fields(
        "h low e_x noise table *stacks *prior h_out low_out kept scales"
        " h_grad low_grad h_back low_back e_x_back *weights_back",
        "batch length dim heads ffn mixing blocks hierarchical cycles transitions ahead more"
        " kept_numbers noise_transition noise_sequence",
        "eps offset floor",
        "exponential half threads",
    )


def _run(
    name: str,
    like: Tensor,
    stacks: list[Tensor],
    rope: Tensor | None,
    sizes: list[int],
    tensors: dict[str, Tensor | None],
    **others: Any,
) -> None:
    (batch, length, dim), (blocks, heads, cycles) = like.shape, sizes
    stacks = [w.contiguous() for w in stacks]
    tensors = {"table": None if rope is None else rope.float().contiguous(), **tensors}
    call(name, _Call(
        **{key: None if t is None else t.data_ptr() for key, t in tensors.items()},
        stacks=array(stacks), batch=batch, length=length, dim=dim, heads=heads,
        ffn=stacks[3].shape[1], mixing=stacks[1].shape[1] if rope is None else 0, blocks=blocks,
        hierarchical=len(stacks) > 4 * blocks, cycles=cycles,
        threads=torch.get_num_threads(), **others,
    ))  # fmt: skip


def _transitions(
    h: Tensor,
    low: Tensor,
    e_x: Tensor,
    noise: Tensor | None,
    counts: list[int],
    stacks: list[Tensor],
    rope: Tensor | None,
    sizes: list[int],
    eps: float,
    mean: list[Tensor],
    std: list[Tensor],
    offset: float,
    floor: float,
    exponential: bool,
    half: bool,
) -> tuple[Tensor, Tensor]:
    h, low, e_x = h.contiguous(), low.contiguous(), e_x.contiguous()
    # Noise is drawn sequence by sequence: each has its own of all transitions together.
    noise = None if noise is None else noise.float()
    if noise is not None and noise.stride()[2:] != h.stride()[1:]:
        noise = noise.contiguous()
    apart = (0, 0) if noise is None else noise.stride()[:2]
    out = h.new_empty(h.shape), h.new_empty(h.shape)
    prior = [w.contiguous() for part in (mean, std) for w in part]
    absent = [None, None]
    _run(
        "gram_transitions", h, stacks, rope, sizes,
        {"h": h, "low": low, "e_x": e_x, "noise": noise, "h_out": out[0], "low_out": out[1]},
        prior=array([*(prior[: len(mean)] or absent), *(prior[len(mean) :] or absent)]),
        transitions=counts[0], ahead=counts[1], more=counts[2], noise_transition=apart[0],
        noise_sequence=apart[1], eps=eps, offset=offset, floor=floor, exponential=exponential,
        half=half,
    )  # fmt: skip
    return out


def _recursion(
    h: Tensor,
    low: Tensor,
    e_x: Tensor,
    stacks: list[Tensor],
    rope: Tensor | None,
    sizes: list[int],
    eps: float,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, low, e_x = h.contiguous(), low.contiguous(), e_x.contiguous()
    out = _like_recursion(h, low, e_x, stacks, rope, sizes, eps, half)
    u, after, kept, scales = out
    _run(
        "gram_transitions", h, stacks, rope, sizes,
        {"h": h, "low": low, "e_x": e_x, "h_out": u, "low_out": after, "kept": kept,
         "scales": scales},
        prior=array([None] * 4), transitions=1, eps=eps, half=half, kept_numbers=kept.numel(),
    )  # fmt: skip
    return out


def _like_recursion(
    h: Tensor,
    low: Tensor,
    e_x: Tensor,
    stacks: list[Tensor],
    rope: Tensor | None,
    sizes: list[int],
    eps: float,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, length, dim), (blocks, _, cycles) = h.shape, sizes
    # As Kept of stack.h counts them, or the call is refused: x; then of each block what mixes
    # positions (and for attention its output), normed, gate and up, out.
    mixing = 2 * stacks[1].shape[1] * dim if rope is None else 4 * length * dim
    block = mixing + length * (2 * dim + 2 * stacks[3].shape[1])
    kept = h.new_empty(
        (cycles + 1) * batch * (length * dim + blocks * block),
        dtype=torch.bfloat16 if half else torch.float32,
    )
    scales = h.new_empty((cycles + 1) * blocks * 2 * batch * length)
    return h.new_empty(h.shape), h.new_empty(h.shape), kept, scales


def _recursion_backward(
    h_grad: Tensor,
    low_grad: Tensor,
    kept: Tensor,
    scales: Tensor,
    stacks: list[Tensor],
    rope: Tensor | None,
    sizes: list[int],
    half: bool,
) -> list[Tensor]:
    h_grad, low_grad = h_grad.contiguous(), low_grad.contiguous()
    kept, scales = kept.contiguous(), scales.contiguous()
    h, low, e_x = (torch.empty_like(h_grad) for _ in range(3))
    weights = room_for_gradients(stacks, h_grad)
    _run(
        "gram_recursion_backward", h_grad, stacks, rope, sizes,
        {"kept": kept, "scales": scales, "h_grad": h_grad, "low_grad": low_grad,
         "h_back": h, "low_back": low, "e_x_back": e_x},
        weights_back=array(weights), half=half, kept_numbers=kept.numel(),
    )  # fmt: skip
    if len(stacks) == 4 * sizes[0]:  # no f_L: l is passed by
        low.copy_(low_grad)
    return [h, low, e_x, *weights]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, stacks, rope, ctx.sizes, _, ctx.half = inputs
    kept, scales = output[2:]
    ctx.mark_non_differentiable(kept, scales)
    ctx.set_materialize_grads(False)  # there would be one as large as what is kept
    ctx.save_for_backward(kept, scales, rope, *stacks)
    ctx.shape = output[0].shape


def _back(ctx: Any, h_grad: Tensor | None, low_grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    kept, scales, rope, *stacks = ctx.saved_tensors
    h_grad = scales.new_zeros(ctx.shape) if h_grad is None else h_grad
    low_grad = scales.new_zeros(ctx.shape) if low_grad is None else low_grad
    h, low, e_x, *weights = ops.recursion_backward(
        h_grad, low_grad, kept, scales, stacks, rope, ctx.sizes, ctx.half
    )
    return h, low, e_x, weights, None, None, None, None


def _no_second(ctx: Any, grads: list[Tensor]) -> None:
    raise NotImplementedError("a fused recursion has no second derivative")


_STACKS = "Tensor[] stacks, Tensor? rope, int[] sizes"
operations.define(
    f"transitions(Tensor h, Tensor low, Tensor e_x, Tensor? noise, int[] counts, {_STACKS},"
    " float eps, Tensor[] mean, Tensor[] std, float offset, float floor, bool exponential,"
    " bool half) -> (Tensor, Tensor)"
)
operations.define(
    f"recursion(Tensor h, Tensor low, Tensor e_x, {_STACKS}, float eps, bool half)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
operations.define(
    f"recursion_backward(Tensor h_grad, Tensor low_grad, Tensor kept, Tensor scales, {_STACKS},"
    " bool half) -> Tensor[]"
)
operations.impl("transitions", _transitions, "CPU")
operations.impl("recursion", _recursion, "CPU")
operations.impl("recursion_backward", _recursion_backward, "CPU")
torch.library.register_fake(
    f"{NAMESPACE}::transitions",
    lambda h, *_: (h.new_empty(h.shape), h.new_empty(h.shape)),
    lib=operations,
)
torch.library.register_fake(f"{NAMESPACE}::recursion", _like_recursion, lib=operations)
torch.library.register_fake(
    f"{NAMESPACE}::recursion_backward",
    lambda h_grad, low_grad, kept, scales, stacks, *_: [
        *(h_grad.new_empty(h_grad.shape) for _ in range(3)),
        *(w.new_empty(w.shape) for w in stacks),
    ],
    lib=operations,
)
torch.library.register_autograd(f"{NAMESPACE}::recursion_backward", _no_second, lib=operations)
torch.library.register_autograd(
    f"{NAMESPACE}::recursion", _back, setup_context=_keep, lib=operations
)
