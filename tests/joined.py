"""The offline engine and the sources of ``training_world`` as fixtures.

A plugin: a test module takes it with ``pytest_plugins = ["tests.joined"]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from featserve.offline import OfflineEngine, open_engine
from tests.training_world import write_sources


@pytest.fixture(scope="module")
def engine() -> Iterator[OfflineEngine]:
    engine = open_engine("duckdb")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the sources, which tests leave alone."""
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder
