"""One process of a load test: sends the requests of each phase that comes down a pipe, and answers with its rounds.

In an open loop a request has an intended start, drawn before anything is known of the server, and its latency counts
from there: a server that stalls delays every request that would have started meanwhile, and all of them are counted so.
In a closed loop the requests that a stall kept from starting are never sent, so their delay is seen nowhere.
"""

from __future__ import annotations

import asyncio
import gc
import os
import selectors
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from featserve.load_test.arrivals import poisson
from featserve.load_test.result import Round
from featserve.load_test.source import Reads, Writes
from featserve.tls import Pem
from featserve.wire import FULL_METHOD

CONNECT_S = 10.0
MAX_UNDER_WAY = 4_000
"""Requests of one process that wait for an answer. One that would be more is not sent, and counted as an error."""
NOT_SENT = "NOT_SENT"
AFTER_ERROR_S = 0.01
READY = "ready"
BACKGROUND = 10
"""How far back what writes stands (nice): making its rows should not delay the starts of reads, which are measured."""

OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each channel
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)

Call = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Phase:
    """What one process does for one load: its part of the rate and of the connections, and for how long."""

    batch: int
    rate: float | None
    connections: int
    warm_up_s: float
    round_s: float
    rounds: int
    timeout_s: float
    max_requests: int

    @property
    def seconds(self) -> float:
        return self.warm_up_s + self.rounds * self.round_s


class Recorder:
    """The rounds of a phase that started at ``start_ns`` of the monotonic clock."""

    def __init__(self, phase: Phase, start_ns: int) -> None:
        self.rounds = [Round(phase.round_s) for _ in range(phase.rounds)]
        self.end_ns = start_ns + round(phase.seconds * 1e9)
        self._first_ns = start_ns + round(phase.warm_up_s * 1e9)
        self._round_ns = round(phase.round_s * 1e9)
        self._outside = Round(phase.round_s)

    def at(self, instant_ns: int) -> Round:
        """Return the round that an instant is in; one that nobody looks at before the first and after the last."""
        number = (instant_ns - self._first_ns) // self._round_ns
        return self.rounds[number] if 0 <= number < len(self.rounds) else self._outside


async def open_loop(
    phase: Phase, calls: list[Call], requests: Iterator[bytes], random: np.random.Generator, start_ns: int
) -> list[Round]:
    """Send requests at their intended starts, over the connections in turn; return when the last was answered."""
    assert phase.rate is not None
    recorder = Recorder(phase, start_ns)
    under_way: set[asyncio.Task[bool]] = set()
    calls_in_turn = cycle(calls)
    for offset_ns in poisson(phase.rate, random):
        due_ns = start_ns + offset_ns
        if due_ns >= recorder.end_ns:
            break
        # Behind time this waits 0 s, so that answers are taken, and nobody's intended start moves.
        await asyncio.sleep(max(0, due_ns - time.monotonic_ns()) / 1e9)
        if len(under_way) >= MAX_UNDER_WAY:
            recorder.at(due_ns).fail(NOT_SENT)
            continue
        task = asyncio.create_task(_ask(next(calls_in_turn), next(requests), due_ns, phase.timeout_s, recorder))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    return recorder.rounds


async def closed_loop(phase: Phase, calls: list[Call], requests: Iterator[bytes], start_ns: int) -> list[Round]:
    """Send a request on each connection as soon as the last one was answered; return when the last was answered."""
    recorder = Recorder(phase, start_ns)
    left = phase.max_requests

    async def keep_asking(call: Call) -> None:
        nonlocal left
        while (now_ns := time.monotonic_ns()) < recorder.end_ns and left > 0:
            left -= 1
            if not await _ask(call, next(requests), now_ns, phase.timeout_s, recorder):
                await asyncio.sleep(AFTER_ERROR_S)  # a server that is gone refuses at once

    await asyncio.sleep(max(0, start_ns - time.monotonic_ns()) / 1e9)
    await asyncio.gather(*map(keep_asking, calls))
    return recorder.rounds


async def _ask(call: Call, request: bytes, due_ns: int, timeout_s: float, recorder: Recorder) -> bool:
    """Send a request that should start at ``due_ns``, record what came of it, and say whether it was answered."""
    round_ = recorder.at(due_ns)
    round_.arrived += 1
    round_.lag.record(time.monotonic_ns() - due_ns)
    try:
        await call(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        round_.errors[error.code().name] += 1
        return False
    done_ns = time.monotonic_ns()
    round_.latency.record(done_ns - due_ns)
    recorder.at(done_ns).answered += 1
    return True


@asynccontextmanager
async def connected(target: str, tls: Pem | None, method: str, connections: int) -> AsyncIterator[list[Call]]:
    """Open connections, each of them ready, and give the call of a method on each: bytes in, bytes out."""
    channels = [
        grpc.aio.insecure_channel(target, OPTIONS)
        if tls is None
        else grpc.aio.secure_channel(target, tls.channel_credentials(), OPTIONS)
        for _ in range(connections)
    ]
    try:
        await asyncio.wait_for(asyncio.gather(*(channel.channel_ready() for channel in channels)), CONNECT_S)
        yield [channel.unary_unary(FULL_METHOD + method) for channel in channels]
    finally:
        for channel in channels:
            await channel.close()


def new_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop over select(2), which waits to the microsecond: others round up to a millisecond."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def work(pipe: Connection, target: str, tls: Pem | None, source: Reads | Writes, seed: np.random.SeedSequence) -> None:
    """Take phases from a pipe until it says None or is closed. Each is answered twice: READY, then its rounds, or text
    that says what went wrong.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    if isinstance(source, Writes):
        os.nice(BACKGROUND)
    random = np.random.default_rng(seed)
    gc.freeze()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        try:
            while (phase := pipe.recv()) is not None:
                runner.run(_serve(pipe, phase, target, tls, source, random))
        except EOFError:
            return


async def _serve(
    pipe: Connection,
    phase: Phase,
    target: str,
    tls: Pem | None,
    source: Reads | Writes,
    random: np.random.Generator,
) -> None:
    requests = source.requests(phase.batch, random)
    try:
        async with connected(target, tls, source.method, phase.connections) as calls:
            pipe.send(READY)
            start_ns = pipe.recv()
            if phase.rate is None:
                rounds = await closed_loop(phase, calls, requests, start_ns)
            else:
                rounds = await open_loop(phase, calls, requests, random, start_ns)
    except TimeoutError:
        pipe.send(f"{phase.connections:,} connections to {target} were not made within {CONNECT_S:g} s")
        return
    pipe.send(rounds)
