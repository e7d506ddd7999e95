"""Parity: the vector served at T is the training row at T, to the last bit, for every type and through transforms.

One random history is written online in the order of its arrival up to T, and asked with as_of=T; and it is joined to
labels at T from its source. Values, statuses and event times are compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import featserve
from featserve.batch import EntityKeys, EventBatch
from featserve.config import load_config
from featserve.definitions import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    ParquetSource,
    RequestColumn,
    RequestTime,
)
from featserve.engine import Engine
from featserve.errors import TransformError
from featserve.materialize import load
from featserve.matrix import FeatureMatrix
from featserve.offline import OfflineEngine
from featserve.plan import Plans
from featserve.registry import Registry
from featserve.store.memory import MemoryStore
from featserve.types import Column, Float64, Int64, column, from_us
from featserve.wire import encode_rows
from tests.declarations import declare
from tests.parity_world import BASE_US, World, arrival_of, compare, make_world
from tests.random_data import Random, snapshot_of
from tests.serving import TRANSPORTS, Project, Server
from tests.training_world import ACTIVITY, FEATURES, LABELS, frame_of, write_sources
from tests.transforms import made


class Replay:
    """Answers in process: what has arrived by T is written to a store, and asked as of T.

    It goes on from the instant before, or starts afresh: with single rows and batches in any order, or a bulk load.
    """

    def __init__(self, rng: Random, world: World) -> None:
        self.rng, self.world = rng, world
        self.plans = Plans(snapshot_of(world.service.views, [world.service]))
        self.plan = self.plans.service(world.service.id)
        self.start()

    def start(self) -> None:
        self.engine = Engine(MemoryStore(), self.plans)
        self.until_us = -(2**62)

    def __call__(self, at_us: int, keys: dict[str, Column], request: dict[str, Column]) -> FeatureMatrix:
        if self.rng.random() < 0.3:
            self.start()
        for view in self.world.service.views:
            plan = self.plans.view(view.id)
            if self.rng.random() < 0.2:
                load(self.engine.store, plan, self.world.root, at_us)
                continue
            batch = self.world.arrivals(view, self.until_us, at_us)
            for part in shuffled(self.rng, batch):
                self.engine.write(plan, arrival_of(part), now_us=at_us, max_future_skew_us=0)
        self.until_us = at_us
        asked = EntityKeys.of(keys, self.world.service.keys)
        return self.engine.read(self.plan, asked, at_us, request_columns=request, event_times=True)


def shuffled(rng: Random, batch: EventBatch) -> Iterator[EventBatch]:
    """Yield the rows in any order, in parts of any size."""
    order = rng.permutation(len(batch))
    while len(order):
        size = int(rng.integers(1, len(order) + 1))
        yield batch.take(order[:size])
        order = order[size:]


@pytest.mark.parametrize("trial", range(5))
def test_what_is_served_is_what_is_trained_on(
    trial: int, seed: int, duckdb_engine: OfflineEngine, tmp_path: Path
) -> None:
    """In small random worlds every cell of the frame is the bits that were served at the label's time."""
    rng = np.random.default_rng([seed, trial])
    world = make_world(rng, tmp_path)
    assert compare(world, duckdb_engine, Replay(rng, world)) > 1_000


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(100, 112))
def test_large_worlds_agree(trial: int, seed: int, duckdb_engine: OfflineEngine, tmp_path: Path) -> None:
    """The same for larger worlds: with the others, more than a million cells."""
    rng = np.random.default_rng([seed, trial])
    world = make_world(rng, tmp_path, views=6, rows=300, labels=1_500)
    assert compare(world, duckdb_engine, Replay(rng, world)) > 50_000


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(200, 203))
def test_spark_agrees(trial: int, seed: int, spark_engine: OfflineEngine, tmp_path: Path) -> None:
    """The same with Spark: its join, and transforms in its Python workers."""
    rng = np.random.default_rng([seed, trial])
    world = make_world(rng, tmp_path, views=4, rows=200, labels=1_500)
    assert compare(world, spark_engine, Replay(rng, world)) > 50_000


@pytest.mark.slow
def test_spark_names_a_transform_that_fails(spark_engine: OfflineEngine, tmp_path: Path) -> None:
    """What a function raises in a worker of Spark is the error that it is anywhere else."""
    write_sources(tmp_path)
    bad = made("def bad(n):\n    raise KeyError('rate')", {"n": ACTIVITY["clicks"]}, [Field("out", Float64)])
    with pytest.raises(TransformError, match=r"^transform bad@1 failed: KeyError: 'rate'$"):
        frame_of(spark_engine, tmp_path, LABELS, FeatureService("s", [ACTIVITY, bad]))
    none = frame_of(spark_engine, tmp_path, pa.table(LABELS).slice(0, 0))
    assert (none.num_rows, none.column_names) == (0, [*LABELS, *FEATURES])


