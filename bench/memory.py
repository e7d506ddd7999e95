"""The memory of a server over 200,000 requests: of entities that are in its caches, so that only a leak would grow."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench import load, servers
from bench.report import Figure

HOT = 10_000
PART = 10_000
PARTS = 20
MOST_MB = 8.0


def measure(folder: Path) -> list[Figure]:
    """Load a warm server with 1 to 100 keys a request, and compare its memory in the first and the last quarter."""
    held_mb = []
    with servers.ours(folder) as server:
        for part in range(-4, PARTS):
            keys = (1, 10, 100, 1)[part % 4]
            load.run(server.address, keys, entities=HOT, requests=PART, seed=part + 4)
            if part >= 0:
                held_mb.append(server.memory_mb())
    quarter = PARTS // 4
    first, last = statistics.median(held_mb[:quarter]), statistics.median(held_mb[-quarter:])
    name = f"growth over {PART * PARTS:,} requests"
    return [Figure(name, last - first, "MiB", MOST_MB, at_most=True, note=f"{first:.1f} to {last:.1f} MiB resident")]
