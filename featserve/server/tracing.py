"""Traces: which requests are recorded, and the OpenTelemetry spans of those that were.

Comes in: a request's metadata and, when a recorded request has ended, what it came to. Goes out: OTLP over gRPC.
Whether a request is recorded is decided once, before anything of a span exists: as the caller's trace context (W3C)
says, else by chance. Spans are made from the request's stages after it has ended. A thread of its own sends them; its
queue is bounded and drops spans while the collector is slow or gone, so no request ever waits for it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from threading import Thread

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from featserve.config import TelemetryConfig
from featserve.stages import Stages

# Version, trace, parent and flags; later versions may say more behind them, and ids of zeros are none.
TRACEPARENT = re.compile(
    r"(?:00(?=.{53}\Z)|(?!00|ff)[0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
SAMPLED = 1
NOT_RECORDED = f"00-{1:032x}-{1:016x}-00"
"""Says of a request that it is not recorded, and nothing else."""

SCOPE = InstrumentationScope("featserve")

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Trace:
    """A request that is recorded: its span, the caller's where it has one, and its stages."""

    context: SpanContext
    parent: SpanContext | None
    stages: Stages = field(default_factory=Stages)


class Tracing:
    """Decides which requests are recorded, and exports their spans."""

    def __init__(
        self,
        config: TelemetryConfig,
        *,
        resource: Mapping[str, str] | None = None,
        exporter: SpanExporter | None = None,
        chance: Random | None = None,
    ) -> None:
        """Trace as ``config`` says; the environment's OTEL_BSP_*, OTEL_EXPORTER_OTLP_* and OTEL_RESOURCE_ATTRIBUTES
        count, too. ``resource``: what this process is called. ``exporter``: where spans go instead. ``chance``: draws
        the requests of callers that do not trace.
        """
        self._ratio = config.sample_ratio
        self._chance = (chance or Random()).random
        self._resource = Resource.create(resource or {"service.name": config.service_name})
        self._exporter = exporter or OTLPSpanExporter(endpoint=config.otlp_endpoint)
        self._processor = BatchSpanProcessor(self._exporter)
        self._ids = RandomIdGenerator()

    def begin(self, metadata: Metadata) -> Trace | None:
        """Return a trace for a request that is to be recorded, else None."""
        for key, value in metadata:
            if key == "traceparent":
                found = TRACEPARENT.fullmatch(value) if isinstance(value, str) else None
                if found is None:
                    break
                return self._trace(_context(found, metadata)) if int(found[3], 16) & SAMPLED else None
        return self._trace(None) if self._chance() < self._ratio else None

    def _trace(self, parent: SpanContext | None) -> Trace:
        if parent is None:
            trace_id, flags, state = self._ids.generate_trace_id(), TraceFlags(SAMPLED), None
        else:
            trace_id, flags, state = parent.trace_id, parent.trace_flags, parent.trace_state
        return Trace(SpanContext(trace_id, self._ids.generate_span_id(), False, flags, state), parent)

    @staticmethod
    def passed_on(metadata: Metadata, trace: Trace | None) -> Metadata:
        """Return the metadata of a request for who goes on with it: as below its span, or as not recorded."""
        state = () if trace is None or trace.parent is None else ("tracestate",)
        rest = [(key, value) for key, value in metadata if key not in ("traceparent", "tracestate") or key in state]
        if trace is None:
            return [("traceparent", NOT_RECORDED), *rest]
        own = trace.context
        return [("traceparent", f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"), *rest]

    def end(self, trace: Trace, name: str, attributes: Mapping[str, str | int], failure: str | None) -> None:
        """Export the spans of a request that has ended: the server's, called ``name``, and one below it for each stage.

        ``failure``: what went wrong, where that is the server's fault.
        """
        stages, context = trace.stages, trace.context
        epoch_ns = time.time_ns() - time.perf_counter_ns()
        start_ns, end_ns = stages.begun[0][1] + epoch_ns, stages.ended_ns + epoch_ns
        # The SDK's own way to a span (sampler, limits, locks, a context of Python's) takes 15 times as long.
        for stage in stages.timed():
            own = SpanContext(
                context.trace_id, self._ids.generate_span_id(), False, context.trace_flags, context.trace_state
            )
            begun_ns = start_ns + stage.start_ns
            self._processor.on_end(
                ReadableSpan(
                    stage.name,
                    own,
                    context,
                    self._resource,
                    start_time=begun_ns,
                    end_time=begun_ns + stage.duration_ns,
                    instrumentation_scope=SCOPE,
                )
            )
        self._processor.on_end(
            ReadableSpan(
                name,
                context,
                trace.parent,
                self._resource,
                attributes,
                kind=SpanKind.SERVER,
                status=Status(StatusCode.UNSET) if failure is None else Status(StatusCode.ERROR, failure),
                start_time=start_ns,
                end_time=end_ns,
                instrumentation_scope=SCOPE,
            )
        )

    def close(self, seconds: float) -> None:
        """Send what is left, and give up after ``seconds``."""
        flusher = Thread(target=self._processor.shutdown, name="featserve-traces", daemon=True)
        flusher.start()
        flusher.join(seconds)
        if flusher.is_alive():  # the collector does not answer: end the call that waits for it
            self._exporter.shutdown()


def _context(found: re.Match[str], metadata: Metadata) -> SpanContext:
    """Return the caller's span."""
    states = [value for key, value in metadata if key == "tracestate" and isinstance(value, str)]
    return SpanContext(
        int(found[1], 16), int(found[2], 16), True, TraceFlags(int(found[3], 16)), TraceState.from_header(states)
    )
