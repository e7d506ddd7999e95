"""Traces: which requests are recorded, and the OpenTelemetry spans of those that were.

Comes in: a request's metadata and, when a recorded request has ended, what it came to. Goes out: OTLP over gRPC.
Whether a request is recorded is decided once, before anything of a span exists: as the caller's trace context (W3C)
says, else by chance. Spans are made from the request's stages long after it has ended, as the messages that are sent,
by the thread that sends them. Its queue is bounded and drops requests while the collector is slow or gone, so none ever
waits for it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from random import Random, randbytes
from struct import Struct
from threading import Thread
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from google.protobuf.wrappers_pb2 import BytesValue
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, SpanFlags, Status
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import INVALID_SPAN_CONTEXT, TraceState

from featserve.config import TelemetryConfig
from featserve.stages import Stages
from featserve.turns import give_way

TRACEPARENT = "traceparent"
# Version, trace, parent and flags; later versions may say more behind them, and ids of zeros are none.
FORMAT = re.compile(
    r"(?:00(?=.{53}\Z)|(?!00|ff)[0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
SAMPLED = 1
NOT_RECORDED = f"00-{1:032x}-{1:016x}-00"
"""Says of a request that it is not recorded, and nothing else."""

SCOPE = InstrumentationScope("featserve")
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
LOCAL = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
REMOTE = LOCAL | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
"""Of a span: that its parent is known to be of this process, or of another."""

# What each field of a span that differs from request to request begins with, its value of so many bytes left out.
TRACE_ID = Span(trace_id=bytes(16)).SerializeToString()[:-16]
SPAN_ID = Span(span_id=bytes(8)).SerializeToString()[:-8]
PARENT_ID = Span(parent_span_id=bytes(8)).SerializeToString()[:-8]
START = Span(start_time_unix_nano=1).SerializeToString()[:-8]
END = Span(end_time_unix_nano=1).SerializeToString()[:-8]
OWN = Struct(f"<{len(SPAN_ID)}s8s{len(START)}sQ{len(END)}sQ")
"""A span's own id and times, each behind the beginning of its field."""
MOST_HEADS = 1_024
"""Spans that differ in nothing else, and of which the rest is encoded once."""
LENGTH_DELIMITED = 2
"""The kind of field that a message is, and bytes are."""

Metadata = Iterable[tuple[str, str | bytes]]
Told = Callable[[], Mapping[str, str | int]]
"""Returns the attributes of a span; called by who sends it: code that one in a hundred requests runs is in no cache."""


class Ids(NamedTuple):
    """What a span is known by, and the W3C trace state. ``parent_id`` is empty where no caller traces."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    flags: int
    state: str


class Trace:
    """A request that is recorded, and, when it has ended, as the SDK's queue takes it.

    As little as can be is made of it before it is sent: code that one in a hundred requests runs is in no cache, and
    takes several times as long in the thread that answers as in a batch.
    """

    context = SimpleNamespace(trace_flags=SimpleNamespace(sampled=True))
    """Tells the SDK's queue to take it."""

    _name: str
    _told: Told
    _failure: str | None
    _begun: list[tuple[str, int]]
    _epoch_ns: int

    def __init__(self, tracing: Tracing, caller: re.Match[str] | None = None, states: Sequence[str] = ()) -> None:
        """``caller``: the ``traceparent`` of a caller that traces; ``states``: its ``tracestate``."""
        self._tracing, self.stages = tracing, Stages()
        self._caller, self._states = caller, states

    @cached_property
    def ids(self) -> Ids:
        """The ids of its span, below the caller's where that traces."""
        if self._caller is None:
            return Ids(randbytes(16), randbytes(8), b"", SAMPLED, "")
        trace_id, parent_id, flags = self._caller.groups()
        state = TraceState.from_header(list(self._states)).to_header() if self._states else ""
        return Ids(bytes.fromhex(trace_id), randbytes(8), bytes.fromhex(parent_id), int(flags, 16), state)

    def end(self, name: str, told: Told, failure: str | None) -> None:
        """Export the spans of the request, which has ended: the server's, called ``name``, and one below it for each
        stage.

        ``told``: returns what the former says. ``failure``: what went wrong, where that is the server's fault.
        """
        self._name, self._told, self._failure = name, told, failure
        self._begun = [*self.stages.begun, ("", self.stages.ended_ns)]  # a write whose caller is gone may still go on
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()
        self._tracing.export(self)

    def spans(self) -> bytes:
        """Return its spans as they are sent: the server's, and one below it for each stage."""
        trace_id, span_id, parent_id, _, state = self.ids
        begun, epoch_ns = self._begun, self._epoch_ns
        ids = randbytes(8 * len(begun))
        within, kind = TRACE_ID + trace_id + PARENT_ID + span_id, Span.SPAN_KIND_INTERNAL
        size = len(within) + OWN.size
        spans: list[bytes] = []
        for i, ((stage, start_ns), (_, end_ns)) in enumerate(pairwise(begun)):
            own = OWN.pack(SPAN_ID, ids[8 * i : 8 * i + 8], START, start_ns + epoch_ns, END, end_ns + epoch_ns)
            spans += (_head(size, stage, kind, LOCAL, state), within, own)
        within = TRACE_ID + trace_id + (PARENT_ID + parent_id if parent_id else b"")
        size, kind, flags = len(within) + OWN.size, Span.SPAN_KIND_SERVER, REMOTE if parent_id else LOCAL
        own = OWN.pack(SPAN_ID, span_id, START, begun[0][1] + epoch_ns, END, begun[-1][1] + epoch_ns)
        said = tuple(self._told().items())
        spans += (_head(size, self._name, kind, flags, state, said, self._failure), within, own)
        return b"".join(spans)


