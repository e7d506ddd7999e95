"""Requests per second of our server beside those of the bare handler, which does the same look-up and nothing else.

Both run for the whole time and are loaded in turns, so what else happens on the machine meets both; the ratio is the
median of the rounds'.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import grpc
import numpy as np

import featserve
from bench import load, servers
from bench.project import ENTITIES, KEY, SERVICE
from bench.report import Figure, number
from bench.servers import Server
from featserve._proto import serving_pb2 as pb
from featserve.wire import FULL_METHOD

KEYS = (1, 10, 100)
TARGET = 0.8
HOT = 10_000
ROUNDS = 7
SECONDS = 1.5


def measure(folder: Path) -> list[Figure]:
    """Load both servers with 1, 10 and 100 keys a request: all entities at random, then a few hot ones.

    The bare one reads RocksDB, whose row cache holds as much as our own.
    """
    figures = []
    with servers.ours(folder) as ours, servers.bare(folder) as bare:
        check_same(ours, bare)
        for server in (ours, bare):
            load.warm(server.address, ENTITIES)
        for entities, kind in ((ENTITIES, ""), (HOT, f", {HOT:,} hot entities")):
            for keys in KEYS:
                figures += compare(ours, bare, keys, entities, f"{keys} {'key' if keys == 1 else 'keys'}{kind}")
        figures += [client_latency(ours, keys) for keys in KEYS]
    return figures


def check_same(ours: Server, bare: Server) -> None:
    """Raise RuntimeError where the two servers answer with different values."""
    request = next(load.bodies(100, ENTITIES, 1))[5:]
    answers = []
    for server in (ours, bare):
        with grpc.insecure_channel(server.address) as channel:
            method: Any = channel.unary_unary(f"{FULL_METHOD}GetFeatures", None, pb.GetFeaturesResponse.FromString)
            answers.append(method(request, timeout=10))
    if answers[0].values != answers[1].values or len(answers[0].values) != 100 * 50 * 4:
        raise RuntimeError("the servers that are compared answer with different values")


def compare(ours: Server, bare: Server, keys: int, entities: int, name: str) -> list[Figure]:
    """Load both in turns; return the figures of one size of request."""
    rounds: dict[str, list[tuple[load.Measured, float]]] = {ours.name: [], bare.name: []}
    for turn in range(-1, ROUNDS):
        for server in (ours, bare):
            before_s = server.cpu_s()
            measured = load.run(server.address, keys, entities=entities, seconds=SECONDS, seed=turn + 1)
            if turn >= 0:
                rounds[server.name].append((measured, (server.cpu_s() - before_s) / measured.requests * 1e6))
    rates = {who: [m.rate for m, _ in found] for who, found in rounds.items()}
    ratios = sorted(a / b for a, b in zip(rates[ours.name], rates[bare.name], strict=True))
    spread = f"rounds {ratios[0]:.2f} to {ratios[-1]:.2f}"
    return [
        Figure(f"{name}: ours to bare", statistics.median(ratios), "", TARGET, note=spread),
        *(
            Figure(f"  {who}", statistics.median(rates[who]), "req/s", note=_told(found))
            for who, found in rounds.items()
        ),
    ]


def _told(found: list[tuple[load.Measured, float]]) -> str:
    """Say what a request took, in the median round."""
    p50, cpu = (
        number(statistics.median(values)) for values in ([m.p50_us for m, _ in found], [cpu for _, cpu in found])
    )
    return f"p50 {p50} us with 8 at once; {cpu} us of processor each"


def client_latency(server: Server, keys: int) -> Figure:
    """Return the latency that a user of the Python client sees, one request at a time."""
    random = np.random.default_rng(1)
    with featserve.connect(server.address) as client:

        def get(_: Any) -> object:
            return client.get(SERVICE, {KEY: random.integers(0, ENTITIES, keys)})

        p50_us, p99_us = load.latencies_us(get, 10_000)
    return Figure(
        f"Python client, {keys} {'key' if keys == 1 else 'keys'}: p50", p50_us, "us", note=f"p99 {number(p99_us)} us"
    )
