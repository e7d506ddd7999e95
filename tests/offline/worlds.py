"""Random sources and labels made to hurt a temporal join, and the naive join that says what is right.

Times are drawn from a handful of instants, so that every tie and every boundary of a ttl occurs often; keys from a
handful of values that differ only where a careless encoding does not look.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featserve.arrow import arrow_type
from featserve.definitions import CsvSource, Entity, FeatureView, Field, ParquetSource, Selection
from featserve.types import (
    Bool,
    Bytes,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    Timestamp,
    Type,
    Vector,
)

FIRST, LAST = -(2**63), 2**63 - 1
NOON = 1_700_000_000_000_000
TYPES = (Bool, Int32, Int64, Float32, Float64, String, Bytes, Timestamp, Vector(3))
NAN = float("nan")
VALUES: dict[str, Sequence[Any]] = {
    "bool": [True, False],
    "int32": [-(2**31), -1, 0, 7, 2**31 - 1],
    "int64": [FIRST, -1, 0, 2**53 + 1, LAST],
    "float32": [NAN, -0.0, 0.0, 1.5, float("inf"), float(np.float32(0.1))],
    "float64": [NAN, -0.0, 0.0, 0.1, float("-inf"), 5e-324],
    "string": ["", " ", "null", "é", "a\0b", "x" * 40, 'naïve,"quoted"\n'],
    "bytes": [b"", b"\0", b"\xff\xfe", b"abc"],
    "timestamp": [FIRST + 2, -1, 0, NOON, LAST - 2],
    "vector[3]": [[0.0, -0.0, NAN], [1.0, 2.0, 3.0], [float("inf"), 0.5, -1.0]],
}
Keys = dict[str, Sequence[Any]]
KEYS: Keys = {
    "bool": [True, False],
    "int32": [-(2**31), 0, 3],
    "int64": [FIRST, 0, 1, 2, LAST],
    "string": ["1", "12", "123", "", "a|b", "a", "b|", "1\0", "é", "é", "NULL"],
    "bytes": [b"", b"\0", b"\0\0", b"a", b"\xff"],
    "timestamp": [FIRST + 1, -1, 0, NOON],
}
ENTITIES = (
    Entity("user", {"user_id": Int64}),
    Entity("shop", {"shop": String, "region": String}),
    Entity("device", {"mac": Bytes}),
    Entity("slot", {"opens": Timestamp, "weekend": Bool, "lane": Int32}),
    Entity("mixed", {"region": String, "user_id": Int64}),
)
KEY_TYPES = {name: type for entity in ENTITIES for name, type in entity.keys.items()}


@dataclass(frozen=True, slots=True)
class Row:
    keys: tuple[Any, ...]
    event_time_us: int
    known_at_us: int
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class World:
    """Views with their rows in source order, and labels: ``keys`` by name, with nulls, and a time each."""

    views: list[FeatureView]
    rows: dict[str, list[Row]]
    keys: dict[str, list[Any]]
    time_us: list[int]
    root: Path

    @property
    def labels(self) -> Any:
        """The keys as a pyarrow Table, as ``join`` takes them."""
        return pa.table({name: array(KEY_TYPES[name], values) for name, values in self.keys.items()})

    @property
    def selections(self) -> list[Selection]:
        return [Selection(view, tuple(f.name for f in view.features)) for view in self.views]


def array(type: Type, values: Sequence[Any]) -> Any:
    """Return ``values`` as an Arrow array of the type; instants are microseconds, as datetimes end at the year 9999."""
    if type is Timestamp:
        return pa.array(values, pa.int64()).view(arrow_type(Timestamp))
    return pa.array(values, arrow_type(type))


def naive(world: World, view: FeatureView, label: int) -> tuple[str, int | None, dict[str, Any]]:
    """Return status, event time and values that one label sees of a view: look at every row."""
    key = tuple(world.keys[name][label] for name in view.entity.keys)
    now = world.time_us[label]
    nothing = dict.fromkeys((f.name for f in view.features), None)
    newest = None
    for row in world.rows[view.name]:
        if row.keys == key and row.event_time_us <= now and row.known_at_us <= now:  # noqa: SIM102 - reads as the rule
            if newest is None or (row.event_time_us, row.known_at_us) >= (newest.event_time_us, newest.known_at_us):
                newest = row
    if newest is None:
        return "NOT_FOUND", None, nothing
    if view.ttl_us is not None and newest.event_time_us < now - view.ttl_us:
        return "EXPIRED", newest.event_time_us, nothing
    return "PRESENT", newest.event_time_us, newest.values


def exact(value: Any) -> Any:
    """Return ``value`` so that equal means equal to the last bit: NaN is NaN, and -0.0 is not 0.0."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    return [exact(v) for v in value] if isinstance(value, list) else value


def make_world(rng: np.random.Generator, root: Path, views: int = 5, rows: int = 60, labels: int = 120) -> World:
    """Return a random world whose source files are in ``root``."""
    edges = rng.random() < 0.25
    step = int(rng.choice([1, 1_000, 86_400_000_000]))
    instants = [FIRST, FIRST + 1, -1, 0, 1, LAST - 1, LAST] if edges else [NOON + i * step for i in range(12)]
    pool: Keys = {name: [values[i] for i in rng.permutation(len(values))[:3]] for name, values in KEYS.items()}
    made = [_view(rng, f"view{i}", instants, step, rows, pool, root) for i in range(views)]
    near = instants if edges else [t + d for t in instants for d in (-1, 0, 0, 0, 1)]
    return World(
        [view for view, _ in made],
        {view.name: rows for view, rows in made},
        {name: _some(rng, pool[type.name], labels, nulls=0.03) for name, type in KEY_TYPES.items()},
        _some(rng, near, labels),
        root,
    )


