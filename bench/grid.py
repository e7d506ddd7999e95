"""Rows x features of a request, from a warm cache and from a cold one: answers a second, and their latency.

Warm: keys follow Zipf's law, and every row is in RocksDB's caches. Cold: keys are drawn evenly, and RocksDB may cache
1 MiB of blocks and no rows, so that nearly every row is read from a file, which the system may hold in memory. Eight
connections each wait for their answer; the load is that of ``featserve load-test``.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

import featserve
from bench import servers
from bench.report import Figure, number
from featserve.config import load_config
from featserve.embedded import clock_us
from featserve.load_test import Load, LoadTest, Point, Range, Reads, run
from featserve.project import load_definitions
from featserve.registry import Registry
from featserve.types import Int64

ENTITIES = 20_000
WIDTHS = (5, 50, 500)
ROWS = (1, 10, 100)
CONNECTIONS = 8
ROUNDS = 3
SECONDS = 1.0
WRITTEN_AT_ONCE = 1_000
CACHES = {"warm": (0.99, ""), "cold": (0.0, "[store]\nblock_cache_mb = 1\nrow_cache_mb = 0\n")}
"""For each the exponent of Zipf's law, and the settings of the store."""

DEFINITIONS = f"""
from featserve import Entity, FeatureService, FeatureView, Field, Float64, Int64

account = Entity("account", {{"account_id": Int64}})
views = [FeatureView(f"wide{{n}}", account, [Field(f"f{{i}}", Float64) for i in range(n)]) for n in {WIDTHS}]
view0, view1, view2 = views
service0, service1, service2 = (FeatureService(view.name, [view]) for view in views)
"""


def measure(folder: Path) -> list[Figure]:
    """Load a server with each number of rows and features, first with a warm cache and then with a cold one."""
    folder = folder / "grid"
    if not (folder / ".featserve" / "store").is_dir():
        make(folder)
    figures = []
    for cache, (exponent, settings) in CACHES.items():
        (folder / "featserve.toml").write_text(f"[server]\nport = 0\n{settings}", encoding="utf-8")
        with servers.ours(folder) as server:
            for width in WIDTHS:
                reads = Reads(f"wide{width}", ("account_id",), (Range("account_id", Int64, 0, ENTITIES - 1),), exponent)
                loads = tuple(Load(rows, None, CONNECTIONS) for rows in ROWS)
                test = LoadTest(server.address, reads, loads, rounds=ROUNDS, round_s=SECONDS, warm_up_s=0.5)
                figures += [_figure(cache, width, point) for point in run(test, clock_us()).points]
    return figures


def make(folder: Path) -> None:
    """Make a project of a view and a service for each width, with rows for all entities."""
    folder.mkdir(parents=True)
    (folder / "features.py").write_text(DEFINITIONS, encoding="utf-8")
    (folder / "featserve.toml").write_text("", encoding="utf-8")
    config = load_config(folder)
    with Registry.open(config.registry.url) as registry:
        registry.apply(load_definitions(config), "bench", clock_us())
    random, now = np.random.default_rng(8), np.datetime64(time.time_ns() // 1_000, "us")
    with featserve.open(folder, write=True) as project:
        for width in WIDTHS:
            for first in range(0, ENTITIES, WRITTEN_AT_ONCE):
                rows = {f"f{i}": random.standard_normal(WRITTEN_AT_ONCE) for i in range(width)}
                keys = np.arange(first, first + WRITTEN_AT_ONCE)
                project.write(f"wide{width}", rows | {"account_id": keys}, event_time=now)


def _figure(cache: str, width: int, point: Point) -> Figure:
    total = point.total()
    p99_ns = total.latency.told_ns(0.99)
    tail = "p90", total.latency.quantile_ns(0.9)
    if p99_ns is not None:
        tail = "p99", p99_ns
    note = f"p50 {number(total.latency.quantile_ns(0.5) / 1e3)} us, {tail[0]} {number(tail[1] / 1e3)} us"
    if total.errors:
        note += f"; errors: {dict(total.errors)}"
    name = f"{cache}, {point.load.batch} {'row' if point.load.batch == 1 else 'rows'} x {width} features"
    return Figure(name, total.answered / total.seconds, "req/s", note=note)
