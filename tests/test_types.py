"""Types, and columns made of what callers bring: exact, or an error that names the row."""

from __future__ import annotations

import datetime as dt
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featserve.errors import DefinitionError, InvalidRequest
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
    concat,
    from_us,
    gather,
    parse_type,
    to_us,
    type_of_code,
)
from tests.random_data import SCALAR_TYPES, cells_of, random_column, random_type

UTC = dt.UTC
NOON = dt.datetime(2024, 1, 1, 12, tzinfo=UTC)
NOON_US = 1_704_110_400_000_000
FLOAT32_MAX = float(np.finfo(np.float32).max)


def test_types_are_named_and_numbered_for_ever() -> None:
    """The names are those of definitions that were applied, the codes those of the wire: neither may change."""
    assert {t.name: (t.code, t.width) for t in (*SCALAR_TYPES, Vector(3))} == {
        "bool": (1, 1), "int32": (2, 4), "int64": (3, 8), "float32": (4, 4), "float64": (5, 8), "string": (6, 0),
        "bytes": (7, 0), "timestamp": (8, 8), "vector[3]": (9, 12),
    }  # fmt: skip
    for type in (*SCALAR_TYPES, Vector(3), Vector(65_536)):
        assert parse_type(str(type)) == type
        assert type_of_code(type.code, type.length) == type
        assert pickle.loads(pickle.dumps(type)) == type
    assert type_of_code(0) is None
    assert type_of_code(99) is None


@pytest.mark.parametrize("length", [0, -1, 65_537, 1.0, True, "3", None])
def test_vector_lengths(length: Any) -> None:
    """A vector has from 1 to 65,536 elements."""
    with pytest.raises(DefinitionError, match=r"Vector\(.*\): the length is a whole number from 1 to 65,536"):
        Vector(length)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int46", "unknown type 'int46'; did you mean 'int64'"),
        ("vector", r"unknown type 'vector'; did you mean 'vector\[N\]'"),
        ("vector[0]", "the length is a whole number"),
        ("", "unknown type ''; there is: 'bool', "),
    ],
)
def test_names_that_are_no_type(name: str, message: str) -> None:
    """A name of no type is refused, with the nearest ones."""
    with pytest.raises(DefinitionError, match=message):
        parse_type(name)


