"""The service on pygrpc-native: HTTP/2 and gRPC framing in Rust, outside the interpreter's lock; plaintext only.

As thin an adapter as that to grpcio. One thread takes calls in batches and answers the reads; writes have a thread of
their own. Streams, health and reflection go through to a grpcio server behind it, on a socket in a folder that only
this user can open.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import tempfile
import threading
import time
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

from pygrpc_native import EVENT_CANCEL, NativeGrpcFront

from featserve._proto.errors_pb2 import ErrorStatus
from featserve.config import ServerConfig
from featserve.errors import DeadlineExceeded, ServingError
from featserve.server.forward import Forward
from featserve.server.grpcio import QUIET_S, GrpcioServer, cannot_listen, overloaded, stopping
from featserve.server.meter import MS, SECOND, Ended
from featserve.server.service import READS, SERVICE_NAME, WRITES, Call, Service
from featserve.server.status import DETAILS_KEY, encode_error, failed
from featserve.server.telemetry import Telemetry, trace_together
from featserve.stages import Stages
from featserve.store.follow import Behind

if TYPE_CHECKING:
    from featserve.server.tracing import Trace

log = logging.getLogger("featserve.server")

ALONE = {"GetFeatures": Service.get_features_alone}
"""What answers requests that were tried together before."""
METHODS: tuple[tuple[str, Callable[[Service, bytes, Call], bytes]], ...] = tuple((READS | ALONE | WRITES).items())
"""The methods that are served here, each by its number: reads first."""
GET_FEATURES = 0

TAKEN_AT_ONCE = 32
"""Calls that are taken before any is answered: so few that hardly one too many is among them."""
ANSWERED_AT_ONCE = 16
"""Calls that are answered before the queue is looked at again."""
REFUSED_PER_S = 5_000
"""Calls beyond the room that are taken, to be refused, in each second of answering. A refusal costs nearly what an
answer does, so who refuses all that comes has no time for answers; what waits in pygrpc-native may still get one."""
IO_THREADS = 1
"""One thread answers, and one keeps up with it; where cores are few a second one only takes turns with them."""

RESOURCE_EXHAUSTED = 8
Status = tuple[int, str, list[tuple[str, bytes]]]


class Turn(NamedTuple):
    """A call that waits for its turn: when it was taken on and when its time is over, by ``perf_counter_ns``."""

    call_id: int
    method: int
    data: bytes
    metadata: tuple[tuple[str, str | bytes], ...]
    taken_ns: int
    ends_ns: int
    trace: Trace | None


class Begun:
    """A call whose turn has come: what is left of its deadline counts from here on."""

    def __init__(self, turn: Turn, telemetry: Telemetry) -> None:
        self.turn = turn
        self.call = Call(turn.metadata, (turn.ends_ns - perf_counter_ns()) / SECOND)
        self.watch = telemetry.watch(METHODS[turn.method][0], self.call, (turn.taken_ns, turn.trace))
        self.caught_up: Future[None] | None = None
        """What it has to wait for."""


class NativeServer:
    """A pygrpc-native server of the service, with a ``GrpcioServer`` behind it."""

    def __init__(
        self, service: Service, config: ServerConfig, telemetry: Telemetry, forward: Forward | None = None
    ) -> None:
        self._service, self._telemetry = service, telemetry
        self._most_calls, self._most_streams, self.shed = config.max_concurrent, config.max_streams, 0
        self.turn_ns = 0
        self._behind = GrpcioServer(service, config, telemetry, forward, beside=self)
        telemetry.count(self)
        self._methods = METHODS if forward is None else METHODS[: len(READS)]
        self._default_deadline_ns, self._most_bytes = config.default_deadline_ms * MS, config.max_message_mb << 20
        self._overloaded = _encoded(encode_error(overloaded(self._most_calls)))
        self._stopping = _encoded(encode_error(stopping()))
        self._failure: Exception | None = None
        self._reads: dict[int, Turn] = {}
        self._late: dict[int, Begun] = {}
        """Reads that wait for the store to catch up."""
        # Of the writes, one that is under way is no longer among those that wait.
        self._writes: dict[int, Turn] = {}
        self._writing = 0
        self._full, self._looked_s = False, 0.0
        """Whether there was no room for another call when calls were last taken, and that thread's processor time."""
        self._limited: deque[tuple[int, int]] = deque()
        """When writes end that came without a deadline, in their order; those with one pygrpc-native ends itself."""
        self._writer = ThreadPoolExecutor(1, "featserve-writer")
        self._thread = threading.Thread(target=self._serve, name="featserve-native", daemon=True)

    @property
    def active(self) -> int:
        """How many calls are under way."""
        return len(self._reads) + len(self._late) + len(self._writes) + self._writing

    def look(self) -> None:
        """Nothing is refused that this does not know of; the server behind is looked at by itself."""

    async def start(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Listen; return the port. Raises ServingError where the address cannot be had."""
        paths = [(f"/{SERVICE_NAME}/{name}", False) for name, _ in self._methods]
        address = f"{host}:{port}"
        try:
            self._front = NativeGrpcFront(
                address,
                paths,
                io_threads=IO_THREADS,
                call_details=True,
                max_concurrent_streams=self._most_streams,
                reuse_port=reuse_port,
            )
        except OSError as error:
            raise cannot_listen(address, error) from None
        self._folder = tempfile.TemporaryDirectory(prefix="featserve-")
        socket = Path(self._folder.name) / "grpcio"
        await self._behind.listen(f"unix:{socket}")
        self._front.set_fallback(str(socket))
        self._front.start()
        self._thread.start()
        return self._front.bound_port

    async def drain(self, seconds: float) -> None:
        """Say NOT_SERVING, let calls in flight finish for up to ``seconds``, then end those that are left.

        A client cannot be told here to leave its connection, and would meet every refusal again on the same one. So
        what comes meanwhile is answered, and then refused for a moment: closing finds no call that anybody has begun.
        Raises ServingError where it ends as a thread of it has failed.
        """
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + seconds
        self._behind.say_stopping()
        written = asyncio.wrap_future(self._writer.submit(int))  # in its turn, behind those that wait
        await asyncio.wait((written, *self._behind.under_way), timeout=seconds)
        self._behind.refusing = True
        await asyncio.sleep(min(seconds, QUIET_S))  # what has arrived is taken on
        while (self.active or self._behind.under_way) and self._failure is None and loop.time() < ends_s:
            await asyncio.sleep(QUIET_S / 10)
        await asyncio.sleep(min(seconds, QUIET_S))  # closing would cut off answers that are on their way
        await asyncio.to_thread(self._front.close)
        await self._behind.stop(0)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._writer.shutdown, cancel_futures=True)
        self._folder.cleanup()
        if self._failure is not None:
            raise ServingError(f"a thread that answers has failed: {self._failure}") from self._failure

    def _serve(self) -> None:
        """Take calls and answer them until the front is closed; where that fails, end the server."""
        try:
            while self._take():
                turns = list(islice(self._reads.values(), ANSWERED_AT_ONCE))
                if self._answer_together(turns) < len(turns):
                    for turn in turns:
                        if turn.call_id in self._reads:
                            self._answer(turn)
                            del self._reads[turn.call_id]
        except Exception as error:  # noqa: BLE001 - the top of a background loop
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End the server: nobody would get an answer any more."""
        log.critical("a thread that answers has failed, the server ends: %s", error, exc_info=error)
        self._failure = error
        self._front.close()  # those who wait are told, and nobody else is taken on
        os.kill(os.getpid(), signal.SIGTERM)

    def _take(self) -> bool:
        """Put the calls that have arrived in their queues, waiting where there is nothing to do; False at the end."""
        self.turn_ns = 0
        events = self._front.recv_batch_details(self._most_events(), self._patience_ms())
        if events is None:
            return False
        self.turn_ns = now_ns = perf_counter_ns()
        tracing = self._telemetry.tracing
        refusing = self._behind.refusing
        room = self._most_calls - self.active - self._behind.active
        for kind, call_id, method, data, _, details in events:
            if kind == EVENT_CANCEL:
                room += self._drop(call_id)
            elif data is not None and details is not None:
                if room <= 0 or refusing or len(data) > self._most_bytes:
                    status = self._refusal(data)
                    self._front.fail(call_id, *status)
                    self._telemetry.refuse(METHODS[method][0], status[0])
                    continue
                room -= 1
                metadata, _, remaining_s = details
                ends_ns = now_ns + (self._default_deadline_ns if remaining_s is None else int(remaining_s * SECOND))
                trace = None if tracing is None else tracing.begin(metadata)
                turn = Turn(call_id, method, data, metadata, now_ns, ends_ns, trace)
                if method < len(READS):
                    self._reads[call_id] = turn
                else:
                    self._writes[call_id] = turn
                    self._writer.submit(self._write, call_id)
                    if remaining_s is None:
                        self._limited.append((ends_ns, call_id))
        self._full = room <= 0
        self._expire(now_ns)
        return True

    def _most_events(self) -> int:
        """Return how many calls to take: beyond those there is room for, the part of them that may be refused now."""
        if not self._full or self._behind.refusing:
            return TAKEN_AT_ONCE
        spent_s = time.thread_time()
        if refused := int((spent_s - self._looked_s) * REFUSED_PER_S):
            self._looked_s = spent_s
        return min(max(self._most_calls - self.active + refused, 1), TAKEN_AT_ONCE)

    def _patience_ms(self) -> int | None:
        """Return how long to wait for calls: until the next write expires, and not at all where reads wait."""
        if self._reads:
            return 0
        if not self._limited:
            return None
        return max(math.ceil((self._limited[0][0] - perf_counter_ns()) / MS), 0)

    def _refusal(self, data: bytes) -> Status:
        """Return what a call is refused with before it waits."""
        if self._behind.refusing:
            return self._stopping
        if len(data) > self._most_bytes:
            return self._oversized("Received", data)
        self.shed += 1
        return self._overloaded

    def _oversized(self, verb: str, data: bytes) -> Status:
        """Return what grpcio says of a message over the limit."""
        return RESOURCE_EXHAUSTED, f"{verb} message larger than max ({len(data)} vs. {self._most_bytes})", []

    def _write(self, call_id: int) -> None:
        """Run a write whose turn it is, unless it was cancelled or has expired; where that fails, end the server."""
        self._writing = 1
        try:
            if (turn := self._writes.pop(call_id, None)) is not None:
                self._answer(turn)
        except Exception as error:  # noqa: BLE001 - the top of a background loop
            self._fail(error)
        self._writing = 0

    def _answer_together(self, turns: Sequence[Turn]) -> int:
        """Answer the calls among these that can share a read, and return how many; the others stay among the reads."""
        now_ns, meter = perf_counter_ns(), self._telemetry.meter
        ages = meter is not None and now_ns >= meter.ages_due_ns
        asked = [turn for turn in turns if turn.method == GET_FEATURES and now_ns < turn.ends_ns]
        traced = [turn for turn in asked if turn.trace is not None]
        answered = 0
        begun = [("decode", now_ns)]
        ended: list[Ended] = []
        taken_ns = [] if meter is None else [turn.taken_ns for turn in asked]
        for share in self._service.shares([turn.data for turn in asked]):
            stages = Stages(*begun) if traced else None
            if traced and len(begun) == 1:
                begun.append(("other services", perf_counter_ns()))  # which those after the first wait for
            try:
                matrix, answers = self._service.get_features_together(share, stages, ages and not answered)
            except Exception:  # noqa: BLE001 - the top of a request
                continue  # alone, each says what is wrong with it
            for number, answer in zip(share.numbers, answers, strict=True):
                call_id = asked[number].call_id
                self._respond(call_id, answer)
                del self._reads[call_id]
            answered += len(answers)
            if meter is not None:
                ended_ns = perf_counter_ns()
                if matrix is not None and matrix.event_times is not None:
                    meter.add_together(share, matrix, ended_ns, taken_ns)
                else:
                    ended.append((share, ended_ns))
            if stages is not None:
                waited = [(asked[number].taken_ns, asked[number].trace) for number in share.numbers]
                trace_together("GetFeatures", share, matrix, waited, stages)
        if meter is not None and ended:
            meter.note_together(ended, taken_ns)
        return answered

    def _answer(self, turn: Turn) -> None:
        """Answer a call by itself."""
        self._run(Begun(turn, self._telemetry))

    def _run(self, begun: Begun) -> None:
        turn = begun.turn
        try:
            with begun.watch:
                if begun.caught_up is not None:
                    begun.caught_up.result()
                answer = METHODS[turn.method][1](self._service, turn.data, begun.call)
        except Behind as behind:
            begun.caught_up = behind.caught_up
            self._late[turn.call_id] = begun
            begun.caught_up.add_done_callback(partial(self._answer_late, turn.call_id))
        except Exception as error:  # noqa: BLE001 - the top of a request
            self._front.fail(turn.call_id, *_encoded(failed(error)))
        else:
            self._respond(turn.call_id, answer)

    def _respond(self, call_id: int, answer: bytes) -> None:
        if len(answer) > self._most_bytes:
            self._front.fail(call_id, *self._oversized("Sent", answer))
        else:
            self._front.respond(call_id, answer)

    def _answer_late(self, call_id: int, caught_up: Future[None]) -> None:
        """Answer a read, once the store holds the write that it asks for, or its time is over."""
        if (begun := self._late.pop(call_id, None)) is not None:
            self._run(begun)

    def _expire(self, now_ns: int) -> None:
        """End the writes whose default deadline has passed before their turn."""
        while self._limited and ((ended := self._limited[0][0] <= now_ns) or self._limited[0][1] not in self._writes):
            _, call_id = self._limited.popleft()
            if ended and self._drop(call_id):
                error = DeadlineExceeded(f"the default deadline, {self._default_deadline_ns / SECOND:g} s, passed")
                self._front.fail(call_id, *_encoded(encode_error(error)))

    def _drop(self, call_id: int) -> bool:
        """Take a call that has ended before its turn out of its queue; say whether it was still there."""
        begun = self._late.pop(call_id, None)
        if begun is None:
            turn = self._reads.pop(call_id, None) or self._writes.pop(call_id, None)
            if turn is None:
                return False
            begun = Begun(turn, self._telemetry)
        if begun.caught_up is not None:
            begun.caught_up.cancel()
        with suppress(CancelledError), begun.watch:
            raise CancelledError
        return True


def _encoded(status: ErrorStatus) -> Status:
    return status.code, status.message, [(DETAILS_KEY, status.SerializeToString())]
