"""Workers and the writer, killed with -9 under load: whose calls fail, and that each event counts once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

import featserve
from featserve.client import OPTIONS
from featserve.errors import Unavailable
from tests.server.messages import refusal, wide
from tests.server.streams import Stream
from tests.server.test_workers import loaded, make, processes
from tests.serving import PATIENCE_S, TRANSPORTS, Project, Server, until

pytest_plugins = ["tests.served"]

ORDERS = """
from datetime import timedelta

from featserve import (
    Aggregate, Calendar, Entity, EventSource, FeatureService, FeatureView, Field, Hopping, Int64, ParquetSource, String,
)

user = Entity("user", {"user_id": Int64})
orders = EventSource(
    "orders", [Field("user_id", Int64), Field("order_id", String)],
    source=ParquetSource("orders.parquet", event_time="at"), event_id="order_id",
)
spent = FeatureView("spent", user, events=orders, aggregates=[
    Aggregate("day", "count", over=Hopping(timedelta(days=1), timedelta(hours=1))),
    Aggregate("week", "count", over=Calendar(7, "day", "America/New_York")),
])
users = FeatureService("users", [spent])
"""
GROUP = 20
"""Events in a message."""


class Repeating(threading.Thread):
    """Does ``again`` once and once more until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop, self.done = threading.Event(), 0

    def again(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        while not self.stop.is_set():
            self.again()
            self.done += 1


@contextmanager
def running(threads: Iterable[Repeating]) -> Iterator[Callable[[str], None]]:
    """Run them; give a function that waits until each has gone on for a while."""
    every = list(threads)

    def go_on(what: str) -> None:
        before = [thread.done for thread in every]
        until(what, lambda: all(thread.done > then + 5 for thread, then in zip(every, before, strict=True)))

    for thread in every:
        thread.start()
    try:
        go_on("all are at work")
        yield go_on
    finally:
        for thread in every:
            thread.stop.set()
        for thread in every:
            thread.join(PATIENCE_S)


class Caller(Repeating):
    """Reads on one connection. ``worker``: where it leads at first. ``codes``: how often calls ended in which way."""

    def __init__(self, server: Server, stub: Any) -> None:
        super().__init__()
        self.stub, self.codes = stub, Counter[grpc.StatusCode]()
        before = {number: peers(server, number) for number in (1, 2)}
        self.again()
        (self.worker,) = (number for number, had in before.items() if peers(server, number) - had)

    def again(self) -> None:
        self.codes[self.stub.GetFeatures.future(wide(1), timeout=PATIENCE_S).code()] += 1


def peers(server: Server, worker: int) -> set[Any]:
    """Return the other ends of the connections that a worker has."""
    connections = psutil.Process(processes(server)[worker]).net_connections("tcp")
    return {c.raddr for c in connections if c.laddr.port == server.port and c.status == psutil.CONN_ESTABLISHED}


def callers(server: Server, stack: ExitStack, *options: tuple[str, Any]) -> list[Caller]:
    """Open connections until two lead to each worker."""
    opened: list[Caller] = []
    while min(Counter(caller.worker for caller in opened)[number] for number in (1, 2)) < 2:
        opened.append(Caller(server, stack.enter_context(server.stub(*options))))
    return opened


@pytest.mark.slow
def test_a_killed_worker_takes_down_its_own_calls_and_no_other(transport: str, tmp_path: Path) -> None:
    """On the other worker's connections no call and no stream ends; on its own they are UNAVAILABLE, or repeated."""
    with ExitStack() as stack:
        server = stack.enter_context(Server(make(tmp_path, transport)))
        plain = callers(server, stack, ("grpc.enable_retries", 0))
        careful = callers(server, stack, *OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        streams = [(caller.worker, Stream(caller.stub)) for caller in plain]
        assert [stream.ask(1).response.rows for _, stream in streams] == [1] * len(streams)
        with loaded(server), running([*plain, *careful]) as go_on:
            killed = processes(server)[1]
            psutil.Process(killed).kill()
            go_on("all go on, on connections to whoever is left")
            until("there is another", lambda: processes(server)[1] != killed)
            go_on("all go on beside it")
        callers(server, stack)  # it takes connections, and answers
        for caller in careful:
            assert set(caller.codes) == {grpc.StatusCode.OK}
        for caller, (worker, stream) in zip(plain, streams, strict=True):
            if worker == 2:
                assert set(caller.codes) == {grpc.StatusCode.OK}
                assert stream.ask(1, 2).response.rows == 2
            else:
                assert set(caller.codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
                assert refusal(lambda: stream.ask(1)).code is grpc.StatusCode.UNAVAILABLE  # noqa: B023
            stream.drop()
        (died,) = [event for event in server.events() if event["level"] == "error"]
        assert (died["message"], died["exit_code"]) == ("worker 1 died", -9)
        assert server.stop() == 0


class Pusher(Repeating):
    """Streams orders of a user, two messages at a time, again until they are acknowledged; they are known by their ids.

    ``done``: how many times that was. ``refused``: what else it was told.
    """

    def __init__(self, server: Server, user: int) -> None:
        super().__init__()
        self.user, self.token = user, ""
        self.refused: list[Unavailable] = []
        self.client = featserve.connect(server.address, timeout=PATIENCE_S, connections=3)

    @property
    def acknowledged(self) -> int:
        return 2 * GROUP * self.done

    def again(self) -> None:
        ids = [f"{self.user} {self.acknowledged + i}" for i in range(2 * GROUP)]
        messages = [{"user_id": [self.user] * GROUP, "order_id": group} for group in (ids[:GROUP], ids[GROUP:])]
        while True:
            try:
                self.token = self.client.push_stream("orders", messages, event_time=datetime.now(UTC)).token
            except Unavailable as error:
                self.refused.append(error)
            else:
                return

    def check(self) -> None:
        """Check on each connection that what is acknowledged counts, once; what is under way counts or does not."""
        for _ in range(3):
            least, token = self.acknowledged, self.token
            found = self.client.get("users", {"user_id": [self.user]}, at_least=token).to_dict()
            assert least <= found["spent.day"][0] == found["spent.week"][0] <= self.acknowledged + 2 * GROUP


@pytest.mark.slow
def test_killed_processes_lose_no_event_and_count_none_twice(
    transport: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The writer and workers are killed while events stream in: what is acknowledged counts, what is repeated once."""
    project = Project.make(tmp_path, ORDERS, workers=2, **TRANSPORTS[transport])
    users: list[Pusher] = []
    for _ in range(2):
        with Server(project) as server:
            pushers = [Pusher(server, len(users) + number) for number in range(3)]
            users += pushers
            with running(pushers) as go_on:
                for place in (0, 1, 0, 2):
                    go_on("events are acknowledged")
                    threading.Event().wait(rng.uniform(0, 0.2))
                    killed = processes(server)[place]
                    psutil.Process(killed).kill()
                    until("there is another", lambda: processes(server)[place] != killed)  # noqa: B023
                    for pusher in pushers:
                        pusher.check()
            server.kill()
    with featserve.open(project.folder) as embedded:
        plans = embedded.engine.plans
        assert plans.windows(plans.snapshot.view("spent")).codec.layout.in_parts
        found = embedded.get("users", {"user_id": [pusher.user for pusher in users]}).to_dict()
    assert found["spent.day"] == found["spent.week"] == [pusher.acknowledged for pusher in users]
    assert any(pusher.refused for pusher in users), "no kill met a push"
    for pusher in users:
        pusher.client.close()
