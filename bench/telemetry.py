"""What traces and metrics cost: requests per second of a server that traces, counts or does both, beside one that does
neither.

The promise is of throughput: requests per second over eight connections, beside those of the server that tells nothing.
What its processor time of a request is of the other's is told, too, which is the more where connections wait.

Two processes of one program differ by a tenth, too, by how they happen to lie in memory, two servers in one process by
a percent or two, and the speed of a shared machine changes from second to second. So it is one server of each
transport, in this process, that tells now this and now that, for 50 ms each and in random order, while h2load goes on
to load it. The server has a core, and h2load another. Requests count where they end, by h2load's log; what is told is
the median, over rounds of one turn of each, of a ratio of neighbours. A second turn of telling nothing says how far
that can be trusted, and so does the standard error. Traces go to a collector in another process that takes them and
does nothing; the thread that sends them does so in batches, now and then, so its time is shared out to all requests
that it tells of. What a Prometheus takes that reads the metrics is told by itself. Then the same with no server, where
the time that one request takes more can be told apart.

    python -m bench.telemetry    take spans, and do nothing with them; print the endpoint
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
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
import numpy as np
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
from featserve.types import Array

ENTITIES = 100_000
TRANSPORTS = ("native", "grpcio")
ASKED = {"1 key": (1, 0), "100 keys": (100, 0), "1 key, not there": (0, 1), "100 keys, ten not there": (90, 10)}
"""How many keys of a request have a row, and how many do not, which is counted otherwise."""
KEYS = (1, 100)
"""Of requests in process."""
TARGET = 0.97
LOADS, LOAD_S, STARTING_S, TURN_S = 8, 10.0, 0.5, 0.05
"""How often a server is loaded, for how long, how long that is left alone at first, and the length of a turn."""
SCRAPES = 20
SENDER = "OtelBatchSpanRecordProcessor"
"""What OpenTelemetry calls the threads that send spans."""
REPEATS = 400
AT_ONCE = 50
TRACED = 2_000  # which the queue of spans holds
EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"
OFF, AGAIN, METRICS, BOTH = "off", "off again", "metrics", "both"

Found = dict[str, Array]
"""What was taken, or done, in each round of turns, by what was told."""


@dataclass(slots=True)
class Kind:
    """What a server may tell. ``senders``: the threads that send its spans; ``flushing_s``: what others took for it."""

    telemetry: Telemetry
    senders: list[Thread]
    flushing_s: float = 0.0

    def sending_s(self) -> float:
        """Return the processor time that sending has taken, when all is sent."""
        if self.telemetry.tracing is not None:
            before_s = time.thread_time()
            self.telemetry.tracing.flush()
            self.flushing_s += time.thread_time() - before_s
        return sum(cpu_s(thread) for thread in self.senders) + self.flushing_s

    def scrape_s(self) -> float:
        """Return the processor time that reading the metrics takes once."""
        assert self.telemetry.page is not None
        before_s = answering_s()
        for _ in range(SCRAPES):
            urllib.request.urlopen(f"http://{self.telemetry.page.address}/metrics", timeout=5).close()
        return (answering_s() - before_s) / SCRAPES


@dataclass(frozen=True, slots=True)
class Listening:
    """A server in this process. ``telling``: what it tells now, one of the ``kinds``."""

    address: str
    telling: Telemetry
    kinds: dict[str, Kind]

    def tell(self, telemetry: Telemetry) -> None:
        """Tell this of calls that begin from now on."""
        self.telling.tracing, self.telling.meter = telemetry.tracing, telemetry.meter


def measure(folder: Path) -> list[Figure]:
    """Load a server with requests of each kind; the figures are ratios to it while it tells nothing."""
    figures = []
    folder = folder / "telemetry"
    if not (folder / ".featserve" / "store").is_dir():
        project.make(folder, ENTITIES)
        project.materialize(folder)
    with featserve.open(folder, write=True) as opened, Server("collector", "bench.telemetry") as collector:
        endpoint = f"http://{collector.address}"
        for name in TRANSPORTS:
            with servers.on(servers.shared_out()[0]), listening(opened, name, endpoint) as server:
                for told, (there, missing) in ASKED.items():
                    entities = np.random.default_rng(1).integers(0, ENTITIES, there + missing)
                    entities[there:] += ENTITIES
                    body = load.framed(load.request(entities))
                    figures += compare(f"{name}, {told}", *in_turns(server, body))
                figures.append(Figure("  metrics, read once", server.kinds[METRICS].scrape_s() * 1e3, "ms"))
        for keys in KEYS:
            figures += with_no_server(opened, keys, endpoint)
    return figures


@contextmanager
def listening(opened: Embedded, name: str, endpoint: str) -> Iterator[Listening]:
    """Serve on a transport, in threads of this process."""
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
        telling = Telemetry()
        server, address = run(start(telling))
        stack.callback(lambda: run(server.drain(1.0)))
        kinds = {}
        wanted = settings_of(endpoint)
        for told, config in wanted.items():
            before = threading.enumerate()
            telemetry = Telemetry.open(replace(opened.config, telemetry=config), opened.engine.store)
            stack.callback(telemetry.close)
            telemetry.count(server)
            if telemetry.meter is not None:
                telemetry.meter.ages_every_ns *= len(wanted)  # as it counts for a part of the time only
            stack.callback(asyncio.run_coroutine_threadsafe(telemetry.watch_loop(), loop).cancel)
            senders = [each for each in threading.enumerate() if each not in before and each.name == SENDER]
            if bool(senders) != (telemetry.tracing is not None):
                raise RuntimeError(f"no thread is called {SENDER} any more: what sending takes would not be told")
            kinds[told] = Kind(telemetry, senders)
        yield Listening(address, telling, kinds)


def settings_of(endpoint: str) -> dict[str, TelemetryConfig]:
    """Return what a server is told to tell, by name; traces go to ``endpoint``."""
    traces = TelemetryConfig(endpoint, sample_ratio=0.01)
    return {
        OFF: TelemetryConfig(),
        AGAIN: TelemetryConfig(),
        METRICS: TelemetryConfig(prometheus_port=0),
        "traces of 1 %": traces,
        BOTH: replace(traces, prometheus_port=0),
    }


def in_turns(server: Listening, body: bytes) -> tuple[Found, Found]:
    """Load a server that tells each kind in turn.

    Returns microseconds of processor for a request, and requests/s, of each kind, by round of turns.
    """
    kinds = list(server.kinds.values())
    sent_s = [kind.sending_s() for kind in kinds]
    with servers.on(servers.shared_out()[1]), ThreadPoolExecutor(1) as pool:
        loads = [load_once(server, kinds, body, pool) for _ in range(LOADS)]
    requests, took_s, busy_s = (np.concatenate(each) for each in zip(*loads, strict=True))
    sending_s = np.array([kind.sending_s() for kind in kinds]) - sent_s
    each_s = sending_s / requests.sum(axis=0)
    cpu_us, rates = (busy_s / requests + each_s) * 1e6, 1 / (took_s / requests + each_s)
    return dict(zip(server.kinds, cpu_us.T, strict=True)), dict(zip(server.kinds, rates.T, strict=True))


def load_once(
    server: Listening, kinds: Sequence[Kind], body: bytes, pool: ThreadPoolExecutor
) -> tuple[Array, Array, Array]:
    """Load a server while it takes turns at what it tells, in each round in another order.

    Returns requests that ended, seconds, and seconds of processor but for sending, each rounds x kinds.
    """
    ends_s = time.time() + LOAD_S
    loading = pool.submit(h2load.run, server.address, body, seconds=LOAD_S)
    time.sleep(STARTING_S)
    order, at_s, cpu_s = [], [time.time()], [answering_s()]
    while at_s[-1] + 2 * TURN_S * len(kinds) < ends_s:
        for i in random.sample(range(len(kinds)), len(kinds)):
            server.tell(kinds[i].telemetry)
            time.sleep(TURN_S)
            order.append(i)
            at_s.append(time.time())
            cpu_s.append(answering_s())
    server.tell(server.kinds[OFF].telemetry)
    loaded = loading.result()
    ended_us = loaded.first_us + loaded.sent_us + loaded.taken_us
    requests, _ = np.histogram(ended_us, np.array(at_s) * 1e6)
    by_kind = np.argsort(np.reshape(order, (-1, len(kinds))), axis=1)
    in_order = (np.reshape(each, by_kind.shape) for each in (requests, np.diff(at_s), np.diff(cpu_s)))
    requests, took_s, busy_s = (np.take_along_axis(each, by_kind, axis=1) for each in in_order)
    return requests, took_s, busy_s


def answering_s() -> float:
    """Return the processor time of this process but for this thread, which serves nobody, and those that send spans."""
    others_s = sum(cpu_s(thread) for thread in threading.enumerate() if thread.name == SENDER)
    return time.process_time() - time.thread_time() - others_s


def cpu_s(thread: Thread) -> float:
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def compare(told: str, cpu_us: Found, rates: Found) -> list[Figure]:
    """Return what each did beside the mean of those that tell nothing, and what its processor time is to theirs.

    That mean is the geometric one: beside the other, which is never less, who is as fast would seem a little slower.
    """
    off_us, off_rates = (np.sqrt(found[OFF] * found[AGAIN]) for found in (cpu_us, rates))
    note = f"{number(float(np.median(off_us)))} us of processor each"
    figures = [Figure(f"{told}: {OFF}", float(np.median(off_rates)), "req/s", note=note)]
    apart, error = median_of(rates[OFF] / rates[AGAIN])
    figures.append(Figure("  one of two to the other", apart, "", note=f"standard error {error:.3f}"))
    for name in (name for name in cpu_us if name not in (OFF, AGAIN)):
        rate, error = median_of(rates[name] / off_rates)
        takes, takes_error = median_of(cpu_us[name] / off_us)
        note = f"standard error {error:.3f}; processor time {takes:.3f}, {takes_error:.3f}"
        figures.append(Figure(f"  {name}", rate, "of off", None if name == BOTH else TARGET, note=note))
    return figures


def median_of(values: Array) -> tuple[float, float]:
    """Return the median and its standard error, as that of values that are normally distributed but for some."""
    median = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(values - median)))
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
