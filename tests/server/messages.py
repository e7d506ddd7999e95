"""Requests put together by hand, as a client in another language does, and errors read with Google's own messages."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from featserve._proto import serving_pb2 as pb

HOUR_US = 3_600_000_000


def now_us() -> int:
    return time.time_ns() // 1_000


def packed(name: str, code: str, *values: Any) -> pb.Column:
    """Return a column of fixed-width values; ``code`` is how ``struct`` calls their type."""
    types = {
        "?": pb.DATA_TYPE_BOOL,
        "i": pb.DATA_TYPE_INT32,
        "q": pb.DATA_TYPE_INT64,
        "f": pb.DATA_TYPE_FLOAT32,
        "d": pb.DATA_TYPE_FLOAT64,
    }
    return pb.Column(name=name, type=types[code], data=struct.pack(f"<{len(values)}{code}", *values))


def instants(name: str, *values: int) -> pb.Column:
    return pb.Column(name=name, type=pb.DATA_TYPE_TIMESTAMP, data=struct.pack(f"<{len(values)}q", *values))


def texts(name: str, *values: str | bytes, type: pb.DataType.ValueType = pb.DATA_TYPE_STRING) -> pb.Column:
    raw = [value.encode() if isinstance(value, str) else value for value in values]
    ends = np.cumsum([0, *map(len, raw)]).tolist()
    return pb.Column(name=name, type=type, data=b"".join(raw), offsets=struct.pack(f"<{len(ends)}I", *ends))


def vectors(name: str, *values: Iterable[float]) -> pb.Column:
    array = np.array([list(value) for value in values], "<f4")
    return pb.Column(name=name, type=pb.DATA_TYPE_VECTOR, data=array.tobytes(), length=array.shape[1])


def nulls(column: pb.Column, *valid: bool) -> pb.Column:
    """Give a column validity bits."""
    column.validity = np.packbits(valid, bitorder="little").tobytes()
    return column


def wide(*users: int, **rest: Any) -> pb.GetFeaturesRequest:
    """Ask for fifty numbers of users."""
    return pb.GetFeaturesRequest(service="wide", keys=[packed("user_id", "q", *users)], **rest)


def ranking(*users: int, **rest: Any) -> pb.GetFeaturesRequest:
    """Ask for everything about users, all of them in one place."""
    places = [texts("country", *["de"] * len(users)), texts("zip", *["10115"] * len(users))]
    return pb.GetFeaturesRequest(service="ranking", keys=[packed("user_id", "q", *users), *places], **rest)


def numbers(users: Iterable[int], value: float, event_us: int | None = None) -> pb.WriteRowsRequest:
    """Write fifty numbers for users: ``value``, ``value`` + 1 and so on."""
    ids = np.fromiter(users, "<i8")
    columns = [pb.Column(name="user_id", type=pb.DATA_TYPE_INT64, data=ids.tobytes())]
    columns += [
        pb.Column(name=f"f{i}", type=pb.DATA_TYPE_FLOAT64, data=np.full(len(ids), value + i, "<f8").tobytes())
        for i in range(50)
    ]
    times = np.full(len(ids), now_us() if event_us is None else event_us)
    return pb.WriteRowsRequest(view="numbers", columns=columns, event_times=times.tobytes())


def weather(
    country: str | bytes, zip: str | bytes, temp: float, wind: float, event_us: int | None = None
) -> pb.WriteRowsRequest:
    """Write one row of weather."""
    return pb.WriteRowsRequest(
        view="weather",
        columns=[texts("country", country), texts("zip", zip), packed("temp", "f", temp), packed("wind", "d", wind)],
        event_times=struct.pack("<q", now_us() if event_us is None else event_us),
    )


def activity(user: int, event_us: int, **changes: pb.Column | None) -> pb.WriteRowsRequest:
    """Write one row of activity, every column its own type; ``changes`` replaces columns, None leaves one out."""
    row: dict[str, pb.Column | None] = {
        "user_id": packed("user_id", "q", user),
        "clicks": packed("clicks", "q", 2**60 + 1),
        "rate": packed("rate", "d", 0.25),
        "score": packed("score", "f", 1.5),
        "active": packed("active", "?", True),
        "level": packed("level", "i", -7),
        "last_seen": instants("last_seen", 1_600_000_000_000_001),
        "plan": texts("plan", "gewerblich-ü"),
        "token": texts("token", b"\x00\xff", type=pb.DATA_TYPE_BYTES),
        "taste": vectors("taste", [1.0, 2.0, 3.0, 4.0]),
    }
    given = [column for column in (row | changes).values() if column is not None]
    return pb.WriteRowsRequest(view="activity", columns=given, event_times=struct.pack("<q", event_us))


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as a program sees it. ``violations``: descriptions by field."""

    code: grpc.StatusCode
    message: str
    reason: str | None = None
    metadata: Mapping[str, str] | None = None
    violations: Mapping[str, str] | None = None


def refusal(call: Callable[[], object]) -> Refusal:
    """Return the error that ``call`` ends with, its details read as google.rpc.Status."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return read_error(caught.value)


def read_error(error: Any) -> Refusal:
    """Return an error of gRPC's, its details read as google.rpc.Status."""
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if details is None:
        return Refusal(error.code(), error.details())
    status = status_pb2.Status.FromString(details)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    return read_status(status, error.code())


def read_status(status: status_pb2.Status, code: grpc.StatusCode) -> Refusal:
    """Return what a google.rpc.Status says."""
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert info.domain == "featserve"
    if len(status.details) > 1:
        assert status.details[1].Unpack(bad)
    violations = {v.field: v.description for v in bad.field_violations}
    return Refusal(code, status.message, info.reason, dict(info.metadata), violations)
