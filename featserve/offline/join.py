"""The temporal join: for each label the value of every feature as it could have been known at the label's own time.

Comes in: an engine, labels as typed Arrow columns with their times, and features of views. Goes out: for each view its
features in the labels' order, with the reason for what is missing. Engines only find rows; everything else that decides
an answer is here, once. Knows no service, no default and no transform.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featserve.arrow import arrow_type
from featserve.definitions import FeatureView, Selection, Window, micros
from featserve.errors import TooLarge
from featserve.matrix import Status
from featserve.offline import FIND_STEPS, OfflineEngine, Progress
from featserve.offline.scan import Aggregation, Scan, open_scan
from featserve.types import NEVER_US, Timestamp, Type
from featserve.windows import starts

Int64s = npt.NDArray[np.int64]

Starts = dict[tuple[Window, ...], int]
"""The numbers of the labels' columns that say where windows start, or the earliest of several does."""

MAX_LABELS = 2**31 - 1
CHUNK_ROWS = 131_072
"""Rows of a chunk of the answer: Arrow's strings hold 2 GiB a chunk."""


@dataclass(frozen=True, slots=True, eq=False)
class JoinedView:
    """What n labels see of one view.

    ``columns``: a pyarrow ChunkedArray of n values by feature name, of ``arrow_type``; null where the value is, and
    where the status is not PRESENT. ``status``: uint8 of shape (n,), ``Status`` PRESENT, NOT_FOUND or EXPIRED.
    ``event_time_us``: int64 of shape (n,), the event time of the row, also of an expired one; NEVER_US where the status
    is NOT_FOUND.
    """

    view: FeatureView
    columns: dict[str, Any]
    status: npt.NDArray[np.uint8]
    event_time_us: Int64s


def join(
    engine: OfflineEngine,
    keys: Any,
    time_us: Int64s,
    selections: Iterable[Selection],
    *,
    root: Path,
    temp_folder: Path | None = None,
    progress: Progress | None = None,
) -> Generator[JoinedView, None, None]:
    """Yield what the labels see of each distinct view of ``selections``, in order of first use.

    ``keys``: a pyarrow Table of n rows with every key column of the views, of its ``arrow_type``; a label with a null
    in a view's keys sees nothing of it. ``time_us``: int64 of shape (n,). ``root``: the folder that source paths are
    relative to. ``temp_folder``: where temporary files go; the system's place for them if None. One view is joined at a
    time, so memory is for the widest of them, not for all. Raises SourceError, TooLarge; the first before any join.
    """
    chosen: dict[str, tuple[FeatureView, dict[str, None]]] = {}
    for selection in selections:
        chosen.setdefault(selection.view.id, (selection.view, {}))[1].update(dict.fromkeys(selection.names))
    steps = _Steps(progress, (1 + FIND_STEPS) * len(chosen))
    windows: Starts = {}
    with tempfile.TemporaryDirectory(prefix="featserve-", dir=temp_folder) as name:
        folder = Path(name)
        scans = []
        for view, names in chosen.values():
            steps.begin(f"{view.id}: source")
            if view.events is None:
                scans.append(open_scan(view.rows, names, root, folder))
            else:
                scans.append(_open_aggregation(view, names, windows, root, folder))
        found = engine.find(_labels(keys, time_us, windows), scans, folder, steps.begin)
        for view, names in chosen.values():
            yield _joined(view, names, next(found), time_us)
    steps.end()


