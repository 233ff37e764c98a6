"""The full bound on log p(y | x) and the surrogate that training maximises (Eq. 13 and 14, A.3).

Both with the plain KL, neither balanced nor weighted. Transitions that follow the prior are part
of a variational family that equals the prior there, so they add nothing to the divergence.

Shapes: B pairs, S content positions, L all positions, D width; M transitions in all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gram_core.model.gram import GRAM
from gram_core.model.latent import kl
from gram_core.model.likelihood import LikelihoodKind, token_cross_entropy
from gram_core.model.recursion import State


@dataclass(frozen=True)
class Bound:
    """Per pair, in nats: `reconstruction` is -log p(y | z) of the last supervision step, summed
    over the answer's tokens, and `divergence` the KL of all M transitions, so that
    `full` <= log p(y | x) in expectation. `surrogate` is the mean over supervision steps of
    -reconstruction minus the KL of that step's last transition."""

    reconstruction: Float[Tensor, " B"]
    divergence: Float[Tensor, " B"]
    surrogate: Float[Tensor, " B"]

    @property
    def full(self) -> Float[Tensor, " B"]:
        """Eq. 13: final reconstruction minus the divergence of the whole trajectory."""
        return -self.reconstruction - self.divergence


@torch.inference_mode()
def bound(
    model: GRAM,
    inputs: UInt8[Tensor, "B S"],
    target: UInt8[Tensor, "B S"],
    noise: Callable[[int], Float[Tensor, "T B L D"]],
    *,
    rollout: Literal["prior", "posterior"],
    likelihood: LikelihoodKind,
    puzzle: Int[Tensor, " B"] | None = None,
) -> Bound:
    """One sample of the bounds for each pair; each transition's KL is exact given its state.

    `noise(n)` is the standard normal noise of supervision step n, T transitions of it (all
    T * N_sup at once without deep supervision). `rollout` says what the transitions before the
    last of a supervision step follow, as in training; `puzzle` are learned identifiers. Raises
    `ValueError` for guidance with a point mass (`none`, `guide_only`), which has no such bound.
    """
    config = model.config
    if config.guidance not in ("full", "stochastic_only"):
        raise ValueError(f"guidance {config.guidance!r} has no density to bound a likelihood with")
    supervised = config.N_sup if config.deep_supervision else 1
    tokens = (target != 0).sum(-1)
    e_x, e_y = model.embed(inputs, puzzle), model.embed_answer(target)
    state = model.initial_state(len(inputs))
    divergence = e_x.new_zeros(len(inputs))
    surrogate = torch.zeros_like(divergence)
    nll = torch.zeros_like(divergence)
    for n in range(supervised):
        draws = noise(n)
        last = torch.zeros_like(divergence)
        for t, draw in enumerate(draws):
            if rollout == "prior" and t < len(draws) - 1:
                state = model.prior_transition(state, e_x, draw)
                continue
            proposal: State = model.recursion(state, e_x)
            p, q = model.prior(proposal.h), model.posterior(proposal.h, e_y)
            assert p is not None and q is not None
            last = kl(q, p).sum(-1)
            divergence = divergence + last
            state = State(proposal.h + q.sample(draw), proposal.l)
        nll = token_cross_entropy(model.decode(state.h), target, likelihood) * tokens
        surrogate = surrogate - (nll + last) / supervised
    return Bound(nll, divergence, surrogate)
