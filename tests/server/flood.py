"""A client in a process of its own, to be killed: it reads and writes on streams without an end.

``python -m tests.server.flood ADDRESS STREAMS`` does so on as many streams of each kind, and says once all are busy.
"""

from __future__ import annotations

import itertools
import sys

import grpc

from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from tests.server.messages import numbers, wide


def flood(address: str, streams: int) -> None:
    stub = FeatureServingServiceStub(grpc.insecure_channel(address))
    read = pb.StreamFeaturesRequest(request=wide(1))
    write = pb.StreamRowsRequest(request=numbers([1], 1.0))
    reading = [stub.StreamFeatures(itertools.repeat(read), timeout=600) for _ in range(streams)]
    writing = [stub.StreamRows.future(itertools.repeat(write), timeout=600) for _ in range(streams)]
    for stream in reading:
        next(stream)
    sys.stdout.write("busy\n")
    sys.stdout.flush()
    while not any(call.done() for call in writing):
        for stream in reading:
            next(stream)


if __name__ == "__main__":
    flood(sys.argv[1], int(sys.argv[2]))
