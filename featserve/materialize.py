"""Materialize: a view's batch source into the online store.

Comes in: a view and its project's folder. Every row is read, typed and checked before the first one is visible. Reads
no clock: ``as_of_us`` says which rows count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featserve.batch import EventBatch, Int64s
from featserve.checks import READ_ROWS, checked_batches
from featserve.codec import key_ranks, keys_under
from featserve.definitions import Rows
from featserve.errors import SourceError
from featserve.plan import WritePlan
from featserve.store import Load, OnlineStore
from featserve.types import Array, Column, concat

CHUNK_BYTES = 512 << 20
"""Encoded rows that are held in memory and sorted together."""

BLOCK_ROWS = 1_024
"""Rows that are handed to the store at once: few enough to stay in the processor's cache until they are written."""

Progress = Callable[[int, float], None]
"""Called after each batch with the rows taken so far, and the part of the source that is read, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load did: ``rows_read`` from the source, ``rows_stored`` of them as the newest of their entity."""

    rows_read: int
    rows_stored: int


def visible_batches(
    rows: Rows, root: Path, as_of_us: int, progress: Progress | None = None, *, batch_rows: int = READ_ROWS
) -> Iterator[tuple[int, EventBatch]]:
    """Yield the checked rows of a source that are visible at ``as_of_us``, each batch with the rows read for it.

    Expired rows count: they are served with the status EXPIRED. Raises SourceError that names file, row and column.
    """
    if rows.source is None:
        raise SourceError(f"{rows.id} has no source; its rows are only written online")
    rows_read, part = 0, 0.0

    def note(done: int, total: int) -> None:
        nonlocal part
        part = done / total if total else 1.0

    for batch in checked_batches(rows, root, batch_rows=batch_rows, progress=note):
        visible = (batch.event_time_us <= as_of_us) & (batch.known_at_us <= as_of_us)
        yield len(batch), batch if visible.all() else batch.take(np.nonzero(visible)[0])
        rows_read += len(batch)
        if progress is not None:
            progress(rows_read, part)
    if progress is not None:
        progress(rows_read, 1.0)


def load(store: OnlineStore, plan: WritePlan, root: Path, as_of_us: int, progress: Progress | None = None) -> Loaded:
    """Load a view's source into ``store``: all of it, or nothing where a row is refused or it is interrupted.

    It may be run again, and beside writes: a row never replaces a newer one.
    """
    rows_read = 0
    chunk = _Chunk(plan)
    with store.load() as load:
        for read, batch in visible_batches(plan.view.rows, root, as_of_us, progress, batch_rows=chunk.most_rows):
            rows_read += read
            if not chunk.takes(batch):
                chunk.empty_into(load)
            chunk.add(batch)
        chunk.empty_into(load)
    return Loaded(rows_read, load.stored)


class _Chunk:
    """Encoded rows that wait to be sorted by key, so that the store writes them one after the other.

    Their fixed parts lie in one array, which is used again for the next chunk: memory that was never touched costs more
    than all that is done with it.
    """

    def __init__(self, plan: WritePlan) -> None:
        self._plan = plan
        self._fixed = np.empty(-(-CHUNK_BYTES // plan.codec.width), plan.codec.dtype)
        self._tails: list[Column] = []
        self._keys: list[list[Column]] = []
        self._rows = self._tail_bytes = 0
        self.most_rows = min(READ_ROWS, len(self._fixed))

    def takes(self, batch: EventBatch) -> bool:
        return self._rows + len(batch) <= len(self._fixed) and self._tail_bytes < CHUNK_BYTES

    def add(self, batch: EventBatch) -> None:
        """Encode the rows of ``batch`` behind those before it."""
        if len(batch) == 0:
            return
        stop = self._rows + len(batch)
        tail = self._plan.codec.pack(batch, self._fixed[self._rows : stop])
        if tail is not None:
            self._tails.append(tail)
            self._tail_bytes += len(tail.values)
        self._keys.append([batch.columns[name] for name in self._plan.view.entity.keys])
        self._rows = stop

    def empty_into(self, load: Load) -> None:
        """Hand the newest row of each entity to ``load``, in the order of their keys."""
        if not self._rows:
            return
        plan, fixed = self._plan, self._fixed[: self._rows]
        keys = [concat(parts) for parts in zip(*self._keys, strict=True)]
        tail = concat(self._tails) if self._tails else None
        newest = newest_rows(key_ranks(keys), fixed["words"][:, 1:4])
        for start in range(0, len(newest), BLOCK_ROWS):
            block = newest[start : start + BLOCK_ROWS]
            rows = plan.codec.join(fixed.take(block), None if tail is None else tail.take(block))
            load.add(keys_under([col.take(block) for col in keys])(plan.prefix), rows)
        self._tails, self._keys = [], []
        self._rows = self._tail_bytes = 0


def newest_rows(ranks: Array, stamps: Array) -> Int64s:
    """Return the position of the row with the greatest stamp for each rank, int64 of shape (entities,), by rank.

    ``ranks``: shape (n,). ``stamps``: shape (n, 3), compared from the first column on; of equal ones the last counts.
    """
    order: Int64s = np.argsort(ranks, kind="stable")
    ordered = ranks[order]
    last = np.append(ordered[1:] != ordered[:-1], True)
    if not last.all():
        order = np.lexsort((*stamps.T[::-1].astype(np.uint64), ranks))[last]
    return order
