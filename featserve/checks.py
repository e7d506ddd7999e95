"""What a row must satisfy before anything is stored: the view's constraints, and times that are not in the future.

Comes in: a typed batch. Goes out: nothing, or an InvalidRequest that names row, column and reason. Checks whole columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featserve.batch import EventBatch
from featserve.codec import check_key_sizes
from featserve.definitions import FeatureView, Field
from featserve.errors import InvalidRequest, Violation
from featserve.types import Array, Column, Mask, column, from_us

MAX_VIOLATIONS = 16


def check_rows(view: FeatureView, batch: EventBatch, latest_us: int) -> None:
    """Refuse a batch with a row that breaks a constraint of ``view`` or lies after ``latest_us``.

    The error holds up to 16 violations, ``rows[3].temp``; the batch's columns already have the view's types.
    """
    check_key_sizes({name: batch.columns[name] for name in view.entity.keys})
    violations: list[Violation] = []
    for name in view.entity.keys:
        if batch.columns[name].null_count:
            _note(violations, name, batch.columns[name], ~_valid(batch.columns[name]), "a key has a value in every row")
    for name, times in (("event_time", batch.event_time_us), ("known_at", batch.known_at_us)):
        late = times > latest_us
        if late.any():
            row = int(np.argmax(late))
            violations.append(
                Violation(
                    f"rows[{row}].{name}",
                    f"{_instant(times[row])} is later than {_instant(latest_us)}, the last instant accepted now",
                )
            )
    for f in view.features:
        _check_field(f, batch.columns[f.name], violations)
    if violations:
        raise InvalidRequest(
            f"view {view.id}: " + "; ".join(f"{v.field}: {v.description}" for v in violations[:3])
            + (f"; and {len(violations) - 3} more" if len(violations) > 3 else ""),
            violations=violations[:MAX_VIOLATIONS],
        )  # fmt: skip


def _check_field(f: Field, col: Column, violations: list[Violation]) -> None:
    valid = _valid(col)
    if f.not_null and col.null_count:
        _note(violations, f.name, col, ~valid, "is null, and the feature is declared not_null")
    if f.not_nan:
        nan = np.isnan(col.values) if not f.type.vector else np.isnan(col.values).any(axis=1)
        _note(violations, f.name, col, nan & valid, "is NaN, and the feature is declared not_nan")
    if f.min is not None:
        _note(violations, f.name, col, (col.values < f.min) & valid, f"is less than the declared min {f.min}")
    if f.max is not None:
        _note(violations, f.name, col, (col.values > f.max) & valid, f"is greater than the declared max {f.max}")
    if f.allowed is not None:
        allowed = column(f.type, [f.value(v) for v in f.allowed])
        _note(violations, f.name, col, ~_is_in(col, allowed) & valid, f"is not one of {list(f.allowed)}")


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


def _note(violations: list[Violation], name: str, col: Column, wrong: Array, description: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        shown = "" if "null" in description or "NaN" in description else f"{_shown(col, row)} "
        violations.append(Violation(f"rows[{row}].{name}", f"{shown}{description}"))


def _shown(col: Column, row: int) -> str:
    value: Any = col.take(np.array([row])).to_list()[0]
    text = repr(value) if not hasattr(value, "isoformat") else value.isoformat()
    return text if len(text) <= 60 else text[:57] + "..."


def _valid(col: Column) -> Mask:
    return np.ones(len(col), np.bool_) if col.valid is None else col.valid


def _instant(us: int) -> str:
    instant = from_us(int(us))
    return instant.isoformat() if instant is not None else f"{int(us)} us"
