import pytest
import torch
from torch import nn

from gram_core.train.ema import EMA


def walk(ema: EMA, parameter: nn.Parameter, values: list[float]) -> None:
    for value in values:
        parameter.data.fill_(value)
        ema.update()


def test_the_average_is_the_geometric_sum_of_the_weights():
    parameter = nn.Parameter(torch.tensor([5.0]))
    ema = EMA([parameter], decay=0.9, warmup=False)
    values = [1.0, -2.0, 3.0, 0.5]
    walk(ema, parameter, values)
    expected = 0.9**4 * 5.0 + sum(0.1 * 0.9 ** (3 - i) * v for i, v in enumerate(values))
    assert ema.average[0].item() == pytest.approx(expected, rel=1e-5)
    assert ema.steps == 4


def test_warmup_caps_the_decay_at_one_plus_t_over_ten_plus_t():
    parameter = nn.Parameter(torch.tensor([5.0]))
    ema = EMA([parameter], decay=0.25, warmup=True)
    average = 5.0
    for t, value in enumerate([1.0, -2.0, 3.0, 0.5, 8.0]):
        # 1/10, 2/11, 3/12 are below the decay of 0.25 or equal to it, 4/13 is above.
        decay = min(0.25, (1 + t) / (10 + t))
        assert ema.decay_now() == pytest.approx(decay)
        walk(ema, parameter, [value])
        average = decay * average + (1 - decay) * value
    assert ema.average[0].item() == pytest.approx(average, rel=1e-5)


def test_the_average_is_in_float32_and_its_own_copy():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    ema = EMA([parameter], 0.5, warmup=False)
    parameter.data.fill_(3.0)
    assert ema.average[0].dtype == torch.float32
    assert ema.average[0].tolist() == [1.0, 1.0]
