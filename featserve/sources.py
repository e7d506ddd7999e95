"""Reading batch sources, of feature views and of events: Parquet and CSV files in, event batches out, in source order.

The one reader of ``materialize`` and of the training path, so both see the same rows with the same times. Every row
is exactly as declared or is an error that names the file, the column and the row (its position in the file, from 0).
Knows no store, no registry and no clock.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from featserve.arrow import arrow_type, column_from_arrow, first_refused
from featserve.batch import EventBatch, Int64s
from featserve.definitions import Rows, Source
from featserve.definitions.rules import micros
from featserve.errors import InvalidRequest, SourceError, hint
from featserve.types import NEVER_US, Column, Float32, Float64, Int32, Int64, String, Timestamp, Type

Progress = Callable[[int, int], None]
"""Called with how much was read and how much there is: rows of Parquet, bytes of CSV."""

UNREADABLE = (pa.ArrowException, OSError, EOFError, zlib.error)
CSV_BLOCK_BYTES = 4 << 20
CSV_CELL = re.compile(r"In CSV column #(\d+): Row #(\d+): CSV conversion error to [^:]+: (.*)", re.DOTALL)
CSV_ROW = re.compile(r"CSV parse error: Row #(\d+): (.*)", re.DOTALL)
ZONED = r"[T ]\d.*(Z|[+-]\d\d(:?\d\d)?)$"
"""A time that ends with a UTC offset; the T keeps the day of a plain date from looking like one."""


def read_batches(
    rows: Rows, root: Path, *, batch_rows: int = 131_072, progress: Progress | None = None
) -> Iterator[EventBatch]:
    """Read the source of ``rows``, with its path relative to ``root``, as batches of at most ``batch_rows`` rows.

    The files of a glob are read in order of their path. ``sequence`` is the row's position over all files. Each file
    is checked for its columns and types before the first row is read. Raises SourceError: no such file, not readable,
    a column that is missing or of another type, a value that does not fit, a null key, event time or known-at.
    """
    source = _source(rows)
    check, read = (_check_parquet, _read_parquet) if source.format == "parquet" else (_check_csv, _read_csv)
    files = source_files(rows, root)
    sizes = [check(path, rows) for path in files]

    def batches() -> Iterator[EventBatch]:
        sequence = before = 0
        for path, size in zip(files, sizes, strict=True):
            row = 0
            for records, done in read(path, rows, batch_rows):
                yield _event_batch(rows, records, path, row, sequence)
                row += records.num_rows
                sequence += records.num_rows
                if progress is not None:
                    progress(before + done, sum(sizes))
            before += size

    return batches()


def source_rows(rows: Rows, root: Path) -> int | None:
    """Return how many rows the source of ``rows`` has, None for CSV, where only reading them all would tell."""
    if _source(rows).format == "csv":
        return None
    return sum(_check_parquet(path, rows) for path in source_files(rows, root))


def source_files(rows: Rows, root: Path) -> list[Path]:
    """Return the files of the source of ``rows``, ordered by path; raises SourceError where there is none.

    As in a shell, a glob matches no file whose name starts with a dot.
    """
    source = _source(rows)
    path = root / source.path
    if path.is_file():
        return [path]
    if path.is_dir():
        raise SourceError(
            f"source of {rows.id}: {path} is a folder; name its files, as in {source.path}/*.{source.format}"
        )
    start = Path(path.anchor) if Path(source.path).is_absolute() else root
    try:
        matches = start.glob(str(path.relative_to(start)))
        files = [f for f in matches if f.is_file() and not f.name.startswith(".")]
    except ValueError as error:
        raise SourceError(f"source of {rows.id}: {source.path}: {error}") from None
    if not files:
        near = hint(path.name, (f.name for f in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise SourceError(f"source of {rows.id}: no file matches {path}{near}")
    return sorted(files, key=Path.as_posix)


def _source(rows: Rows) -> Source:
    if rows.source is None:
        raise SourceError(f"{rows.id} has no source to read: its rows are only written online")
    return rows.source


def _wanted(rows: Rows) -> Iterator[tuple[str, Type]]:
    """Yield each column of the files that the rows have, with a type that it needs it as."""
    source = _source(rows)
    for name, type in (*rows.keys.items(), *((f.name, f.type) for f in rows.features)):
        yield source.column(name), type
    for name in filter(None, (source.event_time, source.known_at)):
        yield name, Timestamp


def _names(rows: Rows) -> list[str]:
    return list(dict(_wanted(rows)))


def _check_names(path: Path, names: list[str], rows: Rows) -> None:
    for name in _names(rows):
        if name not in names:
            raise SourceError(f"{path}: no column {name!r}, which {rows.id} needs{hint(name, names)}")
        if names.count(name) > 1:
            raise SourceError(f"{path}: {names.count(name)} columns named {name!r}, which {rows.id} needs one of")


def _event_batch(rows: Rows, records: Any, path: Path, row: int, sequence: int) -> EventBatch:
    """Return the records that start at ``row`` of the file and at ``sequence`` of the source as an EventBatch."""
    source = _source(rows)

    def read(name: str, type: Type) -> Column:
        return _column(records.column(name), path, name, type, row)

    def required(column: Column, name: str, role: str) -> Column:
        if column.valid is not None:
            at = row + int(np.argmin(column.valid))
            raise SourceError(f"{path}: column {name!r}, row {at}: null; every row has {role}")
        return column

    columns = {}
    for key, type in rows.keys.items():
        columns[key] = required(read(source.column(key), type), source.column(key), f"a value of key {key!r}")
    for feature in rows.features:
        columns[feature.name] = read(source.column(feature.name), feature.type)
    event_time_us = required(read(source.event_time, Timestamp), source.event_time, "an event time").values
    if source.known_at is not None:
        known_at_us = required(read(source.known_at, Timestamp), source.known_at, "a known-at").values
    else:
        known_at_us = _delayed(event_time_us, source, path, row)
    return EventBatch(columns, event_time_us, known_at_us, np.arange(sequence, sequence + len(event_time_us)))


def _column(array: Any, path: Path, name: str, type: Type, row: int) -> Column:
    try:
        return column_from_arrow(type, array, f"{path}: column {name!r}", first_row=row)
    except InvalidRequest as error:
        raise SourceError(str(error)) from None


def _delayed(event_time_us: Int64s, source: Source, path: Path, row: int) -> Int64s:
    delay_us = micros("delay", source.delay, zero=True)
    outside = (event_time_us > 2**63 - 1 - delay_us) | (event_time_us == NEVER_US)
    if outside.any():
        at = int(np.argmax(outside))
        raise SourceError(
            f"{path}: column {source.event_time!r}, row {row + at}: {event_time_us[at]} microseconds since 1970, "
            f"with the delay of {source.delay}, is out of range"
        )
    return event_time_us + delay_us if delay_us else event_time_us


def _check_parquet(path: Path, rows: Rows) -> int:
    """Check the file's columns and their types; return its rows."""
    try:
        with pq.ParquetFile(path) as file:
            schema, count = file.schema_arrow, int(file.metadata.num_rows)
    except UNREADABLE as error:
        raise _unreadable(path, "Parquet", error) from None
    _check_names(path, schema.names, rows)
    for name, type in _wanted(rows):
        _column(pa.nulls(0, schema.field(name).type), path, name, type, 0)
    return count


