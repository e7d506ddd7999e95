"""Sets of definitions that fit together: what a project declares, and what a registry holds.

Comes in: entities, views and services. Goes out: frozen mappings of them, and the one that a reference such as
``fraud``, ``fraud@2`` or ``fraud#4be21c07`` means. Knows no file and no database. A kind of definition is one row of
``KINDS``; whatever loads, compares or stores definitions goes by that table and names no kind itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from featserve.definitions import Entity, EventSource, FeatureService, FeatureView, Json, OnDemandTransform
from featserve.errors import SchemaMismatch, invalid, unknown

Found = TypeVar("Found", EventSource, FeatureView, FeatureService)


class Definition(Protocol):
    """What every kind of definition has; all but entities have a ``version``, too."""

    @property
    def name(self) -> str: ...
    @property
    def hash(self) -> str: ...
    def to_dict(self) -> Json: ...


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of definition.

    ``field``: its field in ``Definitions``. ``parts``: the definitions that one is made of. ``decode``: one from its
    JSON body and the definitions that it may be made of, by field and id. ``versioned``: whether a change of meaning
    needs a new version; what is not versioned is held in full by the definitions that use it, so their versions guard
    it.
    """

    name: str
    field: str
    type: type[Any]
    parts: Callable[[Any], Iterable[Definition]]
    decode: Callable[[Json, Mapping[str, Mapping[str, Any]]], Definition]
    versioned: bool = True

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    def version(self, definition: Definition) -> int:
        """Return the version, 0 for a kind that has none."""
        version: int = getattr(definition, "version", 0)
        return version

    def id(self, name: str, version: int) -> str:
        return f"{name}@{version}" if self.versioned else name


KINDS = (
    Kind("entity", "entities", Entity, lambda e: (), lambda body, found: Entity.from_dict(body), versioned=False),
    Kind("event_source", "event_sources", EventSource, lambda e: (), lambda body, found: EventSource.from_dict(body)),
    Kind(
        "feature_view",
        "views",
        FeatureView,
        lambda v: (v.entity,) if v.events is None else (v.entity, v.events),
        lambda body, found: FeatureView.from_dict(body),
    ),
    Kind(
        "on_demand_transform",
        "transforms",
        OnDemandTransform,
        lambda t: t.sources,
        lambda body, found: OnDemandTransform.from_dict(body, found["views"], found["transforms"]),
    ),
    Kind(
        "feature_service",
        "services",
        FeatureService,
        lambda s: (*s.views, *s.transforms),
        lambda body, found: FeatureService.from_dict(body, found["views"], found["transforms"]),
    ),
)
"""In order of use, which is the order that plans and listings show."""

KINDS_BY_NAME = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True, slots=True)
class Definitions:
    """Definitions that fit together: entities by name, everything else by ``name@version``."""

    entities: Mapping[str, Entity] = field(default_factory=dict)
    event_sources: Mapping[str, EventSource] = field(default_factory=dict)
    views: Mapping[str, FeatureView] = field(default_factory=dict)
    transforms: Mapping[str, OnDemandTransform] = field(default_factory=dict)
    services: Mapping[str, FeatureService] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in KINDS:
            object.__setattr__(self, kind.field, MappingProxyType(dict(getattr(self, kind.field))))

    def of(self, kind: Kind) -> Mapping[str, Definition]:
        """Return the definitions of one kind, by id."""
        found: Mapping[str, Definition] = getattr(self, kind.field)
        return found


@dataclass(frozen=True, slots=True)
class Snapshot(Definitions):
    """What a registry held at ``revision``: immutable, so a request keeps one meaning from its start to its end."""

    revision: int = 0

    def view(self, reference: str) -> FeatureView:
        """Return the view that ``name`` (its highest version) or ``name@version`` means; raises UnknownName."""
        name, version, hash_ = parse_reference("feature view", reference)
        if hash_:
            raise invalid("feature view", f"{reference!r} carries a hash; only a feature service is asked for by hash")
        return _one("feature view", self.views, name, version)

    def event_source(self, reference: str) -> EventSource:
        """Return the event source that ``name`` (its highest version) or ``name@version`` means; raises UnknownName."""
        name, version, hash_ = parse_reference("event source", reference)
        if hash_:
            raise invalid("event source", f"{reference!r} carries a hash; only a feature service is asked for by hash")
        return _one("event source", self.event_sources, name, version)

    def service(self, reference: str) -> FeatureService:
        """Return the service that ``name`` (the promoted version), ``name@version`` or ``name#hash`` means.

        The promoted version is the highest. ``name#hash`` is the promoted version too, or else SchemaMismatch: its
        hash must start with the 8 or more hex digits given. Hashes the service: keep the answer, per reference.
        """
        name, version, hash_ = parse_reference("feature service", reference)
        service = _one("feature service", self.services, name, version)
        if hash_ and not service.hash.startswith(hash_):
            others = [s.id for s in self.services.values() if s.name == name and s.hash.startswith(hash_)]
            remedy = f"ask for {others[0]} to stay with it" if others else f"fetch the schema of {service.id}"
            raise SchemaMismatch(
                f"{reference}: feature service {name!r} is now {service.id} with hash {service.hash[:16]}; {remedy}",
                metadata={"service": service.id, "hash": service.hash},
            )
        return service


REFERENCE = re.compile(r"([^@#]+)(?:@([1-9][0-9]{0,9})|#([0-9a-f]{8,64}))?")


def parse_reference(kind: str, reference: str) -> tuple[str, int | None, str | None]:
    """Split ``name``, ``name@version`` or ``name#hash`` into its three parts; raises InvalidRequest."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise invalid(kind, f"{reference!r} is not name, name@version or name#hash (of 8 or more hex digits)")
    return match[1], int(match[2]) if match[2] else None, match[3]


def _one(kind: str, found: Mapping[str, Found], name: str, version: int | None) -> Found:
    """Return ``name@version``, or the highest version of ``name``."""
    versions = {item.version: item for item in found.values() if item.name == name}
    if not versions:
        raise unknown(kind, name, [item.name for item in found.values()])
    if version is not None and version not in versions:
        raise unknown(kind, f"{name}@{version}", [item.id for item in versions.values()])
    return versions[max(versions) if version is None else version]


assert {kind.field for kind in KINDS} == {f.name for f in fields(Definitions)}, "a kind has one field in Definitions"
