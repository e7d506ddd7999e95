"""The server on pygrpc-native, where it is on its own: what ends a thread of it ends it, and how it refuses calls."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench import h2load
from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.config import load_config
from featserve.errors import ServingError
from featserve.server import native
from featserve.server.app import run
from featserve.server.meter import Meter
from featserve.server.native import NativeServer
from featserve.server.service import Service
from featserve.server.telemetry import Telemetry
from featserve.server.together import Share
from featserve.stages import Stages
from tests.server.collector import Collector
from tests.server.held import Held
from tests.server.messages import numbers, ranking, wide
from tests.serving import PATIENCE_S, TRANSPORTS, Project, Server, served_here


def asked_at_once(
    channel: grpc.Channel,
    reads: Held,
    requests: Iterable[pb.GetFeaturesRequest],
    *metadata: tuple[str, str],
) -> list[pb.GetFeaturesResponse]:
    """Ask for what is answered in one turn, as it comes while another read is held; return the answers."""
    stub: Any = FeatureServingServiceStub(channel)
    with reads.held() as begun:
        first = stub.GetFeatures.future(wide(0), timeout=PATIENCE_S)
        assert begun.wait(PATIENCE_S)
        calls = [stub.GetFeatures.future(request, PATIENCE_S, metadata) for request in requests]
        # The connection carries them in order: where this is answered, the others wait.
        health: Any = health_pb2_grpc.HealthStub(channel)
        health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert first.result().rows == 1
    return [call.result() for call in calls]


@pytest.mark.parametrize("method", ["GetFeatures", "WriteRows"])
def test_a_failure_of_a_thread_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Where answering fails outside of any call, those who wait are told, and the server ends with an error."""
    codes: list[grpc.StatusCode] = []

    def fail(server: NativeServer, call_id: int, answer: bytes) -> None:
        raise RuntimeError("no more")

    def ask(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = FeatureServingServiceStub(channel)
            request = wide(1) if method == "GetFeatures" else numbers([1], 1.0)
            codes.append(getattr(stub, method).future(request, timeout=PATIENCE_S).code())

    def ready(address: str) -> None:
        asking.append(threading.Thread(target=ask, args=(address,)))
        asking[0].start()

    asking: list[threading.Thread] = []
    monkeypatch.setattr(NativeServer, "_respond", fail)
    config = load_config(Project.make(tmp_path / "project", **TRANSPORTS["native"]).folder)
    with pytest.raises(ServingError, match="a thread that answers has failed: no more"):
        run(config, ready)
    asking[0].join(PATIENCE_S)
    assert codes == [grpc.StatusCode.UNAVAILABLE]


def test_reads_that_wait_are_answered_with_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen reads that wait behind another share one read of the store, and each gets its own answer."""
    reads = Held(monkeypatch)

    def ask(address: str) -> list[float]:
        with grpc.insecure_channel(address) as channel:
            stub = FeatureServingServiceStub(channel)
            for user in range(17):
                stub.WriteRows(numbers([user], float(user)))
            reads.keys.clear()
            answers = asked_at_once(channel, reads, [wide(user) for user in range(1, 17)])
            return [float(np.frombuffer(answer.values, "<f4")[0]) for answer in answers]

    project = Project.make(tmp_path / "project", **TRANSPORTS["native"], max_streams=32)
    assert served_here(project, ask) == list(range(1, 17))
    assert reads.keys == [1, 16]


def test_a_trace_tells_for_how_long_other_services_were_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two services that are asked for at once, the one that is answered second has waited for the first."""
    reads = Held(monkeypatch)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    project = Project.make(tmp_path / "project")

    def ask(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            asked_at_once(channel, reads, [wide(1), ranking(1)], ("traceparent", f"00-{1:032x}-{1:016x}-01"))

    with Collector() as collector:
        project.configure(
            server={"port": 0} | TRANSPORTS["native"],
            telemetry={"otlp_endpoint": collector.endpoint, "sample_ratio": 0},
        )
        served_here(project, ask)
        names = {tree.attributes["featserve.service.name"]: tree.names for tree in collector.trees(2)}
    assert names["wide"][:3] == ["queue", "decode", "keys"]
    assert names["ranking"][:4] == ["queue", "decode", "other services", "keys"]


def test_of_services_asked_at_once_one_is_looked_at_for_ages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ages are due, the first service that is answered is asked for event times, and no other of its turn."""
    reads, meter = Held(monkeypatch), Meter(ages_every_ns=0)
    monkeypatch.setattr(Telemetry, "open", lambda *arguments: Telemetry(None, meter))
    looked_at: list[tuple[str, bool]] = []
    meant = Service.get_features_together

    def watched(service: Service, share: Share, stages: Stages | None, event_times: bool) -> Any:
        looked_at.append((share.asked.plan.schema.name, event_times))
        return meant(service, share, stages, event_times)

    def ask(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            asked_at_once(channel, reads, [wide(1), ranking(1), wide(2)])

    monkeypatch.setattr(Service, "get_features_together", watched)
    served_here(Project.make(tmp_path / "project", **TRANSPORTS["native"]), ask)
    assert looked_at == [("wide", True), ("wide", True), ("ranking", False)]


@pytest.mark.parametrize(("settings", "streams"), [({}, 16), ({"max_streams": 500}, 500)])
def test_a_connection_may_have_so_many_calls_under_way(tmp_path: Path, settings: dict[str, Any], streams: int) -> None:
    """The first frame of the server, HTTP/2's SETTINGS, says so to clients, which hold back what is more."""
    with (
        Server(Project.make(tmp_path, **TRANSPORTS["native"], **settings)) as server,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection,
    ):
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        frame = connection.makefile("rb")
        size, kind = struct.unpack(">xHB5x", frame.read(9))
        told = dict(struct.iter_unpack(">HI", frame.read(size)))
    assert kind == 4
    assert told[3] == streams


@pytest.mark.parametrize(("refused_per_s", "refuses"), [(0, False), (10**9, True)])
def test_refusing_leaves_time_to_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_per_s: int, refuses: bool
) -> None:
    """A server that had no room for the calls before refuses no more of the next than its time for that allows."""
    refused: list[int] = []
    take = NativeServer._take

    def counting(server: NativeServer) -> bool:
        was_full, before = server._full, server.shed
        goes_on = take(server)
        if was_full:
            refused.append(server.shed - before)
        return goes_on

    def load(address: str) -> None:
        request = wide(1).SerializeToString()
        h2load.run(address, b"\0" + len(request).to_bytes(4, "big") + request, seconds=1.0, connections=32)

    monkeypatch.setattr(NativeServer, "_take", counting)
    monkeypatch.setattr(native, "REFUSED_PER_S", refused_per_s)
    served_here(Project.make(tmp_path, **TRANSPORTS["native"], max_concurrent=2), load)
    assert len(refused) > 100
    assert any(refused) == refuses
