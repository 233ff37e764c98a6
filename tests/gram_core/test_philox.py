import math

import numpy as np
import pytest
import torch

from gram_core import philox
from gram_core.noise import batch_noise, step_noise, trajectory_key

# Counter, key, words: the known answers that Philox's authors publish with their Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_words_are_philox_s_known_answers(counter, key, words):
    found = philox.words(*map(np.uint32, (*counter, *key)))
    assert tuple(map(int, found)) == words


def python_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python's own integers."""
    for _ in range(10):
        p, q = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        low = 2**32 - 1
        counter = [q >> 32 ^ counter[1] ^ key[0], q & low, p >> 32 ^ counter[3] ^ key[1], p & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return counter


def test_noise_is_box_and_muller_s_transform_of_philox_s_words():
    key = trajectory_key(3, "a", 1)
    k0, k1, c2, c3 = (int.from_bytes(key[i : i + 4], "little") for i in (0, 4, 8, 12))
    shape, groups = (2, 3, 5), 8  # 30 numbers of 32
    expected = np.zeros(32)
    for group in range(groups):
        w = python_words([group, 7, c2, c3], [k0, k1])
        for pair in (0, 1):
            radius = math.sqrt(-2 * math.log((w[2 * pair] + 0.5) / 2**32))
            angle = 2 * math.pi * w[2 * pair + 1] / 2**32 - math.pi / 4
            place = group + pair * groups
            expected[place] = radius * math.cos(angle)
            expected[place + 2 * groups] = radius * math.sin(angle)
    found = step_noise(key, 7, shape).flatten()
    np.testing.assert_allclose(found, expected[:30], rtol=0, atol=2e-6)


@pytest.mark.parametrize("x", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("y", [0, 2**29, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 1])
def test_the_transform_is_right_at_the_ends_of_its_ranges(x, y):
    radius = math.sqrt(-2 * math.log((x + 0.5) / 2**32))
    angle = 2 * math.pi * y / 2**32 - math.pi / 4
    found = philox.normal_pair(np.uint32(x), np.uint32(y))
    # The largest u of float32 below 1 is 1 - 2^-24; a radius of next to nothing is zero.
    near = 4e-4 if x == 2**32 - 1 else 2e-6
    assert found == pytest.approx((radius * math.cos(angle), radius * math.sin(angle)), abs=near)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_another_device_draws_the_same_noise_but_for_rounding():
    streams = np.random.default_rng(0).integers(2**32, size=(5, 5), dtype=np.uint32)
    streams[0], streams[1] = 2**32 - 1, 0
    there = philox.in_torch(torch.from_numpy(streams.astype(np.int64)), 300)
    np.testing.assert_allclose(there, philox.on_cpu(streams, 300), rtol=0, atol=4e-6)
    fused = philox._fused()(torch.from_numpy(streams.astype(np.int64)), 300)
    np.testing.assert_allclose(fused, there, rtol=0, atol=4e-6)
    moved = batch_noise([trajectory_key(0, "a", 0)], [1], (2, 3, 4), torch.device("meta"))
    assert moved.shape == (2, 1, 3, 4)
    assert moved.device.type == "meta"
