"""A server that is asked for more than it can serve: answers and latency against load, up to three times its peak.

The peak is what it answers to connections that wait for their answers, with as many calls under way on each as make
it the most in the median of all rounds; what came of a load is told of what those got in the same round. Then
requests are sent whether or not those before them were answered, at parts and multiples of that rate. What the server
cannot serve it is to refuse at once. The server has a core of its own, and h2load, which makes both loads, another:
three times the load takes three times as much of it, and that is not to be the server's loss.

"Sent" is how much of the rate left the client. On pygrpc-native a connection has only so many calls under way, and what
is more waits with the client, as any client of HTTP/2 has it: that wait is not the server's, and is told beside it, in
the latency since a call was due. It grows for as long as the load lasts. What the server does where clients hold
nothing back is told by one more, whose connections may have as many calls under way as h2load ever has.

h2load tells no answer from a refusal, only how many there were: a p99 is what that of so many requests is at most.
"""

from __future__ import annotations

import statistics
import tempfile
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
from bench.report import Figure, number, told_p99
from featserve.config import load_config
from featserve.load_test.histogram import QUANTILES, samples_needed
from featserve.types import Array

KEYS = (1, 100)
CALLS = (1, 4, 8, 16)
"""Those that a connection has under way where it waits for answers."""
LOADS = (0.5, 0.8, 1.0, 1.2, 2.0, 3.0)
"""Rates, as multiples of the peak."""
ROUNDS, SECONDS = 5, 2.0
CONNECTIONS = 32
PATIENCE = 100
"""How often a server may refuse the one request that follows a load, in a tenth of a second each."""
GOODPUT = 0.9
SLACK = 2.0
"""How many times as long as the calls under way take at the peak rate the p99 of an accepted one may be."""


@dataclass(frozen=True, slots=True)
class Case:
    """A server that is loaded. ``sendable``: calls that all connections may have under way, as far as it says.

    ``bounded``: calls that may wait for an answer; None where nothing is promised.
    """

    told: str
    folder: Path
    transport: str
    sendable: int
    bounded: int | None
    loads: tuple[float, ...] = LOADS


@dataclass(frozen=True, slots=True)
class Offered:
    """One round of one load: ``rate`` is what was to be sent a second."""

    rate: float
    loaded: Loaded
    answered: int

    @property
    def answers(self) -> float:
        """Answers a second."""
        return self.answered / self.loaded.seconds

    def sent(self, sendable: int) -> float:
        """The part of the rate that was sent."""
        return self.loaded.sent(sendable) / self.loaded.seconds / self.rate


Rounds = tuple[dict[int, list[float]], dict[float, list[Offered]]]
"""Answers a second by the calls on each connection, and what came of each load, in each round."""


def measure(folder: Path) -> list[Figure]:
    """Load a server on each transport with 1 and 100 keys a request; ratios are to the peak of the same round."""
    serving, loading = servers.shared_out()
    figures = []
    with tempfile.TemporaryDirectory(prefix="featserve-overload-") as temporary:
        for case in cases(folder, Path(temporary)):
            with ExitStack() as stack:
                with servers.on(serving):
                    server = stack.enter_context(servers.ours(case.folder, case.transport))
                stack.enter_context(servers.on(loading))
                for keys in KEYS:
                    body = next(load.bodies(keys, ENTITIES, 1))
                    told = f"{case.told}, {keys} {'key' if keys == 1 else 'keys'}"
                    figures += _figures(told, case, in_turns(server.address, body, case.loads))
    return figures


def cases(folder: Path, temporary: Path) -> list[Case]:
    """Return the servers that are loaded; the settings of one of them are written to ``temporary``.

    pygrpc-native takes on what its connections may have under way, though the server reads not all of it at once. On
    grpcio there is no such limit, and what is more than ``max_concurrent`` is refused by us or ended by gRPC.
    """
    config = load_config(folder)
    streams, most = CONNECTIONS * config.server.max_streams, CONNECTIONS * h2load.OPEN
    settings = f'[server]\nport = 0\nmax_streams = {h2load.OPEN}\n[registry]\nurl = "{config.registry.url}"\n'
    (temporary / "featserve.toml").write_text(f'{settings}[store]\npath = "{config.store.path}"\n', encoding="utf-8")
    return [
        Case("native", folder, "native", streams, streams),
        Case("grpcio", folder, "grpcio", most, config.server.max_concurrent),
        Case(f"native with {h2load.OPEN:,} streams", temporary, "native", most, None, (max(LOADS),)),
    ]


