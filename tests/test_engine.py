"""The online path, from writes and loads to answers, against a model that holds every row as Python values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featserve._proto import serving_pb2 as pb
from featserve.batch import Arrival, EntityKeys, EventBatch, Written
from featserve.definitions import Entity, FeatureService, FeatureView, Field
from featserve.engine import Engine, encode_rows
from featserve.errors import CorruptRow, InvalidRequest
from featserve.matrix import FeatureMatrix, Status
from featserve.plan import Plans
from featserve.server.service import Call, Limits, Service
from featserve.store import OnlineStore, open_store
from featserve.store.memory import MemoryStore
from featserve.types import NEVER_US, Bytes, Column, Float64, Int64, String, column
from featserve.wire import decode_keys, decode_matrix, encode_column
from tests.online_model import Model, check_answer, check_frames, same
from tests.random_data import (
    Random,
    cells_of,
    random_batch,
    random_entity,
    random_keys,
    random_service,
    random_view,
    snapshot_of,
)

NOW_US = 1_700_000_000_000_000
SKEW_US = 300_000_000
LAST_US = 2**63 - 1


class Trial:
    """Random definitions over one store and the model; each step writes, loads or asks."""

    def __init__(self, rng: Random, store: OnlineStore) -> None:
        self.rng, self.store, self.model = rng, store, Model()
        entities = [random_entity(rng, "a"), random_entity(rng, "b")]
        self.keys = {entity.name: random_keys(rng, entity, 12) for entity in entities}
        # Views that share an entity, and a second version of one: its rows are its own.
        # Some are of more features than one word of validity bits has.
        most = [6, 6, 6 if rng.random() < 0.8 else 140]
        self.views = [random_view(rng, f"v{i}", entities[i % 2], features=most[i]) for i in range(3)]
        self.views.append(random_view(rng, "v0", entities[0], version=2))
        self.services = [
            random_service(rng, "s", self.views[:3]),
            random_service(rng, "t", [self.views[3], self.views[1]]),
            random_service(rng, "u", self.views[2:3]),
        ]
        self.engine = Engine(store, Plans(snapshot_of(self.views, self.services)))
        self.service = Service(self.engine, Limits(10_000, SKEW_US), lambda: LAST_US)

    def run(self, steps: int) -> None:
        """Take random steps; end by asking."""
        for step in self.rng.choice(np.array(["write", "load", "ask"]), steps, p=[0.4, 0.15, 0.45]):
            getattr(self, step)()
        for _ in range(5):
            self.ask()

    def batch(self) -> tuple[FeatureView, EventBatch]:
        view = self.views[int(self.rng.integers(len(self.views)))]
        return view, random_batch(self.rng, view, self.keys[view.entity.name], NOW_US, int(self.rng.integers(1, 30)))

    def write(self) -> None:
        """Write a batch, known when it says or from its arrival, in its own sequence or in order of arrival."""
        view, batch = self.batch()
        known = batch.known_at_us if self.rng.random() < 0.7 else None
        positions = batch.sequence if self.rng.random() < 0.6 else None
        # The earliest clock by which no row is too far ahead, or a later one.
        last_us = int(np.maximum(batch.event_time_us, batch.event_time_us if known is None else known).max())
        clock_us = last_us - SKEW_US + int(self.rng.choice([0, SKEW_US, SKEW_US + 1]))
        arrival = Arrival(batch.columns, batch.event_time_us, known, positions)
        plan = self.engine.plans.view(view.id)
        written = self.engine.write(plan, arrival, now_us=clock_us, max_future_skew_us=SKEW_US)
        if known is None:
            known = np.maximum(batch.event_time_us, clock_us)
        if positions is None:  # numbers of arrival: later than every position, and than every arrival before
            positions = np.arange(self.arrived(), self.arrived() + len(batch))
        stored = self.model.add(view, EventBatch(batch.columns, batch.event_time_us, known, positions))
        assert (written.rows, written.stored) == (len(batch), stored)

    def arrived(self) -> int:
        """Return a sequence after that of every row so far."""
        return 1 + max((row.stamp[2] for rows in self.model.rows.values() for row in rows), default=NOW_US)

    def load(self) -> None:
        """Load several batches as one; write, and ask, between them."""
        batches = [self.batch() for _ in range(int(self.rng.integers(1, 4)))]
        with self.store.load() as load:
            for view, batch in batches:
                load.add(*encode_rows(self.engine.plans.view(view.id), batch))
                if self.rng.random() < 0.6:
                    self.write()
                if self.rng.random() < 0.3:
                    self.ask()  # nothing of the load is visible yet
        for view, batch in batches:
            self.model.add(view, batch)

    def ask(self) -> None:
        """Ask for entities, known or not, near an instant that matters; check the answer in all its forms."""
        service = self.services[int(self.rng.integers(len(self.services)))]
        rows = int(self.rng.integers(1, 25))
        keys: dict[str, Column] = {}
        for entity in {view.entity.name: view.entity for view in service.views}.values():
            pool = self.keys[entity.name] if self.rng.random() < 0.8 else random_keys(self.rng, entity, 8)
            picked = self.rng.integers(len(next(iter(pool.values()))), size=rows)
            keys |= {name: col.take(picked) for name, col in pool.items()}
        now_us = self.instant(service)
        plan = self.engine.plans.service(service.id)
        times = bool(self.rng.random() < 0.5)
        matrix = self.engine.read(plan, EntityKeys.of(keys, service.keys), now_us, event_times=times)
        check_answer(matrix, service, self.model, keys, now_us)
        if self.rng.random() < 0.3:
            check_frames(matrix)
        self.check_wire(service, keys, matrix, now_us)

    def instant(self, service: FeatureService) -> int:
        """Return an instant at which something becomes visible or expires, or one a microsecond beside it."""
        if self.rng.random() < 0.05:
            return int(self.rng.choice([-(2**63), -1, 0, LAST_US]))
        view = service.views[int(self.rng.integers(len(service.views)))]
        stamps = [row.stamp for (id, _), rows in self.model.rows.items() if id == view.id for row in rows]
        if not stamps:
            return NOW_US
        event, known, _ = stamps[int(self.rng.integers(len(stamps)))]
        edge = int(self.rng.choice([event, known, event + (view.ttl_us or 0)])) + int(self.rng.integers(-1, 2))
        return max(edge, -(2**63))

    def check_wire(
        self, service: FeatureService, keys: Mapping[str, Column], matrix: FeatureMatrix, now_us: int
    ) -> None:
        """Check that bytes in and bytes out give the same answer, and that keys survive the way."""
        request = pb.GetFeaturesRequest(
            service=service.id,
            keys=[encode_column(name, keys[name]) for name in self.rng.permutation(list(keys)).tolist()],
            as_of_us=now_us,
            include_event_times=matrix.event_times is not None,
        )
        decoded = decode_keys(request.keys, service.keys, 10_000)
        assert {n: cells_of(c) for n, c in decoded.columns.items()} == {n: cells_of(c) for n, c in keys.items()}
        answer = pb.GetFeaturesResponse.FromString(self.service.get_features(request.SerializeToString(), Call()))
        assert answer.schema_id == matrix.schema.id
        same(decode_matrix(answer, matrix.schema), matrix)


@contextmanager
def opened(backend: str, path: Path) -> Iterator[OnlineStore]:
    """Open a store; one that is on disk has caches so small that rows come from its files."""
    store = (
        MemoryStore() if backend == "memory" else open_store(path / "store", "write", block_cache_mb=1, row_cache_mb=1)
    )
    try:
        yield store
    finally:
        store.close()


@pytest.mark.parametrize("trial", range(12))
@pytest.mark.parametrize("backend", ["memory", "rocksdb"])
def test_answers_equal_the_model(backend: str, trial: int, seed: int, tmp_path: Path) -> None:
    """Whatever was written and loaded in whatever order, an answer is bit for bit what the semantics say."""
    with opened(backend, tmp_path) as store:
        Trial(np.random.default_rng([seed, trial]), store).run(25)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(100, 112))
@pytest.mark.parametrize("backend", ["memory", "rocksdb"])
def test_long_histories_equal_the_model(backend: str, trial: int, seed: int, tmp_path: Path) -> None:
    """The same for longer histories and more of them."""
    with opened(backend, tmp_path) as store:
        Trial(np.random.default_rng([seed, trial]), store).run(100)


USER = Entity("user", {"user": String})
ROUTE = Entity("route", {"origin": String, "dest": String})
SPEED = FeatureView("speed", USER, [Field("mph", Float64), Field("name", String, default="none")],
                    ttl=timedelta(microseconds=100))  # fmt: skip
TRAFFIC = FeatureView("traffic", ROUTE, [Field("cars", Int64)])


class Counted(MemoryStore):
    """A store that notes what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[list[bytes]] = []

    def read_many(self, keys: list[bytes]) -> list[bytes | None]:
        self.reads.append(keys)
        return super().read_many(keys)


