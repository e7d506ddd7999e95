"""What a load test sends and when: its bounds, its requests, and what each loop shows of a server that is slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import grpc
import numpy as np
import pytest

from featserve._proto import serving_pb2 as pb
from featserve.errors import CallerError, InvalidRequest
from featserve.load_test import (
    Listed,
    Load,
    LoadTest,
    Range,
    Reads,
    Round,
    Writes,
)
from featserve.load_test.arrivals import MAX_SIZE
from featserve.load_test.run import check_loopback
from featserve.load_test.worker import NOT_SENT, Phase, closed_loop, connected, new_loop, open_loop
from featserve.types import Float64, Int32, Int64, String, column

READS = Reads("wide", ("user_id",), (Range("user_id", Int64, 1, 1_000),))


@pytest.mark.parametrize("target", ["127.0.0.1:7070", "localhost:7070", "[::1]:7070", "127.8.9.1:1"])
def test_this_machine_may_be_loaded(target: str) -> None:
    """Every loopback address may be loaded."""
    check_loopback(target)


@pytest.mark.parametrize("target", ["192.0.2.1:7070", "8.8.8.8:7070", "[2001:db8::1]:7070", "0.0.0.0:7070"])
def test_another_machine_is_not_loaded_by_accident(target: str) -> None:
    """An address that is not this machine's is refused before anything is sent, unless that is asked for."""
    with pytest.raises(CallerError, match="--allow-remote"):
        LoadTest(target, READS, (Load(1, None, 1),))
    LoadTest(target, READS, (Load(1, None, 1),), allow_remote=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 900, "round_s": 5}, "3,600 s"),
        ({"loads": (Load(1, 500_000, 8),), "rounds": 100}, "50,000,000"),
        ({"processes": 65}, "processes"),
        ({"round_s": float("nan")}, "round_s"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_a_test_is_bounded(changes: dict[str, Any], message: str) -> None:
    """A test that would take too long or send too much is refused before it starts."""
    with pytest.raises(CallerError, match=message):
        replace(LoadTest("127.0.0.1:7070", READS, (Load(1, None, 8),)), **changes)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Load(0, None, 1),
        lambda: Load(1, 0.0, 1),
        lambda: Load(1, float("nan"), 1),
        lambda: Load(1, None, 0),
        lambda: Range("a", Int64, 2, 1),
        lambda: Range("a", Int64, 0, MAX_SIZE),
        lambda: Range("a", Int32, 0, 2**31),
        lambda: Range("a", Float64, 0, 1),
        lambda: Range("a", String, 0, 1),
        lambda: Listed({}),
        lambda: Listed({"a": column(Int64, [])}),
        lambda: Listed({"a": column(Int64, [1]), "b": column(Int64, [1, 2])}),
        lambda: replace(READS, exponent=-0.1),
        lambda: Writes("v", {}, 0),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Callable[[], object]) -> None:
    """Loads, ranges and lists that make no sense are refused when they are made."""
    with pytest.raises(InvalidRequest):
        wrong()


def test_requests_draw_rows_together_and_ranges_apart() -> None:
    """Columns of a file keep their rows, a range is drawn on its own, and request columns stand apart from keys."""
    listed = Listed({"country": column(String, ["nz", "at", "ü"]), "zip": column(String, ["1", "22", "333"])})
    reads = Reads("s", ("country", "zip"), (listed, Range("amount", Int32, -5, 5)))
    requests = reads.requests(7, np.random.default_rng(0))
    pairs: set[tuple[str, str]] = set()
    amounts: set[int] = set()
    for _ in range(200):
        message = pb.GetFeaturesRequest.FromString(next(requests))
        strings = []
        for key in message.keys:
            ends = np.frombuffer(key.offsets, "<u4")
            strings.append([key.data[a:b].decode() for a, b in pairwise(ends.tolist())])
        pairs |= set(zip(*strings, strict=True))
        (amount,) = message.request_columns
        found = np.frombuffer(amount.data, "<i4")
        assert len(found) == 7
        amounts |= set(found.tolist())
    assert pairs == {("nz", "1"), ("at", "22"), ("ü", "333")}
    assert amounts == set(range(-5, 6))


