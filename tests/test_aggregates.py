"""The table of aggregates: both forms of each, in any grouping of any events, against the oracle's aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from featserve.aggregates import AGGREGATES, DISTINCT_COUNT, Aggregator, Order
from featserve.definitions import Aggregate, Rolling
from featserve.types import Bool, Bytes, Float32, Float64, Int32, Int64, String, Timestamp, Type, Vector, column
from tests.offline.worlds import array
from tests.windows_model import DAY, TYPES, Event, aggregated

COLUMNS: dict[Type, list[Any]] = {
    Float64: [1.5, -2.25, 0.1, 0.0, -0.0, 1e9 + 0.125, 1e-9, 1e15],
    Float32: [0.5, -0.0, 0.0, float(np.float32(0.1)), -3.0],
    Int64: [0, 1, -7, 2**53 + 1, 2**63 - 1, -(2**63)],
    Int32: [0, 1, -1, 2**31 - 1, -(2**31)],
    String: ["x", "y", "", "é", "long " * 9],
    Bytes: [b"", b"\0", b"\xff", b"a\0b"],
    Bool: [True, False],
    Timestamp: [0, -1, 1_700_000_000_000_000],
}
NAMES = {Float64: "amount", Float32: "ratio", Int64: "quantity", Int32: "small", String: "kind", Bytes: "body",
         Bool: "flag", Timestamp: "at"}  # fmt: skip
CASES = [
    pytest.param(function, type, id=f"{function} of {type}")
    for function, made in AGGREGATES.items()
    for type in COLUMNS
    if made(type) is not None
]


def made_of(function: str, type: Type) -> Aggregator:
    made = AGGREGATES[function](type)
    assert made is not None
    return made


def some_events(rng: np.random.Generator, type: Type, count: int) -> list[Event]:
    """Return events of few distinct times and values, so that ties are common."""
    pool = COLUMNS[type]
    times = rng.integers(0, 4, (count, 2)).tolist()
    return [
        Event(event, known, sequence, {NAMES[type]: pool[rng.integers(len(pool))]})
        for sequence, (event, known) in enumerate(times)
    ]


def oracle(function: str, type: Type, events: Sequence[Event]) -> Any:
    return aggregated(Aggregate("f", function, NAMES[type], over=Rolling(DAY)), events, 10)


@pytest.mark.parametrize(("function", "type"), [case for case in CASES if case.values[0] != DISTINCT_COUNT])
def test_numpy_form(rng: np.random.Generator, function: str, type: Type) -> None:
    """Partials of events merged in any grouping and order, and merged again, give the oracle's value.

    But for distinct counts, whose partials are the values themselves: whoever merges those keeps each once.
    """
    made = made_of(function, type)
    for count in (1, 2, 3, 50):
        events = some_events(rng, type, count)
        values = [e.values[NAMES[type]] for e in events]
        codes = {value: i for i, value in enumerate(dict.fromkeys(values))}
        given = np.array([codes[v] for v in values]) if type.variable else column(type, values).values
        order = Order(*np.array([e.order for e in events], np.int64).T)
        partials = made.prepare(given, order)
        assert [p.dtype for p in partials] == list(made.dtypes)
        while len(partials[0]) > 1:
            shuffled = rng.permutation(len(partials[0]))
            starts = np.unique([0, *rng.integers(0, len(shuffled), max(1, len(shuffled) // 3))])
            partials = made.merge(tuple(p[shuffled] for p in partials), starts)
            assert [p.dtype for p in partials] == list(made.dtypes)
        found, valid = made.finalize(partials)
        value = None if valid is not None and not valid[0] else found[0].item()
        if type.variable and made.output is type:
            value = next(v for v, code in codes.items() if code == value)
        assert oracle(function, type, events).agrees(value), (function, values, value)


@pytest.mark.parametrize(("function", "type"), CASES)
def test_pairs_are_merged_as_groups(rng: np.random.Generator, function: str, type: Type) -> None:
    """Where one function of NumPy merges two groups, it makes of them what the merge of many does, to the last bit."""
    made = made_of(function, type)
    if made.ufunc is None:
        return
    values = np.array(COLUMNS[type] * 2, type.dtype)
    partials = made.prepare(rng.permutation(values), Order(*np.zeros((3, len(values)), np.int64)))
    merged = made.merge(partials, np.arange(0, len(values), 2))
    pairs = [made.ufunc(part[::2], part[1::2]) for part in partials]
    assert [part.tobytes() for part in merged] == [part.tobytes() for part in pairs]


@pytest.mark.parametrize("value", [-1, 1, -(2**31), 2**31 - 1])
def test_sums_of_millions_of_integers_lose_nothing(value: int) -> None:
    """The sum of more integers than float64 has room for the halves of is exact, and the mean as exact as a float."""
    events = 2**22 + 1
    values, none = np.full(events, value, np.int64), np.zeros(1, np.int64)
    order = Order(values, values, values)
    for function, expected in (("sum", events * value), ("mean", pytest.approx(value, rel=1e-15))):
        made = made_of(function, Int64)
        found, _ = made.finalize(made.merge(made.prepare(values, order), none))
        assert found[0] == expected


@pytest.mark.parametrize(("function", "type"), CASES)
def test_sql_form(rng: np.random.Generator, function: str, type: Type) -> None:
    """Partials of any groups of events, merged and finalized in SQL, give the oracle's value; nulls are left out."""
    form = made_of(function, type).sql
    for count in (0, 1, 2, 3, 50):
        events = some_events(rng, type, count)
        groups = rng.integers(0, max(1, count // 3), count)
        if function == DISTINCT_COUNT:  # as the queries do: each value once
            events = list({e.values[NAMES[type]]: e for e in events}.values())
            groups = groups[: len(events)]
        rows = [*((e.order, e.values[NAMES[type]]) for e in events), ((1, 1, count), None)]
        numbers = pa.array([*groups.tolist(), 0], pa.int64())
        values = array(type, [value for _, value in rows])
        values = values.view(pa.int64()) if type is Timestamp else values
        order = [pa.array(numbers, pa.int64()) for numbers in zip(*(order for order, _ in rows), strict=True)]
        names = ["_event_time", "_known_at", "_sequence"]
        connection = duckdb.connect()
        connection.register("events", pa.table({"g": numbers, "x": values, **dict(zip(names, order, strict=True))}))
        calls = ", ".join(f"{call.format(x='x')} AS {name}" for name, call in form.partials.items())
        centered = ""
        if form.center:
            centered = f", {form.center.format(**{name: name for name in form.partials}, group='()')} AS center"
        names_ = {name: name for name in form.partials} | {"center": "center"}
        merged = {name: call.format(**names_) for name, call in form.merge.items()}
        query = f"""SELECT {form.finalize.format(**merged)} AS value
            FROM (SELECT *{centered} FROM (SELECT {calls} FROM events GROUP BY g))"""
        value = connection.sql(query).to_arrow_table().column("value").to_pylist()[0]
        assert oracle(function, type, events).agrees(value), (function, rows, value)


@pytest.mark.parametrize(("function", "type"), CASES)
def test_each_function_says_what_it_is_of_nothing(function: str, type: Type) -> None:
    """What an entry has as its empty value is the oracle's of no event."""
    assert AGGREGATES[function].empty == oracle(function, type, []).value


def test_each_function_says_what_it_takes() -> None:
    """Numbers are summed and averaged, whatever has an order has a least and a greatest, no vector is aggregated."""
    takes = {function: {str(type) for type in TYPES.values() if made(type)} for function, made in AGGREGATES.items()}
    numbers = {"float64", "float32", "int64", "int32"}
    assert takes["sum"] == takes["mean"] == takes["stddev"] == numbers
    assert takes["min"] == takes["max"] == {*numbers, "timestamp"}
    for function in ("count", "first", "last", DISTINCT_COUNT):
        assert takes[function] == {*numbers, "timestamp", "string", "bytes", "bool"}
    assert [function for function, made in AGGREGATES.items() if made(Vector(2))] == ["count"]
    assert [function for function, made in AGGREGATES.items() if made(None)] == ["count"]
