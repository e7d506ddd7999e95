"""The naive oracle of windows: filter the events with Python, aggregate with Python, ask zoneinfo for the calendar.

And random histories made to hurt: events on the boundaries to the microsecond, on both clock changes of a zone's year,
late, twice, tied, with null and NaN values and null keys, and instants at which windows are empty.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from featserve.aggregates import AGGREGATES, DISTINCT_COUNT
from featserve.definitions import (
    Aggregate,
    Calendar,
    Entity,
    EventSource,
    Expression,
    FeatureView,
    Field,
    Hopping,
    Rolling,
    Source,
    Window,
    col,
    type_of,
)
from featserve.types import Bool, Bytes, Float32, Float64, Int32, Int64, String, Timestamp, Type, from_us, to_us

HOUR_US = 3_600_000_000
LEAST, MOST = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class Event:
    """``values``: every field of the event source by name, its keys too; instants are microseconds."""

    event_time_us: int
    known_at_us: int
    sequence: int
    values: Mapping[str, Any]

    @property
    def order(self) -> tuple[int, int, int]:
        return self.event_time_us, self.known_at_us, self.sequence

    @property
    def available(self) -> tuple[int, int]:
        return max(self.event_time_us, self.known_at_us), self.sequence


@dataclass(frozen=True, slots=True)
class Answer:
    """A value, and how far a float may be from it."""

    value: Any
    slack: float = 0.0

    def agrees(self, got: Any) -> bool:
        if isinstance(got, bool) != isinstance(self.value, bool) or (got is None) != (self.value is None):
            return False
        if isinstance(got, float) and isinstance(self.value, float):
            return (
                got == self.value or (math.isnan(got) and math.isnan(self.value)) or abs(got - self.value) <= self.slack
            )
        return bool(got == self.value)


def answers(
    view: FeatureView, events: Iterable[Event], key: Sequence[Any], time_us: int
) -> tuple[int | None, dict[str, Answer]]:
    """Return what an entity's view is at an instant: its event time, and each feature without its default.

    ``events``: all of the source, of any entity. ``key``: the entity's key values; a null among them has no events.
    """
    seen = []
    for event in distinct(view, events):
        is_ours = all(event.values[name] == value for name, value in zip(view.entity.keys, key, strict=True))
        if is_ours and None not in key and event.available[0] <= time_us:
            seen.append(event)
    earliest = min(start_us(a.over, time_us) for a in view.aggregates)
    newest = max((e.event_time_us for e in seen if e.event_time_us >= earliest), default=None)
    return newest, {a.name: aggregated(a, seen, time_us) for a in view.aggregates}


def distinct(view: FeatureView, events: Iterable[Event]) -> list[Event]:
    """Return the events that have a view's keys, of those with one id only the one that became available first."""
    source = view.events
    assert source is not None
    events = [event for event in events if all(event.values[name] is not None for name in view.entity.keys)]
    if source.event_id is None:
        return events
    first: dict[Any, Event] = {}
    for event in sorted(events, key=lambda event: event.available):
        first.setdefault(event.values[source.event_id], event)
    return list(first.values())


def start_us(window: Window, time_us: int) -> int:
    """Return the first event time that a window at an instant holds."""
    if isinstance(window, Rolling):
        return time_us - window.duration_us + 1
    if isinstance(window, Hopping):
        return (time_us - window.duration_us) // window.hop_us * window.hop_us
    instant = from_us(time_us)
    assert instant is not None
    zone = ZoneInfo(window.zone)
    day = instant.astimezone(zone).date()
    if _day_start_us(day + timedelta(days=1), zone) <= time_us:
        day += timedelta(days=1)  # the clock was set back past midnight: the day that had begun goes on
    if window.unit == "day":
        day -= timedelta(days=window.n - 1)
    elif window.unit == "week":
        day -= timedelta(days=day.weekday() + 7 * (window.n - 1))
    else:
        months = day.year * 12 + day.month - 1 - (window.n - 1)
        day = day.replace(year=months // 12, month=months % 12 + 1, day=1)
    return _day_start_us(day, zone)


@cache
def _day_start_us(day: date, zone: ZoneInfo) -> int:
    """Return the first microsecond whose local date is the day or a later one: found by halving two days."""

    def begun(time_us: int) -> bool:
        instant = from_us(time_us)
        assert instant is not None
        return instant.astimezone(zone).date() >= day

    low = to_us(datetime(day.year, day.month, day.day, tzinfo=UTC)) - 30 * HOUR_US  # earlier in every zone
    high = low + 60 * HOUR_US  # not earlier in any
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if begun(middle) else (middle, high)
    earlier = (high - minutes * 60_000_000 for minutes in range(180, 0, -1))  # where midnight came twice
    return next(filter(begun, earlier), high)


def aggregated(aggregate: Aggregate, seen: Iterable[Event], time_us: int) -> Answer:
    start = start_us(aggregate.over, time_us)
    events = [e for e in seen if start <= e.event_time_us <= time_us]
    if aggregate.where is not None:
        events = [e for e in events if value_of(aggregate.where, e.values) is True]
    values: list[Any] = [True] * len(events)
    if isinstance(aggregate.of, Expression):
        ordered = [value_of(aggregate.of, e.values) for e in sorted(events, key=lambda event: event.order)]
        values = [value for value in ordered if value is not None]
    if aggregate.function in COUNTS:
        return Answer(COUNTS[aggregate.function](values))
    if aggregate.function in ("sum", "mean", "stddev"):
        return _moment(aggregate.function, values) if values else Answer(None)
    choice = CHOICES[aggregate.function]
    return Answer(choice(values) if values else None)


COUNTS: Mapping[str, Callable[[Sequence[Any]], int]] = {
    "count": len,
    "distinct_count": lambda values: len(set(values)),
}
CHOICES: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "min": min,
    "max": max,
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
}


