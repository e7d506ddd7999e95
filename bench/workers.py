"""Requests per second of two workers beside one, the generator on the same cores; and what more cores give, on paper.

Both servers run for the whole time and are loaded in turns by h2load, sixteen connections with one request under way
on each, so that the kernel gives either worker some. On paper, a core answers as many requests as the processor time of
one goes into a second: nothing that workers do for a read is shared but the memory's bandwidth.
"""

from __future__ import annotations

import resource
import shutil
import statistics
from contextlib import ExitStack
from pathlib import Path

from bench import h2load, load, servers
from bench.project import ENTITIES
from bench.report import Figure, number

KEYS = (1, 100)
CONNECTIONS = 16
ROUNDS = 5
CORES = 16
ONE, TWO = "1 worker", "2 workers"


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
            for keys in KEYS:
                body = next(load.bodies(keys, ENTITIES, 1))
                figures += told(f"{transport}, {keys} {'key' if keys == 1 else 'keys'}", in_turns(one, two, body))
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
    each_us = statistics.median(us for _, us, _ in rounds[TWO])
    paper = f"{CORES} s of processor a second, by what a request takes of two workers"
    figures.append(Figure(f"  {CORES} workers on {CORES} cores, on paper", CORES * 1e6 / each_us, "req/s", note=paper))
    return figures
