"""Entities, and the feature views that describe them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta

from featserve.definitions.field import Field
from featserve.definitions.rules import (
    Json,
    check_chosen,
    check_name,
    check_tags,
    check_texts,
    check_version,
    content_hash,
    micros,
    unique,
)
from featserve.definitions.source import Rows, Source
from featserve.definitions.window import Aggregate, EventSource
from featserve.errors import DefinitionError, hint
from featserve.types import Type, parse_type

KEY_TYPES = ("bool", "int32", "int64", "string", "bytes", "timestamp")
MAX_FEATURES = 4_096


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing that features describe, and the typed key columns that identify one of it.

    ``keys`` maps each key column to its type, in key order: one column, or several for a composite key.
    """

    name: str
    keys: Mapping[str, Type]
    _: KW_ONLY
    description: str = ""

    def __post_init__(self) -> None:
        check_name("entity", self.name)
        what = f"entity {self.name!r}"
        if not isinstance(self.keys, Mapping) or not self.keys:
            raise DefinitionError(
                f"{what}: keys is a mapping of at least one key column to its type, as in {{'user_id': Int64}}"
            )
        for key, type_ in self.keys.items():
            check_name(f"{what}: key column", key)
            if not isinstance(type_, Type) or type_.name not in KEY_TYPES:
                raise DefinitionError(
                    f"{what}: key column {key!r} is {type_!r}; a key is one of {', '.join(KEY_TYPES)}"
                )
        check_texts(what, description=self.description)
        object.__setattr__(self, "keys", dict(self.keys))

    def __eq__(self, other: object) -> bool:
        # The order of the key columns is part of an entity, and == of two mappings does not look at it.
        return isinstance(other, Entity) and self.to_dict() == other.to_dict()

    def to_dict(self) -> Json:
        return self.meaning() | {"description": self.description}

    def meaning(self) -> Json:
        return {"name": self.name, "keys": [[key, str(type_)] for key, type_ in self.keys.items()]}

    @property
    def hash(self) -> str:
        return content_hash(self.meaning())

    @classmethod
    def from_dict(cls, d: Json) -> Entity:
        return cls(d["name"], {k: parse_type(t) for k, t in d["keys"]}, description=d["description"])