def _moment(function: str, values: Sequence[Any]) -> Answer:
    """Return a sum, mean or stddev, exact where it can be."""
    whole = isinstance(values[0], int)
    if function == "sum" and whole:
        total = sum(values)
        return Answer(total if LEAST <= total <= MOST else None)
    if function == "stddev" and len(values) < 2:
        return Answer(None)
    if not all(map(math.isfinite, values)):
        total = sum(values)
        return Answer(math.nan if function == "stddev" else float(total))
    size = math.fsum(map(abs, values))
    if function == "sum":
        return Answer(math.fsum(values), 1e-12 * size)
    if function == "mean":
        return Answer(float(sum(map(Fraction, values)) / len(values)), 1e-12 * size / len(values))
    exact = statistics.variance([Fraction(float(value)) for value in values])
    return Answer(math.sqrt(exact), 1e-9 * math.sqrt(exact) + 1e-12 * size / len(values))


def value_of(expression: Expression, values: Mapping[str, Any]) -> Any:
    """Return the value of an expression for one event, None for a null."""
    operator, arguments = expression.operator, expression.arguments
    if operator == "col":
        return _known(values[arguments[0]])
    if operator == "literal":
        return arguments[0]
    given = [value_of(argument, values) for argument in arguments]
    if operator == "is_null":
        return given[0] is None
    if operator in "&|" and (operator == "|") in given:
        return operator == "|"
    if None in given:
        return None
    if operator == "~":
        return not given[0]
    a, b = given
    if operator in "&|":
        return operator == "&"
    if operator in "+-*/":
        with np.errstate(all="ignore"):
            return (
                None
                if operator == "/" and b == 0
                else _known(float(ARITHMETIC[operator](np.float64(a), np.float64(b))))
            )
    if isinstance(a, float) or isinstance(b, float):
        a, b = float(a), float(b)
    return COMPARISONS[operator](a, b)


ARITHMETIC = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}
COMPARISONS = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


# Random histories.

FIELDS = (
    Field("user_id", Int64),
    Field("region", String),
    Field("event_id", String),
    Field("amount", Float64),
    Field("ratio", Float32),
    Field("quantity", Int64),
    Field("small", Int32),
    Field("kind", String),
    Field("body", Bytes),
    Field("flag", Bool),
    Field("at", Timestamp),
)
WITH_IDS = [f if f.name != "event_id" else Field("event_id", String, not_null=True) for f in FIELDS]
TYPES = {f.name: f.type for f in FIELDS}
USER = Entity("user", {"user_id": Int64})
PLACE = Entity("place", {"region": String, "user_id": Int64})
NAN = math.nan
POOLS: dict[str, list[Any]] = {
    "user_id": [1, 1, 1, 2, 3, None],
    "region": ["a", "a", "a", "b", "", None],
    "amount": [1.5, -2.25, 0.1, 0.0, -0.0, 1e9 + 0.125, 1e-9, NAN, None],
    "ratio": [0.5, -0.0, 0.0, float(np.float32(0.1)), -3.0, NAN, None],
    "quantity": [0, 1, -7, 40, 2**53 + 1, None],
    "small": [0, 1, -1, 2**31 - 1, -(2**31), None],
    "kind": ["x", "y", "", "é", "long " * 9, None],
    "body": [b"", b"\0", b"\xff", b"a\0b", None],
    "flag": [True, False, None],
    "at": [0, -1, 1_700_000_000_000_000, None],
}
RARE: dict[str, list[Any]] = {
    "amount": [math.inf, -math.inf, 1e150],
    "ratio": [math.inf, -math.inf],
    "quantity": [MOST, LEAST, MOST - 1],
}
"""Values after which sums tell little: in some histories only."""
WHERES = (
    col("amount") > 0,
    col("kind") == "x",
    ~col("flag"),
    (col("quantity") >= 1) | col("flag"),
    col("ratio").is_null() & (col("small") != 0),
)
OFS = (*(col(name) for name in TYPES if name not in ("user_id", "region", "event_id")), col("amount") / col("small"))

