"""Windows online: whatever is pushed, loaded and restarted in any order, a read says what the naive oracle says."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from featserve.arrow import column_to_arrow
from featserve.backfill import load_windows
from featserve.batch import Arrival, EntityKeys
from featserve.definitions import Calendar, FeatureService, Hopping, ParquetSource, Rolling
from featserve.engine import Engine
from featserve.offline import open_engine
from featserve.plan import Plans
from featserve.store import OnlineStore, open_store
from featserve.store.memory import MemoryStore
from featserve.training import training_frame
from featserve.types import NEVER_US, Float64, Timestamp, Type, column, from_us, to_us
from tests.random_data import snapshot_of
from tests.windows_model import HOUR_US, WINDOWS, Event, answers, make_history, start_us

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


def write_history(folder: Path, types: dict[str, Type], events: Sequence[Event]) -> None:
    """Write events to the file that ``HISTORY`` names."""
    table = {name: column_to_arrow(col) for name, col in columns_of(types, events).items()}
    for name in ("event_time", "known_at"):
        table[name] = pa.array([getattr(e, f"{name}_us") for e in events], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table(table), folder / "history.parquet")


class Online(RuleBasedStateMachine):
    """A store, an engine and a file of history, beside all events that count, pushed or of the newest load."""

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.history = make_history(self.rng, source=HISTORY, windows=SHORT if seed % 2 else WINDOWS)
        self.view = self.history.view
        assert self.view.events is not None
        self.types, self.has_ids = self.view.events.types, self.view.events.event_id is not None
        self.folder = tempfile.TemporaryDirectory()
        self.plans = Plans(snapshot_of([self.view], [FeatureService("windows", [self.view], dtype=Float64)]))
        self.store: OnlineStore = open_store(Path(self.folder.name) / "store", "write", block_cache_mb=8)
        self.clocks = sorted(t for t, _ in self.history.asked)
        self.now_us = self.clocks.pop(0)
        self.sent = self.written = 0
        self.pushed: list[Event] = []
        self.loaded: list[Event] = []

    def key(self, event: Event) -> tuple[Any, ...]:
        """Return the key of an event's entity."""
        return tuple(event.values[name] for name in self.view.entity.keys)

    def counted(self, come: Sequence[Event]) -> list[Event]:
        """Return which events of a push count: the first with an id that is new, unless no window holds it any more."""
        fresh = []
        known = {e.values["event_id"] for e in (*self.pushed, *self.loaded)} if self.has_ids else set()
        for event in sorted(come, key=lambda event: event.available):
            if None not in self.key(event) and event.values["event_id"] not in known:
                fresh.append(event)
                known |= {event.values["event_id"]} if self.has_ids else set()
        newest: dict[tuple[Any, ...], int] = {}
        for event in (*self.pushed, *self.loaded, *fresh):
            if event.available[0] <= self.now_us:
                newest[self.key(event)] = max(event.event_time_us, newest.get(self.key(event), NEVER_US))
        starts = {key: min(start_us(a.over, time_us) for a in self.view.aggregates) for key, time_us in newest.items()}
        return [event for event in fresh if event.event_time_us >= starts.get(self.key(event), NEVER_US)]

    @rule(events=st.integers(1, 20), again=st.booleans())
    def push(self, events: int, again: bool) -> None:
        """Push the next events; or some that were pushed or loaded before, where an id tells."""
        come = self.history.events[self.sent : self.sent + events]
        self.sent += len(come)
        before = self.history.events[: max(self.sent, self.written)]
        if again and self.has_ids and before:
            come += [before[i] for i in self.rng.integers(len(before), size=events)]
        come = [replace(e, sequence=PUSHED_FROM + e.sequence) for e in come]
        if not come:
            return
        arrival = Arrival(
            columns_of(self.types, come),
            np.array([e.event_time_us for e in come]),
            np.array([e.known_at_us for e in come]),
            np.array([e.sequence for e in come]),
        )
        engine = Engine(self.store, self.plans)
        done = engine.push(
            self.plans.events("events"), arrival, now_us=self.now_us, max_future_skew_us=FOREVER_US - self.now_us
        )
        counted = self.counted(come)
        assert (done.events, done.counted) == (len(come), len(counted))
        assert done.counted + done.duplicates + done.late == sum(None not in self.key(e) for e in come)
        self.pushed += counted

    @rule(events=st.integers(0, 20), dropped=st.sampled_from([0.0, 0.0, 0.3, 1.0]), changed=st.sampled_from([0.0, 0.3]))
    def materialize(self, events: int, dropped: float, changed: float) -> None:
        """Load a history that has some more of the events, pushed or not; those not yet visible are left out.

        It may have dropped some since the last load, and corrected others: what was not pushed, to a later time.
        """
        self.written = min(self.written + events, len(self.history.events))
        come = [e for e in self.history.events[: self.written] if self.rng.random() >= dropped]
        pushed = {e.values["event_id"] for e in self.pushed}
        names = {e.values["event_id"] for e in come if self.rng.random() < changed} - pushed
        later_us = int(self.rng.choice([0, 1, HOUR_US, 240 * HOUR_US]))
        come = [self.corrected(e, later_us) if e.values["event_id"] in names else e for e in come]
        come = [replace(e, sequence=position) for position, e in enumerate(come)]
        write_history(Path(self.folder.name), self.types, come)
        done = load_windows(self.store, self.plans.windows(self.view), Path(self.folder.name), self.now_us)
        assert done.rows_read == len(come)
        self.loaded = [
            e
            for e in come
            if e.available[0] <= self.now_us
            and None not in self.key(e)
            and not (self.has_ids and e.values["event_id"] in pushed)
        ]

    def corrected(self, event: Event, later_us: int) -> Event:
        """Return an event at a later time, with the values of another one."""
        other = self.history.events[self.rng.integers(len(self.history.events))].values
        values = {**other, **{name: event.values[name] for name in ("user_id", "region", "event_id")}}
        return replace(
            event,
            event_time_us=event.event_time_us + later_us,
            known_at_us=event.known_at_us + later_us,
            values=values,
        )

    @rule()
    def restart(self) -> None:
        """Close the store and open it again."""
        self.store.close()
        self.store = open_store(Path(self.folder.name) / "store", "write", block_cache_mb=8)

    @rule()
    def wait(self) -> None:
        """Let time pass."""
        if self.clocks:
            self.now_us = self.clocks.pop(0)

    @rule(back=st.floats(0, 1))
    def read(self, back: float) -> None:
        """Read every entity as of now, or of an instant since the last event that counts; ask the oracle the same."""
        counting = [*self.pushed, *self.loaded]
        last_us = max((e.available[0] for e in counting if e.available[0] <= self.now_us), default=self.now_us)
        time_us = self.now_us - int(back * (self.now_us - last_us))
        keys = list(dict.fromkeys(key for _, key in self.history.asked if None not in key))
        if not keys:
            return
        names = list(self.view.entity.keys)
        given = {name: [key[i] for key in keys] for i, name in enumerate(names)}
        matrix = Engine(self.store, self.plans).read(
            self.plans.service("windows"),
            EntityKeys.of(given, self.view.entity.keys),
            time_us,
            as_of=True,
            event_times=True,
        )
        got = matrix.to_dict()
        assert (matrix.view_status == 1).all()
        assert matrix.event_times is not None
        for i, key in enumerate(keys):
            newest, expected = answers(self.view, counting, key, time_us)
            assert matrix.event_times[i, 0] == (NEVER_US if newest is None else newest)
            for aggregate in self.view.aggregates:
                value = got[f"windowed.{aggregate.name}"][i]
                value = to_us(value) if isinstance(value, datetime) else value
                assert expected[aggregate.name].agrees(value), (key, time_us, aggregate, value, expected)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


