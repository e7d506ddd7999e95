"""Deadlines, cancellation and the limit on concurrent calls, the same on every transport."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.server.meter import Meter
from featserve.server.telemetry import Telemetry
from tests.server.held import Held
from tests.server.messages import numbers, ranking, read_error, refusal, wide
from tests.server.streams import Stream, busy
from tests.serving import PATIENCE_S, TRANSPORTS, Project, Server, served_here, until

pytest_plugins = ["tests.served"]

PRESENT, NOT_FOUND = b"\x01", b"\x03"
GET = "/featserve.v1.FeatureServingService/GetFeatures"


@contextmanager
def streams(stub: FeatureServingServiceStub, count: int) -> Iterator[list[Stream]]:
    """Hold streams open, each of which has been answered."""
    opened = [Stream(stub) for _ in range(count)]
    for stream in opened:
        assert stream.ask(1).response.rows == 1
    yield opened
    for stream in opened:
        stream.drop()


@pytest.fixture(scope="module")
def hasty(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server that gives a request which carries no deadline 150 ms."""
    settings: dict[str, Any] = {"default_deadline_ms": 150, "max_rows": 100_000, "max_message_mb": 256}
    with Server(Project.make(tmp_path_factory.mktemp("hasty"), **TRANSPORTS[transport] | settings)) as server:
        yield server


def test_a_write_whose_deadline_passes_in_the_queue_is_not_done(hasty: Server) -> None:
    """A write that waits for its turn past its deadline, its caller's or the server's own, is never done."""
    with hasty.stub() as stub:
        before = busy(stub, writes=8)
        own = stub.WriteRows.future(numbers([1], 1.0), timeout=0.1)
        servers = stub.WriteRows.future(numbers([2], 1.0))
        cancelled = stub.WriteRows.future(numbers([3], 1.0), timeout=60)
        patient = stub.WriteRows.future(numbers([4], 1.0), timeout=60)
        error = read_error(own.exception())
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        error = read_error(servers.exception())
        assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert not before[-1].done(), "the writer was not kept busy for long enough"
        cancelled.cancel()
        assert patient.result().stored == 1
        assert stub.GetFeatures(wide(1, 2, 3, 4), timeout=60).status == NOT_FOUND * 3 + PRESENT
        assert [call.result().rows for call in before] == [40_000] * 8


def test_a_call_without_its_message_ends(hasty: Server) -> None:
    """A unary call that never sends its message ends at its deadline; one that ends without is refused."""
    never = threading.Event()
    with hasty.channel() as channel:
        call: Any = channel.stream_unary(GET).future
        waiting = call(iter(lambda: never.wait(60) and b"", b""), timeout=0.2)
        assert read_error(waiting.exception(timeout=60)).code is grpc.StatusCode.DEADLINE_EXCEEDED
        never.set()
        # INTERNAL is what gRPC's own servers say of it.
        refused = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
        assert read_error(call(iter(())).exception(timeout=60)).code in refused
        assert FeatureServingServiceStub(channel).GetFeatures(wide(1), timeout=60).rows == 1


@pytest.mark.usefixtures("before_its_message")
def test_a_call_that_waits_for_its_message_is_under_way(hasty: Server) -> None:
    """A unary call that sends neither a deadline nor its message ends at the server's default deadline."""
    never = threading.Event()
    with hasty.channel() as channel:
        call: Any = channel.stream_unary(GET).future
        waiting = call(iter(lambda: never.wait(60) and b"", b""))
        try:
            error = read_error(waiting.exception(timeout=5))
            assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        finally:
            waiting.cancel()
            never.set()


def test_reads_are_answered_beside_a_busy_writer(small: Server) -> None:
    """While a large write is under way, reads are answered."""
    with small.stub() as stub:
        writes = busy(stub)
        answered = 0
        while not writes[-1].done():
            assert stub.GetFeatures(wide(1)).rows == 1
            answered += 1
        assert answered > 3


def test_a_deadline_that_is_over_is_not_begun(small: Server) -> None:
    """A request for which no time is left is refused, and the connection goes on."""
    with small.stub() as stub:
        error = refusal(lambda: stub.GetFeatures(wide(1), timeout=-1))
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert stub.GetFeatures(wide(1), timeout=60).rows == 1


