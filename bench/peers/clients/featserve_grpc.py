"""featserve's server through its own Python client."""

from __future__ import annotations

import sys
from typing import Any

import featserve
from bench.peers.clients.driver import serve
from bench.project import KEY, SERVICE


class Featserve:
    """A client of the server at an address."""

    def __init__(self, address: str) -> None:
        self._client = featserve.connect(address, timeout=60)

    def get(self, entities: Any) -> Any:
        return self._client.get(SERVICE, {KEY: entities})

    def values(self, answer: Any) -> Any:
        return answer.values


if __name__ == "__main__":
    serve(lambda: Featserve(sys.argv[1]))
