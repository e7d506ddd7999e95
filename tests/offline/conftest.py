"""The engines that every test of the contract runs over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from featserve.offline import OfflineEngine, open_engine


@pytest.fixture(scope="session")
def duckdb_engine() -> Iterator[OfflineEngine]:
    engine = open_engine("duckdb")
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def spark_engine() -> Iterator[OfflineEngine]:
    """Start Spark once: it takes seconds."""
    engine = open_engine("spark", memory_limit="2g")
    yield engine
    engine.close()


@pytest.fixture(params=["duckdb", pytest.param("spark", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> OfflineEngine:
    found: OfflineEngine = request.getfixturevalue(f"{request.param}_engine")
    return found
