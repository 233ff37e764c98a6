"""Which term of the loss reaches which parameters."""

import pytest
import torch

from gram_core.model.recursion import State
from gram_core.train.objective import Batch, ObjectiveConfig, supervise

OFF = {"beta": 0.0, "halt_weight": 0.0, "value_weight": 0.0}
ON = {"kl": {"beta": 1.0}, "halt": {"halt_weight": 1.0}, "value": {"value_weight": 1.0}}
STATE = {"embed_input", "puzzle", "recursion.f_h", "recursion.f_l"}
POSTERIOR = {"posterior_head", "embed_target"}


def part(name: str) -> str:
    """The module that a parameter belongs to, the two stacks told apart."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "recursion" else first


def gradients(model, verify, batch, noise, prior_rows, **objective):
    config = ObjectiveConfig(**{**OFF, **objective})
    loss = supervise(model, config, verify, batch, noise, prior_rows).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, found, strict=True)
    }


def reached(model, verify, batch, noise, prior_rows, term, **objective) -> set[str]:
    """Parts whose gradient changes as one term is added to the reconstruction."""
    without = gradients(model, verify, batch, noise, prior_rows, **objective)
    if term == "reconstruction":
        return {part(name) for name, g in without.items() if g.any()}
    whole = gradients(model, verify, batch, noise, prior_rows, **objective, **ON[term])
    return {part(n) for n, g in whole.items() if float((g - without[n]).abs().max()) > 1e-7}


@pytest.mark.parametrize(
    ("term", "prior_rows", "expected"),
    [
        ("reconstruction", 0, STATE | POSTERIOR | {"decoder"}),
        ("reconstruction", 2, STATE | POSTERIOR | {"decoder"}),
        ("kl", 0, STATE | POSTERIOR | {"prior_head"}),
        ("kl", 2, STATE | POSTERIOR | {"prior_head"}),
        ("halt", 0, set()),
        ("halt", 2, {"halt"}),
        ("value", 0, set()),
        ("value", 2, {"value"}),
    ],
)
def test_each_term_reaches_its_own_parts(
    term, prior_rows, expected, make_model, make_batch, verify
):
    model = make_model(N_sup=3)
    batch, noise = make_batch(model)
    assert reached(model, verify, batch, noise, prior_rows, term) == expected


@pytest.mark.parametrize("term", ["halt", "value"])
def test_heads_on_the_posterior_learn_without_prior_slots(term, make_model, make_batch, verify):
    model = make_model(N_sup=3)
    batch, noise = make_batch(model)
    assert reached(model, verify, batch, noise, 0, term, heads_on="posterior") == {term}


@pytest.mark.parametrize(("balance", "still"), [(1.0, "posterior_head"), (0.0, "prior_head")])
def test_at_the_ends_of_the_balance_one_side_stands_still(
    balance, still, make_model, make_batch, verify
):
    model = make_model(N_sup=3)
    batch, noise = make_batch(model)
    parts = reached(model, verify, batch, noise, 0, "kl", balance=balance)
    assert still not in parts
    assert {"prior_head", "posterior_head"} - {still} <= parts


def test_without_guidance_reconstruction_reaches_all_but_the_heads(make_model, make_batch, verify):
    model = make_model(N_sup=3, guidance="none")
    batch, noise = make_batch(model)
    assert reached(model, verify, batch, noise, 0, "reconstruction") == STATE | {"decoder"}
    assert reached(model, verify, batch, noise, 0, "halt") == {"halt"}


def test_only_the_last_transition_is_differentiated(make_model, make_batch, verify):
    model = make_model(N_sup=3)
    batch, noise = make_batch(model, count=3)
    whole = gradients(model, verify, batch, noise, 2, beta=1.0)
    # Walk the first two transitions outside of any graph, then take a step of one transition.
    state, e_x = batch.state, model.embed(batch.inputs)
    with torch.no_grad():
        for t in range(2):
            proposal = model.recursion(state, e_x)
            p = model.prior(proposal.h)
            state = State(proposal.h + p.mean + p.std * noise[t], proposal.l)
    late = Batch(**{**vars(batch), "state": state})
    last = gradients(model, verify, late, noise[2:], 2, beta=1.0)
    for name, gradient in whole.items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(gradient, last[name], rtol=0, atol=atol)


def test_without_deep_supervision_all_transitions_are_differentiated(
    make_model, make_batch, verify
):
    model = make_model(N_sup=3, deep_supervision=False)
    batch, noise = make_batch(model, count=3)
    h = batch.state.h.clone().requires_grad_()
    early = Batch(**{**vars(batch), "state": State(h, batch.state.l)})
    loss = supervise(model, ObjectiveConfig(), verify, early, noise, 0).loss
    assert torch.autograd.grad(loss, h)[0].any()
    # Deep supervision cuts the carried state off as soon as there is a transition before the last.
    deep = make_model(N_sup=3)
    loss = supervise(deep, ObjectiveConfig(), verify, early, noise, 0).loss
    assert torch.autograd.grad(loss, h, allow_unused=True)[0] is None


def test_prior_slots_send_nothing_into_the_recursion(make_model, make_batch, verify):
    model = make_model(N_sup=3)
    batch, noise = make_batch(model)
    other, _ = make_batch(model, seed=1)
    inputs, h = batch.inputs.clone(), batch.state.h.clone()
    inputs[:2], h[:2] = other.inputs[:2], other.state.h[:2]
    changed = Batch(**{**vars(batch), "inputs": inputs, "state": State(h, batch.state.l)})
    weights = {"beta": 1.0, "halt_weight": 1.0, "value_weight": 1.0}
    before = gradients(model, verify, batch, noise, 2, **weights)
    after = gradients(model, verify, changed, noise, 2, **weights)
    moved = {part(n) for n in before if not torch.allclose(before[n], after[n], atol=1e-7)}
    assert moved == {"halt", "value"}


def test_the_state_that_is_carried_on_has_no_graph(make_model, make_batch, verify):
    model = make_model(N_sup=3)
    batch, noise = make_batch(model)
    result = supervise(model, ObjectiveConfig(), verify, batch, noise, 2)
    for tensor in (result.state.h, result.state.l, result.trace, result.terms):
        assert not tensor.requires_grad
