"""Requests per second on pygrpc-native, beside the bare loop on it and beside our server on grpcio.

All three run for the whole time and are loaded in turns by h2load, eight connections with one request under way on
each: a generator in Python would take longer than the servers do. It repeats one request, so the rows are hot for all.
Turns are short, many, and begin with another server each round: the speed of a shared machine changes within seconds.

Then ours and the bare one are asked for other rows each time, of all that there are, each of which was read before.
That takes a generator in Python, which sends less than they could answer, so what tells is processor time of a request.
"""

from __future__ import annotations

import shutil
import statistics
from contextlib import ExitStack
from pathlib import Path

from bench import h2load, load, servers
from bench.project import ENTITIES
from bench.report import Figure, number
from bench.server import KEYS, check_same

TO_BARE, TO_GRPCIO = 0.8, {1: 5.0, 10: None, 100: 3.0}
ROUNDS, SECONDS = 21, 1.0
RANDOM_ROUNDS = 7
OURS, BARE, GRPCIO = "featserve, native", "bare native", "featserve, grpcio"


def measure(folder: Path) -> list[Figure]:
    """Load the three servers with 1, 10 and 100 keys a request."""
    second = folder / "second"
    if not second.is_dir():  # a store has one server
        shutil.copytree(folder, second, ignore=shutil.ignore_patterns("*.parquet", second.name))
    figures = []
    with ExitStack() as stack:
        ours = stack.enter_context(servers.ours(folder, "native"))
        bare = stack.enter_context(servers.bare(folder, "native"))
        grpcio = stack.enter_context(servers.ours(second, "grpcio"))
        check_same(ours, bare)
        for keys in KEYS:
            body = next(load.bodies(keys, ENTITIES, 1))
            rates: dict[str, list[float]] = {OURS: [], BARE: [], GRPCIO: []}
            cpu_us: dict[str, list[float]] = {name: [] for name in rates}
            for turn in range(-1, ROUNDS):
                named = list(zip(rates, (ours, bare, grpcio), strict=True))
                for name, server in named[turn % 3 :] + named[: turn % 3]:
                    before_s = server.cpu_s()
                    loaded = h2load.run(server.address, body, seconds=SECONDS)
                    if turn >= 0:
                        rates[name].append(loaded.rate)
                        cpu_us[name].append((server.cpu_s() - before_s) / loaded.ended * 1e6)
            figures += told(keys, rates, cpu_us)
        for server in (ours, bare):
            load.warm(server.address, ENTITIES)
        for keys in KEYS:
            figures += any_rows(keys, ours, bare)
    return figures


def any_rows(keys: int, ours: servers.Server, bare: servers.Server) -> list[Figure]:
    """Ask both for random rows of all in turns; return the processor times of a request, and their ratio."""
    found: dict[str, list[tuple[float, float]]] = {OURS: [], BARE: []}
    for turn in range(-1, RANDOM_ROUNDS):
        named = [(OURS, ours), (BARE, bare)]
        for name, server in named[turn % 2 :] + named[: turn % 2]:
            before_s = server.cpu_s()
            measured = load.run(server.address, keys, entities=ENTITIES, seconds=SECONDS, seed=turn + 1)
            if turn >= 0:
                found[name].append(((server.cpu_s() - before_s) / measured.requests * 1e6, measured.rate))
    ratios = sorted(a / b for (a, _), (b, _) in zip(found[OURS], found[BARE], strict=True))
    told = f"{keys} {'key' if keys == 1 else 'keys'} at random: processor time of native to {BARE}"
    note = f"rounds {ratios[0]:.2f} to {ratios[-1]:.2f}"
    figures = [Figure(told, statistics.median(ratios), "", note=note)]
    for name, rounds in found.items():
        cpu_us, rate = (statistics.median(column) for column in zip(*rounds, strict=True))
        note = f"{number(rate)} req/s with a generator in Python"
        figures.append(Figure(f"  {name}", cpu_us, "us", note=note))
    return figures


def told(keys: int, rates: dict[str, list[float]], cpu_us: dict[str, list[float]]) -> list[Figure]:
    """Return the ratios, and what they are ratios of."""
    name, figures = f"{keys} {'key' if keys == 1 else 'keys'}", []
    for other, target in ((BARE, TO_BARE), (GRPCIO, TO_GRPCIO[keys])):
        ratios = sorted(a / b for a, b in zip(rates[OURS], rates[other], strict=True))
        note = f"rounds {ratios[0]:.2f} to {ratios[-1]:.2f}"
        figures.append(Figure(f"{name}: native to {other}", statistics.median(ratios), "", target, note=note))
    for server, found in rates.items():
        note = f"{number(statistics.median(cpu_us[server]))} us of processor each"
        figures.append(Figure(f"  {server}", statistics.median(found), "req/s", note=note))
    return figures