ACCEPTED: list[tuple[Type, Any, list[Any]]] = [
    (Bool, [True, np.False_, None], [True, False, None]),
    (Bool, [True, float("nan")], [True, None]),
    (Int32, [0, 2**31 - 1, -(2**31), np.int8(-3), np.uint64(7)], [0, 2**31 - 1, -(2**31), -3, 7]),
    (Int32, np.array([1, -(2**31)], np.int64), [1, -(2**31)]),
    (Int32, np.array([1, 2**31 - 1], np.uint64), [1, 2**31 - 1]),
    (Int64, [2**63 - 1, -(2**63), None, pd.NA, pd.NaT], [2**63 - 1, -(2**63), None, None, None]),
    (Int64, np.array([2**63 - 1], np.uint64), [2**63 - 1]),
    (Int64, np.array([1, 2], ">i4"), [1, 2]),
    (Int64, np.array([1, None], object), [1, None]),
    (Int64, np.ma.masked_array([1, 2, 3], [False, True, False]), [1, None, 3]),
    (Int64, range(3), [0, 1, 2]),
    (Int64, {5: "a", 6: "b"}.keys(), [5, 6]),
    (Int64, (n for n in (1, 2)), [1, 2]),
    (Float32, [2**24, -(2**24), 0.5, np.float64(FLOAT32_MAX)], [16777216.0, -16777216.0, 0.5, FLOAT32_MAX]),
    (Float32, [3.4028235e38, float("inf"), float("-inf")], [FLOAT32_MAX, float("inf"), float("-inf")]),
    (Float32, np.array([3.4028235e38, np.inf]), [FLOAT32_MAX, float("inf")]),
    (Float32, np.array([1, -(2**24)], np.int64), [1.0, -16777216.0]),
    (Float64, [2**53, -(2**53), 1e308, None], [9007199254740992.0, -9007199254740992.0, 1e308, None]),
    (Float64, np.array([2**53, -(2**53)]), [9007199254740992.0, -9007199254740992.0]),
    (Float64, np.array([1.5], np.float16), [1.5]),
    (String, ["", "a\0b", "日本", None, float("nan"), pd.NA], ["", "a\0b", "日本", None, None, None]),
    (String, np.array(["a", "bc"]), ["a", "bc"]),
    (String, np.array(["a", "b" * 99], np.dtypes.StringDType()), ["a", "b" * 99]),
    (String, np.array(["a", None], np.dtypes.StringDType(na_object=None)), ["a", None]),
    (Bytes, [b"", b"\0", bytearray(b"a"), memoryview(b"b"), None], [b"", b"\0", b"a", b"b", None]),
    (Bytes, np.array([b"a", b"bc"]), [b"a", b"bc"]),
    (Timestamp, [NOON, dt.datetime(2024, 1, 1, 12), None], [NOON, NOON, None]),
    (Timestamp, [dt.datetime(2024, 1, 1, 14, tzinfo=dt.timezone(dt.timedelta(hours=2))), NOON_US], [NOON, NOON]),
    (Timestamp, [np.datetime64("2024-01-01T12"), np.datetime64("NaT", "us"), pd.NaT], [NOON, None, None]),
    (Timestamp, [pd.Timestamp("2024-01-01 12:00", tz="UTC"), np.datetime64(NOON_US * 1_000, "ns")], [NOON, NOON]),
    (Timestamp, np.array(["2024-01-01T12", "NaT"], "M8[h]"), [NOON, None]),
    (Timestamp, np.array([NOON_US * 1_000], "M8[ns]"), [NOON]),
    (Timestamp, np.array([NOON_US]), [NOON]),
    (Timestamp, np.array(["NaT"], "M8[Y]"), [None]),
    (Timestamp, [dt.date(2024, 1, 1)], [dt.datetime(2024, 1, 1, tzinfo=UTC)]),
    (Timestamp, np.array([NOON], object), [NOON]),
    (Vector(2), [[1, 2.5], (0.0, -1), np.array([3, 4]), None], [[1.0, 2.5], [0.0, -1.0], [3.0, 4.0], None]),
    (Vector(2), np.array([[1, 2], [3, 4]], np.int8), [[1.0, 2.0], [3.0, 4.0]]),
    (Vector(2), np.array([[0.5, 2], [3, 4]]), [[0.5, 2.0], [3.0, 4.0]]),
    *((type, [], []) for type in (*SCALAR_TYPES, Vector(3))),
    *((type, [None, None], [None, None]) for type in (*SCALAR_TYPES, Vector(3))),
]


@pytest.mark.parametrize(("type", "values", "expected"), ACCEPTED, ids=lambda value: repr(value)[:40])
def test_values_that_are_taken(type: Type, values: Any, expected: list[Any]) -> None:
    """Values of the type, and those that widen to it without loss, are taken exactly; what is missing is null."""
    col = column(type, values)
    assert repr(col.to_list()) == repr(expected)
    assert len(col) == len(expected)
    assert col.null_count == expected.count(None)
    assert (col.valid is None) == (None not in expected)
    assert col.values.dtype == (np.dtype(np.uint8) if type.variable else type.dtype)


