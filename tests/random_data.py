"""Random definitions, columns and histories, made to hurt: the edges of every type, ties, and near misses in time.

Everything is drawn from a NumPy generator that the caller seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import pairwise

import numpy as np

from featserve.batch import EventBatch
from featserve.catalog import Snapshot
from featserve.definitions import (
    CsvSource,
    Entity,
    FeatureService,
    FeatureView,
    Field,
    ParquetSource,
    Selection,
    Source,
)
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
    Vector,
)

Random = np.random.Generator
Cell = bytes | None
"""One value as its little-endian bytes, None for a null: what bit-exact comparison is about."""

SCALAR_TYPES = (Bool, Int32, Int64, Float32, Float64, String, Bytes, Timestamp)
KEY_TYPES = (Bool, Int32, Int64, String, Bytes, Timestamp)

# Zeros, ones, the largest and the smallest, infinities, and NaNs: quiet, negative, with a payload, signalling.
_FLOAT32_BITS = (0, 1 << 31, 0x3F800000, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000,
                 0xFFC00000, 0x7FDEADBE, 0x7F800001)  # fmt: skip
_FLOAT64_BITS = (0, 1 << 63, 0x3FF << 52, (0x7FF << 52) - 1, (0xFFF << 52) - 1, 1, (1 << 63) + 5, 0x7FF << 52,
                 0xFFF << 52, 0x7FF8 << 48, 0xFFF8 << 48, 0x7FFDEADBEEF00001, (0x7FF << 52) + 1,
                 0x47EFFFFFE0000000, 0x47EFFFFFF0000000, 0x36A0000000000001)  # fmt: skip
_INTS = (0, 1, -1, 2**24, 2**24 + 1, -(2**31), 2**31 - 1)
_LONGS = (*_INTS, 2**53, 2**53 + 1, -(2**53) - 1, -(2**63), 2**63 - 1, 1_700_000_000_000_000)
EDGES: dict[int, Array] = {
    Bool.code: np.array([0, 1], "u1").view("?"),
    Int32.code: np.array(_INTS, "<i4"),
    Int64.code: np.array(_LONGS, "<i8"),
    Timestamp.code: np.array(_LONGS, "<i8"),
    Float32.code: np.array(_FLOAT32_BITS, "<u4").view("<f4"),
    Float64.code: np.array(_FLOAT64_BITS, "<u8").view("<f8"),
    Vector(1).code: np.array(_FLOAT32_BITS, "<u4").view("<f4"),
}
_WORDS = ("", "\0", "\0\0", "a\0b", "1", "12", "23", "3", "a|b", "a,b", '"', "\n", "é", "日本", "😀", "\ufeff", "UA")
TEXTS = (*(word.encode() for word in _WORDS), "ü".encode() * 700, b"x" * 4_096)
BLOBS = (*TEXTS, b"\xff", b"\x80\0\xfe", bytes(range(256)), b"\xf5\x01\0\0")


def random_type(rng: Random) -> Type:
    """Return any type, a short vector as often as each other."""
    i = int(rng.integers(len(SCALAR_TYPES) + 1))
    return SCALAR_TYPES[i] if i < len(SCALAR_TYPES) else Vector(int(rng.integers(1, 6)))


def random_column(rng: Random, type: Type, rows: int, *, null_share: float = 0.0) -> Column:
    """Return ``rows`` values, edges and random bits; what lies under a null is as wild as the rest."""
    valid: Mask | None = None
    if null_share:
        valid = rng.random(rows) >= null_share
    if type.variable:
        pool = TEXTS if type is String else BLOBS
        return column_of_cells(type, [pool[i] for i in rng.integers(len(pool), size=rows)], valid)
    edges = EDGES[type.code]
    values = edges[rng.integers(len(edges), size=rows * type.length)]
    if type is not Bool:
        bits = np.frombuffer(rng.bytes(values.nbytes), values.dtype)
        values = np.where(rng.random(len(values)) < 0.3, bits, values)
    if type.vector:
        return Column(type, values.reshape(rows, type.length), None, valid)
    if rng.random() < 0.2:  # every second element of another array, as a slice of a user's frame may be
        values = np.repeat(values, 2)[::2]
    return Column(type, values, None, valid)


def column_of_cells(type: Type, cells: Sequence[Cell], valid: Mask | None = None) -> Column:
    """Return the column of the values whose bytes ``cells`` are; None is a null."""
    if valid is None and None in cells:
        valid = np.array([cell is not None for cell in cells])
    if type.variable:
        offsets = np.zeros(len(cells) + 1, np.int64)
        np.cumsum([len(cell or b"") for cell in cells], out=offsets[1:])
        return Column(type, np.frombuffer(b"".join(cell or b"" for cell in cells), np.uint8), offsets, valid)
    data = np.frombuffer(b"".join(cell or bytes(type.width) for cell in cells), type.dtype)
    return Column(type, data.reshape(-1, type.length) if type.vector else data, None, valid)


def cells_of(column: Column) -> list[Cell]:
    """Return the bytes of each value, None for a null."""
    if column.offsets is not None:
        data = column.values.tobytes()
        found: list[Cell] = [data[a:b] for a, b in pairwise(column.offsets.tolist())]
    else:
        width, data = column.type.width, np.ascontiguousarray(column.values).tobytes()
        found = [data[i * width : (i + 1) * width] for i in range(len(column))]
    return found if column.valid is None else [c if ok else None for c, ok in zip(found, column.valid, strict=True)]


def random_default(rng: Random, type: Type) -> object:
    """Return a value that ``type`` can have as a default: no NaN."""
    for _ in range(50):
        col = random_column(rng, type, 1)
        value = col.to_list()[0]
        if type is Timestamp:
            return int(col.values[0])
        if not type.floating or not np.isnan(col.values).any():
            return value
    return 1.5 if not type.vector else [1.5] * type.length


def random_field(rng: Random, name: str, *, constraints: bool = False) -> Field:
    """Return a field of any type, often with a default and, if asked for, with constraints that can be broken."""
    type = random_type(rng)
    if not constraints:
        return Field(name, type, default=random_default(rng, type) if rng.random() < 0.4 else None)
    bounds: dict[str, object] = {}
    ordered = type not in (Bool, String, Bytes) and not type.vector
    if ordered and rng.random() < 0.5:
        low, high = sorted(random_default(rng, type) for _ in range(2))  # type: ignore[type-var]
        bounds = {"min": low, "max": high}
        if rng.random() < 0.5:
            del bounds["min" if rng.random() < 0.5 else "max"]
    elif not type.vector and rng.random() < 0.5:
        bounds["allowed"] = [random_default(rng, type) for _ in range(int(rng.integers(1, 8)))]
    return Field(
        name,
        type,
        description="What it means",
        not_null=bool(rng.random() < 0.3),
        not_nan=bool(type.floating and rng.random() < 0.5),
        **bounds,  # type: ignore[arg-type]
    )


def random_entity(rng: Random, name: str, *, keys: int | None = None) -> Entity:
    """Return an entity of one to three key columns of any type; their names start with its own."""
    types = [KEY_TYPES[i] for i in rng.integers(len(KEY_TYPES), size=keys or int(rng.integers(1, 4)))]
    return Entity(name, {f"{name}_{i}": type for i, type in enumerate(types)}, description="A thing")


def random_source(rng: Random, columns: Sequence[str]) -> Source:
    """Return a source in either format, with any way of telling when rows were known."""
    known = int(rng.integers(3))
    rest: dict[str, object] = {"known_at": "known"} if known == 1 else {}
    if known == 2:
        rest = {"delay": timedelta(microseconds=int(rng.integers(1, 10**12)))}
    if rng.random() < 0.5:
        rest["columns"] = {columns[0]: "another name"}
    if rng.random() < 0.5:
        return ParquetSource("data/*.parquet", event_time="time", **rest)  # type: ignore[arg-type]
    return CsvSource("data/*.csv.gz", event_time="time", delimiter=";", nulls=("", "-"), **rest)  # type: ignore[arg-type]


def random_view(
    rng: Random, name: str, entity: Entity, *, features: int = 6, version: int = 1, constraints: bool = False
) -> FeatureView:
    """Return a view of up to ``features`` features, with a ttl or without."""
    count = int(rng.integers(1, features + 1))
    ttl = timedelta(microseconds=int(rng.choice([1, 10, 3_600_000_000]))) if rng.random() < 0.6 else None
    return FeatureView(
        name,
        entity,
        [random_field(rng, f"f{i}", constraints=constraints) for i in range(count)],
        ttl=ttl,
        source=random_source(rng, [*entity.keys, "f0"]) if rng.random() < 0.5 else None,
        version=version,
        owner="team",
        description="What it is",
        tags={"tier": "1"},
    )


def random_service(rng: Random, name: str, views: Sequence[FeatureView]) -> FeatureService:
    """Return a service of some features of every view, in any order, one view's apart from each other at times."""
    chosen: list[Selection] = []
    for view in views:
        names = [f.name for f in view.features]
        names = [names[i] for i in rng.permutation(len(names))[: int(rng.integers(1, len(names) + 1))]]
        cut = int(rng.integers(len(names)))
        chosen += [Selection(view, tuple(part)) for part in (names[:cut], names[cut:]) if part]
    order = rng.permutation(len(chosen))
    dtype = Float32 if rng.random() < 0.5 else Float64
    return FeatureService(name, [chosen[i] for i in order], dtype=dtype, owner="team", description="A model")


