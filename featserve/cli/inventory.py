"""What there is: ``featserve list`` and ``describe``, from a registry or from a server, as tables or as JSON.

Comes in: a snapshot, or a server's schemas. Goes out: text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from featserve.catalog import KINDS, Definition, Snapshot, parse_reference
from featserve.cli.answer import plain
from featserve.cli.show import age, columns_of, counted, facts, instant, show, show_json, table, ttl
from featserve.definitions import (
    Entity,
    EventSource,
    FeatureService,
    FeatureView,
    Field,
    OnDemandTransform,
    Outputs,
    RequestColumn,
    Selection,
    micros,
)
from featserve.errors import unknown
from featserve.plan import aggregate_schema, compile_schema
from featserve.schema import AggregateSchema, FeatureSchema, ServiceSchema, ServiceSummary
from featserve.types import Timestamp, Type

Described = Definition | ServiceSchema

NAMED = {
    Entity: "Entity",
    EventSource: "Event source",
    FeatureView: "Feature view",
    OnDemandTransform: "On-demand transform",
    FeatureService: "Feature service",
}


def summaries(snapshot: Snapshot) -> list[ServiceSummary]:
    """Return the services of a snapshot, as a server lists them."""
    return [
        ServiceSummary(
            service.name,
            service.version,
            service.hash,
            snapshot.service(service.name).version == service.version,
            service.owner,
            service.description,
            len(service.fields),
            tuple(service.keys),
        )
        for _, service in sorted(snapshot.services.items())
    ]


def show_services(services: Sequence[ServiceSummary]) -> None:
    """Print the services that can be asked for."""
    made = table("service", "promoted", "keys", "features", "owner", "description", right=["features"])
    for s in services:
        promoted = Text("yes", "green") if s.promoted else ""
        named = Text(f"{s.name}@{s.version}")
        made.add_row(named, promoted, ", ".join(s.keys), str(s.features), Text(s.owner), Text(s.description))
    _show_titled("Feature services", made)


def show_all(snapshot: Snapshot) -> None:
    """Print every definition in a line."""
    show_services(summaries(snapshot))
    views = table("view", "keys", "features", "ttl", "owner", "description", right=["features"])
    for view in snapshot.views.values():
        views.add_row(
            view.id, ", ".join(view.entity.keys), str(len(view.features)), ttl(view.ttl_us),
            Text(view.owner), Text(view.description),
        )  # fmt: skip
    transforms = table("transform", "inputs", "outputs", "owner", "description")
    for t in snapshot.transforms.values():
        outputs = ", ".join(f.name for f in t.outputs)
        transforms.add_row(t.id, ", ".join(t.inputs), outputs, Text(t.owner), Text(t.description))
    sources = table("event source", "source", "fields", "owner", "description")
    for events in snapshot.event_sources.values():
        path = "pushed" if events.source is None else events.source.path
        fields = ", ".join(f.name for f in events.fields)
        sources.add_row(events.id, Text(path), fields, Text(events.owner), Text(events.description))
    entities = table("entity", "keys", "description")
    for entity in snapshot.entities.values():
        entities.add_row(entity.name, columns_of(entity.keys.items()), Text(entity.description))
    for title, made in (
        ("Feature views", views),
        ("On-demand transforms", transforms),
        ("Event sources", sources),
        ("Entities", entities),
    ):
        if made.row_count:
            show("")
            _show_titled(title, made)


def show_all_json(snapshot: Snapshot) -> None:
    """Print every definition as one JSON object, by kind."""
    found: dict[str, Any] = {kind.field: [_to_json(d) for d in snapshot.of(kind).values()] for kind in KINDS}
    show_json(found | {"services": [asdict(s) for s in summaries(snapshot)]})


def find(snapshot: Snapshot, reference: str | None) -> list[Definition]:
    """Return what ``name`` (its highest version), ``name@version`` or ``name#hash`` means, of any kind; None: all.

    Raises UnknownName that offers the nearest names.
    """
    every = [(kind, d) for kind in reversed(KINDS) for d in sorted(snapshot.of(kind).values(), key=kind.version)]
    if reference is None:
        return list({(kind.name, d.name): d for kind, d in every}.values())
    name, version, hash_ = parse_reference("definition", reference)
    if hash_:
        return [snapshot.service(reference)]
    named = [(kind, d) for kind, d in every if d.name == name]
    if not named:
        raise unknown("service, view, transform or entity", name, [d.name for _, d in every])
    if version is None:
        return list({kind.name: d for kind, d in named}.values())
    found = [d for kind, d in named if kind.version(d) == version]
    if not found:
        raise unknown("version", reference, [kind.id(d.name, kind.version(d)) for kind, d in named])
    return found


def show_definition(definition: Described) -> None:
    """Print all that there is to know of a definition."""
    match definition:
        case ServiceSchema():
            _show_schema(definition)
        case FeatureService():
            _show_schema(compile_schema(definition))
        case FeatureView():
            _show_view(definition)
        case EventSource():
            _show_events(definition)
        case OnDemandTransform():
            _show_transform(definition)
        case Entity():
            _show_facts(definition, ("keys", columns_of(definition.keys.items())))


def definition_json(definition: Described) -> dict[str, Any]:
    """Return a definition as a JSON object."""
    match definition:
        case ServiceSchema():
            return _schema_json(definition)
        case FeatureService():
            return _schema_json(compile_schema(definition))
        case _:
            return _to_json(definition)


def _show_schema(schema: ServiceSchema) -> None:
    """Print the schema of a service."""
    show(Text.assemble("Feature service ", (schema.reference, "bold")))
    typed = f", {counted(len(schema.column_features), 'typed column')}" if schema.column_features else ""
    show(
        facts(
            [
                ("description", schema.description),
                ("owner", schema.owner),
                ("hash", schema.hash),
                ("keys", columns_of(schema.keys.items())),
                ("request columns", columns_of(schema.request_columns.items())),
                ("answer", f"tensor of {schema.width} {schema.dtype}{typed}"),
            ]
        ),
        "",
    )
    views = table("view", "keys", "ttl", "owner", "description")
    for view in schema.views:
        views.add_row(view.id, ", ".join(view.keys), ttl(view.ttl_us), Text(view.owner), Text(view.description))
    features = table("feature", "type", "served in", "default", "description")
    for f in schema.features:
        default = _shown(f.type, json.loads(f.default_json)) if f.default_json else ""
        features.add_row(f.name, str(f.type), _place(f), Text(default), Text(f.description))
    show(views, "", features)
    _show_windows({f.name: f.aggregate for f in schema.features if f.aggregate is not None})


def _show_windows(aggregates: Mapping[str, AggregateSchema]) -> None:
    """Print what each aggregate over a window means."""
    if not aggregates:
        return
    windows = table("feature", "aggregate", "window", "events", "empty")
    for name, a in aggregates.items():
        of = f"{a.function}({a.of})" + (f" where {a.where}" if a.where else "")
        windows.add_row(name, Text(of), Text(f"{a.kind}: {a.boundaries}"), a.events, a.empty_json)
    show("", windows)


def _schema_json(schema: ServiceSchema) -> dict[str, Any]:
    """Return the schema of a service as a JSON object."""
    features = [
        asdict(f) | {"type": str(f.type), "view": None if f.view is None else schema.views[f.view].id}
        for f in schema.features
    ]
    return {
        "kind": "feature_service",
        "name": schema.name,
        "version": schema.version,
        "hash": schema.hash,
        "owner": schema.owner,
        "description": schema.description,
        "dtype": str(schema.dtype),
        "width": schema.width,
        "keys": _types(schema.keys),
        "request_columns": _types(schema.request_columns),
        "views": [asdict(view) for view in schema.views],
        "features": features,
    }


def _show_view(view: FeatureView) -> None:
    source = view.source
    known = ""
    if source is not None:
        delay = micros("delay", source.delay, zero=True)
        known = source.known_at or (f"{age(delay)} after {source.event_time}" if delay else source.event_time)
    _show_facts(
        view,
        ("keys", columns_of(view.entity.keys.items())),
        ("ttl", ttl(view.ttl_us) if view.events is None else ""),
        ("source", "none; its rows are only written online" if source is None else f"{source.format} {source.path}"),
        ("event time", "" if source is None else source.event_time),
        ("known at", known),
        ("events", "" if view.events is None else view.events.id),
    )
    features = table("feature", "type", "constraints", "default", "description")
    for f in view.features:
        default = "" if f.default is None else _shown(f.type, f.default)
        features.add_row(f.name, str(f.type), Text(_constraints(f)), Text(default), Text(f.description))
    show("", features)
    _show_windows({a.name: aggregate_schema(view, a.name) for a in view.aggregates})


def _show_events(events: EventSource) -> None:
    source = events.source
    _show_facts(
        events,
        ("source", "none; its events are only pushed" if source is None else f"{source.format} {source.path}"),
        ("event id", events.event_id or "none; each event counts"),
    )
    fields = table("field", "type", "constraints", "description")
    for f in events.fields:
        fields.add_row(f.name, str(f.type), Text(_constraints(f)), Text(f.description))
    show("", fields)


def _show_transform(transform: OnDemandTransform) -> None:
    _show_facts(transform, ("nulls", transform.nulls))
    inputs = table("input", "from")
    for name, given in transform.inputs.items():
        match given:
            case Selection(view, (feature,)):
                origin = f"{view.id}: {feature} {view.feature(feature).type}"
            case Outputs(other, (output,)):
                origin = f"{other.id}: {output} {other.output(output).type}"
            case RequestColumn(column, type_):
                origin = f"the request: {column} {type_}"
            case _:
                origin = "the instant asked for"
        inputs.add_row(name, origin)
    outputs = table("output", "type", "default", "description")
    for f in transform.outputs:
        default = "" if f.default is None else _shown(f.type, f.default)
        outputs.add_row(f.name, str(f.type), Text(default), Text(f.description))
    show("", inputs, "", outputs)


def _show_facts(
    definition: FeatureView | EventSource | OnDemandTransform | Entity, *more: tuple[str, RenderableType]
) -> None:
    named = definition.name if isinstance(definition, Entity) else definition.id
    tags = {} if isinstance(definition, Entity) else definition.tags
    show(Text.assemble(f"{NAMED[type(definition)]} ", (named, "bold")))
    show(
        facts(
            [
                ("description", definition.description),
                ("owner", getattr(definition, "owner", "")),
                ("tags", ", ".join(f"{name}={value}" for name, value in tags.items())),
                ("hash", definition.hash),
                *more,
            ]
        )
    )


def _show_titled(title: str, made: Table) -> None:
    show(Text(title, "bold"), made if made.row_count else "  none")


def _constraints(f: Field) -> str:
    """Return what a written value must satisfy: ``not null, from 0 up, one of 'a', 'b'``."""
    told = [words for declared, words in ((f.not_null, "not null"), (f.not_nan, "not NaN")) if declared]
    if f.min is not None:
        told.append(f"from {_shown(f.type, f.min)}" + (" up" if f.max is None else ""))
    if f.max is not None:
        told.append(f"up to {_shown(f.type, f.max)}")
    if f.allowed is not None:
        told.append(f"one of {', '.join(_shown(f.type, value) for value in f.allowed)}")
    return ", ".join(told)


def _shown(type_: Type, value: Any) -> str:
    """Return a default or a bound, in the form that definitions are stored in, for a person to read."""
    return instant(value) if type_ is Timestamp else plain(value)


def _place(f: FeatureSchema) -> str:
    """Return where an answer has a feature: ``tensor 3``, ``tensor 3-6`` or ``column 0``."""
    if f.tensor is None:
        return f"column {f.column}"
    return f"tensor {f.tensor}" + (f"-{f.tensor + f.type.length - 1}" if f.type.vector else "")


def _types(columns: Mapping[str, Type]) -> dict[str, str]:
    return {name: str(type_) for name, type_ in columns.items()}


def _to_json(definition: Definition) -> dict[str, Any]:
    kind = next(kind for kind in KINDS if isinstance(definition, kind.type))
    return {"kind": kind.name, "hash": definition.hash} | definition.to_dict()
