"""Philox, a generator whose words are a function of a key and a counter, and normals of them.

Compiled for a CPU, in torch for other devices. On every CPU the numbers are the same bit by bit; a
GPU's differ from them by the rounding of its logarithm and cosine.
"""

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gram_core.compile import with_way_back

# Fewer numbers than this are not worth a second thread.
PARALLEL = 1 << 19
# So many at a time on other devices, where the words, uncompiled, take five times the memory of
# the numbers.
PIECE = 1 << 26
# Philox 4x32 with 10 rounds: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def normal(streams: np.ndarray, count: int, device: torch.device) -> Float[Tensor, "B N"]:
    """`count` standard normals of each stream on `device`. A stream is five words, uint32 [B, 5]:
    two of key, then all but the first of the counter, which counts within the row."""
    groups = -(-count // 4)
    if device.type == "cpu":
        return torch.from_numpy(on_cpu(streams, groups))[:, :count]
    rows = torch.from_numpy(streams.astype(np.int64)).to(device, non_blocking=True)
    pieces = torch.split(rows, max(1, PIECE // (4 * groups)))
    drawn = [_fused()(piece, groups)[:, :count] for piece in pieces]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


@cache
def _fused() -> Callable[[Tensor, int], Tensor]:
    """`in_torch` as few kernels: its hundred operations on 64-bit words, each through memory, would
    take as long as a training step."""
    return with_way_back(in_torch, warnings.warn, dynamic=True)


def on_cpu(streams: np.ndarray, groups: int) -> np.ndarray:
    """Four normals of each group of each stream, float32 [B, 4 G]."""
    out = np.empty((len(streams), 4 * groups), dtype=np.float32)
    threads = torch.get_num_threads()
    if threads == 1 or out.size < PARALLEL:
        _fill(streams, out)
    else:
        (first, *rest) = zip(*(np.array_split(x, threads) for x in (streams, out)), strict=True)
        others = [_pool(threads - 1).submit(_fill, *part) for part in rest]
        _fill(*first)
        for other in others:
            other.result()
    return out


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "noise")


def in_torch(streams: Int[Tensor, "B 5"], groups: int) -> Float[Tensor, "B N"]:
    """What `on_cpu` gives, on any device."""
    mask = 0xFFFFFFFF
    k0, k1, c1, c2, c3 = streams[:, :, None].unbind(1)
    c0: Tensor = torch.arange(groups, device=streams.device)[None]
    for _ in range(ROUNDS):
        # 64-bit products wrap around; their two halves are right all the same.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & mask) ^ c1 ^ k0, ((p0 >> 32) & mask) ^ c3 ^ k1
        c1, c3 = p1 & mask, p0 & mask
        k0, k1 = (k0 + WEYL[0]) & mask, (k1 + WEYL[1]) & mask
    radius = ((torch.stack([c0, c2], 1).float() + 0.5) * 2**-32).log().mul_(-2).sqrt_()
    angle = torch.stack([c1, c3], 1).float() * (2 * math.pi / 2**32) - math.pi / 4
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten(1)


_f = np.float32
_M0, _M1 = map(np.uint64, MULTIPLIERS)
_W0, _W1 = map(np.uint32, WEYL)
_HALF = np.uint64(32)
_LN2 = _f(math.log(2))


@numba.njit(cache=True, inline="always")
def words(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """The four words of a counter under a key; all are uint32."""
    for _ in range(ROUNDS):
        p0, p1 = numba.uint64(c0) * _M0, numba.uint64(c2) * _M1
        c0, c1, c2, c3 = (
            numba.uint32(p1 >> _HALF) ^ c1 ^ k0,
            numba.uint32(p1),
            numba.uint32(p0 >> _HALF) ^ c3 ^ k1,
            numba.uint32(p0),
        )
        k0, k1 = numba.uint32(k0 + _W0), numba.uint32(k1 + _W1)
    return c0, c1, c2, c3


@numba.njit(cache=True, inline="always")
def normal_pair(x, y):  # type: ignore[no-untyped-def]
    """Two independent normals of two uniform words (Box and Muller): radius sqrt(-2 ln u) with
    u = (x + 1/2) / 2^32, angle 2 pi y / 2^32 - pi / 4. Written out in float32, for a compiler can
    spread these operations over a vector and a library's logarithm and cosine it cannot."""
    u = (_f(x) + _f(0.5)) * _f(2**-32)
    # u = 2^e m with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh((m - 1) / (m + 1)), a short series.
    bits = _f(u).view(np.int32)
    e = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    m = np.int32(bits - (e << np.int32(23))).view(np.float32)
    s = (m - _f(1)) / (m + _f(1))
    z = s * s
    series = _f(1) + z * (_f(1 / 3) + z * (_f(1 / 5) + z * (_f(1 / 7) + z * _f(1 / 9))))
    radius = np.sqrt(_f(-2) * (_f(e) * _LN2 + _f(2) * s * series))
    # Two bits say the quadrant; what is left is within pi / 4 of its middle: Taylor's series.
    t = _f(np.int32(y & np.uint32(0x3FFFFFFF)) - np.int32(1 << 29)) * _f(math.pi / 2 * 2**-30)
    q = t * t
    sine = t * (
        _f(1) - q * (_f(1 / 6) - q * (_f(1 / 120) - q * (_f(1 / 5040) - q * _f(1 / 362880))))
    )
    cosine = _f(1) - q * (_f(1 / 2) - q * (_f(1 / 24) - q * (_f(1 / 720) - q * _f(1 / 40320))))
    odd = (y >> np.uint32(30)) & np.uint32(1)
    radius = -radius if y >> np.uint32(31) else radius
    return radius * (-sine if odd else cosine), radius * (cosine if odd else sine)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _fill(streams, out):  # type: ignore[no-untyped-def]
    """Each row of `out`, float32 [B, 4 G], from its stream, uint32 [B, 5]."""
    groups = out.shape[1] // 4
    for row in range(len(out)):
        k0, k1, c1, c2, c3 = streams[row]
        to = out[row]
        for i in range(groups):
            w0, w1, w2, w3 = words(numba.uint32(i), c1, c2, c3, k0, k1)
            to[i], to[i + 2 * groups] = normal_pair(w0, w1)
            to[i + groups], to[i + 3 * groups] = normal_pair(w2, w3)