def _some(rng: np.random.Generator, values: Sequence[Any], count: int, nulls: float = 0.0) -> list[Any]:
    missing = rng.random(count) < nulls
    return [None if gone else values[i] for i, gone in zip(rng.integers(len(values), size=count), missing, strict=True)]


def _view(
    rng: np.random.Generator, name: str, instants: list[int], step: int, most: int, pool: Keys, root: Path
) -> tuple[FeatureView, list[Row]]:
    entity = ENTITIES[rng.integers(len(ENTITIES))]
    is_csv = rng.random() < 0.2 and instants[0] != FIRST
    types = [t for t in TYPES if not is_csv or not (t.vector or t in (Timestamp, String, Bytes))]
    features = [Field(f"f{i}", types[t]) for i, t in enumerate(rng.permutation(len(types))[: rng.integers(1, 8)])]
    count = int(rng.choice([0, 1, most, most]))
    ttl_us = rng.choice([0, 1, step, 3 * step, 3 * step + 1, 2**62])
    delay_us = int(rng.choice([0, step, 2 * step + 1]))
    has_known_at = bool(rng.random() < 0.6)
    if not has_known_at:
        instants = [t for t in instants if FIRST < t <= LAST - delay_us]
    lonely = rng.random() < 0.2  # one entity has all the rows
    keys = {k: _some(rng, pool[t.name][:1] if lonely else pool[t.name], count) for k, t in entity.keys.items()}
    event_time = _some(rng, instants, count)
    known_at = _some(rng, instants, count) if has_known_at else [t + delay_us for t in event_time]
    values = {f.name: _some(rng, VALUES[f.type.name], count, nulls=rng.choice([0.0, 0.3])) for f in features}
    rows = [
        Row(tuple(keys[k][i] for k in keys), event_time[i], known_at[i], {f: values[f][i] for f in values})
        for i in range(count)
    ]
    columns = {"Event Time": array(Timestamp, event_time)}
    if has_known_at:
        columns["known"] = array(Timestamp, known_at)
    for key, type in entity.keys.items():
        columns["Key " + key] = array(type, keys[key])
    for field in features:
        columns[field.name] = array(field.type, values[field.name])
    (root / name).mkdir()
    if is_csv:
        entity_is_text = all(type in (Int64, String, Int32, Bool) for type in entity.keys.values())
        is_csv = entity_is_text and _write_csv(root / name, columns)
    if not is_csv:
        _write_parquet(rng, root / name, pa.table(columns))
    make = CsvSource if is_csv else ParquetSource
    source = make(
        f"{name}/*.{'csv' if is_csv else 'parquet'}",
        event_time="Event Time",
        known_at="known" if has_known_at else None,
        delay=timedelta(microseconds=0 if has_known_at else delay_us),
        columns={key: "Key " + key for key in entity.keys},
    )
    ttl = timedelta(microseconds=int(ttl_us)) if ttl_us else None
    return FeatureView(name, entity, features, ttl=ttl, source=source), rows


def _write_parquet(rng: np.random.Generator, folder: Path, table: Any) -> None:
    """Write the rows as one to three files, in several row groups, with types that hold the same values."""
    for i, column in enumerate(table.schema):
        other = {
            pa.timestamp("us", "UTC"): [pa.timestamp("us"), pa.timestamp("us", "Asia/Kathmandu")],
            pa.int32(): [pa.int64(), pa.int32()],
            pa.float32(): [pa.float64(), pa.float32()],
            pa.string(): [pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
        }.get(column.type)
        if other and rng.random() < 0.1:
            target = other[rng.integers(len(other))]
            values = table.column(i)
            values = values.combine_chunks().view(target) if pa.types.is_timestamp(target) else values.cast(target)
            table = table.set_column(i, column.name, values)
    cuts = [0, *sorted(rng.integers(0, len(table) + 1, size=rng.integers(0, 3))), len(table)]
    for number, (start, stop) in enumerate(pairwise(cuts)):
        part = table.slice(start, stop - start)
        pq.write_table(part, folder / f"part {number}.parquet", row_group_size=int(rng.integers(1, 50)))


def _write_csv(folder: Path, columns: dict[str, Any]) -> bool:
    """Write the rows as CSV; return False, and write nothing, if a value has no spelling there."""
    texts = {}
    for name, values in columns.items():
        texts[name] = values.cast(pa.string()) if not pa.types.is_floating(values.type) else _spelled(values)
        if any(v is not None and (v in ("", "NA", "null") or "\0" in v) for v in texts[name].to_pylist()):
            return False
    lines = [",".join(texts)]
    lines += [
        ",".join("" if v is None else '"' + v.replace('"', '""') + '"' for v in row)
        for row in zip(*(column.to_pylist() for column in texts.values()), strict=True)
    ]
    (folder / "all.csv").write_text("\n".join(lines) + "\n", newline="")
    return True


def _spelled(values: Any) -> Any:
    return pa.array([None if v is None else repr(v) for v in values.to_pylist()], pa.string())
