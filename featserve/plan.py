"""Services and views, compiled once when a snapshot is loaded, to what a request needs and no more.

Comes in: definitions. Goes out: frozen plans of bytes, offsets and NumPy slices. Knows no store and no request.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from featserve.codec import RowCodec, key_prefix
from featserve.definitions import FeatureService, FeatureView
from featserve.schema import FeatureSchema, ServiceSchema, ViewSchema
from featserve.types import Float64, Int32, Type

Place = slice | list[int]


@dataclass(frozen=True, slots=True)
class ViewRead:
    """How one view's rows become a part of an answer.

    ``tensor``: for each run of a row, which of its elements go to which tensor columns. ``columns``: for each typed
    column its index, type, place in the row and position among the answer's features. ``sources`` and ``targets``: the
    view's features that are served, by their number in the view and in the answer.
    """

    keys: tuple[str, ...]
    prefix: bytes
    codec: RowCodec
    ttl_us: int | None
    tensor: tuple[tuple[str, Place, Place], ...]
    columns: tuple[tuple[int, Type, tuple[str, int], int], ...]
    sources: Place
    targets: Place


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Everything that a request for one service needs."""

    schema: ServiceSchema
    views: tuple[ViewRead, ...]


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Everything that a write to one view version needs."""

    view: FeatureView
    prefix: bytes
    codec: RowCodec
    columns: dict[str, Type]


def in_tensor(type: Type, dtype: Type) -> bool:
    """Say whether a feature is served in the tensor: floats, bools, vectors, and int32 where float64 holds it exactly."""
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
    for selection in service.selections:
        for name in selection.names:
            f = selection.view.feature(name)
            fits = in_tensor(f.type, service.dtype)
            default = "" if f.default is None else json.dumps(f.default)
            features.append(
                FeatureSchema(
                    f"{selection.view.name}.{name}",
                    f.type,
                    index[selection.view.id],
                    width if fits else None,
                    None if fits else typed,
                    f.description,
                    default,
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
    )


def compile_service(service: FeatureService) -> ReadPlan:
    """Return the read plan of one service version."""
    schema = compile_schema(service)
    return ReadPlan(schema, tuple(_compile_read(view, i, schema) for i, view in enumerate(service.views)))


def _compile_read(view: FeatureView, index: int, schema: ServiceSchema) -> ViewRead:
    codec = RowCodec(view)
    number = {f.name: i for i, f in enumerate(view.features)}
    runs: dict[str, tuple[list[int], list[int]]] = {}
    columns = []
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
    tensor = tuple((run, _compact(taken), _compact(put)) for run, (taken, put) in runs.items())
    keys = tuple(view.entity.keys)
    return ViewRead(
        keys, key_prefix(view), codec, view.ttl_us, tensor, tuple(columns), _compact(sources), _compact(targets)
    )


def _compact(positions: list[int]) -> Place:
    """Return the positions as a slice where they are consecutive: NumPy copies a slice several times faster."""
    first = positions[0]
    if positions == list(range(first, first + len(positions))):
        return slice(first, first + len(positions))
    return positions

