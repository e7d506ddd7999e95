"""Pushes and loads of events, case by case: what ids, windows and bounds promise when history changes in between."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve import backfill
from featserve.backfill import load_windows
from featserve.batch import Arrival, EntityKeys, Pushed
from featserve.codec import encode_keys
from featserve.definitions import (
    Aggregate,
    Calendar,
    Entity,
    EventSource,
    FeatureService,
    FeatureView,
    Field,
    Hopping,
    ParquetSource,
    Rolling,
)
from featserve.engine import Engine
from featserve.errors import InvalidRequest, SourceError
from featserve.materialize import Loaded, visible_batches
from featserve.plan import Plans
from featserve.series import LONG_BYTES
from featserve.store.memory import MemoryStore
from featserve.types import Float64, Int64, String, column
from tests.random_data import snapshot_of

DAY_US = 86_400_000_000
WEEK = timedelta(days=7)
FIELDS = [Field("user_id", Int64), Field("shop", Int64), Field("id", String)]
EVENTS = EventSource("events", FIELDS, source=ParquetSource("history.parquet", event_time="at"), event_id="id")
USERS = FeatureView(
    "users",
    Entity("user", {"user_id": Int64}),
    events=EVENTS,
    aggregates=[Aggregate("n", "count", over=Rolling(WEEK, max_events=4))],
)
SHOPS = FeatureView(
    "shops",
    Entity("shop", {"shop": Int64}),
    events=EVENTS,
    aggregates=[
        Aggregate("n", "count", over=Hopping(WEEK, timedelta(days=1))),
        Aggregate("month", "count", over=Calendar(1, "month", "UTC")),
    ],
)

HOURS = FeatureView(
    "hours",
    Entity("user", {"user_id": Int64}),
    events=replace(EVENTS, event_id=None),
    aggregates=[
        Aggregate("n", "count", over=Hopping(WEEK, timedelta(hours=1))),
        Aggregate("shops", "sum", "shop", over=Calendar(7, "day", "UTC")),
    ],
)

Row = tuple[int | None, str, float]
"""A user, an id and the day of an event, in shop 1."""


class CountingStore(MemoryStore):
    """A store that knows how often it was read."""

    reads = 0

    def read_many(self, keys: list[bytes]) -> list[bytes | None]:
        self.reads += 1
        return super().read_many(keys)


class World:
    """A store of the view of users, or of both, and a file of history."""

    def __init__(self, folder: Path, *views: FeatureView) -> None:
        self.plans = Plans(snapshot_of([*views], [FeatureService("all", [*views], dtype=Float64)]))
        self.store, self.folder = CountingStore(), folder
        self.engine = Engine(self.store, self.plans)

    def push(self, *rows: Row) -> Pushed:
        """Push events at the time of the latest of them."""
        users, ids, days = zip(*rows, strict=True)
        times_us = np.array([int(day * DAY_US) for day in days])
        columns = {
            "user_id": column(Int64, list(users)),
            "shop": column(Int64, [1] * len(rows)),
            "id": column(String, list(ids)),
        }
        arrival = Arrival(columns, times_us, times_us, np.arange(len(rows)))
        return self.engine.push(self.plans.events("events"), arrival, now_us=int(times_us.max()), max_future_skew_us=0)

    def load(self, day: float, *rows: Row) -> Loaded:
        """Load a history of these events for the view of users, as of a day."""
        ats = pa.array([int(at * DAY_US) for _, _, at in rows], pa.int64()).cast(pa.timestamp("us", "UTC"))
        users, ids = pa.array([r[0] for r in rows], pa.int64()), pa.array([r[1] for r in rows], pa.string())
        table = {"user_id": users, "shop": pa.array([1] * len(rows), pa.int64()), "id": ids, "at": ats}
        pq.write_table(pa.table(table), self.folder / "history.parquet")
        return load_windows(self.store, self.plans.windows(USERS), self.folder, int(day * DAY_US))

    def get(self, day: float, user: int = 1, *, as_of: bool = False) -> dict[str, list[int]]:
        """Return what the windows of a user and of shop 1 hold."""
        plan = self.plans.service("all")
        keys = EntityKeys.of({name: [user if name == "user_id" else 1] for name in plan.schema.keys}, plan.schema.keys)
        return self.engine.read(plan, keys, int(day * DAY_US), as_of=as_of).to_dict()

    def ids(self) -> tuple[int, int]:
        """Return how many ids the view of users keeps, and how many keys by which they expire."""
        plan = self.plans.windows(USERS)
        pushed = (len([*self.store.notes(prefix, prefix + b"\xff" * 99)]) for prefix in (plan.ids, plan.expiry))
        loaded = (self.store.count(prefix) for prefix in (plan.ids, plan.expiry))
        ids, expiries = map(sum, zip(pushed, loaded, strict=True))
        return ids, expiries


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, USERS)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("before", [(1, "x", 1), (2, "x", 1)])
def test_an_id_that_was_loaded_for_another_event_counts_once(
    world: World, monkeypatch: pytest.MonkeyPatch, before: Row, killed: bool
) -> None:
    """A load corrects an event's time or entity: when what it was before expires, the id does not become new."""
    if killed:  # before the load could remove what the one before it left
        monkeypatch.setattr(backfill, "_forget", lambda store, plan: None)
    world.load(2, before)
    world.load(3, (1, "x", 3), (2, "q", 2))
    assert world.push((1, "y", 9), (2, "z", 9)).counted == 2
    assert world.push((1, "x", 3)) == Pushed(1, 0, 1, 0)
    assert world.get(9) == {"users.n": [2]}


