"""Columns to and from Arrow: every type in every layout against plain Python lists, and every refusal."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from featserve.arrow import arrow_type, column_from_arrow, column_to_arrow
from featserve.errors import InvalidRequest, TooLarge
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
    from_us,
)

ROUNDS = 6


def single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def text(rng: random.Random) -> str:
    return "".join(rng.choices("ab,\"'\n 0é漢😀\x00", k=rng.choice([0, 1, 3, 40])))


MAKERS: dict[Type, Callable[[random.Random], Any]] = {
    Bool: lambda rng: rng.random() < 0.5,
    Int32: lambda rng: rng.choice([0, -1, 2**31 - 1, -(2**31), rng.randrange(-999, 999)]),
    Int64: lambda rng: rng.choice([0, 2**63 - 1, -(2**63), rng.randrange(-(10**12), 10**12)]),
    Float32: lambda rng: single(rng.choice([0.0, -0.0, float("inf"), 1e-45, rng.gauss(0, 1e3)])),
    Float64: lambda rng: rng.choice([0.0, float("-inf"), 5e-324, 1.7e308, rng.gauss(0, 1e3)]),
    String: text,
    Bytes: lambda rng: rng.randbytes(rng.choice([0, 1, 7, 300])),
    Timestamp: lambda rng: from_us(rng.randrange(-9 * 10**15, 9 * 10**15)),
    Vector(3): lambda rng: [single(rng.gauss(0, 1)) for _ in range(3)],
}
ALSO: dict[Type, list[Any]] = {
    Int32: [pa.dictionary(pa.int8(), pa.int32())],
    Int64: [pa.dictionary(pa.int16(), pa.int64())],
    String: [pa.large_string(), pa.string_view(), pa.dictionary(pa.int16(), pa.string())],
    Bytes: [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int16(), pa.large_binary())],
    Timestamp: [pa.timestamp("us"), pa.timestamp("us", "Asia/Tokyo"), pa.timestamp("ns", "UTC")],
    Vector(3): [
        pa.list_(pa.float32()),
        pa.large_list(pa.float64()),
        pa.list_(pa.float64(), 3),
        pa.list_(pa.float32(), 3),
    ],
}


def values_of(type: Type, rng: random.Random, rows: int, nulls: float) -> list[Any]:
    return [None if rng.random() < nulls else MAKERS[type](rng) for _ in range(rows)]


def layouts(values: list[Any], given: Any, rng: random.Random) -> list[Any]:
    """Return the same values as one array, a slice of a longer one, and chunks that are slices."""
    lead = rng.randrange(11)
    around = [*values, *values][:lead] + values + values[: rng.randrange(5)]
    sliced = pa.array(around, given).slice(min(lead, 2 * len(values)), len(values))
    cut = rng.randrange(len(values) + 1)
    chunks = [sliced.slice(0, cut), sliced.slice(0, 0), sliced.slice(cut)]
    return [pa.array(values, given), sliced, pa.chunked_array(chunks), pa.chunked_array([sliced])]


def equal(got: list[Any], expected: list[Any]) -> bool:
    return repr(got) == repr(expected)  # tells -0.0 from 0.0, and 1 from True and 1.0


def check_layout(column: Column, expected: list[Any]) -> None:
    """Assert the invariants of a Column beyond its values: dtypes, and zero or nothing where it is null."""
    assert (column.valid is None) == (None not in expected)
    if column.offsets is not None:
        assert column.offsets.dtype == np.int64
        assert column.offsets[0] == 0
        assert len(column.values) == column.offsets[-1]
        assert column.valid is None or not np.diff(column.offsets)[~column.valid].any()
    else:
        assert column.values.dtype == column.type.dtype
        assert column.values.shape == ((len(expected), column.type.length) if column.type.vector else (len(expected),))
        assert column.valid is None or not column.values[~column.valid].any()


@pytest.mark.parametrize("type", MAKERS, ids=str)
def test_every_layout_holds_the_values(type: Type, seed: int) -> None:
    """An Arrow array of any layout becomes a column of the same values, and that the same Arrow array again."""
    compared = 0
    rng = random.Random(f"{seed} {type}")
    for _ in range(ROUNDS):
        for rows in (0, 1, 9, 1000):
            values = values_of(type, rng, rows, rng.choice([0, 0.3, 1]))
            for given in (arrow_type(type), *ALSO.get(type, [])):
                for array in layouts(values, given, rng):
                    column = column_from_arrow(type, array, "x")
                    assert equal(column.to_list(), values), given
                    check_layout(column, values)
                    back = column_to_arrow(column)
                    back.validate(full=True)
                    assert back.type == arrow_type(type)
                    assert back.null_count == values.count(None)
                    assert equal(column_from_arrow(type, back, "x").to_list(), values)
                    assert back.equals(pa.array(values, arrow_type(type)))
                    compared += rows
    assert compared > 20_000


def test_arrow_memory_is_shared() -> None:
    """Fixed-width values, vectors and string bytes of a whole or sliced array are not copied."""
    for type, array in (
        (Int64, pa.array(range(10))[3:]),
        (Float32, pa.array([1.0, 2.0], pa.float32())),
        (Timestamp, pa.array([1, 2], pa.timestamp("us"))),
        (Vector(2), pa.array([[1.0, 2.0]] * 4, pa.list_(pa.float32(), 2))[1:]),
        (String, pa.array(["abc", "d"])),
    ):
        column = column_from_arrow(type, array, "x")
        buffer = (array.values if type.vector else array).buffers()[-1]
        assert buffer.address <= column.values.ctypes.data < buffer.address + buffer.size
        back = column_to_arrow(column)
        assert (back.values if type.vector else back).buffers()[-1].address == column.values.ctypes.data


def test_bytes_under_a_null_are_dropped() -> None:
    """A null string that Arrow stores with bytes under it becomes an empty one."""
    full = pa.array(["abc", "secret", "d"])
    masked = pa.Array.from_buffers(pa.string(), 3, [pa.py_buffer(b"\x05"), *full.buffers()[1:]])
    column = column_from_arrow(String, masked, "x")
    assert column.to_bytes_list() == [b"abc", b"", b"d"]
    assert column.values.tobytes() == b"abcd"


def test_values_under_a_null_do_not_count() -> None:
    """What Arrow holds under a null, out of range or of another length, is no error and becomes zero."""
    numbers = pa.Array.from_buffers(pa.int64(), 2, [pa.py_buffer(b"\x01"), pa.array([7, 2**40]).buffers()[1]])
    column = column_from_arrow(Int32, numbers, "x")
    assert column.values.tolist() == [7, 0]
    ragged = pa.array([[1.0, 2.0], [3.0], [4.0, 5.0]])
    lists = pa.ListArray.from_arrays(ragged.offsets, ragged.values, mask=pa.array([False, True, False]))
    assert column_from_arrow(Vector(2), lists, "x").to_list() == [[1.0, 2.0], None, [4.0, 5.0]]


def test_numbers_widen_and_narrow_exactly() -> None:
    """Every integer that fits is taken from any width, and floats round to the nearest float32."""
    for given in (pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()):
        for type in (Int32, Int64, Float32, Float64):
            assert column_from_arrow(type, pa.array([1, None, 127], given), "x").to_list() == [1, None, 127]
    assert column_from_arrow(Int32, pa.array([2**31 - 1, -(2**31)]), "x").to_list() == [2**31 - 1, -(2**31)]
    assert column_from_arrow(Float64, pa.array([2**53, -(2**53)]), "x").to_list() == [2.0**53, -(2.0**53)]
    assert column_from_arrow(Float32, pa.array([0.1, float("inf"), 1e-60]), "x").to_list() == [
        single(0.1),
        float("inf"),
        0,
    ]
    assert column_from_arrow(Float64, pa.array([0.5, 2.0], pa.float16()), "x").to_list() == [0.5, 2.0]
    assert np.isnan(column_from_arrow(Float32, pa.array([float("nan")]), "x").values[0])


def test_times_become_utc_microseconds() -> None:
    """Every unit, zone and date means the instant that it names; without a zone it is UTC."""
    at = datetime(2013, 3, 10, 7, 30, tzinfo=UTC)
    for unit in ("s", "ms", "us", "ns"):
        for zone in (None, "UTC", "America/New_York", "+05:30"):
            array = pa.array([at, None], pa.timestamp(unit, "UTC")).cast(pa.int64()).cast(pa.timestamp(unit, zone))
            assert column_from_arrow(Timestamp, array, "x").to_list() == [at, None]
    for dates in (pa.date32(), pa.date64()):
        array = pa.array([date(2013, 3, 10), None, date(1969, 12, 31)], dates)
        midnights = [datetime(2013, 3, 10, tzinfo=UTC), None, datetime(1969, 12, 31, tzinfo=UTC)]
        assert column_from_arrow(Timestamp, array, "x").to_list() == midnights
    assert column_from_arrow(Timestamp, pa.array([-1_000], pa.timestamp("ns")), "x").values.tolist() == [-1]


def test_other_encodings() -> None:
    """Run-end encoding, extension types, fixed-size binaries and the null type are what they hold."""
    runs = pa.RunEndEncodedArray.from_arrays([2, 5], pa.array([7, 8]))
    assert column_from_arrow(Int64, runs, "x").to_list() == [7, 7, 8, 8, 8]
    tensor = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), [2]), pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2))
    )
    for array in (tensor, pa.chunked_array([tensor.slice(0, 1), tensor.slice(1)])):
        assert column_from_arrow(Vector(2), array, "x").to_list() == [[1.0, 2.0], [3.0, 4.0]]
    assert column_from_arrow(Bytes, pa.array([b"ab", None], pa.binary(2)), "x").to_list() == [b"ab", None]
    for type in MAKERS:
        assert column_from_arrow(type, pa.nulls(2), "x").to_list() == [None, None]


INVALID_UTF8 = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffb")]
)


@pytest.mark.parametrize(
    ("type", "array", "message"),
    [
        (Int32, pa.array([1, 2**31]), "labels.x, row 11: expected int32, got 2147483648 (out of range)"),
        (Int32, pa.array([None, -(2**31) - 1]), "labels.x, row 11: expected int32, got -2147483649 (out of range)"),
        (Int64, pa.array([2**63], pa.uint64()), "row 10: expected int64, got 9223372036854775808 (out of range)"),
        (Float64, pa.array([2**53 + 1]), "row 10: expected float64, got 9007199254740993 (out of range)"),
        (Float32, pa.array([0, 2**24 + 1]), "row 11: expected float32, got 16777217 (out of range)"),
        (Float32, pa.array([0.0, 1e39]), "row 11: expected float32, got 1e+39 (out of range)"),
        (Int64, pa.array([1.0]), "labels.x: expected int64, got double"),
        (Int64, pa.array([True]), "labels.x: expected int64, got bool"),
        (Int64, pa.array(["1"]), "labels.x: expected int64, got string"),
        (Bool, pa.array([1]), "labels.x: expected bool, got int64"),
        (Float64, pa.array([Decimal("1.5")]), "labels.x: expected float64, got decimal128(2, 1)"),
        (String, pa.array([b"a"]), "labels.x: expected string, got binary"),
        (Bytes, pa.array(["a"]), "labels.x: expected bytes, got string"),
        (String, pa.array([1]), "labels.x: expected string, got int64"),
        (String, INVALID_UTF8, "labels.x, row 11: expected string, got b'\\xff' (not valid UTF-8)"),
        (Timestamp, pa.array([0]), "expected timestamp, got int64 (a number has no unit; write it as a timestamp)"),
        (Timestamp, pa.array(["2013-01-01"]), "labels.x: expected timestamp, got string"),
        (
            Timestamp,
            pa.array([1000, 1001], pa.timestamp("ns")),
            "row 11: expected timestamp, got 1970-01-01T00:00:00.000001001 (finer than a microsecond",
        ),
        (Timestamp, pa.array([2**60], pa.timestamp("s")), "row 10: expected timestamp, got"),
        (Vector(2), pa.array([1.0]), "labels.x: expected vector[2], got double"),
        (Vector(2), pa.array([[1, 2]]), "labels.x: expected vector[2], got list<item: int64>"),
        (Vector(2), pa.array([[1.0, 2.0], [3.0]]), "labels.x, row 11: expected vector[2], got 1 elements"),
        (Vector(2), pa.array([[1.0] * 3] * 2, pa.list_(pa.float32(), 3)), "row 10: expected vector[2], got 3 elements"),
        (Vector(2), pa.array([None, [1.0, None]]), "row 11: expected vector[2], got a vector with a null element"),
        (
            Vector(2),
            pa.array([[0, 0], [1.0, None]], pa.list_(pa.float32(), 2)),
            "row 11: expected vector[2], got a vector",
        ),
        (Vector(2), pa.array([[0, 0], [1.0, 1e39]]), "row 11: expected vector[2], got 1e+39 (out of range)"),
    ],
)
def test_refusals_name_the_row(type: Type, array: Any, message: str) -> None:
    """What would change a value is an error that says where it stands, counted from the given first row."""
    with pytest.raises(InvalidRequest) as caught:
        column_from_arrow(type, array, "labels.x", first_row=10)
    assert message in str(caught.value)


def test_too_many_bytes_for_arrow() -> None:
    """A column of 2 GiB of strings is refused, not cut."""
    column = Column(String, np.empty(0, np.uint8), np.array([0, 2**31]))
    with pytest.raises(TooLarge, match="take fewer rows"):
        column_to_arrow(column)
