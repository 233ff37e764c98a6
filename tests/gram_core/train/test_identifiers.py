"""The sparse optimiser of identifiers, against a dense computation by hand, and in the loop."""

import pytest
import torch

from gram_core.model.encoders import Identifiers
from gram_core.model.gram import GRAM, ModelConfig
from gram_core.shape import TokenShape
from gram_core.tasks.batches import Examples
from gram_core.train.engine import PlainEngine, Supervised
from gram_core.train.identifiers import IdentifierOptimizer
from gram_core.train.loop import TrainConfig, make_slots, train
from gram_core.train.objective import ObjectiveConfig
from gram_core.train.optim import OptimConfig, parameter_groups


class Alone:
    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class Two:
    """Another worker with the same slots and the opposite of half the gradient."""

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor if tensor.dtype == torch.int32 else -0.5 * tensor])


@pytest.mark.parametrize("workers", [Alone(), Two()])
def test_a_step_is_sign_descent_on_the_summed_gradient(workers) -> None:
    torch.manual_seed(0)
    table = torch.randn(6, 3)
    before = table.clone()
    config = OptimConfig(lr=2.0, identifier_lr=0.1, identifier_decay=0.5)
    puzzle = torch.tensor([4, 1, 4, 0], dtype=torch.int32)
    weight = torch.randn(4, 3)
    optimizer = IdentifierOptimizer(table, config)
    leaf = optimizer.leaf(puzzle)
    assert torch.equal(leaf, before[puzzle])
    (leaf * weight).sum().backward()
    optimizer.step(puzzle, leaf.grad, workers, lr=1.0)

    # Dense: the gradient of the whole table, of which untouched rows are left alone.
    dense = before.clone().requires_grad_()
    (dense[puzzle.long()] * weight).sum().backward()
    wanted = before.clone()
    rate = 1.0 * 0.1 / 2.0
    for row in (0, 1, 4):
        wanted[row] = before[row] * (1 - rate * 0.5) - rate * dense.grad[row].sign()
    torch.testing.assert_close(table, wanted)
    assert not torch.equal(table, before)


def test_a_table_is_no_parameter_and_one_vector_is() -> None:
    assert not list(Identifiers(3, 4).parameters())
    assert Identifiers(3, 4).state_dict()["weight"].shape == (3, 4)
    one = Identifiers(1, 4)
    assert [p.shape for p in one.parameters()] == [(1, 4)]
    decayed, free = parameter_groups(one, OptimConfig())
    assert not decayed["params"] and len(free["params"]) == 1


def test_training_moves_the_identifiers_that_it_sees() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        core="mixer", dim=8, heads=2, ffn=16, layers=1, K=1, T=2, N_sup=2, prefix_tokens=2
    )
    model = GRAM(config, TokenShape(4, vocab=3, puzzles=9))
    tokens = torch.randint(1, 3, (3, 4), dtype=torch.uint8)
    # Nine identifiers, three of them in use: 0, 4 and 8.
    examples = Examples(tokens, tokens, torch.tensor([0, 4, 8], dtype=torch.int32))
    settings = TrainConfig(
        steps=4,
        batch=6,
        compile=False,
        optim=OptimConfig(lr=1e-3, warmup=0, identifier_lr=0.01, identifier_decay=0.0),
    )
    prior_rows = settings.prior_rows(config)
    module = Supervised(
        model, ObjectiveConfig(beta=1.0), None, prior_rows=prior_rows, precision="fp32"
    )
    engine = PlainEngine(module, settings.optim)
    train(engine, make_slots(engine, examples, settings), settings, None, lambda row: None)
    assert model.puzzle is not None
    moved = model.puzzle.weight.abs().amax(1) > 0
    assert moved.nonzero()[:, 0].tolist() == [0, 4, 8]
    # Sign descent: every coordinate has moved by whole multiples of the rate.
    steps = model.puzzle.weight[moved] / 0.01
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
