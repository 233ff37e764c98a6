"""GRAM: the recursion with learned stochastic guidance, and its deterministic twin.

Wires encoder, recursion, prior, posterior, decoder and heads. Everything here is one transition
or less; how transitions are chained, charged and trained is `gram_core.train`, how they are
sampled is `gram_core.sample`.

Shapes: B batch, S tokens of an input and of an answer, M content positions (S; patches, for
images), P prefix positions, L = P + M, D width, V vocabulary.
"""

from typing import Annotated, Literal

import msgspec
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from gram_core.config import Config, NonNegativeInt, PositiveFloat, PositiveInt
from gram_core.fused import transition as fused
from gram_core.fused.heads import Heads
from gram_core.fused.library import cut_up, wanted
from gram_core.model.encoders import Identifiers, decoder, input_encoder, target_encoder
from gram_core.model.heads import HaltHead, ValueHead
from gram_core.model.latent import Gaussian, GaussianHead, Guidance
from gram_core.model.layers import Stack
from gram_core.model.recursion import Recursion, State
from gram_core.shape import TokenShape


class ModelConfig(Config, frozen=True, kw_only=True):
    """The architecture. Defaults are the paper's (Table 4, B.1); where it is silent or says two
    things, docs/model.md gives the gap's number and the choice."""

    dim: PositiveInt = 512
    heads: PositiveInt = 8
    ffn: PositiveInt = 512
    layers: PositiveInt = 2
    core: Literal["attention", "mixer"] = "attention"
    hierarchical: bool = True
    K: PositiveInt = 4
    T: PositiveInt = 3
    N_sup: PositiveInt = 16
    deep_supervision: bool = True
    guidance: Guidance = "full"
    posterior: Literal["sum", "concat"] = "sum"
    sigma: Literal["softplus", "exp"] = "softplus"
    sigma_init: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.1
    sigma_floor: PositiveFloat = 1e-3
    decoder: Literal["linear", "swiglu"] = "linear"
    prefix_tokens: NonNegativeInt = 16
    z0: Literal["per_position", "broadcast"] = "per_position"
    halting: Literal["halt_only", "q_learning"] = "halt_only"
    head_input: Literal["first", "mean"] = "first"
    rope_base: PositiveFloat = 10000.0

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim {self.dim} must be a multiple of 2 * heads = {2 * self.heads} (rotary pairs)"
            )
        if self.sigma_init <= self.sigma_floor:
            raise ValueError(
                f"sigma_init {self.sigma_init} must be above sigma_floor {self.sigma_floor}"
            )
        if self.halting == "q_learning" and (self.N_sup == 1 or not self.deep_supervision):
            raise ValueError(
                "halting: q_learning learns from the next supervision step, and with N_sup 1 or "
                "without deep_supervision there is none; use halt_only"
            )

    @property
    def stochastic(self) -> bool:
        """Whether trajectories of one puzzle can differ."""
        return self.guidance in ("full", "stochastic_only")