def test_an_id_counts_again_after_its_window(world: World) -> None:
    """An id is known as long as a window may hold its event, and is let go of soon after; then it is a new one."""
    world.push((1, "x", 1))
    world.push((1, "y", 7.9))
    assert world.push((1, "x", 7.9)) == Pushed(1, 0, 1, 0)
    world.push((1, "z", 9))
    assert world.push((1, "x", 9)) == Pushed(1, 1, 0, 0)
    assert world.get(9) == {"users.n": [3]}


def test_ids_are_let_go_of(world: World) -> None:
    """However pushes and loads alternate, no id stays that no window holds; loads alone keep those of the newest."""
    for day in range(0, 200, 10):
        world.push((1, f"pushed {day}", day))
        world.load(day + 5, (1, f"loaded {day}", day + 5))
    world.push((1, "last", 200))
    assert world.ids() == (2, 2)
    for day in range(300, 400, 10):
        world.load(day, (3, f"loaded {day}", day))
    assert world.ids() == (2, 2)  # the last one pushed and the last one loaded


def test_an_id_that_is_pushed_again_as_its_old_event_expires_stays_known(world: World) -> None:
    """What a load left behind is removed in the very push that counts the id anew: the new one stays."""
    world.load(1, (1, "x", 1))
    world.load(2, (1, "y", 2))
    assert world.push((1, "x", 9)) == Pushed(1, 1, 0, 0)
    assert world.push((1, "x", 9)) == Pushed(1, 0, 1, 0)


def test_what_was_late_stays_uncounted(world: World) -> None:
    """Events that were acknowledged as late are kept nowhere: they are not there when a load takes history back."""
    world.load(41, (1, "h", 40))
    for i in range(20):
        assert world.push((1, "x", 1), (1, f"x {i}", 1)) == Pushed(2, 0, 0, 2)
    world.load(41)
    assert world.get(2, as_of=True) == {"users.n": [0]}


def test_a_load_is_refused_that_would_leave_pushes_over_a_bound(world: World) -> None:
    """Pushes that were within the bound beside a history are over it without: the load says so, and changes nothing."""
    world.load(40, (1, "h", 40))
    world.push((1, "a", 33.5), (1, "b", 33.5), (1, "c", 33.5))
    world.load(46, (1, "h", 46))
    world.push((1, "d", 39.5), (1, "e", 39.5))
    assert world.get(46) == {"users.n": [3]}
    for history in ([], [(2, "h", 46)]):
        with pytest.raises(SourceError, match=r"user with the key 0x0000000000000001: .* would hold 5 events of it"):
            world.load(46, *history)
    assert world.get(46) == {"users.n": [3]}


