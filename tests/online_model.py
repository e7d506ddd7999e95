"""A model of the online path that holds every row as Python values, and bit-exact comparison of answers with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from featserve.batch import EventBatch
from featserve.definitions import FeatureService, FeatureView, Field
from featserve.matrix import FeatureMatrix, Status
from featserve.types import NEVER_US, Array, Bytes, Column, String, Timestamp, Type, column
from tests.random_data import Cell, cells_of

Key = tuple[Cell, ...]


@dataclass(frozen=True)
class Row:
    """A row: event time, known at and sequence, and each feature's bytes."""

    stamp: tuple[int, int, int]
    cells: dict[str, Cell]


class Model:
    """Every row that was ever taken, by view and entity. It answers by looking at all of them."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, Key], list[Row]] = {}

    def add(self, view: FeatureView, batch: EventBatch) -> int:
        """Add rows in order of arrival; return how many entities now have a newest row that is one of these."""
        cells = {name: cells_of(col) for name, col in batch.columns.items()}
        added: dict[tuple[str, Key], list[Row]] = {}
        for i in range(len(batch)):
            stamp = (int(batch.event_time_us[i]), int(batch.known_at_us[i]), int(batch.sequence[i]))
            where = (view.id, tuple(cells[name][i] for name in view.entity.keys))
            row = Row(stamp, {f.name: cells[f.name][i] for f in view.features})
            self.rows.setdefault(where, []).append(row)
            added.setdefault(where, []).append(row)
        return sum(any(row is self.newest(where) for row in rows) for where, rows in added.items())

    def newest(self, where: tuple[str, Key]) -> Row | None:
        """Return the row with the greatest stamp, of equal ones the last that came."""
        best = None
        for row in self.rows.get(where, ()):
            if best is None or row.stamp >= best.stamp:
                best = row
        return best

    def answer(self, view: FeatureView, key: Key, now_us: int) -> tuple[Status, int, dict[str, Cell]]:
        """Return the status, the event time and the values of one entity at an instant."""
        row = self.newest((view.id, key))
        nothing: dict[str, Cell] = {f.name: None for f in view.features}
        if row is None or row.stamp[0] > now_us or row.stamp[1] > now_us:
            return Status.NOT_FOUND, NEVER_US, nothing
        if view.ttl_us is not None and row.stamp[0] < now_us - view.ttl_us:
            return Status.EXPIRED, row.stamp[0], nothing
        return Status.PRESENT, row.stamp[0], row.cells


def check_answer(
    matrix: FeatureMatrix, service: FeatureService, model: Model, keys: Mapping[str, Column], now_us: int
) -> None:
    """Compare every part of an answer with the model's, bit by bit."""
    rows = range(len(next(iter(keys.values()))))
    cells = {name: cells_of(col) for name, col in keys.items()}
    answers = {
        view.id: [model.answer(view, tuple(cells[name][i] for name in view.entity.keys), now_us) for i in rows]
        for view in service.views
    }
    assert matrix.view_status.tolist() == [[answers[v.id][i][0] for v in service.views] for i in rows]
    if matrix.event_times is not None:
        assert matrix.event_times.tolist() == [[answers[v.id][i][1] for v in service.views] for i in rows]
    tensor: list[Array] = []
    typed = iter(matrix.columns)
    for position, (name, field, view) in enumerate(service.fields):
        found = [values[field.name] for _, _, values in answers[view.id]]
        _check_validity(matrix, position, found, [status for status, _, _ in answers[view.id]])
        if matrix.schema.features[position].tensor is not None:
            tensor.append(np.stack([_numbers(cell, field, service.dtype) for cell in found]))
            _check_column(matrix.column(name), field, service.dtype, found)
            continue
        col = next(typed)
        assert col.type == field.type
        empty = bytes(field.type.width)
        wanted = [_default(field) or empty if cell is None else cell for cell in found]
        assert cells_of(Column(col.type, col.values, col.offsets)) == wanted, name
    assert next(typed, None) is None
    values = np.concatenate(tensor, axis=1) if tensor else np.empty((len(rows), 0), service.dtype.dtype)
    assert matrix.values.dtype == service.dtype.dtype
    assert matrix.values.shape == values.shape
    assert matrix.values.flags.c_contiguous
    assert bits(matrix.values) == bits(values)


def _check_validity(matrix: FeatureMatrix, position: int, found: list[Cell], view_status: list[Status]) -> None:
    valid = [cell is not None for cell in found]
    if matrix.valid is None:
        assert all(valid)
    else:
        assert matrix.valid[:, position].tolist() == valid
    status = [s if s is not Status.PRESENT or ok else Status.NULL for s, ok in zip(view_status, valid, strict=True)]
    assert matrix.status[:, position].tolist() == status


