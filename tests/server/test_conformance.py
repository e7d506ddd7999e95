"""What every transport does the same: each method, asked through the generated stub over a real connection."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.server.service import Call, Service
from tests.server.messages import (
    HOUR_US,
    activity,
    now_us,
    numbers,
    packed,
    ranking,
    read_status,
    refusal,
    texts,
    weather,
    wide,
)
from tests.serving import PATIENCE_S, TRANSPORTS, Project, Server, served_here

pytest_plugins = ["tests.served"]

SERVICE = "featserve.v1.FeatureServingService"
PRESENT, NOT_FOUND, EXPIRED = 1, 3, 4
NEVER_US = -(2**63)


@pytest.fixture
def stub(server: Server) -> Iterator[FeatureServingServiceStub]:
    with server.stub() as stub:
        yield stub


def test_get_features_answers_with_values_columns_statuses_and_times(stub: FeatureServingServiceStub) -> None:
    """One answer holds the tensor, the typed columns, a status for each view, validity bits and event times."""
    event_us = now_us()
    stub.WriteRows(activity(100, event_us))
    stub.WriteRows(weather("de", "10115", 20.5, 3.25, event_us - 7))
    stub.WriteRows(activity(101, event_us - HOUR_US - 1_000_000))  # older than the ttl
    answer = stub.GetFeatures(ranking(100, 101, 102, include_event_times=True))
    assert answer.rows == 3
    values = np.frombuffer(answer.values, "<f8").reshape(3, 10)
    # rate, score, active, level, taste; temp, wind. A null is its default, 0.5, or NaN.
    assert values[0].tolist() == [0.25, 1.5, 1.0, -7.0, 1.0, 2.0, 3.0, 4.0, 20.5, 3.25]
    np.testing.assert_array_equal(values[1:], [[0.5, *[np.nan] * 7, 20.5, 3.25]] * 2)
    status = np.frombuffer(answer.status, np.uint8).reshape(3, 2)
    assert status.tolist() == [[PRESENT, PRESENT], [EXPIRED, PRESENT], [NOT_FOUND, PRESENT]]
    validity = np.unpackbits(
        np.frombuffer(answer.validity, np.uint8).reshape(3, 2), axis=1, count=11, bitorder="little"
    )
    assert validity.tolist() == [[1] * 11, [0] * 9 + [1] * 2, [0] * 9 + [1] * 2]
    clicks, last_seen, plan, token = answer.columns
    assert struct.unpack("<3q", clicks.data)[0] == 2**60 + 1
    assert struct.unpack("<3q", last_seen.data)[0] == 1_600_000_000_000_001
    assert (plan.data.decode(), struct.unpack("<4I", plan.offsets)) == ("gewerblich-üfreefree", (0, 13, 17, 21))
    assert (token.data, struct.unpack("<4I", token.offsets)) == (b"\x00\xff", (0, 2, 2, 2))
    times = np.frombuffer(answer.event_times, "<i8").reshape(3, 2)
    old = event_us - HOUR_US - 1_000_000
    assert times.tolist() == [[event_us, event_us - 7], [old, event_us - 7], [NEVER_US, event_us - 7]]


def test_answer_carries_what_was_asked_for_and_no_more(stub: FeatureServingServiceStub) -> None:
    """An answer says by number which schema it follows; schema and event times come only when asked for."""
    stub.WriteRows(numbers([110], 1.0))
    plain = stub.GetFeatures(wide(110))
    assert (plain.HasField("schema"), plain.event_times, plain.validity, list(plain.columns)) == (False, b"", b"", [])
    full = stub.GetFeatures(wide(110, include_schema=True))
    described = stub.DescribeService(pb.DescribeServiceRequest(service="wide")).schema
    assert full.schema == described
    assert plain.schema_id == full.schema_id == int(described.hash[:16], 16)
    assert full.values == plain.values == struct.pack("<50f", *[1.0 + i for i in range(50)])


def test_as_of_shows_the_past(stub: FeatureServingServiceStub) -> None:
    """A row that was not yet known at ``as_of`` is not found then."""
    before = now_us()
    stub.WriteRows(numbers([120], 1.0))
    assert stub.GetFeatures(wide(120)).status == bytes([PRESENT])
    assert stub.GetFeatures(wide(120, as_of_us=before - 1)).status == bytes([NOT_FOUND])
    assert stub.GetFeatures(wide(120, as_of_us=-(2**63))).status == bytes([NOT_FOUND])


def test_a_service_is_asked_for_by_name_version_or_hash(stub: FeatureServingServiceStub) -> None:
    """``name``, ``name@version``, ``name#hash`` and a prefix of the hash of 8 digits or more mean one service."""
    hash_ = stub.DescribeService(pb.DescribeServiceRequest(service="wide")).schema.hash
    answers = []
    for reference in ("wide", "wide@1", f"wide#{hash_}", f"wide#{hash_[:8]}"):
        request = wide(1)
        request.service = reference
        answers.append(stub.GetFeatures(request).schema_id)
    assert set(answers) == {int(hash_[:16], 16)}


