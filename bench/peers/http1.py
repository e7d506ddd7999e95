"""A connection that speaks HTTP/1.1, for ``bench.load.drive``: a request is sent when the last one was answered."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator

LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
MOST_BYTES = 1 << 20


class Http1Connection:
    """A connection to ``path`` of the server at ``address``; ``messages``: the bodies of its requests."""

    def __init__(self, address: str, messages: Iterator[bytes], path: str) -> None:
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.latencies_s: list[float] = []
        self._messages = messages
        self._head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: "
        self._received = b""
        self._asked_s = 0.0

    def ask(self) -> None:
        body = next(self._messages)
        self._asked_s = time.perf_counter()
        self.socket.sendall(self._head.encode() + b"%d\r\n\r\n" % len(body) + body)

    def receive(self) -> int:
        data = self.socket.recv(MOST_BYTES)
        if not data:
            raise RuntimeError("the server closed the connection")
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return 0
        told = LENGTH.search(head + b"\r\n")
        if told is None or not head.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"no answer that has a length: {head!r} {body[:200]!r}")
        if len(body) < int(told[1]):
            return 0
        self.latencies_s.append(time.perf_counter() - self._asked_s)
        self._received = b""
        self.ask()
        return 1
