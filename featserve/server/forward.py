"""Writes that a worker takes, passed on to the one process that writes the store.

Comes in: a call of any write, as bytes. Goes out: the writer's answer or error, unchanged, once the worker's own store
holds what was written. Metadata and deadline go along. Knows of the messages only that each answer has a token.

The writer says when it takes a call on, and nothing is sent before: while it is replaced, calls wait for the next one,
and those that it has not begun are made again, pushes too.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from featserve._proto import serving_pb2 as pb
from featserve.errors import DeadlineExceeded, FeatserveError, Overloaded, ServingError, Unavailable
from featserve.server.service import SERVICE_NAME, WAITED, WRITE_STREAMS, WRITES
from featserve.server.status import DETAILS_KEY
from featserve.store import OnlineStore
from featserve.store.follow import Follower, sequence_of
from featserve.wire import decode_error

OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A writer that died is back within a second or two.
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 200),
)
METHODS = pb.DESCRIPTOR.services_by_name["FeatureServingService"].methods_by_name
FORWARDED = (*WRITES, *WRITE_STREAMS)
"""The methods that write. To the wire a request is a stream of one, so all are passed on in the same way."""
GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)
"""What gRPC itself says of a server that is not there, was just about to go, or went while a message was being sent."""

AWAY = "the process that writes the store is being started again; reads go on. Try again"
SLOW = "the process that writes the store did not answer in time"
TAKEN_KEY = "featserve-taken"
"""What the writer's initial metadata has, which it sends when it has taken a call on."""
WRITER_S, OWN_S = 10.0, 2.0
"""How long a call waits at most for a writer, and an answer for the worker's own store to hold what was written."""
AGAIN_S = 0.02
"""How soon a call that was not taken on is made again."""

Metadata = Iterable[tuple[str, str | bytes]]


class Forward:
    """The way to the writer, which listens on a socket in the file system. Use it in one event loop."""

    def __init__(self, socket: Path, store: OnlineStore, follower: Follower) -> None:
        self._store, self._follower = store, follower
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", OPTIONS)
        self._methods: dict[str, Any] = {
            name: self._channel.stream_unary(f"/{SERVICE_NAME}/{name}") for name in FORWARDED
        }
        self._answers: dict[str, Any] = {name: GetMessageClass(METHODS[name].output_type) for name in FORWARDED}

    async def call(
        self, name: str, metadata: Metadata, read: Callable[[], Awaitable[bytes | None]], seconds: float | None
    ) -> bytes:
        """Pass on a call of ``name`` that may take ``seconds``, message by message; return the answer.

        ``read``: returns the next message, None after the last. Raises the writer's error, or Unavailable where there
        is no writer.
        """
        clock = asyncio.get_running_loop().time
        ends_s = clock() + (math.inf if seconds is None else seconds)
        call = await self._taken(name, metadata, ends_s)
        try:
            with suppress(asyncio.InvalidStateError):  # the writer has ended the call
                while (data := await read()) is not None:
                    await call.write(data)
                await call.done_writing()
            answer: bytes = await call
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None
        finally:
            call.cancel()
        # Who writes and then reads by one connection finds what was written; what is committed is told in time.
        if token := self._answers[name].FromString(answer).token:
            reached = self._follower.reached(sequence_of(token, self._store), min(WAITED * (ends_s - clock()), OWN_S))
            with suppress(DeadlineExceeded):
                await asyncio.wrap_future(reached)
        return answer

    async def _taken(self, name: str, metadata: Metadata, ends_s: float) -> Any:
        """Return a call that the writer has taken on, before any message; Unavailable where none does in time."""
        clock = asyncio.get_running_loop().time
        ours = [(key, value) for key, value in metadata if not key.startswith(("grpc-", "user-agent"))]
        gives_up_s = clock() + min(WAITED * (ends_s - clock()), WRITER_S)
        while True:
            seconds = None if ends_s == math.inf else ends_s - clock()
            call = self._methods[name](timeout=seconds, metadata=ours, wait_for_ready=True)
            taken = False
            try:
                async with asyncio.timeout_at(gives_up_s):
                    taken = TAKEN_KEY in await call.initial_metadata()
                    if taken:
                        return call
                    await call  # raises what it was refused with
            except TimeoutError:
                there = self._channel.get_state() is grpc.ChannelConnectivity.READY
                raise (DeadlineExceeded(SLOW) if there else Unavailable(AWAY)) from None
            except grpc.aio.AioRpcError as error:
                if not isinstance(refused := _translated(error), Unavailable) or clock() + AGAIN_S > gives_up_s:
                    raise refused from None
            finally:
                if not taken:
                    call.cancel()
            await asyncio.sleep(AGAIN_S)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


def _translated(error: grpc.aio.AioRpcError) -> FeatserveError:
    """Return the error that the writer raised; gRPC itself makes those without details."""
    details = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
    message = error.details() or ""
    if isinstance(details, bytes):
        return decode_error(details, message, ServingError)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(SLOW)
    if error.code() in GONE:
        return Unavailable(AWAY)
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(f"the process that writes the store has too many calls; try again later: {message}")
    return ServingError(f"the process that writes the store says {error.code().name}: {message}")
