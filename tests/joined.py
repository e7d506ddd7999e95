"""The offline engine and the sources of ``training_world`` as fixtures.

A plugin: a test module takes it with ``pytest_plugins = ["tests.joined"]``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from featserve.offline import OfflineEngine
from tests.training_world import write_sources


@pytest.fixture(scope="session")
def engine(duckdb_engine: OfflineEngine) -> OfflineEngine:
    return duckdb_engine


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the sources, which tests leave alone."""
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder
