"""What every test shares: one seed for a run, printed so that a failure on random data can be repeated."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from featserve.offline import OfflineEngine, open_engine
from tests.disk import SmallDisk, mounted

SEED = int(os.environ.get("FEATSERVE_SEED") or secrets.randbits(32))

# The machines that run the tests are shared, so a slow example says nothing about the code.
hypothesis.settings.register_profile("featserve", deadline=None, print_blob=True)
hypothesis.settings.load_profile("featserve")


def pytest_report_header() -> str:
    return f"seed: {SEED} (repeat with FEATSERVE_SEED={SEED})"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"seed: {SEED} (repeat with FEATSERVE_SEED={SEED})")


@pytest.fixture
def seed() -> int:
    """Return the seed of this run: random, or $FEATSERVE_SEED."""
    return SEED


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """Return a generator of random numbers that starts at the run's seed, whatever other tests ran before."""
    return np.random.default_rng(seed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Give a disk with 6 MiB free."""
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk") as disk:
        yield disk


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