def _read_parquet(path: Path, rows: Rows, batch_rows: int) -> Iterator[tuple[Any, int]]:
    """Yield record batches, each with the rows read so far."""
    done = 0
    try:
        with pq.ParquetFile(path) as file:
            for records in file.iter_batches(batch_rows, columns=_names(rows), use_threads=True):
                done += records.num_rows
                yield records, done
    except UNREADABLE as error:
        raise _unreadable(path, "Parquet", error) from None


def _check_csv(path: Path, rows: Rows) -> int:
    """Check the file's columns; return its bytes on disk."""
    _csv_types(path, rows)
    try:
        _check_names(path, _csv_header(path, _source(rows)), rows)
        return path.stat().st_size
    except UNREADABLE as error:
        raise _unreadable(path, "CSV", error) from None


def _csv_types(path: Path, rows: Rows) -> dict[str, Any]:
    """Return the Arrow type to parse each column as: the widest that ``_column`` then narrows exactly."""
    types: dict[str, Any] = {}
    for name, type in _wanted(rows):
        if type.vector:
            raise SourceError(
                f"{path}: column {name!r}: CSV holds no {type}; use Parquet, where it is a list of floats"
            )
        parsed = arrow_type({Int32: Int64, Float32: Float64, Timestamp: String}.get(type, type))
        if types.setdefault(name, parsed) != parsed:
            raise SourceError(f"{path}: column {name!r}: read both as {types[name]} and as {parsed} by {rows.id}")
    return types


