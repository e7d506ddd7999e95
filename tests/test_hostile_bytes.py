"""Hostile bytes: requests and answers that are cut, mutated or made up, against everything that reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from featserve._proto import serving_pb2 as pb
from featserve.batch import Arrival, EntityKeys
from featserve.engine import Engine
from featserve.errors import FeatserveError, InvalidRequest
from featserve.matrix import FeatureMatrix
from featserve.plan import Plans
from featserve.server.service import Call, Limits, Service
from featserve.server.status import encode_error
from featserve.store.memory import MemoryStore
from featserve.wire import decode_matrix, encode_column, encode_matrix, encode_rows
from tests.online_model import same
from tests.random_data import random_batch, random_entity, random_keys, random_service, random_view, snapshot_of

NOW_US = 1_700_000_000_000_000
SKEW_US = 7_200_000_000


class World:
    """A service over two views with rows, some null and some missing, and its answers."""

    def __init__(self, rng: np.random.Generator) -> None:
        entities = [random_entity(rng, name, keys=1) for name in "ab"]
        self.views = [random_view(rng, f"v{i}", entities[i], features=8) for i in range(2)]
        self.spec = random_service(rng, "s", self.views)
        self.keys = {e.name: random_keys(rng, e, 6) for e in entities}
        self.engine = Engine(MemoryStore(), Plans(snapshot_of(self.views, [self.spec])))
        self.service = Service(self.engine, Limits(100, SKEW_US), lambda: NOW_US)
        self.writes: list[pb.WriteRowsRequest] = []
        for view in self.views:
            batch = random_batch(rng, view, self.keys[view.entity.name], NOW_US, 8)
            arrival = Arrival(batch.columns, batch.event_time_us, batch.known_at_us)
            self.engine.write(self.engine.plans.view(view.id), arrival, now_us=NOW_US, max_future_skew_us=SKEW_US)
            self.writes.append(encode_rows(view.id, arrival))
        columns = {name: col for keys in self.keys.values() for name, col in keys.items()}
        rows = min(map(len, columns.values()))
        self.columns = {name: col.take(np.arange(rows)) for name, col in columns.items()}

    def request(self) -> pb.GetFeaturesRequest:
        return pb.GetFeaturesRequest(
            service="s", keys=[encode_column(n, c) for n, c in self.columns.items()], include_event_times=True
        )

    def matrix(self) -> FeatureMatrix:
        plan = self.engine.plans.service("s")
        return self.engine.read(plan, EntityKeys.of(self.columns, self.spec.keys), NOW_US, event_times=True)


def test_an_answer_cut_anywhere_is_refused(rng: np.random.Generator) -> None:
    """An answer one of whose parts is not of the size that its schema says is refused, never read in part."""
    for _ in range(20):
        world = World(rng)
        matrix = world.matrix()
        whole = encode_matrix(matrix)
        same(decode_matrix(whole, matrix.schema), matrix)
        for name in ("values", "status", "validity", "event_times"):
            data: bytes = getattr(whole, name)
            size = len(matrix) * -(-len(matrix.schema.features) // 8) if name == "validity" else len(data)
            for bad in (data[:-1], data + b"\0", data * 2, b"\0" * 3):
                if len(bad) == size or (not bad and name in ("validity", "event_times")):
                    continue
                cut = pb.GetFeaturesResponse()
                cut.CopyFrom(whole)
                setattr(cut, name, bad)
                with pytest.raises(InvalidRequest, match=f"answer.{name}"):
                    decode_matrix(cut, matrix.schema)
        for rows in (0, len(matrix) - 1, len(matrix) + 1, 2**32 - 1):
            cut = pb.GetFeaturesResponse()
            cut.CopyFrom(whole)
            cut.rows = rows
            with pytest.raises(InvalidRequest, match="answer"):
                decode_matrix(cut, matrix.schema)


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """Return bytes with one to four random changes: flips, cuts, repeats, insertions, other lengths."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, end = sorted(rng.integers(0, len(out) + 1, size=2).tolist())
        match int(rng.choice(5, p=[0.45, 0.15, 0.15, 0.2, 0.05])):
            case 0:
                out[at : at + 1] = rng.bytes(1)
            case 1:
                del out[at : min(end, at + 9)]
            case 2:
                out[at:at] = out[at : min(end, at + 40)]
            case 3:
                out[at:at] = rng.bytes(int(rng.integers(1, 9)))
            case _:
                del out[at:]
    return bytes(out)


