"""What traces and metrics cost: requests per second of servers that trace, count or do both, beside one that does not.

All four run for the whole time, on one transport and then on the other, and are loaded in short turns, each on a store
of its own with the same rows. Traces go to a collector that takes them and does nothing; metrics are read once a
second, as no Prometheus does. Then the same in process, where the time that one request takes more can be told apart
from what else happens on the machine.
"""

from __future__ import annotations

import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

import featserve
from bench import load, project, servers
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
ROUNDS = 30
SECONDS = 0.5
REPEATS = 400
AT_ONCE = 50
EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"
METRICS_PORT = 19_464
OFF = "off"


def measure(folder: Path) -> list[Figure]:
    """Load the servers with 1 and 100 keys a request; the figures are ratios to the server that tells nothing."""
    figures = []
    for transport in TRANSPORTS:
        with collector() as endpoint, ExitStack() as stack:
            traces = f'otlp_endpoint = "{endpoint}"\nsample_ratio = 0.01\n'
            settings = {
                OFF: "",
                "metrics": f"prometheus_port = {METRICS_PORT}\n",
                "traces of 1 %": traces,
                "both": f"prometheus_port = {METRICS_PORT + 1}\n{traces}",
            }
            running = {
                name: stack.enter_context(servers.ours(prepared(folder / f"telemetry-{i}", told), transport))
                for i, (name, told) in enumerate(settings.items())
            }
            stack.enter_context(scraped(METRICS_PORT, METRICS_PORT + 1))
            for keys in KEYS:
                figures += compare(running, keys, f"{transport}, {keys} {'key' if keys == 1 else 'keys'}")
    for keys in KEYS:
        figures += in_process(folder / "telemetry-0", keys)
    return figures


def prepared(folder: Path, telemetry: str) -> Path:
    """Return the folder of a project with its own store and these lines in its [telemetry]."""
    if not (folder / ".featserve" / "store").is_dir():
        project.make(folder, ENTITIES)
        project.materialize(folder)
    (folder / "featserve.toml").write_text(f"[server]\nport = 0\n[telemetry]\n{telemetry}", encoding="utf-8")
    return folder


def compare(running: dict[str, Server], keys: int, told: str) -> list[Figure]:
    """Load all in turns; return the throughput and the processor time of each, beside those of the first."""
    rates: dict[str, list[float]] = {name: [] for name in running}
    cpu_us: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(-1, ROUNDS):
        for name, server in running.items():
            before_s = server.cpu_s()
            measured = load.run(server.address, keys, entities=ENTITIES, seconds=SECONDS, seed=turn + 1)
            if turn >= 0:
                rates[name].append(measured.rate)
                cpu_us[name].append((server.cpu_s() - before_s) / measured.requests * 1e6)
    off_us = statistics.mean(cpu_us[OFF])
    off_note = f"{number(off_us)} us of processor each"
    figures = [Figure(f"{told}: {OFF}", statistics.median(rates[OFF]), "req/s", note=off_note)]
    for name in running:
        if name == OFF:
            continue
        ratios = sorted(a / b for a, b in zip(rates[name], rates[OFF], strict=True))
        more_us = statistics.mean(cpu_us[name]) - off_us
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        note = f"half of the rounds {low:.2f} to {high:.2f}; {more_us:+.1f} us of processor"
        figures.append(Figure(f"{told}: {name}", statistics.median(ratios), "of off", TARGET, note=note))
    return figures


def in_process(folder: Path, keys: int) -> list[Figure]:
    """Answer requests in this process in turns with and without; return what one takes more, at its best."""
    told = f"in process, {keys} {'key' if keys == 1 else 'keys'}"
    body = next(load.bodies(keys, ENTITIES, 1))[5:]
    with featserve.open(folder) as opened:
        service = Service(opened.engine, Limits(10_000, 0), clock_us)
        never = Tracing(TelemetryConfig(sample_ratio=0), exporter=Encoding())
        watched = {OFF: Telemetry(), "metrics": Telemetry(None, Meter()), "not traced": Telemetry(never)}
        least_us = dict.fromkeys(watched, float("inf"))
        for _ in range(REPEATS):
            for name, telemetry in watched.items():
                least_us[name] = min(least_us[name], answer(service, telemetry, body, AT_ONCE, time.perf_counter))
        never.close(10)
        traced_us = min(traced(service, body) for _ in range(20))
    off_us = least_us.pop(OFF)
    return [
        Figure(f"{told}: {OFF}", off_us, "us"),
        *(Figure(f"  {name}", us - off_us, "us more") for name, us in least_us.items()),
        Figure("  traced, and its spans encoded", traced_us - off_us, "us more", note="of processor, in two threads"),
    ]


def traced(service: Service, body: bytes) -> float:
    """Return microseconds of processor for a request that is traced, with what sends its spans."""
    tracing = Tracing(TelemetryConfig(sample_ratio=1), exporter=Encoding())
    started = time.process_time()
    answer(service, Telemetry(tracing), body, AT_ONCE, time.process_time)
    tracing.close(10)
    return (time.process_time() - started) / AT_ONCE * 1e6


def answer(service: Service, telemetry: Telemetry, body: bytes, requests: int, clock: Callable[[], float]) -> float:
    """Answer a request over and over; return microseconds of ``clock`` for one."""
    metadata = (("user-agent", "featserve-bench"), ("x-request-id", "1"))
    started = clock()
    for _ in range(requests):
        call = Call(metadata, 1.0)
        with telemetry.watch("GetFeatures", call):
            service.get_features(body, call)
    return (clock() - started) / requests * 1e6


class Encoding(SpanExporter):
    """Encodes spans as they are sent, and drops them."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        encode_spans(spans).SerializeToString()
        return SpanExportResult.SUCCESS


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
    """Read the metrics on ``ports`` once a second."""
    ended = Event()

    def scrape() -> None:
        while not ended.wait(1):
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
