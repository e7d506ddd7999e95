"""DuckDB under a memory limit: a join that does not fit spills, and one that cannot says so."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve.definitions import Entity, FeatureView, Field, ParquetSource, Selection
from featserve.errors import TooLarge
from featserve.offline.duckdb import DuckDBEngine
from featserve.offline.join import JoinedView, join
from featserve.types import Float64, Int64
from tests.offline.worlds import NOON

LABELS, USERS = 100_000, 10_000


def write_rows(folder: Path, rng: np.random.Generator, rows: int) -> FeatureView:
    """Write rows that take 48 bytes each in memory, and return their view."""
    event_time_us = NOON + rng.integers(0, 10**9, rows)
    columns = {
        "user_id": rng.integers(0, USERS, rows),
        "event_time": event_time_us.view("M8[us]"),
        "known_at": (event_time_us + rng.integers(0, 10**7, rows)).view("M8[us]"),
        **{f"f{i}": rng.random(rows) for i in range(3)},
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=100_000)
    source = ParquetSource("rows.parquet", event_time="event_time", known_at="known_at")
    features = [Field(f"f{i}", Float64) for i in range(3)]
    return FeatureView("big", Entity("user", {"user_id": Int64}), features, ttl=timedelta(minutes=5), source=source)


def answer(view: FeatureView, folder: Path, memory_limit: str | None) -> JoinedView:
    rng = np.random.default_rng(7)
    keys = pa.table({"user_id": rng.integers(0, USERS, LABELS)})
    times = NOON + rng.integers(0, 10**9, LABELS)
    engine = DuckDBEngine(memory_limit=memory_limit)
    [joined] = join(engine, keys, times, [Selection(view, ("f0", "f1", "f2"))], root=folder)
    return joined


@pytest.mark.slow
def test_a_join_spills_under_a_limit_below_its_input(rng: np.random.Generator, tmp_path: Path) -> None:
    """With a third of the memory that its rows take, the join gives the same answer as with all it wants."""
    view = write_rows(tmp_path, rng, 4_000_000)
    free, limited = answer(view, tmp_path, None), answer(view, tmp_path, "64MB")
    assert np.array_equal(free.status, limited.status)
    assert np.array_equal(free.event_time_us, limited.event_time_us)
    assert free.columns == limited.columns
    assert free.columns["f0"].null_count < LABELS // 2


def test_a_join_that_cannot_run_says_what_it_lacks(rng: np.random.Generator, tmp_path: Path) -> None:
    """A limit that not even spilling helps is an error that names the source and the remedy."""
    view = write_rows(tmp_path, rng, 100_000)
    with pytest.raises(TooLarge, match=r"source of big@1: .*rows\.parquet: the join needs more memory"):
        answer(view, tmp_path, "1MB")