def mutate_columns(rng: np.random.Generator, columns: Any) -> None:
    """Change one column of a message that still parses: its name, type, data, offsets, validity or length."""
    if not len(columns):
        return
    col = columns[int(rng.integers(len(columns)))]
    kind = int(rng.integers(8))
    if kind == 0:
        col.name = str(rng.choice(["", "a_0", "f0", "x" * 10_000, "\0", "é" * 99]))
    elif kind == 1:
        col.type = int(rng.integers(0, 11))
    elif kind == 2:
        col.length = int(rng.choice([0, 1, 2, 2**32 - 1]))
    elif kind in (3, 4, 5):
        field = ("data", "offsets", "validity")[kind - 3]
        setattr(col, field, mutate(rng, getattr(col, field)))
    elif kind == 6:
        columns.add().CopyFrom(col)
    else:
        del columns[int(rng.integers(len(columns)))]


def mutated(rng: np.random.Generator, request: Any) -> bytes:
    """Return the bytes of a request that is wrong somewhere, in its bytes or in what they say."""
    if rng.random() < 0.5:
        return mutate(rng, request.SerializeToString())
    changed = type(request)()
    changed.CopyFrom(request)
    inner = changed.request if hasattr(changed, "request") else changed
    for _ in range(int(rng.integers(1, 3))):
        if rng.random() < 0.7:
            mutate_columns(rng, inner.keys if hasattr(inner, "keys") else inner.columns)
        elif hasattr(inner, "service"):
            inner.service = str(rng.choice(["", "s@0", "s@2", "s#00000000", "#", "s@99999999999", "\0", "x" * 50_000]))
            inner.as_of_us = int(rng.choice([-(2**63), 2**63 - 1, 0]))
        else:
            inner.view = str(rng.choice(["", "v0", "v0@9", "v0#00000000", "y" * 50_000]))
            inner.event_times = mutate(rng, inner.event_times)
            inner.known_at = mutate(rng, inner.known_at)
    data: bytes = changed.SerializeToString()
    return data


def attack(rng: np.random.Generator, attempts: int) -> tuple[int, int]:
    """Send mutated requests to every method; return how many were answered and how many refused."""
    world = World(rng)
    service = world.service
    read, write = world.request(), world.writes[int(rng.integers(2))]
    targets: list[tuple[Callable[[bytes, Call], Any], Any]] = [
        (service.get_features, read),
        (service.stream_features, pb.StreamFeaturesRequest(request=read)),
        (service.write_rows, write),
        (service.stream_rows().add, pb.StreamRowsRequest(request=write)),
        (service.describe_service, pb.DescribeServiceRequest(service="s")),
        (service.describe_view, pb.DescribeViewRequest(view="v0")),
        (service.list_services, pb.ListServicesRequest()),
    ]
    answered = 0
    details: list[bytes] = []
    for _ in range(attempts):
        method, request = targets[int(rng.choice(7, p=[0.3, 0.1, 0.3, 0.1, 0.08, 0.08, 0.04]))]
        simple = not hasattr(request, "request") and not hasattr(request, "columns") and not hasattr(request, "keys")
        data = mutate(rng, request.SerializeToString()) if simple else mutated(rng, request)
        try:
            method(data, Call())
            answered += 1
        except FeatserveError as error:
            details.append(encode_error(error).SerializeToString())
    # gRPC sends the message and the details in trailers, which hold 8 KiB.
    assert max(map(len, details)) < 8_000
    method, request = targets[0]
    method(request.SerializeToString(), Call())  # what was asked rightly is still answered
    return answered, len(details)


def test_mutated_requests_are_answered_or_refused(rng: np.random.Generator) -> None:
    """Whatever bytes are sent to whatever method, the outcome is an answer or an error of the tree, of bounded size."""
    totals = np.sum([attack(rng, 250) for _ in range(6)], axis=0)
    assert totals.min() > 100


@pytest.mark.slow
def test_very_many_mutated_requests(rng: np.random.Generator) -> None:
    """The same for tens of thousands of requests."""
    assert np.sum([attack(rng, 1_000) for _ in range(40)], axis=0).min() > 1_000


@pytest.mark.parametrize(
    "method", ["get_features", "stream_features", "write_rows", "describe_service", "describe_view"]
)
def test_random_bytes(method: str, rng: np.random.Generator) -> None:
    """Bytes that are no message at all are refused as such."""
    call = partial(getattr(World(rng).service, method), call=Call())
    for length in (1, 7, 100, 5_000):
        data = b"\xff" * length + rng.bytes(length)
        if method == "stream_features":
            assert pb.StreamFeaturesResponse.FromString(call(data)).error.message.startswith("request: ")
            continue
        with pytest.raises(InvalidRequest, match=rf"request: {2 * length:,} bytes that are no \w+Request"):
            call(data)
