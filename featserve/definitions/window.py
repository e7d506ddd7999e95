"""Windowed aggregates: event sources, the kinds of window, and the aggregates over them that a view serves.

"The past 7 days" means nothing until a window says which: ``Rolling`` is so many hours back from the instant,
``Calendar`` whole local days, ``Hopping`` whole hops of the clock. Knows no store and no engine; ``windows.py`` says
where a window starts, ``aggregates.py`` how an aggregate is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from featserve.aggregates import AGGREGATES, DISTINCT_COUNT
from featserve.definitions.expression import Expression, col, type_of
from featserve.definitions.field import Field
from featserve.definitions.rules import (
    Json,
    check_name,
    check_tags,
    check_texts,
    check_version,
    content_hash,
    hours,
    micros,
    unique,
)
from featserve.definitions.source import Rows, Source
from featserve.errors import DefinitionError, hint
from featserve.types import Bool, Type

UNITS = ("day", "week", "month")
MAX_PERIODS = 10_000
MAX_EVENTS = 100_000
"""The most events of one entity that a rolling window may keep online."""
MAX_DISTINCT = 10_000


@dataclass(frozen=True, slots=True)
class Rolling:
    """The events with ``T - duration < event_time <= T``: "7 days" is 168 hours.

    Online every event of the window is kept: ``max_events`` bounds them for each entity, a push beyond it is refused.
    """

    duration: timedelta
    max_events: int = 10_000

    def __post_init__(self) -> None:
        micros("Rolling: duration", self.duration)
        _whole("Rolling: max_events", self.max_events, MAX_EVENTS)

    @property
    def duration_us(self) -> int:
        return micros("duration", self.duration)

    def to_dict(self) -> Json:
        return {"kind": "rolling", "duration_us": self.duration_us, "max_events": self.max_events}

    @property
    def boundaries(self) -> str:
        """Which event times it holds at T."""
        return f"T - {hours(self.duration_us)} < event time <= T"


@dataclass(frozen=True, slots=True)
class Calendar:
    """The events from the start of the local period ``n - 1`` before the one of T, to T; both ends are included.

    ``unit``: "day", "week" (from Monday) or "month". ``zone``: an IANA time zone, such as "America/New_York"; periods
    follow its clock changes. Online one partial is kept for each local period.
    """

    n: int
    unit: Literal["day", "week", "month"]
    zone: str

    def __post_init__(self) -> None:
        _whole("Calendar: n", self.n, MAX_PERIODS)
        if self.unit not in UNITS:
            raise DefinitionError(f"Calendar: unit {self.unit!r} is not one of {', '.join(UNITS)}")
        try:
            ZoneInfo(self.zone)
        except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
            near = hint(self.zone, available_timezones()) if isinstance(self.zone, str) else ""
            raise DefinitionError(f"Calendar: {self.zone!r} is no IANA time zone{near}") from None

    def to_dict(self) -> Json:
        return {"kind": "calendar", "n": self.n, "unit": self.unit, "zone": self.zone}

    @property
    def boundaries(self) -> str:
        """Which event times it holds at T."""
        unit = self.unit if self.n == 2 else f"{self.unit}s"
        first = f"T's {self.unit}" if self.n == 1 else f"the {self.unit} {self.n - 1} {unit} before T's"
        return f"the start of {first} in {self.zone} <= event time <= T"


@dataclass(frozen=True, slots=True)
class Hopping:
    """The events with ``floor(T - duration, hop) <= event_time <= T``; hops are aligned to the Unix epoch.

    Online one partial is kept for each hop. ``hop`` divides ``duration``.
    """

    duration: timedelta
    hop: timedelta

    def __post_init__(self) -> None:
        duration_us, hop_us = micros("Hopping: duration", self.duration), micros("Hopping: hop", self.hop)
        if duration_us % hop_us:
            raise DefinitionError(f"Hopping: the hop of {self.hop} does not divide the duration of {self.duration}")
        _whole("Hopping: hops", duration_us // hop_us, MAX_PERIODS)

    @property
    def duration_us(self) -> int:
        return micros("duration", self.duration)

    @property
    def hop_us(self) -> int:
        return micros("hop", self.hop)

    def to_dict(self) -> Json:
        return {"kind": "hopping", "duration_us": self.duration_us, "hop_us": self.hop_us}

    @property
    def boundaries(self) -> str:
        """Which event times it holds at T; hops are aligned to the Unix epoch."""
        return f"floor(T - {hours(self.duration_us)}, {hours(self.hop_us)}) <= event time <= T"


Window = Rolling | Calendar | Hopping


def window_from_dict(d: Json) -> Window:
    """Return the window that ``to_dict`` gave ``d``."""
    if d["kind"] == "calendar":
        return Calendar(d["n"], d["unit"], d["zone"])
    duration = timedelta(microseconds=d["duration_us"])
    if d["kind"] == "hopping":
        return Hopping(duration, timedelta(microseconds=d["hop_us"]))
    return Rolling(duration, d["max_events"])


def _whole(what: str, number: object, most: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
        raise DefinitionError(f"{what} {number!r} is not a whole number from 1 to {most:,}")


@dataclass(frozen=True, slots=True)
class Aggregate:
    """One feature of a view over events: ``function`` of ``of``, over the events of ``over`` that satisfy ``where``.

    ``function``: one of ``aggregates.AGGREGATES``. ``of``: a column of the event or an expression; events where it is
    null (or NaN) are left out. Only "count" may do without: it then counts events. ``over``: no kind of window is the
    default, so an aggregate without one is refused. ``where``: an expression that is true, false or null of an event
    alone; null leaves the event out. ``max_distinct``: for "distinct_count", how many distinct values of one entity it
    counts exactly; a push beyond it is refused. An empty window has count 0 and null for the rest; ``default`` replaces
    that null in the value, never in the status.
    """

    name: str
    function: str
    of: Expression | str | None = None
    _: KW_ONLY
    over: Window = None  # type: ignore[assignment]
    where: Expression | None = None
    max_distinct: int = 1_000
    default: Any = None
    description: str = ""

    def __post_init__(self) -> None:
        check_name("feature", self.name)
        what = f"feature {self.name!r}"
        if self.function not in AGGREGATES:
            raise DefinitionError(f"{what}: unknown aggregate {self.function!r}{hint(str(self.function), AGGREGATES)}")
        if isinstance(self.of, str):
            object.__setattr__(self, "of", col(self.of))
        if self.of is None and AGGREGATES[self.function](None) is None:
            raise DefinitionError(f"{what}: of is required: what the {self.function} is of, a column or an expression")
        for role, given in (("of", self.of), ("where", self.where)):
            if given is not None and not isinstance(given, Expression):
                raise DefinitionError(f"{what}: {role} {given!r} is not an expression such as col('price') > 3")
        if not isinstance(self.over, Window):
            raise DefinitionError(
                f"{what}: over {self.over!r} is not a window; say which: Rolling, Calendar or Hopping"
            )
        _whole(f"{what}: max_distinct", self.max_distinct, MAX_DISTINCT)
        if self.default is not None and not isinstance(self.default, bool | int | float | str):
            raise DefinitionError(f"{what}: default {self.default!r} is not a number, bool or string")
        check_texts(what, description=self.description)

    def __eq__(self, other: object) -> bool:
        # == of two expressions is an expression.
        return isinstance(other, Aggregate) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.name, self.function, self.over))

    def field(self, types: Mapping[str, Type]) -> Field:
        """Return the feature as it is served, over events of the columns ``types``; raises DefinitionError."""
        what = f"feature {self.name!r}"
        if self.where is not None and (found := type_of(self.where, types, f"{what}: where")) is not Bool:
            raise DefinitionError(f"{what}: where {self.where} is {found}, neither true nor false")
        given = type_of(self.of, types, f"{what}: of") if isinstance(self.of, Expression) else None
        aggregator = AGGREGATES[self.function](given)
        if aggregator is None:
            raise DefinitionError(f"{what}: there is no {self.function} of {given}")
        return Field(self.name, aggregator.output, default=self.default, description=self.description)

    @property
    def columns(self) -> set[str]:
        """The names of the columns that it reads."""
        return set().union(*(e.columns() for e in (self.of, self.where) if isinstance(e, Expression)))

    def to_dict(self) -> Json:
        return self.meaning() | {"description": self.description}

    def meaning(self) -> Json:
        of, where = self.of, self.where
        return {
            "name": self.name,
            "function": self.function,
            "of": of.to_dict() if isinstance(of, Expression) else None,
            "over": self.over.to_dict(),
            "where": None if where is None else where.to_dict(),
            "max_distinct": self.max_distinct if self.function == DISTINCT_COUNT else None,
            "default": self.default,
            "empty": AGGREGATES[self.function].empty,
            "ties": "event_time, known_at, sequence",
        }

    @classmethod
    def from_dict(cls, d: Json) -> Aggregate:
        return cls(
            d["name"],
            d["function"],
            None if d["of"] is None else Expression.from_dict(d["of"]),
            over=window_from_dict(d["over"]),
            where=None if d["where"] is None else Expression.from_dict(d["where"]),
            default=d["default"],
            description=d["description"],
            **({} if d["max_distinct"] is None else {"max_distinct": d["max_distinct"]}),
        )


@dataclass(frozen=True, slots=True)
class EventSource:
    """Things that happen, which views aggregate over windows: one schema, for a batch file and for pushed events alike.

    ``fields``: the event's columns, the key columns of the views' entities among them. An event whose key is null is
    none of that entity's. ``source``: the files that training frames and ``materialize`` read; None where events are
    only pushed. ``event_id``: a column that names each event, so that one which comes twice counts once.
    """

    name: str
    fields: Sequence[Field]
    _: KW_ONLY
    source: Source | None = None
    event_id: str | None = None
    version: int = 1
    owner: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("event source", self.name)
        what = f"event source {self.name!r}"
        check_version(what, self.version)
        check_texts(what, owner=self.owner, description=self.description)
        fields = tuple(self.fields) if isinstance(self.fields, Iterable) else ()
        if not fields or not all(isinstance(f, Field) for f in fields):
            raise DefinitionError(f"{what}: fields is a list of at least one Field")
        unique(what, "field", [f.name for f in fields])
        names = [f.name for f in fields]
        for f in fields:
            if f.default is not None:
                raise DefinitionError(f"{what}: field {f.name!r} has a default; give one to the aggregate instead")
        if self.source is not None:
            if not isinstance(self.source, Source):
                raise DefinitionError(f"{what}: source {self.source!r} is not a ParquetSource or CsvSource")
            for name in self.source.columns:
                if name not in names:
                    raise DefinitionError(f"{what}: its source renames {name!r}, which is no field{hint(name, names)}")
        if self.event_id is not None:
            kinds = {f.name: f.type for f in fields}
            if self.event_id not in kinds:
                raise DefinitionError(
                    f"{what}: event_id {self.event_id!r} is no field{hint(str(self.event_id), names)}"
                )
            if kinds[self.event_id].name not in ("int64", "int32", "string", "bytes"):
                raise DefinitionError(
                    f"{what}: event_id {self.event_id!r} is {kinds[self.event_id]}; it is an integer, string or bytes"
                )
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "tags", check_tags(what, self.tags))

    @property
    def types(self) -> dict[str, Type]:
        return {f.name: f.type for f in self.fields}

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def rows(self) -> Rows:
        """What a batch file or a push brings. No column is a key: an event may be of none of an entity."""
        fields = (replace(f, not_null=True) if f.name == self.event_id else f for f in self.fields)
        return Rows(self.id, {}, tuple(fields), self.source)

    def to_dict(self) -> Json:
        return self.meaning() | {
            "fields": [f.to_dict() for f in self.fields],
            "owner": self.owner,
            "description": self.description,
            "tags": dict(self.tags),
        }

    def meaning(self) -> Json:
        return {
            "name": self.name,
            "version": self.version,
            "fields": [f.meaning() for f in self.fields],
            "source": None if self.source is None else self.source.to_dict(),
            "event_id": self.event_id,
        }

    @property
    def hash(self) -> str:
        return content_hash(self.meaning())

    @classmethod
    def from_dict(cls, d: Json) -> EventSource:
        return cls(
            d["name"],
            [Field.from_dict(f) for f in d["fields"]],
            source=None if d["source"] is None else Source.from_dict(d["source"]),
            event_id=d["event_id"],
            version=d["version"],
            owner=d["owner"],
            description=d["description"],
            tags=d["tags"],
        )