MICROSECOND, MINUTE = timedelta(microseconds=1), timedelta(minutes=1)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
WINDOWS = (
    Rolling(MICROSECOND),
    Rolling(HOUR),
    Rolling(7 * DAY),
    Hopping(HOUR, HOUR),
    Hopping(7 * DAY, HOUR),
    Hopping(timedelta(microseconds=6), timedelta(microseconds=3)),
    Calendar(1, "day", "America/New_York"),
    Calendar(7, "day", "America/New_York"),
    Calendar(2, "day", "America/Sao_Paulo"),  # whose clocks once skipped midnight
    Calendar(2, "week", "Australia/Lord_Howe"),  # whose clocks change by half an hour
    Calendar(2, "month", "Asia/Kathmandu"),
)
WEEKS: tuple[Window, ...] = (Rolling(7 * DAY), Hopping(7 * DAY, HOUR), Calendar(7, "day", "America/New_York"))
"""A week of each kind."""
WEEKS_KEPT = (*((week, False) for week in WEEKS), *((week, True) for week in WEEKS if not isinstance(week, Rolling)))
"""A week of each kind, with whether what is kept of it is in two parts, which it never is of a rolling one."""
CHANGES = tuple(
    to_us(datetime.fromisoformat(text))
    for text in (
        "2024-03-10T07:00:00+00:00",  # New York skips from two to three
        "2024-11-03T06:00:00+00:00",  # and has from one to two twice
        "2018-11-04T03:00:00+00:00",  # Sao Paulo skips from midnight to one
        "2018-02-18T02:00:00+00:00",  # and has from 23 to midnight twice
        "2024-04-06T15:00:00+00:00",  # Lord Howe goes back by half an hour
        "2024-10-05T15:30:00+00:00",
    )
)


@dataclass(frozen=True, slots=True)
class History:
    """A view, the events of its source in order of their sequence, and what is asked: an instant and a key each."""

    view: FeatureView
    events: list[Event]
    asked: list[tuple[int, tuple[Any, ...]]]


def make_history(
    rng: np.random.Generator,
    *,
    events: int = 60,
    asked: int = 60,
    windows: Sequence[Window] = WINDOWS,
    source: Source | None = None,
    lonely: bool = False,
    in_parts: bool = False,
    corrected: bool = False,
) -> History:
    """Return a random view over a handful of ``windows`` with a history.

    ``source``: that of the view's events. ``lonely``: one entity has all events. ``in_parts``: the view is one of those
    whose records, if they may be long, are kept in two parts. ``corrected``: an event that is repeated may be so at
    another time, or of another entity.
    """
    view = make_view(rng, windows, source, in_parts)
    base = CHANGES[rng.integers(len(CHANGES))]
    instants = _instants(rng, base, [a.over for a in view.aggregates])
    pools = {name: [*pool, *(RARE.get(name, ()) if rng.random() < 0.2 else ())] for name, pool in POOLS.items()}
    if lonely:
        pools |= {"user_id": [1], "region": ["a"]}
    made: list[Event] = []
    for sequence in range(events):
        event_time = instants[rng.integers(len(instants))]
        values = {name: pool[rng.integers(len(pool))] for name, pool in pools.items()}
        values["event_id"] = f"event {sequence}"
        known_at = _known_at(rng, event_time)
        if made and rng.random() < 0.15:
            twin = made[rng.integers(len(made))]
            event_time, values = twin.event_time_us, dict(twin.values)
            if corrected and rng.random() < 0.3:
                event_time = instants[rng.integers(len(instants))]
            known_at = _known_at(rng, event_time)
            if rng.random() < 0.2:
                values["user_id"] = None
            elif corrected and rng.random() < 0.3:
                values |= {name: pools[name][rng.integers(len(pools[name]))] for name in ("user_id", "region")}
        made.append(Event(event_time, known_at, sequence, values))
    times = [*instants, *(t for e in made for t in (e.known_at_us, e.known_at_us - 1))]
    keys = [pools[name] for name in view.entity.keys]
    return History(
        view,
        made,
        [
            (times[rng.integers(len(times))], tuple(pool[rng.integers(len(pool))] for pool in keys))
            for _ in range(asked)
        ],
    )


