"""Services and views, compiled once when a snapshot is loaded, to what a request needs and no more.

Comes in: definitions. Goes out: frozen plans of bytes, offsets and NumPy slices. Knows no store and no request.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from featserve.catalog import Snapshot
from featserve.codec import RowCodec, key_prefix
from featserve.definitions import EventSource, FeatureService, FeatureView, Selection
from featserve.records import RecordCodec
from featserve.schema import AggregateSchema, FeatureSchema, ServiceSchema, ViewSchema
from featserve.transform import REQUEST_TIME, Step, compile_steps, slot_of
from featserve.types import Float64, Int32, Type

Place = slice | list[int]


@dataclass(frozen=True, slots=True)
class ViewRead:
    """How one view's rows become a part of an answer.

    ``tensor``: for each run of a row, which of its elements go to which tensor columns. ``columns``: for each typed
    column its index, type, place in the row and position among the answer's features. ``sources`` and ``targets``: the
    view's features that are served, by their number in the view and in the answer. ``unmarked``:
    the features whose stored null is no NaN in the tensor, by their number in the answer and their tensor column.
    ``inputs``: what transforms take: the slot, type and place of a feature, and its number in the view. ``records``:
    reads what the store holds of a view over events; None for one whose rows are stored as they are. ``recent``: the
    prefix of the other parts of records that are kept in two.
    """

    keys: tuple[str, ...]
    prefix: bytes
    codec: RowCodec
    ttl_us: int | None
    tensor: tuple[tuple[str, Place, Place], ...]
    columns: tuple[tuple[int, Type, tuple[str, int], int], ...]
    sources: Place
    targets: Place
    unmarked: tuple[tuple[int, int], ...]
    inputs: tuple[tuple[str, Type, tuple[str, int], int], ...]
    records: RecordCodec | None
    recent: bytes | None


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """Where a transform's output goes: its position among the answer's features, and its tensor or typed column."""

    position: int
    slot: str
    type: Type
    tensor: int | None
    column: int | None
    has_default: bool


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Everything that a request for one service needs.

    ``integer_key``: the name and type of its key, where that is one of integers. ``request_time``: whether a step takes
    that.
    """

    schema: ServiceSchema
    integer_key: tuple[str, Type] | None
    views: tuple[ViewRead, ...]
    steps: tuple[Step, ...]
    outputs: tuple[OutputPlace, ...]
    request_time: bool


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Everything that a write to one view version needs."""

    view: FeatureView
    prefix: bytes
    codec: RowCodec
    columns: dict[str, Type]


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Everything that a push of events, or a load of them, needs for one view version over them.

    Prefixes of keys: ``records``, of what is served; ``recent``, of the part of it that came lately, where records are
    kept in two; ``pushed``, of pushes alone, but for the recent part, for a view that is also loaded; ``ids``, of the
    events that count; ``expiry``, the ids by entity and time. ``load``: the key of the number of loads.
    """

    view: FeatureView
    codec: RecordCodec
    records: bytes
    recent: bytes | None
    pushed: bytes | None
    ids: bytes
    expiry: bytes
    load: bytes

    @classmethod
    def of(cls, view: FeatureView) -> Self:
        """Return the plan of a view over events."""
        codec = RecordCodec(view)
        pushed = None if view.source is None else key_prefix(view, ":pushed")
        others = (key_prefix(view, f":{kind}") for kind in ("ids", "expiry", "load"))
        return cls(view, codec, key_prefix(view), _recent(codec), pushed, *others)


@dataclass(frozen=True, slots=True)
class PushPlan:
    """Everything that a push of events needs: their source, and each view over it."""

    source: EventSource
    views: tuple[WindowPlan, ...]


class Plans:
    """The compiled plans of one snapshot, by every name that a request may use.

    A name seen before is one dictionary look-up. Others (``name#hash``) are resolved by the snapshot once.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._services = {id_: compile_service(service) for id_, service in snapshot.services.items()}
        self._views = {id_: compile_view(view) for id_, view in snapshot.views.items()}
        self._windows = {id_: WindowPlan.of(view) for id_, view in snapshot.views.items() if view.events is not None}
        self._pushes = {
            id_: PushPlan(source, tuple(w for w in self._windows.values() if w.view.events == source))
            for id_, source in snapshot.event_sources.items()
        }
        self._by_reference: dict[str, ReadPlan] = {}
        for service in snapshot.services.values():
            promoted = snapshot.service(service.name)
            plan = self._services[promoted.id]
            self._by_reference |= {service.name: plan, f"{service.name}#{plan.schema.hash}": plan}
        self._by_reference |= self._services

    def service(self, reference: str) -> ReadPlan:
        """Return the plan that ``name``, ``name@version`` or ``name#hash`` means; or raise UnknownName."""
        plan = self._by_reference.get(reference)
        return plan if plan is not None else self._services[self.snapshot.service(reference).id]

    def view(self, reference: str) -> WritePlan:
        """Return the write plan that ``name`` (the highest version) or ``name@version`` means; raises UnknownName."""
        plan = self._views.get(reference)
        return plan if plan is not None else self._views[self.snapshot.view(reference).id]

    def windows(self, view: FeatureView) -> WindowPlan:
        """Return the plan of a view over events."""
        return self._windows[view.id]

    def events(self, reference: str) -> PushPlan:
        """Return the plan of pushes to ``name`` (the highest version) or ``name@version``; raises UnknownName."""
        plan = self._pushes.get(reference)
        return plan if plan is not None else self._pushes[self.snapshot.event_source(reference).id]


