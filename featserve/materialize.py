"""Materialize: a view's batch source into the online store.

Comes in: a view and its project's folder. Every row is read, typed and checked before the first one is visible. Reads
no clock: ``as_of_us`` says which rows count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featserve.batch import EventBatch
from featserve.checks import check_rows
from featserve.definitions import FeatureView
from featserve.engine import encode_rows
from featserve.errors import InvalidRequest, SourceError
from featserve.plan import WritePlan
from featserve.sources import read_batches
from featserve.store import OnlineStore

CHUNK_BYTES = 512 << 20
"""Encoded rows held in memory before they are staged."""

Progress = Callable[[int, float], None]
"""Called after each batch with the rows taken so far, and the part of the source that is read, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load did: ``rows_read`` from the source, ``rows_stored`` of them as the newest of their entity."""

    rows_read: int
    rows_stored: int


def visible_batches(
    view: FeatureView, root: Path, as_of_us: int, progress: Progress | None = None
) -> Iterator[tuple[int, EventBatch]]:
    """Yield the checked rows of a view's source that are visible at ``as_of_us``, each batch with the rows read for it.

    Expired rows count: they are served with the status EXPIRED. Raises SourceError that names file, row and column.
    """
    if view.source is None:
        raise SourceError(f"feature view {view.id} has no source; its rows are only written online")
    rows, part = 0, 0.0

    def note(done: int, total: int) -> None:
        nonlocal part
        part = done / total if total else 1.0

    for batch in read_batches(view, root, progress=note):
        try:
            check_rows(view, batch, first_row=rows)
        except InvalidRequest as error:
            raise SourceError(f"{view.source.path}: {error}", violations=error.violations) from None
        visible = (batch.event_time_us <= as_of_us) & (batch.known_at_us <= as_of_us)
        yield len(batch), batch if visible.all() else batch.take(np.nonzero(visible)[0])
        rows += len(batch)
        if progress is not None:
            progress(rows, part)
    if progress is not None:
        progress(rows, 1.0)


def load(store: OnlineStore, plan: WritePlan, root: Path, as_of_us: int, progress: Progress | None = None) -> Loaded:
    """Load a view's source into ``store``: all of it, or nothing where a row is refused or it is interrupted.

    It may be run again, and beside writes: a row never replaces a newer one.
    """
    rows_read = 0
    keys: list[bytes] = []
    rows: list[bytes] = []
    size = 0
    with store.load() as load:
        for read, batch in visible_batches(plan.view, root, as_of_us, progress):
            rows_read += read
            more_keys, more_rows = encode_rows(plan, batch)
            keys += more_keys
            rows += more_rows
            size += sum(map(len, more_rows))
            if size >= CHUNK_BYTES:
                load.add(keys, rows)
                keys, rows, size = [], [], 0
        load.add(keys, rows)
    return Loaded(rows_read, load.stored)
