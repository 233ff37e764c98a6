import math

import pytest
import torch
from torch.nn import functional as F

from gram_core.model import layers
from gram_core.model.layers import (
    Attention,
    SequenceMixer,
    Stack,
    SwiGLU,
    attend,
    lecun_normal_,
    linear,
    rms_norm,
    rope_table,
    rotate,
)


def test_rope_turns_channel_pairs_as_complex_numbers():
    length, channels, base = 7, 8, 100.0
    x = torch.randn(2, 3, length, channels)
    half = channels // 2
    # Channel i and i + C/2 are one complex number, turned by position * base^(-2i/C).
    pairs = torch.complex(x[..., :half], x[..., half:])
    frequency = torch.tensor([base ** (-2 * i / channels) for i in range(half)])
    turn = torch.exp(1j * torch.arange(length)[:, None] * frequency)
    expected = torch.cat([(pairs * turn).real, (pairs * turn).imag], dim=-1)
    torch.testing.assert_close(rotate(x, rope_table(length, channels, base)), expected)


def test_rotated_products_depend_on_the_distance_of_positions_alone():
    q, k = torch.randn(8), torch.randn(8)
    table = rope_table(10, 8, 10000.0)
    scores = rotate(q.expand(1, 1, 10, 8), table) @ rotate(k.expand(1, 1, 10, 8), table).mT
    for distance in (-3, 0, 4):
        diagonal = scores[0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert abs(float(scores[0, 0, 0, 0] - scores[0, 0, 0, 5])) > 1e-3


def test_attend_is_scaled_dot_product_attention():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_splits_heads_and_joins_them_again():
    torch.manual_seed(0)
    layer, x = Attention(16, heads=4, length=5, rope_base=100.0), torch.randn(2, 5, 16)
    q, k, v = (x @ w.T for w in layer.qkv.weight.chunk(3))
    heads = []
    for part in range(4):
        cut = slice(4 * part, 4 * part + 4)
        table = rope_table(5, 4, 100.0)
        turned = [rotate(t[:, None, :, cut], table) for t in (q, k)]
        heads.append(F.scaled_dot_product_attention(*turned, v[:, None, :, cut])[:, 0])
    expected = torch.cat(heads, dim=-1) @ layer.out.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_rms_norm_divides_by_the_root_of_the_mean_square():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    scale = math.sqrt(12.5 + 1e-5)
    expected = torch.tensor([[3 / scale, 4 / scale], [0, 0]])
    torch.testing.assert_close(rms_norm(x), expected)


def test_rms_norm_of_bfloat16_is_computed_in_float32_and_returned_in_bfloat16():
    x = torch.randn(4, 512).bfloat16()
    out = rms_norm(x)
    assert out.dtype == torch.bfloat16
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out, exact.bfloat16())


@pytest.mark.parametrize("fan_in", [16, 400])
def test_lecun_weights_have_deviation_one_over_root_fan_in_and_are_truncated(fan_in):
    torch.manual_seed(0)
    weight = lecun_normal_(torch.empty(400, 1000), fan_in)
    std = 1 / math.sqrt(fan_in)
    # 400,000 draws: the deviation's relative standard error is about 0.001.
    assert abs(float(weight.std()) / std - 1) < 0.01
    assert abs(float(weight.mean())) < 0.01 * std
    # The parent normal's deviation is std / sqrt(1 - 2 a phi(a) / (2 Phi(a) - 1)), cut at a = 2.
    phi = math.exp(-2) / math.sqrt(2 * math.pi)
    shrink = math.sqrt(1 - 4 * phi / math.erf(math.sqrt(2)))
    assert 1.9 < float(weight.abs().max()) * shrink / std <= 2.0001


def test_linear_has_a_bias_only_where_asked():
    assert linear(3, 4).bias is None
    assert not linear(3, 4, bias=True).bias.any()


def test_swiglu_is_down_of_silu_gate_times_up():
    layer, x = SwiGLU(3, 5, 2), torch.randn(7, 3)
    gate, up = layer.gate_up.weight[:5], layer.gate_up.weight[5:]
    g = x @ gate.T
    expected = (g / (1 + torch.exp(-g)) * (x @ up.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_the_mixer_works_on_each_channel_along_positions():
    mixer, x = SequenceMixer(5, 6), torch.randn(2, 5, 3)
    columns = [mixer.mix(x[:, :, channel]) for channel in range(3)]
    torch.testing.assert_close(mixer(x), torch.stack(columns, dim=-1))


def stack(core: str, count: int = 2) -> Stack:
    return Stack(core, layers=count, dim=16, heads=2, ffn=16, length=5, rope_base=10000.0)


@pytest.mark.parametrize("core", ["attention", "mixer"])
def test_a_stack_is_post_normed_blocks_of_the_sum_and_ends_with_unit_rms(core):
    torch.manual_seed(0)
    f, a, b = stack(core), 100 * torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    x = a + b
    for block in f.blocks:
        for part in (block.mixing, block.channels):
            x = x + part(x)
            x = x / (x.square().mean(-1, keepdim=True) + layers.NORM_EPS).sqrt()
    torch.testing.assert_close(f(a, b), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(f(a, b).square().mean(-1), torch.ones(3, 5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("core", ["attention", "mixer"])
def test_rows_of_a_batch_do_not_touch_each_other_but_positions_do(core):
    torch.manual_seed(0)
    f, a = stack(core), torch.randn(2, 5, 16)
    other = a.clone()
    other[1, 0] += 1.0
    before, after = f(a, torch.zeros_like(a)), f(other, torch.zeros_like(a))
    torch.testing.assert_close(before[0], after[0])
    assert (before[1, 4] - after[1, 4]).abs().max().item() > 1e-4


def test_sequence_mixer_multiplies_all_rows_at_once() -> None:
    mixer, x = SequenceMixer(5, 6).requires_grad_(False), torch.randn(2, 5, 3)
    with torch.inference_mode(), torch.profiler.profile() as seen:
        mixer(x)
    names = [event.key for event in seen.key_averages()]
    assert "aten::mm" in names
    assert "aten::bmm" not in names
