"""The codec: rows and keys to bytes and back."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from bench.pieces.served import Served, batch
from featserve.codec import encode_keys


def test_encode_rows(benchmark: BenchmarkFixture, served: Served) -> None:
    """Encode 1,000 rows."""
    codec, rows = served.plans.view("account").codec, batch(1_000)
    assert len(benchmark(codec.encode, rows)) == 1_000


def test_decode_rows(benchmark: BenchmarkFixture, served: Served, count: int) -> None:
    """Decode rows into arrays."""
    codec = served.plans.view("account").codec
    rows = codec.encode(batch(count))
    assert len(benchmark(codec.decode, rows).fixed) == count


def test_encode_keys(benchmark: BenchmarkFixture, served: Served, count: int) -> None:
    """Encode keys of one integer column."""
    columns = list(served.keys(count).columns.values())
    assert len(benchmark(encode_keys, columns)) == count
