"""The training objective of one supervision step (paper, 2.2, Eq. 14; A.1 and A.2).

`supervise` runs the transitions of one supervision step for a batch of slots and returns the loss
with everything the loop needs. Every term stays per example until `Terms.mean`, the one reduction.

Reductions: cross-entropy is a mean over the target's tokens; the KL is summed over the latent
width and over all positions, prefix included, and divided by the number of content positions
(gap G12). `beta` is meant in these units.

Shapes: B slots, of which the first P follow the prior throughout; S content positions, L all
positions, D width, T transitions, N supervision steps.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from gram_core.config import Config, Fraction, NonNegativeFloat
from gram_core.model.gram import GRAM
from gram_core.model.latent import Gaussian, balanced_kl, kl
from gram_core.model.likelihood import LikelihoodKind, token_accuracy, token_cross_entropy
from gram_core.model.recursion import State
from gram_core.shape import Verifier


class ObjectiveConfig(Config, frozen=True, kw_only=True):
    """The loss. docs/model.md names the gap that each choice settles."""

    beta: NonNegativeFloat = 0.07
    balance: Fraction = 0.8
    rollout: Literal["prior", "posterior"] = "prior"
    kl: Literal["last", "every"] = "last"
    kl_reduction: Literal["sum", "mean"] = "sum"
    free_bits: NonNegativeFloat = 0.0
    cross_entropy: LikelihoodKind = "softmax"
    heads_on: Literal["prior", "posterior"] = "prior"
    halt_target: Literal["exact", "valid"] = "valid"
    halt_weight: NonNegativeFloat = 0.5
    value_target: Literal["token", "exact", "valid"] = "valid"
    value_weight: NonNegativeFloat = 0.5

    def __post_init__(self) -> None:
        if self.kl == "every" and self.rollout == "prior":
            raise ValueError(
                "kl: every charges the uncharged transitions, but with rollout: prior these have "
                "no divergence; use kl: last, or rollout: posterior"
            )


@dataclass(frozen=True)
class Batch:
    """The slots at the start of a supervision step; `last` where it ends the trajectory in any
    case, `may_halt` where the halt head may end it. `identity` are the vectors of the identifiers
    `puzzle`, where they learn by an optimiser of their own; `kl_share` the part of `beta` that
    counts at this iteration."""

    state: State
    inputs: UInt8[Tensor, "B S"]
    target: UInt8[Tensor, "B S"]
    puzzle: Int[Tensor, " B"]
    step: Int[Tensor, " B"]
    last: Bool[Tensor, " B"]
    may_halt: Bool[Tensor, " B"]
    trace: Float[Tensor, "B N D"]
    identity: Float[Tensor, "B D"] | None = None
    kl_share: Float[Tensor, ""] | float = 1.0


@dataclass(frozen=True)
class Supervision:
    """What one supervision step leaves behind; `ended` where the trajectory is over."""

    loss: Float[Tensor, ""]
    state: State
    trace: Float[Tensor, "B N D"]
    ended: Bool[Tensor, " B"]
    terms: Float[Tensor, "M 2"]


class Terms:
    """Named per-example terms; `mean` is the only place where examples are reduced."""

    names = (
        "reconstruction",
        "kl",
        "token_accuracy",
        "exact",
        "prior_reconstruction",
        "prior_token_accuracy",
        "prior_exact",
        "prior_valid",
        "halt_loss",
        "halt_accuracy",
        "value_loss",
    )

    def __init__(self, like: Tensor) -> None:
        self._zero = like.new_zeros(2, dtype=torch.float32)
        self._sums = dict.fromkeys(self.names, self._zero)

    def mean(
        self, name: str, term: Float[Tensor, " B"], where: Bool[Tensor, " B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean of a per-example term over the examples in `where` (0 if there are none),
        which it also records under `name`."""
        assert term.dim() == 1, f"{name} must still be one number an example, got {term.shape}"
        weight = torch.ones_like(term) if where is None else where.to(term.dtype)
        total, count = (term * weight).sum(), weight.sum()
        self._sums[name] = torch.stack([total, count]).detach().float()
        return total / count.clamp(min=1.0)

    def stacked(self) -> Float[Tensor, "M 2"]:
        """Sums and counts of all terms, in the order of `names`: one tensor to reduce and read."""
        return torch.stack([self._sums[name] for name in self.names])


