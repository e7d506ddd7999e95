"""The bare servers: what our server's requests per second are held against, one on each transport.

Each does the same look-up as our server and nothing else: it decodes the same request, reads the same keys from the
same RocksDB with one call, and answers the same values in the same message. It checks nothing: no service, no key
column, no version, time, null, missing or corrupt row, no limit and no deadline. RocksDB has the memory that our server
has for reads, with a row cache of its own, as whoever writes such a handler would set it. On grpcio it is a grpc.aio
handler on uvloop, on pygrpc-native a loop over the calls that have arrived.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import rocksdict
import uvloop
from pygrpc_native import NativeGrpcFront

from bench.project import FEATURES, VIEW
from featserve._proto import serving_pb2 as pb
from featserve.codec import RowCodec, key_prefix
from featserve.config import load_config
from featserve.registry import Registry
from featserve.server.native import IO_THREADS
from featserve.store.database import open_database, options_of

SERVICE = "featserve.v1.FeatureServingService"
ADDRESS = "127.0.0.1:0"
TAKEN_AT_ONCE = 64


def look_up(folder: Path) -> Callable[[bytes], bytes]:
    """Return what answers a request for the project's view: bytes in, bytes out."""
    config = load_config(folder)
    with Registry.open(config.registry.url) as registry:
        view = registry.snapshot().view(VIEW)
    prefix, head = key_prefix(view), (RowCodec(view).width - FEATURES * 8) // 8
    options = options_of(rocksdict.Cache(config.store.block_cache_mb << 20))
    options.set_row_cache(rocksdict.Cache(config.store.row_cache_mb << 20))
    get = open_database(config.store.path, options, "read").get
    parse, answer = pb.GetFeaturesRequest.FromString, pb.GetFeaturesResponse

    def get_features(data: bytes) -> bytes:
        keys = parse(data).keys[0].data
        rows = get([prefix + keys[at : at + 8][::-1] for at in range(0, len(keys), 8)])
        matrix = np.frombuffer(b"".join(rows), "<f8").reshape(len(rows), -1)[:, head:].astype("<f4")
        return answer(rows=len(rows), values=matrix.tobytes()).SerializeToString()

    return get_features


async def serve_grpcio(get_features: Callable[[bytes], bytes]) -> None:
    """Serve on a free port; print the address; never return."""

    async def handle(data: bytes, context: object) -> bytes:
        return get_features(data)

    server = grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(handle)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"GetFeatures": handler}),))
    port = server.add_insecure_port(ADDRESS)
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def serve_native(get_features: Callable[[bytes], bytes]) -> None:
    """Serve on a free port; print the address; never return."""
    front = NativeGrpcFront(ADDRESS, [(f"/{SERVICE}/GetFeatures", False)], io_threads=IO_THREADS)
    front.start()
    print(f"127.0.0.1:{front.bound_port}", flush=True)
    while events := front.recv_batch(TAKEN_AT_ONCE):
        for _, call_id, _, data, _ in events:
            assert data is not None
            front.respond(call_id, get_features(data))


if __name__ == "__main__":
    transport, folder = sys.argv[1:]
    if transport == "grpcio":
        uvloop.run(serve_grpcio(look_up(Path(folder))))
    else:
        serve_native(look_up(Path(folder)))
