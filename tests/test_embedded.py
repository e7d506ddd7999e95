"""An embedded project answers, and refuses, as a server does: the same class, the same message, the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import featserve
from featserve.batch import Arrival
from featserve.errors import (
    DeadlineExceeded,
    FeatserveError,
    InvalidRequest,
    RegistryError,
    StoreError,
    StoreLocked,
    UnknownName,
)
from featserve.registry import Registry
from featserve.types import Array
from featserve.wire import encode_rows
from tests.online_model import same
from tests.random_data import (
    random_batch,
    random_entity,
    random_keys,
    random_service,
    random_view,
    snapshot_of,
)
from tests.serving import DEFINITIONS, Project, Server, until

pytest_plugins = ["tests.served"]

NOW = datetime.now(UTC)
PRESENT, NOT_FOUND = featserve.Status.PRESENT, featserve.Status.NOT_FOUND
KEYS: dict[str, Any] = {"user_id": [90_001, 90_002], "country": ["de", "fr"], "zip": ["1", "2"]}
ROW: dict[str, Any] = {
    "user_id": [90_001],
    "clicks": [1],
    "rate": [0.5],
    "score": [1.0],
    "active": [True],
    "level": [1],
    "last_seen": [NOW],
    "plan": ["paid"],
    "token": [b""],
    "taste": [[1.0, 2.0, 3.0, 4.0]],
}
FUTURE = NOW + timedelta(days=1)


def get(service: str, keys: Any, **rest: Any) -> Callable[[Any], object]:
    return lambda project: project.get(service, keys, **rest)


def write(view: str, rows: Any, event_time: Any = NOW, **rest: Any) -> Callable[[Any], object]:
    return lambda project: project.write(view, rows, event_time=event_time, **rest)


BAD: dict[str, Callable[[Any], object]] = {
    "unknown service": get("rankin", KEYS),
    "service of nonsense": get("a@b@c", KEYS),
    "no service": get("", KEYS),
    "unknown version": get("ranking@9", KEYS),
    "another hash": get("ranking#0123456789", KEYS),
    "missing key column": get("ranking", {"user_id": [1]}),
    "extra key column": get("wide", KEYS),
    "no key column": get("wide", {}),
    "keys that are no columns": get("wide", [1, 2]),
    "keys that are one value": get("wide", {"user_id": 1}),
    "keys that are a text": get("devices", {"serial": "x", "made": [NOW], "model": [1], "real": [True]}),
    "text for an integer": get("wide", {"user_id": ["1"]}),
    "float for an integer": get("wide", {"user_id": [1.0]}),
    "NaN for an integer": get("wide", {"user_id": [float("nan")]}),
    "array of floats": get("wide", {"user_id": np.array([1.0])}),
    "bool for an integer": get("wide", {"user_id": [True]}),
    "too large an integer": get("wide", {"user_id": [2**63]}),
    "too large an unsigned integer": get("wide", {"user_id": np.array([2**63], np.uint64)}),
    "bytes for a text": get("ranking", KEYS | {"zip": [b"1", b"2"]}),
    "text for bytes": get("devices", {"serial": ["x"], "made": [NOW], "model": [1], "real": [True]}),
    "half a surrogate": get("ranking", KEYS | {"zip": ["1", "\ud800"]}),
    "matrix for a column": get("wide", {"user_id": np.ones((2, 2), np.int64)}),
    "ragged columns": get("ranking", KEYS | {"user_id": [1, 2, 3]}),
    "empty batch": get("wide", {"user_id": []}),
    "null key": get("wide", {"user_id": [1, None]}),
    "huge key": get("ranking", KEYS | {"zip": ["1", "x" * 4_097]}),
    "request column that nobody asked for": get("wide", {"user_id": [1]}, request={"amount": [1.0]}),
    "unknown view": write("activty", ROW),
    "view by hash": write("activity#01234567", ROW),
    "missing column": write("activity", {n: v for n, v in ROW.items() if n != "plan"}),
    "unknown column": write("activity", ROW | {"plam": ["paid"]}),
    "wrong type": write("activity", ROW | {"clicks": ["1"]}),
    "overflow": write("activity", ROW | {"level": [2**31]}),
    "float32 overflow": write("activity", ROW | {"score": [1e39]}),
    "vector of another length": write("activity", ROW | {"taste": [[1.0]]}),
    "ragged row": write("activity", ROW | {"clicks": [1, 2]}),
    "under the min": write("activity", ROW | {"clicks": [-1]}),
    "over the max": write("activity", ROW | {"rate": [1.5]}),
    "not allowed": write("activity", ROW | {"plan": ["gold"]}),
    "null where forbidden": write("activity", ROW | {"level": [None]}),
    "NaN where forbidden": write("activity", ROW | {"score": [float("nan")]}),
    "null key of a row": write("activity", ROW | {"user_id": [None]}),
    "no such time column": write("activity", ROW, "at"),
    "time that is none": write("activity", ROW, 1.5),
    "null time": write("activity", ROW, [None]),
    "times of another length": write("activity", ROW, [NOW, NOW]),
    "several things": write("activity", ROW | {"clicks": [-1], "rate": [2.0], "plan": ["gold"]}),
    "empty rows": write("activity", {name: [] for name in ROW}),
}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[featserve.Embedded]:
    project = Project.make(tmp_path_factory.mktemp("embedded"))
    with featserve.open(project.folder, write=True) as embedded:
        yield embedded


@pytest.fixture
def client(server: Server) -> Iterator[featserve.Client]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize("case", BAD)
def test_errors_are_those_of_a_server(client: featserve.Client, embedded: featserve.Embedded, case: str) -> None:
    """A bad request raises the same class with the same message and violations in process as through the client."""
    raised = []
    for project in (client, embedded):
        with pytest.raises(FeatserveError) as caught:
            BAD[case](project)
        error = caught.value
        raised.append((type(error), str(error), error.violations, error.metadata))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("case", ["as_of", "event_time", "known_at"])
def test_errors_about_now_are_those_of_a_server(
    client: featserve.Client, embedded: featserve.Embedded, case: str
) -> None:
    """The same for what is in the future, whose message holds the clock."""
    calls = {
        "as_of": get("ranking", KEYS, as_of=FUTURE),
        "event_time": write("activity", ROW, FUTURE),
        "known_at": write("activity", ROW, NOW, known_at=FUTURE),
    }
    fields = []
    for project in (client, embedded):
        with pytest.raises(InvalidRequest) as caught:
            calls[case](project)
        fields.append([violation.field.removesuffix("_us") for violation in caught.value.violations])
    assert fields[0] == fields[1]


def test_a_refused_write_wrote_nothing(client: featserve.Client, embedded: featserve.Embedded) -> None:
    """After all those refusals neither has a row of that view."""
    for project in (client, embedded):
        for case, call in BAD.items():
            if case not in ("unknown service", "service of nonsense"):
                with pytest.raises(FeatserveError):
                    call(project)
        assert project.get("compact", KEYS).view_status[:, 0].tolist() == [NOT_FOUND, NOT_FOUND]


def test_answers_are_those_of_a_server(following: Server, rng: np.random.Generator) -> None:
    """On random definitions and rows an embedded project and a server give the same answer, to the last bit."""
    name = f"r{time.monotonic_ns()}"
    entities = [random_entity(rng, f"{name}_e{i}") for i in range(3)]
    views = [random_view(rng, f"{name}_v{i}", entities[i % 3]) for i in range(5)]
    services = [random_service(rng, f"{name}_s{i}", [views[j] for j in rng.permutation(5)[:3]]) for i in range(4)]
    before = following.revision()
    with Registry.open(f"sqlite:///{following.project.folder}/.featserve/registry.db") as registry:
        registry.apply(snapshot_of(views, services), "tests", 0)
    until("the server has taken the random definitions", lambda: following.revision() > before)
    now_us = time.time_ns() // 1_000
    keys = {entity.name: random_keys(rng, entity, 30) for entity in entities}

    def past(times: Array) -> Array:
        return np.minimum(times, now_us)

    with following.client() as client:
        for view in views:
            for _ in range(3):
                batch = random_batch(rng, view, keys[view.entity.name], now_us, 60)
                rows = Arrival(batch.columns, past(batch.event_time_us), past(batch.known_at_us), batch.sequence)
                client.write_messages([encode_rows(view.id, rows)])
        with featserve.open(following.project.folder) as embedded:
            for _ in range(60):
                service = services[int(rng.integers(len(services)))]
                count = int(rng.integers(1, 40))
                asked: dict[str, Any] = {}
                for entity in {view.entity.name: view.entity for view in service.views}.values():
                    pool = keys[entity.name] if rng.random() < 0.8 else random_keys(rng, entity, 8)
                    picked = rng.integers(len(next(iter(pool.values()))), size=count)
                    asked |= {column: values.take(picked) for column, values in pool.items()}
                as_of = datetime.fromtimestamp(now_us // 1_000_000 - int(rng.integers(0, 90)), UTC)
                options: dict[str, Any] = {"as_of": as_of, "event_times": bool(rng.integers(2))}
                same(client.get(service.id, asked, **options), embedded.get(service.id, asked, **options))


def test_written_rows_are_read_back(embedded: featserve.Embedded) -> None:
    """A project that is open for writing reads what it wrote, and says how many rows were the newest."""
    rows = {"country": ["x", "y"], "zip": ["1", "1"], "temp": [1.0, 2.0], "wind": [None, 3.0]}
    assert embedded.write("weather", rows, event_time=NOW).stored == 2
    assert embedded.write("weather", rows, event_time=NOW - timedelta(days=1)).stored == 0
    keys = {"user_id": [1, 1, 1], "country": ["x", "y", "z"], "zip": ["1", "1", "1"]}
    matrix = embedded.get("compact", keys, event_times=True)
    assert matrix.view_status[:, 1].tolist() == [PRESENT, PRESENT, NOT_FOUND]
    assert matrix.column("weather.temp").to_list() == [1.0, 2.0, None]
    assert embedded.describe("compact") == matrix.schema
    before = embedded.get("compact", keys, as_of=NOW - timedelta(days=2))
    assert before.view_status[:, 1].tolist() == [NOT_FOUND] * 3


def test_a_reader_beside_a_server(server: Server) -> None:
    """Any number of processes read beside a server, each what was there when it first asked; none of them writes."""
    rows = {"country": ["beside"], "zip": ["1"], "temp": [1.0], "wind": [1.0]}
    keys = {"user_id": [1], "country": ["beside"], "zip": ["1"]}
    with server.client() as client:
        client.write("weather", rows, event_time=NOW)
        with featserve.open(server.project.folder) as first:
            assert first.get("compact", keys).column("weather.temp").to_list() == [1.0]
            client.write("weather", rows | {"temp": [2.0]}, event_time=NOW + timedelta(seconds=1))
            with featserve.open(server.project.folder) as second:
                temps = [each.get("compact", keys).column("weather.temp").to_list() for each in (first, second, client)]
                assert temps == [[1.0], [2.0], [2.0]]
                with pytest.raises(StoreError, match=r"open it with featserve.open\(path, write=True"):
                    second.write("weather", rows, event_time=NOW)
        with pytest.raises(StoreLocked, match="Stop that server, or send the rows to it"):
            featserve.open(server.project.folder, write=True)
        assert client.get("compact", keys).column("weather.temp").to_list() == [2.0]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """A folder that is no project, a project without a registry, and one without a store say what makes them."""
    with pytest.raises(featserve.FeatserveError, match="`featserve init"):
        featserve.open(tmp_path / "nothing")
    project = Project(tmp_path)
    project.configure(server={"port": 0})
    with pytest.raises(RegistryError, match="`featserve apply` makes it"):
        featserve.open(tmp_path)
    project.apply(DEFINITIONS)
    with featserve.open(tmp_path) as embedded:
        for _ in range(2):
            with pytest.raises(StoreError, match=r"there is no store at .*; load one with `featserve materialize`"):
                embedded.get("wide", {"user_id": [1]})
    with featserve.open(tmp_path, write=True) as embedded:
        assert embedded.get("wide", {"user_id": [1]}).view_status.tolist() == [[NOT_FOUND]]
    with featserve.open(tmp_path) as embedded:
        assert embedded.get("wide", {"user_id": [1]}).view_status.tolist() == [[NOT_FOUND]]


def test_what_reads_no_store_needs_none(tmp_path: Path) -> None:
    """Schemas, training frames and the report come from the registry and the sources, before anything is loaded."""
    pq.write_table(pa.table({"user_id": [1], "at": [NOW - timedelta(days=1)], "x": [1.5]}), tmp_path / "rows.parquet")
    project = Project(tmp_path)
    project.configure(server={"port": 0})
    project.apply(
        "from featserve import *\n"
        "source = ParquetSource('rows.parquet', event_time='at')\n"
        "view = FeatureView('v', Entity('user', {'user_id': Int64}), [Field('x', Float64)], source=source)\n"
        "service = FeatureService('s', [view])\n"
    )
    labels = {"user_id": [1], "when": pa.array([NOW], pa.timestamp("us", "UTC")), "late": [True]}
    with featserve.open(tmp_path) as embedded:
        assert embedded.describe("s").name == "s"
        assert embedded.training_frame("s", labels, time="when")["v.x"].to_pylist() == [1.5]
        assert embedded.leakage("s", labels, time="when", label="late").rows == 1
        embedded.refresh()
        with pytest.raises(StoreError, match="there is no store"):
            embedded.get("s", {"user_id": [1]})
    with pytest.raises(StoreError, match="the project is closed"):
        embedded.get("s", {"user_id": [1]})


def test_refresh_takes_what_was_applied(tmp_path: Path) -> None:
    """An open project serves what was applied when it opened, until it is told to look again."""
    project = Project.make(tmp_path)
    with featserve.open(tmp_path, write=True) as embedded:
        project.apply(DEFINITIONS + '\nlate = FeatureService("late", [weather])\n')
        with pytest.raises(UnknownName):
            embedded.get("late", {"country": ["x"], "zip": ["1"]})
        embedded.refresh()
        assert embedded.get("late", {"country": ["x"], "zip": ["1"]}).view_status.tolist() == [[NOT_FOUND]]
    with pytest.raises(StoreError, match="closed"):
        embedded.get("late", {"country": ["x"], "zip": ["1"]})


def test_following_a_server(following: Server) -> None:
    """A project that follows reads what a server has acknowledged, by its token at once, and takes what is applied."""
    keys = {"user_id": [1], "country": ["followed"], "zip": ["1"]}
    with following.client() as client, featserve.open(following.project.folder, follow=True) as embedded:

        def temperature() -> Any:
            return embedded.get("compact", keys).column("weather.temp").to_list()[0]

        for i in range(50):
            rows = {"country": ["followed"], "zip": ["1"], "temp": [float(i)], "wind": [0.0]}
            token = client.write("weather@1", rows, event_time=NOW - timedelta(seconds=60 - i)).token
            as_of = embedded.get("compact", keys, at_least=token)
            assert as_of.column("weather.temp").to_list() == [float(i)]
        client.write("weather@1", rows | {"temp": [99.0]}, event_time=NOW)
        until("it is followed", lambda: temperature() == 99)
        with pytest.raises(InvalidRequest, match="is no token"):
            embedded.get("compact", keys, at_least="nonsense")
        with pytest.raises(StoreError, match=r"open it with featserve.open\(path, write=True"):
            embedded.write("weather", rows, event_time=NOW)
        following.apply(f'followed = FeatureService("followed{time.monotonic_ns()}", [weather])')
        name = max(client.list_services(), key=lambda service: service.name.startswith("followed")).name
        until("it is applied", lambda: name in {s.name for s in embedded.plans.snapshot.services.values()})
    with pytest.raises(StoreError, match="closed"):
        temperature()


def test_a_write_that_does_not_come(tmp_path: Path) -> None:
    """Who follows waits for a write until the deadline, and who writes knows at once that there is no such write."""
    project = Project.make(tmp_path, default_deadline_ms=200)
    rows = {"country": ["x"], "zip": ["1"], "temp": [1.0], "wind": [0.0]}
    keys = {"user_id": [1], "country": ["x"], "zip": ["1"]}
    with featserve.open(project.folder, write=True) as writer:
        token = writer.write("weather", rows, event_time=NOW).token
        with featserve.open(project.folder, follow=True) as embedded:
            assert embedded.get("compact", keys, at_least=token).column("weather.temp").to_list() == [1.0]
            assert writer.get("compact", keys, at_least=token).column("weather.temp").to_list() == [1.0]
            never = f"{token}0"
            with pytest.raises(DeadlineExceeded, match=r"write 20 was asked for; the store here holds 2"):
                embedded.get("compact", keys, at_least=never)
            with pytest.raises(InvalidRequest, match="write 20 is not in the store here, which holds 2"):
                writer.get("compact", keys, at_least=never)
    with pytest.raises(InvalidRequest, match="nobody to follow"):
        featserve.open(project.folder, write=True, follow=True)