def _position_kl(model: GRAM, config: ObjectiveConfig, q: Gaussian, p: Gaussian) -> Tensor:
    """The charged divergence per example, in the units of `beta`."""
    per_position = balanced_kl(q, p, config.balance)
    if config.kl_reduction == "mean":
        per_position = per_position / model.config.dim
    return per_position.clamp(min=config.free_bits).sum(-1) / model.shape.positions


def _transitions(
    model: GRAM,
    config: ObjectiveConfig,
    batch: Batch,
    noise: Float[Tensor, "T B L D"],
    prior_rows: int,
) -> tuple[State, Tensor, Tensor]:
    """All transitions of the supervision step: the final state, the charged KL and the plain KL
    of the posterior's rows (both per example)."""
    count = len(noise)
    # Gradients reach the last transition only; without deep supervision, the whole trajectory.
    window = 1 if model.config.deep_supervision else count
    guided = model.config.guidance != "none"
    follow = guided and config.rollout == "posterior"
    e_x = model.embed(batch.inputs, batch.puzzle, batch.identity)
    state = batch.state
    # What follows the prior and gets no gradient goes together: all rows as far as they do, and
    # those that follow it throughout to the end.
    together = 0 if follow else count - window
    with torch.no_grad():
        first, state = model.staggered_transitions(state, e_x, noise, prior_rows, count, together)
    own = slice(prior_rows, None)
    e_x, noise = e_x[own], noise[:, own]
    e_y = model.embed_answer(batch.target[own]) if guided else e_x
    charged = plain = e_x.new_zeros(len(e_x), dtype=torch.float32)
    for t in range(together, count):
        final = t == count - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and t >= count - window):
            if not guided or not (follow or final):
                state = model.prior_transition(state, e_x, noise[t])
                continue
            proposal: State = model.recursion(state, e_x)
        u = proposal.h
        q = model.posterior(u, e_y)
        assert q is not None
        state = State(u + q.sample(noise[t]), proposal.l)
        if final or config.kl == "every":
            p = model.prior(u)
            assert p is not None
            charged = charged + _position_kl(model, config, q, p)
            with torch.no_grad():
                plain = plain + kl(q, p).sum(-1) / model.shape.positions
        if t < count - window:
            state = state.detach()
    if prior_rows:
        state = State(torch.cat([first.h, state.h]), torch.cat([first.l, state.l]))
    return state, charged, plain


def _head_losses(
    model: GRAM,
    config: ObjectiveConfig,
    terms: Terms,
    batch: Batch,
    rows: slice,
    trace: Tensor,
    quality: dict[str, Tensor],
    ends: Tensor,
) -> Tensor:
    """Halt and value losses on the rows that the heads learn from. They see detached features."""
    step, size = batch.step[rows], trace.shape[1]
    q_trace = model.halt(trace)
    q_now = q_trace.gather(1, step.long()[:, None, None].expand(-1, 1, 2))[:, 0]
    right = quality[config.halt_target]
    halt = F.binary_cross_entropy_with_logits(q_now[:, 0], right, reduction="none")
    guess = ((q_now[:, 0] >= 0) == (right > 0.5)).float()
    loss = config.halt_weight * terms.mean("halt_loss", halt)
    terms.mean("halt_accuracy", guess)

    steps = torch.arange(size, device=trace.device)
    seen = (steps <= step[:, None]).float()
    r = quality[config.value_target]
    value = ((model.value(trace) - r[:, None]).square() * seen).sum(1) / seen.sum(1)
    # A value is learned when its trajectory ends: the sum over those that do, divided by the number
    # that ends on average. A mean over those that end would weigh a slot by how many others of its
    # batch end too, and so by which worker holds it.
    ending = ends.float()
    usual = len(ending) / size
    terms.mean("value_loss", value, ends)
    loss = loss + config.value_weight * (value * ending).sum() / usual
    if model.config.halting == "q_learning" and size > 1:
        # q_continue(s) learns max(q_halt, q_continue) of step s + 1, known once the slot ends; of
        # the last step q_halt alone, as HRM: after it nothing goes on, and nothing else would tie
        # what the head says of going on to what comes of it.
        ahead = torch.sigmoid(q_trace[:, 1:].detach())
        best_next = torch.where(steps[1:] < size - 1, ahead.amax(-1), ahead[..., 0])
        has_next = (steps[:-1] < step[:, None]).float()
        bce = F.binary_cross_entropy_with_logits(q_trace[:, :-1, 1], best_next, reduction="none")
        per_example = (bce * has_next).sum(1) / has_next.sum(1).clamp(min=1.0)
        loss = loss + config.halt_weight * (per_example * ending).sum() / usual
    whole: Tensor = loss
    return whole