@dataclass(frozen=True, slots=True)
class FeatureView:
    """Features of one entity that become true together, with one exact meaning in time.

    Either ``features`` are the columns of rows, of which the newest is served: ``ttl`` is how long after its event time
    a row may be (both ends included; None for ever), and ``source`` the files that ``materialize`` loads (None for a
    view that is only written online). Or ``aggregates`` over the windows of ``events`` are: ``features`` are then
    theirs, and ``source`` is that of the events. ``version``: what name@version means never changes; a change of
    anything but ``owner``, ``description`` or ``tags`` needs the next number.
    """

    name: str
    entity: Entity
    features: Sequence[Field] = ()
    _: KW_ONLY
    ttl: timedelta | None = None
    source: Source | None = None
    events: EventSource | None = None
    aggregates: Sequence[Aggregate] = ()
    version: int = 1
    owner: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("feature view", self.name)
        what = f"feature view {self.name!r}"
        check_version(what, self.version)
        if not isinstance(self.entity, Entity):
            raise DefinitionError(f"{what}: entity {self.entity!r} is not an Entity")
        check_texts(what, owner=self.owner, description=self.description)
        features = tuple(self.features) if isinstance(self.features, Iterable) else ()
        if self.events is not None or self.aggregates:
            features = self._aggregated(what)
        if not features or not all(isinstance(f, Field) for f in features):
            raise DefinitionError(f"{what}: features is a list of at least one Field")
        if len(features) > MAX_FEATURES:
            raise DefinitionError(f"{what}: {len(features):,} features; the most is {MAX_FEATURES:,}")
        unique(what, "feature", [f.name for f in features])
        for f in features:
            if f.name in self.entity.keys:
                raise DefinitionError(f"{what}: feature {f.name!r} is also a key column of entity {self.entity.name!r}")
        if self.ttl is not None:
            micros(f"{what}: ttl", self.ttl)
        if self.events is None and self.source is not None:
            self._check_source(what, features)
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "tags", check_tags(what, self.tags))

    def _check_source(self, what: str, features: Sequence[Field]) -> None:
        if not isinstance(self.source, Source):
            raise DefinitionError(f"{what}: source {self.source!r} is not a ParquetSource or CsvSource")
        known = [*self.entity.keys, *(f.name for f in features)]
        for name in self.source.columns:
            if name not in known:
                raise DefinitionError(
                    f"{what}: its source renames {name!r}, which is no feature or key{hint(name, known)}"
                )

    def _aggregated(self, what: str) -> tuple[Field, ...]:
        """Check what makes a view over events, and return the features of its aggregates."""
        events = self.events
        if not isinstance(events, EventSource):
            raise DefinitionError(f"{what}: aggregates need events, an EventSource; got {events!r}")
        aggregates = tuple(self.aggregates) if isinstance(self.aggregates, Iterable) else ()
        if not aggregates or not all(isinstance(a, Aggregate) for a in aggregates):
            raise DefinitionError(f"{what}: aggregates is a list of at least one Aggregate")
        for key, type_ in self.entity.keys.items():
            if events.types.get(key) != type_:
                raise DefinitionError(
                    f"{what}: key column {key!r} of entity {self.entity.name!r} is {type_}, and in event source "
                    f"{events.name!r} it is {events.types.get(key, 'none of its fields')}"
                )
        if self.ttl is not None:
            raise DefinitionError(f"{what}: a ttl does not apply to aggregates; their windows say what counts")
        if self.source not in (None, events.source):
            raise DefinitionError(f"{what}: its source is that of its events; declare it on {events.name!r}")
        try:
            features = tuple(a.field(events.types) for a in aggregates)
        except DefinitionError as error:
            raise DefinitionError(f"{what}: {error}") from None
        if tuple(self.features) not in ((), features):
            raise DefinitionError(f"{what}: its features are its aggregates; declare no others")
        object.__setattr__(self, "source", events.source)
        object.__setattr__(self, "aggregates", aggregates)
        return features

    def __getitem__(self, names: str | tuple[str, ...]) -> Selection:
        """Choose some of the view's features for a service: ``view["a"]`` or ``view["a", "b"]``."""
        return Selection(self, (names,) if isinstance(names, str) else names)

    def feature(self, name: str) -> Field:
        for f in self.features:
            if f.name == name:
                return f
        raise DefinitionError(
            f"feature view {self.name!r} has no feature {name!r}{hint(name, [f.name for f in self.features])}"
        )

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def rows(self) -> Rows:
        """What a batch file or a write brings: rows of the view's own, or of its events what its aggregates take."""
        if self.events is None:
            return Rows(self.id, self.entity.keys, tuple(self.features), self.source)
        taken = {*self.entity.keys, self.events.event_id, *(name for a in self.aggregates for name in a.columns)}
        return replace(self.events.rows.only({name for name in taken if name is not None}), id=self.id)

    @property
    def ttl_us(self) -> int | None:
        return None if self.ttl is None else micros("ttl", self.ttl)

    def to_dict(self) -> Json:
        return (
            self.meaning()
            | self._parts()
            | {
                "entity": self.entity.to_dict(),
                "owner": self.owner,
                "description": self.description,
                "tags": dict(self.tags),
            }
        )

    def meaning(self) -> Json:
        return {
            "name": self.name,
            "version": self.version,
            "entity": self.entity.meaning(),
            "ttl_us": self.ttl_us,
            **(
                {"features": [f.meaning() for f in self.features], "source": self.source and self.source.to_dict()}
                if self.events is None
                else {"events": self.events.meaning(), "aggregates": [a.meaning() for a in self.aggregates]}
            ),
        }

    def _parts(self) -> Json:
        """Return what ``to_dict`` says in full, and ``meaning`` without what changes no value."""
        if self.events is None:
            return {"features": [f.to_dict() for f in self.features]}
        return {"events": self.events.to_dict(), "aggregates": [a.to_dict() for a in self.aggregates]}

    @property
    def hash(self) -> str:
        return content_hash(self.meaning())

    @classmethod
    def from_dict(cls, d: Json) -> FeatureView:
        name, source = d["name"], d.get("source")
        return cls(
            name,
            Entity.from_dict(d["entity"]),
            [Field.from_dict(f) for f in d.get("features", ())],
            ttl=None if d["ttl_us"] is None else timedelta(microseconds=d["ttl_us"]),
            source=None if source is None else Source.from_dict(source),
            events=EventSource.from_dict(d["events"]) if "events" in d else None,
            aggregates=tuple(Aggregate.from_dict(a) for a in d.get("aggregates", ())),
            version=d["version"],
            owner=d["owner"],
            description=d["description"],
            tags=d["tags"],
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """Some features of one view, in order: what ``view["a", "b"]`` makes and a FeatureService holds."""

    view: FeatureView
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        check_chosen(f"feature view {self.view.name!r}", "feature", self.names)
        for name in self.names:
            self.view.feature(name)