def _csv_open(raw: BinaryIO, path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw


def _csv_lines(path: Path, source: Source) -> Iterator[list[str]]:
    """Yield the file's lines as the standard library splits them, the header first."""
    with path.open("rb") as raw, io.TextIOWrapper(_csv_open(raw, path), "utf-8-sig", "replace", newline="") as text:
        yield from filter(None, csv.reader(text, delimiter=source.delimiter, strict=True))


def _csv_header(path: Path, source: Source) -> list[str]:
    try:
        header = next(_csv_lines(path, source), None)
    except csv.Error as error:
        raise SourceError(f"{path}: its header line: {error}") from None
    if header is None:
        raise SourceError(f"{path}: is empty; a CSV source has a header line")
    return header


class _CountedStream(io.RawIOBase):
    """A CSV file's bytes for Arrow, which counts the quotes in them and ends them with a line end."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.quotes = 0
        self.ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self.stream.read(size)
        self.quotes += data.count(b'"')
        if len(data) < size and not self.ended:
            self.ended = True
            data += (
                b"\n"  # Arrow refuses a header without one; after a last line it makes an empty line, which is skipped
            )
        return data


def _read_csv(path: Path, rows: Rows, batch_rows: int) -> Iterator[tuple[Any, int]]:
    """Yield record batches with times parsed, each with the bytes read so far. One thread: it alone counts rows."""
    source = _source(rows)
    types = _csv_types(path, rows)
    times = {name for name, type in _wanted(rows) if type is Timestamp}
    row = 0
    try:
        with path.open("rb") as raw:
            stream = _CountedStream(_csv_open(raw, path))
            reader = pa_csv.open_csv(
                pa.PythonFile(stream, mode="r"),
                read_options=pa_csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
                parse_options=pa_csv.ParseOptions(delimiter=source.delimiter, newlines_in_values=True),
                convert_options=pa_csv.ConvertOptions(
                    column_types=types,
                    include_columns=list(types),
                    null_values=list(source.nulls),
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                ),
            )
            for block in reader:
                for start in range(0, block.num_rows, batch_rows):
                    records = block.slice(start, batch_rows)
                    yield _with_times(records, times, path, row), raw.tell()
                    row += records.num_rows
        if stream.quotes % 2:
            _check_quotes(path, source)
    except pa.ArrowInvalid as error:
        raise _csv_error(path, rows, str(error)) from None
    except UNREADABLE as error:
        raise _unreadable(path, "CSV", error) from None


def _with_times(records: Any, times: Iterable[str], path: Path, row: int) -> Any:
    """Return the records with the columns ``times`` parsed from ISO 8601; without an offset they mean UTC."""
    for name in times:
        texts = records.column(name)
        try:
            parsed = parse_times(texts)
        except pa.ArrowInvalid:
            at = first_refused(texts, parse_times)
            raise SourceError(
                f"{path}: column {name!r}, row {row + at}: expected timestamp, got {texts[at].as_py()!r} "
                f"(not an ISO 8601 time of whole microseconds)"
            ) from None
        records = records.set_column(records.schema.get_field_index(name), name, parsed)
    return records


def parse_times(texts: Any) -> Any:
    """Return ISO 8601 texts as UTC instants of microseconds; raises ArrowInvalid for one that is none."""
    zoned = pc.match_substring_regex(texts, ZONED)
    missing = pa.nulls(1, pa.string())[0]
    with_offset = pc.if_else(zoned, texts, missing).cast(pa.timestamp("us", "UTC"))
    without = pc.if_else(zoned, missing, texts).cast(pa.timestamp("us"))
    return pc.coalesce(with_offset, without.cast(pa.timestamp("us", "UTC")))


def _check_quotes(path: Path, source: Source) -> None:
    """Refuse a quoted value that never ends: Arrow would take the rest of the file for it and drop those rows."""
    row = -1  # the header
    limit = csv.field_size_limit(path.stat().st_size * 1_100)  # above all that it can hold, gzip's best included
    try:
        for _ in _csv_lines(path, source):
            row += 1
    except csv.Error as error:
        raise SourceError(f"{path}: row {row}: a quoted value is not closed, or holds a lone quote ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _csv_error(path: Path, rows: Rows, message: str) -> SourceError:
    """Return the error for what Arrow says of a cell or a line; it counts rows from 1, the header included."""
    if match := CSV_CELL.match(message):
        name = _csv_header(path, _source(rows))[int(match[1])]
        got = match[3].removeprefix("invalid value ")
        return SourceError(
            f"{path}: column {name!r}, row {int(match[2]) - 2}: expected {dict(_wanted(rows))[name]}, got {got}"
        )
    if match := CSV_ROW.match(message):
        return SourceError(f"{path}: row {int(match[1]) - 2}: {match[2]}")
    if "straddling" in message:  # more than a block
        _check_quotes(path, _source(rows))
        return SourceError(f"{path}: a row is longer than {CSV_BLOCK_BYTES >> 20} MiB")
    return SourceError(f"{path}: cannot be read as CSV: {message}")


def _unreadable(path: Path, format: str, error: BaseException) -> SourceError:
    return SourceError(f"{path}: cannot be read as {format}, it is damaged, incomplete or something else: {error}")
