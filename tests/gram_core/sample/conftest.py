"""A model to sample."""

import pytest
import torch


@pytest.fixture(scope="module")
def model(make_model):
    """A model that halts now and then: its halt head's bias is taken away."""
    model = make_model(N_sup=4)
    with torch.no_grad():
        model.halt.map.bias.zero_()
        model.halt.map.weight.mul_(3)
    return model.eval()
