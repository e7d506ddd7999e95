"""What an offline engine reads: Parquet files in which every value it needs is exactly as declared.

Comes in: a feature view and some of its features. Goes out: a ``Scan``. The source's own Parquet files are scanned
where their footers prove that any Parquet reader takes the same rows from them as ``featserve.sources``, the reader
that defines what a source means. All else, CSV and whatever only the values could tell, is read by it once, into a
temporary file. Knows no engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featserve.arrow import arrow_type, column_to_arrow
from featserve.batch import EventBatch
from featserve.definitions import FeatureView
from featserve.sources import read_batches, source_files
from featserve.types import Bool, Bytes, Float32, Float64, Int32, Int64, String, Timestamp, Type

EVENT_TIME, KNOWN_AT = "_event_time", "_known_at"
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
class Scan:
    """The rows of one view's source, in order: by file, then by position in the file.

    ``view``: its name and version. ``source``: what to call the source in an error. ``keys`` and ``features``: types by
    name; ``columns``: the column of each in the files. ``event_time`` and ``known_at``: columns of the files too; where
    ``known_at`` is None it is ``delay_us`` after the event time. ``int64_times``: times in the files are int64
    microseconds, not Parquet timestamps.
    """

    view: str
    source: str
    files: tuple[Path, ...]
    keys: Mapping[str, Type]
    features: Mapping[str, Type]
    columns: Mapping[str, str]
    event_time: str
    known_at: str | None
    delay_us: int
    int64_times: bool

    @property
    def types(self) -> dict[str, Type]:
        return {**self.keys, **self.features}


def open_scan(view: FeatureView, names: Iterable[str], root: Path, folder: Path) -> Scan:
    """Return the scan of the features ``names`` of ``view``.

    ``root``: the folder that the path of the source is relative to. ``folder``: where to put a temporary file. Raises
    SourceError that names the file and the column; see ``sources.read_batches``.
    """
    view = _narrowed(view, names)
    batches = read_batches(view, root)  # checks each file's columns and types, even if no batch is taken
    source = view.source
    assert source is not None
    types = {**view.entity.keys, **{f.name: f.type for f in view.features}}
    scan = Scan(
        view=view.id,
        source=f"source of {view.id}: {root / source.path}",
        files=tuple(source_files(view, root)),
        keys=view.entity.keys,
        features={f.name: f.type for f in view.features},
        columns={name: source.column(name) for name in types},
        event_time=source.event_time,
        known_at=source.known_at,
        delay_us=source.to_dict()["delay_us"],
        int64_times=False,
    )
    if source.format == "parquet" and _is_plain(scan):
        return scan
    file = folder / f"{view.name}.parquet"
    _write(batches, scan, file)
    return replace(
        scan,
        files=(file,),
        columns={name: name for name in types},
        event_time=EVENT_TIME,
        known_at=KNOWN_AT,
        delay_us=0,
        int64_times=True,
    )


def _narrowed(view: FeatureView, names: Iterable[str]) -> FeatureView:
    """Return the view with only the features ``names``, so that nothing else of its files is read."""
    features = tuple(view.feature(name) for name in names)
    source = view.source
    if source is not None:
        kept = {*view.entity.keys, *(f.name for f in features)}
        source = replace(source, columns={name: c for name, c in source.columns.items() if name in kept})
    return replace(view, features=features, source=source)


def _write(batches: Iterable[EventBatch], scan: Scan, file: Path) -> None:
    """Write the batches as one Parquet file with int64 times."""
    fields = {name: pa.int64() if type is Timestamp else arrow_type(type) for name, type in scan.types.items()}
    schema = pa.schema({**fields, EVENT_TIME: pa.int64(), KNOWN_AT: pa.int64()})
    with pq.ParquetWriter(file, schema) as writer:
        for batch in batches:
            arrays = [_int64_times(column_to_arrow(batch.columns[name])) for name in scan.types]
            writer.write(pa.record_batch([*arrays, batch.event_time_us, batch.known_at_us], schema=schema))


def _int64_times(array: Any) -> Any:
    return array.view(pa.int64()) if pa.types.is_timestamp(array.type) else array


def _is_plain(scan: Scan) -> bool:
    """Return whether every engine's own reader takes from the files what ``sources`` takes."""
    schema: dict[str, Any] | None = None
    for path in scan.files:
        with pq.ParquetFile(path) as file:
            names = {name.lower() for name in file.schema_arrow.names}
            if len(names) < len(file.schema_arrow.names) or names & RESERVED or not PLAIN_PATH.fullmatch(str(path)):
                return False
            wanted = {name: file.schema_arrow.field(name).type for name in [*scan.columns.values(), scan.event_time]}
            if schema not in (None, wanted) or not _is_exact(scan, file):
                return False
            schema = wanted
    return True


def _is_exact(scan: Scan, file: Any) -> bool:
    """Return whether types and footer statistics prove every value that is needed exact, and present where it must be.

    Each row has its keys and times, numbers and instants are in the range of their type, and an event time with the
    delay is an instant.
    """
    metadata, types = file.metadata, file.schema_arrow
    needed = [(scan.columns[name], type, name in scan.keys, 0) for name, type in scan.types.items()]
    needed.append((scan.event_time, Timestamp, True, scan.delay_us))
    if scan.known_at is not None:
        needed.append((scan.known_at, Timestamp, True, 0))
    for name, type, required, delay_us in needed:
        given = types.field(name).type
        if not _same_kind(type, given):
            return False
        for statistics in _statistics(metadata, name, type):
            if statistics is None or not statistics.has_null_count:
                return False
            if statistics.null_count and (required or type.vector):
                return False
            if statistics.num_values and not _within(type, given, statistics, delay_us):
                return False
    return True


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
    integer = is_.is_integer(given) and not is_.is_uint64(given)
    return bool(integer or (type.floating and (is_.is_float32(given) or is_.is_float64(given))))


def _statistics(metadata: Any, name: str, type: Type) -> Iterator[Any]:
    """Yield the statistics of column ``name`` of each row group, None where there are none."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    column = next(i for i, path in enumerate(paths) if path == name or (type.vector and path.startswith(f"{name}.")))
    for group in range(metadata.num_row_groups):
        yield metadata.row_group(group).column(column).statistics


def _within(type: Type, given: Any, statistics: Any, delay_us: int) -> bool:
    if type.variable or type is Bool or given == arrow_type(type) != arrow_type(Timestamp):
        return True
    bound = MAX_FLOAT32 if pa.types.is_floating(given) else BOUNDS[type]
    if not statistics.has_min_max:
        return False
    return bool(-bound <= statistics.min_raw and statistics.max_raw <= bound - delay_us)
