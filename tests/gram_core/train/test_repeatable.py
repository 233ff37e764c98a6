"""Compiled training on two threads gives the same bits each time."""

import itertools

import pytest
import torch
from torch import nn

from gram_core.compile import compiled
from gram_core.model.encoders import Identifiers, TokenEncoder
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.shape import TokenShape
from gram_core.train.engine import PlainEngine, Supervised
from gram_core.train.loop import TrainConfig, make_slots, train
from gram_core.train.objective import ObjectiveConfig
from gram_core.train.optim import OptimConfig

# Importing torch's compiler warns of its own use of torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


@pytest.fixture
def two_threads():
    torch._dynamo.reset()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Lookups(nn.Module):
    """All that reads a few rows of weights for many places."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = TokenEncoder(4, 64)
        self.puzzle = Identifiers(1, 64)

    def forward(self, tokens: torch.Tensor, puzzle: torch.Tensor) -> torch.Tensor:
        return self.tokens(tokens) + self.puzzle(puzzle)[:, None]


def test_the_gradient_of_what_is_looked_up_is_the_same_each_time(two_threads):
    """Added in the order that threads come in, it is another one within a few tries."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, (64, 64), generator=draw)
    weight = torch.randn(64, 64, 64, generator=draw)
    puzzle = torch.zeros(64, dtype=torch.int32)
    said: list[str] = []
    module = compiled(Lookups(), said.append)
    gradients = []
    for _ in range(20):
        module.zero_grad()
        (module(tokens, puzzle) * weight).sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    assert said == [], "nothing was compiled"
    for one, other in itertools.pairwise(gradients):
        assert all(map(torch.equal, one, other))
    rows = torch.stack([weight[tokens == token].sum(0) for token in range(4)]) * 8  # sqrt(64)
    torch.testing.assert_close(gradients[0][0], rows, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(gradients[0][1], weight.sum((0, 1))[None], rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_a_training_run_ends_in_the_same_bits(two_threads, queens4, examples):
    config = TrainConfig(
        steps=6, batch=64, log_every=6, checkpoint_every=6, engine="plain",
        optim=OptimConfig(name="muon", lr=1e-2, warmup=1),
    )  # fmt: skip
    settings = ModelConfig(
        core="mixer", dim=64, heads=2, ffn=64, layers=1, K=1, T=1, N_sup=2, prefix_tokens=2
    )
    torch.manual_seed(0)
    model = GRAM(settings, TokenShape(16, vocab=3))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module = Supervised(
        model,
        ObjectiveConfig(),
        queens4.verify,
        prior_rows=config.prior_rows(settings),
        precision="fp32",
    )
    said: list[str] = []
    compiled(module, said.append)
    ends = []
    for _ in range(5):
        model.load_state_dict(start)
        engine = PlainEngine(module, config.optim)
        train(engine, make_slots(engine, examples, config), config, None, lambda row: None)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert said == [], "nothing was compiled"
    for one, other in itertools.pairwise(ends):
        assert all(map(torch.equal, one, other))