def in_turns(address: str, body: bytes, loads: tuple[float, ...]) -> Rounds:
    """Return what a server answers to connections that wait, and what came of each load."""
    closed: dict[int, list[float]] = {calls: [] for calls in CALLS}
    found: dict[float, list[Offered]] = {part: [] for part in loads}
    h2load.run(address, body, seconds=0.5, connections=CONNECTIONS)
    for _ in range(ROUNDS):
        for calls, rates in closed.items():
            answer_bytes = bytes_of_answer(address, body)
            loaded = h2load.run(address, body, seconds=SECONDS, connections=CONNECTIONS, calls=calls)
            rates.append(loaded.answered(answer_bytes) / SECONDS)
        peak = max(map(statistics.median, closed.values()))  # the best of one round would be too much, by its noise
        for part in loads:
            answer_bytes = bytes_of_answer(address, body)
            loaded = h2load.run(address, body, seconds=SECONDS, connections=CONNECTIONS, rate=part * peak)
            found[part].append(Offered(part * peak, loaded, loaded.answered(answer_bytes)))
    return closed, found


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


def _figures(told: str, case: Case, rounds: Rounds) -> list[Figure]:
    closed, found = rounds
    medians = {calls: statistics.median(rates) for calls, rates in closed.items()}
    peaks = closed[max(medians, key=medians.__getitem__)]
    peak = statistics.median(peaks)
    each = ", ".join(f"{number(median)} with {calls}" for calls, median in medians.items())
    figures = [Figure(f"{told}: peak", peak, "req/s", note=f"{CONNECTIONS} connections by the calls of each: {each}")]
    goodputs = {
        part: statistics.median(each.answers / peak for each, peak in zip(offered, peaks, strict=True))
        for part, offered in found.items()
    }
    for part, offered in found.items():
        target = GOODPUT if part == max(LOADS) and case.bounded is not None else None
        note = _told(case, offered)
        if target is not None and (most := max(goodputs.values())) > 1:
            note = f"{number(goodputs[part] / most)} of the most at any load; {note}"
        figures.append(Figure(f"  answered at {part:g} x", goodputs[part], "of peak", target, note=note))
    return [*figures, *_waits(case, found[max(LOADS)], peak)]


def _told(case: Case, offered: list[Offered]) -> str:
    """Say what came of one load beside answers."""
    taken_us = np.concatenate([each.loaded.taken_us for each in offered])
    answered, ended = sum(each.answered for each in offered), len(taken_us)
    notes = [f"{100 * _sent(case, offered):.0f} % sent"]
    if ended:
        notes += [f"p50 of all {number(float(np.median(taken_us)))} us"]
    notes += [f"answers {_tail(taken_us, answered)}"]
    if (refused := ended - answered) > 0:
        notes += [f"{100 * refused / ended:.0f} % refused, {_tail(taken_us, refused)}"]
    return "; ".join(notes)


def _waits(case: Case, offered: list[Offered], peak: float) -> list[Figure]:
    """Return how long what was answered took at the highest load, since it was sent and since it was due."""
    answered = sum(each.answered for each in offered)
    since_sent = np.concatenate([each.loaded.taken_us for each in offered])
    since_due = np.concatenate([each.loaded.since_due_us(each.rate) for each in offered])
    sent_ms, due_ms = (
        told_p99(h2load.at_most(taken_us, answered), answered) / 1e3 for taken_us in (since_sent, since_due)
    )
    most_ms, note = None, ""
    if case.bounded is not None:
        takes_ms = case.bounded / peak * 1e3
        most_ms = SLACK * takes_ms
        note = f"since it was sent; at most {case.bounded} wait, which take {number(takes_ms)} ms at the peak"
    held_back = 1 - _sent(case, offered)
    return [
        Figure(f"  p99 of what was answered at {max(LOADS):g} x", sent_ms, "ms", most_ms, True, note),
        Figure(
            "  the same, since it was due",
            due_ms,
            "ms",
            note=f"{100 * max(held_back, 0):.0f} % were still with the client when the {SECONDS:g} s were over",
        ),
    ]


def _sent(case: Case, offered: list[Offered]) -> float:
    return statistics.median(each.sent(case.sendable) for each in offered)


def _tail(taken_us: Array, of: int) -> str:
    """Say what the p99 of ``of`` of the requests is at most, or the p90 where they are too few to tell that."""
    for name in ("p99", "p90"):
        if of >= samples_needed(QUANTILES[name]):
            return f"{name} <= {number(h2load.at_most(taken_us, of, QUANTILES[name]))} us"
    return f"{of:,}, too few to tell a p90"