Online.TestCase.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestOnline = Online.TestCase


def same(a: Any, b: Any) -> bool:
    """Say whether two values are one, floats to their ninth digit: how far sums may be apart, other tests hold."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (np.isnan(a) and np.isnan(b)) or bool(np.isclose(a, b, rtol=1e-9, atol=1e-9))
    return bool(a == b)


def test_the_served_value_is_the_training_value(tmp_path: Path, rng: np.random.Generator) -> None:
    """At one instant, records that were loaded as of it hold what a training frame has at it."""
    for _ in range(3):
        history = make_history(rng, source=HISTORY)
        view, service = history.view, FeatureService("windows", [history.view], dtype=Float64)
        assert view.events is not None
        write_history(tmp_path, view.events.types, history.events)
        plans, store = Plans(snapshot_of([view], [service])), MemoryStore()
        asked = sorted({t for t, _ in history.asked})[::6]
        keys = list(dict.fromkeys(key for _, key in history.asked if None not in key))
        given = {name: [key[i] for key in keys] for i, name in enumerate(view.entity.keys)}
        labels = {name: values * len(asked) for name, values in given.items()}
        labels["at"] = [from_us(t) for t in asked for _ in keys]
        with closing(open_engine("duckdb")) as engine:
            frame = training_frame(engine, service, labels, "at", root=tmp_path).to_pydict()
        for n, time_us in enumerate(asked):
            load_windows(store, plans.windows(view), tmp_path, time_us)
            matrix = Engine(store, plans).read(
                plans.service("windows"), EntityKeys.of(given, view.entity.keys), time_us, as_of=True
            )
            for name, values in matrix.to_dict().items():
                trained = frame[name][n * len(keys) : (n + 1) * len(keys)]
                assert all(map(same, values, trained)), (time_us, name, values, trained)
