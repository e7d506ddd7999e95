"""What is wrong with a request, said by every transport with the same code, reason, fields and message."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.server.service import READS, WRITE_STREAMS, WRITES
from featserve.store.rocksdb import RocksStore
from tests.server.messages import (
    HOUR_US,
    Refusal,
    activity,
    instants,
    now_us,
    nulls,
    numbers,
    packed,
    refusal,
    texts,
    vectors,
    wide,
)
from tests.serving import DAMAGED, PATIENCE_S, TRANSPORTS, Project, Server, served_here

pytest_plugins = ["tests.served"]

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION, EXHAUSTED = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED
UTF8 = b"gr\xfc\xdfe"


@pytest.fixture
def stub(server: Server) -> Iterator[FeatureServingServiceStub]:
    with server.stub() as stub:
        yield stub


def get(service: str, *keys: pb.Column, **rest: Any) -> pb.GetFeaturesRequest:
    return pb.GetFeaturesRequest(service=service, keys=keys, **rest)


def raw(name: str, type: int, data: bytes = b"", **rest: Any) -> pb.Column:
    return pb.Column(name=name, type=type, data=data, **rest)  # type: ignore[arg-type]


USER = packed("user_id", "q", 1)
PLACE = (texts("country", "de"), texts("zip", "1"))

# Request, code, reason, the fields at fault, and a part of the message.
BAD_READS: dict[str, tuple[pb.GetFeaturesRequest, grpc.StatusCode, str, set[str], str]] = {
    "unknown service": (
        get("rankin", USER, *PLACE), NOT_FOUND, "UNKNOWN_NAME", set(),
        "unknown feature service 'rankin'; did you mean 'ranking'?",
    ),
    "no service": (
        get("", USER), INVALID, "INVALID_REQUEST", {"feature service"}, "'' is not name, name@version or name#hash",
    ),
    "unknown version": (
        get("wide@7", USER), NOT_FOUND, "UNKNOWN_NAME", set(), "feature service 'wide@7'; did you mean 'wide@1'?",
    ),
    "another hash": (
        get("wide#0123456789abcdef", USER), PRECONDITION, "SCHEMA_MISMATCH", set(),
        "feature service 'wide' is now wide@1 with hash",
    ),
    "missing key column": (
        get("ranking", USER, PLACE[0]), INVALID, "INVALID_REQUEST", {"keys.zip"}, "missing key column 'zip' (string)",
    ),
    "extra key column": (
        get("wide", USER, texts("zipp", "x")), INVALID, "INVALID_REQUEST", {"keys.zipp"}, "unknown key column 'zipp'",
    ),
    "misspelt key column": (
        get("wide", packed("user_idd", "q", 1)), INVALID, "INVALID_REQUEST", {"keys.user_id", "keys.user_idd"},
        "did you mean 'user_id'?",
    ),
    "key column twice": (
        get("wide", USER, USER), INVALID, "INVALID_REQUEST", {"keys.user_id"}, "stands twice",
    ),
    "text for an integer": (
        get("wide", texts("user_id", "1")), INVALID, "INVALID_REQUEST", {"keys.user_id"}, "expected int64, got string",
    ),
    "narrower integer": (
        get("wide", packed("user_id", "i", 1)), INVALID, "INVALID_REQUEST", {"keys.user_id"},
        "expected int64, got int32",
    ),
    "float, NaN as it may be": (
        get("wide", packed("user_id", "d", float("nan"))), INVALID, "INVALID_REQUEST", {"keys.user_id"},
        "expected int64, got float64",
    ),
    "unknown type": (
        get("wide", raw("user_id", 77)), INVALID, "INVALID_REQUEST", {"keys.user_id"},
        "expected int64, got type number 77",
    ),
    "no type": (
        get("wide", raw("user_id", 0, bytes(8))), INVALID, "INVALID_REQUEST", {"keys.user_id"},
        "expected int64, got type number 0",
    ),
    "vector": (
        get("wide", raw("user_id", 9, bytes(8), length=2)), INVALID, "INVALID_REQUEST", {"keys.user_id"},
        "expected int64, got vector[2]",
    ),
    "vector of an impossible length": (
        get("wide", raw("user_id", 9, bytes(8), length=2**31)), INVALID, "INVALID_REQUEST", {"keys.user_id"},
        "expected int64, got vector[2147483648]",
    ),
    "length where there is none": (
        get("wide", raw("user_id", 3, bytes(8), length=2)), INVALID, "INVALID_REQUEST", {"keys.user_id"},
        "length 2, and only a vector has one",
    ),
    "ragged columns": (
        get("ranking", packed("user_id", "q", 1, 2), *PLACE), INVALID, "INVALID_REQUEST", {"keys"},
        "columns differ in length: user_id has 2, country has 1 rows",
    ),
    "empty batch": (
        get("wide", packed("user_id", "q")), INVALID, "INVALID_REQUEST", {"keys"}, "the batch is empty",
    ),
    "too many rows": (
        get("wide", raw("user_id", 3, bytes(8 * 10_001))), INVALID, "TOO_LARGE", {"keys.user_id"},
        "10,001 rows; the most in one request is 10,000. Send several requests",
    ),
    "broken integer": (
        get("wide", raw("user_id", 3, b"123")), INVALID, "INVALID_REQUEST", {"keys.user_id"},
        "3 bytes are not a whole number of int64",
    ),
    "huge key": (
        get("ranking", USER, texts("country", "x" * 4_097), texts("zip", "1")), INVALID, "INVALID_REQUEST",
        {"keys.country"}, "row 0 is 4,097 bytes long; the most is 4,096",
    ),
    "not UTF-8": (
        get("ranking", packed("user_id", "q", 1, 2), texts("country", "x", UTF8), texts("zip", "", "")), INVALID,
        "INVALID_REQUEST", {"keys.country"}, "row 1 is not valid UTF-8",
    ),
    "half a character": (
        get("ranking", packed("user_id", "q", 1, 2), texts("country", b"\xc3", b"\xbc"), texts("zip", "", "")), INVALID,
        "INVALID_REQUEST", {"keys.country"}, "row 1 is not valid UTF-8",
    ),
    "null key": (
        get("wide", nulls(packed("user_id", "q", 1, 2), True, False)), INVALID, "INVALID_REQUEST", {"keys.user_id"},
        "row 1 is null; a key has a value in every row",
    ),
    "validity of another length": (
        get("wide", raw("user_id", 3, bytes(8), validity=b"\x01\x01")), INVALID, "INVALID_REQUEST", {"keys.user_id"},
        "2 bytes of validity for 1 rows",
    ),
    "falling offsets": (
        get("ranking", packed("user_id", "q", 1, 2), raw("country", 6, b"ab", offsets=struct.pack("<3I", 0, 3, 2)),
            texts("zip", "", "")),
        INVALID, "INVALID_REQUEST", {"keys.country"}, "offsets do not rise from 0 to the 2 bytes of data",
    ),
    "no offsets": (
        get("ranking", USER, raw("country", 6, b"ab"), texts("zip", "")), INVALID, "INVALID_REQUEST",
        {"keys.country"}, "offsets are n + 1 uint32",
    ),
    "as of the future": (
        get("wide", USER, as_of_us=now_us() + HOUR_US), INVALID, "INVALID_REQUEST", {"as_of_us"},
        "is after the server's clock",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_READS)
def test_bad_reads(stub: FeatureServingServiceStub, case: str) -> None:
    """A request for features that is wrong is refused with a code, a reason, the field at fault and a clear message."""
    request, code, reason, fields, message = BAD_READS[case]
    error = refusal(lambda: stub.GetFeatures(request))
    assert (error.code, error.reason, set(error.violations or ())) == (code, reason, fields)
    assert message in error.message


def row(**changes: pb.Column | None) -> pb.WriteRowsRequest:
    return activity(1, now_us(), **changes)


def with_times(**times: bytes) -> pb.WriteRowsRequest:
    request = row()
    for name, value in times.items():
        setattr(request, name, value)
    return request


def of_view(view: str) -> pb.WriteRowsRequest:
    request = row()
    request.view = view
    return request


def int64s(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


BAD_WRITES: dict[str, tuple[pb.WriteRowsRequest, grpc.StatusCode, str, set[str], str]] = {
    "unknown view": (
        of_view("activty"), NOT_FOUND, "UNKNOWN_NAME", set(), "feature view 'activty'; did you mean 'activity'?",
    ),
    "view by hash": (
        of_view("activity#0123456789"), INVALID, "INVALID_REQUEST", {"feature view"}, "only a feature service",
    ),
    "missing column": (
        row(plan=None, taste=None), INVALID, "INVALID_REQUEST", {"columns.plan", "columns.taste"},
        "missing column 'plan' (string); missing column 'taste' (vector[4])",
    ),
    "unknown column": (
        row(more=packed("scores", "f", 1.0)), INVALID, "INVALID_REQUEST", {"columns.scores"},
        "unknown column 'scores'; did you mean 'score'?",
    ),
    "wrong type": (
        row(clicks=packed("clicks", "d", 1.0)), INVALID, "INVALID_REQUEST", {"columns.clicks"},
        "expected int64, got float64",
    ),
    "vector of another length": (
        row(taste=vectors("taste", [1.0])), INVALID, "INVALID_REQUEST", {"columns.taste"},
        "expected vector[4], got vector[1]",
    ),
    "neither true nor false": (
        row(active=raw("active", 1, b"\x02")), INVALID, "INVALID_REQUEST", {"columns.active"}, "one byte, 0 or 1",
    ),
    "under the min": (
        row(clicks=packed("clicks", "q", -1)), INVALID, "INVALID_REQUEST", {"rows[0].clicks"},
        "-1 is less than the min 0",
    ),
    "over the max": (
        row(rate=packed("rate", "d", 1.5)), INVALID, "INVALID_REQUEST", {"rows[0].rate"}, "1.5 is greater than the max",
    ),
    "not one of the allowed": (
        row(plan=texts("plan", "gold")), INVALID, "INVALID_REQUEST", {"rows[0].plan"}, "'gold' is not one of",
    ),
    "null where forbidden": (
        row(level=nulls(packed("level", "i", 0), False)), INVALID, "INVALID_REQUEST", {"rows[0].level"},
        "is null, and the feature is declared not_null",
    ),
    "NaN where forbidden": (
        row(score=packed("score", "f", float("nan"))), INVALID, "INVALID_REQUEST", {"rows[0].score"}, "is NaN",
    ),
    "several things at once": (
        row(clicks=packed("clicks", "q", -1), rate=packed("rate", "d", 2.0)), INVALID, "INVALID_REQUEST",
        {"rows[0].clicks", "rows[0].rate"}, "activity@1",
    ),
    "null key": (
        row(user_id=nulls(packed("user_id", "q", 0), False)), INVALID, "INVALID_REQUEST", {"rows[0].user_id"},
        "is null; a key has a value in every row",
    ),
    "event time in the future": (
        with_times(event_times=int64s(now_us() + HOUR_US)), INVALID, "INVALID_REQUEST",
        {"rows[0].event_time", "rows[0].known_at"}, "the last instant accepted now",
    ),
    "known in the future": (
        with_times(known_at=int64s(now_us() + HOUR_US)), INVALID, "INVALID_REQUEST", {"rows[0].known_at"},
        "the last instant accepted now",
    ),
    "no event time": (
        with_times(event_times=b""), INVALID, "INVALID_REQUEST", {"columns"}, "event_times has 0",
    ),
    "half an event time": (
        with_times(event_times=b"1234"), INVALID, "INVALID_REQUEST", {"event_times"}, "4 bytes are not a whole number",
    ),
    "more known-at times than rows": (
        with_times(known_at=int64s(1, 2)), INVALID, "INVALID_REQUEST", {"columns"}, "known_at has 2",
    ),
    "empty batch": (
        numbers([], 1.0), INVALID, "INVALID_REQUEST", {"columns"}, "the batch is empty",
    ),
    "too many rows": (
        numbers(range(10_001), 1.0), INVALID, "TOO_LARGE", {"columns.user_id"}, "the most in one request is 10,000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_WRITES)
def test_bad_writes(stub: FeatureServingServiceStub, case: str) -> None:
    """A write that is wrong is refused with a code, a reason, the row and column at fault and a clear message."""
    request, code, reason, fields, message = BAD_WRITES[case]
    error = refusal(lambda: stub.WriteRows(request))
    assert (error.code, error.reason, set(error.violations or ())) == (code, reason, fields)
    assert message in error.message


def test_a_refused_write_writes_nothing(stub: FeatureServingServiceStub) -> None:
    """One bad row among good ones keeps all of them out."""
    request = numbers([200, 201, 202], 1.0)
    request.columns[0].validity = bytes([0b101])
    assert refusal(lambda: stub.WriteRows(request)).violations == {
        "rows[1].user_id": "is null; a key has a value in every row"
    }
    assert stub.GetFeatures(wide(200, 201, 202)).status == bytes([3, 3, 3])


@pytest.mark.parametrize("method", [*READS, *WRITES])
def test_garbage_for_a_message(server: Server, method: str, rng: np.random.Generator) -> None:
    """Bytes that are no message are refused as such; cut and flipped messages never fail in another way."""
    with server.channel() as channel:
        call: Any = channel.unary_unary(f"/featserve.v1.FeatureServingService/{method}")
        error = refusal(lambda: call(b"\xff" * 100))
        assert (error.code, error.reason) == (INVALID, "INVALID_REQUEST")
        assert "100 bytes that are no " in error.message
        whole = (row() if method in WRITES else wide(1, 2, 3)).SerializeToString()
        for _ in range(100):
            damaged = bytearray(whole[: rng.integers(len(whole))] if rng.integers(2) else whole)
            for at in rng.integers(len(damaged) or 1, size=3 if damaged else 0):
                damaged[at] = rng.integers(256)
            ended = call.future(bytes(damaged))
            assert ended.code() in (grpc.StatusCode.OK, INVALID, NOT_FOUND, PRECONDITION), ended.details()


def test_garbage_on_streams(server: Server) -> None:
    """Bytes that are no message are answered with their error on a stream of reads, and end a stream of writes."""
    with server.channel() as channel:
        reads: Any = channel.stream_stream("/featserve.v1.FeatureServingService/StreamFeatures")
        good = pb.StreamFeaturesRequest(request=wide(1)).SerializeToString()
        answers = [pb.StreamFeaturesResponse.FromString(a) for a in reads(iter([b"\xff", b"", good]))]
        assert [a.error.code for a in answers] == [3, 3, 0]
        assert answers[2].response.rows == 1
        for method in WRITE_STREAMS:
            writes: Any = channel.stream_unary(f"/featserve.v1.FeatureServingService/{method}")
            refused = refusal(lambda: writes(iter([b"\xff"])))  # noqa: B023
            assert (refused.code, refused.metadata) == (INVALID, {"messages_written": "0"})


def long_texts(length: int) -> dict[str, Callable[[FeatureServingServiceStub], object]]:
    name = "ü" * length
    return {
        "service": lambda stub: stub.GetFeatures(get(name, USER)),
        "key column": lambda stub: stub.GetFeatures(get("wide", USER, packed(name, "q", 1))),
        "key columns": lambda stub: stub.GetFeatures(
            get("wide", USER, *[packed(f"{i}{'x' * 50}", "q", 1) for i in range(length // 100)])
        ),
        "view": lambda stub: stub.DescribeView(pb.DescribeViewRequest(view=name)),
        "column": lambda stub: stub.WriteRows(row(more=packed(name, "q", 1))),
        "columns": lambda stub: stub.WriteRows(pb.WriteRowsRequest(view="numbers")),
        "value": lambda stub: stub.WriteRows(row(plan=texts("plan", name))),
    }


@pytest.mark.parametrize("what", long_texts(1))
@pytest.mark.parametrize("length", [300, 3_000, 1_000_000])
def test_errors_fit_into_trailers(stub: FeatureServingServiceStub, what: str, length: int) -> None:
    """However long the name or the list that is at fault: its error arrives, cut, with its code and details."""
    error = refusal(lambda: long_texts(length)[what](stub))
    assert error.code in (INVALID, NOT_FOUND)
    assert error.reason in ("INVALID_REQUEST", "UNKNOWN_NAME")


@pytest.mark.parametrize(("user", "problem"), [(DAMAGED[0], "is truncated"), (DAMAGED[1], "is not a featserve row")])
def test_a_damaged_row_fails_its_request_alone(server: Server, user: int, problem: str) -> None:
    """A row that is not what its view writes is DATA_LOSS for whoever asks for it, is logged, and harms nobody else."""
    with server.stub() as stub:
        error = refusal(lambda: stub.GetFeatures(wide(1, user)))
        assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "CORRUPT_ROW")
        assert f"view numbers@1: stored row 1 of the batch {problem}" in error.message
        assert "materialize the view again" in error.message
        assert any(error.message in event["message"] for event in server.events() if event["level"] == "error")
        assert stub.GetFeatures(wide(1)).rows == 1


def test_too_large_a_message(stub: FeatureServingServiceStub) -> None:
    """A message over the limit is refused unread, and the connection goes on."""
    error = refusal(lambda: stub.GetFeatures(get("wide", raw("user_id", 3, bytes(17 << 20)))))
    assert (error.code, "larger than max" in error.message) == (EXHAUSTED, True)
    assert stub.GetFeatures(wide(1)).rows == 1


def test_too_large_an_answer(stub: FeatureServingServiceStub) -> None:
    """An answer over the limit is an error, and the connection goes on."""
    token = texts("token", b"x" * (2 << 20), type=pb.DATA_TYPE_BYTES)
    stub.WriteRows(activity(210, now_us(), token=token, last_seen=instants("last_seen", 0)))

    def ask(rows: int) -> Refusal:
        keys = [packed("user_id", "q", *[210] * rows), texts("country", *["de"] * rows), texts("zip", *["1"] * rows)]
        return refusal(lambda: stub.GetFeatures(get("ranking", *keys)))

    error = ask(10)
    assert (error.code, error.reason) == (EXHAUSTED, "TOO_LARGE")
    assert re.match(
        r"the answer takes 2\d,\d{3},\d{3} bytes; the most is 16,777,216 .*Ask for fewer rows", error.message
    )
    error = ask(10_000)  # of what would be twenty gigabytes, nothing is made
    assert (error.code, error.reason) == (INVALID, "TOO_LARGE")
    assert "the strings of 10,000 rows take 20,9" in error.message
    assert "Ask for fewer rows" in error.message
    assert stub.GetFeatures(wide(1)).rows == 1


@pytest.mark.parametrize("method", ["GetFeatures", "WriteRows"])
def test_what_nobody_expected_is_an_internal_error(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """An exception that is no error of ours is INTERNAL, told by its class alone, and logged; the next call is well."""
    request = wide(1) if method == "GetFeatures" else numbers([1], 1.0)

    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("of nobody else's concern")

    def ask(address: str) -> Refusal:
        with grpc.insecure_channel(address) as channel:
            call = getattr(FeatureServingServiceStub(channel), method)
            with monkeypatch.context() as broken:
                broken.setattr(RocksStore, "read_many" if method == "GetFeatures" else "write_many", fail)
                refused = refusal(lambda: call(request, timeout=PATIENCE_S))
            call(request, timeout=PATIENCE_S)
        return refused

    error = served_here(Project.make(tmp_path / "project", **TRANSPORTS[transport]), ask)
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "SERVING_ERROR")
    assert error.message == "internal error: ZeroDivisionError"
    (logged,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert logged.getMessage() == "a request failed: of nobody else's concern"
    assert logged.exc_info is not None
