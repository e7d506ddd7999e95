"""Latencies as counts in buckets: constant memory however many there are, and quantiles of a known error.

The layout is that of HdrHistogram (Gil Tene): each power of two is cut into 256 buckets of one width, so a bucket is at
most 1/256 of its values wide. A quantile is told as the middle of its bucket, at most 1/512 (0.2 %) from the value that
was recorded; below 512 ns it is exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import numpy as np

SUB_BITS = 8
HIGHEST_BITS = 40
HIGHEST_NS = 2**HIGHEST_BITS - 1
"""The greatest latency that is told apart, 18 minutes; what is longer counts as that."""
BUCKETS = (HIGHEST_BITS - SUB_BITS + 1) << SUB_BITS
RELATIVE_ERROR = 2.0 ** -(SUB_BITS + 1)

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}
BEYOND = 100
"""How many samples must lie beyond a quantile before it is told: 10,000 samples for a p99, 100,000 for a p99.9."""


def samples_needed(quantile: float) -> int:
    """Return how many samples it takes to tell a quantile."""
    return round(BEYOND / (1 - quantile))


class Histogram:
    """Counts of latencies in nanoseconds. ``record`` takes well under a microsecond."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS

    def record(self, value_ns: int) -> None:
        """Count one latency."""
        value = min(max(value_ns, 0), HIGHEST_NS)
        shift = value.bit_length() - SUB_BITS - 1
        self.counts[value if shift <= 0 else (shift << SUB_BITS) + (value >> shift)] += 1

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile_ns(self, quantile: float) -> float:
        """Return the least latency that at least this part of all do not exceed (NumPy's "inverted_cdf").

        NaN where nothing was recorded. Says nothing of whether there are enough samples: see ``told_ns``.
        """
        ends = np.cumsum(self.counts)
        if ends[-1] == 0:
            return float("nan")
        rank = max(1, int(np.ceil(quantile * int(ends[-1]) * (1 - 1e-12))))  # 0.99 * 100 is a little over 99
        return _middle_ns(int(np.searchsorted(ends, rank)))

    def told_ns(self, quantile: float) -> float | None:
        """Return a quantile, None where there are too few samples for it."""
        return self.quantile_ns(quantile) if self.count >= samples_needed(quantile) else None

    def merge(self, others: Iterable[Histogram]) -> Histogram:
        """Return the counts of this and others together."""
        merged = Histogram()
        merged.counts = np.sum([self.counts, *(other.counts for other in others)], axis=0).tolist()
        return merged

    def to_json(self) -> dict[str, list[int]]:
        """Return the buckets that are not empty, and their counts."""
        buckets = [i for i, count in enumerate(self.counts) if count]
        return {"buckets": buckets, "counts": [self.counts[i] for i in buckets]}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Return the histogram that ``to_json`` gave; raises ValueError, KeyError, TypeError or IndexError."""
        made = cls()
        for bucket, count in zip(value["buckets"], value["counts"], strict=True):
            if not (0 <= bucket < BUCKETS and count >= 0):
                raise ValueError(f"bucket {bucket} holds {count}")
            made.counts[bucket] = int(count)
        return made


def _middle_ns(bucket: int) -> float:
    shift = max((bucket >> SUB_BITS) - 1, 0)
    lowest = (bucket - (shift << SUB_BITS)) << shift
    return lowest + ((1 << shift) - 1) / 2
