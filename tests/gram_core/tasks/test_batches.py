import numpy as np
import pytest

from gram_core.tasks.batches import Order


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
