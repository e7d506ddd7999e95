"""What a worker passes on to the writer, here in one process: while either is replaced, or the writer overloaded."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pytest

import featserve
from featserve._proto import serving_pb2 as pb
from featserve.batch import EntityKeys
from featserve.config import Config, load_config
from featserve.engine import Engine
from featserve.errors import Overloaded, Unavailable
from featserve.plan import Plans
from featserve.registry import Registry
from featserve.server.forward import Forward
from featserve.server.grpcio import GrpcioServer
from featserve.server.service import Limits, Service
from featserve.server.telemetry import Telemetry
from featserve.server.transport import Transport, transport
from featserve.store import open_store
from featserve.store.follow import Follower
from featserve.store.rocksdb import RocksStore
from tests.server.messages import now_us, packed
from tests.serving import PATIENCE_S, TRANSPORTS, Project

VISITS = """
from datetime import timedelta

from featserve import Aggregate, Entity, EventSource, FeatureService, FeatureView, Field, Int64, Rolling

user = Entity("user", {"user_id": Int64})
visits = EventSource("visits", [Field("user_id", Int64)])
seen = FeatureView("seen", user, events=visits, aggregates=[Aggregate("n", "count", over=Rolling(timedelta(days=1)))])
users = FeatureService("users", [seen])
"""


@dataclass
class Both:
    """A store, its service, and what a worker has of them."""

    config: Config
    service: Service
    forward: Callable[[], Forward]
    socket: Path

    async def writer(self, most_calls: int = 100) -> GrpcioServer:
        """Start a writer, where the one before was."""
        config = replace(self.config.server, max_concurrent=most_calls)
        server = GrpcioServer(self.service, config, Telemetry(), for_workers=True)
        await server.listen(f"unix:{self.socket}")
        return server

    async def worker(self, name: str, port: int = 0) -> tuple[Transport, int, Forward]:
        """Start a worker on a transport; return it, its port, and its way to the writer."""
        config, forward = replace(self.config.server, transport=name), self.forward()
        server = transport(config)(self.service, config, Telemetry(), forward)
        return server, await server.start("127.0.0.1", port, reuse_port=True), forward

    def total(self) -> int:
        """Return how many events the store has counted."""
        engine = self.service.engine
        plan = engine.plans.service("users")
        found = engine.read(plan, EntityKeys.of({"user_id": [1]}, plan.schema.keys), now_us())
        return int(found.column("seen.n").to_list()[0])


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    """Open a store to write, and to follow."""
    config = load_config(Project.make(tmp_path / "p", VISITS).folder)
    with Registry.open(config.registry.url) as registry:
        plans = Plans(registry.snapshot())
    store = open_store(config.store.path, "write", block_cache_mb=8, row_cache_mb=1)
    following = open_store(config.store.path, "follow", block_cache_mb=8, row_cache_mb=1)
    follower, socket = Follower(following, 0.002), tmp_path / "writer"
    service = Service(Engine(store, plans), Limits(1_000, 10**12), now_us)
    yield Both(config, service, lambda: Forward(socket, following, follower), socket)
    follower.close()
    following.close()
    store.close()


def visit(user: int) -> bytes:
    """Return a push of one event."""
    times = now_us().to_bytes(8, "little")
    request = pb.PushEventsRequest(source="visits", columns=[packed("user_id", "q", user)], event_times=times)
    return request.SerializeToString()


def one(data: bytes) -> Callable[[], Awaitable[bytes | None]]:
    """Return what reads one message."""
    messages = iter((data, None))

    async def read() -> bytes | None:
        return next(messages)

    return read


async def push(forward: Forward, seconds: float | None = 30.0) -> int:
    """Push an event; return how many were counted."""
    answer = await forward.call("PushEvents", (), one(visit(1)), seconds)
    return pb.PushEventsResponse.FromString(answer).counted


def test_pushes_wait_while_the_writer_is_replaced(both: Both) -> None:
    """Of calls that go on while one writer follows another, each is counted once."""

    async def scenario() -> tuple[int, int]:
        forward, stop, counted = both.forward(), asyncio.Event(), 0

        async def pushing() -> None:
            nonlocal counted
            while not stop.is_set():
                more = await push(forward)
                counted += more

        pushes = [asyncio.create_task(pushing()) for _ in range(4)]
        for _ in range(3):
            await asyncio.sleep(0.1)  # there is no writer
            server, before = await both.writer(), counted
            while counted < before + 20:
                await asyncio.sleep(0.01)
            await server.drain(5)
        server = await both.writer()
        stop.set()
        await asyncio.gather(*pushes)
        await forward.close()
        await server.drain(0)
        return counted, both.total()

    counted, stored = asyncio.run(scenario())
    assert counted == stored >= 60


class Load:
    """Clients of a port that push and read until told to stop. ``counted``: how many events of each the server did."""

    def __init__(self, port: int, clients: int) -> None:
        self._port, self._stop, self.counted = port, threading.Event(), [0] * clients
        self._pool = ThreadPoolExecutor(clients)
        self._going = [self._pool.submit(self._run, client) for client in range(clients)]

    def _run(self, number: int) -> None:
        with featserve.connect(f"127.0.0.1:{self._port}", timeout=PATIENCE_S, connections=2) as client:
            while not self._stop.wait(0.005):
                self.counted[number] += client.push("visits", {"user_id": [1]}, event_time=datetime.now(UTC)).counted
                assert len(client.get("users", {"user_id": [1]})) == 1

    async def goes_on(self) -> None:
        """Wait until each client has pushed some more; raises what one has failed with."""
        before = list(self.counted)
        while any(now < then + 5 for now, then in zip(self.counted, before, strict=True)):
            await asyncio.sleep(0.01)
            for each in self._going:
                if each.done():
                    each.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.to_thread(self._pool.shutdown)
        for each in self._going:
            each.result()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_no_call_fails_while_workers_are_replaced(both: Both, name: str) -> None:
    """Pushes and reads of clients succeed while a worker follows another on its port, and each push counts once."""

    async def scenario() -> int:
        writer = await both.writer()
        server, port, forward = await both.worker(name)
        async with Load(port, 4) as load:
            for _ in range(4):
                await load.goes_on()
                following, _, its_forward = await both.worker(name, port)
                await server.drain(5)
                await forward.close()
                server, forward = following, its_forward
            await load.goes_on()
        await server.drain(0)
        await forward.close()
        await writer.drain(0)
        return sum(load.counted)

    counted = asyncio.run(scenario())
    assert both.total() == counted


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_stream_holds_up_nobody_else(both: Both, name: str) -> None:
    """While a worker waits for the end of a stream, longer than clients try again, calls of others succeed."""

    async def scenario() -> int:
        writer = await both.writer()
        server, port, forward = await both.worker(name)
        messages: queue.SimpleQueue[pb.PushEventsRequest | None] = queue.SimpleQueue()
        with featserve.connect(f"127.0.0.1:{port}") as client:
            async with Load(port, 2) as load:
                streaming = asyncio.create_task(asyncio.to_thread(client.push_messages, iter(messages.get, None)))
                messages.put(pb.PushEventsRequest.FromString(visit(1)))
                await load.goes_on()
                following, _, its_forward = await both.worker(name, port)
                draining = asyncio.create_task(server.drain(PATIENCE_S))
                await asyncio.wait((draining,), timeout=5)
                await load.goes_on()
                messages.put(pb.PushEventsRequest.FromString(visit(1)))
                messages.put(None)
                streamed = (await streaming).counted
                await draining
                await load.goes_on()
        await following.drain(0)
        for each in (forward, its_forward):
            await each.close()
        await writer.drain(0)
        assert streamed == 2
        return sum(load.counted) + streamed

    counted = asyncio.run(scenario())
    assert both.total() == counted


def test_a_write_without_a_writer_is_given_up_in_time(both: Both) -> None:
    """Where no writer comes, a call says so before its deadline, and nothing of it is counted."""

    async def scenario() -> float:
        forward, began = both.forward(), time.monotonic()
        with pytest.raises(Unavailable, match="is being started again"):
            await push(forward, 1.0)
        took = time.monotonic() - began
        await forward.close()
        return took

    assert asyncio.run(scenario()) < 1.0
    assert both.total() == 0


@pytest.mark.parametrize("seconds", [2.0, None])
def test_what_is_committed_is_acknowledged_in_time(
    both: Both, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the worker's own store does not catch up, a write is answered before its deadline, and without one, too."""
    monkeypatch.setattr(RocksStore, "catch_up", lambda store: None)

    async def read() -> bytes | None:
        await asyncio.sleep(0.5)
        return next(messages)

    async def scenario() -> None:
        forward, server = both.forward(), await both.writer()
        async with asyncio.timeout(seconds or 20):
            answer = await forward.call("StreamEvents", (), read, seconds)
        assert pb.StreamEventsResponse.FromString(answer).counted == 1
        await forward.close()
        await server.drain(0)

    visited = pb.StreamEventsRequest(request=pb.PushEventsRequest.FromString(visit(1)))
    messages = iter((visited.SerializeToString(), None))
    asyncio.run(scenario())


def test_a_writer_with_too_many_calls_is_overloaded(both: Both) -> None:
    """What gRPC refuses at the writer, as its own limit is reached, is told as such, and counted by nobody."""

    async def scenario() -> None:
        forward, server = both.forward(), await both.writer(1)
        waiting, idle = asyncio.Event(), asyncio.Event()

        async def read() -> bytes | None:
            waiting.set()
            await idle.wait()
            return None

        first = asyncio.create_task(forward.call("StreamEvents", (), read, 30.0))
        await waiting.wait()
        refused = await asyncio.gather(*(push(forward) for _ in range(50)), return_exceptions=True)
        assert {type(each) for each in refused} == {Overloaded}
        assert any("has too many calls" in str(each) for each in refused)
        idle.set()
        await first
        await forward.close()
        await server.drain(0)

    asyncio.run(scenario())
    assert both.total() == 0
