from dataclasses import replace

import numpy as np
import pytest
import torch

from gram_core.model.recursion import State
from gram_core.train.objective import Supervision
from gram_core.train.slots import Share, Slots

N = 3


@pytest.fixture
def model(make_model):
    return make_model(N_sup=N)


def step_of(slots: Slots, wants_halt: bool | list[bool] = False, value: float = 0.0) -> Supervision:
    """What a supervision step would leave behind where the halt head says `wants_halt`."""
    batch = slots.batch()
    ended = batch.last | (batch.may_halt & torch.tensor(wants_halt))
    state = State(slots.state.h + value, slots.state.l - value)
    return Supervision(torch.zeros(()), state, slots.trace + value, ended, torch.zeros(11, 2))


def lifetimes(slots: Slots, iterations: int, wants_halt: bool = False):
    """Drive the slots; give the rows admitted in order, and each slot's trajectory lengths."""
    rows: list[int] = []
    lengths: list[list[int]] = [[] for _ in range(len(slots))]
    age = [0] * len(slots)
    for _ in range(iterations):
        fresh = np.flatnonzero(slots.ended)
        slots.refill()
        rows += slots.row[fresh].tolist()
        slots.absorb([step_of(slots, wants_halt)])
        for slot in range(len(slots)):
            age[slot] += 1
            if slots.ended[slot]:
                lengths[slot].append(age[slot])
                age[slot] = 0
    return rows, lengths


def test_every_slot_does_all_its_steps_and_the_first_are_staggered(model, examples):
    slots = Slots(model, examples, 5, N, 0)
    _, lengths = lifetimes(slots, 13)
    # First trajectories are cut after 1, 2, 3, 1, 2 steps; all later ones are whole.
    assert [length[0] for length in lengths] == [1, 2, 3, 1, 2]
    assert all(later == N for length in lengths for later in length[1:])
    assert all(len(length) >= 4 for length in lengths)


def test_every_batch_holds_all_depths_after_the_first_trajectories(model, examples):
    slots = Slots(model, examples, 6, N, 0)
    lifetimes(slots, N)
    for _ in range(2 * N):
        slots.refill()
        assert sorted(slots.step.tolist()) == [0, 0, 1, 1, 2, 2]
        slots.absorb([step_of(slots)])


def test_examples_come_in_shuffled_epochs_without_repetition(model, examples):
    rows, _ = lifetimes(Slots(model, examples, 5, N, 3), 60)
    first, second = rows[:28], rows[28:56]
    assert sorted(first) == list(range(28))
    assert sorted(second) == list(range(28))
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("halting", [False, True])
def test_slots_do_not_depend_on_who_holds_them(model, examples, world, parts, halting):
    """Workers in lockstep hold, slot for slot, what one alone does."""
    settings = {"halting": halting, "exploration": 0.5}
    alone = Slots(model, examples, 8, N, 3, **settings)
    held: list[torch.Tensor] = []
    shared = [
        Slots(
            model, examples, 8, N, 3, Share(rank, world, parts),
            **settings, gather=lambda own: torch.cat(held),
        )
        for rank in range(world)
    ]  # fmt: skip
    assert sorted(n for slots in shared for n in slots.mine.tolist()) == list(range(8))
    for iteration in range(9):
        wants = [(n * 7 + iteration) % 3 == 0 for n in range(8)]
        for slots in (alone, *shared):
            slots.refill()
        whole = alone.batch()
        results = []
        for slots in shared:
            assert np.array_equal(slots.row, alone.row)
            assert np.array_equal(slots.floor, alone.floor)
            mine = []
            for part in range(parts):
                batch, own = slots.batch(part), torch.from_numpy(slots.mine[slots.part(part)])
                for name in ("inputs", "target", "puzzle", "step", "last", "may_halt", "trace"):
                    assert torch.equal(getattr(batch, name), getattr(whole, name)[own]), name
                assert torch.equal(batch.state.h, whole.state.h[own])
                ended = batch.last | (batch.may_halt & torch.tensor(wants)[own])
                state = State(batch.state.h + iteration, batch.state.l - iteration)
                mine.append(
                    Supervision(torch.zeros(()), state, batch.trace + 1, ended, torch.zeros(11, 2))
                )
            results.append(mine)
        held[:] = [torch.cat([r.ended for r in mine]).to(torch.uint8) for mine in results]
        for slots, mine in zip(shared, results, strict=True):
            slots.absorb(mine)
        step = step_of(alone, wants, value=float(iteration))
        alone.absorb([replace(step, trace=alone.trace + 1)])
        assert np.array_equal(alone.ended, shared[0].ended)


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (2, 2)])
def test_slots_saved_by_many_are_those_of_one(model, examples, world, parts):
    shares = [Share(rank, world, parts) for rank in range(world)]
    whole = Slots(model, examples, 8, N, 3)
    whole.refill()
    whole.absorb([step_of(whole, value=2.0)])
    whole.state.h.add_(torch.arange(8.0)[:, None, None])
    saved = whole.state_dict()
    workers = []
    for share in shares:
        one = Slots(model, examples, 8, N, 3, share)
        one.load_state_dict(saved)
        assert torch.equal(one.state.h, whole.state.h[torch.from_numpy(one.mine)])
        assert torch.equal(one.inputs, whole.inputs[torch.from_numpy(one.mine)])
        workers.append(one)
    names = ("h", "l", "trace")
    values = {
        "h": [w.state.h for w in workers],
        "l": [w.state.l for w in workers],
        "trace": [w.trace for w in workers],
    }
    workers[0].gather = lambda own: next(
        torch.cat(values[name]) for name in names if own is values[name][0]
    )
    again = workers[0].state_dict()
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_a_refilled_slot_starts_afresh_and_the_others_go_on(model, examples):
    slots = Slots(model, examples, 3, N, 0)
    slots.refill()
    slots.absorb([step_of(slots, value=2.0)])
    assert slots.ended.tolist() == [True, False, False]
    slots.refill()
    zero = model.initial_state(1)
    assert torch.equal(slots.state.h[0], zero.h[0])
    assert torch.equal(slots.state.l[0], zero.l[0])
    assert not slots.trace[0].any()
    assert torch.equal(slots.state.h[1], zero.h[0] + 2.0)
    assert (slots.trace[1:] == 2.0).all()
    assert slots.step.tolist() == [0, 1, 1]
    before = slots.row.copy()
    slots.refill()
    assert np.array_equal(before, slots.row), "with nothing ended, a refill does nothing"


