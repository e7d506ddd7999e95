"""Random services with transforms, their histories and labels, asked both ways: as served at T, and as trained on.

The history of a view is what its source says; online it arrives row by row, each when it can first be known, in any
order. All is drawn from a generator that the caller seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featserve.arrow import column_from_arrow, column_to_arrow
from featserve.batch import Arrival, EventBatch
from featserve.definitions import (
    FeatureService,
    FeatureView,
    Field,
    OnDemandTransform,
    Outputs,
    ParquetSource,
    RequestColumn,
    RequestTime,
    Selection,
)
from featserve.matrix import FeatureMatrix, Status
from featserve.offline import OfflineEngine
from featserve.training import EVENT_TIME, STATUS, training_frame
from featserve.types import (
    NEVER_US,
    Array,
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
)
from tests.random_data import SCALAR_TYPES, Random, cells_of, random_column, random_entity, random_keys, random_view
from tests.transforms import made

BASE_US = 1_700_000_000_000_000
NULL_SHARE = 0.25

# What transforms calculate of an input of each type: expressions, and the types of their values.
EXPRESSIONS: dict[int, list[tuple[str, Type]]] = {
    Bool.code: [("~x", Bool), ("x * 1.5", Float64)],
    Int32.code: [("x // 7 + x % 3", Int32), ("np.sqrt(np.abs(x.astype(np.float64)))", Float64)],
    Int64.code: [("x ^ (x >> 3)", Int64), ("x / 3", Float64)],
    Float32.code: [("np.sin(x) * x", Float32), ("np.where(x > 1, x, -x)", Float32), ("x.astype(np.float64)", Float64)],
    Float64.code: [("np.exp(np.sin(x)) / x", Float64), ("x.astype(np.float32)", Float32), ("x > 0.5", Bool)],
    String.code: [("np.strings.add(x, '!')", String), ("np.strings.upper(x)", String), ("x == ''", Bool)],
    Bytes.code: [
        ("np.array([v[::-1] for v in x] + [None], object)[:-1]", Bytes),
        ("np.array([len(v) for v in x], np.int64)", Int64),
    ],
    Timestamp.code: [
        ("np.minimum(x, np.datetime64(2**62, 'us')) + np.timedelta64(90, 'm')", Timestamp),
        ("x.astype(np.int64) // 3_600_000_000 % 24", Int64),
        ("(now.astype(np.int64) - x.astype(np.int64)) / 1e6", Float64),
    ],
    Vector(1).code: [("np.linalg.norm(x, axis=1)", Float32), ("(x * x).sum(axis=1)", Float32)],
}


@dataclass(frozen=True, slots=True)
class World:
    """A service, what its views' sources hold, and labels: typed columns and a time each. Sources are in ``root``."""

    service: FeatureService
    histories: Mapping[str, EventBatch]
    labels: Mapping[str, Column]
    time_us: Array
    root: Path

    @property
    def table(self) -> Any:
        """The labels as a pyarrow Table."""
        columns = {name: column_to_arrow(col) for name, col in self.labels.items()}
        return pa.table(columns | {"when": column_to_arrow(Column(Timestamp, self.time_us))})

    def arrivals(self, view: FeatureView, after_us: int, until_us: int) -> EventBatch:
        """Return the rows of a view that can first be known after one instant and until another."""
        history = self.histories[view.id]
        available = np.maximum(history.event_time_us, history.known_at_us)
        return history.take(np.flatnonzero((available > after_us) & (available <= until_us)))


Ask = Callable[[int, dict[str, Column], dict[str, Column]], FeatureMatrix]
"""Answers for keys and request columns as of an instant, from all that had arrived by then. Instants never go back."""


