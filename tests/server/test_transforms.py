"""Transforms over a real connection: what they are sent, what a broken one does, and which code a server runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import featserve
from featserve._proto import serving_pb2 as pb
from featserve.errors import CallerError, InvalidRequest, TransformError
from tests.server.messages import instants, nulls, packed, refusal, texts, vectors
from tests.serving import TRANSPORTS, Project, Server, until
from tests.transforms import HEAD, write

pytest_plugins = ["tests.served"]

DEFINITIONS = f"""{HEAD}
@on_demand_transform(
    inputs={{"x": facts["x"], "amount": RequestColumn("amount", Float64), "now": RequestTime(), "seen": facts["seen"]}},
    outputs=[Field("ratio", Float64), Field("age_us", Int64), Field("text", String)],
)
def live(x, amount, now, seen):
    text = np.array([f"{{a:g}} of {{b:g}}" for a, b in zip(amount.tolist(), x.tolist())], np.dtypes.StringDType())
    return {{"ratio": amount / x, "age_us": (now - seen).astype(np.int64), "text": text}}


@on_demand_transform(inputs={{"how": RequestColumn("how", Int32)}}, outputs=[Field("out", Float64)])
def fragile(how):
    if (how == 9001).any():
        raise ValueError("over nine thousand")
    if (how == 9002).any():
        return how
    if (how == 9003).any():
        return np.zeros(len(how) + 1)
    if (how == 9004).any():
        raise SystemExit(1)
    if (how == 9005).any():
        how[:] = 0
    if (how == 9006).any():
        return 1 // 0
    return how * 0.5


@on_demand_transform(
    inputs={{
        "flag": RequestColumn("flag", Bool), "count": RequestColumn("count", Int64),
        "rate": RequestColumn("rate", Float32), "name": RequestColumn("name", String),
        "token": RequestColumn("token", Bytes), "at": RequestColumn("at", Timestamp),
        "taste": RequestColumn("taste", Vector(2)),
    }},
    outputs=[
        Field("flag", Bool), Field("count", Int64), Field("rate", Float32), Field("name", String),
        Field("token", Bytes), Field("at", Timestamp), Field("taste", Vector(2)),
    ],
    nulls="pass",
)
def echo(flag, count, rate, name, token, at, taste, valid):
    given = {{"flag": flag, "count": count, "rate": rate, "name": name, "token": token, "at": at, "taste": taste}}
    return {{key: (values, valid[key]) for key, values in given.items()}}


computed = FeatureService("computed", [facts["x", "name"], live], dtype=Float64)
broken = FeatureService("broken", [facts["x"], fragile], dtype=Float64)
echoed = FeatureService("echoed", [facts["x"], echo], dtype=Float64)
"""

ECHO: dict[str, Any] = {
    "flag": [True, None],
    "count": [2**62, None],
    "rate": [0.1, None],
    "name": ["é\0", None],
    "token": [b"\xff\x00", None],
    "at": [datetime(2024, 1, 2, 3, 4, 5, 6, UTC), None],
    "taste": [[1.5, -0.0], None],
}


@pytest.fixture(scope="module")
def computing(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server whose services have transforms."""
    folder = tmp_path_factory.mktemp("computing")
    with Server(Project.make(folder, DEFINITIONS, **TRANSPORTS[transport])) as server:
        yield server


@pytest.fixture
def client(computing: Server) -> Iterator[featserve.Client]:
    with computing.client() as client:
        yield client


def write_facts(client: featserve.Client, user: int, x: float | None, seen: datetime) -> None:
    """Write a row of facts about a user, most of it null."""
    names = ["flag", "level", "count", "rate", "name", "token", "taste"]
    row = {name: [None] for name in names} | {"user_id": [user], "x": [x], "y": [None], "seen": [seen]}
    client.write("facts", row, event_time=seen)


