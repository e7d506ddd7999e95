"""Load that does not wait for answers: requests at random instants of a set rate, over raw HTTP/2 as in ``bench.load``.

Latency counts from the instant at which a request should have started. An answer without a message is a refusal.
"""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from bench import load
from bench.load import DATA, END_STREAM, HEADERS, RESET, WINDOW_UPDATE, Http2Connection
from featserve.load_test.arrivals import poisson
from featserve.load_test.histogram import Histogram

WARM_UP_S = 0.5
LAST_ANSWERS_S = 30.0
AT_ONCE = 16
"""Requests that are sent before answers are looked at again."""


@dataclass(slots=True)
class Flooded:
    """What came of the requests that should have started after the warm-up, ``arrived`` of them. ``answered``: answers
    that came in the ``seconds`` in which they arrived. ``lag``: how late requests were sent.
    """

    seconds: float
    arrived: int = 0
    answered: int = 0
    answers: Histogram = field(default_factory=Histogram)
    refusals: Histogram = field(default_factory=Histogram)
    lag: Histogram = field(default_factory=Histogram)

    @property
    def goodput(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds

    @property
    def unanswered(self) -> int:
        """How many were neither answered nor refused."""
        return self.arrived - self.answers.count - self.refusals.count


class Flood(Http2Connection):
    """A connection with any number of requests under way."""

    def __init__(
        self, address: str, messages: Iterator[bytes], flooded: Flooded, counted_s: tuple[float, float]
    ) -> None:
        super().__init__(address, messages, length_varies=True)
        self.under_way: dict[int, float] = {}
        self.waiting: deque[float] = deque()
        self._flooded = flooded
        self._counted_s = counted_s
        self._window = 65_535
        self._answered: set[int] = set()

    def send_due(self) -> None:
        """Send the waiting requests that the server has room for."""
        while self.waiting:
            body = next(self._messages)
            if len(body) > self._window:
                return
            self._window -= len(body)
            due_s = self.waiting.popleft()
            self._send(body)
            self.under_way[self._stream] = due_s
            if due_s >= self._counted_s[0]:
                self._flooded.lag.record(_ns(time.perf_counter() - due_s))

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> bool:
        if kind == RESET:  # of a refusal, perhaps after its answer: the rest of the request was not read
            return self._end(stream) if stream in self.under_way else False
        self._keep_up(kind, flags, payload)
        if kind == WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload, "big")
            self.send_due()
        elif kind == DATA and payload:
            self._answered.add(stream)
        return self._end(stream) if kind in (DATA, HEADERS) and flags & END_STREAM else False

    def _end(self, stream: int) -> bool:
        """Count a request that has ended; say whether it was answered."""
        due_s, now_s = self.under_way.pop(stream), time.perf_counter()
        answered = stream in self._answered
        self._answered.discard(stream)
        first_s, last_s = self._counted_s
        if due_s >= first_s:
            (self._flooded.answers if answered else self._flooded.refusals).record(_ns(now_s - due_s))
        self._flooded.answered += answered and first_s <= now_s < last_s
        return answered


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def run(address: str, keys: int, rate: float, seconds: float, *, entities: int, connections: int, seed: int) -> Flooded:
    """Send ``rate`` requests a second for random entities during ``seconds``, and half a second before."""
    flooded, messages = Flooded(seconds), load.bodies(keys, entities, seed)
    started = time.perf_counter()
    counted_s = (started + WARM_UP_S, started + WARM_UP_S + seconds)
    opened = [Flood(address, messages, flooded, counted_s) for _ in range(connections)]
    in_turn, instants = cycle(opened), poisson(rate, np.random.default_rng(seed))
    due_s = started + next(instants) / 1e9
    # select(2) waits to the microsecond; others round up to a millisecond.
    with selectors.SelectSelector() as ready:
        for connection in opened:
            ready.register(connection.socket, selectors.EVENT_READ, connection)
        while (now_s := time.perf_counter()) < counted_s[1] + LAST_ANSWERS_S:
            for _ in range(AT_ONCE):
                if due_s > now_s or due_s >= counted_s[1]:
                    break
                connection = next(in_turn)
                flooded.arrived += due_s >= counted_s[0]
                connection.waiting.append(due_s)
                connection.send_due()
                due_s = started + next(instants) / 1e9
            ended = due_s >= counted_s[1]
            if ended and not any(connection.under_way or connection.waiting for connection in opened):
                break
            for key, _ in ready.select(0.1 if ended else max(0.0, due_s - time.perf_counter())):
                key.data.receive()
    for connection in opened:
        connection.socket.close()
    return flooded
