"""Windows online: whatever is pushed, loaded and restarted in any order, a read says what the naive oracle says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve import push, series
from featserve.arrow import column_to_arrow
from featserve.backfill import load_windows
from featserve.batch import Arrival, EntityKeys
from featserve.definitions import Calendar, FeatureService, FeatureView, Hopping, ParquetSource, Rolling, Window
from featserve.engine import Engine
from featserve.errors import InvalidRequest
from featserve.offline import open_engine
from featserve.plan import Plans
from featserve.store import OnlineStore, open_store
from featserve.store.memory import MemoryStore
from featserve.training import training_frame
from featserve.types import NEVER_US, Float64, Timestamp, Type, column, from_us, to_us
from tests.random_data import snapshot_of
from tests.windows_model import (
    HOUR_US,
    POOLS,
    TYPES,
    WEEKS,
    WEEKS_KEPT,
    WINDOWS,
    Answer,
    Event,
    History,
    answers,
    distinct,
    edge_history,
    every_aggregate,
    make_history,
    make_view,
    start_us,
)

FOREVER_US = 2**61
SHORT = (Rolling(timedelta(hours=1)), Hopping(timedelta(hours=2), timedelta(hours=1)), Calendar(1, "day", "UTC"))
"""Windows that many events of a history come too late for."""
PUSHED_FROM = 1_000
"""The first sequence number of what is pushed: behind all rows of a file."""
HISTORY = ParquetSource("history.parquet", event_time="event_time", known_at="known_at")


def columns_of(types: dict[str, Type], events: Sequence[Event]) -> dict[str, Any]:
    """Return the fields of events as columns."""
    return {
        name: column(type_, [from_us(v) if type_ is Timestamp and v is not None else v for v in values])
        for name, type_ in types.items()
        for values in [[e.values[name] for e in events]]
    }


def arrival_of(types: dict[str, Type], events: Sequence[Event]) -> Arrival:
    """Return events as they are pushed."""
    times = (np.array([getattr(e, name) for e in events]) for name in ("event_time_us", "known_at_us", "sequence"))
    return Arrival(columns_of(types, events), *times)


def write_history(folder: Path, types: dict[str, Type], events: Sequence[Event]) -> None:
    """Write events to the file that ``HISTORY`` names."""
    table = {name: column_to_arrow(col) for name, col in columns_of(types, events).items()}
    for name in ("event_time", "known_at"):
        table[name] = pa.array([getattr(e, f"{name}_us") for e in events], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table(table), folder / "history.parquet")


def check(
    view: FeatureView, events: Sequence[Event], keys: Sequence[Any], time_us: int, got: Mapping[str, Sequence[Any]]
) -> list[int]:
    """Hold what is read of some entities at an instant against the oracle; return the event times that it gives."""
    times = []
    for i, key in enumerate(keys):
        newest, expected = answers(view, events, key, time_us)
        times.append(NEVER_US if newest is None else newest)
        for aggregate in view.aggregates:
            value = got[f"{view.name}.{aggregate.name}"][i]
            value = to_us(value) if isinstance(value, datetime) else value
            assert expected[aggregate.name].agrees(value), (key, time_us, aggregate, value, expected[aggregate.name])
    return times


class Counted:
    """What counts in one view: the events that were pushed, and those of the newest load."""

    def __init__(self, view: FeatureView) -> None:
        assert view.events is not None
        self.view, self.has_ids = view, view.events.event_id is not None
        self.pushed: list[Event] = []
        self.loaded: list[Event] = []
        self.copies: list[Event] = []
        """The events of the newest load, those among them that do not count."""

    def key(self, event: Event) -> tuple[Any, ...]:
        """Return the key of an event's entity."""
        return tuple(event.values[name] for name in self.view.entity.keys)

    def held(self, events: Sequence[Event], others: Sequence[Event], now_us: int) -> list[Event]:
        """Return which events a window may hold at or after the newest one of their entity, ``others`` among them."""
        newest: dict[tuple[Any, ...], int] = {}
        for event in (*events, *others):
            if event.available[0] <= now_us:
                newest[self.key(event)] = max(event.event_time_us, newest.get(self.key(event), NEVER_US))
        starts = {key: min(start_us(a.over, time_us) for a in self.view.aggregates) for key, time_us in newest.items()}
        return [event for event in events if event.event_time_us >= starts.get(self.key(event), NEVER_US)]

    def first_ones(self, events: Sequence[Event], known: set[str]) -> list[Event]:
        """Return the events of the view whose id is not known, of those with one id the first to be available."""
        first = []
        for event in sorted(events, key=lambda event: event.available):
            if None not in self.key(event) and not (self.has_ids and event.values["event_id"] in known):
                first.append(event)
                known = known | {event.values["event_id"]}
        return first

    def push(self, come: Sequence[Event], now_us: int) -> list[Event]:
        """Take a push; return which events of it count: the first with an id that is new, unless they are late."""
        fresh = self.first_ones(come, ids_of([*self.pushed, *self.loaded]))
        counted = self.held(fresh, [*self.pushed, *self.loaded], now_us)
        self.pushed += counted
        return counted

    def load(self, come: Sequence[Event], now_us: int) -> None:
        """Take a load in place of the one before it; of the copies of an id the first counts that a window may hold."""
        self.copies = [e for e in come if e.available[0] <= now_us and None not in self.key(e)]
        held = self.held(self.copies, [], now_us) if self.has_ids else self.copies
        self.loaded = self.first_ones(held, ids_of(self.pushed))

    def all(self) -> list[Event]:
        """Return the events that count, those of the newest load that no window may hold any more among them."""
        counted = [*self.pushed, *self.loaded]
        return counted + (self.first_ones(self.copies, ids_of(counted)) if self.has_ids else [])

    def unsure(self, now_us: int) -> set[str]:
        """Return the ids of events that no window holds any more, of which it is not told how long they are known."""
        known = ids_of(self.held(self.pushed, [], now_us)) | ids_of(self.held(self.loaded, self.pushed, now_us))
        return ids_of([*self.pushed, *self.loaded]) - known

    def known_since_us(self, key: tuple[Any, ...], now_us: int) -> int:
        """Return the earliest instant that can be asked for of an entity."""
        counted = [e.available[0] for e in (*self.pushed, *self.loaded) if self.key(e) == key]
        times = [t for t in counted if t <= now_us] + [e.event_time_us for e in self.copies if self.key(e) == key]
        return max(times, default=NEVER_US)


