"""The stochastic guidance: diagonal Gaussians, their heads and their divergences (paper, 2.1-2.2).

A transition ends with h = u + eps. The prior proposes eps from u alone, the posterior from u and
the target. `Gaussian` is the value that both heads return; it knows when it is degenerate, which
is how the ablations `stochastic_only` (mean zero) and `guide_only` (no noise) are expressed.

Shapes: B batch, L positions (prefix included), D width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gram_core.fused import heads
from gram_core.fused.library import cut_up, wanted
from gram_core.model.layers import SwiGLU

Guidance = Literal["full", "stochastic_only", "guide_only", "none"]


@dataclass(frozen=True)
class Gaussian:
    """A diagonal Gaussian over the guidance eps; `std` None means a point mass at `mean`."""

    mean: Float[Tensor, "B L D"]
    std: Float[Tensor, "B L D"] | None

    def sample(self, noise: Float[Tensor, "B L D"] | None) -> Float[Tensor, "B L D"]:
        """mean + std * noise: differentiable in both parameters. A point mass needs no noise;
        raises `ValueError` where there is none for another."""
        if self.std is None:
            return self.mean
        if noise is None:
            raise ValueError("a model with stochastic guidance needs noise for its transitions")
        return self.mean + self.std * noise

    def detach(self) -> "Gaussian":
        """The same distribution with gradients stopped."""
        return Gaussian(self.mean.detach(), None if self.std is None else self.std.detach())


def kl(q: Gaussian, p: Gaussian) -> Float[Tensor, "B L"]:
    """KL(q || p) in nats, summed over D, per position.

    Two point masses have no finite divergence; for them this returns that of unit-variance
    Gaussians at the same means, half the squared distance, which is what the ablation
    `guide_only` trains its prior with.
    """
    distance = q.mean.float() - p.mean.float()
    if q.std is None or p.std is None:
        return 0.5 * distance.square().sum(-1)
    # By the ratio of the deviations: where both are equal, as in a fresh model, the gradient is
    # zero to the bit. Of what rounding leaves in its place AdamW would make whole steps.
    q_std, p_std = q.std.float(), p.std.float()
    ratio = q_std / p_std
    if not ratio.is_cpu:  # There compiled divisions of equals need not give one.
        ratio = torch.where(q_std == p_std, 1.0, ratio)
    terms = 0.5 * (ratio.square() + (distance / p_std).square()) - 0.5 - ratio.log()
    return terms.sum(-1)


def balanced_kl(q: Gaussian, p: Gaussian, balance: float) -> Float[Tensor, "B L"]:
    """balance * KL(sg(q) || p) + (1 - balance) * KL(q || sg(p)) (B.2, after DreamerV2).

    Equal in value to `kl(q, p)`; only the gradients are weighted. At 0.8 the prior moves
    towards the posterior four times as strongly as the other way round.
    """
    return balance * kl(q.detach(), p) + (1.0 - balance) * kl(q, p.detach())


class GaussianHead(nn.Module):
    """One SwiGLU for the mean, one for the standard deviation (Table 4).

    At initialisation the mean is zero and the deviation `sigma_init` everywhere, so that a fresh
    model is the deterministic one with a little noise. `guidance` decides which of the two exist.
    With `fuse` both are one fused operation where that can be; a posterior and its prior say the
    same, or rounding would tell them apart where they are equal.
    """

    def __init__(
        self,
        fan_in: int,
        dim: int,
        hidden: int,
        *,
        guidance: Guidance,
        sigma: Literal["softplus", "exp"],
        sigma_init: float,
        sigma_floor: float,
        fuse: bool = True,
    ) -> None:
        super().__init__()
        self.fuse = fuse
        self.sigma = sigma
        self.floor = sigma_floor
        excess = sigma_init - sigma_floor
        self.offset = math.log(math.expm1(excess)) if sigma == "softplus" else math.log(excess)
        self.mean = SwiGLU(fan_in, hidden, dim) if guidance in ("full", "guide_only") else None
        self.raw_std = (
            SwiGLU(fan_in, hidden, dim) if guidance in ("full", "stochastic_only") else None
        )
        for part in (self.mean, self.raw_std):
            if part is not None:
                nn.init.zeros_(part.down.weight)

    def fused(self) -> heads.Heads:
        """What fused operations read of this."""
        mean, std = (() if p is None else p.weights() for p in (self.mean, self.raw_std))
        return heads.Heads(mean, std, self.offset, self.floor, self.sigma == "exp")

    def forward(self, x: Float[Tensor, "B L I"]) -> Gaussian:
        mean, std = self._mean_and_std(x)
        if mean is None:
            assert std is not None, "a head without mean and deviation is guidance 'none'"
            mean = torch.zeros_like(std)
        return Gaussian(mean, std)

    def _mean_and_std(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.fuse and wanted(x) and not cut_up(self):
            fused = self.fused()
            if heads.fits(x, fused):
                return heads.gaussian(x, fused)
        mean = None if self.mean is None else self.mean(x)
        if self.raw_std is None:
            return mean, None
        raw = self.raw_std(x).float() + self.offset
        return mean, self.floor + (F.softplus(raw) if self.sigma == "softplus" else raw.exp())
