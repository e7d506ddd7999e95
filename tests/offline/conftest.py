"""The engines that every test of the contract runs over."""

from __future__ import annotations

import pytest

from featserve.offline import OfflineEngine


@pytest.fixture(params=["duckdb", pytest.param("spark", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> OfflineEngine:
    """Give each engine in turn."""
    found: OfflineEngine = request.getfixturevalue(f"{request.param}_engine")
    return found
