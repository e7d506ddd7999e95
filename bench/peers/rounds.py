"""The rounds: each system is asked in turn, again and again, so that what else happens on the machine meets all alike.

Comes in: systems. Goes out: ``Cell``, what was measured of one system with one number of keys and of connections.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.peers.environments import NotThere
from bench.peers.systems import AT_ONCE, System
from featserve.load_test.histogram import QUANTILES, Histogram

KEYS = (1, 10, 100)
CONNECTIONS = (1, AT_ONCE)
"""One, whose calls tell the latency that a Python client sees; eight, which tell the throughput."""


@dataclass(frozen=True, slots=True)
class Length:
    """How many rounds there are, and how long one turn of one system is: until there are ``calls`` and ``seconds`` are
    over, but not beyond ``patience_s``. h2load takes ``seconds``, or where the system is slow ``patience_s``.
    """

    rounds: int
    calls: int
    seconds: float
    patience_s: float


@dataclass(slots=True)
class Cell:
    """What was measured in all rounds. ``p50s_us`` and ``rates``: of each round; rates are answers a second."""

    latency: Histogram = field(default_factory=Histogram)
    p50s_us: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def add(self, taken_ns: Sequence[int], seconds: float) -> None:
        """Add a round."""
        for each in taken_ns:
            self.latency.record(each)
        self.p50s_us.append(statistics.median(taken_ns) / 1e3)
        self.rates.append(len(taken_ns) / seconds)

    @property
    def p50_us(self) -> float:
        """The median round's median."""
        return statistics.median(self.p50s_us)

    @property
    def rate(self) -> float:
        """The median round's answers a second."""
        return statistics.median(self.rates)

    @property
    def tail(self) -> tuple[str, float] | None:
        """The p99 or, where there are too few calls to tell it, the p90, by name; None where that cannot be told."""
        for name in ("p99", "p90"):
            if (told := self.told_us(name)) is not None:
                return name, told
        return None

    def told_us(self, quantile: str) -> float | None:
        """Return a quantile of all calls, None where fewer than a hundred are beyond it."""
        told = self.latency.told_ns(QUANTILES[quantile])
        return None if told is None else told / 1e3

    def to_json(self) -> dict[str, Any]:
        told = {name: self.told_us(name) for name in QUANTILES}
        rounds = {"p50s_us": self.p50s_us, "rates": self.rates}
        return {"calls": self.latency.count, "p50_us": self.p50_us, "rate": self.rate, "all_us": told, **rounds}


Key = tuple[str, int, int]
"""A system's name, keys and connections."""
Cells = dict[Key, Cell]


def measure(systems: list[System], length: Length, progress: Callable[[str], None]) -> tuple[Cells, dict[str, str]]:
    """Return what was measured, and why any system that ended meanwhile did."""
    cells: Cells = {}
    ended: dict[str, str] = {}
    turns = [(keys, connections) for keys in KEYS for connections in CONNECTIONS]
    warm_up = Length(1, length.calls // 10, 0.1, min(1.0, length.patience_s))
    started = time.monotonic()
    for number in range(-1, length.rounds):
        for keys, connections in turns:
            for system in systems[number % len(systems) :] + systems[: number % len(systems)]:
                if system.name in ended or (connections > 1 and system.name.endswith("in process")):
                    continue
                progress(f"{_told(number, length.rounds, started)}: {system.name}, {keys} keys, {connections} at once")
                try:
                    taken = _turn(system, keys, connections, warm_up if number < 0 else length, seed=number + 1)
                except (NotThere, RuntimeError, OSError) as error:
                    ended[system.name] = str(error)
                    continue
                if number >= 0:
                    cells.setdefault((system.name, keys, connections), Cell()).add(*taken)
    return cells, ended


def _told(number: int, rounds: int, started: float) -> str:
    if number <= 0:
        return "warming up" if number < 0 else f"round 1 of {rounds}"
    left_s = (time.monotonic() - started) / number * (rounds - number)
    return f"round {number + 1} of {rounds}, about {left_s / 60:.0f} minutes left"


def _turn(system: System, keys: int, connections: int, length: Length, seed: int) -> tuple[list[int], float]:
    """Ask one system; return the nanoseconds of each call, and the seconds of all."""
    if connections > 1 and system.load is not None:
        loaded = system.load(keys, seed, length.patience_s if system.slow else length.seconds)
        return (loaded.taken_us * 1_000).tolist(), loaded.seconds
    order = {"measure": keys, "connections": connections, "entities": system.entities, "seed": seed}
    wanted = {"calls": length.calls, "seconds": length.seconds, "patience_s": length.patience_s}
    found = system.client.tell(order | wanted)
    return found["taken_ns"], found["seconds"]
