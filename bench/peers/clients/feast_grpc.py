"""Feast's gRPC server through the stub that Feast generates; an answer is its message, parsed."""

from __future__ import annotations

import sys
from typing import Any

import grpc
from feast.protos.feast.serving.GrpcServer_pb2_grpc import GrpcFeatureServerStub
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest
from feast.protos.feast.types.Value_pb2 import Value

from bench.peers.clients.driver import FEATURES, serve


def request(entities: Any) -> Any:
    made = GetOnlineFeaturesRequest(feature_service="score")
    made.entities["account_id"].val.extend([Value(int64_val=entity) for entity in entities.tolist()])
    return made


class Feast:
    """A channel to the server at an address."""

    def __init__(self, address: str) -> None:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
        self._stub: Any = GrpcFeatureServerStub(grpc.insecure_channel(address, options))

    def get(self, entities: Any) -> Any:
        return self._stub.GetOnlineFeatures(request(entities), timeout=60)

    def values(self, answer: Any) -> Any:
        found = dict(zip(answer.metadata.feature_names.val, answer.results, strict=True))
        columns = [[value.float_val for value in found[name].values] for name in FEATURES]
        return list(zip(*columns, strict=True))


if __name__ == "__main__":
    serve(lambda: Feast(sys.argv[1]), lambda entities: request(entities).SerializeToString())
