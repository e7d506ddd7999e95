"""Folding events into what is kept of a view's entities, and uniting two such states, for many entities at once.

Comes in: states and events of ``series``. Goes out: states. Nothing is done for one entity, event or bucket on its own.
Reads no clock: ``now_us`` says which events are visible.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featserve.aggregates import Aggregator, Order
from featserve.batch import Int64s
from featserve.definitions import Rolling
from featserve.series import MAX_WAITING, Events, Layout, Measure, Run, Series, State
from featserve.types import Array, Mask
from featserve.windows import first_periods, periods

Columns = Sequence[Array]
FILLED = 16
"""Buckets that have structs in any case, from the first of an entity to the last, where that is so few."""


@np.errstate(all="ignore")  # sums may overflow, and infinities cancel out
def fold(layout: Layout, state: State, events: Events, now_us: int) -> State:
    """Return the state with ``events``, and those that were waiting, as of ``now_us``."""
    if len(state.waiting):
        events = state.waiting.and_those_of(events)
    visible = np.maximum(events.event_time_us, events.known_at_us) <= now_us
    waiting = Events.none(layout) if visible.all() else events.take(~visible)
    if len(waiting):
        events = events.take(visible)
    newest, exact = state.newest_us.copy(), state.exact_us.copy()
    seen = state.seen_us.copy()
    np.maximum.at(seen, events.owner, events.event_time_us)
    events = events.take(reached(layout, seen, events.owner, events.event_time_us))
    np.maximum.at(newest, events.owner, events.event_time_us)
    np.maximum.at(exact, events.owner, np.maximum(events.event_time_us, events.known_at_us))
    firsts = _firsts(layout, newest)  # what was seen beyond that may go with the next load
    runs = []
    for series, first, run in zip(layout.series, firsts, state.runs, strict=True):
        numbers = periods(series.longest, events.event_time_us)
        kept = numbers >= first[events.owner]
        come = _run_of(series, events.take(kept), numbers[kept])
        runs.append(_trimmed(_united(series, run, come), first))
    waiting = waiting.take(reached(layout, seen, waiting.owner, waiting.event_time_us))
    return State(exact, newest, seen, tuple(runs), _in_order(waiting))


def settled(layout: Layout, state: State, now_us: int) -> State:
    """Return the state with those events folded that were waiting, and are visible now."""
    return fold(layout, state, Events.none(layout), now_us) if len(state.waiting) else state


@np.errstate(all="ignore")
def unite(layout: Layout, one: State, other: State) -> State:
    """Return the state of the events of both."""
    newest = np.maximum(one.newest_us, other.newest_us)
    runs = [
        _trimmed(_united(series, a, b), first)
        for series, a, b, first in zip(layout.series, one.runs, other.runs, _firsts(layout, newest), strict=True)
    ]
    waiting = one.waiting.and_those_of(other.waiting)
    waiting = _in_order(waiting.take(reached(layout, newest, waiting.owner, waiting.event_time_us)))
    return State(np.maximum(one.exact_us, other.exact_us), newest, newest, tuple(runs), waiting)


def reached(layout: Layout, newest_us: Int64s, owner: Int64s, event_time_us: Int64s) -> Mask:
    """Return which events a window holds, or may hold, at or after the newest event of their entity."""
    held = np.zeros(len(owner), np.bool_)
    if not len(owner):
        return held
    for series, first in zip(layout.series, _firsts(layout, newest_us), strict=True):
        held |= periods(series.longest, event_time_us) >= first[owner]
    return held


def beyond(layout: Layout, state: State) -> tuple[str, int] | None:
    """Return what is over a bound, in words, and the number of its entity; None where nothing is.

    An event that waits counts, as it cannot be refused later.
    """
    waiting = np.bincount(state.waiting.owner, minlength=len(state))
    if (waiting > MAX_WAITING).any():
        entity = int(np.argmax(waiting))
        return f"{waiting[entity]:,} events of it would wait to become visible; the most is {MAX_WAITING:,}", entity
    for bound in layout.bounds:
        series, run = layout.series[bound.series], state.runs[bound.series]
        sizes = np.bincount(run.owner, minlength=len(state))
        before = run.number < first_periods(bound.window, state.newest_us)[run.owner]
        held = sizes - np.bincount(run.owner[before], minlength=len(state))
        what = "distinct values"
        if series.distinct is None:
            counts = np.append(run.columns[series.operands.index(0)], 0)
            held = np.where(held > 0, counts[np.cumsum(sizes) - held], 0)
            what = "events"
        if (held + waiting > bound.most).any():
            entity = int(np.argmax(held + waiting))
            return (
                f"feature {bound.feature!r} ({bound.window}) would hold {held[entity] + waiting[entity]:,} {what} of "
                f"it; the most is {bound.remedy} = {bound.most:,}. Declare more in a new version of the view",
                entity,
            )
    return None


def _firsts(layout: Layout, newest_us: Int64s) -> list[Int64s]:
    """Return for each series the first bucket that a read at or after the newest event needs, by entity."""
    return [first_periods(series.longest, newest_us) for series in layout.series]


def _in_order(waiting: Events) -> Events:
    """Return events in the order of their owners."""
    return waiting if len(waiting) < 2 else waiting.take(np.argsort(waiting.owner, kind="stable"))


def _trimmed(run: Run, first: Int64s) -> Run:
    kept = run.number >= first[run.owner]
    return run if kept.all() else run.take(kept)


def _run_of(series: Series, events: Events, numbers: Int64s) -> Run:
    """Return the run of events that lie in the buckets ``numbers``."""
    if series.distinct is not None:
        taken = events.taken[:, series.distinct]
        values = events.values[series.distinct]
        assert values is not None
        order = _order(events)
        prepared = series.measures[0].aggregator.prepare(values, order)
        return _latest(Run(events.owner[taken], numbers[taken], (prepared[0][taken],)))
    rows = np.lexsort((numbers, events.owner))
    events, numbers = events.take(rows), numbers[rows]
    new = np.ones(len(rows), np.bool_)
    new[1:] = (numbers[1:] != numbers[:-1]) | (events.owner[1:] != events.owner[:-1])
    starts = np.flatnonzero(new)
    if not len(starts):
        return Run(events.owner, numbers, tuple(np.zeros(0, d) for d in series.dtypes))
    group = np.cumsum(new) - 1
    columns: list[Array] = [
        np.add.reduceat(events.taken[:, operand].astype(np.int64), starts) for operand in series.operands
    ]
    for measure in series.measures:
        columns += _grouped(measure, events, group, len(starts))
    return _accumulated(series, Run(events.owner[starts], numbers[starts], tuple(columns)))


def _grouped(measure: Measure, events: Events, group: Int64s, groups: int) -> list[Array]:
    """Return the partials of an aggregate for each group of events; zeros where it takes none."""
    taken = np.flatnonzero(events.taken[:, measure.operand])
    columns = [np.zeros(groups, d) for d in measure.aggregator.dtypes]
    if not len(taken):
        return columns
    of = group[taken]
    starts = np.flatnonzero(np.append(True, of[1:] != of[:-1]))
    values = events.values[measure.operand]
    assert values is not None
    order = Order(events.event_time_us[taken], events.known_at_us[taken], events.sequence[taken])
    parts = measure.aggregator.merge(measure.aggregator.prepare(values[taken], order), starts)
    for column, part in zip(columns, parts, strict=True):
        column[of[starts]] = part
    return columns


def _order(events: Events) -> Order:
    return Order(events.event_time_us, events.known_at_us, events.sequence)


def _accumulated(series: Series, run: Run) -> Run:
    """Return a run of buckets on their own as one of buckets with all later ones of their entity.

    Each struct takes in the one 1, 2, 4, 8 and so on places behind it, which by then stand for as many buckets.
    """
    columns = [column.copy() for column in run.columns]
    step = 1
    while len(rows := np.flatnonzero(run.owner[:-step] == run.owner[step:])):
        both = merged(series, [c[rows] for c in columns], [c[rows + step] for c in columns])
        for column, new in zip(columns, both, strict=True):
            column[rows] = new
        step *= 2
    return Run(run.owner, run.number, tuple(columns))


def merged(series: Series, one: Columns, other: Columns) -> list[Array]:
    """Return the columns of n structs that stand for the events of two each."""
    counted = len(series.operands)
    columns: list[Array] = [a + b for a, b in zip(one[:counted], other[:counted], strict=True)]
    for measure in series.measures:
        sides = ([side[part] for part in measure.parts] for side in (one, other))
        columns += joined(measure.aggregator, one[measure.count] > 0, other[measure.count] > 0, *sides)
    return columns


def joined(aggregator: Aggregator, mine: Mask, theirs: Mask, a: Columns, b: Columns) -> list[Array]:
    """Return the partials of n pairs of groups, ``a`` and ``b``, where they are ``mine`` and ``theirs``."""
    both = mine & theirs
    parts = [np.where(mine, x, y) for x, y in zip(a, b, strict=True)]
    if aggregator.ufunc is not None:
        for part, x, y in zip(parts, a, b, strict=True):
            aggregator.ufunc(x, y, out=part, where=both)
    elif len(rows := np.flatnonzero(both)):
        pairs = tuple(np.stack([x[rows], y[rows]], axis=1).ravel() for x, y in zip(a, b, strict=True))
        for part, new in zip(parts, aggregator.merge(pairs, np.arange(0, 2 * len(rows), 2)), strict=True):
            part[rows] = new
    return parts


def _united(series: Series, one: Run, other: Run) -> Run:
    """Return the run of the events of both."""
    if not len(one.owner) or not len(other.owner):
        return one if len(one.owner) else other
    if series.distinct is not None:
        owner, number = np.concatenate([one.owner, other.owner]), np.concatenate([one.number, other.number])
        return _latest(Run(owner, number, (np.concatenate([one.columns[0], other.columns[0]]),)))
    mine, theirs = _ranks(one, other)
    at = np.searchsorted(mine, theirs)
    new = mine.take(at, mode="clip") != theirs
    here = at[new]
    owner = np.insert(one.owner, here, other.owner[new])
    number = np.insert(one.number, here, other.number[new])
    # For each bucket the struct of it or of the next later one, in both runs: they may be another entity's.
    a = np.insert(np.arange(len(mine)), here, here)
    marks = np.zeros(len(owner), np.int64)
    marks[at + np.cumsum(new) - new] = 1
    b = np.cumsum(marks) - marks
    a_is_ours = (a < len(mine)) & (one.owner.take(a, mode="clip") == owner)
    rows = np.flatnonzero((b < len(theirs)) & (other.owner.take(b, mode="clip") == owner))
    columns = [column.take(a, mode="clip") for column in one.columns]
    for column in columns[: len(series.operands)]:
        column[~a_is_ours] = 0
    both = merged(series, [c[rows] for c in columns], [c[b[rows]] for c in other.columns])
    for column, part in zip(columns, both, strict=True):
        column[rows] = part
    return Run(owner, number, tuple(columns))


def _ranks(one: Run, other: Run) -> tuple[Int64s, Int64s]:
    """Return numbers that compare as the pairs of owner and bucket of two runs do."""
    least = int(min(one.number.min(), other.number.min()))
    span = int(max(one.number.max(), other.number.max())) - least + 1
    if span * (int(max(one.owner[-1], other.owner[-1])) + 1) < 2**62:
        return one.owner * span + (one.number - least), other.owner * span + (other.number - least)
    distinct, ranks = np.unique(np.concatenate([one.number, other.number]), return_inverse=True)
    mine, theirs = np.split(ranks, [len(one.number)])
    return one.owner * len(distinct) + mine, other.owner * len(distinct) + theirs


def filled(series: Series, run: Run) -> Run:
    """Return a run with structs for buckets that no event is in, where those make it at most twice as long.

    What stands for such a bucket and all later ones is the struct of the next one. A read finds its first bucket by
    counting where every bucket has a struct.
    """
    if not len(run.owner) or series.distinct is not None or isinstance(series.longest, Rolling):
        return run
    starts = np.flatnonzero(np.append(True, run.owner[1:] != run.owner[:-1]))
    sizes = np.diff(starts, append=len(run.owner))
    span = run.number[starts + sizes - 1] - run.number[starts] + 1
    repeats = np.diff(run.number, prepend=0)
    repeats[starts] = 1
    repeats[np.repeat(span > np.maximum(2 * sizes, FILLED), sizes)] = 1
    rows = np.repeat(np.arange(len(repeats)), repeats)
    before = np.cumsum(repeats)[rows] - 1 - np.arange(len(rows))
    return Run(run.owner[rows], run.number[rows] - before, tuple(c[rows] for c in run.columns))


def _latest(run: Run) -> Run:
    """Return each value of an entity once, in its newest bucket."""
    rows = np.lexsort((run.number, run.columns[0], run.owner))
    owner, value = run.owner[rows], run.columns[0][rows]
    rows = rows[np.append((owner[1:] != owner[:-1]) | (value[1:] != value[:-1]), True)] if len(rows) else rows
    return run.take(rows[np.lexsort((run.number[rows], run.owner[rows]))])
