"""What callers bring: the same values give the same columns, whatever holds them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from featserve.arrow import arrow_type, column_to_arrow
from featserve.batch import EntityKeys
from featserve.errors import InvalidRequest
from featserve.frames import columns_of, mapping, rows_of, times_of
from featserve.types import (
    Bool,
    Bytes,
    Column,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    Timestamp,
    Type,
    Vector,
    column,
)
from tests.random_data import SCALAR_TYPES, Cell, cells_of, random_column

NAN = float("nan")
NOON = dt.datetime(2024, 1, 1, 12, tzinfo=dt.UTC)
NOON_US = 1_704_110_400_000_000
PARIS = dt.timezone(dt.timedelta(hours=1))

Holder = Callable[[pa.Array], Any]
HOLDERS: dict[str, Holder] = {
    "pyarrow table": lambda array: pa.table({"a": array, "more": array}),
    "pyarrow record batch": lambda array: pa.record_batch({"a": array}),
    "pyarrow table of chunks": lambda array: pa.table({"a": pa.chunked_array([array[:3], array[3:]])}),
    "polars": lambda array: pl.DataFrame({"a": pl.from_arrow(array)}),
    "pandas of arrow": lambda array: pa.table({"a": array}).to_pandas(types_mapper=pd.ArrowDtype),
    "pandas of objects": lambda array: pd.DataFrame({"a": pd.Series(array.to_pylist(), dtype=object)}),
    "lists": lambda array: {"a": array.to_pylist()},
    "pyarrow arrays": lambda array: {"a": array},
    "polars series": lambda array: {"a": pl.from_arrow(array)},
    "pandas series": lambda array: {"a": array.to_pandas(types_mapper=pd.ArrowDtype)},
}
NANS_ARE_NULLS = {"pandas of objects"}


def python_range(col: Column) -> Column:
    """Return a column whose instants have datetimes, for those that hold them as such."""
    if col.type is not Timestamp:
        return col
    return Column(Timestamp, np.asarray(col.values) % 10**15, None, col.valid)


def expected_cells(col: Column, holder: str) -> list[Cell]:
    cells = cells_of(col)
    if holder in NANS_ARE_NULLS and col.type.floating and not col.type.vector:
        cells = [None if gone else cell for cell, gone in zip(cells, np.isnan(col.values), strict=True)]
    return cells


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("type", [*SCALAR_TYPES, Vector(3)], ids=str)
def test_every_holder_gives_the_same_column(type: Type, holder: str, rng: np.random.Generator) -> None:
    """Values of any type, with nulls and without, are the same bits from every kind of frame or list."""
    for null_share in (0.0, 0.4, 1.0):
        col = canonical_nans(python_range(random_column(rng, type, 20, null_share=null_share)))
        got = columns_of(HOLDERS[holder](column_to_arrow(col)), {"a": type})["a"]
        assert got.type == type
        assert cells_of(got) == expected_cells(col, holder)


def canonical_nans(col: Column) -> Column:
    """Return a column whose NaNs all have the bits that Python's NaN has; Python values keep no others."""
    if not col.type.floating:
        return col
    values = np.where(np.isnan(col.values), np.asarray(np.nan, col.values.dtype), col.values)
    return Column(col.type, values, None, col.valid)


@pytest.mark.parametrize(
    "holder", ["pyarrow table", "polars", "pyarrow arrays", "polars series", "pyarrow record batch"]
)
def test_instants_of_any_year(holder: str) -> None:
    """Instants that Python has no datetime for are taken from those that hold them."""
    col = Column(Timestamp, np.array([2**63 - 1, -(2**63) + 1, 0]), None, np.array([True, True, False]))
    assert cells_of(columns_of(HOLDERS[holder](column_to_arrow(col)), {"a": Timestamp})["a"]) == cells_of(col)


