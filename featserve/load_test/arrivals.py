"""When requests arrive, and which of n things each asks for: random numbers of a seed, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import numpy as np

from featserve.batch import Int64s
from featserve.types import Array

BLOCK = 1_024
MAX_SIZE = 2**31
"""The most things that can be drawn from: positions are scattered by a product that fits int64."""


def poisson(rate: float, random: np.random.Generator) -> Iterator[int]:
    """Yield without end the instants, in nanoseconds from 0, of a Poisson process of ``rate`` a second.

    Its gaps are exponential and independent: the arrivals of many callers that know nothing of one another.
    """
    last_s = 0.0
    while True:
        instants_s = last_s + np.cumsum(random.exponential(1 / rate, BLOCK))
        last_s = float(instants_s[-1])
        yield from (instants_s * 1e9).astype(np.int64).tolist()


def positions(size: int, exponent: float, count: int, random: np.random.Generator) -> Int64s:
    """Return ``count`` positions from 0 to ``size`` - 1, int64.

    ``exponent``: 0 draws all equally often; above it, the position of rank k is drawn in proportion to k**-exponent
    (Zipf). Ranks are scattered over the positions, so that what is asked for most does not lie together.
    """
    if exponent == 0:
        return random.integers(0, size, count)
    stride = max(1, int(size * 0.618))
    while gcd(stride, size) != 1:
        stride += 1
    return (_zipf(size, exponent, count, random) - 1) * stride % size


def _zipf(size: int, exponent: float, count: int, random: np.random.Generator) -> Int64s:
    """Return ranks from 1 to ``size`` by rejection-inversion (Hoermann and Derflinger 1996), which needs no table."""
    low, high = _area(np.float64(1.5), exponent) - 1.0, _area(np.float64(size + 0.5), exponent)
    sure = 2.0 - _area_inverse(_area(np.float64(2.5), exponent) - 2.0**-exponent, exponent)
    drawn: list[Int64s] = []
    missing = count
    while missing > 0:
        area = high + random.random(missing + 16) * (low - high)
        x = _area_inverse(area, exponent)
        rank = np.clip(np.rint(x), 1, size)
        kept = (rank - x <= sure) | (area >= _area(rank + 0.5, exponent) - rank**-exponent)
        drawn.append(rank[kept].astype(np.int64))
        missing -= len(drawn[-1])
    return np.concatenate(drawn)[:count]


def _area(x: Array | np.float64, exponent: float) -> Array:
    """Return the area under t**-exponent from 1 to x."""
    logarithm = np.log(x)
    power = (1.0 - exponent) * logarithm
    return np.asarray(np.where(power == 0, logarithm, np.expm1(power) / (1.0 - exponent if exponent != 1 else 1.0)))


def _area_inverse(area: Array, exponent: float) -> Array:
    if exponent == 1:
        return np.asarray(np.exp(area))
    return np.asarray(np.exp(np.log1p(np.maximum(area * (1.0 - exponent), -1.0 + 1e-15)) / (1.0 - exponent)))
