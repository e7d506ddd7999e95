"""Feast's HTTP server through http.client, a connection kept open; an answer is its JSON, parsed."""

from __future__ import annotations

import json
import sys
from http.client import HTTPConnection
from typing import Any

from bench.peers.clients.driver import FEATURES, serve

PATH = "/get-online-features"


def body(entities: Any) -> bytes:
    return json.dumps({"feature_service": "score", "entities": {"account_id": entities.tolist()}}).encode()


class Feast:
    """A connection to the server at an address."""

    def __init__(self, address: str) -> None:
        self._connection = HTTPConnection(address, timeout=60)

    def get(self, entities: Any) -> Any:
        self._connection.request("POST", PATH, body(entities), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {data!r}")
        return json.loads(data)

    def values(self, answer: Any) -> Any:
        found = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
        return list(zip(*(found[name]["values"] for name in FEATURES), strict=True))


if __name__ == "__main__":
    serve(lambda: Feast(sys.argv[1]), body)
