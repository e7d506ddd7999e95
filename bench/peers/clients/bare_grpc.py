"""The bare gRPC handler through a grpcio stub; an answer is its message, parsed, and its values as an array."""

from __future__ import annotations

import sys
from typing import Any

import grpc
import numpy as np

from bench import load
from bench.peers.clients.driver import FEATURES, serve
from featserve._proto import serving_pb2 as pb
from featserve.wire import FULL_METHOD


class Bare:
    """A channel to the server at an address."""

    def __init__(self, address: str) -> None:
        channel = grpc.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1),))
        self._call: Any = channel.unary_unary(f"{FULL_METHOD}GetFeatures", None, pb.GetFeaturesResponse.FromString)

    def get(self, entities: Any) -> Any:
        return np.frombuffer(self._call(load.request(entities), timeout=60).values, "<f4").reshape(-1, len(FEATURES))

    def values(self, answer: Any) -> Any:
        return answer


if __name__ == "__main__":
    serve(lambda: Bare(sys.argv[1]))
