"""What ``bench.counts`` runs under valgrind: each kind of request N times and then 2 N times, with a mark before,
between and after.

Comes in: the folder of a project. Goes out: the names of the kinds, a line each; valgrind counts. The same few requests
are answered in turn, so that 2 N of them are exactly twice N.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import featserve
from bench import load
from bench.project import KEY, SERVICE
from featserve.embedded import Embedded
from featserve.server.service import Call, Limits, Service

ENTITIES = 10_000
DIFFERENT = 10
TURNS = 6
REQUESTS = DIFFERENT * TURNS
MARK = "getpgid"
"""The function of the C library at whose calls valgrind dumps its counts; nothing else calls it."""
NOW_US = 4_000_000_000_000_000

Answer = Callable[[Any], object]


def cases(project: Embedded) -> dict[str, tuple[Answer, list[Any]]]:
    """Return for each name what answers, and the requests. No entity is twice in a request: that would be more work."""
    service, call = Service(project.engine, Limits(10_000, 0), lambda: NOW_US), Call((), 5.0)
    entities = np.random.default_rng(3).permutation(ENTITIES)
    found: dict[str, tuple[Answer, list[Any]]] = {}
    for keys in (1, 100):
        asked = entities[: keys * DIFFERENT].reshape(DIFFERENT, keys)
        told = f"{keys} {'key' if keys == 1 else 'keys'}"
        found[f"in process, {told}"] = (lambda request: project.get(SERVICE, request), [{KEY: row} for row in asked])
        bodies = [load.request(row) for row in asked]
        found[f"bytes to bytes, {told}"] = (lambda body: service.get_features(body, call), bodies)
    return found


def answer_in_turn(answer: Answer, requests: list[Any], turns: int) -> None:
    for _ in range(turns):
        for request in requests:
            answer(request)


def main(folder: Path) -> None:
    """Answer all requests, with three marks in each case; what the collector does now and then is not counted."""
    with featserve.open(folder) as project:
        found = cases(project)
        print("\n".join(found), flush=True)
        gc.collect()
        gc.disable()
        for answer, requests in found.values():
            answer_in_turn(answer, requests, TURNS)
            os.getpgid(0)
            answer_in_turn(answer, requests, TURNS)
            os.getpgid(0)
            answer_in_turn(answer, requests, 2 * TURNS)
            os.getpgid(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
