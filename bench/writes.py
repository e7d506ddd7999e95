"""What writes cost reads: the p99 of a server to which 10,000 rows a second are written, beside that of one left alone.

Requests arrive at random instants at a rate that the server can serve with ease, and latency counts from the instant at
which each should have started. They come in turns: without writes, with writes to another server, and with writes to
this one. The servers have a core of their own, and what reads and writes has the others, as if on other machines. Reads
of a server that has nothing to do with the writes wait, too, for the processor; what they wait tells how much of the
ratio is not this server's own. Every row was read before, so that all turns find the same cache: the rows that are
written are replaced in it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np

from bench import load, servers
from bench.project import ENTITIES, FEATURES, KEY, SERVICE, VIEW
from bench.report import Figure, number, p99_us
from bench.servers import Server
from featserve.embedded import clock_us
from featserve.load_test import Load, LoadTest, Point, Range, Reads, Writes, run
from featserve.load_test.result import Round, merge
from featserve.load_test.run import WRITTEN_AT_ONCE
from featserve.types import Column, Float64, Int64

TRANSPORTS = ("native", "grpcio")
RATES = {1: 500.0, 100: 200.0}
"""Requests a second, by their keys: with ease also where the load test and the writes have one core."""
ROWS_PER_S = 10_000.0
WRITTEN = 100_000
TURNS = 6
REQUESTS = 2_000
"""Of each turn."""
TARGET = 2.0
READS = Reads(SERVICE, (KEY,), (Range(KEY, Int64, 0, ENTITIES - 1),))


def measure(folder: Path) -> list[Figure]:
    """Load a server on each transport with 1 and 100 keys a request; the figures are of 12,000 requests each."""
    random = np.random.default_rng(6)
    rows = {f"f{i}": Column(Float64, random.standard_normal(WRITTEN)) for i in range(FEATURES)}
    writes = Writes(VIEW, rows | {KEY: Column(Int64, random.permutation(ENTITIES)[:WRITTEN])}, ROWS_PER_S)
    copied = shutil.copytree(folder, folder.with_name(f"{folder.name}-copied"))
    serving, loading = servers.shared_out()
    figures = []
    try:
        for transport in TRANSPORTS:
            with ExitStack() as stack:
                with servers.on(serving):
                    server, other = [stack.enter_context(servers.ours(path, transport)) for path in (folder, copied)]
                stack.enter_context(servers.on(loading))
                load.warm(server.address, ENTITIES)
                load.warm(other.address, ENTITIES)
                for keys in RATES:
                    told = f"{transport}, {keys} {'key' if keys == 1 else 'keys'}"
                    figures += _figures(told, *_measure(server, other, keys, writes))
    finally:
        shutil.rmtree(copied)
    return figures


def _measure(server: Server, other: Server, keys: int, writes: Writes) -> list[list[Point]]:
    """Return what reads of a server found while nothing was written, and while the other and it itself was written."""
    found: dict[Server | None, list[Point]] = {None: [], other: [], server: []}
    for turn in range(TURNS):
        for to, points in found.items():
            test = LoadTest(
                server.address,
                READS,
                (Load(keys, RATES[keys], 4),),
                writes if to is server else None,
                rounds=1,
                round_s=REQUESTS / RATES[keys],
                warm_up_s=0.5,
                seed=turn,
            )
            with _writing(other, writes, REQUESTS / RATES[keys] + 2) if to is other else nullcontext():
                points += run(test, clock_us()).points
    return list(found.values())


@contextmanager
def _writing(server: Server, writes: Writes, seconds: float) -> Iterator[None]:
    """Write to a server that is hardly read, for so long."""
    test = LoadTest(server.address, READS, (Load(1, 1.0, 1),), writes, rounds=1, round_s=seconds, warm_up_s=0)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(run, test, clock_us())
        yield
        written.result()


def _figures(told: str, alone: list[Point], other: list[Point], own: list[Point]) -> list[Figure]:
    idle, beside, busy = (_all([point.total() for point in points]) for points in (alone, other, own))
    written = _all([point.total_writes() for point in own])
    p99s = [p99_us(total.latency) for total in (idle, beside, busy)]
    note = f"p50 {number(idle.latency.quantile_ns(0.5) / 1e3)} us and {number(busy.latency.quantile_ns(0.5) / 1e3)} us"
    rows = written.answered * WRITTEN_AT_ONCE / written.seconds
    errors = sum((total.errors for total in (idle, beside, busy, written)), Counter[str]())
    return [
        Figure(f"{told}: p99 with writes to p99 without", p99s[2] / p99s[0], "", TARGET, at_most=True, note=note),
        Figure(
            "  the same, writing to another server",
            p99s[1] / p99s[0],
            "",
            note=f"on the same core, {beside.latency.count:,} requests",
        ),
        Figure("  p99 without", p99s[0], "us", note=f"{idle.latency.count:,} requests"),
        Figure("  p99 with", p99s[2], "us", note=f"{busy.latency.count:,} requests, {number(rows)} rows/s written"),
        Figure("  errors", errors.total(), "", 0, at_most=True, note=", ".join(errors)),
    ]


def _all(rounds: list[Round]) -> Round:
    return merge(rounds, sum(each.seconds for each in rounds))
