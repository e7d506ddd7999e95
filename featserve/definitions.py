"""What a team writes down once: entities, sources, feature views and feature services.

Comes in: Python objects in a definitions file. Goes out: frozen values, each with a canonical JSON form (``to_dict``),
the part of that form which can change a value (``meaning``) and its hash (``content_hash``). Everything inconsistent
fails here, at construction, with a message that says what and where. Knows no file, no registry, no store.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from featserve.errors import DefinitionError, InvalidRequest, hint
from featserve.types import Bytes, Float32, Float64, Type, column, parse_type, to_us

Json = dict[str, Any]

NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
KEY_TYPES = ("bool", "int32", "int64", "string", "bytes", "timestamp")
MAX_FEATURES = 4_096


def check_name(kind: str, name: object) -> str:
    """Return ``name`` if it is lower case letters, digits and underscores, starting with a letter."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise DefinitionError(f"{kind} name {name!r}: use up to 63 of a-z, 0-9 and _, a letter first")
    return name


def check_version(what: str, version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version < 2**31:
        raise DefinitionError(f"{what}: version {version!r} is not a whole number from 1 up")


def micros(what: str, duration: object, *, zero: bool = False) -> int:
    """Return a timedelta as int microseconds; refuses a negative one and, unless ``zero``, an empty one."""
    if not isinstance(duration, timedelta):
        raise DefinitionError(f"{what}: {duration!r} is not a datetime.timedelta")
    us = duration // timedelta(microseconds=1)
    if us < 0 or (us == 0 and not zero):
        raise DefinitionError(f"{what}: {duration} is not {'zero or ' if zero else ''}a positive duration")
    return us


def content_hash(meaning: Json) -> str:
    """Return the SHA-256 (64 hex digits) of the canonical JSON of what can change a value."""
    return hashlib.sha256(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
        object.__setattr__(self, "keys", dict(self.keys))

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
class Source:
    """Files of rows with an event time. Made by ``ParquetSource`` and ``CsvSource``."""

    format: Literal["parquet", "csv"]
    path: str
    event_time: str
    known_at: str | None = None
    delay: timedelta = timedelta(0)
    columns: Mapping[str, str] = field(default_factory=dict)
    delimiter: str = ","
    nulls: Sequence[str] = ("", "NA", "null")

    def __post_init__(self) -> None:
        what = f"{self.format} source {self.path!r}"
        if not isinstance(self.path, str) or not self.path:
            raise DefinitionError(f"{self.format} source: path {self.path!r} is not a file path or glob")
        for role, name in (("event_time", self.event_time), ("known_at", self.known_at)):
            if name is not None and (not isinstance(name, str) or not name):
                raise DefinitionError(f"{what}: {role} {name!r} is not a column name")
        if self.event_time is None:
            raise DefinitionError(f"{what}: event_time is required: the column that says when a row became true")
        if self.known_at is not None and self.delay:
            raise DefinitionError(f"{what}: known_at and delay are two answers to one question; declare one of them")
        micros(f"{what}: delay", self.delay, zero=True)
        if not isinstance(self.columns, Mapping) or not all(
            isinstance(k, str) and isinstance(v, str) for k, v in self.columns.items()
        ):
            raise DefinitionError(f"{what}: columns maps a feature or key name to the source's column name")
        if not isinstance(self.delimiter, str) or not re.fullmatch(r"[^\r\n\"\x00\x80-\U0010ffff]", self.delimiter):
            raise DefinitionError(
                f"{what}: delimiter {self.delimiter!r} is not one ASCII character, or is a quote or line end"
            )
        object.__setattr__(self, "columns", dict(self.columns))
        object.__setattr__(self, "nulls", tuple(self.nulls))

    def column(self, name: str) -> str:
        """Return the name that feature or key column ``name`` has in the files."""
        return self.columns.get(name, name)

    def to_dict(self) -> Json:
        return {
            "format": self.format,
            "path": self.path,
            "event_time": self.event_time,
            "known_at": self.known_at,
            "delay_us": micros("delay", self.delay, zero=True),
            "columns": dict(self.columns),
            "delimiter": self.delimiter,
            "nulls": list(self.nulls),
        }

    @classmethod
    def from_dict(cls, d: Json) -> Source:
        rest = {k: v for k, v in d.items() if k != "delay_us"}
        return cls(**rest, delay=timedelta(microseconds=d["delay_us"]))


def ParquetSource(  # noqa: N802 - reads as a type where it is used
    path: str,
    *,
    event_time: str,
    known_at: str | None = None,
    delay: timedelta = timedelta(0),
    columns: Mapping[str, str] | None = None,
) -> Source:
    """Declare Parquet files as a source.

    ``path``: a file or glob, relative to the project's folder. ``event_time``: the timestamp column that says when a
    row became true. ``known_at``: the column that says when it could first have been used, or else ``delay``: how long
    after its event time. ``columns``: names of features or keys whose column is called otherwise in the files.
    """
    return Source("parquet", path, event_time, known_at, delay, columns or {})


def CsvSource(  # noqa: N802
    path: str,
    *,
    event_time: str,
    known_at: str | None = None,
    delay: timedelta = timedelta(0),
    columns: Mapping[str, str] | None = None,
    delimiter: str = ",",
    nulls: Sequence[str] = ("", "NA", "null"),
) -> Source:
    """Declare CSV files (plain or gzip, with a header line, UTF-8) as a source; see ``ParquetSource``.

    Times are ISO 8601; without an offset they mean UTC. ``nulls`` are the spellings of a missing value.
    """
    return Source("csv", path, event_time, known_at, delay, columns or {}, delimiter, tuple(nulls))


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
    allowed: Sequence[Any] | None = None
    not_null: bool = False
    not_nan: bool = False

    def __post_init__(self) -> None:
        check_name("feature", self.name)
        what = f"feature {self.name!r}"
        if not isinstance(self.type, Type):
            raise DefinitionError(f"{what}: {self.type!r} is not a type such as Int64, Float32, String or Vector(16)")
        ordered = not self.type.variable and not self.type.vector and self.type.name != "bool"
        for role in ("min", "max"):
            if getattr(self, role) is not None:
                if not ordered:
                    raise DefinitionError(f"{what}: {role} does not apply to {self.type}")
                object.__setattr__(self, role, self._value(role, getattr(self, role)))
                if isinstance(getattr(self, role), float) and math.isnan(getattr(self, role)):
                    raise DefinitionError(f"{what}: {role} is NaN")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise DefinitionError(f"{what}: min {self.min} is greater than max {self.max}")
        if self.allowed is not None:
            if self.type.vector or isinstance(self.allowed, str | bytes) or not list(self.allowed):
                raise DefinitionError(
                    f"{what}: allowed is a list of at least one {self.type}"
                    if not self.type.vector
                    else f"{what}: allowed does not apply to {self.type}"
                )
            object.__setattr__(self, "allowed", tuple(self._value("allowed", v) for v in self.allowed))
        if self.not_nan and not self.type.floating:
            raise DefinitionError(f"{what}: not_nan does not apply to {self.type}")
        if self.default is not None:
            object.__setattr__(self, "default", self._value("default", self.default))
            if self.allowed is not None and self.default not in self.allowed:
                raise DefinitionError(f"{what}: default {self.default!r} is not one of the allowed values")
            if (self.min is not None and self.default < self.min) or (self.max is not None and self.default > self.max):
                raise DefinitionError(f"{what}: default {self.default!r} is outside of min and max")

    def _value(self, role: str, value: Any) -> Any:
        """Return ``value`` as JSON can hold it exactly: datetimes in microseconds, bytes in latin-1."""
        if value is None:
            raise DefinitionError(f"feature {self.name!r}: {role} holds None")
        if self.type is Bytes and isinstance(value, bytes):
            return value.decode("latin-1")
        try:
            column(self.type, [value], role)
        except InvalidRequest as error:
            if not (self.type is Bytes and isinstance(value, str)):  # the JSON form, read back
                raise DefinitionError(f"feature {self.name!r}: {error}") from None
        if isinstance(value, datetime):
            return to_us(value)
        if self.type.vector:
            return [float(v) for v in value]
        return value.item() if hasattr(value, "item") else value

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
        return cls(**(d | {"type": parse_type(d["type"])}))


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
        features = tuple(self.features)
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
        chosen = (names,) if isinstance(names, str) else tuple(names)
        for name in chosen:
            self.feature(name)
        return Selection(self, chosen)

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


@dataclass(frozen=True, slots=True)
class FeatureService:
    """What one model asks for: features of view versions, in order, as one vector.

    ``features``: views (all of their features) or selections (``view["a", "b"]``). ``dtype``: Float32 or Float64, the
    precision of the served tensor. Features that it holds are floats (rounded to it), bools, vectors and, for Float64,
    int32; strings, bytes, timestamps and integers that would lose bits are served as typed columns beside it. Feature
    names in answers and training frames are ``view.feature``.
    """

    name: str
    features: Sequence[FeatureView | Selection]
    _: KW_ONLY
    dtype: Type = Float32
    version: int = 1
    owner: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("feature service", self.name)
        what = f"feature service {self.name!r}"
        check_version(what, self.version)
        if self.dtype not in (Float32, Float64):
            raise DefinitionError(f"{what}: dtype {self.dtype!r} is neither Float32 nor Float64")
        chosen: list[Selection] = []
        for item in self.features:
            if isinstance(item, FeatureView):
                chosen.append(Selection(item, tuple(f.name for f in item.features)))
            elif isinstance(item, Selection):
                chosen.append(item)
            else:
                raise DefinitionError(f"{what}: {item!r} is neither a feature view nor features chosen from one")
        if not chosen:
            raise DefinitionError(f"{what}: features is a list of at least one view or selection")
        unique(what, "feature", [f"{s.view.name}.{n}" for s in chosen for n in s.names])
        keys: dict[str, tuple[Type, str]] = {}
        versions: dict[str, FeatureView] = {}
        for s in chosen:
            if versions.setdefault(s.view.name, s.view) != s.view:
                raise DefinitionError(
                    f"{what}: two definitions of view {s.view.name!r}: {versions[s.view.name].id} and {s.view.id}"
                )
            for key, type_ in s.view.entity.keys.items():
                first, where = keys.setdefault(key, (type_, s.view.id))
                if first != type_:
                    raise DefinitionError(
                        f"{what}: key column {key!r} is {first} in {where} and {type_} in {s.view.id}"
                    )
        object.__setattr__(self, "features", tuple(chosen))
        object.__setattr__(self, "tags", check_tags(what, self.tags))

    @property
    def selections(self) -> tuple[Selection, ...]:
        return tuple(s for s in self.features if isinstance(s, Selection))

    @property
    def views(self) -> tuple[FeatureView, ...]:
        """The distinct views, in order of first use."""
        return tuple({s.view.id: s.view for s in self.selections}.values())

    @property
    def keys(self) -> dict[str, Type]:
        """Every key column that a request carries, in order of first use."""
        return {key: type_ for view in self.views for key, type_ in view.entity.keys.items()}

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    def to_dict(self) -> Json:
        return self.meaning() | {"owner": self.owner, "description": self.description, "tags": dict(self.tags)}

    def meaning(self) -> Json:
        return {
            "name": self.name,
            "version": self.version,
            "dtype": str(self.dtype),
            "features": [
                {"view": s.view.name, "version": s.view.version, "hash": s.view.hash, "names": list(s.names)}
                for s in self.selections
            ],
        }

    @property
    def hash(self) -> str:
        return content_hash(self.meaning())

    @classmethod
    def from_dict(cls, d: Json, views: Mapping[str, FeatureView]) -> FeatureService:
        """Rebuild from ``to_dict``, with ``views`` by ``name@version``."""
        return cls(
            d["name"],
            [Selection(views[f"{s['view']}@{s['version']}"], tuple(s["names"])) for s in d["features"]],
            dtype=parse_type(d["dtype"]),
            version=d["version"],
            owner=d["owner"],
            description=d["description"],
            tags=d["tags"],
        )


def unique(what: str, kind: str, names: Iterable[str]) -> None:
    """Refuse a name that stands twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DefinitionError(f"{what}: {kind} {name!r} stands twice")
        seen.add(name)


def check_tags(what: str, tags: object) -> dict[str, str]:
    if not isinstance(tags, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in tags.items()):
        raise DefinitionError(f"{what}: tags is a mapping of strings to strings")
    return dict(tags)
