"""The Python client: columns in, a matrix out, over gRPC.

Needs only grpcio, protobuf and NumPy, and knows neither engine nor store. It fetches the schema of a service once and
again when an answer says that it follows another.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from datetime import datetime
from itertools import cycle
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from featserve import errors
from featserve._proto import serving_pb2 as pb
from featserve.batch import Pushed, Written
from featserve.errors import FeatserveError, InvalidRequest, invalid
from featserve.frames import Frame, request_of, rows_of
from featserve.matrix import FeatureMatrix
from featserve.schema import ServiceSchema, ServiceSummary
from featserve.stages import Stages
from featserve.tls import advice
from featserve.types import Type, to_us
from featserve.wire import (
    FULL_METHOD,
    decode_error,
    decode_events,
    decode_matrix,
    decode_schema,
    decode_stages,
    decode_view,
    encode_column,
    encode_push,
    encode_rows,
)

Answer = TypeVar("Answer")


def _repeated(on: list[str], *methods: str, **more: object) -> dict[str, object]:
    """Return gRPC's settings of these methods, or of all that are not named: on which codes they are repeated."""
    service = {"service": "featserve.v1.FeatureServingService"}
    backoff = {"initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 3}
    return {
        "name": [service | {"method": method} for method in methods] or [service],
        "retryPolicy": {"maxAttempts": 5, **backoff, "retryableStatusCodes": on},
        **more,
    }


RETRIES = json.dumps(
    {
        "methodConfig": [
            _repeated(["UNAVAILABLE", "CANCELLED"]),
            _repeated(["CANCELLED"], "PushEvents", waitForReady=True),
            _repeated(["CANCELLED"], "StreamEvents"),
        ],
        "retryThrottling": {"maxTokens": 1_000, "tokenRatio": 1},
    }
)
"""gRPC's own service config: a method is safe to repeat, as a row written twice is the same row, but for pushes.

An event without an id that is pushed twice counts twice. So a push is repeated only where the server has not begun with
it, which is what CANCELLED says, whether grpcio itself or ours sends it. UNAVAILABLE does not say so, even where there
was no connection, and so a push waits for one. Four retries span three seconds, in which a server restarts; none are
made of a server that has refused 500 calls more than it has answered, which would have even more to refuse.
"""

OPTIONS = (
    ("grpc.service_config", RETRIES),
    ("grpc.enable_retries", 1),
    # By default a connection that failed is not tried again for a second, and then ever longer: no retry would see it.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


def connect(
    target: str,
    *,
    timeout: float = 5.0,
    connections: int = 1,
    max_concurrent: int | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> Client:
    """Return a client of the server at ``target`` ("host:port"); it connects when first used.

    ``timeout``: the seconds that a call may take, retries included, unless the call says otherwise. ``connections``:
    calls go over so many in turn; a server of several workers spreads them by connection. ``max_concurrent``: while so
    many calls are under way, one more is refused at once, as Overloaded; without, those that the server's connections
    have no room for wait until their deadline. ``credentials``: those of ``grpc.ssl_channel_credentials`` for a server
    with TLS; plaintext without.
    """
    return Client(
        target, timeout=timeout, connections=connections, max_concurrent=max_concurrent, credentials=credentials
    )


class Client:
    """A client of one server. Safe to use from several threads. Use it as a context manager, or ``close`` it."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float,
        connections: int,
        max_concurrent: int | None,
        credentials: grpc.ChannelCredentials | None,
    ) -> None:
        if connections < 1:
            raise invalid("connections", f"{connections} is less than 1")
        if max_concurrent is not None and max_concurrent < 1:
            raise invalid("max_concurrent", f"{max_concurrent} is less than 1")
        self._target, self._timeout = target, timeout
        self._under_way = nullcontext() if max_concurrent is None else _Room(max_concurrent, target)
        # gRPC shares the connection of channels that are alike, unless each has its own pool.
        options = OPTIONS if connections == 1 else (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        self._channels = [
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
            for _ in range(connections)
        ]
        self._next_channel = cycle(self._channels).__next__
        self._next_get = cycle(
            self._unary("GetFeatures", pb.GetFeaturesRequest, pb.GetFeaturesResponse) for _ in self._channels
        ).__next__
        self._schemas: dict[str, ServiceSchema] = {}
        self._described_as: dict[tuple[str, str], dict[str, Type]] = {}

    def get(
        self,
        service: str,
        keys: Frame,
        *,
        request: Frame | None = None,
        as_of: datetime | None = None,
        event_times: bool = False,
        at_least: str = "",
        stages: Stages | None = None,
        timeout: float | None = None,
    ) -> FeatureMatrix:
        """Return the features of ``service`` for a batch of entities, one row for each.

        ``service``: ``name``, ``name@version`` or ``name#hash``. ``keys``: its key columns as a mapping of lists or
        NumPy arrays, or a frame (pandas, polars, pyarrow) that has them. ``request``: likewise the columns that its
        transforms need from the request; a frame of keys may hold them, too. ``as_of``: an instant not after the
        server's clock; now by default. ``at_least``: the token of a write (``Written.token``), which the answer then
        holds, whichever worker gives it; one that lags waits for it until the deadline. ``stages``: gets the stages
        that the server went through. ``timeout``: seconds. Raises an error of ``featserve.errors``.
        """
        deadline = self._deadline(timeout)
        schema = self._schemas.get(service)
        fresh = schema is None
        while True:
            if schema is None:
                schema = self._describe(service, deadline)
            try:
                message = self._request(service, schema, keys, request, as_of, event_times)
                message.include_stages, message.at_least = stages is not None, at_least
                answer = self._call(self._next_get(), message, deadline)
            except InvalidRequest:
                if fresh or self._describe(service, deadline).id == schema.id:
                    raise
                answer = None  # the service changed what it asks for
            if answer is not None and answer.schema_id == schema.id:
                if stages is not None:
                    stages.take(decode_stages(answer.stages))
                return decode_matrix(answer, schema)
            schema, fresh = None, True

    def _request(
        self,
        service: str,
        schema: ServiceSchema,
        keys: Frame,
        request: Frame | None,
        as_of: datetime | None,
        event_times: bool,
    ) -> pb.GetFeaturesRequest:
        checked, columns = request_of(keys, request, schema)
        return pb.GetFeaturesRequest(
            service=service,
            keys=[encode_column(name, column) for name, column in checked.columns.items()],
            as_of_us=None if as_of is None else to_us(as_of),
            include_event_times=event_times,
            request_columns=[encode_column(name, column) for name, column in columns.items()],
        )

    def describe(self, service: str, *, timeout: float | None = None) -> ServiceSchema:
        """Return the schema of a service, as the server has it now."""
        return self._describe(service, self._deadline(timeout))

    def _describe(self, service: str, deadline: float) -> ServiceSchema:
        method = self._unary("DescribeService", pb.DescribeServiceRequest, pb.DescribeServiceResponse)
        schema = decode_schema(self._call(method, pb.DescribeServiceRequest(service=service), deadline).schema)
        self._schemas[service] = schema
        return schema

    def list_services(self, *, timeout: float | None = None) -> list[ServiceSummary]:
        """Return every service version that the server can be asked for."""
        method = self._unary("ListServices", pb.ListServicesRequest, pb.ListServicesResponse)
        answer = self._call(method, pb.ListServicesRequest(), self._deadline(timeout))
        return [
            ServiceSummary(s.name, s.version, s.hash, s.promoted, s.owner, s.description, s.features, tuple(s.keys))
            for s in answer.services
        ]

    def write(
        self, view: str, rows: Frame, *, event_time: Any, known_at: Any | None = None, timeout: float | None = None
    ) -> Written:
        """Write rows of a feature view, all or none; on return they survive as the server's durability says.

        ``rows``: the view's key columns and features, a mapping or a frame. ``event_time`` and ``known_at``: the name
        of a column of ``rows``, one datetime for all of them, or one for each; without ``known_at`` a row is known from
        its arrival, or from its event time where that is later.
        """
        method = self._unary("WriteRows", pb.WriteRowsRequest, pb.WriteRowsResponse)
        deadline = self._deadline(timeout)
        answer = self._described(
            lambda: self._columns(view, deadline),
            ("view", view),
            lambda columns: self._call(
                method, encode_rows(view, rows_of(rows, columns, event_time, known_at)), deadline
            ),
        )
        return Written(answer.rows, answer.stored, answer.token)

    def _described(
        self,
        describe: Callable[[], dict[str, Type]],
        what: tuple[str, str],
        send: Callable[[dict[str, Type]], Answer],
    ) -> Answer:
        """Return the answer to what is sent with the columns that ``what`` has, or has now, where it was refused."""
        columns = self._described_as.get(what)
        if columns is not None:
            try:
                return send(columns)
            except InvalidRequest:
                if describe() == columns:
                    raise
        return send(describe())  # the name may now mean another version

    def push(
        self,
        source: str,
        events: Frame,
        *,
        event_time: Any,
        known_at: Any | None = None,
        timeout: float | None = None,
    ) -> Pushed:
        """Count events in the windows of every view over their source, all or none.

        ``source``: ``name`` or ``name@version``. ``events``: its fields as a mapping of lists or arrays, or a frame.
        ``event_time``, ``known_at``: as in ``write``. Events of a source with an event id may be pushed again, each
        counts once; without, a push whose answer was lost may have been counted.
        """
        method = self._unary("PushEvents", pb.PushEventsRequest, pb.PushEventsResponse)
        deadline = self._deadline(timeout)
        answer = self._described(
            lambda: self._fields(source, deadline),
            ("events", source),
            lambda columns: self._call(
                method, encode_push(source, rows_of(events, columns, event_time, known_at)), deadline
            ),
        )
        return Pushed(answer.events, answer.counted, answer.duplicates, answer.late, answer.token)

    def push_stream(
        self,
        source: str,
        batches: Iterable[Frame],
        *,
        event_time: Any,
        known_at: Any | None = None,
        timeout: float | None = None,
    ) -> Pushed:
        """Push many batches on one stream, each of them all or none, in order; see ``push`` and ``write_stream``."""
        columns = self._fields(source, self._deadline(timeout))
        messages = (encode_push(source, rows_of(events, columns, event_time, known_at)) for events in batches)
        return self.push_messages(messages, timeout)

    def push_messages(self, messages: Iterable[pb.PushEventsRequest], timeout: float | None = None) -> Pushed:
        """Push batches that are already encoded (``wire.encode_push``) on one stream; see ``write_messages``."""
        answer = self._streamed("StreamEvents", pb.StreamEventsRequest, pb.StreamEventsResponse, messages, timeout)
        return Pushed(answer.events, answer.counted, answer.duplicates, answer.late, answer.token)

    def write_stream(
        self,
        view: str,
        batches: Iterable[Frame],
        *,
        event_time: Any,
        known_at: Any | None = None,
        timeout: float | None = None,
    ) -> Written:
        """Write many batches on one stream, each of them all or none, in order.

        The first batch that is refused ends it with its error, whose ``metadata["messages_written"]`` counts those
        before it, which stay written. ``timeout``: seconds for the whole stream; none by default.
        """
        columns = self._columns(view, self._deadline(timeout))
        messages = (encode_rows(view, rows_of(rows, columns, event_time, known_at)) for rows in batches)
        return self.write_messages(messages, timeout)

    def write_messages(self, messages: Iterable[pb.WriteRowsRequest], timeout: float | None = None) -> Written:
        """Write batches that are already encoded (``wire.encode_rows``) on one stream.

        What their iterator raises ends the stream and is raised here; the messages before it stay written.
        """
        answer = self._streamed("StreamRows", pb.StreamRowsRequest, pb.StreamRowsResponse, messages, timeout)
        return Written(answer.rows, answer.stored, answer.token)

    def _streamed(self, name: str, request: Any, answer: Any, messages: Iterable[object], timeout: float | None) -> Any:
        method = self._next_channel().stream_unary(FULL_METHOD + name, request.SerializeToString, answer.FromString)
        failed: list[Exception] = []
        try:
            with self._under_way:
                found = method(_watched(request, messages, failed), timeout=timeout, metadata=_trace_context())
        except grpc.RpcError as error:
            raise translated(error, self._target) from None
        if failed:
            raise failed[0]
        return found

    def _columns(self, view: str, deadline: float) -> dict[str, Type]:
        """Return the columns that a row of a view has, as the server has them now."""
        method = self._unary("DescribeView", pb.DescribeViewRequest, pb.DescribeViewResponse)
        columns = decode_view(self._call(method, pb.DescribeViewRequest(view=view), deadline))
        self._described_as["view", view] = columns
        return columns

    def _fields(self, source: str, deadline: float) -> dict[str, Type]:
        """Return the columns that an event of a source has, as the server has them now."""
        method = self._unary("DescribeEvents", pb.DescribeEventsRequest, pb.DescribeEventsResponse)
        columns = decode_events(self._call(method, pb.DescribeEventsRequest(source=source), deadline))
        self._described_as["events", source] = columns
        return columns

    def _deadline(self, timeout: float | None) -> float:
        """Return when a call of the user's is over, in seconds of time.monotonic(), however many requests it takes."""
        return time.monotonic() + (self._timeout if timeout is None else timeout)

    def _unary(self, name: str, request: Any, answer: type[Answer]) -> Callable[..., Answer]:
        method: Callable[..., Answer] = self._next_channel().unary_unary(
            FULL_METHOD + name,
            request.SerializeToString,
            answer.FromString,  # type: ignore[attr-defined]
        )
        return method

    def _call(self, method: Callable[..., Answer], request: object, deadline: float) -> Answer:
        try:
            with self._under_way:
                return method(request, timeout=deadline - time.monotonic(), metadata=_trace_context())
        except grpc.RpcError as error:
            raise translated(error, self._target) from None

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Room:
    """Room for so many calls at once; begin each in a ``with``, which raises Overloaded where there is none."""

    def __init__(self, calls: int, target: str) -> None:
        self._left = threading.Semaphore(calls)
        self._full = f"{calls:,} calls to {target} are under way, the most of this client (max_concurrent)"

    def __enter__(self) -> None:
        if not self._left.acquire(blocking=False):
            raise errors.Overloaded(f"{self._full}; try again later, or do without")

    def __exit__(self, *_: object) -> None:
        self._left.release()


def _watched(kind: Any, messages: Iterable[object], failed: list[Exception]) -> Iterator[Any]:
    """Yield the messages as the stream carries them; keep what their iterator raises: gRPC would only log it."""
    try:
        for message in messages:
            yield kind(request=message)
    except Exception as error:  # noqa: BLE001 - the top of a background loop
        failed.append(error)


def _trace_context() -> tuple[tuple[str, str], ...]:
    """Return the headers that make the server's spans children of the caller's, as W3C's Trace Context says.

    Empty where the program does not trace: then it has not loaded OpenTelemetry, and neither does this.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return ()
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ()
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    headers = (("traceparent", parent),)
    state = context.trace_state.to_header()
    return (*headers, ("tracestate", state)) if state else headers


# For an error without details, as one made by gRPC itself is.
_BY_CODE: Mapping[grpc.StatusCode, type[FeatserveError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.CANCELLED: errors.Overloaded,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
}


def translated(error: Any, target: str) -> FeatserveError:
    """Return a gRPC error as the error of the tree that the server raised."""
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    kind = _BY_CODE.get(error.code(), errors.ServingError)
    if details is None:
        if "message larger than max" in (error.details() or ""):  # gRPC has no other sign of it
            return errors.TooLarge(f"{target}: {error.details()}. Send several requests")
        return kind(f"{target}: {error.code().name}: {error.details()}{advice(error.details() or '')}")
    return decode_error(details, str(error.details()), kind)
