"""Runs a load test: starts the processes that send, gives each its part of a load, and gathers what they measured."""

from __future__ import annotations

import ipaddress
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from featserve._proto import serving_pb2 as pb
from featserve.client import connect, translated
from featserve.errors import CallerError, ServingError, invalid
from featserve.load_test.result import Point, Result, Round, merge
from featserve.load_test.source import Load, Reads, Writes
from featserve.load_test.worker import OPTIONS, READY, Phase, work
from featserve.matrix import Status
from featserve.tls import Pem
from featserve.types import Type
from featserve.wire import FULL_METHOD, decode_view

MAX_SECONDS = 3_600.0
MAX_REQUESTS = 50_000_000
MAX_PROCESSES = 64
WRITTEN_AT_ONCE = 100
"""Rows of one write."""
PROBED = 200
"""Rows that are asked for before the test, to see whether there are any."""
START_S = 0.05
"""From the order to start until the start, so that all processes have got it."""
TICK_S = 0.2

Progress = Callable[[int, float], None]
"""Gets the number of the load that is under way, and the part of its time that has passed."""


@dataclass(frozen=True, slots=True)
class LoadTest:
    """What is sent to ``target`` ("host:port"): each of ``loads`` in turn, a warm-up and ``rounds`` rounds.

    ``tls``: what is trusted and shown there, None for plaintext.

    Raises CallerError for a target that is not on this machine, unless ``allow_remote``, and for a test that would take
    over an hour or over 50 million requests.
    """

    target: str
    reads: Reads
    loads: tuple[Load, ...]
    writes: Writes | None = None
    processes: int = 1
    rounds: int = 10
    round_s: float = 3.0
    warm_up_s: float = 2.0
    timeout_s: float = 5.0
    seed: int = 0
    allow_remote: bool = False
    tls: Pem | None = None

    def __post_init__(self) -> None:
        limits = (
            ("processes", self.processes, 1, MAX_PROCESSES),
            ("rounds", self.rounds, 1, 1_000),
            ("round_s", self.round_s, 0.05, MAX_SECONDS),
            ("warm_up_s", self.warm_up_s, 0, MAX_SECONDS),
            ("timeout_s", self.timeout_s, 0.001, 60),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise invalid(name, f"{value:g}; it is {low:g} to {high:g}")
        if self.seconds > MAX_SECONDS:
            raise CallerError(f"the test would take {self.seconds:,.0f} s; the most is {MAX_SECONDS:,.0f} s")
        requests = sum((load.rate or 0) * self.seconds / len(self.loads) for load in self.loads)
        if requests > MAX_REQUESTS:
            raise CallerError(f"the test would send {requests:,.0f} requests; the most is {MAX_REQUESTS:,}")
        if not self.allow_remote:
            check_loopback(self.target)

    @property
    def seconds(self) -> float:
        """What it takes, but for starting, connecting and the last answers."""
        return len(self.loads) * (self.warm_up_s + self.rounds * self.round_s)


def check_loopback(target: str) -> None:
    """Raise CallerError unless every address of a target is one of this machine's own."""
    host, _, port = target.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise CallerError(f"{target}: no address of a server: {error}") from None
    addresses = {str(address[0]) for *_, address in found}
    remote = sorted(a for a in addresses if not ipaddress.ip_address(a.partition("%")[0]).is_loopback)
    if remote:
        raise CallerError(
            f"{target} is {', '.join(remote)}, and not this machine: a load test can take a server down. "
            "If it is yours to load, say so with --allow-remote"
        )


def describe_view(target: str, view: str, tls: Pem | None = None) -> dict[str, Type]:
    """Return the type of each column of a view's rows, as the server at ``target`` has it."""
    with (
        grpc.insecure_channel(target, OPTIONS)
        if tls is None
        else grpc.secure_channel(target, tls.channel_credentials(), OPTIONS)
    ) as channel:
        method = channel.unary_unary(
            f"{FULL_METHOD}DescribeView",
            pb.DescribeViewRequest.SerializeToString,
            pb.DescribeViewResponse.FromString,
        )
        try:
            return decode_view(method(pb.DescribeViewRequest(view=view), timeout=5.0))
        except grpc.RpcError as error:
            raise translated(error, target) from None


def run(test: LoadTest, now_us: int, progress: Progress = lambda load, part: None) -> Result:
    """Run a load test that starts at ``now_us``, and return what it measured.

    Raises an error of ``featserve.errors`` where the server is not there or refuses what is sent to it first.
    """
    load_average = os.getloadavg()[0]
    service, found = _probe(test)
    # Each process has its own stream of random numbers, so their arrivals are independent: together a Poisson process.
    seeds = iter(np.random.SeedSequence(test.seed).spawn(test.processes + 1))
    with ExitStack() as stack:
        readers = [stack.enter_context(_process(test, test.reads, next(seeds))) for _ in range(test.processes)]
        writers = [] if test.writes is None else [stack.enter_context(_process(test, test.writes, next(seeds)))]
        points: list[Point] = []
        for number, load in enumerate(test.loads):
            pipes, phases = list(zip(readers, _parts(test, load), strict=False)), []
            if test.writes is not None:
                rate = test.writes.rate / WRITTEN_AT_ONCE
                phases = [(writers[0], _phase(test, WRITTEN_AT_ONCE, rate, 1, 1))]
            rounds = _measure([*pipes, *phases], lambda part, number=number: progress(number, part))  # type: ignore[misc]
            points.append(Point(load, _together(rounds[: len(pipes)]), _together(rounds[len(pipes) :])))
    return Result(now_us, service, found, settings_of(test, load_average), tuple(points))


def _probe(test: LoadTest) -> tuple[str, float]:
    """Return the service that answers, and the part of a sample of its rows that it has."""
    credentials = None if test.tls is None else test.tls.channel_credentials()
    with connect(test.target, timeout=test.timeout_s, credentials=credentials) as client:
        schema = client.describe(test.reads.service)
        most = max(load.batch for load in test.loads)
        rows = max(most, min(PROBED, 20 * most))  # no less than a request has: what is too much is refused here
        drawn = test.reads.draw(rows, np.random.default_rng(test.seed))
        keys = {name: column for name, column in drawn.items() if name in schema.keys}
        request = {name: column for name, column in drawn.items() if name not in schema.keys}
        answer = client.get(test.reads.service, keys, request=request)
    present = answer.view_status == Status.PRESENT
    return f"{schema.reference}#{schema.hash[:12]}", float(present.mean()) if present.size else 1.0


def _parts(test: LoadTest, load: Load) -> list[Phase]:
    """Return each process's part of a load; there are no more parts than connections."""
    parts = min(test.processes, load.connections)
    spread = [load.connections // parts + (i < load.connections % parts) for i in range(parts)]
    rate = None if load.rate is None else load.rate / parts
    return [_phase(test, load.batch, rate, connections, parts) for connections in spread]


def _phase(test: LoadTest, batch: int, rate: float | None, connections: int, parts: int) -> Phase:
    return Phase(
        batch, rate, connections, test.warm_up_s, test.round_s, test.rounds, test.timeout_s, MAX_REQUESTS // parts
    )


def _together(rounds: list[list[Round]]) -> list[Round]:
    """Return the rounds of several processes as one list."""
    return [merge(parts, parts[0].seconds) for parts in zip(*rounds, strict=True)]


def _measure(parts: list[tuple[Connection, Phase]], progress: Callable[[float], None]) -> list[list[Round]]:
    """Run the phases of one load, all from the same instant, and return the rounds of each."""
    try:
        for pipe, phase in parts:
            pipe.send(phase)
        for pipe, _ in parts:
            _received(pipe)
        start_ns = time.monotonic_ns() + round(START_S * 1e9)
        for pipe, _ in parts:
            pipe.send(start_ns)
        seconds = parts[0][1].seconds
        rounds: list[list[Round]] = []
        for pipe, _ in parts:
            while not pipe.poll(TICK_S):
                progress(min(1.0, max(0.0, (time.monotonic_ns() - start_ns) / 1e9 / seconds)))
            rounds.append(_received(pipe))
    except (EOFError, OSError):
        raise ServingError("a process of the load test ended before its time; its own message says why") from None
    progress(1.0)
    return rounds


def _received(pipe: Connection) -> Any:
    """Return what a process sent; raises ServingError where that is what went wrong."""
    message = pipe.recv()
    if isinstance(message, str) and message != READY:
        raise ServingError(message)
    return message


@contextmanager
def _process(test: LoadTest, source: Reads | Writes, seed: np.random.SeedSequence) -> Iterator[Connection]:
    """Start a process that takes phases; it is gone at the end, whatever happens."""
    context = get_context("spawn")  # gRPC does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, test.target, test.tls, source, seed), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.terminate()
        process.join()
        process.close()


def settings_of(test: LoadTest, load_average: float) -> dict[str, Any]:
    """Return what decides what a test measures, as JSON values. ``load_average``: of the minute before it."""
    written = None if test.writes is None else {"view": test.writes.view, "rows_per_s": test.writes.rate}
    return {
        "target": test.target,
        "tls": test.tls is not None,
        "keys": {", ".join(axis.columns(np.zeros(0, np.int64))): axis.size for axis in test.reads.axes},
        "zipf": test.reads.exponent,
        "writes": written,
        "processes": test.processes,
        "rounds": test.rounds,
        "round_s": test.round_s,
        "warm_up_s": test.warm_up_s,
        "timeout_s": test.timeout_s,
        "seed": test.seed,
        "featserve": version("featserve"),
        "grpcio": grpc.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "load_average": round(load_average, 2),
    }
