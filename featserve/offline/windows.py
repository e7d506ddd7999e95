"""Windows as SQL: a view's aggregates at each label, in DuckDB's dialect, within what sqlglot turns into any other.

Comes in: a ``Scan`` with an ``Aggregation``. Goes out: queries as in ``offline.sql``, of the same two tables. Labels
also have ``_start_0`` and so on: the first event time that each window holds at the label's time.

An event counts for the labels of its entity from T >= available = max(event_time, known_at) on, as long as
start(T) <= event_time. Starts rise with T, so that is a *run* of the entity's labels in the order of T.

- The general way: each run is cut into aligned blocks of 1, 2, 4, ... labels, at most two of a size. The events of each
  block are aggregated into partials, and a label merges those of the blocks that it lies in, at most one of a size.
- The direct way, where an engine has frames whose bounds are columns: events that were known at once, or after the
  source's declared delay, become available in the order of their event times. To these a window is a frame over labels
  and events together; all others go the general way.
- Distinct values: the runs of one value are trimmed until no two overlap, and are then counted.

Nothing makes pairs of labels and events, and nothing is subtracted from a sum, so sums of floats lose no digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from featserve.aggregates import AGGREGATES, DISTINCT_COUNT, Sql
from featserve.definitions import Expression, sql, type_of
from featserve.offline.scan import Aggregation, Scan
from featserve.offline.sql import Steps, entities, quoted, same_keys

MOST_BITS = 31
"""Labels are numbered by int32, so a block of so many bits holds them all."""
FAR_US = 2**61
"""Instants within so much of 1970 can be subtracted from each other; events beyond it go the general way."""

AVAILABLE = "GREATEST(_event_time, _known_at)"
COORDINATES = "_event_time, _known_at, _sequence"


@dataclass(frozen=True, slots=True)
class _Feature:
    """An aggregate: its name and SQL form, the events' column that it is of, its window, and its partials' columns."""

    name: str
    form: Sql
    value: str
    window: int
    partials: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What an aggregation comes down to.

    ``values``: the SQL of each column of the events. ``features``: in order. ``distinct``: those that count values.
    ``calls``: for the others, by window and by column of a partial, the call of an aggregate function that makes it.
    """

    values: Mapping[str, str]
    features: Sequence[_Feature]
    distinct: Sequence[_Feature]
    calls: Mapping[int, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class _Part:
    """A table that has for labels, by ``_row``, the partials ``columns``."""

    table: str
    columns: Iterable[str]


def find_aggregates(scan: Scan, last_us: int, *, frames: bool) -> tuple[Steps, str]:
    """Return the query that finds the aggregates at each label, and before it the tables that it needs.

    ``last_us``: no label is later. ``frames``: whether the bounds of the engine's RANGE frames may be columns. The
    answer has ``_row``, ``_event_time`` (null where no event is in sight) and the features, for each label without a
    null key.
    """
    aggregation = scan.aggregation
    assert aggregation is not None
    plan = _planned(scan, aggregation)
    frames = frames and aggregation.delay_us <= FAR_US
    on_time = _on_time(aggregation.delay_us)
    steps: Steps = {"labels": _labels(scan, plan), "events": {}, "runs": {}, "blocks": {}}
    parts = [_Part("points", ())]
    if aggregation.event_id is not None:
        steps["events"] |= _copies(quoted(aggregation.event_id), scan.keys)
    if frames:
        steps["events"]["framed"] = _framed(plan, _events(scan, plan, last_us, on_time), aggregation.delay_us)
        parts = [_Part("framed", [column for calls in plan.calls.values() for column in calls])]
    steps["runs"]["runs"] = _runs(plan, _events(scan, plan, last_us, f"NOT ({on_time})" if frames else "TRUE"))
    for window, calls in plan.calls.items():
        steps["blocks"] |= _blocks(f"blocks_{window}", "runs", f"_end_{window}", calls)
        parts.append(_in_blocks(f"blocks_{window}", calls))
    if plan.distinct:
        steps["runs"]["value_runs"] = _runs(plan, _events(scan, plan, last_us))
    for f in plan.distinct:
        calls = {column: f.form.partials[name].format(x=f.value) for name, column in f.partials.items()}
        steps["runs"][f"runs_of_{f.name}"] = _trimmed(f)
        steps["blocks"] |= _blocks(f"blocks_of_{f.name}", f"runs_of_{f.name}", "_end", calls)
        parts.append(_in_blocks(f"blocks_of_{f.name}", calls))
    return steps, _answer(plan, parts)


def _planned(scan: Scan, aggregation: Aggregation) -> _Plan:
    values: dict[str, str] = {}
    features: list[_Feature] = []
    distinct: list[_Feature] = []
    by_window: dict[int, dict[str, str]] = {aggregation.earliest: {"_newest": "MAX(_event_time)"}}
    for number, a in enumerate(aggregation.aggregates):
        of = a.of if isinstance(a.of, Expression) else None
        aggregator = AGGREGATES[a.function](None if of is None else type_of(of, scan.types, a.name))
        assert aggregator is not None
        text = "1" if of is None else sql(of, scan.types, _column)
        if a.where is not None:
            text = f"(CASE WHEN {sql(a.where, scan.types, _column)} THEN {text} END)"
        value = _name(values, text, f"_x{number}")
        window = aggregation.windows[a.over]
        calls = {} if a.function == DISTINCT_COUNT else by_window.setdefault(window, {})
        partials = {
            name: _name(calls, call.format(x=value), f"_p{number}_{name}")
            for name, call in aggregator.sql.partials.items()
        }
        features.append(_Feature(a.name, aggregator.sql, value, window, partials))
        if a.function == DISTINCT_COUNT:
            distinct.append(features[-1])
    return _Plan(values, features, distinct, by_window)


def _name(names: dict[str, str], text: str, new: str) -> str:
    """Return the name of ``text``: the one that it has, or else ``new``, which is added."""
    name = next((known for known, other in names.items() if other == text), new)
    names[name] = text
    return name


def _column(name: str) -> str:
    return f"r.{quoted(name)}"


def _big(number: int) -> str:
    return f"CAST('{number}' AS BIGINT)"


def _windows(plan: _Plan) -> list[int]:
    return sorted({*plan.calls, *(f.window for f in plan.distinct)})


def _labels(scan: Scan, plan: _Plan) -> dict[str, str]:
    """Return the tables of the labels: their entities, their ranks, and the sizes of blocks of them."""
    starts = "".join(f", _start_{window}" for window in _windows(plan))
    sizes = ", ".join(f"({_big(2**bit)}, {side})" for bit in range(MOST_BITS) for side in (0, 1))
    return {
        "entities": entities(scan.keys),
        "points": f"""
            SELECT _row, _entity, _time{starts},
                ROW_NUMBER() OVER (PARTITION BY _entity ORDER BY _time, _row) - 1 AS _rank
            FROM labels AS l JOIN entities AS e ON {same_keys(scan.keys, "l", "e")}""",
        "sizes": f"""
            SELECT _size, _side FROM (VALUES {sizes}) AS v(_size, _side)
            WHERE _size <= (SELECT COALESCE(MAX(_rank), 0) + 1 FROM points)""",
    }


def _copies(event_id: str, keys: Iterable[str]) -> dict[str, str]:
    """Return the tables of repeated ids, and of the events with one that did not become available first.

    An event without its entity's key is none of the view, and no copy.
    """
    has_key = " AND ".join(f"r.{quoted(key)} IS NOT NULL" for key in keys)
    return {
        "repeated": f"SELECT {event_id} AS _id FROM source_rows GROUP BY {event_id} HAVING COUNT(*) > 1",
        "copies": f"""
            SELECT _sequence FROM (
                SELECT _sequence, ROW_NUMBER() OVER (PARTITION BY _id ORDER BY {AVAILABLE}, _sequence) AS _place
                FROM source_rows AS r JOIN repeated AS i ON r.{event_id} = i._id
                WHERE {has_key}
            ) AS c WHERE _place > 1""",
    }


def _events(scan: Scan, plan: _Plan, last_us: int, which: str = "TRUE") -> str:
    """Return the query of the events of any label's entity, with the values of the aggregates."""
    aggregation = scan.aggregation
    assert aggregation is not None
    values = "".join(f", {text} AS {name}" for name, text in plan.values.items())
    once = "TRUE"
    if aggregation.event_id is not None:
        once = "NOT EXISTS (SELECT 1 FROM copies AS c WHERE c._sequence = r._sequence)"
    return f"""
        SELECT _entity, {COORDINATES}{values}
        FROM source_rows AS r JOIN entities AS e ON {same_keys(scan.keys, "r", "e")}
        WHERE {AVAILABLE} <= {_big(last_us)} AND {which} AND {once}"""


def _on_time(delay_us: int) -> str:
    """Return whether an event became available ``delay_us`` after its event time, and instants can be subtracted."""
    return (
        f"{AVAILABLE} = LEAST(_event_time, {_big(FAR_US)}) + {_big(delay_us)} "
        f"AND _event_time BETWEEN {_big(-FAR_US)} AND {_big(FAR_US)}"
    )


def _framed(plan: _Plan, events: str, delay_us: int) -> str:
    """Return the partials at each label of events that become available ``delay_us`` after their event times.

    Those that are available at T have event times to T - delay: there a label lies, and looks back to its start.
    """
    names = "".join(f", {name}" for name in plan.values)
    nothing = "".join(f", NULL AS {name}" for name in plan.values)
    zeros = "".join(f", {_big(0)} AS _back_{w}, FALSE AS _open_{w}" for w in plan.calls)
    backs = "".join(
        f", GREATEST(_at - GREATEST(_start_{w}, {_big(-FAR_US)}), 0) AS _back_{w}"
        f", _start_{w} <= _at AND _time >= {_big(-FAR_US)} AS _open_{w}"
        for w in plan.calls
    )
    partials = ", ".join(
        f"CASE WHEN _open_{w} THEN {call} OVER _frame_{w} END AS {column}"
        for w, calls in plan.calls.items()
        for column, call in calls.items()
    )
    frames = ", ".join(
        f"_frame_{w} AS (PARTITION BY _entity ORDER BY _at RANGE BETWEEN _back_{w} PRECEDING AND CURRENT ROW)"
        for w in plan.calls
    )
    return f"""
        SELECT * FROM (
            SELECT _row, {partials} FROM (
                SELECT CAST(NULL AS INTEGER) AS _row, _entity, {COORDINATES}, _event_time AS _at{zeros}{names}
                FROM ({events}) AS e
                UNION ALL
                SELECT _row, _entity, NULL, NULL, NULL, _at{backs}{nothing} FROM (
                    SELECT *, LEAST(GREATEST(_time, {_big(-FAR_US)}) - {_big(delay_us)}, {_big(FAR_US)}) AS _at
                    FROM points
                ) AS p
            ) AS u WINDOW {frames}
        ) AS w WHERE _row IS NOT NULL"""


def _runs(plan: _Plan, events: str) -> str:
    """Return the run of each event: for each window the labels from rank ``_first`` to before ``_end_...``."""
    windows = _windows(plan)
    names = "".join(f", {name}" for name in plan.values)
    nothing = "".join(f", NULL AS {name}" for name in plan.values)
    starts = "".join(f", _start_{w}" for w in windows)
    ends = "".join(f", {_counted(f'_start_{w}', 'LAST')} AS _end_{w}" for w in windows)
    return f"""
        SELECT * FROM (
            SELECT _row, _entity, {COORDINATES}{names}, {_counted("_time", "FIRST")} AS _first{ends} FROM (
                SELECT CAST(NULL AS INTEGER) AS _row, _entity, {COORDINATES}{names}, {AVAILABLE} AS _time{
        "".join(f", _event_time AS _start_{w}" for w in windows)
    }
                FROM ({events}) AS e
                UNION ALL
                SELECT _row, _entity, NULL, NULL, NULL{nothing}, _time{starts} FROM points
            ) AS u
        ) AS w WHERE _row IS NULL"""


def _counted(instant: str, events: str) -> str:
    """Return how many labels are before an event in order of ``instant``; at the same one events are FIRST or LAST."""
    return (
        f"COUNT(_row) OVER (PARTITION BY _entity ORDER BY {instant}, _row NULLS {events} "
        "ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)"
    )


def _trimmed(f: _Feature) -> str:
    """Return runs in which each label that sees a value of ``f`` sees it once."""
    return f"""
        SELECT * FROM (
            SELECT _entity, {f.value}, _end_{f.window} AS _end,
                GREATEST(_first, COALESCE(MAX(_end_{f.window}) OVER (PARTITION BY _entity, {f.value}
                    ORDER BY _first, _sequence ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)) AS _first
            FROM value_runs WHERE {f.value} IS NOT NULL AND _first < _end_{f.window}
        ) AS t WHERE _first < _end"""


def _blocks(name: str, runs: str, end: str, calls: Mapping[str, str]) -> dict[str, str]:
    """Return the table of the partials of blocks that runs are cut into, and that of the labels in such blocks.

    From the small to the large, a run gives its first block if that is the second of a pair, and its last if that is
    the first of one. What is left is a run of blocks twice as large. The second table is one of its own so that no
    engine joins labels and blocks by their entity alone.
    """
    first, stop = "((r._first + s._size - 1) // s._size)", f"(r.{end} // s._size)"
    partials = "".join(f", {call} AS {column}" for column, call in calls.items())
    return {
        name: f"""
        SELECT _entity, _size, _block{partials} FROM (
            SELECT r.*, _size, CASE WHEN _side = 0 THEN {first} ELSE {stop} - 1 END AS _block
            FROM {runs} AS r JOIN sizes AS s
            ON {first} < {stop} AND (CASE WHEN _side = 0 THEN {first} ELSE {stop} END) % 2 = 1
        ) AS b GROUP BY _entity, _size, _block""",
        f"labels_of_{name}": f"""
        SELECT _row, p._entity, _size, p._rank // _size AS _block
        FROM points AS p JOIN (SELECT DISTINCT _entity, _size FROM {name}) AS s ON p._entity = s._entity""",
    }


def _in_blocks(blocks: str, columns: Iterable[str]) -> _Part:
    """Return the partials of the blocks that each label lies in."""
    return _Part(
        f"""(
            SELECT _row{"".join(f", {column}" for column in columns)} FROM labels_of_{blocks} AS p
            JOIN {blocks} AS b ON b._entity = p._entity AND b._size = p._size AND b._block = p._block)""",
        columns,
    )


def _answer(plan: _Plan, parts: Sequence[_Part]) -> str:
    """Return the query that merges the partials of each label, and makes the features of them."""
    columns = [column for calls in plan.calls.values() for column in calls]
    columns += [column for f in plan.distinct for column in f.partials.values()]
    union = " UNION ALL ".join(
        "SELECT _row"
        + "".join(f", {column}" if column in part.columns else f", NULL AS {column}" for column in columns)
        + f" FROM {part.table} AS t{number}"
        for number, part in enumerate(parts)
    )
    centers, features = "", ""
    for number, f in enumerate(plan.features):
        if f.form.center:
            centers += f", {f.form.center.format(**f.partials, group='(PARTITION BY _row)')} AS _c{number}"
        merged = {name: call.format(**f.partials, center=f"_c{number}") for name, call in f.form.merge.items()}
        features += f", {f.form.finalize.format(**merged)} AS {quoted(f.name)}"
    return f"""
        SELECT _row, MAX(_newest) AS _event_time{features} FROM (SELECT *{centers} FROM ({union}) AS u) AS m
        GROUP BY _row"""