def engine_of(store: OnlineStore, *views: FeatureView) -> Engine:
    services = [FeatureService("all", views)]
    return Engine(store, Plans(snapshot_of(views, services)))


def write(
    engine: Engine, view: FeatureView, rows: Mapping[str, list[Any]], event_us: list[int],
    known_us: list[int] | None = None, *, now_us: int = NOW_US,
) -> Written:  # fmt: skip
    plan = engine.plans.view(view.id)
    columns = {name: column(type, rows[name]) for name, type in plan.columns.items()}
    known = None if known_us is None else np.array(known_us)
    return engine.write(plan, Arrival(columns, np.array(event_us), known), now_us=now_us, max_future_skew_us=SKEW_US)


def ask(engine: Engine, keys: Mapping[str, list[Any]], now_us: int = NOW_US) -> FeatureMatrix:
    plan = engine.plans.service("all")
    return engine.read(plan, EntityKeys.of(keys, plan.schema.keys), now_us, event_times=True)


def speed(engine: Engine, now_us: int, user: str = "u") -> tuple[str, float | None]:
    matrix = ask(engine, {"user": [user]}, now_us)
    return Status(matrix.status[0, 0]).name, matrix.to_dict()["speed.mph"][0]


def test_a_row_is_visible_from_its_times_to_its_ttl_both_included() -> None:
    """A row is served from the later of its two times until its ttl after its event time, to the microsecond."""
    engine = engine_of(MemoryStore(), SPEED)
    write(engine, SPEED, {"user": ["u"], "mph": [1.5], "name": ["x"]}, [NOW_US], [NOW_US + 40])
    expected = {-1: "NOT_FOUND", 0: "NOT_FOUND", 39: "NOT_FOUND", 40: "PRESENT", 100: "PRESENT", 101: "EXPIRED"}
    for after_us, status in expected.items():
        assert speed(engine, NOW_US + after_us) == (status, 1.5 if status == "PRESENT" else None)