def in_tensor(type: Type, dtype: Type) -> bool:
    """Say whether a feature is in the tensor: floats, bools, vectors, and int32 where float64 holds it exactly."""
    return type.floating or type.name == "bool" or (type is Int32 and dtype is Float64)


def compile_view(view: FeatureView) -> WritePlan:
    """Return the write plan of one view version."""
    columns = dict(view.entity.keys) | {f.name: f.type for f in view.features}
    return WritePlan(view, key_prefix(view), RowCodec(view), columns)


def compile_schema(service: FeatureService) -> ServiceSchema:
    """Return the schema of one service version."""
    views = service.views
    index = {view.id: i for i, view in enumerate(views)}
    features: list[FeatureSchema] = []
    width = typed = 0
    for name, f, source in service.fields:
        fits = in_tensor(f.type, service.dtype)
        features.append(
            FeatureSchema(
                name,
                f.type,
                index.get(source.id) if isinstance(source, FeatureView) else None,
                width if fits else None,
                None if fits else typed,
                f.description,
                "" if f.default is None else json.dumps(f.default),
                "" if isinstance(source, FeatureView) else source.id,
                aggregate_schema(source, f.name)
                if isinstance(source, FeatureView) and source.events is not None
                else None,
            )
        )
        width, typed = (width + f.type.length, typed) if fits else (width, typed + 1)
    return ServiceSchema(
        service.name,
        service.version,
        service.hash,
        service.dtype,
        width,
        service.keys,
        tuple(
            ViewSchema(v.name, v.version, v.hash, tuple(v.entity.keys), v.ttl_us, v.owner, v.description) for v in views
        ),
        tuple(features),
        service.owner,
        service.description,
        service.request_columns,
    )


def aggregate_schema(view: FeatureView, name: str) -> AggregateSchema:
    """Return what the feature ``name`` of a view over events means, spelled out."""
    aggregate = next(a for a in view.aggregates if a.name == name)
    assert view.events is not None
    meaning = aggregate.meaning()
    return AggregateSchema(
        aggregate.function,
        "" if aggregate.of is None else str(aggregate.of),
        "" if aggregate.where is None else str(aggregate.where),
        view.events.id,
        meaning["over"]["kind"],
        aggregate.over.boundaries,
        meaning["over"].get("zone", ""),
        json.dumps(meaning["empty"]),
        meaning["ties"],
    )


def compile_service(service: FeatureService) -> ReadPlan:
    """Return the read plan of one service version. Raises DefinitionError where a transform's code does not run."""
    schema = compile_schema(service)
    inputs = [given for t in service.transforms for given in t.inputs.values() if isinstance(given, Selection)]
    outputs = tuple(
        OutputPlace(position, f.name, f.type, f.tensor, f.column, bool(f.default_json))
        for position, f in enumerate(schema.features)
        if f.view is None
    )
    views = tuple(_compile_read(view, i, schema, inputs) for i, view in enumerate(service.views))
    steps = compile_steps(service.transforms)
    timed = any(parameter.slot == REQUEST_TIME for step in steps for parameter in step.parameters)
    return ReadPlan(schema, integer_key(schema.keys), views, steps, outputs, timed)


def integer_key(keys: Mapping[str, Type]) -> tuple[str, Type] | None:
    """Return the name and type of the only key, where it is of integers."""
    ((name, type_),) = keys.items() if len(keys) == 1 else (("", None),)
    return (name, type_) if type_ is not None and type_.dtype is not None and type_.dtype.kind == "i" else None


def _compile_read(view: FeatureView, index: int, schema: ServiceSchema, inputs: Iterable[Selection]) -> ViewRead:
    codec = RowCodec(view)
    number = {f.name: i for i, f in enumerate(view.features)}
    runs: dict[str, tuple[list[int], list[int]]] = {}
    columns, unmarked = [], []
    sources, targets = [], []
    for position, f in enumerate(schema.features):
        if f.view != index:
            continue
        name = f.name.split(".", 1)[1]
        sources.append(number[name])
        targets.append(position)
        run, at = codec.place[name]
        if f.tensor is None:
            assert f.column is not None
            columns.append((f.column, f.type, (run, at), position))
        else:
            taken, put = runs.setdefault(run, ([], []))
            taken += range(at, at + f.type.length)
            put += range(f.tensor, f.tensor + f.type.length)
            if not f.type.floating and not f.default_json:
                unmarked.append((position, f.tensor))
    tensor = tuple((run, _compact(taken), _compact(put)) for run, (taken, put) in runs.items())
    taken_by_steps = {}
    for given in inputs:
        if given.view.id == view.id:
            field = view.feature(given.names[0])
            taken_by_steps[slot_of(given)] = (field.type, codec.place[field.name], number[field.name])
    keys = tuple(view.entity.keys)
    records = None if view.events is None else RecordCodec(view)
    return ViewRead(
        keys,
        key_prefix(view),
        codec,
        view.ttl_us,
        tensor,
        tuple(columns),
        _compact(sources),
        _compact(targets),
        tuple(unmarked),
        tuple((slot, *how) for slot, how in taken_by_steps.items()),
        records,
        None if records is None else _recent(records),
    )


def _recent(codec: RecordCodec) -> bytes | None:
    """Return the prefix of the keys of what came lately, where records are kept in two parts."""
    return key_prefix(codec.layout.view, ":recent") if codec.layout.in_parts else None


def _compact(positions: list[int]) -> Place:
    """Return the positions as a slice where they are consecutive: NumPy copies a slice several times faster."""
    first = positions[0] if positions else 0
    if positions == list(range(first, first + len(positions))):
        return slice(first, first + len(positions))
    return positions
