"""The types that a feature or a key can have, and ``Column``, the one in-memory form of their values.

Knows NumPy and nothing else of the project but its errors. A column is Arrow's layout held in NumPy arrays, so it
crosses to Arrow, to the wire and to a stored row without a loop over its cells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any, TypeVar, dataclass_transform

import numpy as np
import numpy.typing as npt

from featserve.errors import DefinitionError, InvalidRequest, hint, invalid

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Made = TypeVar("Made")

NEVER_US = -(2**63)
"""The event time of a row that does not exist (int64 microseconds)."""


@dataclass(frozen=True, slots=True)
class Type:
    """A value type.

    ``code`` is its number in the wire contract and never changes. ``dtype`` is the NumPy dtype of one stored element,
    None for the variable-width types. ``length`` is 1, or the number of elements of a vector.
    """

    name: str
    code: int
    dtype: np.dtype[Any] | None
    length: int = 1

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name

    @property
    def variable(self) -> bool:
        """True for string and bytes: values of any length."""
        return self.dtype is None

    @property
    def vector(self) -> bool:
        return self.code == 9

    @property
    def floating(self) -> bool:
        return self.dtype is not None and self.dtype.kind == "f"

    @property
    def width(self) -> int:
        """Bytes of one value; 0 for the variable-width types."""
        return 0 if self.dtype is None else self.dtype.itemsize * self.length


Bool = Type("bool", 1, np.dtype("?"))
Int32 = Type("int32", 2, np.dtype("<i4"))
Int64 = Type("int64", 3, np.dtype("<i8"))
Float32 = Type("float32", 4, np.dtype("<f4"))
Float64 = Type("float64", 5, np.dtype("<f8"))
String = Type("string", 6, None)
Bytes = Type("bytes", 7, None)
Timestamp = Type("timestamp", 8, np.dtype("<i8"))
"""A UTC instant, int64 microseconds since the Unix epoch."""

SCALARS = {t.name: t for t in (Bool, Int32, Int64, Float32, Float64, String, Bytes, Timestamp)}
SCALARS_BY_CODE = {t.code: t for t in SCALARS.values()}
VECTOR_CODE = 9
FLOAT32_LIMIT = 2.0**128 - 2.0**103
"""The least number that rounds to no float32."""
MAX_VECTOR = 65_536


def Vector(length: int) -> Type:  # noqa: N802 - reads as a type where it is used
    """Return the type of a fixed-length float32 vector (an embedding) of ``length`` elements, 1 to 65,536."""
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= MAX_VECTOR:
        raise DefinitionError(f"Vector({length!r}): the length is a whole number from 1 to {MAX_VECTOR:,}")
    return Type(f"vector[{length}]", VECTOR_CODE, np.dtype("<f4"), length)


def parse_type(name: str) -> Type:
    """Return the type that ``str(type)`` gave ``name``; raises DefinitionError."""
    if match := re.fullmatch(r"vector\[(\d+)\]", name):
        return Vector(int(match[1]))
    if name not in SCALARS:
        raise DefinitionError(f"unknown type {name!r}{hint(name, [*SCALARS, 'vector[N]'])}")
    return SCALARS[name]


def type_of_code(code: int, length: int = 1) -> Type | None:
    """Return the type with the wire ``code`` (and vector ``length``), None where there is none."""
    if code == VECTOR_CODE:
        return Vector(length)
    return SCALARS_BY_CODE.get(code)


@dataclass_transform(frozen_default=True, eq_default=False)
def value_class(cls: type[Made]) -> type[Made]:
    """Make ``cls`` a dataclass whose fields are set once, which the type checker alone holds it to.

    For what each request makes several of: one that is frozen at run time takes four times as long to make.
    """
    return dataclass(slots=True, eq=False)(cls)


@value_class
class Column:
    """n values of one type.

    ``values``: shape (n,) of the type's dtype, (n, length) for a vector; for string and bytes the uint8 bytes of all
    values one after the other. ``offsets``: int64 of shape (n + 1,), where each value starts and ends in them; None
    for fixed-width types. ``valid``: bool of shape (n,), False where the value is null; None where no value is.
    """

    type: Type
    values: Array
    offsets: npt.NDArray[np.int64] | None = None
    valid: Mask | None = None

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def null_count(self) -> int:
        return 0 if self.valid is None else int(len(self.valid) - np.count_nonzero(self.valid))

    def to_bytes_list(self) -> list[bytes]:
        """Return the values of a string or bytes column, nulls as empty."""
        assert self.offsets is not None
        data, ends = self.values.tobytes(), self.offsets.tolist()
        return [data[a:b] for a, b in pairwise(ends)]

    def to_list(self) -> list[Any]:
        """Return Python values, None for nulls: timestamps as aware datetimes, vectors as lists."""
        values: list[Any]
        if self.type is String:
            values = [v.decode() for v in self.to_bytes_list()]
        elif self.type is Bytes:
            values = list(self.to_bytes_list())
        elif self.type is Timestamp:
            valid = self.valid
            values = [from_us(v) if valid is None or valid[i] else None for i, v in enumerate(self.values.tolist())]
        else:
            values = self.values.tolist()
        if self.valid is not None:
            values = [v if ok else None for v, ok in zip(values, self.valid.tolist(), strict=True)]
        return values

    def part(self, start: int, stop: int) -> Column:
        """Return the column of the values from ``start`` up to ``stop``; it shares their memory."""
        valid = None if self.valid is None else self.valid[start:stop]
        if self.offsets is None:
            return Column(self.type, self.values[start:stop], None, valid)
        offsets = self.offsets[start : stop + 1]
        return Column(self.type, self.values[offsets[0] : offsets[-1]], offsets - offsets[0], valid)

    def take(self, rows: npt.NDArray[np.int64]) -> Column:
        """Return the column of the values at ``rows`` (int64 positions, in that order, repeats allowed)."""
        valid = None if self.valid is None else self.valid[rows]
        if self.offsets is None:
            return Column(self.type, self.values[rows], None, valid)
        starts = self.offsets[:-1][rows]
        return gather(self.type, self.values, starts, self.offsets[1:][rows] - starts, valid)


def gather(type: Type, data: Array, starts: Array, lengths: Array, valid: Mask | None = None) -> Column:
    """Return the variable-width column whose value i is ``data[starts[i] : starts[i] + lengths[i]]``."""
    offsets = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > 32 * len(starts):
        # An index would take 24 bytes for each byte; slices of values this long take less time, too.
        view = data.data
        ends = (starts + lengths).tolist()
        joined = b"".join([view[a:b] for a, b in zip(starts.tolist(), ends, strict=True)])
        return Column(type, np.frombuffer(joined, np.uint8), offsets, valid)
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return Column(type, data[index], offsets, valid)


def concat(columns: Sequence[Column]) -> Column:
    """Return the values of ``columns``, at least one and all of one type, one column after the other."""
    first = columns[0]
    values = np.concatenate([c.values for c in columns])
    offsets = valid = None
    if first.offsets is not None:
        lengths = [np.diff(c.offsets) for c in columns if c.offsets is not None]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
    if any(c.valid is not None for c in columns):
        valid = np.concatenate([np.ones(len(c), np.bool_) if c.valid is None else c.valid for c in columns])
    return Column(first.type, values, offsets, valid)


def column(type: Type, values: Iterable[Any], what: str = "column") -> Column:
    """Return a column of Python or NumPy ``values``; None (and, where no number is meant, NaN/NaT) is null.

    Exact: an integer that does not fit, a float where an integer is meant, or a string where bytes are meant is an
    InvalidRequest that names ``what`` and the row, never a silent conversion. Widening that loses nothing is allowed
    (int to float64 below 2**53, int32 to int64).
    """
    if isinstance(values, np.ndarray):
        if isinstance(values, np.ma.MaskedArray):
            values = values.tolist()
        elif values.dtype.kind != "O":
            return _from_array(type, values, what)
    if not isinstance(values, list):
        dimensions = getattr(values, "ndim", 1)
        flat = 1 <= dimensions <= 2 if type.vector else dimensions == 1
        if isinstance(values, _ONE_VALUE) or not isinstance(values, Iterable) or not flat:
            raise invalid(what, f"expected a list or an array of {type}, got {_show(values)}")
    items = list(values)
    classes = {item.__class__ for item in items}
    if len(classes) == 1 and (quick := _plain(type, items, classes.pop(), what)) is not None:
        return quick
    nan_is_null = type.variable or type in (Bool, Timestamp)
    missing = [v is None or _is_nat(v) or (nan_is_null and isinstance(v, float) and math.isnan(v)) for v in items]
    valid = None if not any(missing) else ~np.array(missing)
    if type.variable:
        encoded = [
            b"" if gone else _encode_text(type, v, what, i)
            for i, (v, gone) in enumerate(zip(items, missing, strict=True))
        ]
        return _joined(type, encoded, valid)
    convert = _CONVERT[type.code]
    filler: Any = [0.0] * type.length if type.vector else 0
    cells = [
        filler if gone else convert(type, v, what, i) for i, (v, gone) in enumerate(zip(items, missing, strict=True))
    ]
    shape = (len(items), type.length) if type.vector else (len(items),)
    return Column(type, np.array(cells, type.dtype).reshape(shape), None, valid)


def _plain(type: Type, items: list[Any], of: object, what: str) -> Column | None:
    """Return the column of ``items``, all of class ``of``, if that is Python's own for ``type`` and none is wrong."""
    try:
        if type.variable:
            if of is str and type is String:
                return _joined(type, [item.encode() for item in items], None)
            return _joined(type, items, None) if of is bytes and type is Bytes else None
        if of is _PYTHON.get(type.code):
            return _from_array(type, np.array(items, _NUMPY[of]), what)
    except (OverflowError, UnicodeEncodeError):
        return None  # going through them one by one names it
    return None


