"""What the server tells about its requests: traces and metrics, each where the settings ask for it.

Comes in: each request, when it begins and when it has ended. With neither traces nor metrics nothing is noted, and
nothing of OpenTelemetry is loaded.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import CancelledError
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter_ns
from types import TracebackType
from typing import TYPE_CHECKING

import grpc

from featserve.config import Config
from featserve.errors import FeatserveError, ServingError
from featserve.server.meter import Load, Meter
from featserve.server.service import SERVICE_NAME, Call, Record
from featserve.server.status import code_of
from featserve.server.tally import Tally
from featserve.stages import Stages
from featserve.store import OnlineStore

if TYPE_CHECKING:
    from featserve.server.metrics import Page
    from featserve.server.tracing import Trace, Tracing

log = logging.getLogger("featserve.server")

CODES = {code.value[0]: code.name for code in grpc.StatusCode}
OK, CANCELLED = 0, 1
SERVER_FAULTS = {2, 4, 12, 13, 14, 15}
"""The codes that make a server's span an error, as OpenTelemetry's conventions for gRPC say."""
FLUSH_SECONDS = 2.0
LOOP_EVERY_SECONDS = 0.1

UNWATCHED = nullcontext()


class Telemetry:
    """Traces and metrics of one server, either of which may be None."""

    def __init__(self, tracing: Tracing | None = None, meter: Meter | None = None, page: Page | None = None) -> None:
        self.load = Load() if meter is None else meter.load
        self._tracing, self._meter, self._page = tracing, meter, page

    @classmethod
    def open(cls, config: Config, store: OnlineStore) -> Telemetry:
        """Start what ``config`` asks for. Raises ServingError where the address for metrics cannot be had."""
        wanted = config.telemetry
        tracing = meter = page = None
        if wanted.prometheus_port is not None:
            from featserve.server.metrics import Page

            meter = Meter()
            page = Page(meter, store, wanted.service_name, config.server.host, wanted.prometheus_port)
            log.info("metrics", extra={"address": f"http://{page.address}/metrics"})
        if wanted.otlp_endpoint is not None:
            from featserve.server.tracing import Tracing

            tracing = Tracing(wanted)
            log.info("traces", extra={"endpoint": wanted.otlp_endpoint, "sample_ratio": wanted.sample_ratio})
        return cls(tracing, meter, page)

    def watch(self, method: str, call: Call) -> AbstractContextManager[object]:
        """Return the context that a request is answered in, to be traced and counted; ``method``: its name."""
        meter, tracing = self._meter, self._tracing
        trace = None if tracing is None else tracing.begin(call.metadata)
        if meter is None and trace is None:
            return UNWATCHED
        return _Watch(meter, tracing, trace, method, call)

    async def watch_loop(self) -> None:
        """Count how late the event loop is, until cancelled."""
        while self._meter is not None:
            due_ns = perf_counter_ns() + int(LOOP_EVERY_SECONDS * 1e9)
            await asyncio.sleep(LOOP_EVERY_SECONDS)
            self._meter.loop_delay.add(max(perf_counter_ns() - due_ns, 0))

    def close(self) -> None:
        """Send the last spans, for two seconds at most, and stop."""
        if self._tracing is not None:
            self._tracing.close(FLUSH_SECONDS)
        if self._page is not None:
            self._page.close()


class _Watch:
    """One watched request."""

    __slots__ = ("_begun_ns", "_meter", "_method", "_record", "_trace", "_tracing")

    def __init__(
        self, meter: Meter | None, tracing: Tracing | None, trace: Trace | None, method: str, call: Call
    ) -> None:
        self._meter, self._tracing, self._trace, self._method = meter, tracing, trace, method
        self._begun_ns = now_ns = perf_counter_ns()
        stages: Stages | None = None
        if trace is not None:
            stages = trace.stages
            stages.begin("receive")
        call.record = self._record = Record(stages, meter is not None and meter.wants_ages(method, now_ns))

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        record = self._record
        code = OK
        if isinstance(error, FeatserveError):
            record.error = error
        elif isinstance(error, CancelledError):
            code = CANCELLED
        elif error is not None:
            record.error = ServingError(f"internal error: {error.__class__.__name__}")
        if record.error is not None:
            code = code_of(record.error)
        if self._meter is not None:
            self._meter.add(self._method, CODES[code], perf_counter_ns() - self._begun_ns, record)
        if self._trace is not None and self._tracing is not None:
            self._trace.stages.end()
            _end(self._tracing, self._trace, self._method, code, record)


def _end(tracing: Tracing, trace: Trace, method: str, code: int, record: Record) -> None:
    """Export the spans of a recorded request."""
    name = f"{SERVICE_NAME}/{method}"
    attributes: dict[str, str | int] = {
        "rpc.system.name": "grpc",
        "rpc.method": name,
        "rpc.response.status_code": CODES[code],
    }
    if record.error is not None:
        attributes["error.type"] = record.error.reason
    if record.plan is not None:
        schema = record.plan.schema
        attributes |= {"featserve.service.name": schema.name, "featserve.service.version": schema.version}
        if record.matrix is not None:
            tally = Tally(record.plan)
            tally.add(record.matrix)
            attributes["featserve.rows"] = tally.rows
            attributes["featserve.rows.not_found"] = sum(tally.not_found)
            attributes["featserve.rows.expired"] = sum(tally.expired)
            attributes["featserve.values.null"] = sum(tally.nulls)
    elif record.written is not None:
        attributes |= {"featserve.view": record.view, "featserve.rows": record.written.rows}
    tracing.end(trace, name, attributes, str(record.error) if code in SERVER_FAULTS else None)