def test_the_newest_row_counts_even_before_it_is_visible() -> None:
    """The store keeps one row of an entity: one that becomes visible later hides the one before it until then."""
    engine = engine_of(MemoryStore(), SPEED)
    write(engine, SPEED, {"user": ["u"], "mph": [1.0], "name": ["x"]}, [NOW_US])
    assert speed(engine, NOW_US) == ("PRESENT", 1.0)
    write(engine, SPEED, {"user": ["u"], "mph": [2.0], "name": ["x"]}, [NOW_US + SKEW_US])
    assert speed(engine, NOW_US) == ("NOT_FOUND", None)
    assert speed(engine, NOW_US + SKEW_US) == ("PRESENT", 2.0)


def test_an_expired_row_still_tells_its_event_time() -> None:
    """An expired row has its event time and no value; one that is not found has neither."""
    engine = engine_of(MemoryStore(), SPEED)
    write(engine, SPEED, {"user": ["u"], "mph": [1.0], "name": ["x"]}, [NOW_US - 101])
    matrix = ask(engine, {"user": ["u", "nobody"]})
    assert matrix.view_status.tolist() == [[Status.EXPIRED], [Status.NOT_FOUND]]
    assert matrix.event_times is not None
    assert matrix.event_times.tolist() == [[NOW_US - 101], [NEVER_US]]
    assert matrix.to_dict() == {"speed.mph": [None, None], "speed.name": ["none", "none"]}


def test_the_newest_row_wins_as_a_whole() -> None:
    """A null in the newest row is served as a null or as the default, never filled from an older row."""
    engine = engine_of(MemoryStore(), SPEED)
    write(engine, SPEED, {"user": ["u"], "mph": [1.0], "name": ["x"]}, [NOW_US - 1])
    write(engine, SPEED, {"user": ["u"], "mph": [None], "name": [None]}, [NOW_US])
    matrix = ask(engine, {"user": ["u"]})
    assert matrix.status.tolist() == [[Status.NULL, Status.NULL]]
    assert matrix.to_dict() == {"speed.mph": [None], "speed.name": ["none"]}


