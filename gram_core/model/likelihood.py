"""What logits say of a target: -log p(y | z) per example, and the share of tokens that are right.

Shapes: B batch, S content positions, V vocabulary. Token 0 is padding and never scored.
"""

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

LikelihoodKind = Literal["softmax", "stablemax"]


def token_cross_entropy(
    logits: Float[Tensor, "B S V"], target: UInt8[Tensor, "B S"], kind: LikelihoodKind
) -> Float[Tensor, " B"]:
    """-log p(y | .) in nats a token, the mean over the target's tokens other than 0 (padding).

    `stablemax` replaces exp(x) by x + 1 above zero and 1 / (1 - x) below, as in TRM and HRM; it
    is a likelihood too, of another normalisation (gap G8).
    """
    labels = target.long()
    if kind == "softmax":
        log_p = torch.log_softmax(logits, dim=-1)
    else:
        score = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
        log_p = score.log() - score.sum(-1, keepdim=True).log()
    nll = -log_p.gather(-1, labels[..., None]).squeeze(-1)
    scored = (labels != 0).to(nll.dtype)
    return (nll * scored).sum(-1) / scored.sum(-1).clamp(min=1.0)


def token_accuracy(
    prediction: UInt8[Tensor, "B S"], target: UInt8[Tensor, "B S"]
) -> Float[Tensor, " B"]:
    """Share of the target's tokens, padding left out, that are right."""
    scored = (target != 0).float()
    right = (prediction == target).float() * scored
    return right.sum(-1) / scored.sum(-1).clamp(min=1.0)
