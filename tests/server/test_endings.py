"""Calls that get no answer, as metrics count them: each under its code, those too that were never begun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.server.meter import Meter
from featserve.server.telemetry import Telemetry
from tests.server.held import Held
from tests.server.messages import activity, now_us, numbers, ranking, refusal, texts, wide
from tests.server.streams import Stream
from tests.server.watched import scrape, value, watched
from tests.serving import PATIENCE_S, TRANSPORTS, Project, Server, served_here, until

pytest_plugins = ["tests.served"]

SERVICE = "featserve.v1.FeatureServingService"
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="module")
def counted(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server that counts, takes eight calls at a time, and writes that are large enough to keep it busy."""
    settings: dict[str, Any] = {"max_concurrent": 8, "max_rows": 100_000, "max_message_mb": 20}
    with watched(tmp_path_factory.mktemp("endings") / "p", transport, settings, prometheus_port=0) as server:
        yield server


def ended(server: Server, method: str, code: str) -> int:
    """Return how many calls of a method have ended with a code."""
    labels = {"rpc_method": f"{SERVICE}/{method}", "rpc_response_status_code": code}
    return int(value(scrape(server), "rpc_server_call_duration_seconds_count", **labels))


def test_passed_deadlines_are_told_from_cancelled_calls(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that ends in the queue at its deadline counts as such, one that its caller cancels there as cancelled."""
    writes, meter = Held(monkeypatch, "write_many"), Meter()
    monkeypatch.setattr(Telemetry, "open", lambda *arguments: Telemetry(None, meter))

    def ended() -> dict[str, int]:
        return {
            code: sum(times.counts) for (method, _, code), times in meter.durations.items() if method == "WriteRows"
        }

    def ask(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = FeatureServingServiceStub(channel)
            with writes.held() as begun:
                before = stub.WriteRows.future(numbers([1], 1.0), timeout=PATIENCE_S)
                assert begun.wait(PATIENCE_S)
                late = stub.WriteRows.future(numbers([2], 1.0), timeout=2.0)
                cancelled = stub.WriteRows.future(numbers([3], 1.0), timeout=PATIENCE_S)
                stub.ListServices(pb.ListServicesRequest())  # the connection carries this behind those
                cancelled.cancel()
                assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                until("both have ended", lambda: sum(ended().values()) == 2)
            assert before.result().rows == 1

    served_here(Project.make(tmp_path / "project", **TRANSPORTS[transport]), ask)
    assert ended() == {"DEADLINE_EXCEEDED": 1, "CANCELLED": 1, "OK": 1}


def test_an_answer_over_the_limit_counts_as_refused(counted: Server) -> None:
    """A read whose answer is not sent as it is too large, alone or on a stream, does not count as answered."""
    token = texts("token", b"x" * (2 << 20), type=pb.DATA_TYPE_BYTES)
    request = ranking(*[1] * 11)
    with counted.stub() as stub:
        stub.WriteRows(activity(1, now_us(), token=token))
        error = refusal(lambda: stub.GetFeatures(request))
        assert (error.code, error.reason) == (EXHAUSTED, "TOO_LARGE")
        (answer,) = stub.StreamFeatures(iter([pb.StreamFeaturesRequest(request=request)]))
        assert answer.error.code == EXHAUSTED.value[0]
    for method in ("GetFeatures", "StreamFeatures"):
        assert (ended(counted, method, "OK"), ended(counted, method, EXHAUSTED.name)) == (0, 1)


def test_refused_calls_count(transport: str, tmp_path: Path) -> None:
    """Calls under way are a gauge; one that is refused as they are too many counts, by itself and under its code."""
    with watched(tmp_path / "p", transport, {"max_concurrent": 2}, prometheus_port=0) as server, server.stub() as stub:
        assert value(scrape(server), "featserve_requests_active") == 0
        held = [Stream(stub) for _ in range(2)]
        assert all(stream.ask(1).response.rows == 1 for stream in held)
        assert value(scrape(server), "featserve_requests_active") == 2
        for refused in (
            lambda: stub.GetFeatures(wide(1)),
            lambda: next(stub.StreamFeatures(iter([pb.StreamFeaturesRequest(request=wide(1))]))),
        ):
            assert refusal(refused).code is EXHAUSTED
        assert value(scrape(server), "featserve_requests_shed_total") == 2
        for method in ("GetFeatures", "StreamFeatures"):
            assert ended(server, method, EXHAUSTED.name) == 1
        for stream in held:
            stream.end()
        until("none is under way", lambda: value(scrape(server), "featserve_requests_active") == 0)
