"""What writes cost reads: the p99 of a server to which 10,000 rows a second are written, beside that of one left alone.

Requests arrive at random instants at a rate that the server can serve with ease, in turns with writes and without, and
latency counts from the instant at which each should have started. Every row was read before, so that both find the same
cache: the rows that are written are replaced in it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from bench import load, servers
from bench.project import ENTITIES, FEATURES, KEY, SERVICE, VIEW
from bench.report import Figure, number
from featserve.embedded import clock_us
from featserve.load_test import Load, LoadTest, Point, Range, Reads, Writes, run
from featserve.load_test.result import Round, merge
from featserve.load_test.run import WRITTEN_AT_ONCE
from featserve.types import Column, Float64, Int64

TRANSPORTS = ("native", "grpcio")
KEYS = (1, 100)
RATE = 500.0
ROWS_PER_S = 10_000.0
WRITTEN = 100_000
TURNS = 6
SECONDS = 4.0
TARGET = 2.0


def measure(folder: Path) -> list[Figure]:
    """Load a server on each transport with 1 and 100 keys a request; the figures are of 12,000 requests each."""
    random = np.random.default_rng(6)
    rows = {f"f{i}": Column(Float64, random.standard_normal(WRITTEN)) for i in range(FEATURES)}
    writes = Writes(VIEW, rows | {KEY: Column(Int64, random.permutation(ENTITIES)[:WRITTEN])}, ROWS_PER_S)
    figures = []
    for transport in TRANSPORTS:
        with servers.ours(folder, transport) as server:
            load.warm(server.address, ENTITIES)
            for keys in KEYS:
                found: dict[bool, list[Point]] = {False: [], True: []}
                for turn in range(TURNS):
                    for writing in (False, True):
                        test = LoadTest(
                            server.address,
                            Reads(SERVICE, (KEY,), (Range(KEY, Int64, 0, ENTITIES - 1),)),
                            (Load(keys, RATE, 4),),
                            writes if writing else None,
                            rounds=1,
                            round_s=SECONDS,
                            warm_up_s=0.5,
                            seed=turn,
                        )
                        found[writing] += run(test, clock_us()).points
                figures += _figures(f"{transport}, {keys} {'key' if keys == 1 else 'keys'}", found)
    return figures


def _figures(told: str, found: dict[bool, list[Point]]) -> list[Figure]:
    idle, busy = (_all([point.total() for point in found[writing]]) for writing in (False, True))
    written = _all([point.total_writes() for point in found[True]])
    p99s = [total.latency.quantile_ns(0.99) / 1e3 for total in (idle, busy)]
    note = f"p50 {number(idle.latency.quantile_ns(0.5) / 1e3)} us and {number(busy.latency.quantile_ns(0.5) / 1e3)} us"
    rows = written.answered * WRITTEN_AT_ONCE / written.seconds
    errors = sum((total.errors for total in (idle, busy, written)), Counter[str]())
    return [
        Figure(f"{told}: p99 with writes to p99 without", p99s[1] / p99s[0], "", TARGET, at_most=True, note=note),
        Figure("  p99 without", p99s[0], "us", note=f"{idle.latency.count:,} requests"),
        Figure("  p99 with", p99s[1], "us", note=f"{busy.latency.count:,} requests, {number(rows)} rows/s written"),
        Figure("  errors", errors.total(), "", 0, at_most=True, note=", ".join(errors)),
    ]


def _all(rounds: list[Round]) -> Round:
    return merge(rounds, sum(each.seconds for each in rounds))
