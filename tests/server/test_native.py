"""The server on pygrpc-native, where it is on its own: what ends its thread ends the server."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest

from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.config import load_config
from featserve.errors import ServingError
from featserve.server.app import run
from featserve.server.native import NativeServer, Turn
from tests.server.messages import wide
from tests.serving import PATIENCE_S, TRANSPORTS, Project


def test_a_failure_of_the_thread_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where answering fails outside of any call, those who wait are told, and the server ends with an error."""
    codes: list[grpc.StatusCode] = []

    def fail(server: NativeServer, turns: list[Turn]) -> None:
        raise RuntimeError("no more")

    def ask(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = FeatureServingServiceStub(channel)
            codes.append(stub.GetFeatures.future(wide(1), timeout=PATIENCE_S).code())

    def ready(address: str) -> None:
        asking.append(threading.Thread(target=ask, args=(address,)))
        asking[0].start()

    asking: list[threading.Thread] = []
    monkeypatch.setattr(NativeServer, "_together", fail)
    config = load_config(Project.make(tmp_path / "project", **TRANSPORTS["native"]).folder)
    with pytest.raises(ServingError, match="the thread that answers has failed: no more"):
        run(config, ready)
    asking[0].join(PATIENCE_S)
    assert codes == [grpc.StatusCode.UNAVAILABLE]