class GRAM(nn.Module):
    """The generative recursive reasoning model (paper, section 2).

    With `guidance: none` it has no prior and no posterior and is the deterministic, TRM-like twin.
    """

    z0_h: Tensor
    z0_l: Tensor

    def __init__(self, config: ModelConfig, shape: TokenShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        dim, length = config.dim, config.prefix_tokens + shape.positions

        def stack() -> Stack:
            return Stack(
                config.core,
                layers=config.layers,
                dim=dim,
                heads=config.heads,
                ffn=config.ffn,
                length=length,
                rope_base=config.rope_base,
            )

        def head(fan_in: int) -> GaussianHead | None:
            if config.guidance == "none":
                return None
            return GaussianHead(
                fan_in,
                dim,
                config.ffn,
                guidance=config.guidance,
                sigma=config.sigma,
                sigma_init=config.sigma_init,
                sigma_floor=config.sigma_floor,
                fuse=config.posterior == "sum",  # of 2 D inputs there is no fused one
            )

        self.embed_input = input_encoder(shape, dim)
        self.puzzle = Identifiers(shape.puzzles, dim) if config.prefix_tokens else None
        self.recursion = Recursion(stack(), stack() if config.hierarchical else None, config.K)
        self.prior_head = head(dim)
        self.posterior_head = head(2 * dim if config.posterior == "concat" else dim)
        guided = self.posterior_head is not None
        self.embed_target = target_encoder(shape, dim) if guided else None
        self.decoder = decoder(config.decoder, shape, dim, config.ffn)
        self.halt = HaltHead(dim)
        self.value = ValueHead(dim)
        # z_0 ~ N(0, I), drawn once, kept in the checkpoint, never trained.
        z0_length = length if config.z0 == "per_position" else 1
        self.register_buffer("z0_h", torch.randn(z0_length, dim))
        self.register_buffer("z0_l", torch.randn(z0_length, dim))

    @property
    def length(self) -> int:
        """L: prefix and content positions."""
        return self.config.prefix_tokens + self.shape.positions

    def initial_state(self, batch: int) -> State:
        """z_0, the same for every trajectory."""
        size = (batch, self.length, self.config.dim)
        return State(self.z0_h.expand(size).contiguous(), self.z0_l.expand(size).contiguous())

    def embed(
        self,
        inputs: UInt8[Tensor, "B S"],
        puzzle: Int[Tensor, " B"] | None = None,
        identity: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """e_x: the encoded input behind the puzzle's prefix.

        The prefix is the learned vector of the identifier `puzzle` (0 by default), or `identity`
        itself, followed by zeros (paper, B.1 and C.2.1).
        """
        tokens: Tensor = self.embed_input(inputs.int())
        if self.puzzle is None:
            return tokens
        if identity is None:
            index = inputs.new_zeros(len(inputs), dtype=torch.int32) if puzzle is None else puzzle
            identity = self.puzzle(index)
        prefix = tokens.new_zeros(len(inputs), self.config.prefix_tokens - 1, self.config.dim)
        return torch.cat([identity[:, None], prefix, tokens], dim=1)

    def embed_answer(self, target: UInt8[Tensor, "B S"]) -> Float[Tensor, "B L D"]:
        """e_y, the posterior's view of the target; zero on the prefix. Raises `ValueError` for a
        model without guidance."""
        if self.embed_target is None:
            raise ValueError("a model with guidance 'none' has no posterior to embed a target for")
        tokens = self.embed_target(target.int())
        return torch.nn.functional.pad(tokens, (0, 0, self.config.prefix_tokens, 0))

    def prior(self, u: Float[Tensor, "B L D"]) -> Gaussian | None:
        """p(eps | u); None without guidance."""
        return None if self.prior_head is None else self.prior_head(u)

    def posterior(self, u: Float[Tensor, "B L D"], e_y: Float[Tensor, "B L D"]) -> Gaussian | None:
        """q(eps | u, y); None without guidance."""
        if self.posterior_head is None:
            return None
        concat = self.config.posterior == "concat"
        joint = torch.cat([u, e_y.to(u.dtype)], dim=-1) if concat else u + e_y
        gaussian: Gaussian = self.posterior_head(joint)
        return gaussian

    def prior_transition(
        self,
        state: State,
        e_x: Float[Tensor, "B L D"],
        noise: Float[Tensor, "B L D"] | None,
    ) -> State:
        """One whole transition as at inference: h = u + eps with eps ~ p(. | u). Raises
        `ValueError` where the prior is no point mass and `noise` is None."""
        proposal: State = self.recursion(state, e_x)
        prior = self.prior(proposal.h)
        if prior is None:
            return proposal
        return State(proposal.h + prior.sample(noise), proposal.l)

    def prior_transitions(
        self,
        state: State,
        e_x: Float[Tensor, "B L D"],
        noise: Float[Tensor, "T B L D"] | None,
        count: int,
    ) -> State:
        """The first `count` of T transitions, one after the other. Raises as `prior_transition`."""
        _, whole = self.staggered_transitions(state, e_x, noise, 0, count, count)
        return whole

    def staggered_transitions(
        self,
        state: State,
        e_x: Float[Tensor, "B L D"],
        noise: Float[Tensor, "T B L D"] | None,
        ahead: int,
        further: int,
        count: int,
    ) -> tuple[State, State]:
        """The first `ahead` rows after the first `further` of T transitions, and the other rows
        after the first `count`. Raises as `prior_transition`, and `ValueError` for more rows than
        there are, or that go less far than the others."""
        if not 0 <= ahead <= len(state.h) or (ahead and further < count):
            raise ValueError(
                f"{ahead} of {len(state.h)} rows cannot go {further} transitions where the others "
                f"go {count}; ahead is at most the number of rows, further at least count"
            )
        drawn = (
            not self.config.stochastic
            if noise is None
            else len(noise) >= max(count, further if ahead else 0)
            and noise.shape[1:] == state.h.shape
        )
        moves = count or (ahead and further)
        fusing = moves and drawn and not torch.is_grad_enabled()
        if fusing and wanted(state.h, state.l, e_x) and not cut_up(self):
            stacks = self.recursion.stacks()
            prior = Heads() if self.prior_head is None else self.prior_head.fused()
            if fused.fits(state.h, stacks, prior):
                state = State(*fused.transitions(
                    state.h, state.l, e_x, noise, count, stacks, prior, ahead, further - count
                ))  # fmt: skip
                return state.split(ahead)
        for t in range(count):
            state = self.prior_transition(state, e_x, None if noise is None else noise[t])
        first, rest = state.split(ahead)
        for t in range(count, further if ahead else count):
            own = None if noise is None else noise[t, :ahead]
            first = self.prior_transition(first, e_x[:ahead], own)
        return first, rest

    def decode(self, h: Float[Tensor, "B L D"]) -> Float[Tensor, "B S V"]:
        """Token logits."""
        out: Tensor = self.decoder(h[:, self.config.prefix_tokens :]).float()
        return out

    def wants_halt(self, q: Float[Tensor, "B 2"], threshold: float = 0.5) -> Bool[Tensor, " B"]:
        """The halting rule of A.1: sigmoid(q_halt) > threshold; with Q-learning,
        sigmoid(q_halt - q_continue) > threshold, which at 0.5 is q_halt > q_continue."""
        margin = q[:, 0] if self.config.halting == "halt_only" else q[:, 0] - q[:, 1]
        return torch.sigmoid(margin) > threshold

    def feature(self, h: Float[Tensor, "B L D"]) -> Float[Tensor, "B D"]:
        """What the halt and value heads see, cut from the graph: the first position of h
        (Table 4), or the mean over positions."""
        seen = h[:, 0] if self.config.head_input == "first" else h.mean(1)
        return seen.detach().float()
