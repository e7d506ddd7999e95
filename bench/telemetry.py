"""What traces and metrics cost: processor time per request of servers that trace, count or do both, beside one that
does not.

The promise is of throughput: what the processor time of a request allows one core to answer. That is the figure, the
time of the server that tells nothing through that of the other. Requests per second are printed beside it, but judge
nothing: on a busy machine they differ by a tenth between two servers that are the same, which is many times the cost
that is looked for. A second server that tells nothing says how far the figure itself can be trusted.

All run at once, on one transport and then on the other, and are loaded by h2load in turns of some seconds, so that
spans are sent in batches as under a load that lasts; each has a store of its own with the same rows. A server's time
counts from one turn to its next, as spans may be sent after a turn, less what it takes while nobody asks, which is
measured first. Two processes of one program differ by more than two turns of one, by how they happen to lie in memory,
so all are started anew several times. Traces go to a collector that takes them and does nothing; metrics are read every
five seconds, as by an eager Prometheus. What is judged is the mean of all starts; the standard error of what is told of
one server more than of the other is beside it. Then the same in process, where the time that one request takes more can
be told apart.
"""

from __future__ import annotations

import math
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import grpc

import featserve
from bench import h2load, load, project, servers
from bench.report import Figure, number
from bench.servers import Server
from featserve.config import TelemetryConfig
from featserve.embedded import clock_us
from featserve.server.meter import Meter
from featserve.server.service import Call, Limits, Service
from featserve.server.telemetry import Telemetry
from featserve.server.tracing import Tracing

ENTITIES = 100_000
TRANSPORTS = ("native", "grpcio")
KEYS = (1, 100)
TARGET = 0.97
STARTS, ROUNDS, SECONDS = 4, 2, 1.5
RESTING_S = 5
REPEATS = 400
AT_ONCE = 50
TRACED = 2_000  # which the queue of spans holds
EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"
METRICS_PORT = 19_464
OFF, AGAIN = "off", "off again"


Found = dict[str, list[float]]
"""What each server took, or did, in each start."""


def measure(folder: Path) -> list[Figure]:
    """Load the servers with 1 and 100 keys a request; the figures are ratios to the server that tells nothing."""
    figures = []
    for transport in TRANSPORTS:
        found: dict[int, tuple[Found, Found]] = {keys: ({}, {}) for keys in KEYS}
        with collector() as endpoint, scraped(METRICS_PORT, METRICS_PORT + 1):
            for _ in range(STARTS):
                with ExitStack() as stack:
                    running = started(stack, folder, transport, endpoint)
                    idle = resting(running)
                    for keys, of_keys in found.items():
                        load_all(running, idle, next(load.bodies(keys, ENTITIES, 1)), *of_keys)
        for keys, of_keys in found.items():
            figures += compare(f"{transport}, {keys} {'key' if keys == 1 else 'keys'}", *of_keys)
    for keys in KEYS:
        figures += in_process(folder / "telemetry-0", keys)
    return figures


def started(stack: ExitStack, folder: Path, transport: str, endpoint: str) -> dict[str, Server]:
    """Start the servers that are compared, until ``stack`` ends them."""
    traces = f'otlp_endpoint = "{endpoint}"\nsample_ratio = 0.01\n'
    settings = {
        OFF: "",
        AGAIN: "",
        "metrics": f"prometheus_port = {METRICS_PORT}\n",
        "traces of 1 %": traces,
        "both": f"prometheus_port = {METRICS_PORT + 1}\n{traces}",
    }
    return {
        name: stack.enter_context(servers.ours(prepared(folder / f"telemetry-{i}", told), transport))
        for i, (name, told) in enumerate(settings.items())
    }


def prepared(folder: Path, telemetry: str) -> Path:
    """Return the folder of a project with its own store and these lines in its [telemetry]."""
    if not (folder / ".featserve" / "store").is_dir():
        project.make(folder, ENTITIES)
        project.materialize(folder)
    (folder / "featserve.toml").write_text(f"[server]\nport = 0\n[telemetry]\n{telemetry}", encoding="utf-8")
    return folder