def test_every_key_type_is_found_again(stub: FeatureServingServiceStub) -> None:
    """A composite key of bytes, timestamp, int32 and bool finds the row that was written with it, and only that."""

    def keys(serial: bytes, model: int, real: bool) -> list[pb.Column]:
        made = pb.Column(name="made", type=pb.DATA_TYPE_TIMESTAMP, data=struct.pack("<q", -1))
        serials = texts("serial", serial, type=pb.DATA_TYPE_BYTES)
        return [serials, made, packed("model", "i", model), packed("real", "?", real)]

    columns = [*keys(b"\xff\x00", -5, True), packed("charge", "f", 0.5)]
    stub.WriteRows(pb.WriteRowsRequest(view="health", columns=columns, event_times=struct.pack("<q", now_us())))
    found = [
        stub.GetFeatures(pb.GetFeaturesRequest(service="devices", keys=key)).status
        for key in (keys(b"\xff\x00", -5, True), keys(b"\xff\x00", -5, False), keys(b"\xff", -5, True))
    ]
    assert found == [bytes([PRESENT]), bytes([NOT_FOUND]), bytes([NOT_FOUND])]


def test_an_empty_text_is_a_key_like_any_other(stub: FeatureServingServiceStub) -> None:
    """("", "x") and ("x", "") are two entities, and both can be written and read."""
    for i, (country, zip_) in enumerate((("", "x"), ("x", ""), ("", ""))):
        stub.WriteRows(weather(country, zip_, float(i), 0.0))
    users = packed("user_id", "q", 1, 1, 1)
    keys = [users, texts("country", "", "x", ""), texts("zip", "x", "", "")]
    answer = stub.GetFeatures(pb.GetFeaturesRequest(service="compact", keys=keys))
    assert np.frombuffer(answer.values, "<f4").reshape(3, 3)[:, 2].tolist() == [0.0, 1.0, 2.0]


def test_stream_answers_in_order_and_outlives_errors(stub: FeatureServingServiceStub) -> None:
    """Each request on a stream has its answer, in order; a refused one is answered with its error."""
    stub.WriteRows(numbers([130, 131, 132], 5.0))
    requests = [wide(130), wide(130, 131), pb.GetFeaturesRequest(service="wyde"), wide(), wide(132, 131, 130)]
    answers = list(stub.StreamFeatures(pb.StreamFeaturesRequest(request=r) for r in requests))
    assert [a.WhichOneof("result") for a in answers] == ["response", "response", "error", "error", "response"]
    assert [a.response.rows for a in answers] == [1, 2, 0, 0, 3]
    wrong = read_status(status_pb2.Status.FromString(answers[2].error.SerializeToString()), grpc.StatusCode.NOT_FOUND)
    assert (answers[2].error.code, wrong.reason) == (5, "UNKNOWN_NAME")
    assert wrong.message == "unknown feature service 'wyde'; did you mean 'wide'?"
    assert (answers[3].error.code, "empty" in answers[3].error.message) == (3, True)


def test_describe_service_says_what_to_send_and_how_to_read(stub: FeatureServingServiceStub) -> None:
    """The schema holds keys, views, and for each feature its type and its place."""
    schema = stub.DescribeService(pb.DescribeServiceRequest(service="ranking")).schema
    assert (schema.name, schema.version, len(schema.hash), schema.owner) == ("ranking", 1, 64, "growth")
    assert (schema.dtype, schema.width, schema.description) == (pb.DATA_TYPE_FLOAT64, 10, "Ranks")
    assert [(k.name, k.type) for k in schema.keys] == [
        ("user_id", pb.DATA_TYPE_INT64),
        ("country", pb.DATA_TYPE_STRING),
        ("zip", pb.DATA_TYPE_STRING),
    ]
    activity_, weather_ = schema.views
    assert (activity_.name, list(activity_.keys), activity_.ttl_us) == ("activity", ["user_id"], HOUR_US)
    assert not weather_.HasField("ttl_us")
    places = {f.name: (f.tensor if f.HasField("tensor") else None, f.column) for f in schema.features}
    assert places["activity.clicks"] == (None, 0)
    assert places["activity.taste"] == (4, 0)
    assert places["weather.wind"] == (9, 0)
    assert {f.name: f.default_json for f in schema.features if f.default_json} == {
        "activity.rate": "0.5",
        "activity.plan": '"free"',
    }


def test_list_services_names_every_version(stub: FeatureServingServiceStub) -> None:
    """The list holds each service with its hash, size and keys, and says which version the name means."""
    services = stub.ListServices(pb.ListServicesRequest()).services
    assert [(s.name, s.version, s.promoted, s.features) for s in services] == [
        ("compact", 1, True, 4),
        ("devices", 1, True, 1),
        ("ranking", 1, True, 11),
        ("wide", 1, True, 50),
    ]
    assert list(services[1].keys) == ["serial", "made", "model", "real"]
    assert services[3].hash == stub.DescribeService(pb.DescribeServiceRequest(service="wide")).schema.hash


