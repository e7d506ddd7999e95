"""The Python client against a real server: what it takes and gives, and how it lives with failures."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import numpy as np
import pandas as pd
import polars as pl
import psutil
import pyarrow as pa
import pytest

import featserve
from featserve import EventSource, Field, Int64
from featserve._proto import serving_pb2 as pb
from featserve.errors import (
    DeadlineExceeded,
    FeatserveError,
    InvalidRequest,
    Overloaded,
    SchemaMismatch,
    TooLarge,
    Unavailable,
    UnknownName,
)
from featserve.wire import encode_events
from tests.relay import Relay
from tests.server.messages import wide
from tests.server.streams import Stream
from tests.serving import Server, until

pytest_plugins = ["tests.served"]

PRESENT, NOT_FOUND = featserve.Status.PRESENT, featserve.Status.NOT_FOUND
NOW = datetime.now(UTC)


@pytest.fixture
def client(server: Server) -> Iterator[featserve.Client]:
    with server.client() as client:
        yield client


def rows(users: list[int], value: float = 1.0) -> dict[str, Any]:
    """Return rows of the view ``numbers``."""
    return {"user_id": users} | {f"f{i}": [value + i] * len(users) for i in range(50)}


def places(country: Any, zip_: Any) -> dict[str, Any]:
    return {"country": country, "zip": zip_}


def test_written_rows_are_read_back(client: featserve.Client) -> None:
    """What was written is what a get returns: values by name, statuses, and event times where asked for."""
    written = client.write("weather", places(["aa", "aa"], ["1", "2"]) | {"temp": [1.5, None], "wind": [2.0, 3.0]},
                           event_time=NOW)  # fmt: skip
    assert (written.rows, written.stored) == (2, 2)
    keys = {"user_id": [1, 1, 1], **places(["aa", "aa", "aa"], ["1", "2", "3"])}
    matrix = client.get("ranking", keys, event_times=True)
    frame = matrix.to_pandas()
    assert frame["weather.temp"].tolist()[0] == 1.5
    assert frame["weather.temp"].isna().tolist() == [False, True, True]
    assert frame["weather.wind"].tolist()[:2] == [2.0, 3.0]
    assert matrix.status[:, -2:].tolist() == [[1, 1], [featserve.Status.NULL, 1], [3, 3]]
    assert matrix.event_times is not None
    assert matrix.event_times[0, 1] == NOW.timestamp() * 1e6
    assert client.get("ranking", keys).event_times is None
    assert matrix.names[-1] == "weather.wind"


def frames() -> dict[str, Any]:
    """Return the same keys in every form that the client takes; frames hold a column more than is asked for."""
    data: dict[str, Any] = {"user_id": [7, 8], "country": ["bb", "bb"], "zip": ["1", "2"]}
    more = data | {"label": [0.5, None]}
    arrays = {name: np.array(values) for name, values in data.items()}
    pandas_strings = pd.DataFrame(more).astype({"country": "string", "user_id": "Int64"})
    return {
        "lists": data,
        "tuples": {name: tuple(values) for name, values in data.items()},
        "numpy": arrays,
        "numpy of int32": arrays | {"user_id": np.array([7, 8], np.int32)},
        "numpy objects": {name: np.array(values, object) for name, values in data.items()},
        "pandas": pd.DataFrame(more),
        "pandas with another index": pd.DataFrame(more, index=[5, 3]),
        "pandas with nullable types": pandas_strings,
        "pandas columns": dict(pd.DataFrame(data).items()),
        "polars": pl.DataFrame(more),
        "pyarrow": pa.table(more),
        "pyarrow in chunks": pa.concat_tables([pa.table(more).slice(0, 1), pa.table(more).slice(1)]),
        "pyarrow dictionary": pa.table(more).set_column(1, "country", pa.array(["bb", "bb"]).dictionary_encode()),
    }


@pytest.mark.parametrize("form", frames())
def test_keys_come_as_lists_arrays_or_frames(client: featserve.Client, form: str) -> None:
    """Lists, arrays and frames of pandas, polars and pyarrow ask for the same entities; other columns are ignored."""
    client.write("weather", places(["bb"], ["2"]) | {"temp": [4.0], "wind": [None]}, event_time=NOW)
    matrix = client.get("ranking", frames()[form])
    assert matrix.view_status[:, 1].tolist() == [NOT_FOUND, PRESENT]
    assert matrix.column("weather.temp").values[1] == 4.0


@pytest.mark.parametrize("kind", ["pandas", "polars", "pyarrow", "lists", "numpy"])
def test_rows_come_as_lists_arrays_or_frames(client: featserve.Client, kind: str) -> None:
    """Rows to write come in the same forms, nulls and times included."""
    zip_ = f"rows {kind}"
    times = [NOW - timedelta(seconds=1), NOW]
    data = {"country": ["cc", "dd"], "zip": [zip_, zip_], "temp": [None, 2.5], "wind": [1.0, None], "at": times}
    naive = [at.replace(tzinfo=None) for at in times]
    makers: dict[str, Callable[[Any], Any]] = {
        "pandas": pd.DataFrame,
        "polars": pl.DataFrame,
        "pyarrow": pa.table,
        "lists": dict,
        "numpy": lambda d: d | {"wind": np.array([1.0, 0.0]), "at": np.array(naive, "M8[us]")},
    }  # fmt: skip
    assert client.write("weather", makers[kind](data), event_time="at").stored == 2
    keys = {"user_id": [1, 1], **places(["cc", "dd"], [zip_, zip_])}
    matrix = client.get("ranking", keys, event_times=True)
    assert matrix.event_times is not None
    assert matrix.event_times[:, 1].tolist() == [round(t.timestamp() * 1e6) for t in times]
    assert matrix.column("weather.temp").to_list() == [None, 2.5]
    assert matrix.column("weather.wind").to_list()[0] == 1.0


def test_write_stream_counts_and_says_how_far_it_came(client: featserve.Client) -> None:
    """Batches on a stream are written in order; a refused one ends it with its error, which counts those before it."""
    assert client.write_stream("numbers", (rows([i]) for i in range(5_000_500, 5_000_520)), event_time=NOW).stored == 20
    batches = [rows([5_000_530]), rows([5_000_531]), rows([5_000_532]) | {"user_id": [None]}, rows([5_000_533])]
    with pytest.raises(InvalidRequest, match="user_id") as caught:
        client.write_stream("numbers", iter(batches), event_time=NOW)
    assert caught.value.metadata == {"messages_written": "2"}
    asked = client.get("wide", {"user_id": list(range(5_000_530, 5_000_534))})
    assert asked.view_status[:, 0].tolist() == [1, 1, 3, 3]


def test_lists_and_describes(client: featserve.Client) -> None:
    """The client lists the services and describes one, with types and keys."""
    assert [(s.name, s.version, s.promoted) for s in client.list_services()] == [
        ("compact", 1, True),
        ("devices", 1, True),
        ("ranking", 1, True),
        ("wide", 1, True),
    ]
    schema = client.describe("devices@1")
    assert {name: str(type_) for name, type_ in schema.keys.items()} == {
        "serial": "bytes",
        "made": "timestamp",
        "model": "int32",
        "real": "bool",
    }
    assert client.get(f"wide#{client.describe('wide').hash}", {"user_id": [1]}).schema.name == "wide"


def test_errors_carry_what_the_server_said(client: featserve.Client) -> None:
    """An error of the server's is raised as the class that it was there, with its violations and metadata."""
    with pytest.raises(UnknownName, match="did you mean 'wide'") as unknown:
        client.get("wyde", {"user_id": [1]})
    assert unknown.value.metadata == {"kind": "feature_service", "name": "wyde"}
    with pytest.raises(SchemaMismatch, match="is now wide@1"):
        client.get("wide#00000000", {"user_id": [1]})
    with pytest.raises(InvalidRequest) as invalid:
        client.write("numbers", rows([1]), event_time=NOW + timedelta(days=1))
    assert {v.field for v in invalid.value.violations} == {"rows[0].event_time", "rows[0].known_at"}
    with pytest.raises(TooLarge, match="Send several requests"):
        client.get("wide", {"user_id": np.arange(10_001)})
    with pytest.raises(TooLarge, match=r"larger than max.*Send several requests"):
        client.get("wide", {"user_id": np.arange(3_000_000)})
    assert len(client.get("wide", {"user_id": [1]})) == 1


