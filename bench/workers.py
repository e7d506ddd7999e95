"""Requests per second of two workers beside one, the generator on the same cores; and what more cores give, on paper.

Both servers run for the whole time and are loaded in turns by h2load, sixteen connections with one request under way
on each, so that the kernel gives either worker some.

On paper, cores answer as many requests as fit into their processor time: what is left of it when the writer and each
worker's following have had theirs, by what a request takes of the transport's threads and of the one that answers.
Nothing that workers do for a read is shared but the memory's bandwidth.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

import featserve
from bench import h2load, load, servers
from bench.freshness import RATE, write_all_along
from bench.project import ENTITIES
from bench.report import Figure, number
from featserve.embedded import clock_us
from featserve.server.service import Call, Limits, Record, Service
from featserve.stages import Stages

KEYS = (1, 100)
CONNECTIONS = 16
ROUNDS = 5
CORES = 16
ONE, TWO = "1 worker", "2 workers"
STANDING_S = 4.0
WARM_UP, ANSWERED = 20, 600
"""How often is answered in process, in each round."""
AT_ONCE = {"native": CONNECTIONS // 2, "grpcio": 1}
"""Requests that are answered with one another: as many as a worker has connections, which is the most."""

Done = TypeVar("Done")


def measure(folder: Path) -> list[Figure]:
    """Load one worker and two, on each transport, with 1 and with 100 keys a request."""
    second = folder / "second"
    if not second.is_dir():  # a store has one server
        shutil.copytree(folder, second, ignore=shutil.ignore_patterns("*.parquet", second.name))
    figures = []
    for transport in ("native", "grpcio"):
        with ExitStack() as stack:
            one = stack.enter_context(servers.ours(folder, transport))
            two = stack.enter_context(servers.ours(second, transport, workers=2))
            idle, written = standing(two, 0), standing(two, RATE)
            figures += [
                Figure(f"{transport}: a worker follows, nothing written", idle.following * 1e3, "ms/s"),
                Figure(f"  {RATE:,} rows/s written", written.following * 1e3, "ms/s"),
                Figure("  writing and passing on those", written.writing * 1e3, "ms/s"),
            ]
            for keys in KEYS:
                body = next(load.bodies(keys, ENTITIES, 1))
                figures += told(f"{transport}, {keys} {'key' if keys == 1 else 'keys'}", in_turns(one, two, body))
                figures += by_stage(two, body, partial(in_process_us, second, transport, body[5:]), idle, written)
    return figures


def in_turns(one: servers.Server, two: servers.Server, body: bytes) -> dict[str, list[tuple[float, float, float]]]:
    """Return for each round the requests/s, and the microseconds of processor of the server and of the generator."""
    rounds: dict[str, list[tuple[float, float, float]]] = {ONE: [], TWO: []}
    for turn in range(-1, ROUNDS):
        for name, server in ((ONE, one), (TWO, two)):
            served_s, generated_s = server.cpu_s(), generator_s()
            loaded = h2load.run(server.address, body, connections=CONNECTIONS)
            server_us, generator_us = (
                seconds / loaded.ended * 1e6 for seconds in (server.cpu_s() - served_s, generator_s() - generated_s)
            )
            if turn >= 0:
                rounds[name].append((loaded.rate, server_us, generator_us))
    return rounds


def generator_s() -> float:
    """Return the processor time of the generators that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def told(name: str, rounds: dict[str, list[tuple[float, float, float]]]) -> list[Figure]:
    """Return the ratio, what it is of, and what so many cores would answer."""
    ratios = sorted(two[0] / one[0] for one, two in zip(rounds[ONE], rounds[TWO], strict=True))
    note = f"rounds {ratios[0]:.2f} to {ratios[-1]:.2f}"
    figures = [Figure(f"{name}: two workers to one", statistics.median(ratios), "", note=note)]
    for workers, found in rounds.items():
        rate, server_us, generator_us = (statistics.median(column) for column in zip(*found, strict=True))
        shares = f"{number(server_us)} us of processor each, and {number(generator_us)} us of the generator's"
        figures.append(Figure(f"  {workers}", rate, "req/s", note=shares))
    return figures


@dataclass(frozen=True, slots=True)
class Standing:
    """What goes on without reads, in seconds of processor a second: each worker's following, and all the writing."""

    following: float
    writing: float


