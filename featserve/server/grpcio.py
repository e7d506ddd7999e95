"""The service on grpcio: grpc.aio, one event loop, raw bytes in and out.

A thin adapter: it counts calls, hands over metadata and deadline, runs writes in one writer thread, and turns errors
into statuses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from featserve.config import ServerConfig
from featserve.errors import DeadlineExceeded, FeatserveError, NotBegun, Overloaded, ServingError, invalid
from featserve.server.forward import FORWARDED, TAKEN_KEY, Forward
from featserve.server.limit import TimeLimit
from featserve.server.meter import Load
from featserve.server.service import READS, SERVICE_NAME, WRITE_STREAMS, WRITES, Call, Service, WriteStream
from featserve.server.status import DETAILS_KEY, code_of, failed
from featserve.server.telemetry import Telemetry
from featserve.server.unseen import Unseen
from featserve.store.follow import Behind
from featserve.tls import Certificates

HEALTH_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
Context = grpc.aio.ServicerContext[bytes, bytes]

Answer = TypeVar("Answer")

QUIET_S, MAX_SETTLING_S = 0.1, 1.0
"""A server that was told to stop takes on what arrives until nothing has for so long, or for so long at most."""

AWAY = ("grpc-retry-pushback-ms", "800")
"""Tells gRPC in the client when to make a refused call again: once its connection is closed, and no sooner. Four times
this is as long as other calls are repeated."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}

UNLIMITED = nullcontext()

METADATA: ContextVar[tuple[tuple[str, str | bytes], ...]] = ContextVar("metadata")
"""The metadata of a call, in its task; gRPC would make them anew for each who asks."""


