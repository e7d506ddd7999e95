"""Columns to and from Arrow arrays, without a loop over their cells.

Comes in: a pyarrow array of any layout (chunked, sliced, dictionary-encoded, a view). Goes out: a ``types.Column`` that
shares its memory where the layouts agree, or the other way about. Exact: what would lose more than the rounding of a
float is an error that names the row. Knows no file and no view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featserve.errors import InvalidRequest, TooLarge, invalid
from featserve.types import (
    Array,
    Bool,
    Bytes,
    Column,
    Float32,
    Float64,
    Int32,
    Int64,
    Mask,
    String,
    Timestamp,
    Type,
    cast_exactly,
    gather,
)

Wrong = Callable[[int | None, str], InvalidRequest]
"""Makes the error for a row of the array (None: for all of it) from what was found there."""

SCALARS = {
    Bool: pa.bool_(),
    Int32: pa.int32(),
    Int64: pa.int64(),
    Float32: pa.float32(),
    Float64: pa.float64(),
    String: pa.string(),
    Bytes: pa.binary(),
    Timestamp: pa.timestamp("us", "UTC"),
}
INT32_MAX = 2**31 - 1


def arrow_type(type: Type) -> Any:
    """Return the Arrow type of a column of ``type``; of a vector, a fixed-size list of float32."""
    return pa.list_(pa.float32(), type.length) if type.vector else SCALARS[type]


def column_to_arrow(column: Column) -> Any:
    """Return ``column`` as a pyarrow Array of ``arrow_type(column.type)``, sharing its memory where it can.

    Raises TooLarge for strings or bytes of 2 GiB and more, which that type cannot hold.
    """
    rows, type = len(column), column.type
    validity = None if column.valid is None else _packed(column.valid)
    if column.offsets is not None:
        if column.offsets[-1] > INT32_MAX:
            raise TooLarge(f"{column.offsets[-1]:,} bytes of {type}; Arrow holds {INT32_MAX:,}, so take fewer rows")
        buffers = [validity, _buffer(column.offsets.astype(np.int32)), _buffer(column.values)]
        return pa.Array.from_buffers(arrow_type(type), rows, buffers)
    if type.vector:
        child = pa.Array.from_buffers(pa.float32(), rows * type.length, [None, _buffer(column.values)])
        return pa.Array.from_buffers(arrow_type(type), rows, [validity], children=[child])
    data = _packed(column.values) if type is Bool else _buffer(column.values)
    return pa.Array.from_buffers(arrow_type(type), rows, [validity, data])


def column_from_arrow(type: Type, array: Any, what: str, *, first_row: int = 0) -> Column:
    """Return a pyarrow Array or ChunkedArray as a Column of ``type``; nulls hold zero, or no bytes.

    Accepted: any width of integer that holds the same number, exactly; floats, rounded to nearest; timestamps of any
    unit and zone (without one: UTC) and dates (midnight UTC), if whole microseconds; strings, binaries and their
    dictionary, view and large forms; lists of floats of the vector's length. All else is an InvalidRequest that names
    ``what`` and, counted from ``first_row``, the row.
    """

    def wrong(row: int | None, got: str) -> InvalidRequest:
        return invalid(what if row is None else f"{what}, row {first_row + row}", f"expected {type}, got {got}")

    array = _plain(array)
    if pa.types.is_null(array.type):
        array = pa.nulls(len(array), arrow_type(type))
    if not _accepted(type, array.type):
        unitless = type is Timestamp and pa.types.is_integer(array.type)
        raise wrong(None, f"{array.type}{' (a number has no unit; write it as a timestamp)' if unitless else ''}")
    array = _one(array, type)
    if len(array) == 0:
        return _empty(type)
    valid = _valid(array)
    if type.variable:
        return _texts(type, array, valid, wrong)
    if type.vector:
        return Column(type, _vectors(type, array, valid, wrong), None, valid)
    if type is Bool:
        values = _bits(array.buffers()[1], array.offset, len(array))
        return Column(type, values if valid is None else values & valid, None, valid)
    if type is Timestamp:
        return Column(type, _instants(array, valid, wrong), None, valid)
    return Column(type, cast_exactly(type, _elements(array, valid), wrong), None, valid)


def first_refused(array: Any, check: Callable[[Any], object]) -> int:
    """Return the row of the first value for which ``check`` of a slice of ``array`` raises ArrowInvalid; one does."""
    low, high = 0, len(array)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            check(array.slice(low, middle - low))
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _plain(array: Any) -> Any:
    """Strip the encodings that change how values are held and not what they are."""
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.cast(array.type.storage_type)
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    return array


def _accepted(type: Type, given: Any) -> bool:
    is_ = pa.types
    if type is Bool:
        return bool(is_.is_boolean(given))
    if type is Timestamp:
        return bool(is_.is_timestamp(given) or is_.is_date(given))
    if type is String:
        return bool(is_.is_string(given) or is_.is_large_string(given) or is_.is_string_view(given))
    if type is Bytes:
        blob = is_.is_binary(given) or is_.is_large_binary(given) or is_.is_binary_view(given)
        return bool(blob or is_.is_fixed_size_binary(given))
    if type.vector:
        listed = is_.is_list(given) or is_.is_large_list(given) or is_.is_fixed_size_list(given)
        return bool(listed and is_.is_floating(given.value_type))
    return bool(is_.is_integer(given) or (type.floating and is_.is_floating(given)))


def _one(array: Any, type: Type) -> Any:
    """Return one Array of the chunks; strings and bytes with 64-bit offsets, which any total size fits."""
    if type.variable:
        array = array.cast(pa.large_string() if type is String else pa.large_binary())
    if isinstance(array, pa.ChunkedArray):
        return array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()
    return array


def _empty(type: Type) -> Column:
    if type.variable:
        return Column(type, np.empty(0, np.uint8), np.zeros(1, np.int64))
    return Column(type, np.empty((0, type.length) if type.vector else 0, type.dtype))


def _buffer(values: Array) -> Any:
    return pa.py_buffer(np.ascontiguousarray(values))


def _packed(bits: Mask) -> Any:
    return pa.py_buffer(np.packbits(bits, bitorder="little"))


def _bits(buffer: Any, offset: int, rows: int) -> Mask:
    """Return ``rows`` bits of an Arrow bitmap, the first at bit ``offset``, as bool."""
    data = np.frombuffer(buffer, np.uint8)[offset // 8 : (offset + rows + 7) // 8]
    return np.unpackbits(data, bitorder="little")[offset % 8 : offset % 8 + rows].view(np.bool_)


def _valid(array: Any) -> Mask | None:
    return _bits(array.buffers()[0], array.offset, len(array)) if array.null_count else None


def _elements(array: Any, valid: Mask | None) -> Array:
    """Return the elements of a fixed-width array, zero where ``valid`` is False, whatever Arrow holds there."""
    dtype = "<i8" if pa.types.is_temporal(array.type) else array.type.to_pandas_dtype()
    values: Array = np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]
    return values if valid is None else np.where(valid, values, values.dtype.type(0))


def _instants(array: Any, valid: Mask | None, wrong: Wrong) -> Array:
    if pa.types.is_date32(array.type):
        array = array.cast(pa.timestamp("s"))
    unit = "ms" if pa.types.is_date64(array.type) else array.type.unit
    values = _elements(array, valid)
    if unit == "us":
        return values
    if unit == "ns":
        bad = values % 1_000 != 0
        reason = "finer than a microsecond; round it when the data is written"
    else:
        limit = (2**63 - 1) // (1_000_000 if unit == "s" else 1_000)
        bad = (values > limit) | (values < -limit)
        reason = "out of range"
    if bad.any():
        row = int(np.argmax(bad))
        raise wrong(row, f"{values[row].view(f'M8[{unit}]')} ({reason})")
    return values // 1_000 if unit == "ns" else values * (1_000_000 if unit == "s" else 1_000)


def _texts(type: Type, array: Any, valid: Mask | None, wrong: Wrong) -> Column:
    if type is String:
        try:
            array.validate(full=True)
        except pa.ArrowInvalid:
            row = first_refused(array, lambda part: part.validate(full=True))
            raise wrong(row, f"{array.slice(row, 1).cast(pa.large_binary())[0].as_py()!r} (not valid UTF-8)") from None
    _, offset_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer else np.empty(0, np.uint8)
    lengths = offsets[1:] - offsets[:-1]
    if valid is not None and lengths[~valid].any():
        return gather(type, data, offsets[:-1], np.where(valid, lengths, 0), valid)
    return Column(type, data[offsets[0] : offsets[-1]], offsets - offsets[0] if offsets[0] else offsets, valid)


def _vectors(type: Type, array: Any, valid: Mask | None, wrong: Wrong) -> Array:
    """Return the float32 elements of lists, of shape (n, length); the rows that are null are zero."""
    rows, length = len(array), type.length
    starts, lengths = _bounds(array)
    short = lengths != length if valid is None else (lengths != length) & valid
    if short.any():
        row = int(np.argmax(short))
        raise wrong(row, f"{lengths[row]} elements")
    where = None if valid is None else np.flatnonzero(valid)

    def cells(flat: Array) -> Array:
        if where is None:  # lists of one length follow each other without a gap
            return flat[starts[0] : starts[0] + rows * length].reshape(rows, length)
        placed = np.zeros((rows, length), flat.dtype)
        placed[where] = flat[starts[where, None] + np.arange(length)]
        return placed

    child = array.values
    present = _valid(child)
    if present is not None:
        gap = cells(~present).any(axis=1)
        if gap.any():
            raise wrong(int(np.argmax(gap)), "a vector with a null element")
    return cast_exactly(type, cells(_elements(child, None)), wrong)


def _bounds(array: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where each list starts in ``array.values``, and its length."""
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        return np.arange(array.offset, array.offset + len(array), dtype=np.int64) * size, np.full(len(array), size)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets[:-1], np.diff(offsets)
