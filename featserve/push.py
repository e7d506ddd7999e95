"""Pushed events into the records of every view over them: all in one update of the store, or none.

Comes in: the plan of an event source, and a batch of its events. An event with an id counts once: the ids of those that
count are kept until no window can hold their event any more, of pushed ones among the store's notes, as no reader wants
them. Where records are kept in two parts, events go to the recent one, which is short, and is united with the record
when it has grown long. Knows no transport and reads no clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import NamedTuple, Self

import numpy as np

from featserve.batch import EventBatch, Int64s, Pushed
from featserve.checks import check_rows
from featserve.codec import check_key_sizes, encode_keys
from featserve.definitions import EventSource
from featserve.errors import InvalidRequest, invalid
from featserve.folding import beyond, fold, reached, settled, unite
from featserve.plan import PushPlan, WindowPlan
from featserve.series import LONG_BYTES, Events, Layout, Pool, State, events_of, length_us
from featserve.store import OnlineStore, Writes
from featserve.turns import give_way
from featserve.types import NEVER_US, Column, Mask
from featserve.windows import starts

Rows = dict[bytes, bytes | None]
MAX_ID_BYTES = 31
ENTITY_BYTES = 16
SWEEPS = 16
"""Ids are looked through when an entity's newest event has moved on by this part of its longest window."""


def push(store: OnlineStore, plan: PushPlan, batch: EventBatch, *, now_us: int, latest_us: int) -> Pushed:
    """Check a batch of events and count them in every view over their source.

    ``latest_us``: the last instant that an event time or known-at may be. Raises InvalidRequest that names row, column
    and reason, or the view, the entity and the bound that it would be over, and writes nothing then.
    """
    check_rows(plan.source.rows, batch, latest_us)
    keyed: dict[tuple[str, ...], _Keyed] = {}
    parts = []
    for view in plan.views:
        names = tuple(view.view.entity.keys)
        if names not in keyed:
            keyed[names] = _Keyed.of(plan.source, batch, names)
        parts.append(_Part(view, keyed[names], len(batch), now_us))
    keys = [part.keys() for part in parts]

    def change(found: Sequence[bytes | None]) -> Writes:
        rows: Rows = {}
        forget: list[bytes] = []
        note: list[bytes] = []
        start = 0
        for part, wanted in zip(parts, keys, strict=True):
            give_way()
            writes = part.change(store, dict(zip(wanted, found[start : start + len(wanted)], strict=True)))
            rows |= writes.rows
            forget += writes.forget
            note += writes.note
            start += len(wanted)
        return Writes(rows, forget, note)

    own = tuple(prefix for view in plan.views for prefix in (view.ids, view.expiry, view.pushed) if prefix)
    store.update([key for wanted in keys for key in wanted], change, own=own)
    counted, late, duplicate = np.zeros((3, len(batch)), np.bool_)
    for part in parts:
        counted, late, duplicate = counted | part.counted, late | part.late, duplicate | part.duplicate
    late &= ~counted
    duplicate &= ~counted & ~late
    return Pushed(len(batch), int(counted.sum()), int(duplicate.sum()), int(late.sum()))


class _Kept(NamedTuple):
    """What is kept of n entities with the events of a push.

    ``before_us``: their newest event times before. ``united``: the entities whose recent part does not stay apart, and
    ``whole``: their records with it.
    """

    before_us: Int64s
    recent: State
    united: Int64s
    whole: State


class _Keyed(NamedTuple):
    """The events of a push that have a key of one kind, at ``rows`` of it: what views over them have in common.

    ``entities``: their keys without a prefix, each once, ``names``: what is short for each; ``owner``: the number of
    each event's. ``ids``: what names each event, nothing where events have no id.
    """

    rows: Int64s
    batch: EventBatch
    entities: list[bytes]
    names: list[bytes]
    owner: Int64s
    ids: list[bytes]

    @classmethod
    def of(cls, source: EventSource, batch: EventBatch, keys: tuple[str, ...]) -> Self:
        columns = {name: batch.columns[name] for name in keys}
        check_key_sizes(columns)
        has_key = np.ones(len(batch), np.bool_)
        for column in columns.values():
            if column.valid is not None:
                has_key &= column.valid
        rows = np.flatnonzero(has_key)
        if len(rows) < len(batch):
            batch = batch.take(rows)
        entities, owner = owners([batch.columns[name] for name in keys])
        return cls(rows, batch, entities, names_of(entities), owner, ids_of(source, batch))