def test_rows_without_known_at_are_known_from_their_arrival() -> None:
    """A row without a known-at is known from its arrival, or from its event time where that is later."""
    engine = engine_of(MemoryStore(), TRAFFIC)
    write(engine, TRAFFIC, {"origin": ["a", "b"], "dest": ["z", "z"], "cars": [1, 2]}, [NOW_US - 50, NOW_US + 50])
    keys = {"origin": ["a", "b"], "dest": ["z", "z"]}
    seen = {after: ask(engine, keys, NOW_US + after).view_status.ravel().tolist() for after in (-1, 0, 49, 50)}
    found, missing = Status.PRESENT, Status.NOT_FOUND
    assert seen == {-1: [missing] * 2, 0: [found, missing], 49: [found, missing], 50: [found] * 2}


def test_of_rows_with_the_same_times_the_last_to_arrive_stays() -> None:
    """Exact ties go to the later row, within a batch and between batches, even when the clock stands still."""
    engine = engine_of(MemoryStore(), TRAFFIC)
    times, cars = [NOW_US] * 3, iter(range(100))
    for _ in range(3):
        rows: dict[str, list[Any]] = {"origin": ["a"] * 3, "dest": ["b"] * 3, "cars": [next(cars) for _ in range(3)]}
        assert write(engine, TRAFFIC, rows, times, times) == Written(3, 1)
        assert ask(engine, {"origin": ["a"], "dest": ["b"]}).to_dict() == {"traffic.cars": rows["cars"][-1:]}


def test_rows_that_arrive_after_a_restart_come_after_those_before(tmp_path: Path) -> None:
    """Exact ties go to the later row also where the engine was started again and the clock set back, however often."""
    before_us, cars = [NOW_US - 10 * SKEW_US] * 2, iter(range(100))
    for now_us in (NOW_US, NOW_US - SKEW_US, NOW_US - SKEW_US, NOW_US + SKEW_US, NOW_US):
        with opened("rocksdb", tmp_path) as store:
            engine = engine_of(store, TRAFFIC)
            for _ in range(3):
                rows: dict[str, list[Any]] = {"origin": ["a"] * 2, "dest": ["b"] * 2, "cars": [next(cars), next(cars)]}
                assert write(engine, TRAFFIC, rows, before_us, before_us, now_us=now_us) == Written(2, 1)
                assert ask(engine, {"origin": ["a"], "dest": ["b"]}).to_dict() == {"traffic.cars": rows["cars"][-1:]}


def test_composite_keys_never_collide() -> None:
    """Keys that read the same when joined are different entities."""
    engine = engine_of(MemoryStore(), TRAFFIC)
    pairs = [("1", "23"), ("12", "3"), ("123", ""), ("", "123"), ("1\0", "23"), ("1", "\x0023"), ("1\x00\x00", "")]
    rows = {"origin": [a for a, _ in pairs], "dest": [b for _, b in pairs]}
    write(engine, TRAFFIC, rows | {"cars": list(range(len(pairs)))}, [NOW_US] * len(pairs))
    assert ask(engine, rows).to_dict() == {"traffic.cars": list(range(len(pairs)))}
    assert ask(engine, {"origin": ["12"], "dest": ["23"]}).to_dict() == {"traffic.cars": [None]}


def test_huge_values_stand_beside_empty_ones(tmp_path: Path) -> None:
    """Strings of megabytes, empty ones and nulls of one batch are each their row's own, through the store on disk."""
    view = FeatureView("v", USER, [Field("s", String), Field("b", Bytes, default=b"none"), Field("t", String)])
    texts = ["x" * 3_000_000, "", None, "\0", "é" * 1_000_000]
    blobs = [b"", None, b"\xff" * 2_000_000, b"\0", None]
    users = [f"u{i}" for i in range(5)]
    with opened("rocksdb", tmp_path) as store:
        engine = engine_of(store, view)
        rows: dict[str, list[Any]] = {"user": users, "s": texts, "b": blobs, "t": texts[::-1]}
        assert write(engine, view, rows, [NOW_US] * 5) == Written(5, 5)
        answer = ask(engine, {"user": [*users[::-1], "nobody"]}).to_dict()
    assert answer["v.s"] == [*texts[::-1], None]
    assert answer["v.b"] == [b"none" if blob is None else blob for blob in [*blobs[::-1], None]]
    assert answer["v.t"] == [*texts, None]


