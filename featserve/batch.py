"""Typed columns with a role: ``EntityKeys`` asks for features, ``EventBatch`` brings rows of a view.

Both are plain values over ``types.Column``; neither knows a store, a file or a wire.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from featserve.errors import MAX_VIOLATIONS, InvalidRequest, Violation, hint, invalid
from featserve.types import Column, Type, column, value_class

Int64s = npt.NDArray[np.int64]


@value_class
class EntityKeys:
    """The key columns of one request: ``columns`` by name, each of ``count`` values, none of them null."""

    columns: Mapping[str, Column]
    count: int

    @classmethod
    def of(cls, keys: Mapping[str, Column | Iterable[Any]], expected: Mapping[str, Type]) -> EntityKeys:
        """Return checked keys from columns, lists or arrays by name.

        ``expected``: every key column and its type. Raises InvalidRequest that names the column: missing, extra, of
        another type, ragged, empty, or holding a null.
        """
        if keys.keys() != expected.keys():
            raise column_names("keys", keys, expected)
        columns: dict[str, Column] = {}
        count = -1
        for name, type_ in expected.items():
            given = keys[name]
            col = given if isinstance(given, Column) else column(type_, given, f"keys.{name}")
            if col.type is not type_ and col.type != type_:
                raise invalid(f"keys.{name}", f"expected {type_}, got {col.type}")
            if col.valid is not None and col.null_count:
                raise invalid(
                    f"keys.{name}", f"row {int(np.argmin(col.valid))} is null; a key has a value in every row"
                )
            columns[name] = col
            rows = len(col)
            if count not in (-1, rows):
                raise ragged("keys", {n: len(c) for n, c in columns.items()})
            count = rows
        if count == 0:
            raise invalid("keys", "the batch is empty; send at least one row")
        return cls(columns, count)


@value_class
class Integers:
    """The keys of a request for a service with one key, of integers: ``count`` of them, ``raw`` as they came."""

    raw: bytes
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """n rows of a view as they arrive: ``columns`` by name, int64 microseconds of shape (n,).

    ``known_at_us``: None where the rows are known from their arrival, or from their event time where that is later.
    ``source_positions``: int64 of shape (n,), each row's position in its batch source; None for rows of no source.
    """

    columns: Mapping[str, Column]
    event_time_us: Int64s
    known_at_us: Int64s | None = None
    source_positions: Int64s | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EventBatch:
    """n rows of one feature view.

    ``columns``: every key column and feature by name. ``event_time_us``, ``known_at_us`` and ``sequence``: int64 of
    shape (n,), the three coordinates of a row (docs: semantics, clocks).
    """

    columns: Mapping[str, Column]
    event_time_us: Int64s
    known_at_us: Int64s
    sequence: Int64s

    def __len__(self) -> int:
        return len(self.event_time_us)

    def take(self, rows: Int64s) -> EventBatch:
        """Return the rows at positions ``rows``, in that order."""
        return EventBatch(
            {name: col.take(rows) for name, col in self.columns.items()},
            self.event_time_us[rows],
            self.known_at_us[rows],
            self.sequence[rows],
        )


@dataclass(frozen=True, slots=True)
class Written:
    """What a write did: ``rows`` were taken, ``stored`` of them are now the newest of their entity.

    ``token``: names the write to whoever asks for features that are at least as new (``at_least``).
    """

    rows: int
    stored: int
    token: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did: of ``events``, so many were ``counted``.

    ``duplicates`` had an id that was there before. ``late`` ones lie before every window of every view. The others have
    no key. ``token``: as in ``Written``.
    """

    events: int
    counted: int
    duplicates: int
    late: int
    token: str = field(default="", compare=False)

    def outcomes(self) -> dict[str, int]:
        """Return how many events came to what."""
        known = {"counted": self.counted, "duplicate": self.duplicates, "late": self.late}
        return known | {"no_key": self.events - sum(known.values())}


def check_request_columns(
    given: Mapping[str, Column | Iterable[Any]], expected: Mapping[str, Type], rows: int
) -> dict[str, Column]:
    """Return a request's other columns, each of the expected type and of ``rows`` values, nulls allowed.

    Raises InvalidRequest that names the column: missing, extra, of another type, or of another length.
    """
    if len(given) != len(expected) or any(name not in expected for name in given):
        raise column_names("request_columns", given, expected)
    columns: dict[str, Column] = {}
    for name, type_ in expected.items():
        values = given[name]
        col = values if isinstance(values, Column) else column(type_, values, f"request_columns.{name}")
        if len(col) != rows:
            raise ragged("request_columns", {name: len(col), "keys": rows})
        columns[name] = col
    return columns


def column_names(where: str, given: Iterable[str], expected: Mapping[str, Type]) -> InvalidRequest:
    """Return the error for columns that are missing, unknown or repeated, naming the first few.

    ``where``: "keys", "request_columns" or "columns" (of a row).
    """
    kind = {"keys": "key column", "request_columns": "request column", "columns": "column"}[where]
    names = Counter(list(given))
    wrong = chain(
        ((name, f"missing {kind} {name!r} ({expected[name]})") for name in expected if name not in names),
        ((name, f"unknown {kind} {name!r}{hint(name, expected)}") for name in names if name not in expected),
        ((name, f"{kind} {name!r} stands twice") for name, times in names.items() if times > 1),
    )
    violations = [Violation(f"{where}.{name}", description) for name, description in islice(wrong, MAX_VIOLATIONS)]
    return InvalidRequest("; ".join(v.description for v in violations), violations=violations)


def ragged(where: str, lengths: Mapping[str, int]) -> InvalidRequest:
    """Return the error for columns of different lengths."""
    shown = ", ".join(f"{name} has {n:,}" for name, n in lengths.items())
    return invalid(where, f"columns differ in length: {shown} rows")
