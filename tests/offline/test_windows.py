"""Windows in the temporal join: every aggregate over every kind of window, against the naive oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve.definitions import ParquetSource, Selection
from featserve.matrix import Status
from featserve.offline import OfflineEngine
from featserve.offline.join import JoinedView, join
from featserve.types import NEVER_US, Timestamp
from tests.offline.worlds import array
from tests.windows_model import TYPES, History, answers, make_history

SOURCE = ParquetSource("events.parquet", event_time="happened", known_at="known")


def write(history: History, folder: Path) -> None:
    """Write the events as the source's file, in order of their sequence."""
    columns = {name: array(type, [e.values[name] for e in history.events]) for name, type in TYPES.items()}
    columns["happened"] = array(Timestamp, [e.event_time_us for e in history.events])
    columns["known"] = array(Timestamp, [e.known_at_us for e in history.events])
    pq.write_table(pa.table(columns), folder / "events.parquet", row_group_size=50)


def joined(engine: OfflineEngine, history: History, folder: Path, names: Sequence[str] = ()) -> JoinedView:
    view = history.view
    keys = {
        name: array(type, [key[i] for _, key in history.asked])
        for i, (name, type) in enumerate(view.entity.keys.items())
    }
    times = np.array([time_us for time_us, _ in history.asked], np.int64)
    selection = Selection(view, tuple(names) or tuple(f.name for f in view.features))
    (found,) = join(engine, pa.table(keys), times, [selection], root=folder)
    return found


def differences(history: History, found: JoinedView) -> tuple[int, list[str]]:
    """Return how many cells were compared with the oracle, and which differ."""
    wrong: list[str] = []
    cells = 0
    columns = {name: values(column) for name, column in found.columns.items()}
    for row, (time_us, key) in enumerate(history.asked):
        newest, expected = answers(history.view, history.events, key, time_us)
        status = Status.NOT_FOUND if None in key else Status.PRESENT
        event_time_us = NEVER_US if newest is None else newest
        if (found.status[row], found.event_time_us[row]) != (status, event_time_us):
            wrong.append(f"row {row}: {found.status[row]}, {found.event_time_us[row]}; expected {event_time_us}")
        for name, column in columns.items():
            cells += 1
            if not (column[row] is None if None in key else expected[name].agrees(column[row])):
                wrong.append(f"row {row}: {name} is {column[row]!r}, expected {expected[name]}")
    return cells, wrong


def values(column: Any) -> list[Any]:
    """Return the Python values of a column, instants as microseconds."""
    if pa.types.is_timestamp(column.type):
        column = pa.chunked_array([chunk.view(pa.int64()) for chunk in column.chunks], pa.int64())
    return list(column.to_pylist())


@pytest.mark.parametrize("number", range(8))
def test_random_histories(duckdb_engine: OfflineEngine, rng: np.random.Generator, tmp_path: Path, number: int) -> None:
    """Every cell of a random history, late, tied and repeated events included, is the oracle's."""
    history = make_history(rng, source=SOURCE, lonely=number == 0, events=0 if number == 1 else 60)
    write(history, tmp_path)
    _, wrong = differences(history, joined(duckdb_engine, history, tmp_path))
    assert not wrong, [history.view.to_dict()["aggregates"], wrong[:10]]
