"""A server that is asked for more than it can serve: answers and latency against load, up to three times its peak.

The peak is what it answers to connections that each wait for their answer; then requests are sent whether or not those
before them were answered, at parts and multiples of that rate. What the server cannot serve it is to refuse at once.
The server has a core of its own, and h2load, which makes both loads, another: three times the load takes three times
as much of it, and that is not to be the server's loss. "Sent" is what it managed of the rate. It tells no answer from a
refusal, only how many there were: a p99 is what that of so many requests is at most.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench import h2load, load, servers
from bench.h2load import Loaded
from bench.project import ENTITIES
from bench.report import Figure, number
from featserve.config import load_config

TRANSPORTS = ("native", "grpcio")
KEYS = (1, 100)
LOADS = (0.5, 0.8, 1.0, 1.2, 2.0, 3.0)
"""Rates, as multiples of the peak."""
ROUNDS = 5
CONNECTIONS = 32
PATIENCE = 100
"""How often a server may refuse the one request that follows a load, in a tenth of a second each."""
GOODPUT = 0.9
SLACK = 2.0
"""How many times as long as the calls under way take at the peak rate the p99 of an accepted one may be."""


@dataclass(frozen=True, slots=True)
class Offered:
    """One round of one load: ``peak`` is that of the round, ``rate`` what was to be sent a second."""

    peak: float
    rate: float
    loaded: Loaded
    answered: int

    @property
    def goodput(self) -> float:
        """Answers a second, of those at the peak."""
        return self.answered / self.loaded.seconds / self.peak

    @property
    def sent(self) -> float:
        """The part of the rate that was sent."""
        return self.loaded.started / self.loaded.seconds / self.rate


def measure(folder: Path) -> list[Figure]:
    """Load a server on each transport with 1 and 100 keys a request; ratios are to the peak of the same round."""
    limit = load_config(folder).server.max_concurrent
    serving, loading = servers.shared_out()
    figures = []
    for transport in TRANSPORTS:
        with ExitStack() as stack:
            with servers.on(serving):
                server = stack.enter_context(servers.ours(folder, transport))
            stack.enter_context(servers.on(loading))
            for keys in KEYS:
                body = next(load.bodies(keys, ENTITIES, 1))
                told = f"{transport}, {keys} {'key' if keys == 1 else 'keys'}"
                figures += _figures(told, in_turns(server.address, body), limit)
    return figures


def in_turns(address: str, body: bytes) -> dict[float, list[Offered]]:
    """Return what came of each load, in each round."""
    found: dict[float, list[Offered]] = {part: [] for part in LOADS}
    for _ in range(ROUNDS):
        bytes_of_answer(address, body)
        peak = h2load.run(address, body, warm_up_s=0.5, connections=CONNECTIONS).rate
        for part in LOADS:
            answer_bytes = bytes_of_answer(address, body)
            loaded = h2load.run(address, body, connections=CONNECTIONS, rate=part * peak)
            found[part].append(Offered(peak, part * peak, loaded, loaded.answered(answer_bytes)))
    return found


def bytes_of_answer(address: str, body: bytes) -> int:
    """Return how long the answer to a framed request is, with its frame; wait until what was sent before is over."""
    with grpc.insecure_channel(address) as channel:
        method: Any = channel.unary_unary(h2load.METHOD)
        for _ in range(PATIENCE):
            try:
                return len(load.framed(method(body[len(load.framed(b"")) :], timeout=10)))
            except grpc.RpcError as error:
                refused = error
                time.sleep(0.1)
    raise RuntimeError(f"{address} answers nobody any more") from refused


def _figures(told: str, found: dict[float, list[Offered]], limit: int) -> list[Figure]:
    peak = statistics.median(each.peak for each in found[max(LOADS)])
    figures = [Figure(f"{told}: peak", peak, "req/s", note=f"{CONNECTIONS} connections, each waits for its answer")]
    for part, rounds in found.items():
        taken_us = np.concatenate([each.loaded.taken_us for each in rounds])
        answered, ended = sum(each.answered for each in rounds), len(taken_us)
        notes = [f"{100 * statistics.median(each.sent for each in rounds):.0f} % sent"]
        if ended:
            notes += [f"p50 of all {number(float(np.median(taken_us)))} us"]
        p99_us = h2load.p99_at_most(taken_us, answered)
        notes += [f"p99 of answers <= {number(p99_us)} us"]
        if (refused := ended - answered) > 0:
            refused_us = h2load.p99_at_most(taken_us, refused)
            notes += [f"{100 * refused / ended:.0f} % refused, p99 <= {number(refused_us)} us"]
        goodput = statistics.median(each.goodput for each in rounds)
        target = GOODPUT if part == max(LOADS) else None
        figures.append(Figure(f"  answered at {part:g} x", goodput, "of peak", target, note="; ".join(notes)))
    most_ms = SLACK * limit / peak * 1e3
    note = f"at most {limit} are under way, which take {number(limit / peak * 1e3)} ms at the peak"
    figures.append(Figure(f"  p99 of what was answered at {max(LOADS):g} x", p99_us / 1e3, "ms", most_ms, True, note))
    return figures