def supervise(
    model: GRAM,
    config: ObjectiveConfig,
    verify: Verifier | None,
    batch: Batch,
    noise: Float[Tensor, "T B L D"],
    prior_rows: int,
) -> Supervision:
    """One supervision step of all slots: Eq. 14 for the rows that follow the posterior, and the
    halt and value losses for the rows that `heads_on` names.

    The first `prior_rows` slots follow the prior in every transition, as at inference; they send
    nothing into the recursion. Without guidance every slot is both kinds at once. Where there is no
    rule to `verify` by, valid means exact.
    """
    twin = model.config.guidance == "none"
    charged_rows = slice(None) if twin else slice(prior_rows, None)
    state, charged, plain = _transitions(model, config, batch, noise, prior_rows)
    logits = model.decode(state.h)
    terms = Terms(logits)
    nll = token_cross_entropy(logits, batch.target, config.cross_entropy)
    loss = terms.mean("reconstruction", nll[charged_rows])
    if not twin:
        terms.mean("kl", plain)
        loss = loss + batch.kl_share * config.beta * (charged.sum() / len(charged))

    with torch.no_grad():
        prediction = logits.argmax(-1).to(torch.uint8)
        exact = (prediction == batch.target).logical_or(batch.target == 0).all(-1).float()
        quality = {
            "token": token_accuracy(prediction, batch.target),
            "exact": exact,
            "valid": exact if verify is None else verify(batch.inputs, prediction).float(),
        }
        feature = model.feature(state.h)
        here = torch.arange(batch.trace.shape[1], device=feature.device) == batch.step[:, None]
        trace = torch.where(here[..., None], feature[:, None], batch.trace)
        ended = batch.last | (batch.may_halt & model.wants_halt(model.halt(feature)))
        terms.mean("token_accuracy", quality["token"][charged_rows], ended[charged_rows])
        terms.mean("exact", quality["exact"][charged_rows], ended[charged_rows])
        prior = slice(None) if twin else slice(0, prior_rows)
        if twin or prior_rows:
            over = ended[prior]
            terms.mean("prior_reconstruction", nll[prior].detach(), over)
            terms.mean("prior_token_accuracy", quality["token"][prior], over)
            terms.mean("prior_exact", quality["exact"][prior], over)
            terms.mean("prior_valid", quality["valid"][prior], over)

    taught = prior if config.heads_on == "prior" else charged_rows
    if twin or config.heads_on == "posterior" or prior_rows:
        rows_quality = {name: value[taught] for name, value in quality.items()}
        loss = loss + _head_losses(
            model, config, terms, batch, taught, trace[taught], rows_quality, ended[taught]
        )
    # States may leave autocast in bfloat16; the slots hold float32 ones.
    left = State(state.h.detach().float(), state.l.detach().float())
    return Supervision(loss, left, trace, ended, terms.stacked())
