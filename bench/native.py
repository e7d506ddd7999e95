"""Requests per second on pygrpc-native, beside the bare loop on it and beside our server on grpcio.

All three run for the whole time and are loaded in turns by h2load, eight connections with one request under way on
each: a generator in Python would take longer than the servers do. It repeats one request, so the rows are hot for all.
Turns are short, many, and begin with another server each round: the speed of a shared machine changes within seconds.
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