def _check_column(col: Column, field: Field, dtype: Type, found: list[Cell]) -> None:
    """Check a feature of the tensor taken out of it as a column: floats as served, all else as stored."""
    assert col.type == (field.type if not field.type.floating or field.type.vector else dtype)
    with np.errstate(invalid="ignore"):
        wanted = [None if c is None else _numbers(c, field, dtype).astype(col.type.dtype).tobytes() for c in found]
    assert cells_of(col) == wanted


def _numbers(cell: Cell, field: Field, dtype: Type) -> Array:
    """Return what a tensor of ``dtype`` holds for a cell: the default where it is null, else NaN."""
    if cell is None:
        cell = _default(field)
    if cell is None:
        return np.full(field.type.length, np.nan, dtype.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.frombuffer(cell, field.type.dtype).astype(dtype.dtype)


def _default(field: Field) -> Cell:
    if field.default is None:
        return None
    return cells_of(column(field.type, [field.value(field.default)]))[0]


def same(a: FeatureMatrix, b: FeatureMatrix) -> None:
    """Assert that two answers are equal to the last bit, down to what stands in the place of a null."""
    assert a.schema == b.schema
    assert bits(a.values) == bits(b.values)
    assert a.view_status.tolist() == b.view_status.tolist()
    assert a.status.tolist() == b.status.tolist()
    assert (a.event_times is None) == (b.event_times is None)
    if a.event_times is not None and b.event_times is not None:
        assert a.event_times.tolist() == b.event_times.tolist()
    for f in a.schema.features:
        first, second = a.column(f.name), b.column(f.name)
        assert cells_of(first) == cells_of(second), f.name
        assert bare(first) == bare(second), f.name


def bits(values: Array) -> list[list[int]]:
    """Return the bits of floats as numbers, which NaN and -0.0 cannot fool."""
    found: list[list[int]] = values.view(f"<u{values.itemsize}").tolist()
    return found


def bare(col: Column) -> list[Cell]:
    """Return the bytes of each value, of what stands in the place of a null, too."""
    return cells_of(Column(col.type, col.values, col.offsets))


def check_frames(matrix: FeatureMatrix) -> None:
    """Check that the dictionary, the Arrow table and the pandas frame of an answer hold exactly its values."""
    lists, table, frame = matrix.to_dict(), matrix.to_arrow(), matrix.to_pandas()
    names = [f.name for f in matrix.schema.features]
    assert list(lists) == names
    assert table.column_names == names
    assert list(frame.columns) == names
    for f in matrix.schema.features:
        col = matrix.column(f.name)
        cells = bare(col) if f.default_json else cells_of(col)
        arrow, pandas = table[f.name], frame[f.name]
        assert arrow.null_count == cells.count(None)
        if col.type is Timestamp:
            assert lists[f.name] == [None if cell is None else _instant(cell) for cell in cells]
            assert arrow.cast("int64").to_pylist() == [_value(cell, col.type) for cell in cells]
            # pandas has no timestamp of the least int64: that is its null.
            found = pandas.to_numpy("M8[us]").astype(np.int64).tolist()
            assert found == [NEVER_US if cell is None else _value(cell, col.type) for cell in cells]
            continue
        expected = [_value(cell, col.type) for cell in cells]
        assert repr(lists[f.name]) == repr(expected), f.name
        assert repr(arrow.to_pylist()) == repr(expected), f.name
        in_frame = [None if _missing(v) else v.tolist() if col.type.vector else v for v in pandas.tolist()]
        assert repr(in_frame) == repr([None if _missing(v) else v for v in expected]), f.name


def _value(cell: Cell, type: Type) -> object:
    """Return the Python value of a cell; a timestamp is its microseconds."""
    if cell is None or type is Bytes:
        return cell
    if type is String:
        return cell.decode()
    values = np.frombuffer(cell, type.dtype).tolist()
    return values if type.vector else values[0]


def _instant(cell: bytes) -> datetime | None:
    """Return the datetime of a timestamp, None where Python has none."""
    us = int.from_bytes(cell, "little", signed=True)
    if not -62_135_596_800_000_000 <= us < 253_402_300_800_000_000:
        return None
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


def _missing(value: object) -> bool:
    """Say whether pandas means a null by ``value``; of a NaN among floats it cannot tell."""
    return value is None or value.__class__.__name__ == "NAType" or (isinstance(value, float) and value != value)