def make_world(rng: Random, root: Path, *, views: int = 3, rows: int = 40, labels: int = 60) -> World:
    """Return a random world whose sources are written to ``root``."""
    entities = [random_entity(rng, "a"), random_entity(rng, "b")]
    keys = {entity.name: random_keys(rng, entity, 8) for entity in entities}
    made_views = [
        replace(random_view(rng, f"v{i}", entities[i % 2], features=5), source=_source(rng, f"v{i}"))
        for i in range(views)
    ]
    histories = {view.id: _history(rng, view, keys[view.entity.name], rows) for view in made_views}
    for view in made_views:
        _write(view, histories[view.id], root)
    transforms = _transforms(rng, made_views)
    chosen: list[FeatureView | OnDemandTransform | Selection] = [*made_views, *transforms]
    service = FeatureService(
        "s", [chosen[i] for i in rng.permutation(len(chosen))], dtype=Float32 if rng.random() < 0.5 else Float64
    )
    columns: dict[str, Column] = {}
    for entity in entities[: len({view.entity.name for view in made_views})]:
        one = rng.integers(len(next(iter(keys[entity.name].values()))), size=labels)
        for name, col in keys[entity.name].items():
            other = rng.integers(len(col), size=labels)  # of several key columns, parts of two entities are nobody's
            picked = col.take(np.where(rng.random(labels) < 0.05, other, one))
            present = rng.random(labels) > 0.02
            columns[name] = Column(picked.type, picked.values, picked.offsets, None if present.all() else present)
    for name, type_ in service.request_columns.items():
        columns[name] = random_column(rng, type_, labels, null_share=NULL_SHARE)
    return World(service, histories, columns, _label_times(rng, histories, made_views, labels), root)


def _source(rng: Random, name: str) -> ParquetSource:  # type: ignore[valid-type]
    return ParquetSource(f"{name}.parquet", event_time="_at", known_at="_known")


def _history(rng: Random, view: FeatureView, keys: Mapping[str, Column], rows: int) -> EventBatch:
    """Return rows whose times are equal, a ttl apart or a microsecond beside that, known at once or later."""
    ttl = view.ttl_us or 10
    steps = np.array([0, 0, 1, 2, ttl - 1, ttl, ttl + 1, 2 * ttl, 1_000_000])
    event = BASE_US + rng.choice(steps, rows) + rng.choice([0, 0, 5, 3 * ttl], rows)
    known = event + np.where(rng.random(rows) < 0.4, 0, rng.choice(steps, rows)) - (rng.random(rows) < 0.05) * 3
    columns = {f.name: random_column(rng, f.type, rows, null_share=NULL_SHARE) for f in view.features}
    picked = rng.integers(len(next(iter(keys.values()))), size=rows)
    columns |= {name: col.take(picked) for name, col in keys.items()}
    return EventBatch(columns, event, known, np.arange(rows))


def _write(view: FeatureView, history: EventBatch, root: Path) -> None:
    columns = {name: column_to_arrow(col) for name, col in history.columns.items()}
    columns["_at"] = column_to_arrow(Column(Timestamp, history.event_time_us))
    columns["_known"] = column_to_arrow(Column(Timestamp, history.known_at_us))
    pq.write_table(pa.table(columns), root / f"{view.name}.parquet", row_group_size=17)


def _label_times(rng: Random, histories: Mapping[str, EventBatch], views: Sequence[FeatureView], labels: int) -> Array:
    """Return instants at which something becomes known or expires, or a microsecond beside."""
    edges = [BASE_US + 10]
    for view in views:
        history = histories[view.id]
        for times in (history.event_time_us, history.known_at_us, history.event_time_us + (view.ttl_us or 0)):
            edges += times.tolist()
    few = rng.choice(np.array(edges), min(len(edges), 25), replace=False)
    return np.asarray(rng.choice(few, labels) + rng.integers(-1, 2, labels))


