"""The bare server: what our server's requests per second are held against.

A grpc.aio handler on uvloop that does the same look-up as our server and nothing else: it decodes the same request,
reads the same keys from the same store with one call, and answers the same values in the same message. It checks
nothing: no service, no key column, no version, time, null, missing or corrupt row, no limit and no deadline.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop

from bench.project import FEATURES, VIEW
from featserve._proto import serving_pb2 as pb
from featserve.codec import RowCodec, key_prefix
from featserve.config import load_config
from featserve.registry import Registry
from featserve.store.rocksdb import RocksStore

METHOD = "featserve.v1.FeatureServingService"


async def serve(folder: Path) -> None:
    """Serve the project's view on a free port; print the address; never return."""
    config = load_config(folder)
    with Registry.open(config.registry.url) as registry:
        view = registry.snapshot().view(VIEW)
    prefix, head = key_prefix(view), (RowCodec(view).width - FEATURES * 8) // 8
    store = RocksStore(
        config.store.path,
        "read",
        fsync=False,
        block_cache_mb=config.store.block_cache_mb,
        row_cache_mb=config.store.row_cache_mb,
    )
    get = store._db.get  # type: ignore[union-attr]
    parse, answer = pb.GetFeaturesRequest.FromString, pb.GetFeaturesResponse

    async def get_features(data: bytes, context: object) -> bytes:
        keys = parse(data).keys[0].data
        rows = get([prefix + keys[at : at + 8][::-1] for at in range(0, len(keys), 8)])
        matrix = np.frombuffer(b"".join(rows), "<f8").reshape(len(rows), -1)[:, head:].astype("<f4")
        return answer(rows=len(rows), values=matrix.tobytes()).SerializeToString()

    server = grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(get_features)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(METHOD, {"GetFeatures": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1])))