def load_all(running: dict[str, Server], idle: dict[str, float], body: bytes, cpu_us: Found, rates: Found) -> None:
    """Load all in turns; add what a request took of the processor in this start, and the requests per second."""
    first: dict[str, float] = {}
    loaded_s, requests = dict.fromkeys(running, 0.0), dict.fromkeys(running, 0)
    for turn in range(ROUNDS + 2):  # the first warms up, and the last only ends the one before it
        for name, server in running.items():
            cpu_s = server.cpu_s() - idle[name] * (time.perf_counter() - loaded_s[name])
            if turn == ROUNDS + 1:
                cpu_us.setdefault(name, []).append((cpu_s - first[name]) / requests[name] * 1e6)
            if turn == 1:
                first[name] = cpu_s
            loaded = h2load.run(server.address, body, seconds=SECONDS)
            loaded_s[name] += loaded.seconds
            if turn:
                requests[name] += loaded.ended
            if 0 < turn <= ROUNDS:
                rates.setdefault(name, []).append(loaded.rate)


def compare(told: str, cpu_us: Found, rates: Found) -> list[Figure]:
    """Return what the processor time of each server allows beside that of the first, and what it did."""
    off_us = statistics.mean(cpu_us[OFF])
    off_rate = statistics.median(rates[OFF])
    figures = [Figure(f"{told}: {OFF}", off_rate, "req/s", note=f"{number(off_us)} us of processor each")]
    for name in cpu_us:
        if name == OFF:
            continue
        more_us = [a - b for a, b in zip(cpu_us[name], cpu_us[OFF], strict=True)]
        mean_us, error_us = statistics.mean(more_us), statistics.stdev(more_us) / math.sqrt(STARTS)
        rate = statistics.median(a / b for a, b in zip(rates[name], rates[OFF], strict=True))
        note = f"{mean_us:+.2f} us of processor, standard error {error_us:.2f}; {rate:.2f} of its req/s"
        target = None if name == AGAIN else TARGET
        figures.append(Figure(f"{told}: {name}", off_us / (off_us + mean_us), "of off", target, note=note))
    return figures


def resting(running: dict[str, Server]) -> dict[str, float]:
    """Return the part of a core that each takes while nobody asks."""
    before_s = {name: server.cpu_s() for name, server in running.items()}
    time.sleep(RESTING_S)
    return {name: (server.cpu_s() - before_s[name]) / RESTING_S for name, server in running.items()}


def in_process(folder: Path, keys: int) -> list[Figure]:
    """Answer requests in this process in turns with and without; return what one takes more, at its best."""
    told = f"in process, {keys} {'key' if keys == 1 else 'keys'}"
    body = next(load.bodies(keys, ENTITIES, 1))[5:]
    with featserve.open(folder) as opened, collector() as endpoint:
        service = Service(opened.engine, Limits(10_000, 0), clock_us)
        never = Tracing(TelemetryConfig(endpoint, sample_ratio=0))
        watched = {OFF: Telemetry(), "metrics": Telemetry(None, Meter()), "not traced": Telemetry(never)}
        least_us = dict.fromkeys(watched, float("inf"))
        for _ in range(REPEATS):
            for name, telemetry in watched.items():
                least_us[name] = min(least_us[name], answer(service, telemetry, body, AT_ONCE, time.thread_time))
        never.close(10)
        traced_us = min(traced(service, body, endpoint) for _ in range(20))
    off_us = least_us.pop(OFF)
    return [
        Figure(f"{told}: {OFF}", off_us, "us"),
        *(Figure(f"  {name}", us - off_us, "us more") for name, us in least_us.items()),
        Figure("  traced", traced_us - off_us, "us more", note="of processor, spans sent and taken"),
    ]


def traced(service: Service, body: bytes, endpoint: str) -> float:
    """Return microseconds of processor for a request that is traced, with what sends its spans and what takes them."""
    tracing = Tracing(TelemetryConfig(endpoint, sample_ratio=1))
    started = time.process_time()
    answer(service, Telemetry(tracing), body, TRACED, time.process_time)
    tracing.close(10)
    return (time.process_time() - started) / TRACED * 1e6


def answer(service: Service, telemetry: Telemetry, body: bytes, requests: int, clock: Callable[[], float]) -> float:
    """Answer a request over and over; return microseconds of ``clock`` for one."""
    metadata = (("user-agent", "featserve-bench"), ("x-request-id", "1"))
    started = clock()
    for _ in range(requests):
        call = Call(metadata, 1.0)
        with telemetry.watch("GetFeatures", call):
            service.get_features(body, call)
    return (clock() - started) / requests * 1e6


@contextmanager
def collector() -> Iterator[str]:
    """Take spans, and do nothing with them; give the endpoint."""
    server = grpc.server(ThreadPoolExecutor(1))
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(EXPORT, {"Export": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def scraped(*ports: int) -> Iterator[None]:
    """Read the metrics on ``ports`` every five seconds."""
    ended = Event()

    def scrape() -> None:
        while not ended.wait(5):
            for port in ports:
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).close()

    thread = Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