class _Part:
    """One view's part in a push. ``duplicate``, ``counted``, ``late``: what became of each event, bool of (n,)."""

    def __init__(self, plan: WindowPlan, keyed: _Keyed, events: int, now_us: int) -> None:
        self._plan, self._now_us = plan, now_us
        self._rows, self._batch, self._entities, self._names, self._owner, self._ids = keyed
        self.duplicate, self.counted, self.late = (np.zeros(events, np.bool_) for _ in range(3))

    def keys(self) -> list[bytes]:
        """Return the keys whose rows ``change`` takes."""
        plan = self._plan
        recent = () if plan.recent is None else (plan.recent + key for key in self._entities)
        return [plan.load, *recent]

    def change(self, store: OnlineStore, found: Mapping[bytes, bytes | None]) -> Writes:
        """Return what to write, and note what becomes of each event."""
        plan, loads = self._plan, found[self._plan.load]
        fresh = self._fresh(store, loads)
        give_way()
        self.duplicate[self._rows[~fresh]] = True
        rows = np.flatnonzero(fresh)
        if not len(rows):
            return Writes({})
        pool = Pool()
        events = events_of(plan.codec.layout, self._batch.take(rows), self._owner[rows], pool)
        kept = self._folded(store, found, events, pool)
        give_way()
        if problem := beyond(plan.codec.layout, kept.whole):
            what, entity = problem
            raise over(plan, (what, int(kept.united[entity])), self._entities, self._batch, self._owner)
        counts = reached(plan.codec.layout, kept.recent.seen_us, events.owner, events.event_time_us)
        self.counted[self._rows[rows[counts]]] = True
        self.late[self._rows[rows[~counts]]] = True
        written = self._parts(store, kept, pool)
        give_way()
        if not self._ids:
            return Writes(written)
        rows = rows[counts]
        ids = [self._ids[row] for row in rows.tolist()]
        expiries = expiry_keys(plan, self._names, self._owner[rows], self._batch.event_time_us[rows], ids)
        removed, forget = self._expired(store, kept.before_us, kept.recent.seen_us, loads)
        return Writes(written | removed, forget, [plan.ids + id_ for id_ in ids] + expiries)

    def _fresh(self, store: OnlineStore, loads: bytes | None) -> Mask:
        """Return which events have an id that is not there, and are the first of it in the batch to be available."""
        fresh = np.ones(len(self._batch), np.bool_)
        if not self._ids:
            return fresh
        keys = [self._plan.ids + id_ for id_ in self._ids]
        seen = set(compress(self._ids, store.noted(keys)))
        if loads is not None:
            seen.update(id_ for id_, load in zip(self._ids, store.read_many(keys), strict=True) if load == loads)
        if not seen and len(set(self._ids)) == len(self._ids):
            return fresh
        batch = self._batch
        order = np.lexsort((batch.sequence, np.maximum(batch.event_time_us, batch.known_at_us)))
        for row in order.tolist():
            id_ = self._ids[row]
            if id_ in seen:
                fresh[row] = False
            seen.add(id_)
        return fresh

    def _folded(self, store: OnlineStore, found: Mapping[bytes, bytes | None], events: Events, pool: Pool) -> _Kept:
        """Fold events into the recent parts, and unite with their records those that do not stay apart."""
        plan, codec, layout = self._plan, self._plan.codec, self._plan.codec.layout
        recent, unites = State.empty(layout, len(self._entities)), np.ones(len(self._entities), np.bool_)
        if plan.recent is not None:
            parts = [found[plan.recent + key] or codec.empty for key in self._entities]
            recent = codec.decode(parts, pool)
            unites = np.fromiter((len(part) > LONG_BYTES for part in parts), np.bool_, len(parts))
            unites[events.owner[np.maximum(events.event_time_us, events.known_at_us) > self._now_us]] = True
        looked = np.flatnonzero(unites | (recent.newest_us == NEVER_US))
        records = self._read(store, plan.records, looked, pool)
        unites[looked[records.newest_us == NEVER_US]] = True
        unites[looked[records.waiting.owner]] = True
        before_us = recent.seen_us.copy()
        before_us[looked] = np.maximum(before_us[looked], records.newest_us)
        records = settled(layout, records, self._now_us)
        seen_us = before_us.copy()
        seen_us[looked] = np.maximum(seen_us[looked], records.newest_us)
        recent = fold(layout, replace(recent, seen_us=seen_us), events, self._now_us)
        united = np.flatnonzero(unites)
        whole = unite(layout, records.take(np.searchsorted(looked, united)), recent.take(united))
        return _Kept(before_us, recent, united, whole)

    def _parts(self, store: OnlineStore, kept: _Kept, pool: Pool) -> Rows:
        """Return the recent parts that stay apart, and the records that are united with theirs, which begin anew."""
        plan, layout, united = self._plan, self._plan.codec.layout, kept.united
        writes = self._encoded(plan.records, kept.whole, united, pool)
        if plan.pushed is not None:
            pushed = settled(layout, self._read(store, plan.pushed, united, pool), self._now_us)
            pushed = unite(layout, pushed, kept.recent.take(united))
            writes |= self._encoded(plan.pushed, pushed, united, pool)
        if plan.recent is not None:
            apart = np.setdiff1d(np.arange(len(self._entities)), united)
            writes |= self._encoded(plan.recent, kept.recent.take(apart), apart, pool)
            writes |= dict.fromkeys((plan.recent + self._entities[i] for i in united.tolist()), plan.codec.empty)
        return writes

    def _read(self, store: OnlineStore, prefix: bytes, rows: Int64s, pool: Pool) -> State:
        """Return what is stored of the entities ``rows``."""
        codec = self._plan.codec
        found = store.read_many([prefix + self._entities[row] for row in rows.tolist()])
        return codec.decode([record or codec.empty for record in found], pool)

    def _encoded(self, prefix: bytes, state: State, rows: Int64s, pool: Pool) -> Rows:
        """Return what to write for the entities ``rows``."""
        keys = [prefix + self._entities[row] for row in rows.tolist()]
        return dict(zip(keys, self._plan.codec.encode(state, pool), strict=True))

    def _expired(
        self, store: OnlineStore, before_us: Int64s, after_us: Int64s, loads: bytes | None
    ) -> tuple[Rows, list[bytes]]:
        """Return the removal of ids whose event no window of its entity can hold any more: loaded ones, and notes.

        All that are there: a load may have moved the newest event on before.
        """
        plan, layout = self._plan, self._plan.codec.layout
        old, new = sweeps(layout, before_us), sweeps(layout, after_us)
        moved = np.flatnonzero((new > old) & (before_us > NEVER_US))
        loaded: list[bytes] = []
        forget: list[bytes] = []
        for entity, end in zip(moved.tolist(), new[moved].tolist(), strict=True):
            bounds = expiry_keys(
                plan, [self._names[entity]], np.zeros(2, np.int64), np.array([NEVER_US, end]), [b"", b""]
            )
            if loads is not None:
                loaded += store.keys(*bounds)
            forget += store.notes(*bounds)
        return removed(store, plan, loaded), [*forget, *(id_of(plan, name) for name in forget)]


