"""What traces and metrics cost: requests per second of a server that traces, counts or does both, beside one that does
neither.

The promise is of throughput: requests per second over eight connections, beside those of the server that tells nothing.
What its processor time of a request is of the other's is told, too, which is the more where connections wait.

Two processes of one program differ by a tenth, too, by how they happen to lie in memory. So the servers are in one
process, this one, each with a port of its own, over one store; they have a core, and h2load, which loads them in
turns, has another. Turns are short and many, as the speed of a shared machine changes within seconds; what is told is
the median of the rounds, each a ratio of neighbours. A second server that tells nothing says how far that can be
trusted, and so does the standard error. Traces go to a collector in another process that takes them and does nothing;
the thread that sends them does so in batches, now and then, so its time is shared out to all requests of its server.
Metrics are read every 15 seconds of load, as by a Prometheus that is told to. Then the same with no server, where the
time that one request takes more can be told apart.

    python -m bench.telemetry    take spans, and do nothing with them; print the endpoint
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import uvloop

import featserve
from bench import h2load, load, project, servers
from bench.report import Figure, number
from bench.servers import Server
from featserve.config import TelemetryConfig
from featserve.embedded import Embedded, clock_us
from featserve.server.meter import Meter
from featserve.server.service import Call, Limits, Service
from featserve.server.telemetry import Telemetry
from featserve.server.tracing import Tracing
from featserve.server.transport import Transport, transport

ENTITIES = 100_000
TRANSPORTS = ("native", "grpcio")
KEYS = (1, 100)
TARGET = 0.97
ROUNDS, SECONDS = 100, 0.2
SCRAPED_EVERY_S = 15.0
SENDER = "OtelBatchSpanRecordProcessor"
"""What OpenTelemetry calls the threads that send spans."""
REPEATS = 400
AT_ONCE = 50
TRACED = 2_000  # which the queue of spans holds
EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"
OFF, AGAIN, BOTH = "off", "off again", "both"

Found = dict[str, list[float]]
"""What each server took, or did, in each round."""


@dataclass(frozen=True, slots=True)
class Listening:
    """A server in this process, and what it tells. ``senders``: the threads that send its spans."""

    address: str
    telemetry: Telemetry
    senders: list[Thread]

    def sending_s(self) -> float:
        """Return the processor time that sending has taken."""
        return sum(cpu_s(thread) for thread in self.senders)


def measure(folder: Path) -> list[Figure]:
    """Load the servers with 1 and 100 keys a request; the figures are ratios to the server that tells nothing."""
    figures = []
    folder = folder / "telemetry"
    if not (folder / ".featserve" / "store").is_dir():
        project.make(folder, ENTITIES)
        project.materialize(folder)
    with featserve.open(folder, write=True) as opened, Server("collector", "bench.telemetry") as collector:
        endpoint = f"http://{collector.address}"
        for name in TRANSPORTS:
            with servers.on(servers.shared_out()[0]), listening(opened, name, endpoint) as running:
                for keys in KEYS:
                    body = next(load.bodies(keys, ENTITIES, 1))
                    figures += compare(f"{name}, {keys} {'key' if keys == 1 else 'keys'}", *in_turns(running, body))
        for keys in KEYS:
            figures += with_no_server(opened, keys, endpoint)
    return figures


@contextmanager
def listening(opened: Embedded, name: str, endpoint: str) -> Iterator[dict[str, Listening]]:
    """Serve on a transport, in threads of this process: a server for each kind of telemetry, all on one service."""
    traces = TelemetryConfig(endpoint, sample_ratio=0.01)
    kinds = {
        OFF: TelemetryConfig(),
        AGAIN: TelemetryConfig(),
        "metrics": TelemetryConfig(prometheus_port=0),
        "traces of 1 %": traces,
        BOTH: replace(traces, prometheus_port=0),
    }
    settings = replace(opened.config.server, transport=name)
    service = Service(opened.engine, Limits(settings.max_rows, 0, settings.max_message_mb << 20), clock_us)
    loop = uvloop.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    gc.collect()
    gc.freeze()  # as a server does, but once and for all

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    async def start(telemetry: Telemetry) -> tuple[Transport, str]:
        server = transport(settings)(service, settings, telemetry, None)
        return server, f"{settings.host}:{await server.start(settings.host, 0)}"

    with ExitStack() as stack:
        stack.callback(loop.close)
        stack.callback(thread.join)
        stack.callback(loop.call_soon_threadsafe, loop.stop)
        found = {}
        for told, kind in kinds.items():
            before = threading.enumerate()
            telemetry = Telemetry.open(replace(opened.config, telemetry=kind), opened.engine.store)
            senders = [each for each in threading.enumerate() if each not in before and each.name == SENDER]
            stack.callback(telemetry.close)
            server, address = run(start(telemetry))
            stack.callback(lambda drain: run(drain(1.0)), server.drain)
            watching = asyncio.run_coroutine_threadsafe(telemetry.watch_loop(), loop)
            stack.callback(watching.cancel)
            found[told] = Listening(address, telemetry, senders)
        yield found


def in_turns(running: dict[str, Listening], body: bytes) -> tuple[Found, Found]:
    """Load all in turns, in each round in another order; return processor time and requests/s of each, by round."""
    cpu_us: Found = {name: [] for name in running}
    rates: Found = {name: [] for name in running}
    loaded_s, requests = dict.fromkeys(running, 0.0), dict.fromkeys(running, 0)
    sent_s = {name: server.sending_s() for name, server in running.items()}
    _, loading = servers.shared_out()
    for turn in range(-1, ROUNDS):
        for name, server in random.sample(list(running.items()), len(running)):
            before_s = answering_s()
            with servers.on(loading):
                loaded = h2load.run(server.address, body, seconds=SECONDS)
            loaded_s[name] += SECONDS
            requests[name] += loaded.ended
            if server.telemetry.page is not None and loaded_s[name] >= SCRAPED_EVERY_S:
                loaded_s[name] = 0
                urllib.request.urlopen(f"http://{server.telemetry.page.address}/metrics", timeout=5).close()
            if turn >= 0:
                cpu_us[name].append((answering_s() - before_s) / loaded.ended * 1e6)
                rates[name].append(loaded.rate)
    for name, server in running.items():
        sending_us = (server.sending_s() - sent_s[name]) / requests[name] * 1e6
        cpu_us[name] = [us + sending_us for us in cpu_us[name]]
    return cpu_us, rates


def answering_s() -> float:
    """Return the processor time of this process but for this thread, which serves nobody, and those that send spans."""
    others_s = sum(cpu_s(thread) for thread in threading.enumerate() if thread.name == SENDER)
    return time.process_time() - time.thread_time() - others_s


def cpu_s(thread: Thread) -> float:
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def compare(told: str, cpu_us: Found, rates: Found) -> list[Figure]:
    """Return what each did beside the mean of those that tell nothing, and what its processor time is to theirs."""
    off_us, off_rates = (
        [statistics.mean(pair) for pair in zip(found[OFF], found[AGAIN], strict=True)] for found in (cpu_us, rates)
    )
    note = f"{number(statistics.median(off_us))} us of processor each"
    figures = [Figure(f"{told}: {OFF}", statistics.median(off_rates), "req/s", note=note)]
    apart, error = median_of([a / b for a, b in zip(rates[OFF], rates[AGAIN], strict=True)])
    figures.append(Figure("  one of two to the other", apart, "", note=f"standard error {error:.3f}"))
    for name in (name for name in cpu_us if name not in (OFF, AGAIN)):
        rate, error = median_of([a / b for a, b in zip(rates[name], off_rates, strict=True)])
        takes, takes_error = median_of([us / off for us, off in zip(cpu_us[name], off_us, strict=True)])
        note = f"standard error {error:.3f}; processor time {takes:.3f}, {takes_error:.3f}"
        figures.append(Figure(f"  {name}", rate, "of off", None if name == BOTH else TARGET, note=note))
    return figures


def median_of(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and its standard error, as that of values that are normally distributed but for some."""
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
    return median, math.sqrt(math.pi / 2 / len(values)) * deviation


def with_no_server(opened: Embedded, keys: int, endpoint: str) -> list[Figure]:
    """Answer requests by themselves in turns with and without; return what one takes more, at its best."""
    told = f"in process, {keys} {'key' if keys == 1 else 'keys'}"
    body = next(load.bodies(keys, ENTITIES, 1))[5:]
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
        Figure("  traced", traced_us - off_us, "us more", note="of processor, spans sent"),
    ]


def traced(service: Service, body: bytes, endpoint: str) -> float:
    """Return microseconds of processor for a request that is traced, with what sends its spans."""
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


def collect() -> None:
    """Take spans, and do nothing with them, until this process is ended."""
    server = grpc.server(ThreadPoolExecutor(1))
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(EXPORT, {"Export": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    collect()
