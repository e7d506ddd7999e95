"""What is checked of a row before anything is stored, against a checker that looks at one cell at a time."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from featserve.batch import EventBatch
from featserve.checks import check_rows
from featserve.definitions import Entity, FeatureView, Field
from featserve.errors import InvalidRequest
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
from tests.random_data import Cell, cells_of, random_batch, random_entity, random_keys, random_view

USER = Entity("user", {"user": String})
NOW_US = 1_700_000_000_000_000
NAN = float("nan")


def check(field: Field, values: list[Any] | Column, **options: Any) -> None:
    """Check rows of a view of one feature."""
    col = values if isinstance(values, Column) else column(field.type, values)
    columns = {"user": column(String, ["u"] * len(col)), field.name: col}
    times = np.full(len(col), NOW_US)
    check_rows(FeatureView("v", USER, [field]).rows, EventBatch(columns, times, times, times), **options)


ALLOWED: list[tuple[Field, list[Any]]] = [
    (Field("a", Int32, min=-1, max=3), [-1, 0, 3, None]),
    (Field("a", Float32, min=0.1), [np.float32(0.1), 1, None, NAN]),
    (Field("a", Float32, max=0.1), [np.float32(0.1), 0, float("-inf")]),
    (Field("a", Float64, max=2**53), [2**53, NAN, float("-inf")]),
    (Field("a", Float64, allowed=[0, 1.5]), [0.0, -0.0, 1.5, None]),
    (Field("a", Float64, not_nan=True), [0.0, float("inf"), None]),
    (Field("a", Float64, not_null=True), [0.0, NAN]),
    (Field("a", String, allowed=["", "é", "a\0"]), ["é", "", "a\0", None]),
    (Field("a", Bytes, allowed=[b"\xff", b""]), [b"", b"\xff", None]),
    (Field("a", Bool, allowed=[True]), [True, None]),
    (Field("a", Timestamp, min=datetime(2024, 1, 1)), [datetime(2024, 1, 1, tzinfo=UTC), 2**63 - 1, None]),
    (Field("a", Vector(2), not_nan=True, not_null=True), [[0.0, float("inf")]]),
]


@pytest.mark.parametrize(("field", "values"), ALLOWED, ids=repr)
def test_rows_within_the_constraints(field: Field, values: list[Any]) -> None:
    """Bounds are inclusive, a null passes all but not_null, and a NaN all but not_nan and allowed."""
    check(field, values)


REFUSED: list[tuple[Field, list[Any], str]] = [
    (Field("a", Int32, min=-1), [0, -2, -3], r"rows\[1\].a: -2 is less than the min -1"),
    (Field("a", Int64, max=2**53), [2**53 + 1], "a: 9007199254740993 is greater than the max 9007199254740992"),
    (Field("a", Float32, min=0.1), [np.float32(0.099999994)], "0.099999994 is less than the min 0.1"),
    (Field("a", Float32, max=0.5), [float("inf")], "inf is greater than the max 0.5"),
    (Field("a", Float64, min=0), [None, -5e-324], r"rows\[1\].a: -5e-324 is less than the min 0.0"),
    (Field("a", Float64, not_nan=True), [None, NAN], r"rows\[1\].a: is NaN, and the feature is declared not_nan"),
    (Field("a", Float64, allowed=[1, 2]), [1, NAN], r"rows\[1\].a: nan is not one of 1.0, 2.0"),
    (Field("a", String, not_null=True), ["", None], r"rows\[1\].a: is null, and the feature is declared not_null"),
    (Field("a", String, allowed=["a", "b"]), ["a", "ab"], r"rows\[1\].a: 'ab' is not one of 'a', 'b'"),
    (Field("a", String, allowed=["a"]), ["a\0"], r"'a\\x00' is not one of 'a'"),
    (Field("a", String, allowed=["a"]), ["x" * 500], r"'x{56}\.\.\. is not one of 'a'"),
    (Field("a", Bytes, allowed=[b"\xff"]), [b"\xfe"], r"b'\\xfe' is not one of b'\\xff'"),
    (Field("a", Int64, allowed=range(100)), [-1], "-1 is not one of 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"),
    (Field("a", Bool, allowed=[False]), [True], "True is not one of False"),
    (
        Field("a", Timestamp, min=datetime(2024, 1, 1)), [0],
        r"1970-01-01T00:00:00\+00:00 is less than the min 2024-01-01T00:00:00\+00:00",
    ),
    (Field("a", Timestamp, max=0), [2**63 - 1], r"9223372036854775807 us is greater than the max 1970-01-01T00:00:00"),
    (Field("a", Vector(2), not_nan=True), [[0, 0], None, [0, NAN]], r"rows\[2\].a: is NaN"),
    (Field("a", Vector(2), not_null=True), [None], r"rows\[0\].a: is null"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "values", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_rows_outside_of_the_constraints(field: Field, values: list[Any], message: str) -> None:
    """A value outside of its constraints is refused: the message and the violation name row, column and reason."""
    with pytest.raises(InvalidRequest, match=f"v@1: .*{message}") as caught:
        check(field, values)
    (violation,) = caught.value.violations
    assert str(caught.value) == f"v@1: {violation.field}: {violation.description}"
    assert len(str(caught.value)) < 250


def test_rows_are_counted_from_the_first_of_the_source() -> None:
    """The rows of a later chunk of a file are named by their number in the file."""
    with pytest.raises(InvalidRequest, match=r"rows\[1000001\].a: 5 is greater"):
        check(Field("a", Int64, max=4), [4, 5], first_row=1_000_000)


def test_keys_are_checked() -> None:
    """A key that is null or too long is refused with its row."""
    view = FeatureView("v", USER, [Field("a", Int64)])
    times = np.zeros(2, np.int64)
    for keys, message in ((["u", None], r"rows\[1\].user: is null"), (["u", "x" * 5_000], "row 1 is 5,000 bytes long")):
        batch = EventBatch({"user": column(String, keys), "a": column(Int64, [1, 2])}, times, times, times)
        with pytest.raises(InvalidRequest, match=message):
            check_rows(view.rows, batch)


def test_times_after_the_last_instant() -> None:
    """Both times of a row are at most the last instant that is accepted, where there is one."""
    view = FeatureView("v", USER, [Field("a", Int64)])
    columns = {"user": column(String, ["u", "u"]), "a": column(Int64, [1, 2])}
    early, late = np.array([0, NOW_US]), np.array([0, NOW_US + 1])
    check_rows(view.rows, EventBatch(columns, early, early, early), NOW_US)
    check_rows(view.rows, EventBatch(columns, late, late, early))
    for name, event, known in (("event_time", late, early), ("known_at", early, late)):
        with pytest.raises(InvalidRequest, match=rf"rows\[1\].{name}: .*20.000001.* is later than .* accepted now"):
            check_rows(view.rows, EventBatch(columns, event, known, early), NOW_US)


def test_many_violations_are_told_in_part() -> None:
    """A batch that is wrong in many ways is refused with 16 violations, three of them in the message."""
    fields = [Field(f"f{i}", Int64, max=0) for i in range(30)]
    columns = {f.name: column(Int64, [0, 1]) for f in fields} | {"user": column(String, ["u", "u"])}
    times = np.zeros(2, np.int64)
    with pytest.raises(InvalidRequest, match=r"rows\[1\].f0: .*rows\[1\].f2: [^;]*; and 27 more$") as caught:
        check_rows(FeatureView("v", USER, fields).rows, EventBatch(columns, times, times, times))
    assert [v.field for v in caught.value.violations] == [f"rows[1].f{i}" for i in range(16)]


def naive_problems(f: Field, cells: list[Cell]) -> list[str]:
    """Return, for one column, the first row at fault for each constraint, cell by cell."""
    first: dict[str, int] = {}
    for row, cell in enumerate(cells):
        wrong = []
        if cell is None:
            wrong += ["null"] if f.not_null else []
        else:
            numbers = naive_values(f.type, cell)
            nan = any(isinstance(n, float) and n != n for n in numbers)
            wrong += ["nan"] if f.not_nan and nan else []
            wrong += ["min"] if f.min is not None and not nan and numbers[0] < limit(f, f.min) else []
            wrong += ["max"] if f.max is not None and not nan and numbers[0] > limit(f, f.max) else []
            allowed = None if f.allowed is None else [limit(f, value) for value in f.allowed]
            wrong += ["allowed"] if allowed is not None and numbers[0] not in allowed else []
        for kind in wrong:
            first.setdefault(kind, row)
    order = ["null", "nan", "min", "max", "allowed"]
    return [f"rows[{first[kind]}].{f.name}" for kind in order if kind in first]


def naive_values(type: Type, cell: bytes) -> list[Any]:
    if type.variable:
        return [cell]
    letter = {Bool: "?", Int32: "i", Int64: "q", Timestamp: "q", Float64: "d"}.get(type, "f")
    return list(struct.unpack(f"<{type.length}{letter}", cell))


def limit(f: Field, value: Any) -> Any:
    """Return a declared value as the cells have it: strings as bytes, a float32 as its nearest double."""
    if f.type.variable:
        return value.encode("utf-8" if f.type is String else "latin-1")
    if f.type is not Float32:
        return value
    return float(value) if np.isinf(value) else float(np.float32(value))


def test_random_batches_equal_the_naive_checker(rng: np.random.Generator) -> None:
    """On random views and rows, what is refused, and in which order, is what looking at every cell finds."""
    refused = 0
    for _ in range(300):
        entity = random_entity(rng, "e")
        view = random_view(rng, "v", entity, features=4, constraints=True)
        batch = random_batch(rng, view, random_keys(rng, entity, 4), NOW_US, int(rng.integers(1, 12)), null_share=0.1)
        expected = [p for f in view.features for p in naive_problems(f, cells_of(batch.columns[f.name]))]
        found: list[str] = []
        try:
            check_rows(view.rows, batch)
        except InvalidRequest as error:
            found = [violation.field for violation in error.violations]
        assert found == expected
        refused += bool(expected)
    assert 50 < refused < 300
