"""What is kept of a windowed view's events: series of buckets, each with the partials of it and of all later ones.

Comes in: a view, events of some entities. Goes out: a ``State`` of these entities, in arrays over all of them at once.

A bucket is what its windows cut time into: a hop, a local period, for a rolling window a microsecond. A read at T comes
after everything that was folded, so each of its windows ends with the newest bucket: it is all that is in or after its
first one. That is what a bucket's struct holds, so a read finds one struct for each window and merges nothing. A write
merges an event into its own bucket and all earlier ones. For a distinct count, each value stands in the newest bucket
that has it: those in or after a bucket are the count.

Knows no bytes, no store and no clock. Strings and bytes are int64 codes of a ``Pool``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self

import numpy as np

from featserve.aggregates import AGGREGATES, DISTINCT_COUNT, INT64, Aggregator, DType
from featserve.batch import EventBatch, Int64s
from featserve.definitions import Calendar, Expression, FeatureView, Hopping, Rolling, Window
from featserve.definitions.expression import evaluate, type_of
from featserve.types import NEVER_US, Array, Column, Mask, Type
from featserve.windows import DAY_US

COUNT = "count"
MAX_WAITING = 10_000
"""The most events of one entity that may wait to become visible."""
LONG_BYTES = 2_048
"""A record that may be longer is kept in two parts. What came lately is in one of up to about this length."""


@dataclass(frozen=True, slots=True)
class Operand:
    """What aggregates are of: a value of each event that ``where`` takes; without ``of`` the event itself."""

    of: Expression | None
    where: Expression | None
    type: Type | None

    @property
    def coded(self) -> bool:
        """True where its values are codes of a pool."""
        return self.type is not None and self.type.variable


@dataclass(frozen=True, slots=True)
class Measure:
    """An aggregate without its window. ``count``: the column that counts its events; ``parts``: those of its partials.

    Those of an aggregate that is made of others are theirs. Where the count is zero, the partials are anything.
    ``coded``: the last of them is a code.
    """

    operand: int
    aggregator: Aggregator
    count: int
    parts: tuple[int, ...]
    coded: bool


@dataclass(frozen=True, slots=True)
class Series:
    """A run of structs for each entity: the number of a bucket, then ``columns`` of int64 and float64.

    ``longest``: of the windows that read it, which all number buckets alike. ``operands``: whose events the first
    columns count. ``distinct``: instead of all that, the operand whose values stand here, each once.
    """

    longest: Window
    operands: tuple[int, ...]
    measures: tuple[Measure, ...]
    dtypes: tuple[DType, ...]
    distinct: int | None = None

    @property
    def width(self) -> int:
        """Words of a struct."""
        return 1 + len(self.dtypes)

    def there(self, measure: Measure, columns: Sequence[Array]) -> Mask:
        """Return which structs hold partials of a measure."""
        if self.distinct is not None:
            return np.ones(len(columns[0]), np.bool_)
        return columns[measure.count] > 0


@dataclass(frozen=True, slots=True)
class Bound:
    """The most events that a rolling window, or the most values that a distinct count holds of one entity."""

    series: int
    window: Window
    most: int
    feature: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a feature is read: its ``cut``, a series with the first bucket of a window, and what is computed there.

    ``measure``: None for a count, which is column ``count``, and for a distinct count, which has none.
    """

    cut: int
    count: int | None
    measure: Measure | None


@dataclass(frozen=True, slots=True)
class Layout:
    """What records of one view version hold, and where each feature is in it."""

    view: FeatureView
    operands: tuple[Operand, ...]
    series: tuple[Series, ...]
    cuts: tuple[tuple[int, Window], ...]
    places: tuple[Place, ...]
    bounds: tuple[Bound, ...]

    @classmethod
    def of(cls, view: FeatureView) -> Self:
        """Return the layout of a view over events."""
        return cls(view, *_compile(view))

    @property
    def long(self) -> bool:
        """True where records may be long."""
        return 8 * sum(_buckets(series.longest) * series.width for series in self.series) > LONG_BYTES

    @property
    def in_parts(self) -> bool:
        """True where records are kept in two parts: they may be long, or loads make a push write each record twice.

        Not where strings stand behind them, or all of it is needed to hold a bound: two structs are to make one by
        arithmetic alone.
        """
        coded = any(measure.coded for series in self.series for measure in series.measures)
        return not self.bounds and not coded and (self.long or self.view.source is not None)


def _grain(window: Window) -> tuple[Any, ...]:
    """Return what two windows have in common that number buckets alike."""
    if isinstance(window, Calendar):
        return "calendar", window.unit, window.zone
    return ("hopping", window.hop_us) if isinstance(window, Hopping) else ("rolling",)


def length_us(window: Window) -> int:
    """Return about how long a window is, in microseconds: a month counts as 30 days."""
    if isinstance(window, Calendar):
        return window.n * {"day": 1, "week": 7, "month": 30}[window.unit] * DAY_US
    return window.duration_us


