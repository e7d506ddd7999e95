"""How a server stops: it says so, finishes what is under way within a limit, and closes its store clean."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count, islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import featserve
from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.server.grpcio import GrpcioServer
from featserve.server.telemetry import Telemetry
from tests.server.messages import numbers, refusal, wide
from tests.server.streams import Stream, busy
from tests.serving import PATIENCE_S, TRANSPORTS, Project, Server, served_here

pytest_plugins = ["tests.served"]


def stored(server: Server, users: list[int]) -> list[bool]:
    """Open the store that a server has closed, for writing as the next one would, and say which users it holds."""
    with featserve.open(server.project.folder, write=True) as project:
        found = project.get("wide", {"user_id": users}).view_status[:, 0]
        return [status == featserve.Status.PRESENT for status in found]


def test_sigterm_drains(transport: str, start: Callable[..., Server]) -> None:
    """What is under way finishes, who watches is told, and the next server can start. What is new grpcio refuses.

    pygrpc-native, which cannot tell a client to go, answers it as long as what is under way lasts.
    """
    server = start(drain_seconds=60, max_rows=100_000, max_message_mb=256)
    with ExitStack() as stack:
        stub = stack.enter_context(server.stub())
        watcher: Any = health_pb2_grpc.HealthStub(stack.enter_context(server.channel()))
        watch = watcher.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stream = Stream(stub)
        assert stream.ask(1).response.rows == 1
        writes = [*busy(stub), stub.WriteRows.future(numbers([7], 1.0), timeout=60)]
        stub.ListServices(pb.ListServicesRequest())  # has come after them
        server.signal(signal.SIGTERM)
        # The watch says so, and ends: it would hold up the drain for ever.
        assert [answer.status for answer in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        assert stream.ask(1, 2).response.rows == 2
        with server.stub() as other:
            # CANCELLED is how grpcio refuses a call that comes at the very moment.
            ok, racing, refused = grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE
            codes = iter(lambda: other.GetFeatures.future(wide(1)).code(), refused)
            assert set(codes if transport == "grpcio" else islice(codes, 10)) <= {ok, racing}
        assert [call.result().rows for call in writes] == [40_000, 40_000, 40_000, 1]
        assert stream.ask(7).response.status == b"\x01"
        assert server.process.poll() is None
        stream.end()
        assert server.process.wait(60) == 0
    assert [event["message"] for event in server.events()][-2:] == ["draining", "stopped"]
    assert stored(server, [7, 8]) == [True, False]


def test_nothing_acknowledged_is_lost_when_stopped_under_load(start: Callable[..., Server]) -> None:
    """Of writes from several threads while it stops, each was acknowledged and is there, or was refused.

    A call that does not end is ended when the limit has passed. SIGINT, as from a terminal, drains like SIGTERM, and
    asking twice changes nothing.
    """
    server = start(drain_seconds=0.5)
    acknowledged: list[int] = []
    going = threading.Event()

    def write(first: int) -> grpc.StatusCode:
        with server.stub() as stub:
            for user in count(first):
                code = stub.WriteRows.future(numbers([user], 1.0), timeout=60).code()
                if code is not grpc.StatusCode.OK:
                    return code
                acknowledged.append(user)
                if len(acknowledged) > 30:
                    going.set()
        raise AssertionError("it counts for ever")

    with ThreadPoolExecutor(4) as pool, server.stub() as stub:
        writing = [pool.submit(write, first * 100_000) for first in range(4)]
        assert going.wait(60)
        stream = Stream(stub)
        assert stream.ask(1).response.rows == 1
        began = time.monotonic()
        server.signal(signal.SIGINT)
        server.signal(signal.SIGINT)
        assert stream.call.code() is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(60) == 0
        assert 0.4 < time.monotonic() - began < 10
        stream.drop()
        # CANCELLED is how grpcio refuses a call that comes at the very moment.
        assert {work.result() for work in writing} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert all(stored(server, acknowledged))
    assert [event for event in server.events() if event["level"] != "info"] == []


def test_what_comes_when_connections_are_about_to_close_was_not_begun(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is refused for that says so, with a code that its client repeats whatever it is, and when to."""
    servers: list[Any] = []
    monkeypatch.setattr(Telemetry, "count", lambda telemetry, server: servers.append(server))

    def ask(address: str) -> None:
        (server,) = (each for each in servers if isinstance(each, GrpcioServer))
        with grpc.insecure_channel(address) as channel:
            stub = FeatureServingServiceStub(channel)
            calls: list[Callable[[], Any]] = [
                lambda: stub.GetFeatures(wide(1), timeout=PATIENCE_S),
                lambda: stub.WriteRows(numbers([1], 1.0), timeout=PATIENCE_S),
                lambda: stub.StreamRows(iter(()), timeout=PATIENCE_S),
            ]
            for call in calls:
                call()
                server.refusing = True
                error = refusal(call)
                assert (error.code, error.reason) == (grpc.StatusCode.CANCELLED, "NOT_BEGUN")
                assert "make it again" in error.message
                with pytest.raises(grpc.RpcError) as caught:
                    stub.StreamRows(iter(()), timeout=PATIENCE_S)
                told: Any = caught.value.trailing_metadata()
                assert dict(told)["grpc-retry-pushback-ms"] == "800"
                server.refusing = False

    served_here(Project.make(tmp_path / "project", **TRANSPORTS[transport]), ask)
