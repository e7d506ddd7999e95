"""The aggregates over windows: each stands here once, with its NumPy form and its SQL form.

An aggregate is computed from *partials*: a few numbers that stand for some events and can be merged with the numbers of
others. One event has partials of its own, so there are three moves, alike in both forms:

    prepare   events -> the partials of each
    merge     the partials of groups -> those of each group as a whole
    finalize  partials -> the value

Online, records hold the partials of a hop or a local period each (a rolling window keeps its events); offline, a query
makes, merges and finalizes them. Only events that count come in: where the value is null or ``where`` is not true, an
event is left out before. Strings and bytes come as int64 codes, equal where they are. Adding an aggregate is one entry
in ``AGGREGATES``. Knows no window, no store and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from featserve.types import Array, Float64, Int64, Mask, Timestamp, Type

Partials = tuple[Array, ...]
DType = np.dtype[Any]
INT64, FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)
DISTINCT_COUNT = "distinct_count"
"""The aggregate whose partials are the distinct values themselves, which no fixed number of numbers can stand for."""


@dataclass(frozen=True, slots=True)
class Order:
    """Which of n events is the later one: int64 arrays of shape (n,), compared one after the other."""

    event_time_us: Array
    known_at_us: Array
    sequence: Array


@dataclass(frozen=True, slots=True)
class Sql:
    """The SQL form, in DuckDB's dialect.

    ``partials``: of some events, each by name one call of an aggregate function. ``{x}`` is the value, null where the
    event is left out; ``_event_time``, ``_known_at`` and ``_sequence`` are the event's. ``merge``: calls over partials,
    by their names, of which an empty window has none or null ones. ``center``, where ``merge`` needs it: a value of
    the whole group, a window function over ``{group}``. ``finalize``: the value, of what ``merge`` made, by name.
    """

    partials: Mapping[str, str]
    merge: Mapping[str, str]
    finalize: str
    center: str = ""


@dataclass(frozen=True, slots=True)
class Aggregator:
    """How an aggregate of values of one type is computed.

    ``output``: its type. ``dtypes``: those of its partials. ``prepare``: the partials of n events, arrays of shape
    (n,), from their values of shape (n,) and their order. ``merge``: the partials of groups of consecutive rows, each
    of at least one, that begin at ``starts`` (int64). ``finalize``: values and, where some may be null, which are not;
    both of shape (n,). ``made_of``: the aggregates whose partials, one after the other, are its own; records that keep
    those keep nothing for it. ``ufunc``: what merges two groups, partial by partial, where that is one function.
    """

    output: Type
    dtypes: tuple[DType, ...]
    prepare: Callable[[Array, Order], Partials]
    merge: Callable[[Partials, Array], Partials]
    finalize: Callable[[Partials], tuple[Array, Mask | None]]
    sql: Sql
    made_of: tuple[str, ...] = ()
    ufunc: np.ufunc | None = None


def _is_number(type: Type | None) -> bool:
    if type is None or type.dtype is None or type.vector:
        return False
    return type.dtype.kind in "if" and type is not Timestamp


def _adding(partials: Partials, starts: Array) -> Partials:
    return tuple(np.add.reduceat(p, starts) for p in partials)


def _ones(values: Array) -> Array:
    return np.ones(len(values), np.int64)


def _as_is(partials: Partials) -> tuple[Array, None]:
    return partials[0], None


COUNT_SQL = "COUNT({x})"
MEAN_SQL = "(CAST({s} AS DOUBLE) / NULLIF({n}, 0))"


def _count(type: Type | None) -> Aggregator:
    return Aggregator(
        Int64,
        (INT64,),
        lambda values, order: (_ones(values),),
        _adding,
        _as_is,
        Sql({"n": COUNT_SQL}, {"n": "SUM({n})"}, "CAST(COALESCE({n}, 0) AS BIGINT)"),
    )


# Sums of integers are exact: in two halves, of which no number of events that can be held overflows either.


def _halves(values: Array) -> Partials:
    wide = values.astype(np.int64)
    return wide >> 32, wide & 0xFFFFFFFF


def _whole(high: Array, low: Array) -> tuple[Array, Mask]:
    """Return sums from their halves, and which of them int64 holds."""
    high = high + (low >> 32)
    return (high << 32) + (low & 0xFFFFFFFF), (high >= -(2**31)) & (high < 2**31)


def _rounded(high: Array, low: Array) -> Array:
    """Return sums from their halves as float64, rounded once: low halves may have grown beyond what that holds."""
    return np.asarray((high + (low >> 32)) * 2.0**32 + (low & 0xFFFFFFFF))


def _sum(type: Type | None) -> Aggregator | None:
    if not _is_number(type):
        return None
    assert type is not None
    if type.floating:
        return Aggregator(
            Float64,
            (FLOAT64,),
            lambda values, order: (values.astype(np.float64),),
            _adding,
            _as_is,
            Sql({"s": "SUM(CAST({x} AS DOUBLE))"}, {"s": "SUM({s})"}, "{s}"),
            ufunc=np.add,
        )
    return Aggregator(
        Int64,
        (INT64, INT64),
        lambda values, order: _halves(values),
        _adding,
        lambda partials: _whole(*partials),
        Sql(
            {"s": "SUM(CAST({x} AS DECIMAL(38, 0)))"},
            {"s": "SUM({s})"},
            "(CASE WHEN {s} BETWEEN -9223372036854775808 AND 9223372036854775807 THEN CAST({s} AS BIGINT) END)",
        ),
        ufunc=np.add,
    )


def _mean(type: Type | None) -> Aggregator | None:
    if not _is_number(type):
        return None
    assert type is not None
    if type.floating:
        return Aggregator(
            Float64,
            (INT64, FLOAT64),
            lambda values, order: (_ones(values), values.astype(np.float64)),
            _adding,
            lambda partials: (partials[1] / partials[0], None),
            Sql({"n": COUNT_SQL, "s": "SUM(CAST({x} AS DOUBLE))"}, {"n": "SUM({n})", "s": "SUM({s})"}, MEAN_SQL),
            ("count", "sum"),
        )
    return Aggregator(
        Float64,
        (INT64, INT64, INT64),
        lambda values, order: (_ones(values), *_halves(values)),
        _adding,
        lambda partials: (_rounded(*partials[1:]) / partials[0], None),
        Sql(
            {"n": COUNT_SQL, "s": "SUM(CAST({x} AS DECIMAL(38, 0)))"},
            {"n": "SUM({n})", "s": "SUM({s})"},
            MEAN_SQL,
        ),
        ("count", "sum"),
    )


def _extreme(name: str, merge: np.ufunc) -> Callable[[Type | None], Aggregator | None]:
    def of(type: Type | None) -> Aggregator | None:
        if not _is_number(type) and type is not Timestamp:
            return None
        assert type is not None
        assert type.dtype is not None
        zero = type.dtype.type(0)
        return Aggregator(
            type,
            (type.dtype,),
            lambda values, order: (values + zero,),  # -0.0 is 0.0: which of them is less, engines differ in
            lambda partials, starts: (merge.reduceat(partials[0], starts),),
            _as_is,
            Sql(
                {"v": f"{name.upper()}(CASE WHEN {{x}} = 0 THEN 0 ELSE {{x}} END)"},
                {"v": f"{name.upper()}({{v}})"},
                "{v}",
            ),
            ufunc=merge,
        )

    return of


def _end(last: bool) -> Callable[[Type | None], Aggregator | None]:
    """Return the first or the last in the order of events: their partials are the event that it is."""

    def merge(partials: Partials, starts: Array) -> Partials:
        sizes = np.diff(starts, append=len(partials[0]))
        order = np.lexsort((partials[2], partials[1], partials[0], np.repeat(np.arange(len(starts)), sizes)))
        chosen = order[starts + sizes - 1 if last else starts]
        return tuple(p[chosen] for p in partials)

    def of(type: Type | None) -> Aggregator | None:
        if type is None or type.vector:
            return None
        best, event = "MAX" if last else "MIN", "{{'e': _event_time, 'k': _known_at, 's': _sequence, 'x': {x}}}"
        return Aggregator(
            type,
            (INT64, INT64, INT64, INT64 if type.dtype is None else type.dtype),
            lambda values, order: (order.event_time_us, order.known_at_us, order.sequence, values),
            merge,
            lambda partials: (partials[3], None),
            Sql(
                {"v": f"{best}(CASE WHEN {{x}} IS NOT NULL THEN {event} END)"},
                {"v": f"{best}({{v}})"},
                "({v}).x",
            ),
        )

    return of


def _stddev(type: Type | None) -> Aggregator | None:
    """Of a sample: the square root of the squared deviations' sum by n - 1; null of fewer than two.

    Partials are merged as Chan, Golub and LeVeque do (Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances, 1979), which loses no digits where the mean is large.
    """

    def merge(partials: Partials, starts: Array) -> Partials:
        n, mean, squares = partials
        total = np.add.reduceat(n, starts)
        middle = np.add.reduceat(n * mean, starts) / total
        away = mean - np.repeat(middle, np.diff(starts, append=len(n)))
        return total, middle, np.add.reduceat(squares + n * away * away, starts)

    def finalize(partials: Partials) -> tuple[Array, Mask]:
        n, _, squares = partials
        return np.sqrt(squares / np.maximum(n - 1, 1)), n > 1

    if not _is_number(type):
        return None
    number = "CAST({x} AS DOUBLE)"
    return Aggregator(
        Float64,
        (INT64, FLOAT64, FLOAT64),
        lambda values, order: (_ones(values), values.astype(np.float64), np.zeros(len(values))),
        merge,
        finalize,
        Sql(
            {"n": COUNT_SQL, "mean": f"AVG({number})", "variance": f"VAR_POP({number})"},
            {"n": "SUM({n})", "squares": "SUM({n} * ({variance} + ({mean} - {center}) * ({mean} - {center})))"},
            "(CASE WHEN {n} > 1 THEN SQRT({squares} / ({n} - 1)) END)",
            "(SUM({n} * {mean}) OVER {group} / NULLIF(SUM({n}) OVER {group}, 0))",
        ),
    )


def _distinct_count(type: Type | None) -> Aggregator | None:
    """The partials of some events are their distinct values; what merges them keeps each once."""
    if type is None or type.vector:
        return None
    zero = 0 if type.dtype is None else type.dtype.type(0)
    return Aggregator(
        Int64,
        (INT64 if type.dtype is None else type.dtype,),
        lambda values, order: (values + zero,),
        _adding,
        _as_is,
        Sql({"n": COUNT_SQL}, {"n": "SUM({n})"}, "CAST(COALESCE({n}, 0) AS BIGINT)"),
    )


@dataclass(frozen=True, slots=True)
class Function:
    """An aggregate by its name, of whatever it takes. ``empty``: its value where no event counts."""

    of: Callable[[Type | None], Aggregator | None]
    empty: int | None = None

    def __call__(self, type: Type | None) -> Aggregator | None:
        """Return that of values of a type (None: of events, with no value); None where there is no such one."""
        return self.of(type)


AGGREGATES: Mapping[str, Function] = {
    "count": Function(_count, empty=0),
    "sum": Function(_sum),
    "mean": Function(_mean),
    "min": Function(_extreme("min", np.minimum)),
    "max": Function(_extreme("max", np.maximum)),
    "first": Function(_end(last=False)),
    "last": Function(_end(last=True)),
    "stddev": Function(_stddev),
    DISTINCT_COUNT: Function(_distinct_count, empty=0),
}
