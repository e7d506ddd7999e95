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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import featserve
from bench import load
from bench.project import FEATURES, KEY, SERVICE, VIEW
from featserve.batch import Arrival, Int64s
from featserve.embedded import Embedded
from featserve.server.meter import Meter
from featserve.server.service import Call, Limits, Service
from featserve.server.telemetry import Telemetry
from featserve.types import Column, Float64, Int64
from featserve.wire import encode_rows

ENTITIES = 10_000
DIFFERENT = 10
TURNS = 6
REQUESTS = DIFFERENT * TURNS
MARK = "getpgid"
"""The function of the C library at whose calls valgrind dumps its counts; nothing else calls it."""
NOW_US = 4_000_000_000_000_000
NEVER_NS = 1 << 62
TOGETHER, WRITTEN, MISSING = 8, 10, 10
"""Requests that come at once, rows of a write, and of a request those that are not there."""

Answer = Callable[[Any], object]


def cases(project: Embedded, written: Embedded) -> dict[str, tuple[Answer, list[Any]]]:
    """Return for each name what answers, and the requests. No entity is twice in a request: that would be more work.

    ``written``: the same one, opened for writing.
    """
    service, call = Service(project.engine, Limits(10_000, 0), lambda: NOW_US), Call((), 5.0)
    entities = np.random.default_rng(3).permutation(ENTITIES)
    found: dict[str, tuple[Answer, list[Any]]] = {}
    for keys in (1, 100):
        asked = entities[: keys * DIFFERENT].reshape(DIFFERENT, keys)
        told = f"{keys} {'key' if keys == 1 else 'keys'}"
        found[f"in process, {told}"] = (lambda request: project.get(SERVICE, request), [{KEY: row} for row in asked])
        bodies = [load.request(row) for row in asked]
        found[f"bytes to bytes, {told}"] = (lambda body: service.get_features(body, call), bodies)
        found[f"alone, {told}"] = (lambda body: service.get_features_alone(body, call), bodies)
    at_once = entities[: TOGETHER * DIFFERENT].reshape(DIFFERENT, TOGETHER, 1)
    batches = [[load.request(row) for row in rows] for rows in at_once]
    found[f"{TOGETHER} together, 1 key"] = partial(together, service), batches
    bodies = [load.request(row) for row in entities[:DIFFERENT, None]]
    meter = Meter()
    meter.ages_due_ns = NEVER_NS
    counting = partial(watched, service, Telemetry(None, meter))
    found["counted, 1 key"] = counting, bodies
    partly = entities[: 100 * DIFFERENT].reshape(DIFFERENT, 100).copy()
    partly[:, :MISSING] += ENTITIES
    found[f"counted, {MISSING} of 100 keys not there"] = counting, [load.request(row) for row in partly]
    writer = Service(written.engine, Limits(10_000, 0), lambda: NOW_US)
    writes = [write(rows) for rows in entities[: WRITTEN * DIFFERENT].reshape(DIFFERENT, WRITTEN)]
    found[f"write, {WRITTEN} rows"] = (lambda body: writer.write_rows(body, call), writes)
    return found


def together(service: Service, bodies: list[bytes]) -> None:
    """Answer requests that have come at the same time, as pygrpc-native's thread does."""
    for share in service.shares(bodies):
        service.get_features_together(share)


def watched(service: Service, telemetry: Telemetry, body: bytes) -> None:
    """Answer a request that is counted, and not asked for ages: those are looked at now and then."""
    call = Call((), 5.0)
    with telemetry.watch("GetFeatures", call):
        service.get_features(body, call)


def write(entities: Int64s) -> bytes:
    """Return a request that writes rows of these entities, anew each time: the last one to come wins."""
    values = np.random.default_rng(4).standard_normal((FEATURES, len(entities)))
    columns = {KEY: Column(Int64, entities)} | {f"f{i}": Column(Float64, values[i]) for i in range(FEATURES)}
    return encode_rows(VIEW, Arrival(columns, np.full(len(entities), NOW_US))).SerializeToString()


def answer_in_turn(answer: Answer, requests: list[Any], turns: int) -> None:
    for _ in range(turns):
        for request in requests:
            answer(request)


def main(folder: Path) -> None:
    """Answer all requests, with three marks in each case; what the collector does now and then is not counted."""
    with featserve.open(folder, write=True) as written, featserve.open(folder) as project:
        found = cases(project, written)
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
