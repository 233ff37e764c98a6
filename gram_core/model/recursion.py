"""The recursion: the state, and the deterministic half of a transition (paper, 2.1 and B.1).

One transition refines the low-level state K times, l = f_L(l, h + e_x), and then proposes the
high-level one, u = f_H(h, l). The stochastic half, h = u + eps, belongs to `gram_core.model.gram`.

Shapes: B batch, L positions (prefix included), D width.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from gram_core.fused import transition as fused
from gram_core.fused.library import cut_up, wanted
from gram_core.model.layers import NORM_EPS, Stack


@dataclass(frozen=True)
class State:
    """z = (h, l), the latent state that is carried from transition to transition."""

    h: Float[Tensor, "B L D"]
    l: Float[Tensor, "B L D"]  # noqa: E741 - the paper's name

    def detach(self) -> "State":
        """The same state cut from the graph: gradients never cross a supervision step."""
        return State(self.h.detach(), self.l.detach())

    def split(self, rows: int) -> tuple["State", "State"]:
        """The first `rows` rows, and the others."""
        first = State(self.h[:rows], self.l[:rows])
        return first, State(self.h[rows:], self.l[rows:]) if rows else self


class Recursion(nn.Module):
    """K applications of f_L and one of f_H; or, flat, K + 1 applications of a single f to h.

    The flat variant is the paper's ablation without hierarchy (Table 3a): it has no low-level
    state and passes `l` through untouched.
    """

    def __init__(self, f_h: Stack, f_l: Stack | None, cycles: int) -> None:
        super().__init__()
        self.f_h = f_h
        self.f_l = f_l
        self.cycles = cycles

    def stacks(self) -> fused.Stacks:
        """What a fused operation reads of this."""
        weights = self.f_h.weights() + ([] if self.f_l is None else self.f_l.weights())
        f_h = self.f_h
        return fused.Stacks(weights, f_h.rope(), len(f_h.blocks), f_h.heads, self.cycles, NORM_EPS)

    def forward(self, state: State, e_x: Float[Tensor, "B L D"]) -> State:
        """The state (u, l): `h` of the result is the proposal u, before guidance."""
        h, low = state.h, state.l
        # Weights are looked at last: those that ZeRO's third stage has cut up it fetches at a look.
        if wanted(h, low, e_x) and not cut_up(self):
            stacks = self.stacks()
            if fused.fits(h, stacks):
                return State(*fused.recursion(h, low, e_x, stacks))
        if self.f_l is None:
            for _ in range(self.cycles + 1):
                h = self.f_h(h, e_x)
            return State(h, low)
        context = h + e_x
        for _ in range(self.cycles):
            low = self.f_l(low, context)
        return State(self.f_h(h, low), low)