class GrpcioServer:
    """A grpc.aio server of the service, with standard health checking and reflection."""

    def __init__(
        self,
        service: Service,
        config: ServerConfig,
        telemetry: Telemetry,
        forward: Forward | None = None,
        *,
        beside: Load | None = None,
        for_workers: bool = False,
    ) -> None:
        """Serve within the limits of ``config``; what another transport has on its hands, ``beside``, counts, too.

        ``forward``: where writes go, instead of the store here. ``for_workers``: callers are those, which send nothing
        until they are told that a call is taken on.
        """
        self._service, self._telemetry, self._forward = service, telemetry, forward
        self._config = config
        self._default_deadline_s = config.default_deadline_ms / 1_000
        self._time_limit = TimeLimit(self._default_deadline_s)
        self._most_bytes, self._most_calls = config.max_message_mb << 20, config.max_concurrent
        self._beside, self._for_workers = beside, for_workers
        self._methods = _Methods(self._handlers())
        self._seen = self._refused = 0
        self._unseen: Unseen | None = None
        self.turn_ns = None
        telemetry.count(self)
        self._writer = ThreadPoolExecutor(1, "featserve-writer")
        self._health = Health(("", SERVICE_NAME))
        self.under_way: set[asyncio.Task[Any]] = set()
        """The calls that were taken on and have not ended."""
        self.refusing = False
        """Whether calls that come now are refused."""

    @property
    def active(self) -> int:
        """How many calls are under way."""
        return len(self.under_way)

    @property
    def shed(self) -> int:
        """How many calls were refused as too many were under way, or ended by gRPC as too many waited for that."""
        return self._refused + (0 if self._unseen is None else self._unseen.ended)

    def look(self) -> None:
        """Look how many calls gRPC has ended by itself; in turns of the event loop, every now and then."""
        if self._unseen is not None:
            # One over ``maximum_concurrent_rpcs`` is looked up, but its handler is not called.
            self._unseen.look(self._seen + self._methods.others, idle=not self.under_way)

    async def start(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Listen, with TLS where the settings say so; return the port.

        Raises ServingError where the address cannot be had, DefinitionError for a wrong file of TLS. ``reuse_port``:
        other processes may listen on it, too, and the kernel spreads connections over all of them.
        """
        shown = certificates(self._config)
        credentials = None if shown is None else shown.credentials()
        return await self.listen(f"{host}:{port}", credentials, reuse_port=reuse_port)

    async def listen(
        self, address: str, credentials: grpc.ServerCredentials | None = None, *, reuse_port: bool = False
    ) -> int:
        """Listen on ``host:port`` or ``unix:path``, in plaintext without ``credentials``; see ``start``."""
        self._server = self._open(reuse_port)
        try:
            if credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise cannot_listen(address, error, secured=credentials is not None) from None
        await self._server.start()
        return bound

    def _open(self, reuse_port: bool) -> grpc.aio.Server:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._most_bytes),
                ("grpc.max_send_message_length", self._most_bytes),
                ("grpc.so_reuseport", int(reuse_port)),
                ("grpc.enable_channelz", 1),
                # What the event loop cannot even take on in time to refuse it, gRPC ends itself, as CANCELLED.
                ("grpc.server.max_pending_requests", self._most_calls),
                ("grpc.server.max_pending_requests_hard_limit", self._most_calls),
            ],
            # Bounds what ``_counted`` does not: health, reflection, and calls that are being refused.
            maximum_concurrent_rpcs=2 * self._most_calls,
        )
        self._unseen = Unseen(self._most_calls)
        names = (SERVICE_NAME, HEALTH_NAME, reflection.SERVICE_NAME)
        server.add_generic_rpc_handlers((self._methods,))
        only_generic: Any = _OnlyGeneric(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, only_generic)
        reflected: Any = reflection.aio.ReflectionServicer(names)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, only_generic)  # type: ignore[no-untyped-call]
        return server

    async def drain(self, seconds: float) -> None:
        """Say NOT_SERVING, take no new calls, let those in flight finish for up to ``seconds``, then end them."""
        self.say_stopping()
        # Stopping would end, as CANCELLED, what has arrived and waits in gRPC's backlog: that is taken on first.
        loop = asyncio.get_running_loop()
        began, before = loop.time(), -1
        while before != self._seen and loop.time() < began + min(seconds, MAX_SETTLING_S):
            before = self._seen
            await asyncio.sleep(QUIET_S)
        await self.stop(seconds)

    def say_stopping(self) -> None:
        """Say NOT_SERVING to who asks for the health."""
        self._health.stopping.set()

    async def stop(self, seconds: float) -> None:
        """End: let calls in flight finish for up to ``seconds``."""
        await self._server.stop(seconds)
        self._refused, self._unseen = self.shed, None  # gRPC does not tell of a server that has ended
        self._writer.shutdown()

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        # To the adapter every request is a stream, so that a call counts before its message is read.
        service = self._service
        handlers: dict[str, Any] = {
            name: grpc.stream_unary_rpc_method_handler(
                self._counted(name, partial(self._unary, name, name in WRITES, partial(method, service)))
            )
            for name, method in (READS | WRITES).items()
        }
        streamed = self._counted("StreamFeatures", self._stream_features)
        handlers["StreamFeatures"] = grpc.stream_stream_rpc_method_handler(streamed)
        for name, start in WRITE_STREAMS.items():
            written = partial(self._stream_writes, name, partial(start, service))
            handlers[name] = grpc.stream_unary_rpc_method_handler(self._counted(name, written))
        if self._forward is not None:
            handlers |= {
                name: grpc.stream_unary_rpc_method_handler(
                    self._counted(name, partial(self._passed_on, self._forward, name))
                )
                for name in FORWARDED
            }
        return handlers

    def _counted(
        self, name: str, handle: Callable[[Context], Awaitable[Answer]]
    ) -> Callable[[object, Context], Awaitable[Answer]]:
        """Return the handler of a method: ``handle``, unless too many calls are under way; errors as statuses."""

        async def counted(requests: object, context: Context) -> Answer:
            self._seen += 1
            if self.refusing:
                await self._refuse(name, context, stopping(), AWAY)
            if self.active + (0 if self._beside is None else self._beside.active) >= self._most_calls:
                self._refused += 1
                await self._refuse(name, context, overloaded(self._most_calls))
            task = asyncio.current_task()
            assert task is not None
            self.under_way.add(task)
            try:
                if self._for_workers:
                    await context.send_initial_metadata(((TAKEN_KEY, "1"),))
                return await handle(context)
            except grpc.aio.InternalError:  # what gRPC raises where the caller is gone
                raise asyncio.CancelledError from None
            except Exception as error:  # noqa: BLE001 - the top of a request
                await abort(context, error)
            finally:
                self.under_way.discard(task)

        return counted

    async def _refuse(self, name: str, context: Context, error: FeatserveError, *more: tuple[str, str]) -> NoReturn:
        self._telemetry.refuse(name, code_of(error))
        await abort(context, error, *more)

    async def _unary(self, name: str, writes: bool, method: Callable[[bytes, Call], bytes], context: Context) -> bytes:
        remaining_s = context.time_remaining()
        call = self._call(context, remaining_s)
        with self._telemetry.watch(name, call):
            # A deadline that the caller set ends the call by itself.
            try:
                with self._time_limit.begin() if remaining_s is None else UNLIMITED:
                    data = await message(context)
                    if data is None:
                        raise invalid("request", "the call ended without one")
                    if writes:
                        return await self._in_writer(method, data, call)
                    try:
                        return method(data, call)
                    except Behind as behind:
                        return await _once_caught_up(behind, method, data, call)
            except TimeoutError:
                raise DeadlineExceeded(f"the default deadline, {self._default_deadline_s:g} s, passed") from None

    async def _passed_on(self, forward: Forward, name: str, context: Context) -> bytes:
        remaining_s = context.time_remaining()
        call = self._call(context, remaining_s)
        with self._telemetry.watch(name, call):
            if call.record is not None and call.record.stages is not None:
                call.record.stages.begin("forward")
            limit_s = call.remaining_s if name in WRITES else remaining_s  # a stream may go on for ever
            return await forward.call(name, self._telemetry.passed_on(call), partial(message, context), limit_s)

    async def _in_writer(self, method: Callable[[bytes, Call], Answer], data: bytes, call: Call) -> Answer:
        """Run ``method`` in the writer thread when its turn comes, with what is then left of the deadline."""
        asked = time.monotonic()
        if call.record is not None and call.record.stages is not None:
            call.record.stages.begin("queue")

        def turn() -> Answer:
            assert call.remaining_s is not None
            return method(data, replace(call, remaining_s=call.remaining_s - (time.monotonic() - asked)))

        # A call that is cancelled before its turn is not run.
        return await asyncio.get_running_loop().run_in_executor(self._writer, turn)

    async def _stream_features(self, context: Context) -> None:
        while (data := await message(context)) is not None:
            call = self._call(context, context.time_remaining())
            with self._telemetry.watch("StreamFeatures", call):
                try:
                    answer = self._service.stream_features(data, call)
                except Behind as behind:
                    answer = await _once_caught_up(behind, self._service.stream_features, data, call)
            await context.write(answer)

    async def _stream_writes(self, name: str, start: Callable[[], WriteStream], context: Context) -> bytes:
        stream = start()
        while (data := await message(context)) is not None:
            call = self._call(context, context.time_remaining())
            with self._telemetry.watch(name, call):
                await self._in_writer(stream.add, data, call)
        return stream.finish()

    def _call(self, context: Context, remaining_s: float | None) -> Call:
        return Call(METADATA.get(), self._default_deadline_s if remaining_s is None else remaining_s)


class _OnlyGeneric:
    """A server as the generated code sees it, which does not register methods one by one.

    For each call grpc.aio goes through all methods that are registered; together they took a tenth of the time.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: object) -> None:
        pass


