"""The store: a batch read of rows that were read before, one of rows that are in RocksDB alone, and a batch write."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from bench.pieces.served import Served, batch
from featserve.codec import encode_keys
from featserve.engine import encode_rows
from featserve.store.rocksdb import RocksStore


def test_read_many(benchmark: BenchmarkFixture, served: Served, count: int) -> None:
    """Read rows by key, from the cache of rows."""
    assert None not in benchmark(served.store.read_many, keys_of(served, count))


def test_read_rocksdb(benchmark: BenchmarkFixture, served: Served, count: int) -> None:
    """Read rows by key, past the cache of rows."""
    assert isinstance(served.store, RocksStore)
    assert None not in benchmark(served.store._read, keys_of(served, count))


def keys_of(served: Served, count: int) -> list[bytes]:
    """Return the store's keys of random entities."""
    prefix = served.plans.view("account").prefix
    return [prefix + key for key in encode_keys(list(served.keys(count).columns.values()))]


def test_write_many(benchmark: BenchmarkFixture, served: Served) -> None:
    """Write 100 rows over rows with the same stamps."""
    keys, rows = encode_rows(served.plans.view("account"), batch(100))
    assert benchmark(served.store.write_many, keys, rows) == 100