def _transforms(rng: Random, views: Sequence[FeatureView]) -> list[OnDemandTransform]:
    """Return transforms of features, of request columns of every type, and of other transforms' outputs."""
    found: list[OnDemandTransform] = []
    inputs: list[tuple[Selection | RequestColumn | Outputs, Type]] = []
    inputs += [(view[f.name], f.type) for view in views for f in view.features if rng.random() < 0.6]
    inputs += [(RequestColumn(f"r{type_.code}", type_), type_) for type_ in (*SCALAR_TYPES, Vector(2))]
    while inputs:
        given, type_ = inputs.pop(int(rng.integers(len(inputs))))
        expression, out = EXPRESSIONS[type_.code][int(rng.integers(len(EXPRESSIONS[type_.code])))]
        name, nulls = f"t{len(found)}", "pass" if rng.random() < 0.3 else "strict"
        source = f"def {name}(x, now{', valid' if nulls == 'pass' else ''}):\n    y = {expression}\n    return y"
        if nulls == "pass" and rng.random() < 0.7:  # else it is calculated of what stands under a null
            source += ", valid['x']"
        field = Field("out", out)
        found.append(made(source, {"x": given, "now": RequestTime()}, [field], nulls))  # type: ignore[arg-type]
        if rng.random() < 0.35 and len(found) < 40:
            inputs.append((found[-1]["out"], out))
    return found


def compare(world: World, engine: OfflineEngine, ask: Ask) -> int:
    """Compare every cell, status and event time of a training frame with what ``ask`` answers; return how many."""
    service = world.service
    frame = training_frame(engine, service, world.table, "when", root=world.root, event_times=True, statuses=True)
    keyed = np.ones(len(world.time_us), np.bool_)
    for valid in (world.labels[name].valid for name in service.keys):
        keyed &= True if valid is None else valid
    _check_unkeyed(frame, service, np.flatnonzero(~keyed))
    compared = 0
    for at_us in np.unique(world.time_us[keyed]).tolist():
        rows = np.flatnonzero(keyed & (world.time_us == at_us))
        taken = {name: col.take(rows) for name, col in world.labels.items()}
        keys = {name: Column(c.type, c.values, c.offsets) for name, c in taken.items() if name in service.keys}
        matrix = ask(at_us, keys, {name: taken[name] for name in service.request_columns})
        compared += _compare(frame.take(rows), matrix, service)
    return compared


def _check_unkeyed(frame: Any, service: FeatureService, rows: Array) -> None:
    """Check that labels with a null key see nothing of the views that it is a key of."""
    for name, _, source in service.fields:
        if isinstance(source, FeatureView):
            statuses = frame[name + STATUS].take(rows).to_pylist()
            null = [frame[key].is_null().take(rows).to_pylist() for key in source.entity.keys]
            missing = [any(row) for row in zip(*null, strict=True)]
            assert all(s == "NOT_FOUND" for s, gone in zip(statuses, missing, strict=True) if gone)


def _compare(frame: Any, matrix: FeatureMatrix, service: FeatureService) -> int:
    served, status = matrix.to_arrow(), matrix.status
    compared = 0
    for i, (name, f, source) in enumerate(service.fields):
        assert served[name].type == frame[name].type, name
        type_ = service.dtype if f.type.floating and not f.type.vector else f.type
        computed = isinstance(source, OnDemandTransform)
        expected, found = (list(_cells(type_, table[name], computed)) for table in (frame, served))
        assert found == expected, f"{name} ({f.type}): served {found}, in the frame {expected}"
        assert [Status(s).name for s in status[:, i].tolist()] == frame[name + STATUS].to_pylist(), name
        compared += 2 * len(found)
    assert matrix.event_times is not None
    for i, view in enumerate(service.views):
        times = frame[f"{view.name}{EVENT_TIME}"].cast(pa.int64()).fill_null(NEVER_US)
        assert matrix.event_times[:, i].tolist() == times.to_pylist(), view.id
        compared += len(times)
    return compared


def _cells(type: Type, array: Any, computed: bool) -> Iterator[bytes | None]:
    """Yield the bits of each value.

    Of a NaN that was calculated, or an element of a vector, only that it is one: its payload has no meaning, and a
    signalling one is quiet once it was in a tensor of the other precision.
    """
    col = column_from_arrow(type, array, "cell")
    if type.floating and (computed or type.vector):
        nan = np.array(np.nan, type.dtype)
        col = Column(type, np.where(np.isnan(col.values), nan, col.values), None, col.valid)
    yield from cells_of(col)


def arrival_of(batch: EventBatch) -> Arrival:
    """Return rows as a client sends them, each with its position in the source."""
    return Arrival(batch.columns, batch.event_time_us, batch.known_at_us, batch.sequence)
