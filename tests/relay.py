"""A network that tests can cut: a port that forwards to a server's, or does not."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self


class Relay:
    """Forwards connections on its port to the port ``target``, between ``open`` and ``cut``; a context manager."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.received = 0
        """The bytes that came back so far."""
        self._sockets: list[socket.socket] = []
        self._listener: socket.socket | None = None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def open(self) -> None:
        """Take connections."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuse connections, and break those that there are."""
        sockets, self._sockets = self._sockets, []
        for each in [self._listener, *sockets]:
            if each is not None:
                with suppress(OSError):  # the other end may have closed it
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
        self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it was closed
            while True:
                near = listener.accept()[0]
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                for source, sink, back in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._forward, args=(source, sink, back), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                self.received += back * len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # one was cut, or reset by its end: the other must not wait for it
            for each in (source, sink):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cut()
