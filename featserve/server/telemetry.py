"""What the server tells about its requests: traces and metrics, each where the settings ask for it.

Comes in: each request, when it begins and when it has ended. With neither traces nor metrics nothing is noted, and
nothing of OpenTelemetry is loaded.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import CancelledError
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter_ns
from types import TracebackType
from typing import TYPE_CHECKING

import grpc

from featserve.config import Config, TelemetryConfig
from featserve.errors import DeadlineExceeded, FeatserveError, ServingError
from featserve.matrix import FeatureMatrix
from featserve.plan import ReadPlan
from featserve.server.meter import SECOND, Load, Meter
from featserve.server.service import SERVICE_NAME, Call, Record
from featserve.server.status import MESSAGE_BYTES, code_of, cut
from featserve.server.tally import Tally
from featserve.server.together import Share
from featserve.server.workers import Part
from featserve.stages import Stages
from featserve.store import OnlineStore
from featserve.store.follow import Behind, Follower

if TYPE_CHECKING:
    from featserve.server.metrics import Page
    from featserve.server.tracing import Told, Trace, Tracing

log = logging.getLogger("featserve.server")

CODES = {code.value[0]: code.name for code in grpc.StatusCode}
OK, CANCELLED = CODES[0], CODES[1]
SERVER_FAULTS = {CODES[number] for number in (2, 4, 12, 13, 14, 15)}
"""The codes that make a server's span an error, as OpenTelemetry's conventions for gRPC say."""
OVER = 0.9
"""The part of a deadline after which who is cancelled is taken for one whose deadline passed: transports tell no more
of that, and a caller counts from the sending, and rounds what it tells."""
FLUSH_SECONDS = 2.0
LOOP_EVERY_SECONDS = 0.1

UNWATCHED = nullcontext()

Attributes = dict[str, str | int]


Asking = tuple[int, "Trace | None"]
"""A call that has waited for its turn: since when, by ``perf_counter_ns``, and its trace."""


class Telemetry:
    """Traces and metrics of one server, either of which may be None."""

    def __init__(self, tracing: Tracing | None = None, meter: Meter | None = None, page: Page | None = None) -> None:
        self.tracing, self.meter, self.page = tracing, meter, page

    @classmethod
    def open(
        cls, config: Config, store: OnlineStore, follower: Follower | None = None, part: Part | None = None
    ) -> Telemetry:
        """Start what ``config`` asks for. Raises ServingError where the address for metrics cannot be had.

        ``follower``: lets the store catch up. ``part``: which of several processes this is.
        """
        wanted = config.telemetry
        tracing = meter = page = None
        if wanted.prometheus_port is not None:
            from featserve.server.metrics import Page

            meter = Meter(of_workers=part is not None and part.writes)
            page = Page(meter, store, follower, resource_of(wanted, part), config.server.host, wanted.prometheus_port)
            log.info("metrics", extra={"address": f"http://{page.address}/metrics"})
        if wanted.otlp_endpoint is not None:
            from featserve.server.tracing import Tracing

            tracing = Tracing(wanted, resource=resource_of(wanted, part))
            log.info("traces", extra={"endpoint": wanted.otlp_endpoint, "sample_ratio": wanted.sample_ratio})
        return cls(tracing, meter, page)

    def count(self, load: Load) -> None:
        """Count the calls that a transport has on its hands."""
        if self.meter is not None:
            self.meter.count(load)

    def watch(self, method: str, call: Call, asking: Asking | None = None) -> AbstractContextManager[object]:
        """Return the context that a request is answered in, to be traced and counted. ``method``: its name.

        ``asking``: that of a call which has waited for its turn. Safe from several threads.
        """
        if asking is not None:
            taken_ns, trace = asking
        else:
            trace = None if self.tracing is None else self.tracing.begin(call.metadata)
        meter = self.meter
        if trace is None and meter is None:
            return UNWATCHED
        call.record = watch = _Watch()
        watch.telemetry, watch.method, watch.given_s = self, method, call.remaining_s
        watch.begun_ns = begun_ns = perf_counter_ns()
        if asking is not None:
            if watch.given_s is not None:
                watch.given_s += (begun_ns - taken_ns) / SECOND
            watch.begun_ns = begun_ns = taken_ns
        if trace is not None:
            watch.trace, watch.stages = trace, trace.stages
            trace.stages.begun.append(("receive" if asking is None else "queue", begun_ns))
        if meter is not None and begun_ns >= meter.ages_due_ns:
            watch.ages = True
        return watch

    def refuse(self, method: str, code: int) -> None:
        """Count a request that is refused and not watched."""
        if self.meter is not None:
            self.meter.refuse(method, CODES[code])

    def passed_on(self, call: Call) -> Iterable[tuple[str, str | bytes]]:
        """Return the metadata of a watched call for another process of this server: one decision holds for both."""
        if self.tracing is None:
            return call.metadata
        return self.tracing.passed_on(call.metadata, call.record.trace if isinstance(call.record, _Watch) else None)

    async def watch_loop(self) -> None:
        """Count how late the event loop is, and threads that answer are, until cancelled."""
        while self.meter is not None:
            due_ns = perf_counter_ns() + int(LOOP_EVERY_SECONDS * 1e9)
            await asyncio.sleep(LOOP_EVERY_SECONDS)
            self.meter.look(due_ns, perf_counter_ns())

    def close(self) -> None:
        """Send the last spans, for two seconds at most, and stop."""
        if self.tracing is not None:
            self.tracing.close(FLUSH_SECONDS)
        if self.page is not None:
            self.page.close()


def resource_of(wanted: TelemetryConfig, part: Part | None) -> dict[str, str]:
    """Return what OpenTelemetry is to call this process, in its own terms."""
    named = {"service.name": wanted.service_name}
    return named if part is None else named | {"service.instance.id": str(part.number)}


class _Watch(Record):
    """The record of a watched request, while it runs; ``trace`` is None where it is only counted.

    ``given_s``: how long it may take, if that is limited.
    """

    telemetry: Telemetry
    method: str
    begun_ns: int
    given_s: float | None
    trace: Trace | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        code = OK
        if error is not None or self.error is not None:
            if isinstance(error, Behind):  # not the end: it is run again
                return
            code = self._failed(error)
        meter = self.telemetry.meter
        if meter is not None:
            meter.add(self.method, code, self.begun_ns, perf_counter_ns(), self)
        if self.trace is not None:
            self._end(self.trace, code)

    def _end(self, trace: Trace, code: str) -> None:
        """Export the spans of a request that has ended."""
        trace.stages.end()
        failure = cut(str(self.error or ""), MESSAGE_BYTES) if code in SERVER_FAULTS else None
        if self.whole is not None and self.plan is not None and code == OK:
            told: Told = partial(_whole, self.method, self.plan, self.whole)
        else:  # now, as nobody is to hold the answer until it is told
            told = (_called(self.method, code) | _attributes(self)).copy
        trace.end(f"{SERVICE_NAME}/{self.method}", told, failure)

    def _failed(self, error: BaseException | None) -> str:
        """Note what a request failed with; return the name of its status code."""
        if isinstance(error, CancelledError):
            if not self._is_over():
                return CANCELLED
            error = DeadlineExceeded("the deadline passed before the request was answered")
        if isinstance(error, FeatserveError):
            self.error = error
        elif error is not None:
            self.error = ServingError(f"internal error: {error.__class__.__name__}")
        assert self.error is not None
        return CODES[code_of(self.error)]

    def _is_over(self) -> bool:
        """Say whether what was cancelled by now is out of time."""
        return self.given_s is not None and perf_counter_ns() - self.begun_ns >= OVER * self.given_s * SECOND


def trace_together(
    method: str, share: Share, matrix: FeatureMatrix | None, asked: Sequence[Asking], stages: Stages
) -> None:
    """Trace those of a share, ``asked`` of this method, that are to be, as they have been answered.

    ``matrix``: the features of all; None where each was for one row that was there and held no null. ``stages``:
    where the time of all went.
    """
    stages.end()
    start = 0
    for (taken_ns, trace), keys in zip(asked, share.keys, strict=True):
        if trace is not None:
            trace.stages.begun += [("queue", taken_ns), *stages.begun]
            trace.stages.ended_ns = stages.ended_ns
            counts = None
            if matrix is not None and matrix.valid is not None:
                counts = Tally(share.asked.plan)
                counts.add(matrix.part(start, start + keys.count))
            told = partial(_together, method, share.asked.plan, keys.count, counts, len(asked))
            trace.end(f"{SERVICE_NAME}/{method}", told, None)
        start += keys.count


def _attributes(record: Record) -> Attributes:
    """Return what the span of a recorded request says of what it came to."""
    attributes: Attributes = {}
    if record.error is not None:
        attributes["error.type"] = record.error.reason
    if record.plan is not None:
        counts = Tally(record.plan)
        if record.whole is not None:
            counts.rows = record.whole
        elif record.matrix is not None:
            counts.add(record.matrix)
        else:
            return attributes | _service(counts)
        return attributes | _answered(counts)
    if record.written is not None:
        attributes |= {"featserve.view": record.view, "featserve.rows": record.written.rows}
    elif record.pushed is not None:
        attributes |= {"featserve.source": record.source, "featserve.events": record.pushed.events}
        attributes |= {f"featserve.events.{outcome}": count for outcome, count in record.pushed.outcomes().items()}
    return attributes


def _service(counts: Tally) -> Attributes:
    return {"featserve.service.name": counts.schema.name, "featserve.service.version": counts.schema.version}


def _answered(counts: Tally) -> Attributes:
    return _service(counts) | {
        "featserve.rows": counts.rows,
        "featserve.rows.not_found": sum(counts.not_found),
        "featserve.rows.expired": sum(counts.expired),
        "featserve.values.null": sum(counts.nulls),
    }


def _whole(method: str, plan: ReadPlan, rows: int) -> Attributes:
    """Return what the span of a request says whose rows were all there and held no null."""
    counts = Tally(plan)
    counts.rows = rows
    return _called(method, OK) | _answered(counts)


def _together(method: str, plan: ReadPlan, rows: int, counts: Tally | None, requests: int) -> Attributes:
    """Return what the span of a request says that shared a read; no ``counts`` of rows that were whole."""
    own = _whole(method, plan, rows) if counts is None else _called(method, OK) | _answered(counts)
    return own | {"featserve.together": requests}


def _called(method: str, code: str) -> Attributes:
    """Return what OpenTelemetry's conventions for gRPC call a request and its end."""
    name = f"{SERVICE_NAME}/{method}"
    return {"rpc.system.name": "grpc", "rpc.method": name, "rpc.response.status_code": code}
