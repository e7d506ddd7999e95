"""Pushes, loads and reads of the same windows at the same time, and a process that is killed in the middle of them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve import backfill, push
from featserve.batch import Arrival, EntityKeys
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
from featserve.plan import Plans
from featserve.store import open_store, rocksdb
from featserve.types import Array, Float64, Int64, column
from tests.random_data import snapshot_of
from tests.serving import PATIENCE_S, ROOT
from tests.windows_model import DAY, HOUR, HOUR_US, MINUTE

USERS = 20
GROUP = 40
"""Events in a push; half of them are in the push before, too."""
LOADED = 100
"""Events that a load has and that are neither in another nor pushed."""
NOW_US = 1_700_000_000_000_000
EVENTS = EventSource(
    "events",
    [Field("user_id", Int64), Field("id", Int64)],
    source=ParquetSource("history.parquet", event_time="at"),
    event_id="id",
)
COUNTS = FeatureView(
    "counts",
    Entity("user", {"user_id": Int64}),
    events=EVENTS,
    aggregates=[
        Aggregate("events", "count", over=Hopping(DAY, HOUR)),
        Aggregate("ids", "sum", "id", over=Rolling(DAY, max_events=100_000), default=0),
        Aggregate("different", "distinct_count", "id", over=Rolling(DAY, max_events=100_000), max_distinct=10_000),
    ],
)
PARTS = FeatureView(
    "parts",
    COUNTS.entity,
    events=EVENTS,
    aggregates=[
        Aggregate("events", "count", over=Hopping(HOUR, MINUTE)),
        Aggregate("ids", "sum", "id", over=Hopping(HOUR, MINUTE), default=0),
        Aggregate("today", "count", over=Calendar(1, "day", "UTC")),
        Aggregate("ids_today", "sum", "id", over=Calendar(1, "day", "UTC"), default=0),
    ],
)
"""A view whose records are in two parts."""
SHORT_BYTES = 400
"""How long a recent part may be in the processes that push: that of ``PARTS`` is longer after some seven pushes."""
VIEWS = {view.name: view for view in (COUNTS, PARTS)}
SERVICE = FeatureService("counted", [COUNTS, PARTS], dtype=Float64)


def columns_of(ids: Iterable[int]) -> tuple[dict[str, Array], Array]:
    """Return the events with these ids: their columns and times. An id tells the event's user and time."""
    every = np.fromiter(ids, np.int64)
    return {"user_id": every % USERS, "id": every}, NOW_US - every // USERS % 60 * (HOUR_US // 60)


