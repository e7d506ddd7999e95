"""The engine: a store and a compiled snapshot of definitions; reads plans into matrices and writes batches of rows.

The one way to the store, for the server and in process alike. It knows no transport, reads no clock (``now_us`` is a
parameter) and, on the read path, looks up no definition, takes no lock and touches no cell on its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featserve.batch import Arrival, EntityKeys, EventBatch, Integers, Pushed, Written
from featserve.checks import check_rows
from featserve.codec import Rows, check_key_sizes, integers_under, keys_under
from featserve.errors import invalid
from featserve.matrix import FeatureMatrix, Status
from featserve.plan import Plans, PushPlan, ReadPlan, ViewRead, WritePlan
from featserve.push import push
from featserve.schema import ServiceSchema
from featserve.stages import Stages
from featserve.store import OnlineStore
from featserve.store.follow import Behind, Follower, sequence_of, token_of
from featserve.transform import REQUEST_TIME, Slots, request_slot, run
from featserve.turns import give_way
from featserve.types import NEVER_US, Array, Column, Mask, Timestamp

NOTHING: Mapping[str, Column] = {}
ARRIVED = b"\x00arrived"
"""Where the store holds a number above those of all rows that arrived; as a stamp, so that the greatest stays."""
AHEAD_US = 3_600_000_000
"""How far above them it is set, so that it seldom has to be."""


def read(
    store: OnlineStore,
    plan: ReadPlan,
    keys: EntityKeys | Integers,
    now_us: int,
    *,
    request_columns: Mapping[str, Column] = NOTHING,
    as_of: bool = False,
    event_times: bool = False,
    stages: Stages | None = None,
) -> FeatureMatrix:
    """Return the features of ``plan`` for ``keys`` at the instant ``now_us``, with one read of the store.

    ``request_columns``: checked, as the plan's schema says. ``as_of``: the caller asked for that very instant.
    ``event_times``: also return them. ``stages``: note in them what the time is spent on. Raises CorruptRow,
    StoreError, TransformError, or InvalidRequest where a view over events no longer knows the instant.
    """
    asked = wanted(plan, keys)
    if stages is not None:
        stages.begin("store read")
    found = store.read_many(asked)
    return fill(plan, found, keys.count, now_us, request_columns, as_of, event_times, stages)


def fill(
    plan: ReadPlan,
    found: list[bytes | None],
    rows: int,
    now_us: int,
    request_columns: Mapping[str, Column] = NOTHING,
    as_of: bool = False,
    event_times: bool = False,
    stages: Stages | None = None,
) -> FeatureMatrix:
    """Return what ``read`` does, from what the store has ``found`` of what is ``wanted`` for so many ``rows``."""
    schema = plan.schema
    status = np.empty((rows, len(plan.views)), np.uint8)
    status.fill(1)  # Status.PRESENT
    answer = _Answer(
        np.empty((rows, schema.width), schema.numpy_dtype),
        [None] * len(schema.column_features),
        status,
        None,
        np.empty((rows, len(plan.views)), np.int64) if event_times else None,
        {},
    )
    _unwarned.context.run(_fill_all, answer, plan, found, now_us, as_of, stages)
    if plan.steps:
        answer.slots.update((request_slot(name), col) for name, col in request_columns.items())
        if plan.request_time:
            answer.slots[REQUEST_TIME] = Column(Timestamp, np.full(rows, now_us))
        run(plan.steps, answer.slots, rows, stages)
        if stages is not None:
            stages.begin("place")
        _unwarned.context.run(_place, answer, plan, rows)
    columns: Any = tuple(answer.columns)
    return FeatureMatrix(schema, answer.values, columns, status, answer.valid, answer.times)


def wanted(plan: ReadPlan, keys: EntityKeys | Integers) -> list[bytes]:
    """Return the store's keys, view by view; views of one entity share the encoding of its columns."""
    if isinstance(keys, EntityKeys):
        check_key_sizes(keys.columns)
    encoded: dict[tuple[str, ...], Callable[[bytes], list[bytes]]] = {}
    asked: list[bytes] = []
    for view in plan.views:
        under = encoded.get(view.keys)
        if under is None:
            under = encoded[view.keys] = _under(keys, view.keys)
        asked += under(view.prefix)
        if view.recent is not None:
            asked += under(view.recent)
    return asked


