"""The ratios that were promised, each of values measured in one run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.peers.rounds import Cells
from bench.report import Figure, number

HERE, NATIVE, GRPCIO = "featserve, in process", "featserve, native", "featserve, grpcio"
BLOBS, BLOBS_HIREDIS = "Redis, packed blobs (MGET)", "Redis, packed blobs (MGET), hiredis"
FEAST = "Feast, gRPC"


def figures(cells: Cells) -> list[Figure]:
    """Return each ratio whose two sides were measured."""
    return [
        *(
            each
            for blobs in (BLOBS, BLOBS_HIREDIS)
            for ours, keys, most in ((HERE, 1, 1 / 8), (HERE, 100, 1.0), (NATIVE, 100, 4.0), (GRPCIO, 100, 4.0))
            for each in _latency(cells, ours, blobs, keys, most)
        ),
        *_throughput(cells, NATIVE, FEAST, 1, 80.0),
        *_throughput(cells, NATIVE, FEAST, 100, 150.0),
        *_tail(cells, NATIVE, FEAST, 1, 1 / 50),
        *_tail(cells, NATIVE, FEAST, 100, 1 / 50),
    ]


def _told(keys: int) -> str:
    return f"{keys} {'key' if keys == 1 else 'keys'}"


def _latency(cells: Cells, ours: str, theirs: str, keys: int, most: float) -> Iterator[Figure]:
    a, b = cells.get((ours, keys, 1)), cells.get((theirs, keys, 1))
    if a is not None and b is not None:
        ratio = statistics.median(x / y for x, y in zip(a.p50s_us, b.p50s_us, strict=False))
        note = f"{number(a.p50_us)} us to {number(b.p50_us)} us"
        yield Figure(f"p50 of {ours} to {theirs}, {_told(keys)}", ratio, "", most, at_most=True, note=note)


def _throughput(cells: Cells, ours: str, theirs: str, keys: int, least: float) -> Iterator[Figure]:
    a, b = cells.get((ours, keys, 8)), cells.get((theirs, keys, 8))
    if a is not None and b is not None:
        ratio = statistics.median(x / y for x, y in zip(a.rates, b.rates, strict=False))
        note = f"{number(a.rate)}/s to {number(b.rate)}/s"
        yield Figure(f"answers/s of {ours} to {theirs}, {_told(keys)}", ratio, "", least, note=note)


def _tail(cells: Cells, ours: str, theirs: str, keys: int, most: float) -> Iterator[Figure]:
    """Yield our p99 to theirs, or where they answered too few to tell it to their p90 or p50: a p99 is no less."""
    a, b = cells.get((ours, keys, 8)), cells.get((theirs, keys, 8))
    if a is None or b is None or (p99_us := a.told_us("p99")) is None:
        return
    for quantile in ("p99", "p90", "p50"):
        if (tail_us := b.told_us(quantile)) is not None:
            note = f"{number(p99_us)} us to {number(tail_us)} us, 8 at once"
            name = f"p99 of {ours} to the {quantile} of {theirs}, {_told(keys)}"
            yield Figure(name, p99_us / tail_us, "", most, at_most=True, note=note)
            return