class _Methods(grpc.GenericRpcHandler):
    """The methods of the service, by name; keeps each call's metadata. ``others``: calls that are none of them."""

    def __init__(self, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        self.others = 0
        self._handlers = {f"/{SERVICE_NAME}/{name}": handler for name, handler in handlers.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        METADATA.set(handler_call_details.invocation_metadata)
        handler = self._handlers.get(handler_call_details.method)
        self.others += handler is None
        return handler


class Health(health_pb2_grpc.HealthServicer):
    """Standard health checking of the services ``names``: SERVING until ``stopping``, which ends every watch, too.

    A watch that went on would hold up the drain to its limit.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.stopping = asyncio.Event()
        self._names = names

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802 - the protocol's
        """Answer with the status, NOT_FOUND for an unknown service."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r}")
        return self._status(request.service)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Send the status now and when it changes."""
        await context.write(self._status(request.service))
        await self.stopping.wait()
        await context.write(self._status(request.service))

    def _status(self, name: str) -> health_pb2.HealthCheckResponse:
        statuses = health_pb2.HealthCheckResponse
        if name not in self._names:
            return statuses(status=statuses.SERVICE_UNKNOWN)
        return statuses(status=statuses.NOT_SERVING if self.stopping.is_set() else statuses.SERVING)


def certificates(config: ServerConfig) -> Certificates | None:
    """Return what a server with TLS shows, None for plaintext. Raises DefinitionError naming a wrong file."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    return Certificates(config.tls_certificate, config.tls_key, config.tls_client_ca)


async def message(context: Context) -> bytes | None:
    """Return the next message of a call, None after the last."""
    data: Any = await context.read()
    return None if data is grpc.aio.EOF else data


async def _once_caught_up(behind: Behind, method: Callable[[bytes, Call], bytes], data: bytes, call: Call) -> bytes:
    """Run a read again once the store holds the write that it asks for."""
    if call.record is not None and call.record.stages is not None:
        call.record.stages.begin("catch up")
    await asyncio.wrap_future(behind.caught_up)
    return method(data, call)


async def abort(context: Context, error: Exception, *more: tuple[str, str]) -> NoReturn:
    """End a call with an error's status, and ``more`` metadata; log what is our fault."""
    status = failed(error)
    try:
        await context.abort(_CODES[status.code], status.message, ((DETAILS_KEY, status.SerializeToString()), *more))
    except grpc.aio.InternalError:  # as above
        raise asyncio.CancelledError from None


def overloaded(most_calls: int) -> Overloaded:
    """Return what a call over the limit is refused with."""
    return Overloaded(f"{most_calls:,} calls are under way, the most here ([server] max_concurrent); try again later")


def stopping() -> NotBegun:
    """Return what a call is refused with that comes when its connection is about to be closed."""
    return NotBegun("the server is shutting down, and has not begun with this call; make it again")


def cannot_listen(address: str, why: Exception, *, secured: bool = False) -> ServingError:
    """Return the error of an address that cannot be had; ``secured``: or of a certificate that gRPC does not take."""
    kind = ", or a certificate of a common kind, RSA or ECDSA over P-256" if secured else ""
    return ServingError(f"cannot listen on {address}: {why}. Choose another [server] port{kind}")
