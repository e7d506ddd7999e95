"""Traces: which requests are recorded, and the OpenTelemetry spans of those that were.

Comes in: a request's metadata and, when a recorded request has ended, what it came to. Goes out: OTLP over gRPC.
Whether a request is recorded is decided once, before anything of a span exists: as the caller's trace context (W3C)
says, else by chance. Spans are made from the request's stages after it has ended, as the messages that are sent. A
thread of its own sends them; its queue is bounded and drops requests while the collector is slow or gone, so none ever
waits for it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random, randbytes
from threading import Thread

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span, SpanFlags, Status
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import INVALID_SPAN_CONTEXT, SpanContext, TraceFlags, TraceState

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
LOCAL = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
REMOTE = LOCAL | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
"""Of a span: that its parent is known to be of this process, or of another."""

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Trace:
    """A request that is recorded: its span, the caller's where it has one, and its stages."""

    context: SpanContext
    parent: SpanContext | None
    stages: Stages = field(default_factory=Stages)


class Ended(ReadableSpan):
    """A request that has ended, as the SDK's queue takes it; ``spans``: it and its stages, as they are sent."""

    def __init__(self, context: SpanContext, resource: Resource, spans: bytes) -> None:
        super().__init__("", context, resource=resource)
        self.spans = spans


class Exporter(OTLPSpanExporter):
    """Sends requests that have ended to ``endpoint``, as spans of ``resource``."""

    def __init__(self, endpoint: str | None, resource: Resource) -> None:
        super().__init__(endpoint=endpoint)
        self._frame = encode_spans(
            [ReadableSpan("", INVALID_SPAN_CONTEXT, resource=resource, instrumentation_scope=SCOPE)]
        )
        self._frame.resource_spans[0].scope_spans[0].ClearField("spans")

    def _translate_data(self, data: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
        request = ExportTraceServiceRequest()
        request.CopyFrom(self._frame)
        # Encoded messages, one after the other, are one message with the spans of all.
        encoded = b"".join(ended.spans for ended in data if isinstance(ended, Ended))
        request.resource_spans[0].scope_spans[0].MergeFromString(encoded)
        return request


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
        """Trace as ``config`` says; the environment's OTEL_BSP_* (of requests, each with all its spans),
        OTEL_EXPORTER_OTLP_* and OTEL_RESOURCE_ATTRIBUTES count, too. ``resource``: what this process is called.
        ``exporter``: where requests go instead. ``chance``: draws the requests of callers that do not trace.
        """
        self._ratio = config.sample_ratio
        self._chance = (chance or Random()).random
        self._resource = Resource.create(resource or {"service.name": config.service_name})
        self._exporter = exporter or Exporter(config.otlp_endpoint, self._resource)
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
        stages, context, parent = trace.stages.timed(), trace.context, trace.parent
        epoch_ns = time.time_ns() - time.perf_counter_ns()
        start_ns, end_ns = trace.stages.begun[0][1] + epoch_ns, trace.stages.ended_ns + epoch_ns
        trace_id, span_id = context.trace_id.to_bytes(16), context.span_id.to_bytes(8)
        trace_state = "" if parent is None else parent.trace_state.to_header()
        ids = randbytes(8 * len(stages))
        scope = ScopeSpans()
        for i, (stage, after_ns, duration_ns) in enumerate(stages):
            scope.spans.add(
                trace_id=trace_id,
                span_id=ids[8 * i : 8 * i + 8],
                trace_state=trace_state,
                parent_span_id=span_id,
                flags=LOCAL,
                name=stage,
                kind=Span.SPAN_KIND_INTERNAL,
                start_time_unix_nano=start_ns + after_ns,
                end_time_unix_nano=start_ns + after_ns + duration_ns,
            )
        scope.spans.add(
            trace_id=trace_id,
            span_id=span_id,
            trace_state=trace_state,
            parent_span_id=None if parent is None else parent.span_id.to_bytes(8),
            flags=LOCAL if parent is None else REMOTE,
            name=name,
            kind=Span.SPAN_KIND_SERVER,
            start_time_unix_nano=start_ns,
            end_time_unix_nano=end_ns,
            attributes=[{"key": key, "value": _value(value)} for key, value in attributes.items()],
            status=None if failure is None else {"code": Status.STATUS_CODE_ERROR, "message": failure},
        )
        self._processor.on_end(Ended(context, self._resource, scope.SerializeToString()))

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


def _value(value: str | int) -> dict[str, str | int]:
    return {"string_value": value} if isinstance(value, str) else {"int_value": value}