def _open_aggregation(view: FeatureView, names: Collection[str], windows: Starts, root: Path, folder: Path) -> Scan:
    """Return the scan of the events of ``view`` for its aggregates ``names``; adds their windows to ``windows``."""
    assert view.events is not None
    aggregates = tuple(a for a in view.aggregates if a.name in names)
    all_windows = tuple(dict.fromkeys(a.over for a in view.aggregates))
    read = {*view.entity.keys, *(name for a in aggregates for name in a.columns)}
    if view.events.event_id is not None:
        read.add(view.events.event_id)
    scan = open_scan(view.rows, sorted(read), root, folder)
    aggregation = Aggregation(
        aggregates,
        windows={a.over: windows.setdefault((a.over,), len(windows)) for a in aggregates},
        earliest=windows.setdefault(all_windows, len(windows)),
        event_id=view.events.event_id,
        delay_us=0 if view.events.source is None else micros("delay", view.events.source.delay, zero=True),
    )
    features = {name: type for name, type in scan.features.items() if name not in view.entity.keys}
    return replace(scan, keys=view.entity.keys, features=features, aggregation=aggregation)


class _Steps:
    """Counts the steps for a ``Progress``."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def begin(self, what: str) -> None:
        if self._progress is not None:
            self._progress(what, self._done, self._total)
        self._done += 1

    def end(self) -> None:
        if self._progress is not None:
            self._progress("joined", self._total, self._total)


def _labels(keys: Any, time_us: Int64s, windows: Starts) -> Any:
    """Return the labels as engines take them; times among the keys are int64, as in the rows."""
    if len(time_us) > MAX_LABELS:
        raise TooLarge(f"{len(time_us):,} labels; the most that are joined at once is {MAX_LABELS:,}")
    columns = {"_row": pa.array(np.arange(len(time_us), dtype=np.int32)), "_time": pa.array(time_us)}
    for name in keys.column_names:
        column = keys.column(name)
        columns[name] = column.cast(pa.int64()) if column.type == arrow_type(Timestamp) else column
    for some, number in windows.items():
        columns[f"_start_{number}"] = pa.array(np.minimum.reduce([starts(window, time_us) for window in some]))
    return pa.table(columns)


def _joined(view: FeatureView, names: Iterable[str], found: Any, time_us: Int64s) -> JoinedView:
    """Put the rows that were found, in any order, where their labels are."""
    rows = found.column("_row").to_numpy()
    position = np.full(len(time_us), -1)
    position[rows] = np.arange(len(rows))
    missing = position < 0
    assert len(rows) == len(missing) - np.count_nonzero(missing), "an engine found two rows for one label"
    event_time_us = np.full(len(time_us), NEVER_US)
    event_time_us[rows] = found.column("_event_time").fill_null(NEVER_US).to_numpy()
    expired = ~missing & _older(event_time_us, time_us, view.ttl_us)
    status = np.select(
        [missing, expired], [np.uint8(Status.NOT_FOUND), np.uint8(Status.EXPIRED)], np.uint8(Status.PRESENT)
    )
    indices = pa.array(position, mask=missing | expired)
    columns = {name: _take(found.column(name), indices, view.feature(name).type) for name in names}
    return JoinedView(view, columns, status, event_time_us)


def _older(event_time_us: Int64s, time_us: Int64s, ttl_us: int | None) -> npt.NDArray[np.bool_]:
    """Return whether each age is over the ttl. As no event is after its label, the age fits 64 bits without a sign."""
    if ttl_us is None:
        return np.zeros(len(time_us), np.bool_)
    age = time_us.view(np.uint64) - event_time_us.view(np.uint64)
    return np.asarray(age > np.uint64(ttl_us))


def _take(column: Any, indices: Any, type: Type) -> Any:
    """Return the values of ``column`` at ``indices``, null where an index is, as chunks of ``arrow_type(type)``."""
    target = arrow_type(type)
    if type.variable:
        column = column.cast(pa.large_string() if pa.types.is_string(target) else pa.large_binary())
    values = column.combine_chunks()
    chunks = (values.take(indices.slice(start, CHUNK_ROWS)) for start in range(0, len(indices), CHUNK_ROWS))
    return pa.chunked_array([_typed(chunk, target) for chunk in chunks], target)


def _typed(chunk: Any, target: Any) -> Any:
    return chunk.view(target) if pa.types.is_timestamp(target) else chunk.cast(target)
