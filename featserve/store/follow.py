"""Following a store that another process writes: catching up every few milliseconds, and waiting for one write.

A *token* names a write of one store: its identity and the number of the write. Comes in: a store that is open to
follow. Goes out: promises that are kept once the store holds a write. Reads no clock but the stopwatch.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future

from featserve.errors import DeadlineExceeded, FeatserveError, invalid
from featserve.store import OnlineStore

log = logging.getLogger("featserve.store")

WAITED_S = 0.001
"""How often the store catches up while somebody waits for a write, at least."""
LOGGED_EVERY_S = 10.0
"""How often a store that cannot be followed is told of, at most."""


def token_of(store: OnlineStore) -> str:
    """Return a token of all that a store holds."""
    return f"{store.identity()}-{store.sequence()}"


def sequence_of(token: str, store: OnlineStore) -> int:
    """Return the number of the write that a token names; raises InvalidRequest where it is none of this store."""
    identity, _, number = token.partition("-")
    if not (number.isascii() and number.isdigit() and len(number) < 20):
        raise invalid("at_least", f"{token!r} is no token; take that of a write's answer as it is")
    if identity != store.identity():
        raise invalid("at_least", f"{token!r} is of another store than the one here, {store.identity()}")
    return int(number)


class Behind(Exception):
    """Raised where a store lacks a write. ``caught_up``: done once it holds that; else it fails, DeadlineExceeded."""

    def __init__(self, caught_up: Future[None]) -> None:
        self.caught_up = caught_up


class Follower:
    """A thread that lets a store catch up every ``every_s`` seconds, and at once where somebody waits for a write."""

    def __init__(self, store: OnlineStore, every_s: float) -> None:
        self._store, self._every_s = store, every_s
        self._waiting: list[tuple[int, float, Future[None]]] = []
        self._lock = threading.Lock()
        self._wake, self._closing = threading.Event(), False
        self._caught_up_s, self._logged_s = time.monotonic(), -LOGGED_EVERY_S
        self._thread = threading.Thread(target=self._follow, name="featserve-follower", daemon=True)
        self._thread.start()

    def reached(self, sequence: int, seconds: float) -> Future[None]:
        """Promise that the store holds write ``sequence``, or DeadlineExceeded after ``seconds``.

        The future is done in the follower's thread.
        """
        promise: Future[None] = Future()
        with self._lock:
            self._waiting.append((sequence, time.monotonic() + seconds, promise))
        self._wake.set()
        if not self._thread.is_alive():
            self._give_up()
        return promise

    def lag_s(self) -> float:
        """Return how many seconds ago it began to catch up, the last time that it could."""
        return time.monotonic() - self._caught_up_s

    def close(self) -> None:
        """Stop following; what is waited for fails. The store stays open."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        self._give_up()

    def _follow(self) -> None:
        while not self._closing:
            self._wake.wait(min(self._every_s, WAITED_S) if self._waiting else self._every_s)
            self._wake.clear()
            began_s = time.monotonic()
            try:
                self._store.catch_up()
                self._caught_up_s = began_s
            except Exception as error:  # the top of a background loop
                if began_s >= self._logged_s + LOGGED_EVERY_S:
                    self._logged_s = began_s
                    trace = None if isinstance(error, FeatserveError) else error
                    log.error("cannot follow the store, still reading the rows of before: %s", error, exc_info=trace)
            if self._waiting:
                self._keep()

    def _keep(self) -> None:
        """Keep the promises that the store now keeps, break those whose time is over, and forget those cancelled."""
        held, now_s = self._store.sequence(), time.monotonic()
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._waiting += [w for w in waiting if held < w[0] and now_s < w[1] and not w[2].cancelled()]
        for sequence, ends_s, promise in waiting:
            if held < sequence and now_s < ends_s:
                continue
            if promise.set_running_or_notify_cancel():
                if sequence <= held:
                    promise.set_result(None)
                else:
                    promise.set_exception(self._late(sequence, held))

    def _late(self, sequence: int, held: int) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"write {sequence:,} was asked for; the store here holds {held:,}, and last caught up "
            f"{self.lag_s():.3f} s ago"
        )

    def _give_up(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for sequence, _, promise in waiting:
            if promise.set_running_or_notify_cancel():
                promise.set_exception(self._late(sequence, self._store.sequence()))
