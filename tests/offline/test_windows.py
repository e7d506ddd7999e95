"""Windows in the temporal join: every aggregate over every kind of window, against the naive oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve.definitions import (
    Aggregate,
    Calendar,
    EventSource,
    FeatureView,
    Hopping,
    ParquetSource,
    Rolling,
    Selection,
    Window,
    col,
)
from featserve.matrix import Status
from featserve.offline import OfflineEngine
from featserve.offline.join import JoinedView, join
from featserve.types import NEVER_US, Timestamp
from tests.offline.worlds import array
from tests.windows_model import (
    DAY,
    FIELDS,
    HOUR,
    HOUR_US,
    LEAST,
    MOST,
    TYPES,
    USER,
    WEEKS,
    WINDOWS,
    Event,
    History,
    answers,
    edge_history,
    every_aggregate,
    make_history,
)

SOURCE = ParquetSource("events.parquet", event_time="happened", known_at="known")
OF_EACH_KIND: tuple[Window, ...] = (
    Rolling(HOUR),
    Hopping(7 * DAY, HOUR),
    Calendar(7, "day", "America/New_York"),
    Calendar(2, "day", "America/Sao_Paulo"),
)


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


@pytest.mark.parametrize(
    ("engine", "number"),
    [*(("duckdb", n) for n in range(8)), pytest.param("spark", 2, marks=pytest.mark.slow)],
    indirect=["engine"],
)
def test_random_histories(engine: OfflineEngine, seed: int, tmp_path: Path, number: int) -> None:
    """Every cell of a random history, late, tied, repeated and corrected events included, is the oracle's."""
    rng = np.random.default_rng([seed, number])
    history = make_history(rng, source=SOURCE, lonely=number == 0, events=0 if number == 1 else 60, corrected=True)
    write(history, tmp_path)
    _, wrong = differences(history, joined(engine, history, tmp_path))
    assert not wrong, [history.view.to_dict()["aggregates"], wrong[:10]]