def ids_of(events: Sequence[Event]) -> set[str]:
    return {e.values["event_id"] for e in events}


class Online:
    """A store, an engine and a file of history under two views of one source, beside what counts in each.

    ``in_parts``: the first is a view whose records may be kept in two parts, and often no event has to wait.
    """

    def __init__(self, rng: np.random.Generator, folder: Path, in_parts: bool) -> None:
        self.rng, self.folder = rng, folder
        windows = SHORT if rng.random() < 0.5 else WINDOWS
        self.history = make_history(rng, source=HISTORY, windows=windows, in_parts=in_parts)
        source = self.history.view.events
        assert source is not None
        beside = replace(make_view(rng, windows), name="beside", events=source, features=())
        views = [self.history.view, beside]
        self.views = [Counted(view) for view in views]
        self.types, self.has_ids = source.types, source.event_id is not None
        named = {"one": views[:1], "other": views[1:], "both": views}
        services = [FeatureService(name, parts, dtype=Float64) for name, parts in named.items()]
        self.plans = Plans(snapshot_of(views, services))
        self.store: OnlineStore = self.opened()
        self.instants = [t for t, _ in self.history.asked]
        self.clocks = sorted(self.instants)[rng.integers(len(self.instants) // (1 if in_parts else 2)) :]
        self.now_us = self.clocks[0]
        self.sent, self.written, self.arrived, self.answered = 0, 0, PUSHED_FROM, 0

    def opened(self) -> OnlineStore:
        return open_store(self.folder / "store", "write", block_cache_mb=8)

    def step(self) -> None:
        """Do one thing of all that can happen."""
        steps = [self.push, self.materialize, self.read, self.wait, self.restart]
        steps[self.rng.choice(len(steps), p=[0.25, 0.2, 0.4, 0.1, 0.05])]()

    def push(self) -> None:
        """Push the next events; or some that were pushed or loaded before, as they were or not, where an id tells."""
        events = int(self.rng.integers(1, 10))
        come = self.history.events[self.sent : self.sent + events]
        self.sent += len(come)
        known = [e for view in self.views for e in (*view.pushed, *view.loaded)]
        known += self.history.events[: max(self.sent, self.written)]
        if self.has_ids and known and self.rng.random() < 0.7:
            come += self.some_changed([known[i] for i in self.rng.integers(len(known), size=events)], self.part())
        come = self.sure(come)
        if not come:
            return
        come = [replace(e, sequence=self.arrived + i) for i, e in enumerate(come)]
        self.arrived += len(come)
        engine = Engine(self.store, self.plans)
        done = engine.push(
            self.plans.events("events"),
            arrival_of(self.types, come),
            now_us=self.now_us,
            max_future_skew_us=FOREVER_US - self.now_us,
        )
        counted = {id(e) for view in self.views for e in view.push(come, self.now_us)}
        assert (done.events, done.counted) == (len(come), len(counted))
        assert done.counted + done.duplicates + done.late == sum(
            any(None not in view.key(e) for view in self.views) for e in come
        )

    def materialize(self) -> None:
        """Load a history that has some more of the events, pushed or not; those not yet visible are left out.

        It may have dropped some since the last load, corrected others, and hold some more than once.
        """
        self.written = min(self.written + int(self.rng.integers(20)), len(self.history.events))
        dropped, repeated = self.rng.choice([0.0, 0.0, 0.3, 1.0]), self.part()
        come = [e for e in self.history.events[: self.written] if self.rng.random() >= dropped]
        come = self.some_changed(come, self.part())
        if self.has_ids:
            come += self.some_changed([e for e in come if self.rng.random() < repeated], 1.0)
        come = self.sure(come)
        come = [replace(e, sequence=position) for position, e in enumerate(come)]
        write_history(self.folder, self.types, come)
        counted = self.views[self.rng.integers(len(self.views))]
        done = load_windows(self.store, self.plans.windows(counted.view), self.folder, self.now_us)
        assert done.rows_read == len(come)
        counted.load(come, self.now_us)

    def part(self) -> float:
        return float(self.rng.choice([0.0, 0.3]))

    def some_changed(self, events: Sequence[Event], part: float) -> list[Event]:
        """Return events, some of them at a later time, with the values of others, and maybe of another entity."""
        unsure = {name for view in self.views for name in view.unsure(self.now_us)}
        later_us = int(self.rng.choice([0, 1, HOUR_US, 24 * HOUR_US, 240 * HOUR_US]))
        kept = {"event_id"} if self.rng.random() < 0.3 else {"event_id", "user_id", "region"}
        made = []
        for e in events:
            other = self.history.events[self.rng.integers(len(self.history.events))].values
            if self.rng.random() < part and e.values["event_id"] not in unsure:
                times = {"event_time_us": e.event_time_us + later_us, "known_at_us": e.known_at_us + later_us}
                made.append(replace(e, **times, values={**other, **{name: e.values[name] for name in kept}}))
            else:
                made.append(e)
        return made

    def sure(self, events: Sequence[Event]) -> list[Event]:
        """Return events without those that a view may take for new: it knew the id, of another event than this."""
        if not self.has_ids:
            return list(events)
        left = list(events)
        for view in self.views:
            unsure, known = view.unsure(self.now_us), [*view.pushed, *view.loaded]
            same = {(e.values["event_id"], e.event_time_us, view.key(e)) for e in known}
            left = [
                e
                for e in left
                if e.values["event_id"] not in unsure or (e.values["event_id"], e.event_time_us, view.key(e)) in same
            ]
        return left

    def restart(self) -> None:
        """Close the store and open it again."""
        self.store.close()
        self.store = self.opened()

    def wait(self) -> None:
        """Let time pass, up to one of the next instants that something begins or ends at."""
        self.clocks = self.clocks[self.rng.integers(1, 12) :] or self.clocks[-1:]
        self.now_us = self.clocks[0]

    def read(self, time_us: int | None = None) -> None:
        """Read some entities as of an instant, or of any up to now: what is answered is what the oracle says.

        Refused are only instants before the newest event that counts, or copy of one in the file.
        """
        if time_us is None:
            time_us = min(self.instants[self.rng.integers(len(self.instants))], self.now_us)
        name = ("one", "other", "both")[self.rng.integers(3)]
        views = {"one": self.views[:1], "other": self.views[1:], "both": self.views}[name]
        plan = self.plans.service(name)
        names = plan.schema.keys
        entities = list(product(*([v for v in dict.fromkeys(POOLS[name]) if v is not None] for name in names)))
        rows = [dict(zip(names, entity, strict=True)) for entity in self.some(entities)]
        keys = [[tuple(row[name] for name in counted.view.entity.keys) for row in rows] for counted in views]
        given = EntityKeys.of({name: [row[name] for row in rows] for name in names}, names)
        try:
            matrix = Engine(self.store, self.plans).read(plan, given, time_us, as_of=True, event_times=True)
        except InvalidRequest:
            known = (c.known_since_us(key, self.now_us) for c, own in zip(views, keys, strict=True) for key in own)
            assert time_us < max(known)
            return
        self.answered += 1
        got = matrix.to_dict()
        assert (matrix.view_status == 1).all()
        assert matrix.event_times is not None
        for n, (counted, own) in enumerate(zip(views, keys, strict=True)):
            newest = check(counted.view, counted.all(), own, time_us, got)
            assert matrix.event_times[:, n].tolist() == newest

    def some(self, entities: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Return one or two entities, or all."""
        return entities if self.rng.random() < 0.2 else [entities[i] for i in self.rng.integers(len(entities), size=2)]


@pytest.mark.parametrize("number", [*range(12), *(pytest.param(n, marks=pytest.mark.slow) for n in range(12, 200))])
@pytest.mark.parametrize("in_parts", [False, True])
def test_any_order_of_pushes_loads_and_reads(
    seed: int, number: int, in_parts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is pushed, loaded, corrected, repeated and restarted, a push and a read say what the oracle says."""
    rng = np.random.default_rng([seed, number])
    long_bytes = int(rng.choice([110, 160, 220]))
    for module in (series, push):
        monkeypatch.setattr(module, "LONG_BYTES", long_bytes)
    online = Online(rng, tmp_path, in_parts)
    try:
        for _ in range(5):
            for _ in range(8):
                online.step()
            online.read(online.now_us)
        assert online.answered >= 5
    finally:
        online.store.close()


@pytest.mark.parametrize(("window", "in_parts"), WEEKS_KEPT, ids=str)
def test_every_function_over_every_kind(
    rng: np.random.Generator, tmp_path: Path, window: Window, in_parts: bool
) -> None:
    """Each aggregate of each column that it takes, over each kind of window, pushed and loaded, is the oracle's."""
    history = make_history(rng, events=150, windows=[window], source=HISTORY)
    view = replace(history.view, aggregates=every_aggregate(window, in_parts), features=())
    plans = Plans(snapshot_of([view], [FeatureService("windows", [view], dtype=Float64)]))
    assert plans.windows(view).codec.layout.in_parts == in_parts
    assert view.events is not None
    events = [replace(e, sequence=position) for position, e in enumerate(distinct(view, history.events))]
    pushed_us, half = NEVER_US, len(events) // 2
    write_history(tmp_path, view.events.types, events[:half])
    keys = list(dict.fromkeys(key for _, key in history.asked if None not in key))
    given = EntityKeys.of({n: [key[i] for key in keys] for i, n in enumerate(view.entity.keys)}, view.entity.keys)
    for time_us in sorted({t for t, _ in history.asked})[::6]:
        with closing(open_store(tmp_path / "store", "write", block_cache_mb=8)) as store:
            come = [e for e in events[half:] if pushed_us < e.available[0] <= time_us]
            for some in np.array_split(rng.permutation(len(come)), 3):
                arrival = arrival_of(view.events.types, [come[i] for i in some])
                Engine(store, plans).push(plans.events("events"), arrival, now_us=time_us, max_future_skew_us=0)
            load_windows(store, plans.windows(view), tmp_path, time_us)
            pushed_us = time_us
        with closing(open_store(tmp_path / "store", "read", block_cache_mb=8)) as store:
            got = Engine(store, plans).read(plans.service("windows"), given, time_us, as_of=True).to_dict()
        check(view, events, keys, time_us, got)


def test_edges_at_clock_changes(rng: np.random.Generator) -> None:
    """At each clock change of a zone's year windows of every kind begin and end at the oracle's microsecond.

    Events are pushed in any order, as soon as they are available.
    """
    history = edge_history(HISTORY)
    view, service = history.view, FeatureService("windows", [history.view], dtype=Float64)
    plans = Plans(snapshot_of([view], [service]))
    pushed_us, store = NEVER_US, MemoryStore()
    for time_us in sorted({t for t, _ in history.asked}):
        engine, keys = Engine(store, plans), [key for t, key in history.asked if t == time_us]
        come = [e for e in history.events if pushed_us < e.available[0] <= time_us]
        if come:
            arrival = arrival_of(TYPES, [come[i] for i in rng.permutation(len(come))])
            engine.push(plans.events("events"), arrival, now_us=time_us, max_future_skew_us=0)
        pushed_us = time_us
        given = EntityKeys.of({"user_id": [key[0] for key in keys]}, view.entity.keys)
        got = engine.read(plans.service("windows"), given, time_us, as_of=True).to_dict()
        check(view, history.events, keys, time_us, got)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("kept_in", ["memory", "rocksdb"])
def test_the_served_value_is_the_training_value(
    tmp_path: Path, rng: np.random.Generator, kept_in: str, every: bool
) -> None:
    """At one instant, records of events that were pushed or loaded by then hold what a training frame has at it.

    Events that have an id are pushed with their copies, and again. ``every``: each aggregate over each kind of window,
    else random ones. Sums, means and deviations of floats as nearly as the contract says, all else exactly.
    """
    for number in range(1 if every else 3):
        history = make_history(rng, source=HISTORY, asked=24 if every else 60)
        if every:
            made = [replace(a, name=f"{a.name}_{n}") for n, week in enumerate(WEEKS) for a in every_aggregate(week)]
            history = replace(history, view=replace(history.view, aggregates=made, features=()))
        path = tmp_path / f"store {number}"
        store: OnlineStore = MemoryStore() if kept_in == "memory" else open_store(path, "write", block_cache_mb=8)
        with closing(store):
            serve_and_train(rng, history, store, tmp_path)


def serve_and_train(rng: np.random.Generator, history: History, store: OnlineStore, folder: Path) -> None:
    """Push, load and read a history at instants one after the other, and hold what is read against a training frame."""
    view, service = history.view, FeatureService("windows", [history.view], dtype=Float64)
    assert view.events is not None
    write_history(folder, view.events.types, history.events)
    plans = Plans(snapshot_of([view], [service]))
    asked = sorted({t for t, _ in history.asked})[::6]
    keys = list(dict.fromkeys(key for _, key in history.asked if None not in key))
    given = {name: [key[i] for key in keys] for i, name in enumerate(view.entity.keys)}
    labels = {name: values * len(asked) for name, values in given.items()}
    labels["at"] = [from_us(t) for t in asked for _ in keys]
    with closing(open_engine("duckdb")) as offline:
        frame = training_frame(offline, service, labels, "at", root=folder).to_pydict()
    engine, pushable = Engine(store, plans), history.events if view.events.event_id else []
    for n, time_us in enumerate(asked):
        ids = {id_ for id_ in sorted(ids_of(pushable)) if rng.random() < 0.3}
        come = [e for e in pushable if e.values["event_id"] in ids and e.available[0] <= time_us]
        for repeated in (come, come[::2]) if come else ():
            arrival = arrival_of(view.events.types, [repeated[i] for i in rng.permutation(len(repeated))])
            engine.push(plans.events("events"), arrival, now_us=time_us, max_future_skew_us=0)
        load_windows(store, plans.windows(view), folder, time_us)
        matrix = engine.read(plans.service("windows"), EntityKeys.of(given, view.entity.keys), time_us, as_of=True)
        served = matrix.to_dict()
        for i, key in enumerate(keys):
            _, expected = answers(view, history.events, key, time_us)
            for f in view.features:
                name = f"{view.name}.{f.name}"
                trained = Answer(frame[name][n * len(keys) + i], expected[f.name].slack)
                assert trained.agrees(served[name][i]), (time_us, key, name, trained, served[name][i])