def test_reads_whose_deadline_passes_behind_another_are_not_done(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that wait for one before them past their deadline are never done; those with time left are."""
    reads, meter = Held(monkeypatch), Meter()
    monkeypatch.setattr(Telemetry, "open", lambda *arguments: Telemetry(None, meter))

    def ask(address: str) -> None:
        with ExitStack() as opened:
            options = [("grpc.use_local_subchannel_pool", 1)]
            channels = [opened.enter_context(grpc.insecure_channel(address, options)) for _ in range(5)]
            stubs = [FeatureServingServiceStub(channel) for channel in channels]
            assert [stub.GetFeatures(wide(1)).rows for stub in stubs] == [1] * 5
            reads.keys.clear()
            with reads.held() as begun:
                first = stubs[0].GetFeatures.future(wide(1), timeout=PATIENCE_S)
                assert begun.wait(PATIENCE_S)
                calls = [stub.GetFeatures.future(wide(1, 2), timeout=0.1) for stub in stubs * 10]
                patient = [stub.GetFeatures.future(wide(1, 2, 3), timeout=PATIENCE_S) for stub in stubs]
                assert {call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
            assert [call.result().rows for call in (first, *patient)] == [1, *[3] * 5]

    served_here(Project.make(tmp_path / "project", **TRANSPORTS[transport]), ask)
    assert sum(reads.keys) == 1 + 3 * 5
    assert sum(tally.rows for tally in meter.tallies.values()) == 5 + sum(reads.keys)


REFUSED = {
    "native": {grpc.StatusCode.RESOURCE_EXHAUSTED},
    "grpcio": {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED},
}
"""How calls end that come faster than they can be taken on: gRPC itself has but CANCELLED for those."""


@pytest.mark.parametrize("ending", ["end", "drop"])
def test_calls_over_the_limit_are_refused_at_once(small: Server, ending: str) -> None:
    """With ``max_concurrent`` calls under way the next is refused without waiting; when one ends, there is room."""
    with small.stub() as stub, small.channel() as channel, streams(stub, 8) as held:
        for refused in (
            lambda: stub.GetFeatures(wide(1)),
            lambda: stub.WriteRows(numbers([1], 1.0)),
            lambda: stub.PushEvents(pb.PushEventsRequest()),
            lambda: stub.StreamEvents(iter([pb.StreamEventsRequest()])),
            lambda: next(stub.StreamFeatures(iter([pb.StreamFeaturesRequest(request=wide(1))]))),
            lambda: stub.StreamRows(iter([pb.StreamRowsRequest(request=numbers([1], 1.0))])),
        ):
            error = refusal(refused)
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert "max_concurrent" in error.message
        # Whoever watches the server's health must not take a busy one for a dead one.
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        assert held[1].ask(1, 2).response.rows == 2
        getattr(held[0], ending)()
        until("there is room again", lambda: not stub.GetFeatures.future(wide(1)).exception())


def test_queued_writes_count(small: Server, transport: str) -> None:
    """Writes that wait for the writer count as calls under way, so their queue is bounded."""
    with small.stub() as stub:
        before = busy(stub)
        calls = [stub.WriteRows.future(numbers([i], 1.0), timeout=60) for i in range(50)]
        answered = [call.code() for call in (*before, *calls)]
        assert set(answered) <= {grpc.StatusCode.OK, *REFUSED[transport]}
        assert 40 < len(answered) - answered.count(grpc.StatusCode.OK) <= 45
        if transport == "grpcio":  # which counts a call before its message is there, however large that is
            assert all(call.code() is grpc.StatusCode.OK for call in before)


def test_a_burst_is_answered_or_refused(small: Server, transport: str) -> None:
    """Of thousands of requests at once each is answered, or refused as too many; then the server is as before."""
    with small.stub() as stub:
        request = ranking(1)
        calls = [stub.GetFeatures.future(request, timeout=60) for _ in range(2_000)]
        codes = {call.code() for call in calls}
        assert codes <= {grpc.StatusCode.OK, *REFUSED[transport]}
        assert grpc.StatusCode.OK in codes
        assert [stub.GetFeatures(request).rows for _ in range(100)] == [1] * 100


def test_cancelled_calls_free_their_place(small: Server, rng: np.random.Generator) -> None:
    """However calls end, by cancelling, by a deadline or well, none of them counts afterwards."""
    with small.stub() as stub:
        for _ in range(300):
            kind = rng.integers(4)
            if kind == 0:
                stub.GetFeatures.future(wide(1)).cancel()
            elif kind == 1:
                stub.GetFeatures.future(wide(1), timeout=float(rng.random() * 2e-3))
            elif kind == 2:
                Stream(stub).drop()
            else:
                stub.WriteRows.future(numbers([1], 1.0)).cancel()
        with until_room(stub, 8) as held:
            assert refusal(lambda: stub.GetFeatures(wide(1))).reason == "OVERLOADED"
            assert all(stream.ask(1).response.rows == 1 for stream in held)
    assert [e for e in small.events() if e["level"] == "error"] == []


@contextmanager
def until_room(stub: FeatureServingServiceStub, count: int) -> Iterator[list[Stream]]:
    """Open streams as soon as there is room for all of them."""
    held: list[Stream] = []

    def opened() -> bool:
        stream = Stream(stub)
        try:
            stream.ask(1)
        except grpc.RpcError:
            stream.drop()
            return False
        held.append(stream)
        return len(held) == count

    until(f"there is room for {count} streams", opened)
    yield held
    for stream in held:
        stream.drop()