def test_the_answer_of_a_load_does_not_depend_on_its_batches(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file's copies of an id the first counts that a window holds in the end, however many rows come at once."""
    history = [(1, "x", 1), (1, "y", 14), (1, "z", 15), (1, "z", 20), (1, "x", 20), (1, "w", 21), (1, "v", 22.5)]
    found = []
    for slack, rows in ((1_000_000, 65_536), (0, 1), (0, 2), (0, 3)):
        monkeypatch.setattr(backfill, "SLACK_ROWS", slack)
        monkeypatch.setattr(backfill, "visible_batches", partial(visible_batches, batch_rows=rows))
        found.append((world.load(23, *history), world.get(23)))
    assert found == [(Loaded(7, 4), {"users.n": [4]})] * 4


@pytest.mark.parametrize(("copy", "pushed"), [((1, "x", 20), False), ((1, "x", 20), True), ((3, "x", 20), False)])
def test_a_copy_that_does_not_count_moves_no_answer(world: World, copy: Row, pushed: bool) -> None:
    """A file's later copy of an event lets go of others by its time: of an instant before that no read is answered."""
    user = copy[0] or 0
    history: list[Row] = [(user, "y", 12.9), (1, "x", 15)]
    if pushed:
        world.push(history.pop())
    world.load(21, *history, copy)
    for day in (15.5, 19.9):
        with pytest.raises(InvalidRequest, match=r"holds partials of events up to 1970-01-21 00:00"):
            world.get(day, user, as_of=True)
    assert world.get(20, user, as_of=True) == {"users.n": [user == 1]}
    assert world.push((user, "z", 21)).counted == 1
    assert world.get(21, user) == {"users.n": [1 + (user == 1)]}


def test_a_push_counts_in_every_view_or_in_none(tmp_path: Path) -> None:
    """Where the second view over the events refuses them, the first has not counted them, and knows none of the ids."""
    world = World(tmp_path, SHOPS, USERS)
    come = [(1, str(i), 1.0) for i in range(4)]
    world.push(*come)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"view users@1, user user_id=1: .* would hold 5 events"):
            world.push((2, "5", 1), (1, "6", 1))
    assert world.get(1) == {"shops.n": [4], "shops.month": [4], "users.n": [4]}
    assert world.push((2, "5", 1), (2, "6", 1)) == Pushed(2, 2, 0, 0)
    assert world.get(1) == {"shops.n": [6], "shops.month": [6], "users.n": [4]}


def test_what_is_kept_of_an_entity_stays_bounded(tmp_path: Path) -> None:
    """However many events are pushed, what is kept of their entity is of as many buckets as its windows have.

    What came lately is longer than declared by what one push adds, at most.
    """
    world = World(tmp_path, HOURS)
    plan, (key,) = world.plans.windows(HOURS), encode_keys([column(Int64, [1])])
    assert plan.recent is not None
    assert plan.pushed is not None
    names = [prefix + key for prefix in (plan.recent, plan.pushed, plan.records)]
    sizes, minutes = [], np.arange(60_000)
    for some in minutes.reshape(600, 100).tolist():
        assert world.push(*((1, "", minute / 1_440) for minute in some)).counted == len(some)
        sizes.append([len(row or b"") for row in world.store.read_many(names)])
    recent, pushed, records = np.max(sizes, axis=0).tolist()
    empty, widths = len(plan.codec.empty), [8 * series.width for series in plan.codec.layout.series]
    assert LONG_BYTES < recent <= LONG_BYTES + 3 * sum(widths)
    assert pushed == records == empty + 169 * widths[0] + 7 * widths[1]
    hour, day = 60_000 // 60 - 168, 60_000 // 1_440 - 6
    assert world.get(60_000 / 1_440) == {"hours.n": [60_000 - hour * 60], "hours.shops": [60_000 - day * 1_440]}


def test_a_request_of_windows_is_one_read(tmp_path: Path) -> None:
    """All windows of all views and all entities of a request are read from the store at once."""
    world = World(tmp_path, SHOPS, USERS)
    world.push((1, "x", 1), (2, "y", 1))
    plan, before = world.plans.service("all"), world.store.reads
    keys = EntityKeys.of({"user_id": [1, 2, 3], "shop": [1, 1, 2]}, plan.schema.keys)
    assert world.engine.read(plan, keys, DAY_US).to_dict() == {
        "shops.n": [2, 2, 0],
        "shops.month": [2, 2, 0],
        "users.n": [1, 1, 0],
    }
    assert world.store.reads == before + 1
