"""What an offline engine reads: Parquet files in which every value is exactly as declared, and keeps its constraints.

Comes in: rows and some of their features. Goes out: a ``Scan``. The source's own Parquet files are scanned where their
footers prove that any Parquet reader takes the same rows from them as ``featserve.sources``, the reader that defines
what a source means. All else, CSV and whatever only the values could tell, is read by it once, into a temporary file. A
source that ``materialize`` refuses is refused here in the same words, whichever features are wanted: what the footers
do not prove sound is read and checked. Knows no engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featserve.arrow import arrow_type, column_to_arrow
from featserve.batch import EventBatch
from featserve.checks import checked_batches
from featserve.definitions import Aggregate, Rows, Window
from featserve.errors import SourceError
from featserve.offline.footers import Proof, prove
from featserve.sources import read_batches, source_files
from featserve.types import Timestamp, Type

EVENT_TIME, KNOWN_AT = "_event_time", "_known_at"


@dataclass(frozen=True, slots=True)
class Aggregation:
    """What is made of the rows of a scan where they are events.

    ``windows``: for each window its number, which is that of the labels' column of starts; ``earliest``: the number of
    the one that says where an event is in sight at all. ``event_id``: the feature that names events, if any.
    ``delay_us``: how long after their event times events are known, where nothing else is told of them.
    """

    aggregates: tuple[Aggregate, ...]
    windows: Mapping[Window, int]
    earliest: int
    event_id: str | None
    delay_us: int


@dataclass(frozen=True, slots=True)
class Scan:
    """The rows of one view's source, in order: by file, then by position in the file.

    ``view``: its name and version. ``source``: what to call the source in an error. ``keys`` and ``features``: types by
    name; ``columns``: the column of each in the files. ``event_time`` and ``known_at``: columns of the files too; where
    ``known_at`` is None it is ``delay_us`` after the event time. ``int64_times``: times in the files are int64
    microseconds, not Parquet timestamps. ``aggregation``: None where it is rows that are looked up.
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
    aggregation: Aggregation | None = None

    @property
    def types(self) -> dict[str, Type]:
        return {**self.keys, **self.features}


def open_scan(rows: Rows, names: Iterable[str], root: Path, folder: Path) -> Scan:
    """Return the scan of the features ``names`` of ``rows``.

    ``root``: the folder that the path of the source is relative to. ``folder``: where to put a temporary file. Raises
    the SourceError that loading them would: it names the file or source, the column and the row.
    """
    read_batches(rows, root)  # checks each file's columns and types, even if no batch is taken
    chosen, source = tuple(dict.fromkeys(names)), rows.source
    assert source is not None
    by_name = {f.name: f.type for f in rows.features}
    features = {name: by_name[name] for name in chosen}
    types = {**rows.keys, **features}
    scan = Scan(
        view=rows.id,
        source=f"source of {rows.id}: {root / source.path}",
        files=tuple(source_files(rows, root)),
        keys=rows.keys,
        features=features,
        columns={name: source.column(name) for name in types},
        event_time=source.event_time,
        known_at=source.known_at,
        delay_us=source.to_dict()["delay_us"],
        int64_times=False,
    )
    proof = prove(rows, scan.files) if source.format == "parquet" else Proof()
    doubtful = [f.name for f in rows.features if f.name not in proof.sound]
    if proof.same_rows and proof.same_values.issuperset(chosen):
        if doubtful:
            deque(_checked(rows, doubtful, root), maxlen=0)
        return scan
    file = folder / f"{rows.id}.parquet"
    _write(_checked(rows, [*chosen, *doubtful], root), scan, file)
    return replace(
        scan,
        files=(file,),
        columns={name: name for name in types},
        event_time=EVENT_TIME,
        known_at=KNOWN_AT,
        delay_us=0,
        int64_times=True,
    )


def _checked(rows: Rows, names: Collection[str], root: Path) -> Iterator[EventBatch]:
    """Yield the source's batches with the features ``names``, beside which no other has anything to refuse."""
    try:
        yield from checked_batches(rows.only(names), root)
    except SourceError:
        deque(checked_batches(rows, root), maxlen=0)  # says all that is wrong with a row, as a load does
        raise


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
