"""What a server bears: clients that vanish, that do not read, that speak no gRPC, and that come by the thousand."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bench.load import framed
from featserve._proto import serving_pb2 as pb
from tests.server.messages import numbers, read_error, refusal, wide
from tests.serving import PATIENCE_S, ROOT, Server, until

pytest_plugins = ["tests.served"]

MB = 1 << 20
PATH = "/featserve.v1.FeatureServingService/"
HOLDS_BACK = ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1_024)
"""Lets a server send little of an answer until it is read."""


@pytest.fixture
def answers(server: Server) -> Iterator[Server]:
    """Give the shared server, and see that it answers as before, with nothing but info in its log."""
    logged = len(server.events())
    yield server
    with server.stub() as stub:
        stub.WriteRows(numbers([1], 1.0))
        assert stub.GetFeatures(wide(1)).status == b"\x01"
    assert [event for event in server.events()[logged:] if event["level"] != "info"] == []
    assert "Traceback" not in server.log.read_text()


def test_clients_that_are_killed_in_the_middle_of_streams(small: Server) -> None:
    """A client killed with all streams under way that there may be leaves nothing behind: its places are free again."""
    command = [sys.executable, "-m", "tests.server.flood", small.address, "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as client, small.stub() as stub:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == b"busy\n"
            error: Any = until("there is no room", lambda: stub.GetFeatures.future(wide(1)).exception())
            assert read_error(error).reason == "OVERLOADED"
        finally:
            client.kill()
        until("there is room again", lambda: not stub.GetFeatures.future(wide(1)).exception())
    assert [event for event in small.events() if event["level"] == "error"] == []
    assert "Traceback" not in small.log.read_text()


@pytest.mark.parametrize(
    "data",
    [
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # the start of a TLS handshake
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\x7f\xff\xff\x01" * 100,
        b"",
    ],
    ids=["HTTP/1", "TLS", "frames of garbage", "a frame without end", "nothing"],
)
def test_other_protocols_are_hung_up_on(answers: Server, data: bytes) -> None:
    """Bytes that are no gRPC end their connection and no other."""
    with answers.stub() as stub:
        assert stub.GetFeatures(wide(1)).rows == 1
        with socket.create_connection(("127.0.0.1", answers.port), PATIENCE_S) as connection:
            with suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(data)
            with suppress(OSError):  # it was hung up on by then
                connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while connection.recv(1 << 16):
                    pass
        assert stub.GetFeatures(wide(1)).rows == 1


def test_hundreds_of_connections_of_garbage(answers: Server, rng: np.random.Generator) -> None:
    """Random bytes on many connections at once, some of them cut off at once, harm nobody."""
    connections = [socket.create_connection(("127.0.0.1", answers.port), PATIENCE_S) for _ in range(300)]
    for i, connection in enumerate(connections):
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if i % 2 else b""
        with suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(preface + rng.bytes(int(rng.integers(1, 5_000))))
    with answers.stub() as stub:
        assert stub.GetFeatures(wide(1)).rows == 1
    for connection in connections:
        connection.close()


def test_a_client_that_does_not_read_is_not_buffered_for(answers: Server) -> None:
    """Answers that nobody reads stay unmade: the server's memory does not grow with the requests on the stream."""
    request = wide(*range(10_000))
    taken: list[float] = []

    def requests() -> Iterator[pb.StreamFeaturesRequest]:
        for _ in range(500):
            taken.append(time.monotonic())
            yield pb.StreamFeaturesRequest(request=request)

    with answers.stub(("grpc.max_receive_message_length", -1)) as slow, answers.stub() as other:
        for call in [slow.GetFeatures.future(request) for _ in range(4)]:
            assert call.result().rows == 10_000
        before = answers.memory_bytes()
        calls = [slow.StreamFeatures(requests()) for _ in range(4)]
        # Of 4 GB of answers to 160 MB of requests it makes a few, and takes no more requests.
        until("it waits for the client", lambda: taken and time.monotonic() - taken[-1] > 0.5)
        assert len(taken) < 1_000
        assert answers.memory_bytes() - before < 150 * MB
        assert other.GetFeatures(wide(1)).rows == 1
        for stream in calls:
            assert next(stream).response.rows == 10_000
            stream.cancel()


def test_answers_that_nobody_reads_are_calls_under_way(
    small: Server, transport: str, request: pytest.FixtureRequest
) -> None:
    """A client that asks and reads no answer is refused more, once it has twice as many as there may be calls."""
    if transport == "native":
        request.applymarker(pytest.mark.xfail(reason="pygrpc-native tells nothing of answers that are not sent"))
    asked = wide(*range(10_000)).SerializeToString()
    with small.channel(*HOLDS_BACK) as slow, small.stub(("grpc.enable_retries", 0)) as stub:
        ask: Any = slow.stream_stream(f"{PATH}GetFeatures")
        calls = []
        for _ in range(16):
            calls.append(ask(iter([asked])))
            calls[-1].initial_metadata()  # the answer is on its way, as far as it is let
        try:
            assert refusal(lambda: stub.GetFeatures(wide(1))).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        finally:
            for call in calls:
                call.cancel()


