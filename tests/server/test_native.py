"""The server on pygrpc-native, where it is on its own: what ends a thread of it ends the server."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest

from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.config import load_config
from featserve.errors import ServingError
from featserve.server.app import run
from featserve.server.native import NativeServer
from tests.server.messages import numbers, wide
from tests.serving import PATIENCE_S, TRANSPORTS, Project


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