def test_request_columns_and_request_time_are_used(client: featserve.Client) -> None:
    """A vector holds what was calculated of stored and sent values, as of the instant that was asked for."""
    seen = datetime.now(UTC) - timedelta(minutes=1)
    write_facts(client, 1, 4.0, seen)
    at = datetime.now(UTC)
    keys = {"user_id": [1, 1, 2]}
    matrix = client.get("computed", keys, request={"amount": [1.0, None, 1.0]}, as_of=at)
    assert matrix.to_dict() == {
        "facts.x": [4.0, 4.0, None],
        "facts.name": [None, None, None],
        "live.ratio": [0.25, None, None],
        "live.age_us": [(at - seen) // timedelta(microseconds=1), None, None],
        "live.text": ["1 of 4", None, None],
    }
    assert matrix.status.tolist() == [[1, 2, 1, 1, 1], [1, 2, 2, 2, 2], [3, 3, 2, 2, 2]]


def test_a_frame_of_keys_may_hold_the_request_columns(client: featserve.Client) -> None:
    """A pandas frame with keys and request columns is one argument."""
    pandas = pytest.importorskip("pandas")
    matrix = client.get("broken", pandas.DataFrame({"user_id": [1, 2], "how": np.array([4, 6], np.int32)}))
    assert matrix.column("fragile.out").to_list() == [2.0, 3.0]


def test_every_type_of_request_column_is_exact(client: featserve.Client) -> None:
    """Values and nulls of each type reach the function as they were sent, and come back as they were."""
    matrix = client.get("echoed", {"user_id": [1, 2]}, request=ECHO)
    expected = ECHO | {"rate": [float(np.float32(0.1)), None]}
    assert {name: matrix.to_dict()[f"echo.{name}"] for name in ECHO} == expected


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (9001, "transform fragile@1 failed: ValueError: over nine thousand"),
        (9002, "transform fragile@1 returned int32 of shape (1,) for output 'out'; it declares float64"),
        (9003, "transform fragile@1 returned float64 of shape (2,) for output 'out'"),
        (9004, "transform fragile@1 failed: SystemExit: 1"),
        (9005, "transform fragile@1 failed: ValueError: assignment destination is read-only"),
        (9006, "transform fragile@1 failed: ZeroDivisionError"),
    ],
)
def test_a_broken_transform_fails_its_request_alone(computing: Server, how: int, message: str) -> None:
    """The request ends INTERNAL with the transform's name, and the next one on the same connection is answered."""
    with computing.stub() as stub:
        request = partial_request("broken", packed("how", "i", how))
        found = refusal(lambda: stub.GetFeatures(request))
        assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "TRANSFORM_FAILED")
        assert found.metadata == {"transform": "fragile@1"}
        assert found.message.startswith(message)
        assert stub.GetFeatures(partial_request("broken", packed("how", "i", 4))).rows == 1
        answers = stub.StreamFeatures(
            pb.StreamFeaturesRequest(request=partial_request("broken", packed("how", "i", value)))
            for value in (4, how, 4)
        )
        kinds = [answer.WhichOneof("result") for answer in answers]
        assert kinds == ["response", "error", "response"]
    with computing.client() as client, pytest.raises(TransformError, match="transform fragile@1"):
        client.get("broken", {"user_id": [1]}, request={"how": [how]})


def partial_request(service: str, *columns: pb.Column) -> pb.GetFeaturesRequest:
    return pb.GetFeaturesRequest(service=service, keys=[packed("user_id", "q", 1)], request_columns=columns)


