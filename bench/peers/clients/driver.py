"""What all clients do alike: take orders, a line of JSON each, from standard input, and answer each with a line.

``{"check": [entities]}`` answers the values that come; ``{"body": keys, ...}`` a request as it goes over the wire;
``{"measure": keys, ...}`` the nanoseconds of each call. A client only says how one call is made.
"""

from __future__ import annotations

import base64
import gc
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, Protocol

import numpy as np

FEATURES = [f"f{i}" for i in range(50)]
BLOCK = 1_000


class Client(Protocol):
    """One connection."""

    def get(self, entities: Any) -> Any:
        """Ask for an int64 array of entities; return what a caller gets."""
        ...

    def values(self, answer: Any) -> Any:
        """Return an answer as (entities, 50) numbers."""
        ...


def serve(connect: Callable[[], Client], body: Callable[[Any], bytes] | None = None) -> None:
    """Take orders until there are no more. ``body``: the bytes of a request for an array of entities."""
    clients = [connect()]
    for line in sys.stdin:
        order = json.loads(line)
        random = np.random.default_rng(order.get("seed", 0))
        answer: Any
        if "check" in order:
            found = clients[0].values(clients[0].get(np.array(order["check"])))
            answer = np.asarray(found, np.float32).tolist()
        elif "body" in order:
            assert body is not None
            answer = base64.b64encode(body(random.integers(0, order["entities"], order["body"]))).decode()
        else:
            while len(clients) < order["connections"]:
                clients.append(connect())
            answer = measure(clients[: order["connections"]], order, random)
        print(json.dumps(answer), flush=True)


def measure(clients: list[Client], order: dict[str, Any], random: Any) -> dict[str, Any]:
    """Call each client from a thread of its own, until the order's ``calls`` and ``seconds`` have both been reached, or
    ``patience_s`` has.
    """
    barrier = Barrier(len(clients))
    taken_ns: list[list[int]] = [[] for _ in clients]
    seeds = random.integers(0, 2**63, len(clients))
    gc.collect()
    gc.freeze()
    with ThreadPoolExecutor(len(clients)) as pool:
        started = time.perf_counter()
        asking = [
            pool.submit(_keep_asking, client, order, seed, barrier, taken)
            for client, seed, taken in zip(clients, seeds, taken_ns, strict=True)
        ]
        for each in asking:
            each.result()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "taken_ns": [each for taken in taken_ns for each in taken]}


def _keep_asking(client: Client, order: dict[str, Any], seed: int, barrier: Barrier, taken_ns: list[int]) -> None:
    random, clock = np.random.default_rng(seed), time.perf_counter_ns
    calls = order["calls"] / order["connections"]
    get, record = client.get, taken_ns.append
    barrier.wait()
    began = clock()
    enough_ns, most_ns = began + int(order["seconds"] * 1e9), began + int(order["patience_s"] * 1e9)
    while True:
        for entities in random.integers(0, order["entities"], (BLOCK, order["measure"])):
            asked = clock()
            get(entities)
            answered = clock()
            record(answered - asked)
            if answered >= most_ns or (answered >= enough_ns and len(taken_ns) >= calls):
                return