def _joined(type: Type, encoded: list[bytes], valid: Mask | None) -> Column:
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(list(map(len, encoded)), out=offsets[1:])
    return Column(type, np.frombuffer(b"".join(encoded), np.uint8), offsets, valid)


def _from_array(type: Type, values: Array, what: str) -> Column:
    def refuse(row: int, got: str) -> InvalidRequest:
        return wrong(what, row, type, got)

    kind = values.dtype.kind
    if type.vector:
        if values.ndim != 2 or values.shape[1] != type.length or kind not in "fiu":
            raise wrong(what, None, type, f"an array of shape {values.shape} and dtype {values.dtype}")
        return Column(type, np.ascontiguousarray(cast_exactly(type, values, refuse)))
    if values.ndim != 1:
        raise wrong(what, None, type, f"an array of {values.ndim} dimensions")
    if type.variable:
        if kind not in ("UT" if type is String else "S"):
            raise wrong(what, None, type, f"an array of dtype {values.dtype}")
        return column(type, values.tolist(), what)
    if type is Timestamp and kind == "M":
        gone = np.isnat(values)
        micros = _micros(values, what)
        return Column(type, np.where(gone, 0, micros), None, ~gone) if gone.any() else Column(type, micros)
    allowed = {1: "b", 2: "iu", 3: "iu", 4: "fiu", 5: "fiu", 8: "iu"}[type.code]
    if kind not in allowed:
        raise wrong(what, None, type, f"an array of dtype {values.dtype}")
    return Column(type, cast_exactly(type, values, refuse))


