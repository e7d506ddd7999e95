"""What a row must satisfy before anything is stored: the view's constraints, and times that are not in the future.

Comes in: a typed batch, or a view's batch source. Goes out: the rows that came in, or an error that names row, column
and reason. Columns are checked whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from featserve.batch import EventBatch, Int64s
from featserve.codec import check_key_sizes
from featserve.definitions import Field, Rows
from featserve.errors import MAX_VIOLATIONS, InvalidRequest, SourceError, Violation
from featserve.sources import Progress, read_batches
from featserve.types import Column, Mask, Timestamp, column, from_us

READ_ROWS = 65_536
"""Rows of a source that are read and checked at once."""


def checked_batches(
    rows: Rows, root: Path, *, batch_rows: int = READ_ROWS, progress: Progress | None = None
) -> Iterator[EventBatch]:
    """Read the source of ``rows`` as ``sources.read_batches`` does, and refuse rows that break its constraints.

    Raises SourceError that names file or source, row and column.
    """
    before = 0
    for batch in read_batches(rows, root, batch_rows=batch_rows, progress=progress):
        try:
            check_rows(rows, batch, first_row=before)
        except InvalidRequest as error:
            assert rows.source is not None
            raise SourceError(f"{rows.source.path}: {error}", violations=error.violations) from None
        yield batch
        before += len(batch)


def check_rows(rows: Rows, batch: EventBatch, latest_us: int | None = None, first_row: int = 0) -> None:
    """Refuse a batch with a row that breaks a constraint of ``rows`` or lies after ``latest_us``, if that is given.

    The error holds up to 16 violations, ``rows[3].temp``, counted from ``first_row``; the batch's columns already have
    their types.
    """
    check_key_sizes({name: batch.columns[name] for name in rows.keys}, first_row)
    found = _Violations(first_row)
    for name in rows.keys:
        found.note(name, ~_valid(batch.columns[name]), lambda row: "is null; a key has a value in every row")
    if latest_us is not None:
        last = _instant(latest_us)
        for name, times in (("event_time", batch.event_time_us), ("known_at", batch.known_at_us)):
            found.note(name, times > latest_us, partial(_late, times, last))
    for f in rows.features:
        if f.constrained:
            _check_field(f, batch.columns[f.name], found)
    if found.violations:
        shown = [f"{v.field}: {v.description}" for v in found.violations]
        more = f"; and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise InvalidRequest(f"{rows.id}: {'; '.join(shown[:3])}{more}", violations=found.violations[:MAX_VIOLATIONS])


def _late(times: Int64s, last: str, row: int) -> str:
    return f"{_instant(times[row])} is later than {last}, the last instant accepted now"


class _Violations:
    """What is wrong so far: the first row at fault for each column and constraint."""

    def __init__(self, first_row: int) -> None:
        self.violations: list[Violation] = []
        self._first_row = first_row

    def note(self, name: str, wrong: Mask, describe: Callable[[int], str]) -> None:
        """Note the first row of ``wrong``, bool of shape (n,), if any."""
        if wrong.any():
            row = int(np.argmax(wrong))
            self.violations.append(Violation(f"rows[{self._first_row + row}].{name}", describe(row)))


def _check_field(f: Field, col: Column, found: _Violations) -> None:
    if f.not_null:
        found.note(f.name, ~_valid(col), lambda row: "is null, and the feature is declared not_null")
    for wrong, describe in _wrong(f, col):
        found.note(f.name, wrong & _valid(col), describe)


def _wrong(f: Field, col: Column) -> Iterator[tuple[Mask, Callable[[int], str]]]:
    """Yield, for each constraint on values, which break it, nulls among them, and what is to be said of a row."""
    if f.not_nan:
        nan: Mask = np.isnan(col.values)
        if f.type.vector:
            nan = np.logical_or.reduce(nan, axis=1)
        yield nan, lambda row: "is NaN, and the feature is declared not_nan"
    if f.min is not None:
        least = column(f.type, [f.min])
        yield col.values < least.values, lambda row: f"{_shown(col, row)} is less than the min {_shown(least, 0)}"
    if f.max is not None:
        most = column(f.type, [f.max])
        yield col.values > most.values, lambda row: f"{_shown(col, row)} is greater than the max {_shown(most, 0)}"
    if f.allowed is not None:
        allowed = column(f.type, [f.value(v) for v in f.allowed])
        yield ~_is_in(col, allowed), lambda row: f"{_shown(col, row)} is not one of {_listed(allowed)}"


def _is_in(col: Column, allowed: Column) -> Mask:
    """Return bool of shape (n,): whether each value is one of those of ``allowed``."""
    if col.offsets is None:
        return np.isin(col.values, allowed.values)
    # Compared length by length, so that the bytes of all candidates of one length are compared at once.
    lengths = np.diff(col.offsets)
    found = np.zeros(len(col), np.bool_)
    for value in allowed.to_bytes_list():
        rows = np.nonzero(lengths == len(value))[0]
        index = col.offsets[rows][:, None] + np.arange(len(value))
        found[rows] |= (col.values[index] == np.frombuffer(value, np.uint8)).all(axis=1)
    return found


def _shown(col: Column, row: int) -> str:
    if col.type is Timestamp:
        return _instant(col.values[row])
    if col.type.floating:
        return str(col.values[row])  # the shortest number that means it
    text = repr(col.take(np.array([row])).to_list()[0])
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(col: Column) -> str:
    shown = ", ".join(_shown(col, row) for row in range(min(len(col), 8)))
    return shown + (f" and {len(col) - 8} more" if len(col) > 8 else "")


def _valid(col: Column) -> Mask:
    return np.ones(len(col), np.bool_) if col.valid is None else col.valid


def _instant(us: int) -> str:
    instant = from_us(int(us))
    return instant.isoformat() if instant is not None else f"{int(us)} us"
