"""Backfill: the history of a view over events into its records.

Comes in: the plan of a view and its project's folder. The whole history is read, checked and counted before any of it
is visible, and takes the place of what was loaded before. What was pushed stays, and counts once where the history has
it, too. Reads no clock: ``as_of_us`` says which events count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from featserve.batch import EventBatch, Int64s
from featserve.codec import encode_keys, key_ranks
from featserve.errors import SourceError
from featserve.folding import beyond, fold, reached, unite
from featserve.materialize import Loaded, Progress, visible_batches
from featserve.plan import WindowPlan
from featserve.push import expiry_keys, ids_of, names_of, over, removed
from featserve.series import Pool, State, events_of
from featserve.store import Load, OnlineStore, Writes
from featserve.types import NEVER_US, Array, Mask, concat

ENTITIES = 4_096
"""Entities whose records are made at once."""
SLACK_ROWS = 1_000_000
"""Events that are held beyond twice those that count, before the others are let go of."""
LOOKED_UP = 65_536
"""Ids that are looked up at once."""


def load_windows(
    store: OnlineStore, plan: WindowPlan, root: Path, as_of_us: int, progress: Progress | None = None
) -> Loaded:
    """Load the history of a view over events: all of it, or nothing where an event is refused or it is interrupted.

    It may be run again. Pushes wait while the records are made. Without an event id every event of the history and
    every pushed one counts. ``rows_stored``: the events that a window still holds. Raises SourceError, also where an
    entity would be over a bound of the view.
    """
    rows_read, history = 0, _History(plan)
    for read, batch in visible_batches(plan.view.rows, root, as_of_us, progress):
        rows_read += read
        history.add(batch)
    with store.updating(), store.load() as load:
        counted = _Backfill(store, plan, as_of_us).run(history.events(), load)
    _forget(store, plan)
    return Loaded(rows_read, counted)


def _forget(store: OnlineStore, plan: WindowPlan) -> None:
    """Remove the ids of earlier loads, which mean nothing any more."""

    def change(found: Sequence[bytes | None]) -> Writes:
        meant = (None, found[0])
        return Writes(removed(store, plan, [name for name, of in zip(part, found[1:], strict=True) if of not in meant]))

    names = store.keys(plan.expiry, _after(plan.expiry))
    while part := list(islice(names, LOOKED_UP)):
        store.update([plan.load, *part], change, own=(plan.ids, plan.expiry))


class _History:
    """The events of a source that windows may still hold, at or after the newest copy of an event of their entity."""

    def __init__(self, plan: WindowPlan) -> None:
        self._plan = plan
        self._batches: list[EventBatch] = []
        self._rows = self._kept = 0

    def add(self, batch: EventBatch) -> None:
        has_key = np.ones(len(batch), np.bool_)
        for name in self._plan.view.entity.keys:
            valid = batch.columns[name].valid
            if valid is not None:
                has_key &= valid
        self._batches.append(batch.take(np.flatnonzero(has_key)))
        self._rows += len(self._batches[-1])
        if self._rows > 2 * self._kept + SLACK_ROWS:
            self._trimmed()

    def events(self) -> tuple[EventBatch, Mask] | None:
        """Return the events, and which are the first of their id; None where no batch was added.

        Ids are compared only now, so that what counts does not depend on the batches that came.
        """
        if not self._batches:
            return None
        batch = self._trimmed()
        return batch, self._first_of_id(batch)

    def _trimmed(self) -> EventBatch:
        """Return the events that a window may still hold, and let go of the others."""
        batch = _joined(self._batches)
        owner = _numbers(key_ranks([batch.columns[name] for name in self._plan.view.entity.keys]))
        newest = np.full(int(owner.max(initial=-1)) + 1, NEVER_US)
        np.maximum.at(newest, owner, batch.event_time_us)
        kept = reached(self._plan.codec.layout, newest, owner, batch.event_time_us)
        if not kept.all():
            batch = batch.take(np.flatnonzero(kept))
        self._batches, self._rows, self._kept = [batch], len(batch), len(batch)
        return batch

    def _first_of_id(self, batch: EventBatch) -> Mask:
        """Return which events are the first of their id to become available."""
        first = np.ones(len(batch), np.bool_)
        assert self._plan.view.events is not None
        name = self._plan.view.events.event_id
        if name is not None and len(batch):
            ranks = key_ranks([batch.columns[name]])
            available = np.maximum(batch.event_time_us, batch.known_at_us)
            order = np.lexsort((batch.sequence, available, ranks))
            ordered = ranks[order]
            first[order[1:]] = ordered[1:] != ordered[:-1]
        return first


class _Backfill:
    """One load of a view's records and ids."""

    def __init__(self, store: OnlineStore, plan: WindowPlan, as_of_us: int) -> None:
        assert plan.view.events is not None
        self._store, self._plan, self._source, self._as_of_us = store, plan, plan.view.events, as_of_us
        before = int.from_bytes(store.read_many([plan.load])[0] or b"", "big")
        self._loads = (before + 1).to_bytes(8, "big")
        self._ids: list[tuple[bytes, bytes]] = []
        self._united: dict[bytes, bytes] = {}

    def run(self, history: tuple[EventBatch, Mask] | None, load: Load) -> int:
        """Make the records of all entities, those that the history no longer has among them; return what counts."""
        plan = self._plan
        keys: list[bytes] = []
        if history is not None:
            batch, first = history
            history = batch, first & self._not_pushed(batch)
            keys = encode_keys([batch.columns[name] for name in plan.view.entity.keys])
        prefix = len(plan.records)
        there = (key[prefix:] for key in self._store.keys(plan.records, _after(plan.records)))
        entities = sorted({*keys, *there})
        numbers = {key: i for i, key in enumerate(entities)}
        owner = np.fromiter(map(numbers.__getitem__, keys), np.int64, len(keys))
        order = np.argsort(owner, kind="stable")
        counted = 0
        for start in range(0, len(entities), ENTITIES):
            part = entities[start : start + ENTITIES]
            first, stop = np.searchsorted(owner[order], (start, start + len(part)))
            rows = order[first:stop]
            counted += self._add(history, rows, owner[rows] - start, part, load)
        if self._united:
            load.add(*zip(*sorted(self._united.items()), strict=True))
        if self._ids:
            ids = sorted(id_ for id_, _ in self._ids)
            load.add([plan.ids + id_ for id_ in ids], [self._loads] * len(ids))
            expiries = sorted(expiry for _, expiry in self._ids)
            load.add(expiries, [self._loads] * len(expiries))
        load.add([plan.load], [self._loads])
        return counted

    def _add(
        self,
        history: tuple[EventBatch, Mask] | None,
        rows: Int64s,
        owner: Int64s,
        entities: Sequence[bytes],
        load: Load,
    ) -> int:
        """Make the records of some entities from their events, ``rows`` of the history; return how many count.

        Events were let go of by the time of any copy: before the newest one, also of those that do not count, no read
        would be right.
        """
        plan, codec = self._plan, self._plan.codec
        assert plan.pushed is not None
        pool = Pool()
        state = self._pushed(entities, pool)
        counts: Array = np.zeros(0, np.bool_)
        batch: EventBatch | None = None
        if history is not None and len(rows):
            exact_us = np.full(len(entities), NEVER_US)
            np.maximum.at(exact_us, owner, history[0].event_time_us[rows])
            empty = replace(State.empty(codec.layout, len(entities)), exact_us=exact_us)
            fresh = history[1][rows]
            batch, owner = history[0].take(rows[fresh]), owner[fresh]
            events = events_of(codec.layout, batch, owner, pool)
            state = unite(codec.layout, fold(codec.layout, empty, events, self._as_of_us), state)
            counts = reached(codec.layout, state.newest_us, owner, batch.event_time_us)
            self._note_ids(batch, counts, owner, entities)
        if problem := beyond(codec.layout, state):
            path = plan.view.source and plan.view.source.path
            raise SourceError(f"{path}: {over(plan, problem, entities, batch, owner)}")
        load.add([plan.records + key for key in entities], codec.encode(state, pool))
        return int(counts.sum())

    def _pushed(self, entities: Sequence[bytes], pool: Pool) -> State:
        """Return what was pushed of some entities; their recent parts are united with it, and begin anew."""
        plan, codec = self._plan, self._plan.codec
        assert plan.pushed is not None
        keys = [plan.pushed + key for key in entities]
        pushed = codec.decode([record or codec.empty for record in self._store.read_many(keys)], pool)
        if plan.recent is not None:
            names = [plan.recent + key for key in entities]
            recent = codec.decode([record or codec.empty for record in self._store.read_many(names)], pool)
            pushed = unite(codec.layout, pushed, recent)
            there = np.flatnonzero(recent.newest_us > NEVER_US)
            united = codec.encode(pushed.take(there), pool)
            self._united |= zip([keys[i] for i in there.tolist()], united, strict=True)
            self._united |= dict.fromkeys(names, codec.empty)
        return pushed

    def _note_ids(self, batch: EventBatch, counts: Mask, owner: Int64s, entities: Sequence[bytes]) -> None:
        """Note the ids of the events that count."""
        ids = ids_of(self._source, batch)
        if ids:
            kept = np.flatnonzero(counts)
            ids = [ids[row] for row in kept.tolist()]
            expiries = expiry_keys(self._plan, names_of(entities), owner[kept], batch.event_time_us[kept], ids)
            self._ids += zip(ids, expiries, strict=True)

    def _not_pushed(self, history: EventBatch) -> Mask:
        """Return which events have an id that was not pushed."""
        ids = ids_of(self._source, history)
        fresh = np.ones(len(history), np.bool_)
        for start in range(0, len(ids), LOOKED_UP):
            noted = self._store.noted([self._plan.ids + id_ for id_ in ids[start : start + LOOKED_UP]])
            fresh[start : start + len(noted)] = ~np.array(noted)
        return fresh


def _joined(batches: Sequence[EventBatch]) -> EventBatch:
    if len(batches) == 1:
        return batches[0]
    return EventBatch(
        {name: concat([batch.columns[name] for batch in batches]) for name in batches[0].columns},
        np.concatenate([batch.event_time_us for batch in batches]),
        np.concatenate([batch.known_at_us for batch in batches]),
        np.concatenate([batch.sequence for batch in batches]),
    )


def _numbers(ranks: Array) -> Int64s:
    """Return ranks as numbers from 0 on without gaps."""
    return np.unique(ranks, return_inverse=True)[1]


def _after(prefix: bytes) -> bytes:
    """Return the first key behind all that start with ``prefix``."""
    return (int.from_bytes(prefix, "big") + 1).to_bytes(len(prefix), "big")
