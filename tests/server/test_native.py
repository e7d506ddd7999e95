"""The server on pygrpc-native, where it is on its own: what ends a thread of it ends it, and how it refuses calls."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench import h2load
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.config import load_config
from featserve.errors import ServingError
from featserve.server import native
from featserve.server.app import run
from featserve.server.native import NativeServer
from tests.server.messages import numbers, wide
from tests.serving import PATIENCE_S, TRANSPORTS, Project, Server


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
        os.kill(os.getpid(), signal.SIGTERM)

    def ready(address: str) -> None:
        threading.Thread(target=load, args=(address,)).start()

    monkeypatch.setattr(NativeServer, "_take", counting)
    monkeypatch.setattr(native, "REFUSED_PER_S", refused_per_s)
    run(load_config(Project.make(tmp_path, **TRANSPORTS["native"], max_concurrent=2).folder), ready)
    assert len(refused) > 100
    assert any(refused) == refuses