AMOUNT = packed("amount", "d", 1.0)
REFUSED: dict[str, tuple[str, list[pb.Column], dict[str, str]]] = {
    "missing": ("computed", [], {"request_columns.amount": "missing request column 'amount' (float64)"}),
    "unknown": (
        "computed",
        [packed("amout", "d", 1.0)],
        {
            "request_columns.amount": "missing request column 'amount' (float64)",
            "request_columns.amout": "unknown request column 'amout'; did you mean 'amount'?",
        },
    ),
    "extra": (
        "computed",
        [AMOUNT, packed("other", "d", 1.0)],
        {"request_columns.other": "unknown request column 'other'; there is: 'amount'"},
    ),
    "twice": ("computed", [AMOUNT, AMOUNT], {"request_columns.amount": "request column 'amount' stands twice"}),
    "of another type": (
        "computed",
        [packed("amount", "f", 1.0)],
        {"request_columns.amount": "expected float64, got float32"},
    ),
    "too long": (
        "computed",
        [packed("amount", "d", 1.0, 2.0)],
        {"request_columns.amount": "2 rows; the most is 1"},
    ),
    "too short": (
        "computed",
        [packed("amount", "d")],
        {"request_columns": "columns differ in length: amount has 0, keys has 1 rows"},
    ),
    "cut": (
        "computed",
        [pb.Column(name="amount", type=pb.DATA_TYPE_FLOAT64, data=b"1234")],
        {"request_columns.amount": "4 bytes are not a whole number of float64"},
    ),
    "a vector of another length": (
        "echoed",
        [vectors("taste", [1.0, 2.0, 3.0])],
        {"request_columns.taste": "expected vector[2], got vector[3]"},
    ),
    "text that is none": (
        "echoed",
        [texts("name", b"\xff")],
        {"request_columns.name": "row 0 is not valid UTF-8"},
    ),
    "a wrong mask": (
        "echoed",
        [nulls(instants("at", 1), *[True] * 9)],
        {"request_columns.at": "2 bytes of validity for 1 rows"},
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_request_columns_that_do_not_fit_are_refused(kind: str, computing: Server) -> None:
    """What is missing, unknown, of another type or length is INVALID_ARGUMENT that names the column."""
    service, columns, violations = REFUSED[kind]
    with computing.stub() as stub:
        found = refusal(lambda: stub.GetFeatures(partial_request(service, *columns)))
    assert found.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert found.violations == violations


BAD_REQUESTS: dict[str, tuple[Any, str]] = {
    "missing": (None, "missing request column 'amount'"),
    "extra": ({"amount": [1.0], "b": [1.0]}, "unknown request column 'b'"),
    "of another type": ({"amount": ["1.0"]}, r"request_columns\.amount.*expected float64, got '1.0'"),
    "a bool": ({"amount": [True]}, r"request_columns\.amount.*expected float64, got True"),
    "too large": ({"amount": [2**60]}, "an integer that it cannot hold exactly"),
    "too long": ({"amount": [1.0, 2.0]}, "columns differ in length: amount has 2, keys has 1 rows"),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
@pytest.mark.parametrize("way", ["client", "embedded"])
def test_python_callers_are_told_before_anything_is_sent(
    kind: str, way: str, client: featserve.Client, embedded: featserve.Embedded
) -> None:
    """The client and the embedded project refuse what does not fit the schema with the same words."""
    request, message = BAD_REQUESTS[kind]
    reader: Any = client if way == "client" else embedded
    with pytest.raises(InvalidRequest, match=message):
        reader.get("computed", {"user_id": [1]}, request=request)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[featserve.Embedded]:
    """Open a project of the same definitions in this process."""
    with featserve.open(Project.make(tmp_path_factory.mktemp("embedded"), DEFINITIONS).folder, write=True) as project:
        yield project


def test_the_embedded_project_answers_alike(client: featserve.Client, embedded: featserve.Embedded) -> None:
    """In process the same request has the same answer, and a broken transform the same error."""
    seen = datetime.now(UTC) - timedelta(minutes=1)
    for reader in (client, embedded):
        write_facts(reader, 7, 0.1, seen)  # type: ignore[arg-type]
    at = datetime.now(UTC)
    answers = [
        reader.get("computed", {"user_id": [7, 8]}, request={"amount": [0.3, 1.0]}, as_of=at)
        for reader in (client, embedded)
    ]
    assert answers[0].to_dict() == answers[1].to_dict()
    assert answers[0].values.tobytes() == answers[1].values.tobytes()
    assert embedded.get("echoed", {"user_id": [1, 2]}, request=ECHO).to_dict()["echo.name"] == ECHO["name"]
    with pytest.raises(TransformError, match="transform fragile@1 failed: ValueError: over nine thousand"):
        embedded.get("broken", {"user_id": [1]}, request={"how": [9001]})


# Which code runs

SCALED = f"""{HEAD}
from helpers import scale

@on_demand_transform(inputs={{"by": RequestColumn("by", Float64)}}, outputs=[Field("out", Float64)])
def scaled(by):
    return scale(by)

service = FeatureService("scores", [facts["x"], scaled], dtype=Float64)
"""
SCALED_NEXT = (
    SCALED
    + """
@on_demand_transform(
    inputs={"by": RequestColumn("by", Float64)}, outputs=[Field("out", Float64)], name="scaled", version=2
)
def scaled_2(by):
    return scale(by) + 0.5

service_2 = FeatureService("scores", [facts["x"], scaled_2], dtype=Float64, version=2)
"""
)


def helper(by: float) -> dict[str, str]:
    return {"helpers": f"FACTOR = {by}\ndef scale(x):\n    return x * FACTOR\n"}


def ask(server: Server, service: str = "scores") -> float:
    with server.client() as client:
        value: float = client.get(service, {"user_id": [1]}, request={"by": [1.0]}).to_dict()["scaled.out"][0]
        return value


def test_a_server_runs_what_was_applied(transport: str, tmp_path: Path) -> None:
    """An edited or deleted file changes nothing until it is applied; a pinned version keeps its own code.

    A restarted server has the registry alone, and answers the same.
    """
    write(tmp_path, helper(10.0))
    project = Project.make(tmp_path, SCALED, **TRANSPORTS[transport] | {"registry_poll_seconds": 0.02})
    with Server(project) as server:
        assert ask(server) == 10.0
        write(tmp_path, helper(20.0))
        assert ask(server) == 10.0
        with pytest.raises(featserve.FeatserveError, match="scaled@1"):  # the version has another meaning now
            project.apply(SCALED)
        assert ask(server) == 10.0
        write(tmp_path, helper(10.0))
        project.apply(SCALED_NEXT)
        until("the server serves version 2", lambda: ask(server) == 10.5)
        assert (ask(server, "scores@1"), ask(server, "scores@2")) == (10.0, 10.5)
        for file in tmp_path.glob("*.py"):
            file.unlink()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        assert (ask(server, "scores@1"), ask(server)) == (10.0, 10.5)
    with Server(project) as server:
        assert (ask(server, "scores@1"), ask(server, "scores@2"), ask(server)) == (10.0, 10.5, 10.5)


def test_a_refused_apply_changes_nothing_that_is_served(start: Callable[..., Server]) -> None:
    """Definitions with a transform that breaks its contract, or cannot be loaded, leave the server as it was."""
    server = start(registry_poll_seconds=0.02)
    project = server.project
    for body in ("return by - by.mean()", "return undefined(by)", "raise KeyError('x')", "import gone\n    return by"):
        with pytest.raises(CallerError, match="scaled"):
            project.apply(SCALED.replace("from helpers import scale", "").replace("return scale(by)", body))
        with server.client() as client:
            assert "scores@1" not in {f"{s.name}@{s.version}" for s in client.list_services()}


def test_a_schema_says_which_transform_makes_a_feature(client: featserve.Client) -> None:
    """The schema of a service names the version of the transform behind each feature, and what it is to be sent."""
    schema = client.describe("broken")
    assert [(f.name, f.transform) for f in schema.features] == [("facts.x", ""), ("fragile.out", "fragile@1")]
    assert schema.request_columns == {"how": featserve.Int32}
