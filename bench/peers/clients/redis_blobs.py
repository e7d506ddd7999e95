"""Redis through redis-py, a row a packed float32 blob: MGET and np.frombuffer, as a skilled user would build it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import redis

from bench.peers.clients.driver import FEATURES, serve


class Blobs:
    """A connection to Redis on ``port``."""

    def __init__(self, port: int) -> None:
        self._mget = redis.Redis("127.0.0.1", port).mget

    def get(self, entities: Any) -> Any:
        rows = self._mget([b"blob:%07d" % entity for entity in entities.tolist()])
        return np.frombuffer(b"".join(rows), "<f4").reshape(len(rows), len(FEATURES))

    def values(self, answer: Any) -> Any:
        return answer


if __name__ == "__main__":
    serve(lambda: Blobs(int(sys.argv[1])))