FRAMES: list[tuple[Type, Any, list[Any]]] = [
    (Bool, pd.DataFrame({"a": [True, False]}), [True, False]),
    (Bool, pd.DataFrame({"a": pd.array([True, None], "boolean")}), [True, None]),
    (Int64, pd.DataFrame({"a": [1, 2]}), [1, 2]),
    (Int64, pd.DataFrame({"a": pd.array([2**63 - 1, None], "Int64")}), [2**63 - 1, None]),
    (Int32, pd.DataFrame({"a": np.array([1, 2], np.int8)}), [1, 2]),
    (Float64, pd.DataFrame({"a": [1.5, None, NAN]}), [1.5, None, None]),
    (Float32, pd.DataFrame({"a": np.array([1.5, NAN], np.float32)}), [1.5, None]),
    (Float64, pd.DataFrame({"a": [1, 2]}), [1.0, 2.0]),
    (Float64, {"a": pd.Series([1.5, None])}, [1.5, None]),
    (Float64, {"a": np.array([1.5, NAN])}, [1.5, NAN]),
    (Float64, {"a": [1.5, NAN, None]}, [1.5, NAN, None]),
    (Float64, pl.DataFrame({"a": [1.5, NAN, None]}), [1.5, NAN, None]),
    (String, pd.DataFrame({"a": ["x", None, "z"]}), ["x", None, "z"]),
    (String, pd.DataFrame({"a": pd.Categorical(["x", None, "x"])}), ["x", None, "x"]),
    (String, pd.DataFrame({"a": pd.Series(["x", NAN], dtype=object)}), ["x", None]),
    (String, pl.DataFrame({"a": pl.Series(["x", None], dtype=pl.Categorical)}), ["x", None]),
    (String, pa.table({"a": pa.array(["x", None, "x"]).dictionary_encode()}), ["x", None, "x"]),
    (String, pa.table({"a": pa.array(["x", None], pa.large_string())}), ["x", None]),
    (Bytes, pd.DataFrame({"a": [b"\0", None]}), [b"\0", None]),
    (Timestamp, pd.DataFrame({"a": pd.Series([NOON.replace(tzinfo=None), None])}), [NOON, None]),
    (Timestamp, pd.DataFrame({"a": pd.to_datetime(["2024-01-01 13:00+01:00"]).tz_convert("Asia/Tokyo")}), [NOON]),
    (Timestamp, pd.DataFrame({"a": pd.Series([NOON, None], dtype="datetime64[ns, UTC]")}), [NOON, None]),
    (Timestamp, pd.DataFrame({"a": [NOON.astimezone(PARIS), None]}), [NOON, None]),
    (Timestamp, {"a": pd.DatetimeIndex(["2024-01-01 12:00"])}, [NOON]),
    (Timestamp, pl.DataFrame({"a": [NOON, None]}), [NOON, None]),
    (Timestamp, pl.DataFrame({"a": [NOON]}).with_columns(pl.col("a").dt.convert_time_zone("Asia/Tokyo")), [NOON]),
    (Timestamp, pl.DataFrame({"a": [NOON.replace(tzinfo=None)]}), [NOON]),
    (Timestamp, pl.DataFrame({"a": [dt.date(2024, 1, 1)]}), [dt.datetime(2024, 1, 1, tzinfo=dt.UTC)]),
    (Timestamp, pa.table({"a": pa.array([NOON_US * 1_000], pa.timestamp("ns", "Asia/Tokyo"))}), [NOON]),
    (Timestamp, pa.table({"a": pa.array([NOON_US // 10**6, None], pa.timestamp("s"))}), [NOON, None]),
    (Timestamp, pa.table({"a": pa.array([dt.date(2024, 1, 1)])}), [dt.datetime(2024, 1, 1, tzinfo=dt.UTC)]),
    (Timestamp, pd.DataFrame({"a": [dt.date(2024, 1, 1)]}), [dt.datetime(2024, 1, 1, tzinfo=dt.UTC)]),
    (Vector(2), pd.DataFrame({"a": [[1, 2], None]}), [[1.0, 2.0], None]),
    (Vector(2), pl.DataFrame({"a": [[1.0, 2.0], None]}), [[1.0, 2.0], None]),
    (Vector(2), pl.DataFrame({"a": pl.Series([[1, 2]], dtype=pl.Array(pl.Float32, 2))}), [[1.0, 2.0]]),
    (Vector(2), {"a": np.array([[1.0, 2.0]])}, [[1.0, 2.0]]),
]


@pytest.mark.parametrize(
    ("type", "frame", "expected"), FRAMES, ids=[f"{t}-{f.__class__.__name__}" for t, f, _ in FRAMES]
)
def test_the_dtypes_of_each_library(type: Type, frame: Any, expected: list[Any]) -> None:
    """Each library's own dtypes are taken; pandas marks nulls by NaN, so a NaN of its numbers is a null."""
    assert repr(columns_of(frame, {"a": type})["a"].to_list()) == repr(expected)


REFUSED: list[tuple[Type, Any, str]] = [
    (Int64, pd.DataFrame({"a": [1, None]}), r"rows.a\[0\]: expected int64, got 1.0 \(float\)"),
    (Int64, pl.DataFrame({"a": [1.0]}), "rows.a: expected int64, got an array of dtype float64"),
    (Int64, pa.table({"a": ["1"]}), r"rows.a\[0\]: expected int64, got '1' \(str\)"),
    (Int64, pa.table({"a": pa.nulls(2, pa.int64())}).drop(["a"]), "missing column 'a'"),
    (Float32, pl.DataFrame({"a": [0.0, 1e39]}), r"rows.a\[1\]: expected float32, got 1e\+39 \(out of range\)"),
    (String, pd.DataFrame({"a": [1]}), "rows.a: expected string, got an array of dtype int64"),
    (String, pl.DataFrame({"a": [b"x"]}), r"rows.a\[0\]: expected string, got b'x' \(bytes\)"),
    (
        Timestamp,
        pd.DataFrame({"a": pd.to_datetime([1], unit="ns")}),
        r"rows.a\[0\]: .*no whole number of micros",
    ),
    (
        Timestamp,
        pl.DataFrame({"a": np.array([2_000, 1], "M8[ns]")}),
        r"rows.a\[1\]: .*no whole number of micros",
    ),
    (Timestamp, pa.table({"a": pa.array([1], pa.timestamp("ns"))}), "no whole number of microseconds"),
    (Timestamp, pa.table({"a": pa.array([2**62], pa.timestamp("s"))}), "out of range"),
    (Timestamp, pl.DataFrame({"a": ["2024-01-01"]}), r"got '2024-01-01' \(str\)"),
    (Vector(2), pl.DataFrame({"a": [[1.0]]}), r"rows.a\[0\]: expected vector\[2\], got 1 elements"),
    (Vector(2), pl.DataFrame({"a": [[1.0, None]]}), "got None"),
    (Int64, pd.DataFrame([[1, 2]], columns=["a", "a"]), "rows.a: the column stands twice in the frame"),
    (Int64, pa.table([pa.array([1]), pa.array([2])], ["a", "a"]), "rows.a: the column stands twice in the frame"),
    (Int64, pl.LazyFrame({"a": [1]}), "rows: a LazyFrame holds no rows yet; collect it first"),
    (Int64, pd.Series([1], name="a"), "rows: expected a mapping of lists or arrays, or a frame, got Series"),
    (Int64, np.zeros((1, 1)), "rows: expected a mapping of lists or arrays, or a frame, got ndarray"),
    (Int64, [("a", [1])], "rows: expected a mapping of lists or arrays, or a frame, got list"),
    (Int64, {"a": [1], "b": [2]}, "unknown column 'b'"),
    (Int64, {"A": [1]}, "missing column 'a'"),
    (Int64, {"a": 1}, "rows.a: expected a list or an array of int64, got 1"),
    (String, {"a": "UA"}, "rows.a: expected a list or an array of string, got 'UA'"),
]


@pytest.mark.parametrize(("type", "frame", "message"), REFUSED, ids=[message[:45] for _, _, message in REFUSED])
def test_what_does_not_fit_is_refused(type: Type, frame: Any, message: str) -> None:
    """Values of another type, and what is no frame, are refused; the message names column, row and value."""
    with pytest.raises(InvalidRequest, match=message):
        columns_of(frame, {"a": type})


def test_columns_of_different_lengths() -> None:
    """Columns of a mapping that differ in length are refused with their lengths."""
    with pytest.raises(InvalidRequest, match="columns: columns differ in length: a has 2, b has 1 rows"):
        columns_of({"a": [1, 2], "b": [1]}, {"a": Int64, "b": Int64})


def test_a_frame_may_hold_more_and_a_mapping_not() -> None:
    """A frame's other columns are left alone; a mapping holds what is meant, so a column too many is a mistake."""
    assert list(mapping(pd.DataFrame({"a": [1], "b": [2]}), ["a", "c"], "keys")) == ["a"]
    assert list(mapping({"a": [1], "b": [2]}, ["a"], "keys")) == ["a", "b"]


def test_keys_come_from_any_frame() -> None:
    """Keys of a request are taken from every kind of frame, in the order of its rows."""
    types = {"user": Int64, "city": String}
    lists = {"city": ["x", "", "é"], "user": [3, 1, 2]}
    for frame in (lists, pd.DataFrame(lists), pl.DataFrame(lists), pa.table(lists)):
        keys = EntityKeys.of(mapping(frame, types, "keys"), types)
        assert {name: col.to_list() for name, col in keys.columns.items()} == lists
        assert list(keys.columns) == ["user", "city"]


TIMES: list[tuple[Any, list[int]]] = [
    (NOON, [NOON_US, NOON_US]),
    (NOON.astimezone(PARIS), [NOON_US, NOON_US]),
    (NOON.replace(tzinfo=None), [NOON_US, NOON_US]),
    (np.datetime64("2024-01-01T12"), [NOON_US, NOON_US]),
    (pd.Timestamp(NOON), [NOON_US, NOON_US]),
    ([NOON, NOON + dt.timedelta(microseconds=1)], [NOON_US, NOON_US + 1]),
    ([NOON_US, 5], [NOON_US, 5]),
    (np.array([NOON_US, 5]), [NOON_US, 5]),
    (np.array(["2024-01-01T12", "1970-01-01"], "M8[s]"), [NOON_US, 0]),
    (pd.Series([NOON, NOON]), [NOON_US, NOON_US]),
    (pd.to_datetime(["2024-01-01 12:00", "1970-01-01 00:00"]), [NOON_US, 0]),
    (pl.Series([NOON, NOON]), [NOON_US, NOON_US]),
    (pa.array([NOON, NOON]), [NOON_US, NOON_US]),
]


@pytest.mark.parametrize(("given", "expected"), TIMES, ids=[given.__class__.__name__ for given, _ in TIMES])
def test_event_times(given: Any, expected: list[int]) -> None:
    """One instant for all rows, or one for each in any form, become int64 microseconds."""
    times = times_of("event_time", given, 2)
    assert times.dtype == np.int64
    assert times.tolist() == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([NOON], "event_time: columns differ in length: event_time has 1, rows has 2 rows"),
        ([NOON, None], "event_time: row 1 is null; every row has one"),
        (pd.NaT, "event_time: row 0 is null"),
        (pd.Series([None, NOON]), "event_time: row 0 is null"),
        (5, "event_time: expected a datetime, datetimes or a column name, got int"),
        (dt.date(2024, 1, 1), "event_time: expected a datetime, datetimes or a column name, got date"),
        (["now", "now"], r"event_time\[0\]: expected timestamp, got 'now'"),
        (pd.Timestamp(1, unit="ns"), "no whole number of microseconds"),
    ],
)
def test_event_times_that_are_refused(given: Any, message: str) -> None:
    """Times that are missing, too few or no times are refused."""
    with pytest.raises(InvalidRequest, match=message):
        times_of("event_time", given, 2)


def test_rows_take_their_times_from_columns() -> None:
    """Event time and known-at may be named columns of the rows, which are no features then, or are both."""
    types = {"user": Int64, "seen": Timestamp}
    lists = {"user": [1, 2], "seen": [NOON, NOON], "at": [NOON_US, 5], "known": [NOON_US, 6]}
    for frame in (lists, pd.DataFrame(lists), pl.DataFrame(lists), pa.table(lists)):
        rows = rows_of(frame, types, "at", "known")
        assert (rows.event_time_us.tolist(), list(rows.columns)) == ([NOON_US, 5], ["user", "seen"])
        assert rows.known_at_us is not None
        assert rows.known_at_us.tolist() == [NOON_US, 6]
    rows = rows_of({"user": [1], "seen": [NOON]}, types, "seen", None)
    assert (rows.event_time_us.tolist(), rows.columns["seen"].to_list()) == ([NOON_US], [NOON])
    assert rows.known_at_us is None
    with pytest.raises(InvalidRequest, match="there is no time column 'att'; did you mean 'at'"):
        rows_of(lists, types, "att", None)


def test_what_arrow_holds_is_what_was_meant() -> None:
    """The types that frames are made with here are those of the project's columns."""
    for type in (*SCALAR_TYPES, Vector(2)):
        assert column_to_arrow(column(type, [None])).type == arrow_type(type)