def make_view(
    rng: np.random.Generator, windows: Sequence[Window], source: Source | None = None, in_parts: bool = False
) -> FeatureView:
    """Return a view of up to twelve aggregates, each function of whatever it takes, over up to three windows."""
    if in_parts:
        windows = [window for window in windows if not isinstance(window, Rolling)]
    chosen = [windows[i] for i in rng.permutation(len(windows))[:3]]
    functions = [*AGGREGATES]
    made: list[Aggregate] = []
    while len(made) < 12:
        function = functions[rng.integers(len(functions))]
        of = None if rng.random() < 0.3 else OFS[rng.integers(len(OFS))]
        if not _takes(function, None if of is None else type_of(of, TYPES, function), in_parts):
            continue
        where = WHERES[rng.integers(len(WHERES))] if rng.random() < 0.5 else None
        over = chosen[rng.integers(len(chosen))]
        made.append(Aggregate(f"f{len(made)}_{function}", function, of, over=over, where=where))
    named = EventSource("events", WITH_IDS, source=source, event_id="event_id" if rng.random() < 0.7 else None)
    entity = USER if rng.random() < 0.5 else PLACE
    return FeatureView("windowed", entity, events=named, aggregates=made)


def every_aggregate(over: Window, in_parts: bool = False) -> list[Aggregate]:
    """Return each aggregate of the table of each field that it takes and that is no key, and of events, over a window.

    ``in_parts``: but for those that no record in two parts has.
    """
    types = {name: type for name, type in TYPES.items() if name not in ("user_id", "region", "event_id")}
    return [
        Aggregate(f"{function}_{name}", function, None if type is None else name, over=over)
        for function in AGGREGATES
        for name, type in [*types.items(), ("events", None)]
        if _takes(function, type, in_parts)
    ]


def _takes(function: str, type: Type | None, in_parts: bool) -> bool:
    """Say whether there is an aggregate of values of a type, or of events; ``in_parts``: one that keeps no strings."""
    made = AGGREGATES[function](type)
    if made is None or not in_parts:
        return made is not None
    return function != DISTINCT_COUNT and (type is None or not type.variable or made.output is not type)


def _known_at(rng: np.random.Generator, event_time: int) -> int:
    """Return when an event was known: at once, before it happened, or late by a microsecond, an hour or days."""
    return event_time + int(rng.choice([0, 0, 0, -HOUR_US, 1, HOUR_US, 50 * HOUR_US, 200 * HOUR_US]))


def _instants(rng: np.random.Generator, base: int, windows: Sequence[Window]) -> list[int]:
    """Return a handful of instants near ``base``, with those where windows at them begin, and a microsecond beside."""
    near = [base + int(hours) * HOUR_US for hours in (0, 1, *rng.integers(-100, 100, 3))]
    edges = [start_us(window, t) for window in windows for t in near[:3]]
    again = [2 * t - start_us(window, t) for window in windows for t in near[:2]]
    return [t + d for t in (*near, *edges, *again) for d in (-1, 0, 1)]


def edge_history(source: Source, windows: Sequence[Window] = WINDOWS) -> History:
    """Return aggregates over ``windows``, and for each clock change a user with the events that tell where one ends.

    They lie where windows at the change and an hour after it begin, and a microsecond beside: two at each instant, of
    which one is known an hour late, and the other comes again later. Asked is about these and about nobody.
    """
    functions = (("count", None), ("sum", "quantity"), ("last", "quantity"))
    aggregates = [
        Aggregate(f"{function}_{number}", function, of, over=window)
        for number, window in enumerate(windows)
        for function, of in functions
    ]
    events = EventSource("events", WITH_IDS, source=source, event_id="event_id")
    made: list[Event] = []
    asked: list[tuple[int, tuple[Any, ...]]] = []
    for user, change in enumerate(CHANGES):
        near = (change, change + HOUR_US)
        starts = [(t, start_us(window, t)) for window in windows for t in near]
        for edge in sorted({start + d for _, start in starts for d in (-1, 0, 1)} | {*near}):
            for name, late_us in (("first", 0), ("tied", HOUR_US), ("first", 2 * HOUR_US)):
                values = {"user_id": user, "event_id": f"{name} {user} {edge}", "quantity": len(made)}
                made.append(Event(edge, edge + late_us, len(made), dict.fromkeys(TYPES) | values))
        times = {t + d for t in (*near, *(2 * t - start for t, start in starts)) for d in (-1, 0, 1)}
        asked += [(t, (who,)) for t in sorted(times) for who in (user, len(CHANGES))]
    return History(FeatureView("windowed", USER, events=events, aggregates=aggregates), made, asked)