def group(number: int) -> range:
    """Return the ids of a push."""
    return range(number * GROUP // 2, number * GROUP // 2 + GROUP)


def write_history(folder: Path, number: int, shared: int) -> set[int]:
    """Write the file of a load, and return its ids: some of no other load's, and the first ``shared`` of the pushed.

    No load may have fewer of those: a push of what is loaded is a duplicate, and goes with the load.
    """
    ids = {*range(shared), *range(number * 1_000_000, number * 1_000_000 + LOADED)}
    columns, times_us = columns_of(ids)
    table = pa.table(columns | {"at": pa.array(times_us).cast(pa.timestamp("us", "UTC"))})
    pq.write_table(table, folder / "history.parquet")
    return ids


def of_users(counted: Iterable[int], in_parts: Iterable[int] | None = None) -> dict[str, list[int]]:
    """Return the features of all users where these events count; ``in_parts``: others that do in the second view."""
    every = np.fromiter(counted, np.int64)
    events = np.bincount(every % USERS, minlength=USERS).tolist()
    sums = np.zeros(USERS, np.int64)
    np.add.at(sums, every % USERS, every)
    if in_parts is not None:
        others = of_users(in_parts)
        return of_users(every) | {name: others[name] for name in others if name.startswith("parts.")}
    ids = sums.tolist()
    return {
        "counts.events": events,
        "counts.ids": ids,
        "counts.different": events,
        "parts.events": events,
        "parts.ids": ids,
        "parts.today": events,
        "parts.ids_today": ids,
    }


class Counting:
    """A store that is pushed to, loaded and read at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plans = Plans(snapshot_of([COUNTS, PARTS], [SERVICE]))
        assert [self.plans.windows(view).codec.layout.in_parts for view in (COUNTS, PARTS)] == [False, True]
        self.store = open_store(folder / "store", "write", block_cache_mb=8)
        self.engine = Engine(self.store, self.plans)

    def push(self, numbers: Iterable[int], acknowledge: Callable[[int], object]) -> None:
        """Push groups, one after the other."""
        for number in numbers:
            columns, times_us = columns_of(group(number))
            arrival = Arrival({name: column(Int64, values.tolist()) for name, values in columns.items()}, times_us)
            self.engine.push(self.plans.events("events"), arrival, now_us=NOW_US, max_future_skew_us=0)
            acknowledge(number)

    def load(self, views: Iterable[FeatureView] = (COUNTS, PARTS)) -> None:
        for view in views:
            backfill.load_windows(self.store, self.plans.windows(view), self.folder, NOW_US)

    def get(self) -> dict[str, list[int]]:
        keys = EntityKeys.of({"user_id": range(USERS)}, {"user_id": Int64})
        return self.engine.read(self.plans.service("counted"), keys, NOW_US).to_dict()


def test_pushes_loads_and_reads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While two threads push the same events and loads bring them, too, all that was acknowledged counts, once."""
    monkeypatch.setattr(push, "LONG_BYTES", SHORT_BYTES)
    counting, ended = Counting(tmp_path), threading.Event()
    certain: set[int] = set()
    possible: set[int] = set()

    def until_ended(numbers: Iterable[int]) -> Iterator[int]:
        for number in itertools.takewhile(lambda _: not ended.is_set(), numbers):
            possible.update(group(number))
            yield number

    def read() -> int:
        reads = 0
        while not ended.is_set():
            least = of_users(certain.copy())["counts.events"]
            got = counting.get()
            most = of_users(possible.copy())["counts.events"]
            assert got["counts.events"] == got["counts.different"], "an event counts twice"
            assert (got["parts.events"], got["parts.ids"]) == (got["parts.today"], got["parts.ids_today"])
            for name in ("counts.events", "parts.events"):
                assert all(map(int.__ge__, got[name], least)), "an event that was acknowledged is gone"
                assert all(map(int.__le__, got[name], most)), "an event counts that nobody pushed or loaded"
            reads += 1
        return reads

    with closing(counting.store), ThreadPoolExecutor() as pool:
        pushes = [
            pool.submit(
                counting.push,
                until_ended(itertools.count(first, 2)),
                lambda number: certain.update(group(number)),
            )
            for first in (0, 1)
        ]
        reads = pool.submit(read)
        try:
            for number in range(1, 6):
                shared = len(certain) + 10 * GROUP
                ids = write_history(tmp_path, number, shared)
                possible.update(ids)
                counting.load()
                certain.update(range(shared))
        finally:
            ended.set()
        for pushed in pushes:
            pushed.result(PATIENCE_S)
        assert reads.result(PATIENCE_S) > 5
        assert counting.get() == of_users(certain | ids)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_when_visible(store: rocksdb.RocksStore, files: list[Path], ingest: Any = rocksdb.RocksStore._ingest) -> None:
    store._write = die  # type: ignore[method-assign, assignment]
    ingest(store, files)


PLACES: dict[str, tuple[Any, str, Any]] = {
    "while it is staged": (rocksdb._Load, "_finish", die),
    "before it is visible": (rocksdb.RocksStore, "_ingest", die),
    "when it is visible": (rocksdb.RocksStore, "_ingest", die_when_visible),
    "before it removes ids": (backfill, "_forget", die),
}
"""Where a load dies: what is put in the place of a function."""


def push_and_load(folder: str, first: str, view: str, place: str) -> None:
    """Push groups from ``first`` on and tell which were acknowledged; load again and again meanwhile, until killed.

    ``view``: the one that is loaded first.
    """
    push.LONG_BYTES = SHORT_BYTES  # type: ignore[attr-defined]
    counting, some = Counting(Path(folder)), threading.Event()

    def acknowledge(number: int) -> None:
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        if number >= int(first) + 5:
            some.set()

    threading.Thread(target=counting.push, args=(itertools.count(int(first)), acknowledge), daemon=True).start()
    some.wait()
    if place in PLACES:
        owner, name, instead = PLACES[place]
        assert hasattr(owner, name)
        setattr(owner, name, instead)
    while True:
        counting.load(sorted(VIEWS.values(), key=lambda loaded: loaded.name != view))


def killed(folder: Path, first: int, view: str, place: str, seconds: float) -> int:
    """Run ``push_and_load`` until it dies, or is killed so long after its first push; return the last acknowledged."""
    script = "import sys; from tests.test_windows_at_once import push_and_load; push_and_load(*sys.argv[1:])"
    command = [sys.executable, "-c", script, str(folder), str(first), view, place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        told = [process.stdout.readline()]
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        told += process.stdout.readlines()
        assert process.wait() == -signal.SIGKILL
    return [int(line) for line in told if line.endswith("\n")][-1]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("place", "kills"), [*((place, 1) for place in PLACES), pytest.param("anywhere", 25, marks=pytest.mark.slow)]
)
def test_a_killed_load_counts_as_a_whole_or_not_at_all(
    tmp_path: Path, rng: np.random.Generator, view: str, place: str, kills: int
) -> None:
    """Killed in a load beside pushes: all of it counts or the one before it, and all that was acknowledged, once.

    Loaded and pushed again, everything does.
    """
    before, first = write_history(tmp_path, 1, 0), 0
    counting = Counting(tmp_path)
    with closing(counting.store):
        counting.load()
    for number in range(2, kills + 2):
        ids = write_history(tmp_path, number, first * GROUP // 2 + 10 * GROUP)
        last = killed(tmp_path, first, view, place, PATIENCE_S if place in PLACES else rng.random())
        counting = Counting(tmp_path)
        with closing(counting.store):
            pushed = {*itertools.chain(*map(group, range(last + 1)))}
            got = counting.get()
            assert got in [
                of_users(seen | file, seen | other)
                for seen in (pushed, pushed | {*group(last + 1)})
                for file, other in itertools.product((before, ids), repeat=2)
            ]
            counting.load()
            counting.push([last, last + 1], lambda _: None)
            assert counting.get() == of_users(pushed | {*group(last + 1)} | ids)
        before, first = ids, last + 2