def test_edges_at_clock_changes(engine: OfflineEngine, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """At each clock change of a zone's year windows of every kind begin and end at the oracle's microsecond."""
    spark = request.node.callspec.params["engine"] == "spark"
    history = edge_history(SOURCE, OF_EACH_KIND if spark else WINDOWS)
    write(history, tmp_path)
    cells, wrong = differences(history, joined(engine, history, tmp_path))
    assert cells == len(history.asked) * len(history.view.features)
    assert not wrong, wrong[:10]


def test_every_function_over_every_kind(engine: OfflineEngine, rng: np.random.Generator, tmp_path: Path) -> None:
    """Each aggregate of each column that it takes, over each kind of window, is the oracle's."""
    history = make_history(rng, source=SOURCE, events=200, asked=50)
    write(history, tmp_path)
    for window in WEEKS:
        aggregates = every_aggregate(window)
        asked = replace(history, view=replace(history.view, aggregates=aggregates, features=()))
        cells, wrong = differences(asked, joined(engine, asked, tmp_path))
        assert cells == 50 * len(aggregates)
        assert not wrong, wrong[:10]


@pytest.mark.parametrize(
    ("engine", "hours"),
    [*(("duckdb", hours) for hours in (0, 5, 300)), pytest.param("spark", 5, marks=pytest.mark.slow)],
    indirect=["engine"],
)
def test_a_declared_delay(engine: OfflineEngine, rng: np.random.Generator, tmp_path: Path, hours: int) -> None:
    """Events that are known a constant time after they happen, be it longer than their windows, count from then on."""
    source = ParquetSource("events.parquet", event_time="happened", delay=hours * HOUR)
    history = make_history(rng, source=source, corrected=True)
    events = [replace(e, known_at_us=e.event_time_us + hours * HOUR_US) for e in history.events]
    history = replace(history, events=events)
    write(history, tmp_path)
    _, wrong = differences(history, joined(engine, history, tmp_path))
    assert not wrong, wrong[:10]


def test_the_ends_of_time(duckdb_engine: OfflineEngine, tmp_path: Path) -> None:
    """Events and labels at the ends of int64 are aggregated like any others, over windows as long as there are."""
    instants = [LEAST, LEAST + 1, -(2**62), -(2**61) - 1, -(2**61), -1, 0, 1, 2**61, 2**61 + 1, 2**62, MOST - 1, MOST]
    base: dict[str, Any] = dict.fromkeys(TYPES) | {"user_id": 1, "region": "a", "event_id": "x"}
    events = [
        Event(t, k, i, base | {"quantity": i, "event_id": str(i)})
        for i, (t, k) in enumerate((t, k) for t in instants for k in (t, instants[(instants.index(t) + 5) % 13]))
    ]
    windows: list[Window] = [Rolling(timedelta(microseconds=us)) for us in (1, 2**61, 2**62 + 7, 2**63 - 1)]
    windows.append(Hopping(HOUR, HOUR))
    aggregates = [Aggregate(f"f{i}", "sum", "quantity", over=window) for i, window in enumerate(windows)]
    source = EventSource("events", FIELDS, source=SOURCE)
    view = FeatureView("windowed", USER, events=source, aggregates=aggregates)
    history = History(view, events, [(t, (1,)) for t in instants])
    write(history, tmp_path)
    _, wrong = differences(history, joined(duckdb_engine, history, tmp_path))
    assert not wrong, wrong[:10]


@pytest.mark.parametrize(
    ("engine", "rest"),
    [
        *(("duckdb", rest) for rest in [(0.0,), (1.0,), (-2.0, -1.0), (-1.0, 3.0), (1.0, 3.0)]),
        pytest.param("spark", (-1.0, 3.0), marks=pytest.mark.slow),
    ],
    indirect=["engine"],
)
def test_nan_in_a_file_whose_statistics_show_none(
    engine: OfflineEngine, tmp_path: Path, rest: tuple[float, ...]
) -> None:
    """Conditions and values take NaN for null also where a column has no null, and its statistics lie on any side of 0.

    Statistics of Parquet leave NaN out, and DuckDB believes them.
    """
    base: dict[str, Any] = dict.fromkeys(TYPES) | {"user_id": 1, "region": "a"}
    events = [
        Event(i, i, i, base | {"amount": amount, "quantity": i, "event_id": str(i)})
        for i, amount in enumerate((math.nan, *rest))
    ]
    conditions = (None, col("amount") > 0, ~(col("amount") > 0), col("amount").is_null(), col("amount") != 1)
    aggregates = [
        Aggregate(f"{function}_{of}_{i}", function, of, over=Rolling(HOUR), where=where)
        for i, where in enumerate(conditions)
        for function, of in (
            ("count", "quantity"),
            ("distinct_count", "quantity"),
            ("sum", "amount"),
            ("max", "amount"),
        )
    ]
    view = FeatureView("windowed", USER, events=EventSource("events", FIELDS, source=SOURCE), aggregates=aggregates)
    history = History(view, events, [(len(events), (1,))])
    write(history, tmp_path)
    statistics = pq.ParquetFile(tmp_path / "events.parquet").metadata.row_group(0)
    amount = next(statistics.column(i) for i in range(statistics.num_columns)
                  if statistics.column(i).path_in_schema == "amount").statistics  # fmt: skip
    assert (amount.null_count, amount.min, amount.max) == (0, min(rest), max(rest))
    _, wrong = differences(history, joined(engine, history, tmp_path))
    assert not wrong, wrong[:10]


def test_one_feature_of_many(duckdb_engine: OfflineEngine, rng: np.random.Generator, tmp_path: Path) -> None:
    """A service that takes one feature of a view gets the values and event times that all of them would show."""
    history = make_history(rng, source=SOURCE)
    write(history, tmp_path)
    whole = joined(duckdb_engine, history, tmp_path)
    for f in history.view.features:
        alone = joined(duckdb_engine, history, tmp_path, [f.name])
        assert list(alone.columns) == [f.name]
        assert (alone.event_time_us == whole.event_time_us).all()
        _, wrong = differences(history, alone)
        assert not wrong, wrong[:10]


def test_one_entity_with_all_rows(duckdb_engine: OfflineEngine, rng: np.random.Generator, tmp_path: Path) -> None:
    """A hundred thousand events and labels of one entity, half of them late, make no pairs: it takes seconds."""
    count = 100_000
    times = np.sort(rng.integers(0, 30 * 24 * HOUR_US, count))
    known = times + np.where(rng.random(count) < 0.5, 0, rng.integers(0, 48 * HOUR_US, count))
    values = rng.integers(0, 50, count)
    columns = {"user_id": np.ones(count, np.int64), "quantity": values}
    instants = {
        name: pa.array(us).view(pa.timestamp("us", "UTC")) for name, us in (("happened", times), ("known", known))
    }
    pq.write_table(pa.table(columns | instants), tmp_path / "events.parquet")
    fields = [f for f in FIELDS if f.name in columns]
    over = Rolling(7 * DAY)
    view = FeatureView(
        "windowed",
        USER,
        events=EventSource("events", fields, source=SOURCE),
        aggregates=[
            Aggregate("total", "sum", "quantity", over=over),
            Aggregate("greatest", "max", "quantity", over=over),
            Aggregate("different", "distinct_count", "quantity", over=over),
        ],
    )
    asked = rng.integers(0, 30 * 24 * HOUR_US, count)
    keys = pa.table({"user_id": np.ones(count, np.int64)})
    names = tuple(f.name for f in view.features)
    (found,) = join(duckdb_engine, keys, asked, [Selection(view, names)], root=tmp_path)
    for row in rng.integers(0, count, 100).tolist():
        seen = (times > asked[row] - 7 * 24 * HOUR_US) & (times <= asked[row]) & (known <= asked[row])
        expected = (values[seen].sum(), values[seen].max(initial=-1), len(np.unique(values[seen])))
        got = [found.columns[name][row].as_py() for name in names]
        assert (got[0] or 0, -1 if got[1] is None else got[1], got[2]) == expected


@pytest.mark.slow
def test_very_many_cells(
    engine: OfflineEngine, request: pytest.FixtureRequest, rng: np.random.Generator, tmp_path: Path
) -> None:
    """A million random cells on DuckDB, and on Spark those of two histories, not one of which is not the oracle's."""
    spark = request.node.callspec.params["engine"] == "spark"
    enough = 2 * 12 * 500 if spark else 1_000_000
    cells = number = 0
    while cells < enough:
        folder = tmp_path / str(number)
        folder.mkdir()
        history = make_history(rng, source=SOURCE, events=150, asked=500, lonely=number % 5 == 1, corrected=True)
        write(history, folder)
        more, wrong = differences(history, joined(engine, history, folder))
        assert not wrong, [history.view.to_dict()["aggregates"], wrong[:10]]
        cells += more
        number += 1
