"""The random numbers of a load test, and its histograms, against what NumPy and arithmetic say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from featserve.load_test import (
    Histogram,
)
from featserve.load_test.arrivals import MAX_SIZE, poisson, positions
from featserve.load_test.histogram import HIGHEST_NS, QUANTILES, RELATIVE_ERROR, samples_needed

SEEDS = range(5)


def random_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def recorded(values: Any) -> Histogram:
    histogram = Histogram()
    for value in np.asarray(values).tolist():
        histogram.record(value)
    return histogram


def take(instants: Iterator[int], until_ns: int) -> list[int]:
    found: list[int] = []
    for instant in instants:
        if instant >= until_ns:
            return found
        found.append(instant)
    raise AssertionError


@pytest.mark.parametrize("seed", SEEDS)
def test_arrivals_are_a_poisson_process(seed: int) -> None:
    """Counts of a second have the mean and the variance of their rate, and gaps have no memory."""
    rate, seconds = 1_000.0, 200
    instants = np.array(take(poisson(rate, random_of(seed)), seconds * 10**9))
    counts = np.bincount(instants // 10**9, minlength=seconds)
    gaps = np.diff(instants) / 1e9
    assert (gaps >= 0).all()
    # Five standard errors each.
    assert abs(counts.mean() - rate) < 5 * np.sqrt(rate / seconds)
    assert abs(counts.var() / rate - 1) < 5 * np.sqrt(2 / seconds)
    assert abs(gaps.std() * rate - 1) < 5 / np.sqrt(len(gaps))
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 5 / np.sqrt(len(gaps))


def test_arrivals_of_processes_differ_and_come_again() -> None:
    """A seed gives the same arrivals again, and each process its own."""
    first, second = np.random.SeedSequence(3).spawn(2)
    streams = [take(poisson(100, np.random.default_rng(seed)), 10**9) for seed in (first, second, first)]
    assert streams[0] == streams[2] != streams[1]


@pytest.mark.parametrize("exponent", [0.5, 0.99, 1.0, 1.5, 3.0])
def test_zipf_has_its_shape(exponent: float) -> None:
    """Each rank is drawn as often as k**-exponent says, within the noise of the draws."""
    size, draws = 50, 200_000
    drawn = positions(size, exponent, draws, random_of(round(exponent * 100)))
    counts = np.sort(np.bincount(drawn, minlength=size))[::-1]
    weights = np.arange(1, size + 1) ** -exponent
    expected = draws * weights / weights.sum()
    chi_squared = float(((counts - expected) ** 2 / np.maximum(expected, 5)).sum())
    assert chi_squared < 49 + 6 * np.sqrt(2 * 49), chi_squared


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("size", [1, 2, 3, 10, 1_000_003, MAX_SIZE])
def test_positions_are_of_the_range(size: int, exponent: float) -> None:
    """Every position is one of the range, for ranges of 1 to 2**31."""
    drawn = positions(size, exponent, 5_000, random_of(size))
    assert len(drawn) == 5_000
    assert drawn.min() >= 0
    assert drawn.max() < size
    assert size > 10 or len(set(drawn.tolist())) == size


def test_popular_keys_do_not_lie_together() -> None:
    """The ten most popular of a million positions lie in ten different thousandths of it."""
    drawn = positions(1_000_000, 1.2, 100_000, random_of(1))
    values, counts = np.unique(drawn, return_counts=True)
    top = values[np.argsort(counts)[-10:]]
    assert len(set((top // 1_000).tolist())) == 10


@pytest.mark.parametrize("seed", SEEDS)
def test_histogram_is_as_exact_as_it_says(seed: int) -> None:
    """Each quantile is within 1/512 of NumPy's exact one, whatever the latencies are like."""
    random = random_of(seed)
    shapes = (
        random.lognormal(12, 2, 20_000).astype(np.int64),
        random.integers(0, 600, 5_000),
        random.integers(0, HIGHEST_NS, 5_000),
        2 ** random.integers(0, 40, 5_000) - random.integers(0, 2, 5_000),
        np.full(300, 123_456_789),
    )
    for values in shapes:
        histogram = recorded(values)
        assert histogram.count == len(values)
        for quantile in (*QUANTILES.values(), 0.25, 1.0):
            exact = np.quantile(values, quantile, method="inverted_cdf")
            assert abs(histogram.quantile_ns(quantile) - exact) <= RELATIVE_ERROR * exact


def test_histograms_merge_and_keep() -> None:
    """Merged histograms count what each did, and JSON gives back the same one."""
    random = random_of(7)
    parts = [random.lognormal(12, 1, 3_000).astype(np.int64) for _ in range(3)]
    merged = recorded(parts[0]).merge(map(recorded, parts[1:]))
    assert merged.counts == recorded(np.concatenate(parts)).counts
    assert Histogram.from_json(json.loads(json.dumps(merged.to_json()))).counts == merged.counts
    assert np.isnan(Histogram().quantile_ns(0.5))


@pytest.mark.parametrize(("name", "samples"), [("p99", 10_000), ("p99.9", 100_000), ("p99.99", 1_000_000)])
def test_a_quantile_takes_samples(name: str, samples: int) -> None:
    """A p99 is told from 10,000 samples on, and so on."""
    assert samples_needed(QUANTILES[name]) == samples
    histogram = Histogram()
    histogram.counts[200] = samples - 1
    assert histogram.told_ns(QUANTILES[name]) is None
    histogram.record(200)
    assert histogram.told_ns(QUANTILES[name]) == 200