REFUSED: list[tuple[Type, Any, str]] = [
    (Bool, [True, 1], r"c\[1\]: expected bool, got 1 \(int\)"),
    (Bool, np.array([0, 1]), "c: expected bool, got an array of dtype int64"),
    (Int32, [0, 2**31], r"c\[1\]: expected int32, got 2147483648 \(out of range\)"),
    (Int32, [True], r"c\[0\]: expected int32, got True \(bool\)"),
    (Int32, [1.0], r"c\[0\]: expected int32, got 1.0 \(float\)"),
    (Int32, np.array([1, 2, -(2**31) - 1]), r"c\[2\]: expected int32, got -2147483649 \(out of range\)"),
    (Int32, np.array([1.0]), "c: expected int32, got an array of dtype float64"),
    (Int64, [2**63], "out of range"),
    (Int64, np.array([2**63], np.uint64), r"c\[0\]: expected int64, got 9223372036854775808 \(out of range\)"),
    (Int64, ["1"], r"got '1' \(str\)"),
    (Int64, [float("nan")], r"got nan \(float\)"),
    (Int64, [NOON], "got datetime.datetime"),
    (Int64, np.array([True]), "an array of dtype bool"),
    (Float32, [2**24 + 1], r"got 16777217 \(an integer that it cannot hold exactly\)"),
    (Float32, [3.4028236e38], r"got 3.4028236e\+38 \(out of range\)"),
    (Float32, np.array([0.0, -3.4028236e38]), r"c\[1\]: expected float32, got -3.4028236e\+38 \(out of range\)"),
    (Float32, np.array([2**24 + 1]), r"c\[0\]: expected float32, got 16777217 \(out of range\)"),
    (Float64, [2**53 + 1], "cannot hold exactly"),
    (Float64, np.array([-(2**53) - 1]), "out of range"),
    (Float64, np.array([2**64 - 1], np.uint64), "out of range"),
    (Float64, [True], r"got True \(bool\)"),
    (Float64, ["nan"], r"got 'nan' \(str\)"),
    (Float64, np.array([1 + 2j]), "an array of dtype complex128"),
    (String, ["a", b"b"], r"c\[1\]: expected string, got b'b' \(bytes\)"),
    (String, ["\ud800"], "not valid Unicode"),
    (String, [1], r"got 1 \(int\)"),
    (String, np.array([1]), "an array of dtype int64"),
    (String, ["x" * 99, 1], r"c\[1\]"),
    (Bytes, ["a"], r"got 'a' \(str\)"),
    (Bytes, np.array(["a"]), "an array of dtype <U1"),
    (Timestamp, ["2024-01-01"], r"got '2024-01-01' \(str\)"),
    (Timestamp, [dt.time(12)], "got datetime.time"),
    (Timestamp, [1.5], r"got 1.5 \(float\)"),
    (Timestamp, [2**63], "out of range"),
    (Timestamp, np.array([1.5]), "an array of dtype float64"),
    (Timestamp, np.array([0, 2**62], "M8[s]"), r"c\[1\]: expected timestamp, got .*out of range"),
    (Timestamp, np.array([2**61], "M8[D]"), "out of range"),
    (Timestamp, np.array([292_277, -292_278], "M8[Y]"), r"c\[1\]: .*out of range"),
    (Timestamp, np.array([1_000, 1_001], "M8[ns]"), r"c\[1\]: .*no whole number of microseconds"),
    (Timestamp, [None, np.datetime64(1, "ns")], r"c\[1\]: .*no whole number of microseconds"),
    (Timestamp, [pd.Timestamp(1, unit="ns")], r"c\[0\]: .*no whole number of microseconds"),
    (Vector(2), [[1.0, 2.0], [1.0]], r"c\[1\]: expected vector\[2\], got 1 elements"),
    (Vector(2), [[1.0, None]], r"c\[0\]: expected float32, got None"),
    (Vector(2), ["ab"], r"got 'ab' \(str\)"),
    (Vector(2), [1.0], r"got 1.0 \(float\)"),
    (Vector(2), [[1.0, 2**24 + 1]], "cannot hold exactly"),
    (Vector(2), np.zeros((2, 3)), r"an array of shape \(2, 3\) and dtype float64"),
    (Vector(2), np.zeros(2), r"an array of shape \(2,\)"),
    (Vector(2), np.array([["a", "b"]]), "dtype <U1"),
    (Vector(2), np.array([[0.0, 0.0], [0.0, 1e39]]), r"c\[1\]: expected vector\[2\], got 1e\+39 \(out of range\)"),
    (Vector(2), np.array([[0, 2**24 + 1]]), r"c\[0\]: expected vector\[2\], got 16777217 \(out of range\)"),
    (Int64, np.zeros((2, 2), np.int64), "an array of 2 dimensions"),
    (Int64, np.array(5), "an array of 0 dimensions"),
    (Int64, np.array(None, object), r"expected a list or an array of int64, got array\(None"),
    (Int64, 5, r"c: expected a list or an array of int64, got 5 \(int\)"),
    (Int64, None, "expected a list or an array of int64, got None"),
    (String, "UA", r"c: expected a list or an array of string, got 'UA' \(str\)"),
    (Bytes, b"UA", r"got b'UA' \(bytes\)"),
    (Int64, b"UA", r"got b'UA' \(bytes\)"),
    (String, {"a": 1}, r"got \{'a': 1\} \(dict\)"),
    (String, {"a"}, r"got \{'a'\} \(set\)"),
    (String, pd.DataFrame({"a": ["b"]}), r"expected a list or an array of string, got .*\(DataFrame\)"),
    (Vector(2), np.zeros((1, 1, 2), object), r"expected a list or an array of vector\[2\]"),
    (Int64, np.ma.masked_array([1.5, 2.5], [False, True]), r"c\[0\]: expected int64, got 1.5"),
]


