"""What callers bring, lists, arrays or a frame of theirs, as the mapping of columns that the rest works with.

Frames are recognised by what they can do, so that pandas, polars and pyarrow need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from featserve.batch import Arrival, EntityKeys, Int64s, check_request_columns, column_names, ragged
from featserve.errors import hint, invalid
from featserve.schema import ServiceSchema
from featserve.types import Column, Timestamp, Type, column

Frame = Any
"""A mapping of names to lists or arrays, a pandas or polars DataFrame, or a pyarrow Table."""


def is_frame(data: object) -> bool:
    """Say whether ``data`` is a frame of another library, rather than a mapping."""
    return not isinstance(data, Mapping) and (hasattr(data, "column_names") or hasattr(data, "columns"))


def mapping(data: Frame, wanted: Iterable[str], where: str) -> dict[str, Any]:
    """Return the columns of ``data`` by name: all of a mapping, those ``wanted`` of a frame, which may hold more.

    ``where`` names the whole in errors.
    """
    if isinstance(data, Mapping):
        return {name: _values(values) for name, values in data.items()}
    if hasattr(data, "collect"):
        raise invalid(where, f"a {data.__class__.__name__} holds no rows yet; collect it first")
    if not is_frame(data):
        raise invalid(where, f"expected a mapping of lists or arrays, or a frame, got {data.__class__.__name__}")
    names = [str(name) for name in getattr(data, "column_names", getattr(data, "columns", ()))]
    chosen = [name for name in wanted if name in names]
    for name in chosen:
        if names.count(name) > 1:
            raise invalid(f"{where}.{name}", "the column stands twice in the frame")
    return {name: _values(data[name]) for name in chosen}


def _values(series: Any) -> Any:
    """Return one column of another library as an array, or as a list where that does not hold all of it.

    Nulls are None or NaT, and for pandas NaN, which is how it marks them. What is no such column is returned as it is.
    """
    if isinstance(series, list | np.ndarray):
        return series
    if hasattr(series, "to_pylist"):  # pyarrow
        kind, nulls = str(series.type), series.null_count
        if not _in_array(kind, nulls):
            return series.to_pylist()
        return series.to_numpy() if hasattr(series, "num_chunks") else series.to_numpy(zero_copy_only=False)
    if hasattr(series, "to_physical"):  # polars
        return series.to_numpy() if _in_array(str(series.dtype), series.null_count()) else series.to_list()
    if not hasattr(series, "isna") or not hasattr(series, "dtype"):
        return series
    if series.dtype.kind == "M" and not hasattr(series.dtype, "pyarrow_dtype"):
        return series.to_numpy(f"M8[{series.dtype.unit}]" if hasattr(series.dtype, "tz") else None)
    if series.dtype.kind in "OTU" or series.isna().any():
        return [None if gone else value for value, gone in zip(series.tolist(), series.isna(), strict=True)]
    return series.to_numpy()


def _in_array(dtype: str, nulls: int) -> bool:
    """Say whether a NumPy array holds a column of pyarrow's or polars': instants with nulls, numbers without."""
    kind = dtype.lower()
    if kind.startswith(("timestamp", "datetime", "date")):
        return True
    return not nulls and kind.startswith(("int", "uint", "float", "double", "bool"))


def request_of(keys: Frame, request: Frame | None, schema: ServiceSchema) -> tuple[EntityKeys, dict[str, Column]]:
    """Return a request's checked keys and other columns, as ``schema`` says.

    ``request``: the other columns; None for a service that needs none, or for a frame of keys that holds them.
    """
    checked = EntityKeys.of(mapping(keys, schema.keys, "keys"), schema.keys)
    if request is None:
        if not schema.request_columns:
            return checked, {}
        request = keys if is_frame(keys) else {}
    return checked, check_request_columns(
        mapping(request, schema.request_columns, "request_columns"), schema.request_columns, checked.count
    )


def columns_of(data: Frame, expected: Mapping[str, Type]) -> dict[str, Column]:
    """Return the columns of rows to write; raises InvalidRequest that names what is missing, extra or wrong."""
    given = mapping(data, expected, "rows")
    if given.keys() != expected.keys():
        raise column_names("columns", given, expected)
    columns = {name: column(type_, given[name], f"rows.{name}") for name, type_ in expected.items()}
    if len({len(col) for col in columns.values()}) > 1:
        raise ragged("columns", {name: len(col) for name, col in columns.items()})
    return columns


def rows_of(data: Frame, expected: Mapping[str, Type], event_time: Any, known_at: Any | None) -> Arrival:
    """Return rows to write.

    ``event_time`` and ``known_at``: the name of a column of ``data``, one datetime for all rows, or one for each.
    """
    extra = [name for name in (event_time, known_at) if isinstance(name, str)]
    given = mapping(data, dict.fromkeys([*expected, *extra]), "rows")
    for name in extra:
        if name not in given:
            raise invalid("columns", f"there is no time column {name!r}{hint(name, given)}")
    taken = {name: given[name] for name in extra}
    kept = {name: values for name, values in given.items() if name in expected or name not in extra}
    columns = columns_of(kept, expected)
    rows = len(next(iter(columns.values())))
    if rows == 0:
        raise invalid("columns", "the batch is empty; send at least one row")
    known = (
        None
        if known_at is None
        else times_of("known_at", taken.get(known_at) if isinstance(known_at, str) else known_at, rows)
    )
    event = times_of("event_time", taken.get(event_time) if isinstance(event_time, str) else event_time, rows)
    return Arrival(columns, event, known)


def times_of(what: str, values: Any, rows: int) -> Int64s:
    """Return int64 microseconds of shape (rows,) from one datetime or a sequence of them (naive means UTC)."""
    if isinstance(values, datetime | np.datetime64):
        values = [values] * rows
    values = _values(values)
    if not isinstance(values, Sequence | np.ndarray):
        raise invalid(what, f"expected a datetime, datetimes or a column name, got {values.__class__.__name__}")
    times = column(Timestamp, values, what)
    if times.null_count:
        assert times.valid is not None
        raise invalid(what, f"row {int(np.argmin(times.valid))} is null; every row has one")
    if len(times) != rows:
        raise ragged(what, {what: len(times), "rows": rows})
    return times.values