class Exporter(OTLPSpanExporter):
    """Sends requests that have ended to ``endpoint``, as spans of ``resource``."""

    def __init__(self, endpoint: str | None, resource: Resource) -> None:
        super().__init__(endpoint=endpoint)
        (frame,) = encode_spans(
            [ReadableSpan("", INVALID_SPAN_CONTEXT, resource=resource, instrumentation_scope=SCOPE)]
        ).resource_spans
        (scope,) = frame.scope_spans
        scope.ClearField("spans")
        self._scope = scope.SerializeToString()
        frame.ClearField("scope_spans")
        self._of_resource = frame.SerializeToString()

    def _initialize_channel_and_stub(self) -> None:
        super()._initialize_channel_and_stub()  # type: ignore[no-untyped-call]
        # As the SDK's own, but for that it sends what is encoded.
        channel: Any = self._channel
        export = channel.unary_unary(EXPORT, response_deserializer=ExportTraceServiceResponse.FromString)
        self._client: Any = SimpleNamespace(Export=export)

    def _translate_data(self, data: Sequence[Any]) -> Any:
        # Encoded messages, one after the other, are one message with the fields of all.
        spans = [self._scope]
        for trace in data:
            spans.append(trace.spans())
            give_way()  # to who answers, under the same lock
        of_resource = self._of_resource + _field(ResourceSpans.SCOPE_SPANS_FIELD_NUMBER, b"".join(spans))
        return _field(ExportTraceServiceRequest.RESOURCE_SPANS_FIELD_NUMBER, of_resource)


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
        own = Resource.create(resource or {"service.name": config.service_name})
        self._exporter = exporter or Exporter(config.otlp_endpoint, own)
        self._processor = BatchSpanProcessor(self._exporter)

    def begin(self, metadata: Metadata) -> Trace | None:
        """Return a trace for a request that is to be recorded, else None."""
        for name, value in metadata:
            if name == TRACEPARENT:
                caller = FORMAT.fullmatch(value) if isinstance(value, str) else None
                if caller is not None:
                    return Trace(self, caller, _states(metadata)) if int(caller[3], 16) & SAMPLED else None
                break
        return Trace(self) if self._chance() < self._ratio else None

    def export(self, trace: Trace) -> None:
        """Queue a request that has ended, to be sent."""
        self._processor.on_end(cast(Any, trace))

    def flush(self) -> None:
        """Send what is queued now, in this thread."""
        self._processor.force_flush()

    @staticmethod
    def passed_on(metadata: Metadata, trace: Trace | None) -> Metadata:
        """Return the metadata of a request for who goes on with it: as below its span, or as not recorded."""
        ids = None if trace is None else trace.ids
        state = () if ids is None or not ids.parent_id else ("tracestate",)
        rest = [(key, value) for key, value in metadata if key not in (TRACEPARENT, "tracestate") or key in state]
        if ids is None:
            return [(TRACEPARENT, NOT_RECORDED), *rest]
        return [(TRACEPARENT, f"00-{ids.trace_id.hex()}-{ids.span_id.hex()}-{ids.flags:02x}"), *rest]

    def close(self, seconds: float) -> None:
        """Send what is left, and give up after ``seconds``."""
        flusher = Thread(target=self._processor.shutdown, name="featserve-traces", daemon=True)
        flusher.start()
        flusher.join(seconds)
        if flusher.is_alive():  # the collector does not answer: end the call that waits for it
            self._exporter.shutdown()


def _states(metadata: Metadata) -> list[str]:
    return [value for name, value in metadata if name == "tracestate" and isinstance(value, str)]


@lru_cache(MOST_HEADS)
def _head(
    size: int,
    name: str,
    kind: Span.SpanKind.ValueType,
    flags: int,
    trace_state: str,
    attributes: tuple[tuple[str, str | int], ...] = (),
    failure: str | None = None,
) -> bytes:
    """Return a span among those of a scope, up to its ids and times, ``size`` bytes that are to follow."""
    span = Span(
        name=name,
        kind=kind,
        flags=flags,
        trace_state=trace_state,
        attributes=[KeyValue(key=key, value=_value(value)) for key, value in attributes],
        status=None if failure is None else Status(code=Status.STATUS_CODE_ERROR, message=failure),
    )
    return _field(ScopeSpans.SPANS_FIELD_NUMBER, span.SerializeToString() + bytes(size))[:-size]


def _value(value: str | int) -> AnyValue:
    return AnyValue(string_value=value) if isinstance(value, str) else AnyValue(int_value=value)


def _field(number: int, message: bytes) -> bytes:
    """Return an encoded message as a field of another, which is encoded as bytes are."""
    return bytes([number << 3 | LENGTH_DELIMITED]) + BytesValue(value=message).SerializeToString()[1:]