def _buckets(window: Window) -> int:
    """Return how many buckets a window of hops or local periods is."""
    if isinstance(window, Calendar):
        return window.n
    return window.duration_us // window.hop_us + 1 if isinstance(window, Hopping) else 1


class _Draft:
    """A series while the aggregates that read it are gathered."""

    def __init__(self, distinct: int | None, window: Window) -> None:
        self.distinct, self.longest = distinct, window
        self.operands: list[int] = []
        self.aggregators: dict[tuple[str, int], Aggregator] = {}

    def add(self, function: str, operand: int, window: Window, type: Type | None) -> None:
        self.longest = max(self.longest, window, key=length_us)
        if self.distinct is None and operand not in self.operands:
            self.operands.append(operand)
        aggregator = AGGREGATES[function](type)
        assert aggregator is not None
        for part in aggregator.made_of:
            self.add(part, operand, window, type)
        if function != COUNT:  # which the operand's own column counts
            self.aggregators.setdefault((function, operand), aggregator)

    def series(self, operands: Sequence[Operand]) -> tuple[Series, dict[tuple[str, int], Measure]]:
        dtypes = [INT64] * len(self.operands)
        measures: dict[tuple[str, int], Measure] = {}
        kept: list[Measure] = []
        for (function, operand), aggregator in self.aggregators.items():
            count = 0 if self.distinct is not None else self.operands.index(operand)
            made_of = [(count,) if part == COUNT else measures[part, operand].parts for part in aggregator.made_of]
            parts = tuple(chain(*made_of)) or tuple(range(len(dtypes), len(dtypes) + len(aggregator.dtypes)))
            measure = Measure(operand, aggregator, count, parts, operands[operand].coded)
            measures[function, operand] = measure
            if not made_of:
                kept.append(measure)
                dtypes += aggregator.dtypes
        return Series(self.longest, tuple(self.operands), (*kept,), (*dtypes,), self.distinct), measures


def _compile(view: FeatureView) -> tuple[Any, ...]:
    """Return the fields of the layout of ``view`` behind the view itself."""
    operands, numbers = _operands(view)
    drafts: dict[tuple[Any, ...], _Draft] = {}
    grains = []
    for aggregate, operand in zip(view.aggregates, numbers, strict=True):
        distinct = operand if aggregate.function == DISTINCT_COUNT else None
        grains.append((distinct, *_grain(aggregate.over)))
        draft = drafts.setdefault(grains[-1], _Draft(distinct, aggregate.over))
        draft.add(aggregate.function, operand, aggregate.over, operands[operand].type)
        if distinct is None and isinstance(aggregate.over, Rolling):
            draft.add(COUNT, 0, aggregate.over, None)  # max_events counts all
    made = {grain: draft.series(operands) for grain, draft in drafts.items()}
    order = list(made)
    cuts: dict[tuple[int, Window], int] = {}
    places, bounds = [], []
    for aggregate, operand, grain in zip(view.aggregates, numbers, grains, strict=True):
        series, measures = made[grain]
        cut = (order.index(grain), aggregate.over)
        count = None if series.distinct is not None else series.operands.index(operand)
        measure = None if series.distinct is not None else measures.get((aggregate.function, operand))
        places.append(Place(cuts.setdefault(cut, len(cuts)), count, measure))
        if series.distinct is not None:
            bounds.append(Bound(*cut, aggregate.max_distinct, aggregate.name, "max_distinct"))
        elif isinstance(aggregate.over, Rolling):
            bounds.append(Bound(*cut, aggregate.over.max_events, aggregate.name, "max_events"))
    return operands, tuple(made[grain][0] for grain in order), tuple(cuts), tuple(places), tuple(bounds)


def _operands(view: FeatureView) -> tuple[tuple[Operand, ...], list[int]]:
    """Return the operands of a view, of which the first is all its events, and the number of that of each aggregate."""
    assert view.events is not None
    found = {repr([None, None]): Operand(None, None, None)}
    names = []
    for aggregate in view.aggregates:
        of, where = aggregate.of, aggregate.where
        assert not isinstance(of, str)
        names.append(repr([e if e is None else e.to_dict() for e in (of, where)]))
        type = None if of is None else type_of(of, view.events.types, view.id)
        found.setdefault(names[-1], Operand(of, where, type))
    numbers = list(found)
    return tuple(found.values()), [numbers.index(name) for name in names]