@pytest.mark.parametrize(("type", "values", "message"), REFUSED, ids=lambda value: repr(value)[:40])
def test_values_that_are_refused(type: Type, values: Any, message: str) -> None:
    """What the type cannot hold exactly, or does not mean, is refused; the message names column, row and value."""
    with pytest.raises(InvalidRequest, match=message) as caught:
        column(type, values, "c")
    assert caught.value.violations[0].field.startswith("c")
    assert len(str(caught.value)) < 200


UNITS = {"W": 604_800 * 10**12, "D": 86_400 * 10**12, "h": 3_600 * 10**12, "m": 60 * 10**12, "s": 10**12, "ms": 10**9}
UNITS |= {"us": 10**6, "ns": 1_000, "ps": 1}
"""How many picoseconds a unit has."""


@pytest.mark.parametrize("unit", UNITS)
def test_a_time_of_any_unit_is_exact_or_refused(unit: str) -> None:
    """From the first microsecond to the last, and one beyond: an instant is the one that was given, or an error."""
    last = min((2**63 - 1) * 10**6 // UNITS[unit], 2**63 - 1)
    edges = [0, 1, 10**3, 10**6, 10**12, last - 1, last, min(last + 1, 2**63 - 1), 2**63 - 1]
    for ticks in [*edges, *(-edge for edge in edges)]:
        micros, rest = divmod(ticks * UNITS[unit], 10**6)
        fits = rest == 0 and abs(micros) < 2**63
        array = np.array([ticks], f"M8[{unit}]")
        for values in array, list(array):
            with nullcontext() if fits else pytest.raises(InvalidRequest, match=r"out of range|no whole number"):
                assert column(Timestamp, values).values.tolist() == [micros]


@given(st.lists(st.one_of(st.none(), st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.text(max_size=3))))
def test_numbers_are_exact_or_refused(values: list[Any]) -> None:
    """Whatever numbers are given, each comes back as given, rounded if it is a float, or none is taken."""
    for type in (Int32, Int64, Float32, Float64):
        try:
            found = column(type, values).to_list()
        except InvalidRequest:
            continue
        for value, got in zip(values, found, strict=True):
            assert not isinstance(value, bool | str)
            if value is None:
                assert got is None
            elif type.floating and isinstance(value, float):
                with np.errstate(over="ignore"):
                    assert repr(got) == repr(float(np.array(value).astype(type.dtype)))
                assert np.isinf(got) == np.isinf(value)
            else:
                assert got == value


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from(["u1", "i1", "u2", "i4", "u4", "i8", "u8"]))
def test_arrays_and_lists_agree(number: int, dtype: str) -> None:
    """An array gives the column, or the refusal, that the list of its numbers gives."""
    info = np.iinfo(dtype)
    array = np.array([min(max(number, info.min), info.max)], dtype)
    for type in (Int32, Int64, Float32, Float64, Timestamp):
        taken: list[object] = []
        for values in (array, array.tolist()):
            try:
                taken.append(cells_of(column(type, values)))
            except InvalidRequest:
                taken.append("refused")
        assert taken[0] == taken[1], (type, array)