def _under(keys: EntityKeys | Integers, names: tuple[str, ...]) -> Callable[[bytes], list[bytes]]:
    """Return what gives the keys of one entity's views, of these columns, under a prefix."""
    if isinstance(keys, Integers):
        return integers_under(keys.raw, len(keys.raw) // keys.count)
    return keys_under([keys.columns[name] for name in names])


class _Unwarned(threading.local):
    """Each thread's context in which NumPy does not warn: to enter it takes a quarter of what ``np.errstate`` takes.

    What float32 cannot hold is served as infinity; a NaN may be a signalling one.
    """

    def __init__(self) -> None:
        self.context = Context()
        self.context.run(np.seterr, over="ignore", invalid="ignore")


_unwarned = _Unwarned()


@dataclass(slots=True)
class _Answer:
    """The arrays of one answer while its views are filled in."""

    values: Array
    columns: list[Column | None]
    status: Array
    valid: Mask | None
    times: Array | None
    slots: Slots


def _fill_all(
    answer: _Answer,
    plan: ReadPlan,
    found: list[bytes | None],
    now_us: int,
    as_of: bool,
    stages: Stages | None,
) -> None:
    """Put what was found of each view in its place."""
    rows, start = len(answer.status), 0
    for i, view in enumerate(plan.views):
        stop = start + (rows if view.recent is None else 2 * rows)
        if stages is not None:
            stages.begin(f"codec {view.codec.view}")
        _fill(answer, i, view, found[start:stop], now_us, plan.schema, as_of)
        start = stop


def _fill(
    answer: _Answer,
    i: int,
    view: ViewRead,
    found: list[bytes | None],
    now_us: int,
    schema: ServiceSchema,
    as_of: bool,
) -> None:
    """Put the rows of view ``i`` in their places."""
    codec, rows = view.codec, len(answer.status)
    if view.records is None:
        decoded, whole = _stored(answer, i, view, found, now_us)
    else:
        decoded = view.records.read(found[:rows], now_us, recent=found[rows:], as_of=as_of)
        whole = not np.count_nonzero(decoded.fixed["words"][:, 4:] != codec.lowest[4:])
        if answer.times is not None:
            answer.times[:, i] = decoded.times()[0]
    valid = None
    if not whole:
        if answer.valid is None:
            answer.valid = np.ones((rows, len(schema.features)), np.bool_)
        valid = answer.valid
        valid[:, view.targets] = decoded.validity(len(codec.features))[:, view.sources]
    for dtype, source, target in view.tensor:
        answer.values[:, target] = decoded.fixed[dtype][:, source]
    if valid is not None:
        for position, at in view.unmarked:
            answer.values[~valid[:, position], at] = np.nan
    for index, type_, place, position in view.columns:
        answer.columns[index] = decoded.column(type_, place, None if valid is None else valid[:, position])
    if view.inputs:
        stored = None if valid is None else decoded.validity(len(codec.features))
        for slot, type_, place, number in view.inputs:
            mask = None if stored is None else stored[:, number]
            answer.slots[slot] = decoded.column(type_, place, mask)


def _stored(answer: _Answer, i: int, view: ViewRead, found: list[bytes | None], now_us: int) -> tuple[Rows, bool]:
    """Return the rows of view ``i`` as they are to be served, and whether all are visible and hold no null."""
    codec = view.codec
    missing = None in found
    rows: Any = [codec.absent if row is None else row for row in found] if missing else found
    decoded = codec.decode(rows)
    one = len(rows) == 1
    if not missing and (_is_ordinary(rows[0], view, now_us) if one else _are_ordinary(decoded, view, now_us)):
        if answer.times is not None:
            answer.times[:, i] = decoded.times()[0]
        return decoded, True
    codec.check_heads(decoded, rows)
    absent = np.array([row is None for row in found])
    hidden = _hide(answer, i, view, absent, decoded, now_us)
    if np.count_nonzero(hidden) > np.count_nonzero(absent):
        decoded = codec.decode([codec.absent if h else r for r, h in zip(rows, hidden.tolist(), strict=True)])
    return decoded, False


def _place(answer: _Answer, plan: ReadPlan, rows: int) -> None:
    """Put the outputs of transforms in their places."""
    for place in plan.outputs:
        col = answer.slots[place.slot]
        if col.valid is not None:
            if answer.valid is None:
                answer.valid = np.ones((rows, len(plan.schema.features)), np.bool_)
            answer.valid[:, place.position] = col.valid
        if place.tensor is None:
            assert place.column is not None
            answer.columns[place.column] = col
            continue
        target = slice(place.tensor, place.tensor + place.type.length) if place.type.vector else place.tensor
        answer.values[:, target] = col.values
        if col.valid is not None and not place.type.floating and not place.has_default:
            answer.values[~col.valid, place.tensor] = np.nan


def _is_ordinary(row: bytes, view: ViewRead, now_us: int) -> bool:
    """Say of one row what ``_are_ordinary`` says of many, by comparing bytes, in a seventh of the time for one."""
    codec, now = view.codec, (now_us + 2**63).to_bytes(8, "big")
    return (
        row[:8] == codec.head
        and row[8:16] <= now
        and row[16:24] <= now
        and row[32 : 32 + len(codec.all_valid)] == codec.all_valid
        and (view.ttl_us is None or row[8:16] >= max(now_us - view.ttl_us + 2**63, 0).to_bytes(8, "big"))
    )


def _are_ordinary(decoded: Rows, view: ViewRead, now_us: int) -> bool:
    """Say whether every row has the right head, is visible now and holds no null, by one comparison of its words."""
    lowest, span = view.codec.lowest, view.codec.span.copy()
    span[1] = span[2] = now_us + 2**63
    if view.ttl_us is not None:
        lowest = lowest.copy()
        lowest[1] = max(now_us - view.ttl_us + 2**63, 0)
        span[1] -= lowest[1]
    return not np.count_nonzero(decoded.fixed["words"] - lowest > span)


def _hide(answer: _Answer, i: int, view: ViewRead, absent: Mask, decoded: Rows, now_us: int) -> Mask:
    """Note why rows are not visible; return which are not, bool of shape (n,)."""
    event, known = decoded.times()
    gone = (event > now_us) | (known > now_us) | absent
    hidden = gone if view.ttl_us is None else gone | (event < now_us - view.ttl_us)
    answer.status[hidden, i] = Status.EXPIRED
    answer.status[gone, i] = Status.NOT_FOUND
    if answer.times is not None:
        answer.times[:, i] = np.where(gone, NEVER_US, event)
    return hidden


def write(store: OnlineStore, plan: WritePlan, batch: EventBatch, latest_us: int) -> Written:
    """Check a batch of a view's rows and write it atomically.

    ``latest_us``: the last instant that an event time or known-at may be. Raises InvalidRequest that names row, column
    and reason, and writes nothing; StoreError where the store cannot.
    """
    check_rows(plan.view.rows, batch, latest_us)
    give_way()
    keys, rows = encode_rows(plan, batch)
    give_way()
    return Written(len(batch), store.write_many(keys, rows))


def encode_rows(plan: WritePlan, batch: EventBatch) -> tuple[list[bytes], list[bytes]]:
    """Return the store's keys and rows of a checked batch."""
    under = keys_under([batch.columns[name] for name in plan.view.entity.keys])
    return under(plan.prefix), plan.codec.encode(batch)


class Engine:
    """A store, and the plans of the snapshot that is served now.

    ``plans`` is replaced as a whole when a new snapshot is taken: a request that began with the old one ends with it.
    """

    def __init__(self, store: OnlineStore, plans: Plans, follower: Follower | None = None) -> None:
        """``follower``: lets the store catch up, where another process writes it."""
        self.store = store
        self.plans = plans
        self.follower = follower
        self._sequence = self._above = 0
        self._lock = threading.Lock()

    def read(
        self,
        plan: ReadPlan,
        keys: EntityKeys | Integers,
        now_us: int,
        *,
        request_columns: Mapping[str, Column] = NOTHING,
        as_of: bool = False,
        event_times: bool = False,
        stages: Stages | None = None,
    ) -> FeatureMatrix:
        """Return the features of ``plan`` for ``keys`` at ``now_us``; see ``read``."""
        return read(
            self.store,
            plan,
            keys,
            now_us,
            request_columns=request_columns,
            as_of=as_of,
            event_times=event_times,
            stages=stages,
        )

    def write(self, plan: WritePlan, arrival: Arrival, *, now_us: int, max_future_skew_us: int) -> Written:
        """Write rows that arrive now; see ``write``. Rows of no source come after all that have a source position."""
        if plan.view.events is not None:
            raise invalid("view", f"{plan.view.id} aggregates events; push them to {plan.view.events.id}")
        written = write(self.store, plan, self._dated(arrival, now_us), now_us + max_future_skew_us)
        return replace(written, token=token_of(self.store))

    def push(self, plan: PushPlan, arrival: Arrival, *, now_us: int, max_future_skew_us: int) -> Pushed:
        """Count events that arrive now in every view over their source; see ``push.push``."""
        batch = self._dated(arrival, now_us)
        pushed = push(self.store, plan, batch, now_us=now_us, latest_us=now_us + max_future_skew_us)
        return replace(pushed, token=token_of(self.store))

    def _dated(self, arrival: Arrival, now_us: int) -> EventBatch:
        """Return rows with all their times, as they arrive now."""
        event_time_us, known_at_us, sequence = arrival.event_time_us, arrival.known_at_us, arrival.source_positions
        if known_at_us is None:
            known_at_us = np.maximum(event_time_us, now_us)
        if sequence is None:
            first = self._arrive(len(event_time_us), now_us)
            sequence = np.arange(first, first + len(event_time_us), dtype=np.int64)
        return EventBatch(arrival.columns, event_time_us, known_at_us, sequence)

    def require(self, token: str, seconds: float) -> None:
        """Return where the store holds the write that ``token`` names, else raise Behind, which waits for it.

        ``seconds``: how long it waits at most. Raises InvalidRequest for what is no token of this store.
        """
        sequence, held = sequence_of(token, self.store), self.store.sequence()
        if held < sequence:
            if self.follower is None:
                raise invalid("at_least", f"write {sequence:,} is not in the store here, which holds {held:,}")
            raise Behind(self.follower.reached(sequence, seconds))

    def _arrive(self, rows: int, now_us: int) -> int:
        """Return the sequence number of the first of ``rows`` arriving now: microseconds, but never the same twice.

        They rise over a restart, too, even where the clock was set back: an engine begins above all of the one before.
        """
        with self._lock:
            first = max(self._sequence + 1, now_us)
            if first + rows > self._above:
                (found,) = self.store.read_many([ARRIVED])
                first = max(first, int.from_bytes(found or b"", "big"))
                self._above = first + rows + AHEAD_US
                self.store.write_many([ARRIVED], [self._above.to_bytes(32, "big")])
            self._sequence = first + rows - 1
            return first
