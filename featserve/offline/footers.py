"""What the footers of Parquet files prove of their rows, so that nobody has to read them to know it.

Comes in: some rows and their files, whose columns and types were checked. Goes out: a ``Proof``. Only what a
file's schema and the statistics of its row groups show counts as proven. Knows no engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featserve.arrow import arrow_type
from featserve.definitions import Field, Rows
from featserve.definitions.rules import micros
from featserve.types import Bool, Bytes, Float32, Float64, Int32, Int64, String, Timestamp, Type, column

PLAIN_PATH = re.compile(r"[\w\-./=+, ]*/[^\W_][\w\-.=+, ]*")
"""Paths that no reader takes for a pattern, a URI or a hidden file."""
RESERVED = {"file_row_number", "file_index", "_metadata", "_file", "_position"}
"""Columns that engines add to a file's own."""
LAST_US = 2**63 - 2
"""Engines take the instants at the ends of int64 for infinity or out of range; so are they refused beside a delay."""
MAX_FLOAT32 = float(np.finfo(np.float32).max)
BOUNDS = {Int32: 2**31 - 1, Int64: 2**63 - 1, Float32: 2**24, Float64: 2**53, Timestamp: LAST_US}
"""The greatest integer that each type holds exactly."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What is proven of files.

    ``same_rows``: any engine's own reader takes the rows from them that ``featserve.sources`` does, with their keys and
    times. ``same_values``: the features whose values it takes as that does, too. ``sound``: the features with no value
    that ``sources`` or ``checks`` refuses.
    """

    same_rows: bool = False
    same_values: frozenset[str] = frozenset()
    sound: frozenset[str] = frozenset()


def prove(rows: Rows, files: Iterable[Path]) -> Proof:
    """Return what is proven of ``files``, one or more Parquet files, which have the columns of ``rows``."""
    source = rows.source
    assert source is not None
    footers = []
    for path in files:
        with pq.ParquetFile(path) as file:
            footers.append(_Footer(path, file.metadata, file.schema_arrow))
    keys = [(source.column(name), type, 0) for name, type in rows.keys.items()]
    times = [(source.event_time, Timestamp, micros("delay", source.delay, zero=True))]
    if source.known_at is not None:
        times.append((source.known_at, Timestamp, 0))

    def one_type(name: str) -> bool:
        return len({footer.schema.field(name).type for footer in footers}) == 1

    return Proof(
        same_rows=all(footer.is_plain() for footer in footers)
        and all(
            one_type(name) and all(footer.is_exact(name, type, required=True, delay_us=delay_us) for footer in footers)
            for name, type, delay_us in (*keys, *times)
        ),
        same_values=frozenset(
            f.name
            for f in rows.features
            if one_type(source.column(f.name)) and all(g.is_exact(source.column(f.name), f.type) for g in footers)
        ),
        sound=frozenset(f.name for f in rows.features if all(g.keeps(source.column(f.name), f) for g in footers)),
    )


class _Footer:
    """The footer of one file."""

    def __init__(self, path: Path, metadata: Any, schema: Any) -> None:
        self.schema = schema
        self._path = path
        self._groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._leaves = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}

    def is_plain(self) -> bool:
        """Return whether no engine takes the path, or a column's name, for something else."""
        names = {name.lower() for name in self.schema.names}
        distinct = len(names) == len(self.schema.names) and not names & RESERVED
        return distinct and PLAIN_PATH.fullmatch(str(self._path)) is not None

    def is_exact(self, name: str, type: Type, *, required: bool = False, delay_us: int = 0) -> bool:
        """Return whether column ``name`` is proven to hold values of ``type``, and where ``required`` in each row.

        Numbers and instants are in the range of their type, the latter also with ``delay_us`` added.
        """
        given = self.schema.field(name).type
        if not _same_kind(type, given):
            return False
        for statistics in self._statistics(name, type):
            if statistics is None or not statistics.has_null_count:
                return False
            if statistics.null_count and (required or type.vector):
                return False
            if statistics.num_values and not _within(type, given, statistics, delay_us):
                return False
        return True

    def keeps(self, name: str, f: Field) -> bool:
        """Return whether column ``name`` is proven to hold nothing that is refused of feature ``f``."""
        if f.allowed is not None or (f.not_nan and not pa.types.is_integer(self.schema.field(name).type)):
            return False  # statistics tell neither all values nor whether one is NaN
        return self.is_exact(name, f.type, required=f.not_null) and all(
            not statistics.num_values or _within_bounds(f, statistics) for statistics in self._statistics(name, f.type)
        )

    def _statistics(self, name: str, type: Type) -> Iterator[Any]:
        """Yield the statistics of column ``name`` of each row group, None where there are none."""
        leaf = self._leaves.get(name)
        if leaf is None or type.vector:
            leaf = next(i for path, i in self._leaves.items() if path.startswith(f"{name}."))
        for group in self._groups:
            yield group.column(leaf).statistics


def _same_kind(type: Type, given: Any) -> bool:
    """Return whether a column of Arrow type ``given`` holds values of ``type``, if all are in its range."""
    is_ = pa.types
    if type is String:
        return bool(is_.is_string(given) or is_.is_large_string(given))
    if type is Bytes:
        return bool(is_.is_binary(given) or is_.is_large_binary(given))
    if type is Timestamp:
        return bool(is_.is_timestamp(given)) and given.unit == "us"
    if type is Bool or type.vector:
        return bool(given == arrow_type(type))
    # Statistics of an unsigned integer of a Parquet type's full width come as a signed one.
    integer = is_.is_integer(given) and not is_.is_uint32(given) and not is_.is_uint64(given)
    return bool(integer or (type.floating and (is_.is_float32(given) or is_.is_float64(given))))


def _within(type: Type, given: Any, statistics: Any, delay_us: int) -> bool:
    """Return whether the values of a row group are in the range of ``type``."""
    if type.variable or type is Bool or given == arrow_type(type) != arrow_type(Timestamp):
        return True
    bound = MAX_FLOAT32 if pa.types.is_floating(given) else BOUNDS[type]
    if not statistics.has_min_max:
        return False
    return bool(-bound <= statistics.min_raw and statistics.max_raw <= bound - delay_us)


def _within_bounds(f: Field, statistics: Any) -> bool:
    """Return whether the values of a row group are within min and max: as in ``checks``, a NaN is."""
    bounds = [None if bound is None else column(f.type, [bound]).values[0].item() for bound in (f.min, f.max)]
    if bounds == [None, None]:
        return True
    least, most = bounds
    if not statistics.has_min_max:
        return False
    return bool((least is None or least <= statistics.min_raw) and (most is None or statistics.max_raw <= most))
