import torch
from torch import nn

from gram_core.model.recursion import Recursion, State


class Tagged(nn.Module):
    """Stands for a stack: an affine map that tells its order of use apart, and counts."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift, self.calls = scale, shift, 0

    def forward(self, a, b):
        self.calls += 1
        return self.scale * (a + 2 * b) + self.shift


def start() -> tuple[State, torch.Tensor]:
    """In float64, in which no recursion is fused: stacks are called."""
    h, low, e_x = torch.randn(3, 1, 2, 4, dtype=torch.float64).unbind(0)
    return State(h, low), e_x


def test_low_level_is_refined_k_times_with_the_old_h_and_then_h_once():
    f_h, f_l = Tagged(0.5, 1.0), Tagged(-0.3, 2.0)
    state, e_x = start()
    result = Recursion(f_h, f_l, cycles=3)(state, e_x)
    low = state.l
    low = -0.3 * (low + 2 * (state.h + e_x)) + 2.0
    low = -0.3 * (low + 2 * (state.h + e_x)) + 2.0
    low = -0.3 * (low + 2 * (state.h + e_x)) + 2.0
    torch.testing.assert_close(result.l, low)
    torch.testing.assert_close(result.h, 0.5 * (state.h + 2 * low) + 1.0)
    assert (f_l.calls, f_h.calls) == (3, 1)


def test_flat_applies_one_stack_k_plus_one_times_to_h_and_passes_l_through():
    f = Tagged(0.5, 1.0)
    state, e_x = start()
    result = Recursion(f, None, cycles=2)(state, e_x)
    h = state.h
    for _ in range(3):
        h = 0.5 * (h + 2 * e_x) + 1.0
    torch.testing.assert_close(result.h, h)
    assert result.l is state.l
    assert f.calls == 3


def test_a_detached_state_carries_no_gradient():
    state = State(torch.ones(1, 1, 1, requires_grad=True), torch.ones(1, 1, 1, requires_grad=True))
    cut = state.detach()
    assert not cut.h.requires_grad
    assert not cut.l.requires_grad
    assert torch.equal(cut.h, state.h)