@pytest.mark.usefixtures("before_its_message")
def test_a_message_over_the_limit_is_not_held(start: Callable[..., Server]) -> None:
    """However large a message is: beyond the limit the server takes none of it into its memory."""
    server = start(max_message_mb=1)
    with server.channel(("grpc.max_send_message_length", -1)) as channel:
        call: Any = channel.unary_unary(f"{PATH}GetFeatures")
        before = server.most_memory_bytes()
        assert refusal(lambda: call(bytes(256 * MB))).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.most_memory_bytes() - before < 32 * MB


def test_half_a_request_is_dropped_with_its_connection(answers: Server) -> None:
    """A connection that ends in the middle of a large message ends that call, and its rows are written all or none."""
    with answers.channel() as channel:
        write: Any = channel.unary_unary(f"{PATH}WriteRows")
        write.future(numbers(range(300, 9_000), 1.0).SerializeToString())
    with answers.stub() as stub:
        found = stub.GetFeatures(wide(*range(300, 9_000))).status
        assert found in (b"\x03" * 8_700, b"\x01" * 8_700)


async def converse(address: str, streams: int, rounds: int) -> list[int]:
    """Hold ``streams`` open on one connection, ask on each of them ``rounds`` times; return the rows answered."""
    request = pb.StreamFeaturesRequest(request=wide(1, 2)).SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel:
        open_stream: Any = channel.stream_stream(f"{PATH}StreamFeatures")
        calls = [open_stream() for _ in range(streams)]
        rows = []
        for _ in range(rounds):
            for call in calls:
                await call.write(request)
            rows += [pb.StreamFeaturesResponse.FromString(await call.read()).response.rows for call in calls]
        for call in calls:
            await call.done_writing()
        for call in calls:
            assert await call.read() is grpc.aio.EOF
        return rows


@pytest.mark.slow
def test_thousands_of_streams_on_one_connection(start: Callable[..., Server]) -> None:
    """Four thousand streams at once on one connection are all answered, and leave no memory behind."""
    server = start(max_concurrent=8_000, max_streams=4_000)
    sizes = []
    for _ in range(4):
        assert asyncio.run(converse(server.address, 4_000, 2)) == [2] * 8_000
        sizes.append(server.memory_bytes())
    assert sizes[-1] - sizes[1] < 16 * MB


def h2load(server: Server, method: str, message: bytes, requests: int, folder: Path) -> int:
    """Send a request again and again, on eight connections with ten under way on each; return the bytes of messages.

    h2load sees that each call ended, and not gRPC's status: what was refused has no message.
    """
    (folder / "body").write_bytes(framed(message))
    load = ["h2load", "--clients=8", "--max-concurrent-streams=10", f"--requests={requests}"]
    headers = ["--header=content-type: application/grpc", "--header=te: trailers", f"--data={folder / 'body'}"]
    done = subprocess.run(
        [*load, *headers, f"http://{server.address}{PATH}{method}"], capture_output=True, text=True, check=True
    )
    assert f"{requests} succeeded, 0 failed" in done.stdout, done.stdout
    (message_bytes,) = re.findall(r"traffic: .* \((\d+)\) data", done.stdout)
    return int(message_bytes)


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_is_flat_however_many_requests_come(start: Callable[..., Server], tmp_path: Path, many: bool) -> None:
    """Over many requests, each answered or, where it is wrong, refused, memory stays level; the server ends well."""
    requests = 1_000_000 if many else 10_000
    assert shutil.which("h2load"), "there is no h2load: tests/setup.sh installs it"
    server = start()
    read, wrong = wide(1, 2, 3).SerializeToString(), pb.GetFeaturesRequest(service="nope").SerializeToString()
    write = numbers([1], 1.0).SerializeToString()
    with server.channel() as channel:
        ask: Any = channel.unary_unary(f"{PATH}GetFeatures")
        write_rows: Any = channel.unary_unary(f"{PATH}WriteRows")
        write_rows(write)  # the statuses that a read has are those of later ones
        answer_bytes = len(framed(ask(read)))
    written_bytes = len(framed(pb.WriteRowsResponse(rows=1).SerializeToString()))

    def load(count: int) -> int:
        assert h2load(server, "GetFeatures", read, count * 9 // 10, tmp_path) == count * 9 // 10 * answer_bytes
        assert h2load(server, "GetFeatures", wrong, count // 10, tmp_path) == 0
        assert h2load(server, "WriteRows", write, 1_000, tmp_path) > 1_000 * written_bytes
        return server.memory_bytes()

    load(10_000)
    before = load(10_000)
    assert load(requests) - before < 16 * MB
    assert server.stop() == 0