def cast_exactly(type: Type, values: Array, refuse: Callable[[int, str], InvalidRequest]) -> Array:
    """Return numbers of one or two dimensions in the dtype of ``type``; raises what ``refuse`` makes of a bad one."""
    if values.dtype == type.dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(type.dtype)
    bad = lost(type, values, cast)
    if bad.any():
        cell = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise refuse(int(cell[0]), f"{values[cell]} (out of range)")
    return cast


def _micros(values: Array, what: str, row: int = 0) -> Array:
    """Return datetime64 of any unit as int64 microseconds; ``row``: the number of the first one."""
    if np.can_cast(values.dtype, "<M8[us]"):  # of this unit or a longer one; both ends are as far from the epoch
        last = np.datetime64(2**63 - 1, "us").astype(values.dtype).astype(np.int64)
        bad, why = np.abs(values.astype("<i8")) > last, "out of range"
    else:
        since_epoch = values.view(values.dtype.str.replace("M", "m"))
        bad, why = since_epoch % np.timedelta64(1, "us") != np.timedelta64(0, "us"), "no whole number of microseconds"
    bad &= ~np.isnat(values)
    if bad.any():
        at = int(np.argmax(bad))
        raise wrong(what, row + at, Timestamp, f"{values[at]} ({why})")
    return values.astype("<M8[us]").astype("<i8")