class Pool:
    """The strings of some records, each with its code."""

    def __init__(self) -> None:
        self._codes: dict[bytes, int] = {}

    def codes(self, values: Sequence[bytes]) -> Int64s:
        """Return the code of each value."""
        known = self._codes
        return np.fromiter((known.setdefault(value, len(known)) for value in values), np.int64, len(values))

    def values(self) -> list[bytes]:
        """Return the values in the order of their codes."""
        return list(self._codes)


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """n events as a view takes them. ``owner``: the number of their entity.

    ``taken``: bool of shape (n, operands), where an operand takes an event. ``values``: its values, of shape (n,) each;
    anything where it does not take the event, and None where it has none.
    """

    owner: Int64s
    event_time_us: Int64s
    known_at_us: Int64s
    sequence: Int64s
    taken: Mask
    values: tuple[Array | None, ...]

    def __len__(self) -> int:
        return len(self.owner)

    def take(self, rows: Array) -> Events:
        """Return the events at ``rows``, positions or a mask."""
        values = tuple(None if v is None else v[rows] for v in self.values)
        times = (self.event_time_us[rows], self.known_at_us[rows], self.sequence[rows])
        return Events(self.owner[rows], *times, self.taken[rows], values)

    def and_those_of(self, other: Events) -> Events:
        """Return these events, and the others behind them."""
        if not len(other):
            return self
        return Events(
            np.concatenate([self.owner, other.owner]),
            np.concatenate([self.event_time_us, other.event_time_us]),
            np.concatenate([self.known_at_us, other.known_at_us]),
            np.concatenate([self.sequence, other.sequence]),
            np.concatenate([self.taken, other.taken]),
            tuple(
                None if a is None or b is None else np.concatenate([a, b])
                for a, b in zip(self.values, other.values, strict=True)
            ),
        )

    @classmethod
    def none(cls, layout: Layout) -> Events:
        """Return no events."""
        no = np.zeros(0, np.int64)
        return cls(
            no, no, no, no, np.zeros((0, len(layout.operands)), np.bool_),
            tuple(None if o.of is None else np.zeros(0, value_dtype(o)) for o in layout.operands),
        )  # fmt: skip


def value_dtype(operand: Operand) -> DType:
    """Return the dtype of the values of an operand that has some."""
    return INT64 if operand.type is None or operand.type.dtype is None else operand.type.dtype


def events_of(layout: Layout, batch: EventBatch, owner: Int64s, pool: Pool) -> Events:
    """Return the events of ``batch``, of the entities ``owner``, int64 of shape (n,)."""
    rows = len(batch)
    taken = np.ones((rows, len(layout.operands)), np.bool_)
    values: list[Array | None] = []
    evaluated: dict[str, Column] = {}

    def value(expression: Expression) -> Column:
        name = repr(expression.to_dict())
        if name not in evaluated:
            evaluated[name] = evaluate(expression, batch.columns, rows)
        return evaluated[name]

    for i, operand in enumerate(layout.operands):
        if operand.where is not None:
            where = value(operand.where)
            taken[:, i] = where.values if where.valid is None else where.values & where.valid
        if operand.of is None:
            values.append(None)
            continue
        of = value(operand.of)
        if of.valid is not None:
            taken[:, i] &= of.valid
        values.append(pool.codes(of.to_bytes_list()) if operand.coded else of.values)
    return Events(owner, batch.event_time_us, batch.known_at_us, batch.sequence, taken, tuple(values))


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The structs of one series: their entity's number and their bucket's, which rise, and their columns."""

    owner: Int64s
    number: Int64s
    columns: tuple[Array, ...]

    def take(self, rows: Array) -> Run:
        return Run(self.owner[rows], self.number[rows], tuple(c[rows] for c in self.columns))


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What is kept of n entities.

    ``exact_us``: the instant from which on a read is right, ``newest_us``: the newest event time, ``seen_us``: that of
    the entity, later where its other part has a newer event; int64 of shape (n,), NEVER_US where no event was folded.
    ``runs``: one for each series. ``waiting``: events not yet visible, in the order of their owners.
    """

    exact_us: Int64s
    newest_us: Int64s
    seen_us: Int64s
    runs: tuple[Run, ...]
    waiting: Events

    def __len__(self) -> int:
        return len(self.exact_us)

    @classmethod
    def empty(cls, layout: Layout, entities: int) -> State:
        """Return the state of entities without an event."""
        never, no = np.full(entities, NEVER_US), np.zeros(0, np.int64)
        runs = tuple(Run(no, no, tuple(np.zeros(0, d) for d in s.dtypes)) for s in layout.series)
        return cls(never, never, never, runs, Events.none(layout))

    def take(self, rows: Int64s) -> State:
        """Return what is kept of the entities ``rows``, which rise."""
        if len(rows) == len(self):
            return self
        numbers = np.full(len(self), -1)
        numbers[rows] = np.arange(len(rows))
        runs = []
        for run in self.runs:
            owner = numbers[run.owner]
            part = run.take(owner >= 0)
            runs.append(Run(numbers[part.owner], part.number, part.columns))
        waiting = self.waiting.take(numbers[self.waiting.owner] >= 0)
        waiting = replace(waiting, owner=numbers[waiting.owner])
        return State(self.exact_us[rows], self.newest_us[rows], self.seen_us[rows], tuple(runs), waiting)
