"""The load of h2load: one request over and over, and how long each took; of gRPC, or of HTTP/1.1.

A generator in Python takes longer for a small request than the servers that are measured here. h2load repeats one body,
so its rows are hot for whoever is asked. It does not read gRPC's status, but a refusal has no message: how many were
answered is told by the bytes of messages.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np

from featserve.types import Array
from featserve.wire import FULL_METHOD

METHOD = f"{FULL_METHOD}GetFeatures"
GRPC = ("--header=content-type: application/grpc", "--header=te: trailers")
HTTP1 = ("--h1", "--header=content-type: application/json")
OPEN = 10_000
"""Requests that a connection of an open loop may have under way."""


class NotLoaded(RuntimeError):
    """h2load is not there, or could not do what it was asked for; the message says what it said."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of the ``seconds`` after the warm-up: ``taken_us`` has the latency of each request that ended in them.

    It counts from ``sent_us``, since the first of all was sent, at ``first_us`` since the Unix epoch. Of all, the warm-
    up's as well: ``started`` and ``ended``, how many did; ``message_bytes``, of all answers together. What has started
    may wait to be sent: h2load holds back what is more on a connection than the server takes.
    """

    seconds: float
    taken_us: Array
    sent_us: Array
    first_us: int
    started: int
    ended: int
    message_bytes: int

    @property
    def rate(self) -> float:
        """Requests a second that ended."""
        return len(self.taken_us) / self.seconds

    def sent(self, at_once: int) -> int:
        """Return how many were sent where ``at_once`` can be under way: what has ended, and those at the end."""
        return min(self.started, self.ended + at_once)

    def since_due_us(self, rate: float) -> Array:
        """Return the latency of each since it was due, of a load without a warm-up and ``rate`` a second.

        The n-th that was sent was due n / ``rate`` seconds after the first, whichever connection it is on: where some
        are served later than others, their requests are told as waiting less than they do, and the others' more.
        h2load sends every 10 ms, and that wait is counted, too.
        """
        due_us = np.empty(len(self.sent_us))
        due_us[np.argsort(self.sent_us, kind="stable")] = np.arange(len(self.sent_us)) / rate * 1e6
        return self.taken_us + np.maximum(self.sent_us - due_us, 0)

    def answered(self, answer_bytes: int) -> int:
        """Return how many got an answer, which is of so many bytes; the others were refused."""
        return self.message_bytes // answer_bytes


def at_most(taken: Array, of: int, quantile: float = 0.99) -> float:
    """Return what a quantile of any ``of`` of the requests is at most: it is that where the slowest are among them.

    Infinity where there are no requests.
    """
    beyond = int(of * (1 - quantile) * (1 + 1e-12))  # 0.1 * 1,000 is a little under 100
    return float(np.sort(taken)[-1 - beyond]) if len(taken) else inf


def run(
    address: str,
    body: bytes,
    *,
    seconds: float = 2.0,
    warm_up_s: float = 0.0,
    connections: int = 8,
    calls: int = 1,
    rate: float | None = None,
    path: str = METHOD,
    protocol: tuple[str, ...] = GRPC,
) -> Loaded:
    """Send ``body`` to the server at ``address`` for ``seconds``, and for ``warm_up_s`` before.

    Each connection has ``calls`` requests under way; or all together send ``rate`` a second, at even intervals on each,
    whether or not answers come. Latency counts from the sending. Raises NotLoaded, also where nothing could be sent.
    """
    at_once = [f"--max-concurrent-streams={calls}"]
    if rate is not None:
        at_once = [f"--max-concurrent-streams={OPEN}", f"--rps={rate / connections:.3f}"]
    with tempfile.TemporaryDirectory(prefix="featserve-h2load-") as folder:
        data, log = Path(folder) / "body", Path(folder) / "log"
        data.write_bytes(body)
        command = [
            *("h2load", "--threads=1", f"--clients={connections}", f"--duration={(warm_up_s + seconds) * 1e3:.0f}ms"),
            *(*at_once, *protocol, f"--data={data}", f"--log-file={log}", f"http://{address}{path}"),
        ]
        try:
            out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except FileNotFoundError:
            raise NotLoaded("there is no h2load: apt-get install nghttp2-client") from None
        started = re.search(r"requests: .* (\d+) started", out)
        message_bytes = re.search(r"traffic: .* \((\d+)\) data", out)
        if started is None or message_bytes is None or not int(started[1]):
            raise NotLoaded(f"h2load did not load {address}:\n{out}")
        # When each started and how long it took, in the order in which they ended.
        times_us = np.loadtxt(log, np.int64, usecols=(0, 2), ndmin=2) if log.stat().st_size else np.zeros((0, 2))
    counted = times_us.sum(axis=1) >= times_us[:1, 0] + warm_up_s * 1e6
    first_us = int(min(times_us[:, 0], default=0))
    sent_us = times_us[:, 0] - first_us
    ended = len(times_us)
    return Loaded(
        seconds, times_us[counted, 1], sent_us[counted], first_us, int(started[1]), ended, int(message_bytes[1])
    )
