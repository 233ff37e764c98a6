"""The blocks that every stack is made of: attention, SwiGLU, RMSNorm and RoPE (paper, B.1).

Post-norm blocks without biases and with a parameter-free RMSNorm, so that every stack ends
normalised (an un-normalised u lets the KL diverge). This module knows neither the recursion nor
the latent variables.

Shapes: B batch, L positions, D width, Q = 3 D, H heads, C = D / H, E = C / 2, F hidden width.
"""

import math
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gram_core.fused import attention

NORM_EPS = 1e-5


def lecun_normal_(weight: Tensor, fan_in: int) -> Tensor:
    """Fill in place with a normal of standard deviation 1/sqrt(fan_in), truncated at two of its
    own standard deviations and rescaled so that the deviation is exact after truncation."""
    truncated_std = 0.87962566103423978  # of a unit normal cut at +-2
    std = 1.0 / math.sqrt(fan_in)
    with torch.no_grad():
        nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0)
        return weight.mul_(std / truncated_std)


def linear(fan_in: int, fan_out: int, bias: bool = False) -> nn.Linear:
    """A linear map with LeCun truncated-normal weights and, if any, a zero bias."""
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    lecun_normal_(layer.weight, fan_in)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def rms_norm(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """Parameter-free RMSNorm over the last axis, computed in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    return (wide * scale).to(x.dtype)


def rope_table(length: int, channels: int, base: float) -> Float[Tensor, "2 L E"]:
    """Cosines and sines of rotary embedding for positions 0..length-1."""
    frequency = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Float[Tensor, "B H L C"], table: Float[Tensor, "2 L E"]) -> Float[Tensor, "B H L C"]:
    """Rotary embedding of queries or keys (half-split convention)."""
    cos, sin = table.to(x.dtype)
    # Half by half: of a roll, or a flip, the compiler does not vectorise the backward.
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(
    q: Float[Tensor, "B H L C"], k: Float[Tensor, "B H L C"], v: Float[Tensor, "B H L C"]
) -> Float[Tensor, "B H L C"]:
    """Full softmax attention.

    On a CPU the two products are written out: at this project's lengths the fused kernel costs
    five times as much in bfloat16 and ties in float32.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x), gate and up in one product."""

    def __init__(self, fan_in: int, hidden: int, fan_out: int) -> None:
        super().__init__()
        self.gate_up = linear(fan_in, 2 * hidden)
        self.down = linear(hidden, fan_out)

    def weights(self) -> list[Tensor]:
        """Of both products."""
        return [self.gate_up.weight, self.down.weight]

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; queries, keys, values in one product."""

    rope: Tensor

    def __init__(self, dim: int, heads: int, length: int, rope_base: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(dim, 3 * dim)
        self.out = linear(dim, dim)
        self.register_buffer("rope", rope_table(length, dim // heads, rope_base), persistent=False)

    def weights(self) -> list[Tensor]:
        """Of both products."""
        return [self.qkv.weight, self.out.weight]

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        qkv: Tensor = self.qkv(x)
        out: Tensor = self.out(self.mixed(qkv))
        return out

    def mixed(self, qkv: Float[Tensor, "B L Q"]) -> Float[Tensor, "B L D"]:
        """What the heads give, side by side."""
        if attention.fits(qkv, self.rope, self.heads):
            return attention.attend(qkv, self.rope, self.heads)
        parts = qkv.chunk(3, dim=-1)
        split = (*qkv.shape[:2], self.heads, -1)
        q, k, v = (part.view(split).transpose(1, 2) for part in parts)
        heads = attend(rotate(q, self.rope), rotate(k, self.rope), v)
        return heads.transpose(1, 2).flatten(2)


class SequenceMixer(nn.Module):
    """SwiGLU along the positions instead of attention: the [SwiGLU + SwiGLU] core that the paper
    takes from TRM for Sudoku (B.1)."""

    def __init__(self, length: int, hidden: int) -> None:
        super().__init__()
        self.mix = SwiGLU(length, hidden, length)

    def weights(self) -> list[Tensor]:
        """Of both products."""
        return self.mix.weights()

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        # Laid out anew each time: for a transposed tensor without gradients torch multiplies row by
        # row, and copies the weights for each.
        out: Tensor = self.mix(x.transpose(1, 2).contiguous())
        return out.transpose(1, 2).contiguous()


class Block(nn.Module):
    """One layer: token mixing, then a SwiGLU over channels, each post-normalised."""

    def __init__(self, mixing: Attention | SequenceMixer, channels: SwiGLU) -> None:
        super().__init__()
        self.mixing = mixing
        self.channels = channels

    def weights(self) -> list[Tensor]:
        """Of all four products."""
        return [*self.mixing.weights(), *self.channels.weights()]

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        for part in (self.mixing, self.channels):
            y: Tensor = part(x)
            # In the products' number format, which halves what lies between them.
            x = rms_norm(x + y).to(y.dtype)
        return x


class Stack(nn.Module):
    """f(a, b) = blocks(a + b): input injection by addition, as in HRM and TRM."""

    def __init__(
        self,
        core: Literal["attention", "mixer"],
        *,
        layers: int,
        dim: int,
        heads: int,
        ffn: int,
        length: int,
        rope_base: float,
    ) -> None:
        super().__init__()

        def mixing() -> Attention | SequenceMixer:
            if core == "mixer":
                return SequenceMixer(length, ffn)
            return Attention(dim, heads, length, rope_base)

        self.heads = heads
        self.blocks = nn.ModuleList(Block(mixing(), SwiGLU(dim, ffn, dim)) for _ in range(layers))

    def weights(self) -> list[Tensor]:
        """Of all products, four a block."""
        return [w for block in self.blocks for w in cast(Block, block).weights()]

    def rope(self) -> Tensor | None:
        """Attention's table of positions."""
        mixing = cast(Block, self.blocks[0]).mixing
        return mixing.rope if isinstance(mixing, Attention) else None

    def forward(
        self, a: Float[Tensor, "B L D"], b: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        x = a + b
        for block in self.blocks:
            x = block(x)
        return x