@given(st.floats(width=64))
def test_float32_is_refused_where_it_would_become_infinite(number: float) -> None:
    """A finite number is refused for float32 exactly where rounding it gives infinity, in a list as in an array."""
    with np.errstate(over="ignore"):
        rounded = np.array(number).astype(np.float32)
    for values in ([number], np.array([number])):
        if np.isinf(rounded) and np.isfinite(number):
            with pytest.raises(InvalidRequest, match="out of range"):
                column(Float32, values)
        else:
            assert repr(column(Float32, values).values[0]) == repr(rounded[()])


@given(st.datetimes(timezones=st.sampled_from([UTC, dt.timezone(dt.timedelta(hours=-5, minutes=30)), None])))
def test_instants_survive(instant: dt.datetime) -> None:
    """A datetime becomes microseconds and back without loss; without a zone it means UTC."""
    aware = instant if instant.tzinfo else instant.replace(tzinfo=UTC)
    us = to_us(instant)
    assert dt.timedelta(microseconds=us) == aware - dt.datetime(1970, 1, 1, tzinfo=UTC)
    assert from_us(us) == aware


def test_instants_beyond_python() -> None:
    """Microseconds outside of the years 1 to 9999 have no datetime."""
    first, last = to_us(dt.datetime.min.replace(tzinfo=UTC)), to_us(dt.datetime.max.replace(tzinfo=UTC))
    assert from_us(first) == dt.datetime.min.replace(tzinfo=UTC)
    assert from_us(last) == dt.datetime.max.replace(tzinfo=UTC)
    for us in (first - 1, last + 1, -(2**63), 2**63 - 1):
        assert from_us(us) is None


def test_take_and_concat_equal_lists(rng: np.random.Generator) -> None:
    """Rows taken from a column, and columns put together, are what the same done to lists of their values is."""
    for _ in range(200):
        type = random_type(rng)
        parts = [
            random_column(rng, type, int(rng.integers(0, 8)), null_share=float(rng.choice([0.0, 0.5])))
            for _ in range(3)
        ]
        whole = concat(parts)
        cells = [cell for part in parts for cell in cells_of(part)]
        assert cells_of(whole) == cells
        if cells:
            rows = rng.integers(len(cells), size=int(rng.integers(0, 12)))
            assert cells_of(whole.take(rows)) == [cells[i] for i in rows]
        assert cells_of(whole.take(np.zeros(0, np.int64))) == []


def test_gather_takes_slices_in_any_order() -> None:
    """Slices of bytes, overlapping, empty and out of order, become the values of a column."""
    data = np.frombuffer(b"abcdef", np.uint8)
    col = gather(String, data, np.array([4, 0, 2, 0, 6]), np.array([2, 3, 0, 6, 0]))
    assert col.to_list() == ["ef", "abc", "", "abcdef", ""]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Column(Timestamp, np.array([-(2**63), 0])), [None, dt.datetime(1970, 1, 1, tzinfo=UTC)]),
        (lambda: Column(Bool, np.array([True, False]), None, np.array([False, True])), [None, False]),
        (lambda: column(String, ["é", "\0"]), ["é", "\0"]),
    ],
)
def test_python_values(make: Callable[[], Column], expected: list[Any]) -> None:
    """A column gives Python values; None where it is null, and for an instant that Python has not."""
    assert make().to_list() == expected
