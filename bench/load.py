"""The load: GetFeatures requests for random entities, over raw HTTP/2, each sent as soon as one is answered.

A gRPC client in Python takes more time than the servers that are measured here, and load tools such as h2load repeat
one request body. So this speaks as much of HTTP/2 as it takes: requests are frames made once, of which only the stream
and the keys change; of the answers only the frame headers are looked at. An answer of the wrong length is a failure.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from bench.project import KEY, SERVICE
from featserve._proto import serving_pb2 as pb
from featserve.batch import Int64s
from featserve.types import Int64
from featserve.wire import FULL_METHOD

# Of RFC 9113: kinds of frames, and flags.
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW = 2**31 - 1
FRAME_BYTES = 1 << 20
PATIENCE_S = 30


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run measured: answers per second, and the latency of an answer in microseconds."""

    requests: int
    seconds: float
    p50_us: float
    p99_us: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def latencies_us(call: Callable[[int], object], calls: int) -> tuple[float, float]:
    """Return the p50 and p99 of ``call(i)`` in microseconds, after as many calls again divided by ten to warm up."""
    times: list[int] = []
    for i in range(-calls // 10, calls):
        started = time.perf_counter_ns()
        call(i)
        if i >= 0:
            times.append(time.perf_counter_ns() - started)
    p50, p99 = np.percentile(times, (50, 99)) / 1_000
    return float(p50), float(p99)


def request(entities: Int64s) -> bytes:
    """Return a GetFeaturesRequest for these entities."""
    column = pb.Column(name=KEY, type=Int64.code, data=entities.tobytes())  # type: ignore[arg-type]
    return pb.GetFeaturesRequest(service=SERVICE, keys=[column]).SerializeToString()


def framed(message: bytes) -> bytes:
    """Return a message as gRPC sends it: not compressed, and its length."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def bodies(keys: int, entities: int, seed: int) -> Iterator[bytes]:
    """Yield without end gRPC messages that ask for ``keys`` random entities each."""
    random = np.random.default_rng(seed)
    marker = np.full(keys, -1)
    head, tail = framed(request(marker)).split(marker.tobytes())
    while True:
        data = random.integers(0, entities, 10_000 * keys).tobytes()
        for at in range(0, len(data), 8 * keys):
            yield head + data[at : at + 8 * keys] + tail


def run(
    address: str,
    keys: int,
    *,
    entities: int,
    seconds: float = 600.0,
    requests: int = 1 << 40,
    connections: int = 8,
    seed: int = 0,
) -> Measured:
    """Ask the server at ``address`` ("host:port") for ``keys`` entities at a time, out of the first ``entities``.

    Each of ``connections`` has one request under way. Ends after ``seconds``, or after ``requests`` answers. Raises
    RuntimeError for an answer that is none, or when none comes for half a minute.
    """
    messages = bodies(keys, entities, seed)
    opened = [Http2Connection(address, messages) for _ in range(connections)]
    elapsed_s = drive(opened, lambda answered, elapsed_s: answered >= requests or elapsed_s >= seconds)
    latencies_us = np.array([latency for connection in opened for latency in connection.latencies_s]) * 1e6
    p50_us, p99_us = np.percentile(latencies_us, (50, 99))
    return Measured(len(latencies_us), elapsed_s, float(p50_us), float(p99_us))


def warm(address: str, entities: int, at_once: int = 1_000) -> None:
    """Read each of so many entities once, so that all of their rows are in the server's cache."""
    parts = range(0, entities, at_once)
    messages = (framed(request(np.arange(first, first + at_once))) for first in cycle(parts))
    drive([Http2Connection(address, messages)], lambda answered, _: answered >= len(parts))


def drive(opened: Sequence[Http2Connection], ended: Callable[[int, float], bool]) -> float:
    """Keep all connections busy until ``ended(answered, seconds)``; close them, and return the seconds."""
    elapsed_s = keep_busy(opened, ended)
    for connection in opened:
        connection.socket.close()
    return elapsed_s


def keep_busy(opened: Sequence[Http2Connection], ended: Callable[[int, float], bool]) -> float:
    """Do as ``drive`` does and leave the connections open, for more if all that was asked for was answered by then."""
    with selectors.DefaultSelector() as waiting:
        for connection in opened:
            waiting.register(connection.socket, selectors.EVENT_READ, connection)
        started = time.perf_counter()
        for connection in opened:
            connection.ask()
        answered = 0
        while not ended(answered, time.perf_counter() - started):
            ready = waiting.select(PATIENCE_S)
            if not ready:
                raise RuntimeError(f"no answer came for {PATIENCE_S} seconds")
            answered += sum(key.data.receive() for key, _ in ready)
        return time.perf_counter() - started


class Http2Connection:
    """A connection that speaks gRPC. ``messages``: framed, and others when it has come to their end.

    ``length_varies``: answers need not be of one length.
    """

    def __init__(self, address: str, messages: Iterator[bytes], *, length_varies: bool = False) -> None:
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = b"\0\x04" + WINDOW.to_bytes(4, "big") + b"\0\x05" + FRAME_BYTES.to_bytes(4, "big")
        self.socket.sendall(PREFACE + _frame(SETTINGS, 0, 0, settings) + _window(WINDOW - 65_535))
        self.latencies_s: list[float] = []
        self.messages = messages
        self._length_varies = length_varies
        self._headers, self._next_headers = _header_blocks(address)
        self._stream = -1
        self._asked_s = 0.0
        self._received = self._expected = self._since_window = 0
        self._rest = b""

    def ask(self) -> None:
        """Send a request, on the next stream; nothing where there are no more messages."""
        message = next(self.messages, None)
        if message is None:
            return
        self._received = 0
        self._asked_s = time.perf_counter()
        self._stream += 2
        headers = _frame(HEADERS, END_HEADERS, self._stream, self._headers)
        self.socket.sendall(headers + _frame(DATA, END_STREAM, self._stream, message))
        self._headers = self._next_headers

    def receive(self) -> int:
        """Take what has come, send a request for each answer that is whole, and return how many are."""
        data = self.socket.recv(FRAME_BYTES)
        if not data:
            raise RuntimeError("the server closed the connection")
        data = self._rest + data
        at = answered = 0
        while len(data) - at >= 9:
            stop = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if stop > len(data):
                break
            answered += self._take(data[at + 3], data[at + 4], data[at + 9 : stop])
            at = stop
        self._rest = data[at:]
        return answered

    def _take(self, kind: int, flags: int, payload: bytes) -> bool:
        """Take a frame; say whether it is the end of a request that was answered."""
        self._keep_up(kind, flags, payload)
        if kind not in (DATA, HEADERS) or not flags & END_STREAM:
            return False
        self.latencies_s.append(time.perf_counter() - self._asked_s)
        self._expected = self._expected or self._received
        if not self._received or (self._received != self._expected and not self._length_varies):
            raise RuntimeError(f"an answer of {self._received} bytes, {self._expected} expected: {payload!r}")
        self.ask()
        return True

    def _keep_up(self, kind: int, flags: int, payload: bytes) -> None:
        """Do what a frame asks of the connection."""
        if kind == DATA:
            self._received += len(payload)
            self._since_window += len(payload)
            if self._since_window > 1 << 29:
                self.socket.sendall(_window(self._since_window))
                self._since_window = 0
        elif kind in (SETTINGS, PING) and not flags & ACK:
            self.socket.sendall(_frame(kind, ACK, 0, payload if kind == PING else b""))
        elif kind in (RESET, GOAWAY):
            raise RuntimeError(f"the server ended a request or the connection: {payload!r}")


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _window(size: int) -> bytes:
    return _frame(WINDOW_UPDATE, 0, 0, size.to_bytes(4, "big"))


def _header_blocks(address: str) -> tuple[bytes, bytes]:
    """Return the headers of a connection's first request, which the server remembers, and those of the others, which
    refer to them in the same order (RFC 7541: 0x40 adds a header to the table, whose newest is number 62).
    """
    headers = [
        (":authority", address),
        (":path", f"{FULL_METHOD}GetFeatures"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("grpc-timeout", "5S"),  # as our own client, and every careful one, sends
        ("user-agent", "featserve-bench"),
    ]
    post_http = b"\x83\x86"
    first = b"".join(b"\x40" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in headers)
    return post_http + first, post_http + bytes(0x80 | 62 + i for i in reversed(range(len(headers))))