class Remote:
    """Answers of a real server: rows are written over gRPC as they arrive, and asked for with as_of."""

    def __init__(self, rng: Random, world: World, client: featserve.Client) -> None:
        self.rng, self.world, self.client = rng, world, client
        self.until_us = -(2**62)

    def __call__(self, at_us: int, keys: dict[str, Column], request: dict[str, Column]) -> FeatureMatrix:
        for view in self.world.service.views:
            batch = self.world.arrivals(view, self.until_us, at_us)
            parts = shuffled(self.rng, batch)
            self.client.write_messages(encode_rows(view.id, arrival_of(part)) for part in parts)
        self.until_us = at_us
        return self.client.get("s", keys, request=request, as_of=from_us(at_us), event_times=True)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(300, 303))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_agrees(transport: str, trial: int, seed: int, duckdb_engine: OfflineEngine, tmp_path: Path) -> None:
    """The same over gRPC: a server that runs what was applied, a client, and a store on disk."""
    rng = np.random.default_rng([seed, trial])
    world = make_world(rng, tmp_path, views=4, rows=200, labels=1_000)
    project = Project(tmp_path)
    project.configure(store={"block_cache_mb": 8, "row_cache_mb": 1}, server={"port": 0} | TRANSPORTS[transport])
    with Registry.open(load_config(tmp_path).registry.url) as registry:
        registry.apply(declare(world.service), "tests", time.time_ns() // 1_000)
    with Server(project) as server, server.client() as client:
        assert compare(world, duckdb_engine, Remote(rng, world, client)) > 30_000


# One entity, and what shrinks to the few rows that matter

USER = Entity("user", {"user_id": Int64})
Event = tuple[int, int, int, float | None, int | None]
"""User, event time, how much later it is known, and the values of two features."""
X, N = st.none() | st.floats(), st.none() | st.integers(-9, 9)
EVENTS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 3), X, N), max_size=8)


FEW = {
    "events": EVENTS,
    "ttl": st.none() | st.integers(1, 4),
    "times": st.lists(st.integers(0, 10), min_size=1, max_size=6),
}


@given(**FEW)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_few_events_agree(
    events: list[Event], ttl: int | None, times: list[int], duckdb_engine: OfflineEngine, tmp_path: Path
) -> None:
    """For any few events of two entities, ties and all, both paths agree at every instant."""
    check_events(events, ttl, times, duckdb_engine, tmp_path)


@pytest.mark.slow
@given(**FEW)
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_of_many_few_events_agree(
    events: list[Event], ttl: int | None, times: list[int], duckdb_engine: OfflineEngine, tmp_path: Path
) -> None:
    """The same, looked for longer."""
    check_events(events, ttl, times, duckdb_engine, tmp_path)


def check_events(events: list[Event], ttl: int | None, times: list[int], engine: OfflineEngine, folder: Path) -> None:
    """Compare both paths for events of users 0 and 1, at times, for these users and one who has none."""
    view = FeatureView(
        "v",
        USER,
        [Field("x", Float64), Field("n", Int64, default=3)],
        ttl=None if ttl is None else timedelta(microseconds=ttl),
        source=ParquetSource("v.parquet", event_time="at", known_at="known"),
    )
    ratio = made(
        "def ratio(x, n, by):\n    return np.sin(x) / n + by",
        {"x": view["x"], "n": view["n"], "by": RequestColumn("by", Float64)},
        [Field("out", Float64)],
    )
    age = made(
        "def age(now, r, valid):\n    return np.where(valid['r'], now.astype(np.int64) % 7, -1)",
        {"now": RequestTime(), "r": ratio["out"]},
        [Field("out", Int64)],
        "pass",
    )
    users, at, late, x, n = (list(values) for values in zip(*events, strict=True)) if events else ([], [], [], [], [])
    event = BASE_US + np.array(at, np.int64)
    history = EventBatch(
        {"user_id": column(Int64, users), "x": column(Float64, x), "n": column(Int64, n)},
        event,
        event + np.array(late, np.int64),
        np.arange(len(events)),
    )
    types = [pa.int64(), pa.float64(), pa.int64(), pa.timestamp("us"), pa.timestamp("us")]
    arrays = [users, x, n, history.event_time_us, history.known_at_us]
    columns = [pa.array(values, type_) for values, type_ in zip(arrays, types, strict=True)]
    pq.write_table(pa.table(columns, ["user_id", "x", "n", "at", "known"]), folder / "v.parquet")
    asked = np.repeat(BASE_US + np.array(times, np.int64), 3)
    labels = {
        "user_id": Column(Int64, np.tile(np.arange(3), len(times))),
        "by": column(Float64, [0.5, None, -0.0] * len(times)),
    }
    world = World(FeatureService("s", [view, ratio, age], dtype=Float64), {view.id: history}, labels, asked, folder)
    compare(world, engine, Replay(np.random.default_rng(len(events)), world))