def owners(columns: Sequence[Column]) -> tuple[list[bytes], Int64s]:
    """Return the distinct entities of n events by their key without a prefix, and the number of each event's."""
    numbers: dict[bytes, int] = {}
    keys = encode_keys(columns)
    owner = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(keys))
    return list(numbers), owner


def ids_of(source: EventSource, batch: EventBatch) -> list[bytes]:
    """Return what names each event, a digest where its id is long; nothing where events have no id."""
    if source.event_id is None:
        return []
    ids = encode_keys([batch.columns[source.event_id]])
    return [id_ if len(id_) <= MAX_ID_BYTES else hashlib.sha256(id_).digest() for id_ in ids]


def names_of(entities: Sequence[bytes]) -> list[bytes]:
    """Return what stands for entities in the keys by which ids expire, of one length."""
    return [hashlib.sha256(entity).digest()[:ENTITY_BYTES] for entity in entities]


def expiry_keys(
    plan: WindowPlan, names: Sequence[bytes], owner: Int64s, time_us: Int64s, ids: Sequence[bytes]
) -> list[bytes]:
    """Return the keys by which ids are found when the times of their events are over. ``owner``: of ``names``."""
    prefixes = [plan.expiry + name for name in names]
    times: list[bytes] = (time_us.view(np.uint64) ^ np.uint64(1 << 63)).byteswap().view("V8").tolist()
    return [prefixes[i] + time + id_ for i, time, id_ in zip(owner.tolist(), times, ids, strict=True)]


def id_of(plan: WindowPlan, expiry: bytes) -> bytes:
    """Return the key of the id that is found by an expiry key."""
    return plan.ids + expiry[len(plan.expiry) + ENTITY_BYTES + 8 :]


def removed(store: OnlineStore, plan: WindowPlan, expiries: Sequence[bytes]) -> Rows:
    """Return the removal of expiry keys of loaded events, and of the ids that are still of the same load."""
    ids = [id_of(plan, name) for name in expiries]
    loads = store.read_many([*expiries, *ids])
    same = zip(ids, loads[: len(ids)], loads[len(ids) :], strict=True)
    return dict.fromkeys([*expiries, *(id_ for id_, one, other in same if one == other)])


def sweeps(layout: Layout, newest_us: Int64s) -> Int64s:
    """Return the instants before which ids were looked through, for entities with these newest events."""
    windows = {series.longest for series in layout.series}
    first = np.minimum.reduce([starts(window, newest_us) for window in windows])
    step = max(max(map(length_us, windows)) // SWEEPS, 1)
    found: Int64s = np.maximum(first, NEVER_US + step) // step * step
    return found


def over(
    plan: WindowPlan, problem: tuple[str, int], entities: Sequence[bytes], batch: EventBatch | None, owner: Int64s
) -> InvalidRequest:
    """Return the error for an entity that would be over a bound. ``owner``: the entity of each event of ``batch``."""
    what, entity = problem
    row = np.flatnonzero(owner == entity)[:1]
    if batch is None or not len(row):
        shown = f"with the key 0x{entities[entity].hex()}"
    else:
        keys = plan.view.entity.keys
        shown = ", ".join(f"{name}={batch.columns[name].take(row).to_list()[0]!r}" for name in keys)
    return invalid("rows", f"view {plan.view.id}, {plan.view.entity.name} {shown}: {what}")
