"""The temporal join as SQL, written once: DuckDB's dialect, within what sqlglot turns into any other.

Comes in: a ``Scan``. Goes out: queries, each of which but the last fills a table. They read two tables:

    labels       _row, _time, keys                                  one row per label, of int32 _row
    source_rows  _event_time, _known_at, _sequence, keys, features  one row per row of the source, of unique _sequence

Times are int64 microseconds, so nothing here depends on an engine's idea of a timestamp; nothing is added to one but
a delay that the scan has room for, so nothing overflows. No key or feature has a name that starts with an underscore.

A row can be seen from the later of its event time and its known-at on: there it is *available*. What a label at T sees
is the greatest (event time, known-at, sequence) among the rows available by T, and a ttl only tells whether that one
row is too old. Joining on the event time alone would find rows that were not known yet.

1. ``entities``: an int32 for each key of a label, so that rows of other keys are dropped before anything is sorted, and
   what is sorted is small, whatever the keys are.
2. ``latest``: the greatest event time that each label sees: a running maximum over rows and labels together, in the
   order of availability. A frame of RANGE takes in whatever has the same time, so rows at exactly T count. This is the
   only sort of the source, and it carries no feature.
3. ``candidates``: the rows with these event times, nearly always one for each. Here the features are read.
4. ``chosen``: where several rows of one entity have the same event time, in the order of availability they are in the
   order of known-at too, so what a label sees is the last one before it.
5. The answer: the features of the chosen rows.

Each step is linear in its rows but for a sort: neither an entity with all rows nor a million rows with one event time
makes pairs of rows and labels.
"""

from __future__ import annotations

from collections.abc import Iterable

from featserve.offline.scan import Scan
from featserve.types import Bool, Bytes, Float32, Float64, Int32, Int64, String, Timestamp, Type

Steps = dict[str, dict[str, str]]
"""The tables that a query needs, in order, by the step of the work that they are: all but the last of FIND_STEPS."""

MAX_FILE_ROWS = 2**40
SQL_TYPES = {
    Bool: "BOOLEAN",
    Int32: "INTEGER",
    Int64: "BIGINT",
    Float32: "FLOAT",
    Float64: "DOUBLE",
    String: "VARCHAR",
    Bytes: "BLOB",
}


def source_rows(scan: Scan, files: str, microseconds: str) -> str:
    """Return the query of the table ``source_rows``.

    ``files``: what holds the columns of the files, and for each row ``_file`` and ``_position``: the number of its file
    and the row's in it. ``microseconds``: the engine's function from a timestamp to microseconds since 1970.
    """

    def value(column: str, type: Type) -> str:
        if type.vector:
            return quoted(column)
        if type is Timestamp:
            return quoted(column) if scan.int64_times else f"{microseconds}({quoted(column)})"
        return f"CAST({quoted(column)} AS {SQL_TYPES[type]})"

    event_time = value(scan.event_time, Timestamp)
    known_at = f"{event_time} + {scan.delay_us}" if scan.known_at is None else value(scan.known_at, Timestamp)
    columns = ", ".join(f"{value(scan.columns[name], type)} AS {quoted(name)}" for name, type in scan.types.items())
    return f"""
        SELECT {event_time} AS _event_time, {known_at} AS _known_at,
            CAST(_file AS BIGINT) * {MAX_FILE_ROWS} + _position AS _sequence, {columns}
        FROM {files}"""


def find_rows(scan: Scan, last_us: int) -> tuple[Steps, str]:
    """Return the query that finds what each label sees, and before it the tables that it needs.

    ``last_us``: no label is later. The answer has ``_row``, ``_event_time`` and the features, one row for each label
    that sees any.
    """
    keys = scan.keys
    latest = f"""
        SELECT _row, _entity, _time, _event_time FROM (
            SELECT _row, _entity, _time, MAX(_event_time) OVER (PARTITION BY _entity ORDER BY _time
                RANGE BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS _event_time
            FROM (
                SELECT CAST(NULL AS INTEGER) AS _row, _entity, GREATEST(_event_time, _known_at) AS _time, _event_time
                FROM source_rows AS r JOIN entities AS e ON {same_keys(keys, "r", "e")}
                WHERE GREATEST(_event_time, _known_at) <= CAST('{last_us}' AS BIGINT)
                UNION ALL
                SELECT _row, _entity, _time, CAST(NULL AS BIGINT) AS _event_time
                FROM labels AS l JOIN entities AS e ON {same_keys(keys, "l", "e")}
            ) AS u
        ) AS w WHERE _row IS NOT NULL AND _event_time IS NOT NULL"""
    candidates = f"""
        SELECT * FROM source_rows AS r WHERE EXISTS (
            SELECT 1 FROM latest AS l JOIN entities AS e ON l._entity = e._entity
            WHERE {same_keys(keys, "r", "e")} AND r._event_time = l._event_time)"""
    chosen = f"""
        SELECT _row, _sequence FROM (
            SELECT _row, LAST_VALUE(_sequence IGNORE NULLS) OVER (PARTITION BY _entity, _event_time
                ORDER BY _time, _row NULLS FIRST, _known_at, _sequence
                ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS _sequence
            FROM (
                SELECT CAST(NULL AS INTEGER) AS _row, _entity, _event_time,
                    GREATEST(_event_time, _known_at) AS _time, _known_at, _sequence
                FROM candidates AS c JOIN entities AS e ON {same_keys(keys, "c", "e")}
                UNION ALL
                SELECT _row, _entity, _event_time, _time, CAST(NULL AS BIGINT) AS _known_at,
                    CAST(NULL AS BIGINT) AS _sequence
                FROM latest
            ) AS u
        ) AS w WHERE _row IS NOT NULL"""
    answer = f"""
        SELECT a._row, c._event_time, {_list(scan.features, "c.")}
        FROM chosen AS a JOIN candidates AS c ON a._sequence = c._sequence"""
    tables = {"entities": entities(keys), "latest": latest, "candidates": candidates, "chosen": chosen}
    return {table: {table: query} for table, query in tables.items()}, answer


def entities(keys: Iterable[str]) -> str:
    """Return the query of the table ``entities``: ``_entity``, and the keys."""
    names = _list(keys)
    return f"SELECT MIN(_row) AS _entity, {names} FROM labels GROUP BY {names}"


def same_keys(keys: Iterable[str], one: str, other: str) -> str:
    """Return whether two rows have equal keys, all of them there."""
    return " AND ".join(f"{one}.{quoted(key)} = {other}.{quoted(key)}" for key in keys)


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _list(names: Iterable[str], prefix: str = "") -> str:
    return ", ".join(prefix + quoted(name) for name in names)
