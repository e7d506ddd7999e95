"""Entities, and the feature views that describe them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np

from featserve.definitions.rules import (
    Json,
    check_name,
    check_tags,
    check_texts,
    check_version,
    content_hash,
    micros,
    unique,
)
from featserve.definitions.source import Source
from featserve.errors import DefinitionError, InvalidRequest, hint
from featserve.types import Bytes, Type, column, parse_type

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
class Field:
    """One feature of a view.

    ``default`` replaces a null in the value served, never its status. ``min``, ``max`` (inclusive; numbers and
    timestamps), ``allowed`` (a list of values), ``not_null`` and ``not_nan`` are checked on every write, before
    anything is stored.
    """

    name: str
    type: Type
    _: KW_ONLY
    description: str = ""
    default: Any = None
    min: Any = None
    max: Any = None
    allowed: Collection[Any] | None = None
    not_null: bool = False
    not_nan: bool = False

    def __post_init__(self) -> None:
        check_name("feature", self.name)
        what = f"feature {self.name!r}"
        if not isinstance(self.type, Type):
            raise DefinitionError(f"{what}: {self.type!r} is not a type such as Int64, Float32, String or Vector(16)")
        check_texts(what, description=self.description)
        for role in ("not_null", "not_nan"):
            if not isinstance(getattr(self, role), bool):
                raise DefinitionError(f"{what}: {role} {getattr(self, role)!r} is neither True nor False")
        ordered = not self.type.variable and not self.type.vector and self.type.name != "bool"
        for role in ("min", "max"):
            if getattr(self, role) is not None:
                if not ordered:
                    raise DefinitionError(f"{what}: {role} does not apply to {self.type}")
                object.__setattr__(self, role, self._value(role, getattr(self, role)))
        if self.min is not None and self.max is not None and self.min > self.max:
            raise DefinitionError(f"{what}: min {self.min} is greater than max {self.max}")
        if self.allowed is not None:
            if self.type.vector:
                raise DefinitionError(f"{what}: allowed does not apply to {self.type}")
            listed = isinstance(self.allowed, Collection) and not isinstance(self.allowed, str | bytes | Mapping)
            if not listed or not self.allowed:
                raise DefinitionError(f"{what}: allowed {self.allowed!r} is not a list of at least one {self.type}")
            object.__setattr__(self, "allowed", tuple(sorted({self._value("allowed", v) for v in self.allowed})))
        if self.not_nan and not self.type.floating:
            raise DefinitionError(f"{what}: not_nan does not apply to {self.type}")
        if self.default is not None:
            object.__setattr__(self, "default", self._value("default", self.default))
            if self.allowed is not None and self.default not in self.allowed:
                raise DefinitionError(f"{what}: default {self.default!r} is not one of the allowed values")
            if (self.min is not None and self.default < self.min) or (self.max is not None and self.default > self.max):
                raise DefinitionError(f"{what}: default {self.default!r} is outside of min and max")

    def _value(self, role: str, value: Any) -> Any:
        """Return ``value`` in the one form that JSON holds exactly: instants in microseconds, bytes in latin-1.

        A float32 is the shortest decimal that means it: 0.1, not 0.10000000149011612.
        """
        try:
            col = column(self.type, [value], role)
        except InvalidRequest as error:
            raise DefinitionError(f"feature {self.name!r}: {error}") from None
        if col.null_count or (self.type.floating and np.isnan(col.values).any()):
            raise DefinitionError(f"feature {self.name!r}: {role} holds {value!r}, which is no value")
        if self.type.variable:
            return col.to_bytes_list()[0].decode("latin-1" if self.type is Bytes else "utf-8")
        if col.values.dtype == np.float32:
            shortest = [float(str(number)) for number in col.values.ravel()]
            return shortest if self.type.vector else shortest[0]
        return col.values[0].item()

    def value(self, stored: Any) -> Any:
        """Return a ``default`` or an ``allowed`` value as ``types.column`` takes it."""
        return stored.encode("latin-1") if self.type is Bytes else stored

    def to_dict(self) -> Json:
        return self.meaning() | {"description": self.description}

    def meaning(self) -> Json:
        return {
            "name": self.name,
            "type": str(self.type),
            "default": self.default,
            "min": self.min,
            "max": self.max,
            "allowed": None if self.allowed is None else list(self.allowed),
            "not_null": self.not_null,
            "not_nan": self.not_nan,
        }

    @classmethod
    def from_dict(cls, d: Json) -> Field:
        rest = d | {"type": parse_type(d["type"])}
        if rest["type"] is Bytes:
            default, allowed = d["default"], d["allowed"]
            rest["default"] = None if default is None else default.encode("latin-1")
            rest["allowed"] = None if allowed is None else [value.encode("latin-1") for value in allowed]
        return cls(**rest)


@dataclass(frozen=True, slots=True)
class FeatureView:
    """Features of one entity that become true together, with one exact meaning in time.

    ``ttl``: how long after its event time a row may be served (both ends included); None for ever. ``source``: the
    files that ``materialize`` loads; None for a view that is only written online. ``version``: what name@version means
    never changes; a change of anything but ``owner``, ``description`` or ``tags`` needs the next number.
    """

    name: str
    entity: Entity
    features: Sequence[Field]
    _: KW_ONLY
    ttl: timedelta | None = None
    source: Source | None = None
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
        if self.source is not None:
            if not isinstance(self.source, Source):
                raise DefinitionError(f"{what}: source {self.source!r} is not a ParquetSource or CsvSource")
            known = [*self.entity.keys, *(f.name for f in features)]
            for name in self.source.columns:
                if name not in known:
                    raise DefinitionError(
                        f"{what}: its source renames {name!r}, which is no feature or key{hint(name, known)}"
                    )
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "tags", check_tags(what, self.tags))

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
    def ttl_us(self) -> int | None:
        return None if self.ttl is None else micros("ttl", self.ttl)

    def to_dict(self) -> Json:
        return self.meaning() | {
            "entity": self.entity.to_dict(),
            "features": [f.to_dict() for f in self.features],
            "owner": self.owner,
            "description": self.description,
            "tags": dict(self.tags),
        }

    def meaning(self) -> Json:
        return {
            "name": self.name,
            "version": self.version,
            "entity": self.entity.meaning(),
            "features": [f.meaning() for f in self.features],
            "ttl_us": self.ttl_us,
            "source": None if self.source is None else self.source.to_dict(),
        }

    @property
    def hash(self) -> str:
        return content_hash(self.meaning())

    @classmethod
    def from_dict(cls, d: Json) -> FeatureView:
        return cls(
            d["name"],
            Entity.from_dict(d["entity"]),
            [Field.from_dict(f) for f in d["features"]],
            ttl=None if d["ttl_us"] is None else timedelta(microseconds=d["ttl_us"]),
            source=None if d["source"] is None else Source.from_dict(d["source"]),
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
        if not isinstance(self.names, tuple) or not self.names or not all(isinstance(n, str) for n in self.names):
            raise DefinitionError(
                f"feature view {self.view.name!r}: {self.names!r} names no features; choose them as in view['a', 'b']"
            )
        for name in self.names:
            self.view.feature(name)