def test_a_request_is_one_read() -> None:
    """However many views and repeated entities a request has, the store is read once."""
    store = Counted()
    engine = engine_of(store, SPEED, TRAFFIC)
    write(engine, SPEED, {"user": ["u"], "mph": [1.0], "name": ["x"]}, [NOW_US])
    store.reads.clear()
    users = ["u", "v"] * 20
    matrix = ask(engine, {"user": users, "origin": ["a"] * 40, "dest": ["b"] * 40})
    assert [len(set(keys)) for keys in store.reads] == [3]
    assert matrix.to_dict()["speed.mph"] == [1.0, None] * 20


def test_rows_too_far_in_the_future_are_refused_whole() -> None:
    """A time past the allowed skew refuses the batch, naming row and column; at the skew it is taken."""
    engine = engine_of(MemoryStore(), TRAFFIC)
    rows: dict[str, list[Any]] = {"origin": ["a", "b"], "dest": ["z", "z"], "cars": [1, 2]}
    last = NOW_US + SKEW_US
    for event, known, where in [
        ([NOW_US, last + 1], None, r"rows\[1\].event_time: 2023-.* is later than"),
        ([NOW_US, NOW_US], [last + 1, NOW_US], r"rows\[0\].known_at"),
        ([NOW_US, 2**63 - 1], [NOW_US, NOW_US], r"rows\[1\].event_time: 9223372036854775807 us is later"),
    ]:
        with pytest.raises(InvalidRequest, match=where):
            write(engine, TRAFFIC, rows, event, known)
    assert ask(engine, {"origin": ["a", "b"], "dest": ["z", "z"]}, last).to_dict() == {"traffic.cars": [None, None]}
    assert write(engine, TRAFFIC, rows, [NOW_US, last], [last, NOW_US]) == Written(2, 2)


def test_a_key_too_long_is_refused_wherever_it_comes() -> None:
    """A key value over 4,096 bytes is refused in a request and in a row, naming column and row; at 4,096 it is not."""
    engine = engine_of(MemoryStore(), TRAFFIC)
    for length, ok in ((4_096, True), (4_097, False)):
        keys = {"origin": ["a", "é" * (length // 2) + "x" * (length % 2)], "dest": ["z", "z"]}
        for use in (
            lambda keys=keys: ask(engine, keys),
            lambda keys=keys: write(engine, TRAFFIC, keys | {"cars": [1, 2]}, [0, 0]),
        ):
            if ok:
                use()
                continue
            with pytest.raises(InvalidRequest, match=r"keys.origin: row 1 is 4,097 bytes long; the most is 4,096"):
                use()


@pytest.mark.parametrize("position", [0, 3, 7])
def test_a_foreign_row_fails_the_request(position: int) -> None:
    """A row that is not the view's own fails the request that meets it, naming view, row and problem."""
    store = MemoryStore()
    engine = engine_of(store, SPEED)
    users = [f"u{i}" for i in range(8)]
    write(engine, SPEED, {"user": users, "mph": [1.0] * 8, "name": ["x"] * 8}, [NOW_US] * 8)
    other = engine_of(MemoryStore(), FeatureView("speed", USER, SPEED.features))
    batch = EventBatch(
        {"user": column(String, ["u"]), "mph": column(Float64, [1.0]), "name": column(String, ["x"])},
        *[np.array([NOW_US])] * 3,
    )
    key = engine.plans.view("speed").prefix + users[position].encode()
    (good,) = [row for row in store.read_many([key]) if row]
    ((foreign,)) = encode_rows(other.plans.view("speed"), batch)[1]
    for bad, problem in [(foreign, "another definition"), (good[:-1], "bytes long"), (good[:20], "truncated"),
                         (b"", "not a featserve row"), (b"\xf5\x02" + good[2:], "row format 2")]:  # fmt: skip
        store._open()[key] = bad
        with pytest.raises(CorruptRow, match=f"view speed@1: stored row {position} of the batch .*{problem}"):
            ask(engine, {"user": users})
