"""A server that is asked for more than it can serve: answers and latency against load, up to three times its peak.

The peak is what it answers to connections that each wait for their answer; then requests arrive whether or not those
before them were answered, at parts and multiples of that rate. What the server cannot serve it is to refuse at once.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from bench import flood, load, servers
from bench.flood import Flooded
from bench.project import ENTITIES
from bench.report import Figure, number
from featserve.config import load_config

TRANSPORTS = ("native", "grpcio")
KEYS = (1, 100)
LOADS = (0.5, 0.8, 0.9, 1.0, 1.2, 2.0, 3.0)
"""Rates, as multiples of the peak."""
ROUNDS = 3
SECONDS = 2.0
CONNECTIONS = 32
GOODPUT = 0.9
SLACK = 2.0
"""How many times as long as the calls under way take at the peak rate the p99 of an accepted one may be."""


def measure(folder: Path) -> list[Figure]:
    """Load a server on each transport with 1 and 100 keys a request; ratios are to the peak of the same round."""
    limit = load_config(folder).server.max_concurrent
    figures = []
    for transport in TRANSPORTS:
        with servers.ours(folder, transport) as server:
            for keys in KEYS:
                peaks: list[float] = []
                found: dict[float, list[Flooded]] = {part: [] for part in LOADS}
                for turn in range(ROUNDS):
                    options = {"entities": ENTITIES, "connections": CONNECTIONS, "seed": turn}
                    peaks.append(load.run(server.address, keys, seconds=SECONDS, **options).rate)
                    for part in LOADS:
                        rate = part * peaks[-1]
                        found[part].append(flood.run(server.address, keys, rate, SECONDS, **options))
                told = f"{transport}, {keys} {'key' if keys == 1 else 'keys'}"
                figures += _figures(told, peaks, found, limit)
    return figures


def _figures(told: str, peaks: list[float], found: dict[float, list[Flooded]], limit: int) -> list[Figure]:
    peak = statistics.median(peaks)
    figures = [Figure(f"{told}: peak", peak, "req/s", note=f"{CONNECTIONS} connections, each waits for its answer")]
    for part, rounds in found.items():
        goodput = statistics.median(each.goodput / at for each, at in zip(rounds, peaks, strict=True))
        answers, refusals, lag = (
            histograms[0].merge(histograms[1:])
            for histograms in (
                [r.answers for r in rounds],
                [r.refusals for r in rounds],
                [r.lag for r in rounds],
            )
        )
        p50, p99 = (answers.quantile_ns(q) / 1e3 for q in (0.5, 0.99))
        told_of = [
            f"p50 {number(p50)} us, p99 {number(p99)} us",
            f"sent late p99 {number(lag.quantile_ns(0.99) / 1e3)} us",
        ]
        if refusals.count:
            share = 100 * refusals.count / (refusals.count + answers.count)
            told_of.append(f"{share:.0f} % refused, p99 {number(refusals.quantile_ns(0.99) / 1e3)} us")
        if lost := sum(r.unanswered for r in rounds):
            told_of.append(f"{lost:,} without an answer")
        target = GOODPUT if part == max(LOADS) else None
        figures.append(Figure(f"  answered at {part:g} x", goodput, "of peak", target, note="; ".join(told_of)))
    most_ms = SLACK * limit / peak * 1e3
    note = f"at most {limit} are under way, which take {number(limit / peak * 1e3)} ms at the peak"
    figures.append(Figure(f"  p99 of what was answered at {max(LOADS):g} x", p99 / 1e3, "ms", most_ms, True, note))
    return figures