def snapshot_of(views: Sequence[FeatureView], services: Sequence[FeatureService]) -> Snapshot:
    """Return what a registry would hold of these."""
    return Snapshot(
        entities={view.entity.name: view.entity for view in views},
        event_sources={view.events.id: view.events for view in views if view.events is not None},
        views={view.id: view for view in views},
        services={service.id: service for service in services},
    )


def random_keys(rng: Random, entity: Entity, count: int) -> dict[str, Column]:
    """Return the key columns of up to ``count`` distinct entities, each value short enough for a key."""
    drawn = {name: random_column(rng, type, count) for name, type in entity.keys.items()}
    distinct = {key: i for i, key in enumerate(zip(*map(cells_of, drawn.values()), strict=True))}
    return {name: col.take(np.array(list(distinct.values()))) for name, col in drawn.items()}


def random_times(rng: Random, base_us: int, ttl_us: int | None, rows: int) -> Array:
    """Return times near ``base_us``, many of them equal, a ttl apart, or one microsecond beside that; a few absurd."""
    ttl = 10 if ttl_us is None else ttl_us
    pool = np.array([0, 1, -1, 2, ttl, ttl + 1, ttl - 1, -ttl, -ttl - 1, -ttl + 1, 1_000_000, -60_000_000]) + base_us
    times = pool[rng.integers(len(pool), size=rows)]
    return np.where(rng.random(rows) < 0.03, rng.choice(np.array([-(2**63), -1, 0]), rows), times)


def random_batch(
    rng: Random, view: FeatureView, keys: Mapping[str, Column], base_us: int, rows: int, *, null_share: float = 0.2
) -> EventBatch:
    """Return ``rows`` rows of ``view`` about the entities ``keys``, repeats included, in any order of time."""
    columns = {
        f.name: random_column(rng, f.type, rows, null_share=0.0 if rng.random() < 0.4 else null_share)
        for f in view.features
    }
    picked = rng.integers(len(next(iter(keys.values()))), size=rows)
    columns |= {name: col.take(picked) for name, col in keys.items()}
    event = random_times(rng, base_us, view.ttl_us, rows)
    known = np.where(rng.random(rows) < 0.5, event, random_times(rng, base_us, view.ttl_us, rows))
    return EventBatch(columns, event, known, rng.integers(0, 4, rows))
