"""The store: a batch read of rows that are in its caches, and a batch write."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from bench.pieces.served import Served, batch
from featserve.codec import encode_keys
from featserve.engine import encode_rows


def test_read_many(benchmark: BenchmarkFixture, served: Served, count: int) -> None:
    """Read rows by key."""
    prefix = served.plans.view("account").prefix
    keys = [prefix + key for key in encode_keys(list(served.keys(count).columns.values()))]
    assert None not in benchmark(served.store.read_many, keys)


def test_write_many(benchmark: BenchmarkFixture, served: Served) -> None:
    """Write 100 rows over rows with the same stamps."""
    keys, rows = encode_rows(served.plans.view("account"), batch(100))
    assert benchmark(served.store.write_many, keys, rows) == 100
