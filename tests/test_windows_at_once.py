"""Pushes, loads and reads of the same windows at the same time, and a process that is killed in the middle of them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve import backfill
from featserve.batch import Arrival, EntityKeys
from featserve.definitions import (
    Aggregate,
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
from tests.windows_model import DAY, HOUR, HOUR_US

USERS = 20
GROUP = 40
"""Events in a push; half of them are in the push before, too."""
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
SERVICE = FeatureService("counted", [COUNTS], dtype=Float64)


def columns_of(ids: Iterable[int]) -> tuple[dict[str, Array], Array]:
    """Return the events with these ids: their columns and times. An id tells the event's user and time."""
    every = np.fromiter(ids, np.int64)
    return {"user_id": every % USERS, "id": every}, NOW_US - every % 60 * (HOUR_US // 60)


def group(number: int) -> range:
    """Return the ids of a push."""
    return range(number * GROUP // 2, number * GROUP // 2 + GROUP)


def write_history(folder: Path, number: int, shared: int) -> set[int]:
    """Write the file of a load, and return its ids: some of no other load's, and the first ``shared`` of the pushed.

    No load may have fewer of those: a push of what is loaded is a duplicate, and goes with the load.
    """
    ids = {*range(shared), *range(number * 1_000_000, number * 1_000_000 + 500)}
    columns, times_us = columns_of(ids)
    table = pa.table(columns | {"at": pa.array(times_us).cast(pa.timestamp("us", "UTC"))})
    pq.write_table(table, folder / "history.parquet")
    return ids


def of_users(ids: Iterable[int]) -> dict[str, list[int]]:
    """Return the features of all users where these events count."""
    every = np.fromiter(ids, np.int64)
    events = np.bincount(every % USERS, minlength=USERS).tolist()
    sums = np.zeros(USERS, np.int64)
    np.add.at(sums, every % USERS, every)
    return {"counts.events": events, "counts.ids": sums.tolist(), "counts.different": events}


class Counting:
    """A store that is pushed to, loaded and read at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plans = Plans(snapshot_of([COUNTS], [SERVICE]))
        self.store = open_store(folder / "store", "write", block_cache_mb=8)
        self.engine = Engine(self.store, self.plans)

    def push(self, numbers: Iterable[int], acknowledge: Callable[[int], object]) -> None:
        """Push groups, one after the other."""
        for number in numbers:
            columns, times_us = columns_of(group(number))
            arrival = Arrival({name: column(Int64, values.tolist()) for name, values in columns.items()}, times_us)
            self.engine.push(self.plans.events("events"), arrival, now_us=NOW_US, max_future_skew_us=0)
            acknowledge(number)

    def load(self) -> None:
        backfill.load_windows(self.store, self.plans.windows(COUNTS), self.folder, NOW_US)

    def get(self) -> dict[str, list[int]]:
        keys = EntityKeys.of({"user_id": range(USERS)}, {"user_id": Int64})
        return self.engine.read(self.plans.service("counted"), keys, NOW_US).to_dict()


def test_pushes_loads_and_reads_at_once(tmp_path: Path) -> None:
    """While two threads push the same events and loads bring them, too, all that was acknowledged counts, once."""
    counting, ended = Counting(tmp_path), threading.Event()
    certain: set[int] = set()

    def until_ended(numbers: Iterable[int]) -> Iterable[int]:
        return itertools.takewhile(lambda _: not ended.is_set(), numbers)

    def read() -> int:
        reads = 0
        while not ended.is_set():
            least = of_users(certain.copy())["counts.events"]
            got = counting.get()
            assert got["counts.events"] == got["counts.different"], "an event counts twice"
            assert all(map(int.__ge__, got["counts.events"], least)), "an event that was acknowledged is gone"
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
                counting.load()
                certain.update(range(shared))
        finally:
            ended.set()
        for push in pushes:
            push.result(PATIENCE_S)
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


def push_and_load(folder: str, first: str, place: str) -> None:
    """Push groups from ``first`` on and tell which were acknowledged; load again and again meanwhile, until killed."""
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
        counting.load()


def killed(folder: Path, first: int, place: str, seconds: float) -> int:
    """Run ``push_and_load`` until it dies, or is killed so long after its first push; return the last acknowledged."""
    script = "import sys; from tests.test_windows_at_once import push_and_load; push_and_load(*sys.argv[1:])"
    command = [sys.executable, "-c", script, str(folder), str(first), place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        told = [process.stdout.readline()]
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        told += process.stdout.readlines()
        assert process.wait() == -signal.SIGKILL
    return [int(line) for line in told if line.endswith("\n")][-1]


@pytest.mark.parametrize(
    ("place", "kills"), [*((place, 1) for place in PLACES), pytest.param("anywhere", 25, marks=pytest.mark.slow)]
)
def test_a_killed_load_counts_as_a_whole_or_not_at_all(
    tmp_path: Path, rng: np.random.Generator, place: str, kills: int
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
        last = killed(tmp_path, first, place, PATIENCE_S if place in PLACES else rng.random())
        counting = Counting(tmp_path)
        with closing(counting.store):
            pushed = {*itertools.chain(*map(group, range(last + 1)))}
            got = counting.get()
            assert got in [
                of_users(seen | file) for seen in (pushed, pushed | {*group(last + 1)}) for file in (before, ids)
            ]
            counting.load()
            counting.push([last, last + 1], lambda _: None)
            assert counting.get() == of_users(pushed | {*group(last + 1)} | ids)
        before, first = ids, last + 2