def test_overload_is_named(small: Server) -> None:
    """A client that is refused because the server has enough to do gets Overloaded."""
    with small.stub() as stub, small.client() as client:
        assert client.describe("wide").version == 1
        held = [Stream(stub) for _ in range(8)]
        assert all(stream.ask(1).response.rows == 1 for stream in held)
        with pytest.raises(Overloaded, match="8 calls are under way"):
            client.get("wide", {"user_id": [1]})
        for stream in held:
            stream.end()
        until("there is room again", lambda: not stub.GetFeatures.future(wide(1)).exception())
        assert len(client.get("wide", {"user_id": [1]})) == 1


def test_a_timeout_covers_all_that_a_call_does(server: Server) -> None:
    """``timeout`` bounds a call that has to fetch the schema first, against a server that does not answer."""
    server.signal(signal.SIGSTOP)
    try:
        with server.client() as client:
            calls: list[Callable[[], object]] = [
                lambda: client.get("wide", {"user_id": [1]}, timeout=0.2),
                lambda: client.write("numbers", rows([1]), event_time=NOW, timeout=0.2),
                lambda: client.write_stream("numbers", [rows([1])], event_time=NOW, timeout=0.2),
                lambda: client.describe("wide", timeout=0.2),
                lambda: client.list_services(timeout=0.2),
            ]
            for call in calls:
                began = time.monotonic()
                with pytest.raises(DeadlineExceeded):
                    call()
                assert 0.15 < time.monotonic() - began < 3
    finally:
        server.signal(signal.SIGCONT)
    with server.client() as client:
        assert len(client.get("wide", {"user_id": [1]}, timeout=60)) == 1


