"""A collector of traces: the OTLP service itself, on a port of its own, keeping the spans that it is sent."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from tests.serving import until


class Collector(TraceServiceServicer):
    """Receives spans until it is closed, in so many ``calls``. ``hangs``: takes what it is sent, and never answers."""

    def __init__(self, *, hangs: bool = False, port: int = 0) -> None:
        self.spans: list[Any] = []
        self.resource: dict[str, Any] = {}
        self.calls = 0
        self._held: Any = None
        self._released = threading.Event()
        self._hangs = hangs
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:  # noqa: N802 - the protocol's name
        self.calls += 1
        if self._hangs:
            self._held = self._held or context
            self._released.wait()
        for of_resource in request.resource_spans:
            self.resource = attributes(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                self.spans += of_scope.spans
        return ExportTraceServiceResponse()

    def holds(self) -> bool:
        """Say whether who sent the first spans still waits for an answer."""
        return self._held is not None and bool(self._held.is_active())

    def trees(self, count: int) -> list[Tree]:
        """Wait for the spans of ``count`` requests; return all that have come, in order of their start."""

        def come() -> list[Tree]:
            roots = [span for span in self.spans.copy() if span.kind == span.SPAN_KIND_SERVER]
            return sorted((Tree(root, self.spans.copy()) for root in roots), key=lambda t: t.span.start_time_unix_nano)

        until(f"{count} requests are traced", lambda: len(come()) >= count)
        return come()

    def close(self) -> None:
        """Be gone; what is held is answered to nobody."""
        self._released.set()
        self._server.stop(None).wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Tree:
    """A server's span, with the spans of its stages in order."""

    def __init__(self, span: Any, spans: list[Any]) -> None:
        self.span = span
        self.attributes = attributes(span.attributes)
        stages = [s for s in spans if s.parent_span_id == span.span_id and s.trace_id == span.trace_id]
        self.stages = sorted(stages, key=lambda s: (s.start_time_unix_nano, s.end_time_unix_nano))

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self.stages]


def attributes(pairs: Any) -> dict[str, Any]:
    """Return attributes by name."""
    return {pair.key: _value(pair) for pair in pairs}


def _value(pair: KeyValue) -> Any:
    value: AnyValue = pair.value
    return getattr(value, str(value.WhichOneof("value")))