def test_describe_view_says_what_a_row_holds(stub: FeatureServingServiceStub) -> None:
    """The description of a view lists its key columns and features with their types."""
    view = stub.DescribeView(pb.DescribeViewRequest(view="activity"))
    assert (view.name, view.version, view.owner, view.ttl_us) == ("activity", 1, "growth", HOUR_US)
    assert [(k.name, k.type) for k in view.keys] == [("user_id", pb.DATA_TYPE_INT64)]
    fields = {f.name: (f.type, f.length, f.default_json) for f in view.features}
    assert fields["taste"] == (pb.DATA_TYPE_VECTOR, 4, "")
    assert fields["plan"] == (pb.DATA_TYPE_STRING, 0, '"free"')
    assert stub.DescribeView(pb.DescribeViewRequest(view="activity@1")) == view


def test_metadata_is_handed_over_whole(transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is given a call's metadata as it was sent: bytes, a key that stands twice, kilobytes of text."""
    twice = ("twice", "first"), ("twice", "second")
    sent: tuple[tuple[str, str | bytes], ...] = (("raw-bin", bytes(range(256))), *twice, ("text", "x" * 6_000))
    given: list[tuple[str, str | bytes]] = []
    features = Service._features

    def looked_at(service: Service, request: pb.GetFeaturesRequest, call: Call) -> pb.GetFeaturesResponse:
        given.extend(call.metadata)
        return features(service, request, call)

    def ask(address: str) -> int:
        with grpc.insecure_channel(address) as channel:
            stub = FeatureServingServiceStub(channel)
            rows: int = stub.GetFeatures(wide(1, include_schema=True), metadata=sent, timeout=PATIENCE_S).rows
        return rows

    monkeypatch.setattr(Service, "_features", looked_at)
    assert served_here(Project.make(tmp_path / "project", **TRANSPORTS[transport]), ask) == 1
    assert tuple(each for each in given if each[0] in dict(sent)) == sent


def test_a_late_row_changes_nothing(stub: FeatureServingServiceStub) -> None:
    """An answer to a write says how many rows are now the newest of their entity."""
    now = now_us()
    first = stub.WriteRows(numbers([140, 141], 2.0, now))
    second = stub.WriteRows(numbers([140, 142], 1.0, now - 1))
    assert [(answer.rows, answer.stored) for answer in (first, second)] == [(2, 2), (2, 1)]
    answer = stub.GetFeatures(wide(140, 142))
    assert np.frombuffer(answer.values, "<f4").reshape(2, 50)[:, 0].tolist() == [2.0, 1.0]


def test_stream_rows_writes_message_by_message(stub: FeatureServingServiceStub) -> None:
    """A stream of writes answers once with its totals."""
    requests = [numbers([150 + i], float(i)) for i in range(5)]
    answer = stub.StreamRows(pb.StreamRowsRequest(request=r) for r in requests)
    assert answer == pb.StreamRowsResponse(messages=5, rows=5, stored=5, token=answer.token)
    assert stub.GetFeatures(wide(*range(150, 155))).status == bytes([PRESENT] * 5)
    assert stub.StreamRows(iter(())) == pb.StreamRowsResponse()


def test_stream_rows_says_how_far_it_came(stub: FeatureServingServiceStub) -> None:
    """The first message that is refused ends a stream of writes; those before it stay, those after it are not done."""
    requests = [numbers([160], 1.0), numbers([161], 1.0), numbers([], 1.0), numbers([162], 1.0)]
    error = refusal(lambda: stub.StreamRows(pb.StreamRowsRequest(request=r) for r in requests))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert error.metadata == {"messages_written": "2"}
    assert stub.GetFeatures(wide(160, 161, 162)).status == bytes([PRESENT, PRESENT, NOT_FOUND])


def test_health_says_serving(server: Server) -> None:
    """The standard health service answers for the server as a whole and for the feature service; others are unknown."""
    with server.channel() as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        assert refusal(lambda: health.Check(health_pb2.HealthCheckRequest(service="x"))).code.name == "NOT_FOUND"
        for name, status in (("", 1), (SERVICE, 1), ("x", 3)):
            watch = health.Watch(health_pb2.HealthCheckRequest(service=name))
            assert next(watch).status == status
            watch.cancel()


def test_reflection_describes_the_service(server: Server) -> None:
    """A client that has no protos finds the services by reflection, and the full contract of each."""
    with server.channel() as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        names = set(database.get_services())
        assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        found = DescriptorPool(database).FindServiceByName(SERVICE)
        assert [m.name for m in found.methods] == [m.name for m in pb.DESCRIPTOR.services_by_name[found.name].methods]
        request = found.methods_by_name["GetFeatures"].input_type
        assert [f.name for f in request.fields] == [f.name for f in pb.GetFeaturesRequest.DESCRIPTOR.fields]


def test_unknown_methods_are_unimplemented(server: Server) -> None:
    """A method or service that does not exist is answered UNIMPLEMENTED."""
    with server.channel() as channel:
        for path in (f"/{SERVICE}/Nothing", "/other.Service/GetFeatures"):
            call: Any = channel.unary_unary(path)
            assert refusal(partial(call, b"")).code is grpc.StatusCode.UNIMPLEMENTED
