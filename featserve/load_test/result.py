"""What a load test measured: rounds of each load, as values that can be kept as JSON and read again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from featserve.errors import CallerError
from featserve.load_test.histogram import QUANTILES, Histogram
from featserve.load_test.source import Load

FORMAT = 1
KEPT_UP = 0.98


@dataclass(slots=True)
class Round:
    """What was measured in ``seconds``.

    ``arrived``: the requests that should have started in this round. ``latency``: of those that were answered, from
    that intended start. ``lag``: how late they were sent, the load generator's own share of it. ``errors``: those that
    were not answered, by gRPC code. ``answered``: the answers that came in this round.
    """

    seconds: float
    latency: Histogram = field(default_factory=Histogram)
    lag: Histogram = field(default_factory=Histogram)
    arrived: int = 0
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def kept_up(self) -> bool:
        """True where nearly all requests that should have started in this time were answered in it."""
        return self.answered >= KEPT_UP * self.arrived

    def fail(self, code: str) -> None:
        """Count a request that was not even sent."""
        self.arrived += 1
        self.errors[code] += 1


def merge(rounds: Iterable[Round], seconds: float) -> Round:
    """Return the counts of rounds as those of one that took ``seconds``."""
    merged = Round(seconds)
    taken = list(rounds)
    merged.latency = merged.latency.merge(r.latency for r in taken)
    merged.lag = merged.lag.merge(r.lag for r in taken)
    for r in taken:
        merged.arrived += r.arrived
        merged.answered += r.answered
        merged.errors += r.errors
    return merged


@dataclass(frozen=True, slots=True)
class Point:
    """The rounds of one load; ``writes``: those of the writes beside it, if there were any."""

    load: Load
    rounds: Sequence[Round]
    writes: Sequence[Round] = ()

    def total(self) -> Round:
        """Return all of its rounds as one."""
        return merge(self.rounds, sum(r.seconds for r in self.rounds))

    def total_writes(self) -> Round:
        return merge(self.writes, sum(r.seconds for r in self.writes))


@dataclass(frozen=True, slots=True)
class Result:
    """What one load test measured.

    ``service``: the version that was asked, with its hash. ``found``: the part of a sample of (row, view) pairs that
    had a visible row. ``settings``: what else decides what was measured, for whoever reads it.
    """

    started_us: int
    service: str
    found: float
    settings: dict[str, Any]
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values: a summary of each load, and its rounds."""
        return {
            "format": FORMAT,
            "started_us": self.started_us,
            "service": self.service,
            "found": self.found,
            "settings": self.settings,
            "points": [
                {
                    "load": asdict(point.load),
                    "summary": summary(point.total()),
                    "rounds": [_round_json(r) for r in point.rounds],
                    "writes_summary": summary(point.total_writes()) if point.writes else None,
                    "writes": [_round_json(r) for r in point.writes],
                }
                for point in self.points
            ],
        }

    def save(self, path: Path) -> None:
        """Write the result to a file; raises CallerError where that cannot be done."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps(self.to_json(), allow_nan=False) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise CallerError(f"{path}: the result cannot be written: {error}") from None
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a result that ``save`` wrote; raises CallerError for a file that is none."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format"] != FORMAT:
                raise CallerError(f"{path}: a result of format {value['format']}; this version reads {FORMAT}")
            points = tuple(
                Point(
                    Load(**point["load"]),
                    [_round_of(r) for r in point["rounds"]],
                    [_round_of(r) for r in point["writes"]],
                )
                for point in value["points"]
            )
            return cls(value["started_us"], value["service"], value["found"], value["settings"], points)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CallerError(f"{path}: not a result of a load test: {error.__class__.__name__}: {error}") from None


def summary(total: Round) -> dict[str, Any]:
    """Return rates a second, and latencies in microseconds; null for a quantile of too few samples."""
    told = {name: total.latency.told_ns(q) for name, q in QUANTILES.items()}
    lag = total.lag.told_ns(0.99)
    return {
        "samples": total.latency.count,
        "offered_per_s": total.arrived / total.seconds,
        "answered_per_s": total.answered / total.seconds,
        "latency_us": {name: None if ns is None else ns / 1e3 for name, ns in told.items()},
        "lag_us": {"p99": None if lag is None else lag / 1e3},
        "errors": dict(total.errors),
    }


def _round_json(measured: Round) -> dict[str, Any]:
    return {
        "seconds": measured.seconds,
        "arrived": measured.arrived,
        "answered": measured.answered,
        "errors": dict(measured.errors),
        "latency": measured.latency.to_json(),
        "lag": measured.lag.to_json(),
    }


def _round_of(value: Any) -> Round:
    return Round(
        float(value["seconds"]),
        Histogram.from_json(value["latency"]),
        Histogram.from_json(value["lag"]),
        int(value["arrived"]),
        int(value["answered"]),
        Counter({str(code): int(count) for code, count in value["errors"].items()}),
    )