@pytest.mark.slow
def test_no_server_is_unavailable() -> None:
    """Where nothing listens the error is Unavailable and names the address, after a few seconds of trying."""
    with Relay(1) as relay, featserve.connect(relay.address) as client, pytest.raises(Unavailable, match=relay.address):
        client.get("wide", {"user_id": [1]})


def test_a_server_that_comes_late_is_waited_for(server: Server) -> None:
    """A call that finds no server tries again, and succeeds with one that is up a moment later."""
    with Relay(server.port) as relay, featserve.connect(relay.address, timeout=60) as client:
        for _ in range(2):
            timer = threading.Timer(0.2, relay.open)
            timer.start()
            assert len(client.get("wide", {"user_id": [1]})) == 1
            timer.join()
            relay.cut()


class Refusing(grpc.GenericRpcHandler):
    """A server that ends its first pushes with these codes. ``pushes``: how many have come."""

    def __init__(self, *codes: grpc.StatusCode) -> None:
        self._codes, self.pushes = list(codes), 0

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(
            {"PushEvents": self._push, "DescribeEvents": self._describe}[details.method.rpartition("/")[2]]
        )

    def _describe(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        return encode_events(EventSource("visits", [Field("user_id", Int64)])).SerializeToString()

    def _push(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.pushes += 1
        if self._codes:
            context.abort(self._codes.pop(0), "as told")
        return pb.PushEventsResponse(events=1, counted=1).SerializeToString()

    @contextmanager
    def serving(self) -> Iterator[int]:
        """Serve; give the port."""
        server = grpc.server(ThreadPoolExecutor(2), [self])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield port
        server.stop(None).wait()


def test_a_push_is_repeated_only_where_it_was_not_begun() -> None:
    """What a server has not begun with is sent again, nothing else; and without a connection a push is not sent."""
    refusing = Refusing(grpc.StatusCode.CANCELLED, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    with refusing.serving() as port, Relay(port) as relay, featserve.connect(relay.address, timeout=60) as client:
        relay.open()

        def push() -> int:
            return client.push("visits", {"user_id": [1]}, event_time=NOW).counted

        with pytest.raises(Unavailable):
            push()
        assert refusing.pushes == 3
        assert push() == 1
        relay.cut()
        with pytest.raises((Unavailable, DeadlineExceeded)):
            client.list_services(timeout=0.2)  # the client knows now
        timer = threading.Timer(0.5, relay.open)
        timer.start()
        assert push() == 1
        timer.join()
        assert refusing.pushes == 5


@pytest.mark.slow
def test_a_restart_under_load_is_survived(start: Callable[..., Server]) -> None:
    """While a server is killed and started again, clients see answers or Unavailable, and then answers again."""
    first = start()
    with Relay(first.port) as relay, ThreadPoolExecutor(4) as pool:
        relay.open()
        stop = threading.Event()
        answered: list[float] = []

        def ask() -> set[type[FeatserveError]]:
            failed: set[type[FeatserveError]] = set()
            with featserve.connect(relay.address, timeout=60) as client:
                while not stop.is_set():
                    try:
                        client.get("wide", {"user_id": [1, 2]})
                        answered.append(time.monotonic())
                    except FeatserveError as error:
                        failed.add(type(error))
            return failed

        asking = [pool.submit(ask) for _ in range(4)]
        try:
            until("all ask", lambda: len(answered) > 100)
            first.signal(signal.SIGSTOP)
            stop.wait(0.1)  # requests are left unread, so its end resets the connection
            first.kill()
            with Server(first.project) as second:
                relay.target = second.port
                restarted = time.monotonic()
                until("answers come again", lambda: sum(at > restarted for at in answered[-100:]) > 50)
                stop.set()
                assert set().union(*(work.result() for work in asking)) <= {Unavailable}
        finally:
            stop.set()  # the pool waits for those who ask


def test_the_schema_is_fetched_once_for_each_version(following: Server) -> None:
    """A client asks for a schema at its first request and when an answer follows another, and not in between."""
    with Relay(following.port) as relay, featserve.connect(relay.address, timeout=60) as client:
        relay.open()
        for version in (1, 2):
            assert client.get("wide", {"user_id": [1]}).schema.version == version
            fetched = relay.received
            for _ in range(5):
                assert client.get("wide", {"user_id": [1]}).schema.version == version
            assert relay.received - fetched < 5 * 1_000, "a schema of fifty features is larger"
            if version == 1:
                following.apply('wide_2 = FeatureService("wide", [numbers], dtype=Float64, version=2)')


def test_a_writer_follows_a_new_version_of_a_view(following: Server) -> None:
    """A client that has written to a view by its name writes to the next version once that is served."""
    with following.client() as client:
        old = places(["a"], ["1"]) | {"temp": [1.0], "wind": [2.0]}
        new = places(["a"], ["1"]) | {"temp": [1.0], "rain": [3.0]}
        client.write("weather", old, event_time=NOW)
        with pytest.raises(InvalidRequest, match="unknown column 'rain'"):
            client.write("weather", new, event_time=NOW)
        following.apply(
            """
weather_2 = FeatureView("weather", place, [Field("temp", Float32), Field("rain", Float64)], version=2)
rain = FeatureService("rain", [weather_2])
"""
        )
        assert client.write("weather", new, event_time=NOW).stored == 1
        assert client.write_stream("weather", [new, new], event_time=NOW).rows == 2
        with pytest.raises(InvalidRequest, match="unknown column 'wind'"):
            client.write("weather", old, event_time=NOW)
        assert client.write("weather@1", old, event_time=NOW).rows == 1
        assert client.get("rain", places(["a"], ["1"])).to_dict() == {"weather.temp": [1.0], "weather.rain": [3.0]}


def test_a_client_serves_many_threads(client: featserve.Client) -> None:
    """Threads that share a client, and first meet its empty caches at once, all get their own answers."""
    known = list(range(5_000_600, 5_000_620))
    client.write("numbers", rows(known) | {"f0": np.array(known, float)}, event_time=NOW)
    together = threading.Barrier(16)

    def ask(thread: int) -> None:
        rng = np.random.default_rng(thread)
        together.wait(60)
        for _ in range(20):
            users = rng.integers(5_000_600, 5_000_620, size=rng.integers(1, 9))
            answer = client.get("wide", {"user_id": users})
            assert answer.values[:, 0].tolist() == users.astype(float).tolist()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))


def test_calls_are_spread_over_connections(server: Server) -> None:
    """A client with several connections uses each in turn, for reads and writes; with less than one it is refused."""

    def connected() -> set[int]:
        sockets = psutil.Process().net_connections("tcp")
        return {s.laddr.port for s in sockets if s.status == psutil.CONN_ESTABLISHED and s.raddr.port == server.port}

    calls: list[Callable[[featserve.Client], object]] = [
        lambda client: client.get("wide", {"user_id": [1]}),
        lambda client: client.write("numbers", rows([5_000_700]), event_time=NOW),
    ]
    for call in calls:
        before = connected()
        with featserve.connect(server.address, timeout=60, connections=3) as client:
            for _ in range(6):
                call(client)
            assert len(connected() - before) == 3
    with pytest.raises(InvalidRequest, match="connections: 0 is less than 1"):
        featserve.connect(server.address, connections=0)


def test_a_client_refuses_at_once_what_is_more_than_it_may_have_under_way(server: Server) -> None:
    """A call, or a stream, beyond ``max_concurrent`` fails while those before it wait; they are answered, and so is who
    asks again then. A call that failed leaves room as one that was answered does.
    """
    full = "2 calls to .* are under way, the most of this client .max_concurrent."
    with featserve.connect(server.address, max_concurrent=2) as client, ThreadPoolExecutor(6) as pool:

        def ask(number: int) -> featserve.FeatureMatrix:
            return client.get("wide", {"user_id": [number]}, timeout=60)

        ask(1)
        for _ in range(3):
            with pytest.raises(UnknownName):
                client.get("no_such", {"user_id": [1]})
        server.signal(signal.SIGSTOP)
        try:
            calls = [pool.submit(ask, number) for number in range(6)]
            until("four are refused", lambda: sum(call.done() for call in calls) == 4)
            waiting = [call for call in calls if not call.done()]
            assert all(isinstance(call.exception(), Overloaded) for call in calls if call not in waiting)
            with pytest.raises(Overloaded, match=full):
                client.write("numbers", rows([1]), event_time=NOW)
            with pytest.raises(Overloaded, match=full):
                client.write_messages(iter(()))
            assert not any(call.done() for call in waiting)
        finally:
            server.signal(signal.SIGCONT)
        assert [len(call.result()) for call in waiting] == [1, 1]
        assert len(ask(3)) == 1
    with pytest.raises(InvalidRequest, match="max_concurrent: 0 is less than 1"):
        featserve.connect(server.address, max_concurrent=0)
