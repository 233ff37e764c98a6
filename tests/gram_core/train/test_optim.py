import math

import pytest
import torch

from gram_core.config import ConfigError, load
from gram_core.train.optim import (
    Muon,
    OptimConfig,
    hidden_matrices,
    learning_rate,
    make_optimizer,
    parameter_groups,
    set_rate,
)


def names(model, group) -> set[str]:
    chosen = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def test_matrices_are_decayed_and_embeddings_and_biases_are_not(make_model):
    model = make_model()
    decayed, free = parameter_groups(model, OptimConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert names(model, free) == {
        "embed_input.weight", "puzzle.weight", "embed_target.weight",
        "halt.map.bias", "value.map.bias",
    }  # fmt: skip
    everything = {name for name, _ in model.named_parameters()}
    assert names(model, decayed) == everything - names(model, free)


def test_decay_all_decays_all(make_model):
    model = make_model()
    decayed, free = parameter_groups(model, OptimConfig(decay_all=True))
    assert names(model, decayed) == {name for name, _ in model.named_parameters()}
    assert free["params"] == []


def test_a_step_is_adamw_written_out(make_model):
    config = OptimConfig(lr=0.01, beta1=0.8, beta2=0.95, weight_decay=0.5)
    model = make_model()
    optimizer = make_optimizer(model, config)
    torch.manual_seed(0)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    _, free = parameter_groups(model, config)
    spared = names(model, free)
    for t in (1, 2, 3):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            decay = 0.0 if name in spared else 0.5
            step = (m[name] / (1 - 0.8**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - 0.01 * decay) - 0.01 * step
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_muon_steps_the_matrices_between_hidden_vectors(make_model):
    model = make_model()
    matrices = {id(p) for p in hidden_matrices(model)}
    chosen = {name for name, p in model.named_parameters() if id(p) in matrices}
    assert {name.split(".")[0] for name in chosen} == {"recursion", "prior_head", "posterior_head"}
    left = {name for name, _ in model.named_parameters()} - chosen
    assert left == {
        "embed_input.weight", "puzzle.weight", "embed_target.weight", "decoder.weight",
        "halt.map.weight", "halt.map.bias", "value.map.weight", "value.map.bias",
    }  # fmt: skip
    assert hidden_matrices(make_model(guidance="none")) != []


def test_a_step_of_muon_goes_along_the_orthogonal_factor_of_the_momentum(make_model):
    config = OptimConfig(name="muon", lr=0.01, momentum=0.9, weight_decay=0.5)
    model = make_model()
    optimizer = make_optimizer(model, config)
    matrices = hidden_matrices(model)
    torch.manual_seed(0)
    momenta = [torch.zeros_like(p, dtype=torch.float64) for p in matrices]
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        before = [p.detach().double().clone() for p in matrices]
        optimizer.step()
        for index, (p, was) in enumerate(zip(matrices, before, strict=True)):
            assert p.grad is not None
            gradient = p.grad.double()
            momenta[index] = 0.9 * momenta[index] + 0.1 * gradient
            looked_ahead = 0.9 * momenta[index] + 0.1 * gradient  # Nesterov
            moved = was * (1 - 0.01 * 0.5) - p.detach().double()
            update = moved / (0.01 * 0.2 * math.sqrt(max(p.shape)))
            u, values, vt = torch.linalg.svd(looked_ahead, full_matrices=False)
            values = values / looked_ahead.norm()
            for _ in range(5):  # towards 1; all but very small ones end between 0.7 and 1.2
                values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
            torch.testing.assert_close(u @ values.diag() @ vt, update, rtol=0, atol=1e-3)
            assert (values > 0.65).double().mean() > 0.8


def test_muon_goes_where_torch_s_own_goes():
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (24, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.01, "weight_decay": 0.3, "momentum": 0.8}
    optimizers = (
        Muon(ours, **settings),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings),
    )
    for step in range(4):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            # One has no gradient at first, and must be left alone.
            gradient = torch.randn(mine.shape) if step or index != 2 else None
            mine.grad, other.grad = gradient, gradient
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, shape in zip(ours, theirs, shapes, strict=True):
        # Torch's iteration runs in bfloat16: up to 0.05 of each of four updates.
        torch.testing.assert_close(
            mine, other, rtol=0, atol=4 * 0.05 * 0.01 * 0.2 * math.sqrt(max(shape))
        )


def test_muon_leaves_the_rest_to_adamw_and_one_rate_moves_both(make_model):
    moved = {}
    for name in ("muon", "adamw"):
        model = make_model()
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        optimizer = make_optimizer(model, OptimConfig(name=name, lr=1.0))
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        moved[name] = {key: p.detach() - before[key] for key, p in model.named_parameters()}
    chosen = {id(p) for p in hidden_matrices(model)}
    hidden = {key for key, p in model.named_parameters() if id(p) in chosen}
    for key, change in moved["muon"].items():
        other = moved["adamw"][key]
        if key not in hidden:
            torch.testing.assert_close(change, other, rtol=0, atol=0)
        else:
            # Not the same step, but one of about the same size.
            assert not torch.allclose(change, other)
            assert change.square().mean().sqrt() < other.square().mean().sqrt()
            assert change.square().mean().sqrt() > 0.05 * other.square().mean().sqrt()


HEADS = {"halt.map.weight", "halt.map.bias", "value.map.weight", "value.map.bias"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_heads_go_at_their_own_rate_and_the_rest_as_before(make_model, name):
    changes = {}
    for rate, head_rate in ((0.01, None), (0.01, 0.04), (0.04, None)):
        model = make_model()
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        # At twice the rate at which it then steps: the heads' is a share of it.
        twice = None if head_rate is None else 2 * head_rate
        config = OptimConfig(name=name, lr=2 * rate, head_lr=twice, weight_decay=0.0)
        optimizer = make_optimizer(model, config)
        set_rate(optimizer, rate)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        changes[rate, head_rate] = {
            key: p.detach() - before[key] for key, p in model.named_parameters()
        }
    slow, own, fast = changes.values()
    for key in own:
        other = fast if key in HEADS else slow
        torch.testing.assert_close(own[key], other[key], rtol=0, atol=0)
        assert not torch.equal(slow[key], fast[key])


def test_heads_with_a_rate_of_their_own_are_decayed_with_everything_alone(make_model):
    model = make_model()
    for decay_all in (False, True):
        config = OptimConfig(lr=0.01, head_lr=0.05, weight_decay=0.3, decay_all=decay_all)
        decayed, free, heads = parameter_groups(model, config)
        assert names(model, heads) == HEADS
        assert heads["weight_decay"] == (0.3 if decay_all else 0.0)
        grouped = [p for group in (decayed, free, heads) for p in group["params"]]
        assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def test_the_rate_warms_up_linearly_and_stays():
    config = OptimConfig(lr=2.0, warmup=4)
    rates = [learning_rate(config, step, 100) for step in (0, 1, 3, 4, 50, 99)]
    assert rates == [0.5, 1.0, 2.0, 2.0, 2.0, 2.0]


def test_the_cosine_falls_from_the_peak_to_its_share():
    config = OptimConfig(lr=2.0, warmup=10, schedule="cosine", final_lr=0.1)
    assert learning_rate(config, 9, 110) == 2.0
    assert learning_rate(config, 10, 110) == pytest.approx(2.0)
    assert learning_rate(config, 60, 110) == pytest.approx(2.0 * 0.55)
    third = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(config, 35, 110) == pytest.approx(third)
    assert learning_rate(config, 110, 110) == pytest.approx(0.2)
    assert learning_rate(config, 500, 110) == pytest.approx(0.2)


def test_without_warmup_the_first_step_has_the_full_rate():
    assert learning_rate(OptimConfig(lr=2.0, warmup=0), 0, 10) == 2.0


def test_a_run_shorter_than_its_warmup_only_warms_up():
    config = OptimConfig(lr=2.0, warmup=10, schedule="cosine")
    assert [learning_rate(config, s, 5) for s in (0, 4)] == [0.2, 1.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", 0.0), ("beta1", 1.0), ("beta2", 1.0), ("momentum", 1.0), ("weight_decay", -1.0)],
)
def test_values_out_of_range_name_the_key(key, value):
    with pytest.raises(ConfigError, match=rf"^optim\.{key}: "):
        load(OptimConfig, {key: value}, "optim")
