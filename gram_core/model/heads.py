"""What judges the high-level state h: the halt and value heads (Table 4).

The halt head (A.1) and the value head, the paper's latent process reward model (A.2), see one
vector of h, `GRAM.feature`, and never send a gradient into it.

Shapes: B batch, D width, V vocabulary.
"""

from jaxtyping import Float
from torch import Tensor, nn

HALT_BIAS = -5.0  # HRM and TRM: a fresh head says "go on"


class HaltHead(nn.Module):
    """Logits (q_halt, q_continue) of a feature of h; weights start at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(dim, 2)
        nn.init.zeros_(self.map.weight)
        nn.init.constant_(self.map.bias, HALT_BIAS)

    def forward(self, feature: Float[Tensor, "... D"]) -> Float[Tensor, "... 2"]:
        out: Tensor = self.map(feature.detach()).float()
        return out


class ValueHead(nn.Module):
    """The value v(z) of a feature of h: the expected accuracy of the trajectory's answer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(dim, 1)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, feature: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
        out: Tensor = self.map(feature.detach()).float().squeeze(-1)
        return out
