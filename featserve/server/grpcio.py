"""The service on grpcio: grpc.aio, one event loop, raw bytes in and out.

A thin adapter: it hands over metadata and deadline, runs writes in one writer thread, and turns errors into statuses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from featserve._proto import serving_pb2 as pb
from featserve.config import ServerConfig
from featserve.errors import FeatserveError, ServingError, StoreError
from featserve.server.service import READS, WRITES, Call, Service
from featserve.server.status import DETAILS_KEY, encode_error

log = logging.getLogger("featserve.server")

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["FeatureServingService"].full_name
Context = grpc.aio.ServicerContext[bytes, bytes]

Answer = TypeVar("Answer")

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class GrpcioServer:
    """A grpc.aio server of the service, with standard health checking and reflection."""

    def __init__(self, service: Service, config: ServerConfig) -> None:
        self._service = service
        self._default_deadline_s = config.default_deadline_ms / 1_000
        self._writer = ThreadPoolExecutor(1, "featserve-writer")
        size = config.max_message_mb << 20
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=config.max_concurrent,
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._server.add_generic_rpc_handlers((self._handlers(),))

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port. Raises ServingError where the address cannot be had."""
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise ServingError(
                f"cannot listen on {host}:{port}: another process does, or the address is not this machine's; choose "
                "another [server] host and port, or `featserve serve --port`"
            ) from error
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def drain(self, seconds: float) -> None:
        """Say NOT_SERVING, take no new calls, let those in flight finish for up to ``seconds``, then end them."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(seconds)
        self._writer.shutdown()

    async def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    def _handlers(self) -> grpc.GenericRpcHandler:
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(partial(self._read, partial(method, self._service)))
            for name, method in READS.items()
        }
        handlers |= {
            name: grpc.unary_unary_rpc_method_handler(partial(self._write, partial(method, self._service)))
            for name, method in WRITES.items()
        }
        handlers["StreamFeatures"] = grpc.stream_stream_rpc_method_handler(self._stream_features)
        handlers["StreamRows"] = grpc.stream_unary_rpc_method_handler(self._stream_rows)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    def _call(self, context: Context) -> Call:
        remaining = context.time_remaining()
        return Call(context.invocation_metadata() or (), self._default_deadline_s if remaining is None else remaining)

    async def _read(self, method: Callable[[bytes, Call], bytes], data: bytes, context: Context) -> bytes:
        try:
            return method(data, self._call(context))
        except Exception as error:  # noqa: BLE001 - the top of a request
            await abort(context, error)

    async def _write(self, method: Callable[[bytes, Call], bytes], data: bytes, context: Context) -> bytes:
        try:
            return await self._in_writer(method, data, context)
        except Exception as error:  # noqa: BLE001 - the top of a request
            await abort(context, error)

    async def _in_writer(self, method: Callable[[bytes, Call], Answer], data: bytes, context: Context) -> Answer:
        """Run ``method`` in the writer thread; the deadline is read there, after the wait for its turn."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writer, lambda: method(data, self._call(context)))

    async def _stream_features(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async for data in requests:
            try:
                yield self._service.stream_features(data, self._call(context))
            except Exception as error:  # noqa: BLE001 - the top of a request
                await abort(context, error)

    async def _stream_rows(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        stream = self._service.stream_rows()
        try:
            async for data in requests:
                await self._in_writer(stream.add, data, context)
        except Exception as error:  # noqa: BLE001 - the top of a request
            await abort(context, error)
        return stream.finish()


async def abort(context: Context, error: Exception) -> NoReturn:
    """End a call with an error's status; log what is our fault."""
    if not isinstance(error, FeatserveError):
        log.error("a request failed: %s", error, exc_info=error)
        error = ServingError(f"internal error: {error.__class__.__name__}")
    elif isinstance(error, StoreError):
        log.error("%s", error)
    status = encode_error(error)
    await context.abort(_CODES[status.code], status.message, ((DETAILS_KEY, status.SerializeToString()),))