def test_a_batch_shows_each_slots_example_and_where_it_ends(model, examples):
    slots = Slots(model, examples, 3, N, 0)
    for _ in range(4):
        slots.refill()
        batch = slots.batch()
        rows = torch.from_numpy(slots.row)
        assert torch.equal(batch.inputs, examples.inputs[rows])
        assert torch.equal(batch.target, examples.target[rows])
        assert batch.step.tolist() == slots.step.tolist()
        result = step_of(slots)
        last = batch.last.tolist()
        slots.absorb([result])
        assert slots.ended.tolist() == last


def test_initial_states_of_slots_are_no_views_of_z0(model, examples):
    slots = Slots(model, examples, 3, N, 0)
    before = model.z0_h.clone()
    slots.state.h.add_(1.0)
    assert torch.equal(model.z0_h, before)


def test_the_halt_head_ends_trajectories_only_where_halting_is_on(model, examples):
    off = Slots(model, examples, 4, N, 0)
    on = Slots(model, examples, 4, N, 0, halting=True, exploration=0.0)
    _, kept = lifetimes(off, 9, wants_halt=True)
    _, halted = lifetimes(on, 9, wants_halt=True)
    assert all(later == N for length in kept for later in length[1:])
    assert all(length == [1] * 9 for length in halted)


def test_one_slots_wish_to_halt_ends_no_other(model, examples):
    slots = Slots(model, examples, 6, N, 0, halting=True, exploration=0.0)
    slots.refill()
    slots.absorb([step_of(slots, [False, True, False, False, False, True])])
    # Slots 0 and 3 are cut short at their first trajectory.
    assert slots.ended.tolist() == [True, True, False, True, False, True]


def test_exploration_imposes_a_random_minimum_of_two_to_n_steps(model, examples):
    slots = Slots(model, examples, 30, 5, 0, halting=True, exploration=1.0)
    slots.refill()
    slots.limit[:] = 5
    assert set(slots.floor.tolist()) == {2, 3, 4, 5}
    ends = np.zeros(30, dtype=int)
    for iteration in range(1, 6):
        slots.absorb([step_of(slots, True)])
        ends[(ends == 0) & slots.ended] = iteration
    assert np.array_equal(ends, slots.floor)


def test_exploration_happens_with_its_probability(model, examples):
    slots = Slots(model, examples, 2000, 5, 0, halting=True, exploration=0.3)
    slots.refill()
    # Five standard errors of a share of 0.3 among 2000.
    assert abs((slots.floor > 1).mean() - 0.3) < 5 * (0.21 / 2000) ** 0.5


@pytest.mark.parametrize("halting", [False, True])
def test_a_restored_state_goes_on_as_if_nothing_had_been(model, examples, halting):
    def make() -> Slots:
        return Slots(model, examples, 4, N, 1, halting=halting, exploration=0.5)

    slots, copy = make(), make()
    for i in range(5):
        slots.refill()
        slots.absorb([step_of(slots, [True, False, False, True], value=float(i))])
    copy.load_state_dict({k: v.clone() for k, v in slots.state_dict().items()})
    for i in range(6):
        for one in (slots, copy):
            one.refill()
        ours, theirs = slots.batch(), copy.batch()
        for name in ("inputs", "target", "puzzle", "step", "last", "trace"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(ours.state.h, theirs.state.h)
        assert torch.equal(ours.state.l, theirs.state.l)
        assert np.array_equal(slots.floor, copy.floor)
        for one in (slots, copy):
            one.absorb([step_of(one, [False, True, False, True], value=float(i))])


def test_a_seed_decides_the_order_and_the_exploration(model, examples):
    made = [
        Slots(model, examples, 30, 5, seed, halting=True, exploration=1.0) for seed in (0, 0, 1)
    ]
    for slots in made:
        slots.refill()
    one, again, other = made
    for name in ("row", "floor"):
        assert getattr(one, name).tolist() == getattr(again, name).tolist()
        assert getattr(one, name).tolist() != getattr(other, name).tolist()
