"""Redis through redis-py, a row a hash of packed float32 values: one pipeline of HMGET."""

from __future__ import annotations

import sys
from itertools import chain
from typing import Any

import numpy as np
import redis

from bench.peers.clients.driver import FEATURES, serve


class Hashes:
    """A connection to Redis on ``port``."""

    def __init__(self, port: int) -> None:
        self._redis = redis.Redis("127.0.0.1", port)

    def get(self, entities: Any) -> Any:
        with self._redis.pipeline(transaction=False) as pipe:
            for entity in entities.tolist():
                pipe.hmget(b"hash:%07d" % entity, FEATURES)
            rows = pipe.execute()
        return np.frombuffer(b"".join(chain.from_iterable(rows)), "<f4").reshape(len(rows), len(FEATURES))

    def values(self, answer: Any) -> Any:
        return answer


if __name__ == "__main__":
    serve(lambda: Hashes(int(sys.argv[1])))