def lost(type: Type, values: Array, cast: Array) -> Mask:
    """Return where ``cast``, the numbers ``values`` as ``type``, is out of range; rounding a float is no loss.

    Integers are compared as integers: a round trip through a float would hide the loss.
    """
    if values.dtype.kind == "f":
        return np.asarray(np.isinf(cast) & ~np.isinf(values))
    if type.floating:
        bound = 2**24 if cast.dtype == np.float32 else 2**53
        return np.asarray((values > bound) | (values < -bound) if values.dtype.kind == "i" else values > bound)
    low, high = np.iinfo(cast.dtype).min, np.iinfo(cast.dtype).max
    if values.dtype.kind == "u":
        return np.asarray(values > np.uint64(high))
    return np.asarray((values < low) | (values > high))


def wrong(what: str, row: int | None, type: Type, got: str) -> InvalidRequest:
    """Return the error for a value that is not of ``type``: ``rows[3].temp: expected float32, got 'x'``."""
    where = what if row is None else f"{what}[{row}]"
    return invalid(where, f"expected {type}, got {got}")


def _encode_text(type: Type, value: object, what: str, row: int) -> bytes:
    if type is String and isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise wrong(what, row, type, f"{value!r} (not valid Unicode)") from None
    if type is Bytes and isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise wrong(what, row, type, _show(value))


def _to_bool(type: Type, value: Any, what: str, row: int) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise wrong(what, row, type, _show(value))


def _to_int(type: Type, value: Any, what: str, row: int) -> int:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if -(2 ** (8 * type.width - 1)) <= int(value) < 2 ** (8 * type.width - 1):
            return int(value)
        raise wrong(what, row, type, f"{value} (out of range)")
    raise wrong(what, row, type, _show(value))


def _to_float(type: Type, value: Any, what: str, row: int) -> float:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if abs(int(value)) > (2**24 if type is Float32 else 2**53):
            raise wrong(what, row, type, f"{value} (an integer that it cannot hold exactly)")
        return float(value)
    if isinstance(value, float | np.floating):
        result = float(value)
        if type is Float32 and math.isfinite(result) and abs(result) >= FLOAT32_LIMIT:
            raise wrong(what, row, type, f"{value} (out of range)")
        return result
    raise wrong(what, row, type, _show(value))


def _to_timestamp(type: Type, value: Any, what: str, row: int) -> int:
    if isinstance(value, datetime):
        if getattr(value, "nanosecond", 0):  # of a pandas Timestamp
            raise wrong(what, row, type, f"{value} (no whole number of microseconds)")
        return to_us(value)
    if isinstance(value, np.datetime64):
        return int(_micros(np.array([value]), what, row)[0])
    if isinstance(value, date):
        return to_us(datetime(value.year, value.month, value.day))
    return _to_int(type, value, what, row)


def _to_vector(type: Type, value: Any, what: str, row: int) -> list[float]:
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        if len(value) != type.length:
            raise wrong(what, row, type, f"{len(value)} elements")
        return [_to_float(Float32, v, what, row) for v in value]
    raise wrong(what, row, type, _show(value))


_PYTHON: dict[int, object] = {1: bool, 2: int, 3: int, 4: float, 5: float, 8: int}
_NUMPY: dict[object, Any] = {bool: np.bool_, int: np.int64, float: np.float64}
"""Python's own class for a type, and what NumPy makes of lists of it."""

_ONE_VALUE = (str, bytes, bytearray, memoryview, Mapping, set, frozenset)
"""What can be iterated over and is still no list of values: one value, or values in no order."""

_CONVERT = {1: _to_bool, 2: _to_int, 3: _to_int, 4: _to_float, 5: _to_float, 8: _to_timestamp, 9: _to_vector}


def _show(value: object) -> str:
    text = repr(value).replace("\n", " ")
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({value.__class__.__name__})"


def _is_nat(value: object) -> bool:
    return value.__class__.__name__ in ("NaTType", "NAType") or (
        isinstance(value, np.datetime64) and bool(np.isnat(value))
    )


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_us(instant: datetime) -> int:
    """Return microseconds since the Unix epoch, exactly. A naive datetime means UTC."""
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    delta = instant - EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def from_us(us: int) -> datetime | None:
    """Return the aware UTC datetime of ``us`` microseconds since the epoch; None outside of years 1 to 9999."""
    try:
        return EPOCH + timedelta(microseconds=us)
    except OverflowError:
        return None
