from typing import Any

import numpy as np
import pytest
import torch

from gram_core.tasks.batches import Examples, Member, Order, members


def test_each_epoch_is_a_permutation_and_another_one():
    rows = Order(7, seed=3).take(0, 21).reshape(3, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in rows.tolist())
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 3


def test_the_order_is_a_function_of_seed_and_position():
    whole = Order(5, seed=0).take(0, 40)
    order = Order(5, seed=0)
    for position in (33, 0, 12, 4, 5):
        assert np.array_equal(order.take(position, 7), whole[position : position + 7])
    assert not np.array_equal(Order(5, seed=1).take(0, 40), whole)


def test_the_first_row_of_an_epoch_is_any_row_equally_often():
    order = Order(4, seed=0)
    firsts = np.bincount([order.take(4 * epoch, 1)[0] for epoch in range(1000)], minlength=4)
    # Five standard deviations of a binomial of 1000 and 1/4.
    assert (abs(firsts - 250) < 5 * (1000 * 3 / 16) ** 0.5).all()


def test_no_rows_cannot_be_read():
    with pytest.raises(ValueError, match="no training row"):
        Order(0, seed=0)


def test_examples_have_a_length(examples):
    assert len(examples) == 28


def shifted(row: Member, inputs: np.ndarray, target: np.ndarray, variant: int) -> Any:
    """A stand-in for a task's variants: tokens plus the variant, and the group's length."""
    return inputs + np.uint8(variant), target + np.uint8(len(row.group))


def streamed(**settings: Any) -> Examples:
    rows = torch.tensor([[10, 20], [30, 40], [50, 60]], dtype=torch.uint8)
    puzzle = torch.tensor([0, 4, 8], dtype=torch.int32)
    return Examples(
        rows,
        rows,
        puzzle,
        variants=4,
        vary=shifted,
        members=members(["a", "bb", "ccc"]),
        **settings,
    )


def test_a_row_knows_its_place_among_those_of_its_group():
    found = members(["a", "b", "a", "a", "b"])
    assert found == [("a", 0, 3), ("b", 0, 2), ("a", 1, 3), ("a", 2, 3), ("b", 1, 2)]


def test_variants_of_all_rows_are_numbered_row_by_row():
    examples = streamed()
    assert len(examples) == 12
    taken = examples.take(np.arange(12))
    wanted = [[10 * k + v, 10 * k + 10 + v] for v in range(4) for k in (1, 3, 5)]
    assert taken.inputs.tolist() == wanted
    # Variant 0 is the row itself, the others went through the group.
    assert taken.target[:3].tolist() == [[10, 20], [30, 40], [50, 60]]
    assert taken.target[3:6].tolist() == [[11, 21], [32, 42], [53, 63]]
    assert taken.puzzle.tolist() == [0, 4, 8] * 4
    assert examples.inputs.tolist() == [[10, 20], [30, 40], [50, 60]], "the rows stay"


def test_identified_variants_have_identifiers_of_their_own():
    taken = streamed(identified=True).take(np.array([0, 4, 11, 7]))
    assert taken.puzzle.tolist() == [0, 4 + 1, 8 + 3, 4 + 2]


def test_a_variant_that_is_held_out_gives_way():
    held_out = frozenset([bytes([11, 21]), bytes([15, 25])])
    # Variant 1 is held out, so is its first stand-in, number 1 + 4; the next is 1 + 8.
    assert streamed(held_out=held_out).take(np.array([3])).inputs.tolist() == [[19, 29]]
    everything = frozenset(bytes([10 + v, 20 + v]) for v in range(1, 60))
    assert streamed(held_out=everything).take(np.array([3])).inputs.tolist() == [[10, 20]]