def standing(server: servers.Server, rows_per_s: int) -> Standing:
    """Measure a server that nobody reads, while so many rows are written."""
    stop = threading.Event()
    writing = threading.Thread(target=write_all_along, args=(server.address, rows_per_s, stop))
    writing.start()
    try:
        _, of_workers, of_others = spent(server, lambda: time.sleep(STANDING_S))
    finally:
        stop.set()
        writing.join()
    following = min(map(sum, of_workers))  # the other worker passes on the writes, too
    writing_s = sum(map(sum, of_workers)) - following * len(of_workers) + of_others
    return Standing(following / STANDING_S, writing_s / STANDING_S)


def by_stage(
    server: servers.Server, body: bytes, in_process: Callable[[], dict[str, float]], idle: Standing, written: Standing
) -> list[Figure]:
    """Return what a request takes of the transport and of the thread that answers, and what cores give by that.

    ``in_process``: answers in this process; returns the microseconds of each stage of a request.
    """
    transport_us, answering_us, rounds = [], [], []
    for _ in range(ROUNDS):
        rounds.append(in_process())
        started = time.perf_counter()
        loaded, of_workers, _ = spent(server, lambda: h2load.run(server.address, body, connections=CONNECTIONS))
        followed_s = idle.following * (time.perf_counter() - started)
        answering_us.append(sum(map(max, of_workers)) / loaded.ended * 1e6)
        transport_us.append(sum(sum(each) - max(each) - followed_s for each in of_workers) / loaded.ended * 1e6)
    transport, answering = (statistics.median(found) for found in (transport_us, answering_us))
    stages = {stage: statistics.median(found.get(stage, 0.0) for found in rounds) for stage in rounds[0]}
    told = [
        Figure("  a request of two workers takes of the transport's threads", transport, "us"),
        Figure("  of the thread that answers", answering, "us"),
        *(Figure(f"    {stage}", us, "us", note="in process, in cache") for stage, us in stages.items()),
        Figure("    the rest: taking calls, handing answers over", answering - sum(stages.values()), "us"),
    ]
    for what, going_on in (("nothing written", idle), (f"{RATE:,} rows/s written", written)):
        left_s = CORES * (1 - going_on.following) - going_on.writing
        note = f"{number(left_s)} s of processor a second are left for reads"
        name = f"  {CORES} workers on {CORES} cores, on paper, {what}"
        told.append(Figure(name, left_s / (transport + answering) * 1e6, "req/s", note=note))
    return told


def spent(server: servers.Server, run: Callable[[], Done]) -> tuple[Done, list[list[float]], float]:
    """Do something; return what it returns, and the seconds of processor that the server takes meanwhile.

    Those of each thread of each worker, and those of all other processes together.
    """
    port = int(server.address.rpartition(":")[2])
    before, workers = threads_s(server), set[int]()
    for process in server.processes():
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections("tcp")):
            workers.add(process.pid)
    done = run()
    of_workers, of_others = [], 0.0
    for pid, threads in threads_s(server).items():
        took = [seconds - before.get(pid, {}).get(thread, 0.0) for thread, seconds in threads.items()]
        if pid in workers:
            of_workers.append(took)
        else:
            of_others += sum(took)
    return done, of_workers, of_others


def threads_s(server: servers.Server) -> dict[int, dict[int, float]]:
    """Return the seconds of processor that each thread of each process has taken."""
    return {p.pid: {t.id: t.user_time + t.system_time for t in p.threads()} for p in server.processes()}


def in_process_us(folder: Path, transport: str, request: bytes) -> dict[str, float]:
    """Answer a request again and again as a worker's thread does; return the mean microseconds of each stage."""
    spent_ns: defaultdict[str, int] = defaultdict(int)
    with featserve.open(folder, follow=True) as opened:
        service = Service(opened.engine, Limits(10_000, 0), clock_us)
        for turn in range(-WARM_UP, ANSWERED):
            for stage in ANSWERS[transport](service, request).timed():
                spent_ns[stage.name] += stage.duration_ns if turn >= 0 else 0
    return {name: ns / ANSWERED / AT_ONCE[transport] / 1e3 for name, ns in spent_ns.items() if ns}


def alone(service: Service, request: bytes) -> Stages:
    """Answer a request as grpcio's event loop does."""
    record = Record()
    record.stages = stages = Stages()
    service.get_features(request, Call((), 1.0, record))
    stages.end()
    return stages


def together(service: Service, request: bytes) -> Stages:
    """Answer a request of each of several connections as pygrpc-native's thread does."""
    stages = Stages()
    stages.begin("decode")
    for share in service.shares([request] * AT_ONCE["native"]):
        service.get_features_together(share, stages)
    stages.end()
    return stages


ANSWERS = {"native": together, "grpcio": alone}
