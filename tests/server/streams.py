"""Calls that are held open, and a writer that is kept busy: what limits and drains are tested with."""

from __future__ import annotations

import queue
from typing import Any

import grpc

from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from tests.server.messages import numbers, wide


def busy(stub: FeatureServingServiceStub, writes: int = 3) -> list[Any]:
    """Keep the one writer busy for a second or more; return the calls."""
    request = numbers(range(1_000, 41_000), 1.0)
    calls = [stub.WriteRows.future(request, timeout=60) for _ in range(writes)]
    # The connection carries them in order: what is sent after this has been answered waits behind them.
    stub.ListServices(pb.ListServicesRequest())
    return calls


class Stream:
    """A stream of reads that is held open: ``ask`` and wait for the answer; ``end`` it."""

    def __init__(self, stub: FeatureServingServiceStub, **options: Any) -> None:
        self._requests: queue.SimpleQueue[pb.StreamFeaturesRequest | None] = queue.SimpleQueue()
        self.call = stub.StreamFeatures(iter(self._requests.get, None), **options)

    def ask(self, *users: int) -> pb.StreamFeaturesResponse:
        self._requests.put(pb.StreamFeaturesRequest(request=wide(*users)))
        return next(self.call)

    def end(self) -> None:
        """Say that no more requests follow, and see the call end well."""
        self._requests.put(None)
        assert list(self.call) == []

    def drop(self) -> None:
        """Cancel the call."""
        self.call.cancel()
        self._requests.put(None)


def has_room(stub: FeatureServingServiceStub, calls: int) -> bool:
    """Return whether the server takes that many calls at once; none of them is under way afterwards."""
    held: list[Stream] = []
    try:
        while len(held) < calls:
            stream = Stream(stub)
            stream.ask(1)
            held.append(stream)
    except grpc.RpcError:
        stream.drop()
    for each in held:
        each.end()
    return len(held) == calls
