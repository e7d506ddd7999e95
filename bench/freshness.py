"""How soon a write is readable in another process of the machine, after it was acknowledged to who wrote it.

The store is idle but for the probes, or written at 10,000 rows a second meanwhile. A probe is a row written through the
server; it is looked for without a pause by a project that follows the store in this process, and by a client on each of
several connections to two workers, which have to have both met: the kernel gives each connection to either. What a look
takes counts, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import featserve
from bench import project
from bench.project import FEATURES, KEY, SERVICE, VIEW
from bench.report import Figure, told_p99
from bench.servers import Server

ENTITIES = 100_000
PROBES = 10_000
RATE = 10_000
BATCH = 200
PROBED = ENTITIES + 1
"""An entity that nobody else writes."""
CONNECTIONS, WORKERS = 16, 2
BOUND_MS = 100.0
"""What the documentation states, for 99 of 100 writes."""


def measure(folder: Path) -> list[Figure]:
    """Return quantiles of the time from acknowledgement to being read, in ms."""
    folder = folder / "freshness"
    if not (folder / "featserve.toml").is_file():
        project.make(folder, ENTITIES)
    if not (folder / ".featserve" / "store").is_dir():
        project.materialize(folder)
    figures = []
    served = ("serve", "--project", str(folder), "--port", "0", "--workers", str(WORKERS))
    with Server(f"featserve, {WORKERS} workers", "featserve", *served) as server, ExitStack() as stack:
        client = stack.enter_context(featserve.connect(server.address, connections=CONNECTIONS))
        meet_all(server, client)
        writer = stack.enter_context(featserve.connect(server.address))
        here = stack.enter_context(featserve.open(folder, follow=True))
        for kind, rate in (("idle", 0), (f"{RATE:,} rows/s written", RATE)):
            stop = threading.Event()
            load = threading.Thread(target=write_all_along, args=(server.address, rate, stop))
            load.start()
            figures += told(f"follow=True, {kind}", probe(writer, here.get, 1))
            figures += told(f"all workers, {kind}", probe(writer, client.get, CONNECTIONS))
            stop.set()
            load.join()
    return figures


def meet_all(server: Server, client: featserve.Client) -> None:
    """Open the connections of a client; raise RuntimeError where a worker has none of them."""
    for _ in range(CONNECTIONS):
        client.get(SERVICE, {KEY: [PROBED]})
    port = int(server.address.rpartition(":")[2])
    opened = [
        sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in process.net_connections("tcp"))
        for process in server.processes()
    ]
    if np.count_nonzero(opened) < WORKERS or sum(opened) != CONNECTIONS:
        raise RuntimeError(f"{CONNECTIONS} connections to {WORKERS} workers are spread as {opened}: measure again")


def probe(writer: featserve.Client, get: Callable[..., Any], times: int) -> list[float]:
    """Write probes one after the other; return for each the ms until ``get`` has shown it so many times on end."""
    took_ms = []
    for _ in range(PROBES):
        at_us = time.time_ns() // 1_000
        value = float(at_us % 10**9)
        rows = {KEY: [PROBED]} | {f"f{i}": [value] for i in range(FEATURES)}
        writer.write(VIEW, rows, event_time=np.array([at_us], "datetime64[us]"))
        acknowledged = time.perf_counter()
        shown = 0
        while shown < times:
            shown = shown + 1 if get(SERVICE, {KEY: [PROBED]}).values[0, 0] == np.float32(value) else 0
        took_ms.append((time.perf_counter() - acknowledged) * 1e3)
    return took_ms


def write_all_along(address: str, rate: int, stop: threading.Event) -> None:
    """Write so many rows a second, in batches at even times."""
    random = np.random.default_rng(1)
    due = time.perf_counter()
    with featserve.connect(address) as client:
        while rate and not stop.wait(max(due - time.perf_counter(), 0)):
            due += BATCH / rate
            rows: dict[str, Any] = {KEY: random.integers(0, ENTITIES, BATCH)}
            rows |= {f"f{i}": random.standard_normal(BATCH) for i in range(FEATURES)}
            client.write(VIEW, rows, event_time=np.full(BATCH, time.time_ns() // 1_000, "datetime64[us]"))


def told(name: str, took_ms: list[float]) -> list[Figure]:
    """Return the figures of one row of probes; without a p99 where they are too few."""
    p50, p99, most = np.percentile(took_ms, (50, 99, 100)).tolist()
    return [
        Figure(f"{name}: p50", p50, "ms"),
        Figure("  p99", told_p99(p99, len(took_ms)), "ms", BOUND_MS, at_most=True),
        Figure("  longest", most, "ms", note=f"of {len(took_ms):,}"),
    ]