@asynccontextmanager
async def answering(answer: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[str]:
    """Run a gRPC server whose every answer waits for ``answer``, and give its address."""

    async def get_features(data: bytes, context: Any) -> bytes:
        await answer()
        return b""

    server = grpc.aio.server()
    handler: Any = {"GetFeatures": grpc.unary_unary_rpc_method_handler(get_features)}
    name = "featserve.v1.FeatureServingService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handler),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def measured(answer: Callable[[], Coroutine[Any, Any, None]], phase: Phase) -> Round:
    """Load a server that answers so, from this process, and return the one round."""

    async def measure() -> Round:
        async with answering(answer) as target, connected(target, None, "GetFeatures", phase.connections) as calls:
            start_ns, random = time.monotonic_ns() + 10_000_000, np.random.default_rng(1)
            requests = READS.requests(1, random)
            if phase.rate is None:
                (found,) = await closed_loop(phase, calls, requests, start_ns)
            else:
                (found,) = await open_loop(phase, calls, requests, random, start_ns)
            return found

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(measure())


PHASE = Phase(1, 250.0, 2, 0.0, 2.0, 1, 5.0, 10**9)


def stalling_once(after_s: float, seconds: float) -> Callable[[], Coroutine[Any, Any, None]]:
    """Return what answers at once, but for one stall, in which nothing is answered."""
    began = time.monotonic()
    gate = asyncio.Event()
    gate.set()
    stalled = False

    async def answer() -> None:
        nonlocal stalled
        if not stalled and time.monotonic() - began > after_s:
            stalled = True
            gate.clear()
            asyncio.get_running_loop().call_later(seconds, gate.set)
        await gate.wait()

    return answer


def test_an_open_loop_shows_a_stall_and_a_closed_loop_hides_it() -> None:
    """One stall of 400 ms in 2 s delays a fifth of the requests that should have started: p90 shows it where requests
    arrive on their own, and is blind to it where each waits for the one before.
    """
    opened = measured(stalling_once(0.5, 0.4), PHASE)
    closed = measured(stalling_once(0.5, 0.4), replace(PHASE, rate=None))
    assert opened.errors == closed.errors == {}
    assert opened.latency.quantile_ns(0.9) > 0.1e9
    assert opened.latency.quantile_ns(1.0) > 0.35e9
    assert closed.latency.quantile_ns(1.0) > 0.35e9
    assert closed.latency.quantile_ns(0.99) < 0.1e9


def test_a_server_that_is_too_slow_is_seen() -> None:
    """Offered twice what a server can answer, latency grows with the backlog, and it is told not to have kept up."""
    turn = asyncio.Lock()

    async def slowly() -> None:
        async with turn:
            await asyncio.sleep(1 / 125)

    found = measured(slowly, PHASE)
    assert not found.kept_up
    assert found.latency.quantile_ns(0.9) > 3 * found.latency.quantile_ns(0.1) > 0.1e9
    assert found.arrived == pytest.approx(500, abs=5 * 500**0.5)
    assert found.latency.count == found.arrived


def test_errors_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not answered in time, or not sent for all that is under way, is an error and no latency."""
    monkeypatch.setattr("featserve.load_test.worker.MAX_UNDER_WAY", 50)

    async def never() -> None:
        await asyncio.Event().wait()

    found = measured(never, replace(PHASE, timeout_s=0.5))
    assert found.latency.count == found.answered == 0
    assert found.errors.keys() == {"DEADLINE_EXCEEDED", NOT_SENT}
    assert found.errors.total() == found.arrived
    assert not found.kept_up


def test_a_closed_loop_stops_at_its_bound() -> None:
    """A closed loop sends no more requests than it may."""

    async def at_once() -> None:
        pass

    found = measured(at_once, replace(PHASE, rate=None, max_requests=37))
    assert found.arrived == found.latency.count == 37


def test_waiting_is_precise() -> None:
    """The event loop of the load generator wakes at its instant, not at the next millisecond."""

    async def lateness() -> list[float]:
        late: list[float] = []
        for _ in range(100):
            due = time.monotonic() + 0.0012
            await asyncio.sleep(0.0012)
            late.append(time.monotonic() - due)
        return late

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert min(runner.run(lateness())) < 0.0006  # rounded up to a millisecond it would be 0.0008
