"""Windows over a running server, on every transport: pushed, streamed, refused, restarted, killed."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import featserve
from featserve._proto import serving_pb2 as pb
from featserve.batch import Pushed
from featserve.errors import FeatserveError, InvalidRequest, ServingError, UnknownName
from tests.command_line import run
from tests.server.messages import HOUR_US, now_us, nulls, packed, refusal, texts
from tests.serving import TRANSPORTS, Project, Server

pytest_plugins = ["tests.served"]

DEFINITIONS = """
from datetime import timedelta

from featserve import (
    Aggregate, Calendar, Entity, EventSource, FeatureService, FeatureView, Field, Float64, Hopping, Int64,
    ParquetSource, Rolling, String, col,
)

hour, day = timedelta(hours=1), timedelta(days=1)
user = Entity("user", {"user_id": Int64})
shop = Entity("shop", {"shop": String})
orders = EventSource(
    "orders",
    [Field("user_id", Int64), Field("shop", String), Field("amount", Float64, min=0.0), Field("order_id", String)],
    source=ParquetSource("orders.parquet", event_time="at"), event_id="order_id",
)
visits = EventSource("visits", [Field("user_id", Int64)])
spent = FeatureView("spent", user, events=orders, aggregates=[
    Aggregate("orders", "count", over=Hopping(day, hour)),
    Aggregate("sum", "sum", "amount", over=Hopping(day, hour)),
    Aggregate("mean_large", "mean", "amount", over=Rolling(day), where=col("amount") > 10, default=-1.0),
    Aggregate("last_shop", "last", "shop", over=Calendar(2, "day", "America/New_York")),
    Aggregate("shops", "distinct_count", "shop", over=Rolling(day), max_distinct=3),
])
earned = FeatureView("earned", shop, events=orders, aggregates=[
    Aggregate("orders", "count", over=Rolling(day, max_events=5_000)),
    Aggregate("most", "max", "amount", over=Calendar(7, "day", "UTC")),
])
seen = FeatureView("seen", user, events=visits, aggregates=[
    Aggregate("visits", "count", over=Rolling(day, max_events=4)),
])

users = FeatureService("users", [spent, seen], dtype=Float64)
shops = FeatureService("shops", [earned], dtype=Float64)
"""

VISITS_IN_A_FILE = (
    '[Field("user_id", Int64)])\nspent',
    '[Field("user_id", Int64)], source=ParquetSource("orders.parquet", event_time="at"))\nspent',
)
"""What gives the source without an id files."""


def orders(ids: Sequence[Any], **columns: list[Any]) -> dict[str, list[Any]]:
    """Return orders of user 1 in shop "a" for 1.0 each, but for the ``columns`` given."""
    many = len(ids)
    made: dict[str, list[Any]] = {
        "user_id": [1] * many,
        "shop": ["a"] * many,
        "amount": [1.0] * many,
        "order_id": [*ids],
    }
    return made | columns


@pytest.fixture
def project(tmp_path: Path, transport: str) -> Project:
    return Project.make(tmp_path / "project", DEFINITIONS, **TRANSPORTS[transport])


@pytest.fixture
def server(project: Project) -> Iterator[Server]:
    with Server(project) as running:
        yield running


def test_pushed_events_are_served_by_every_view_over_them(server: Server) -> None:
    """Each view counts them for its own entity, from the answer on; one without a key is of none; again is no more."""
    now = datetime.now(UTC)
    come = orders(
        ["1", "2", "3", "4"], user_id=[1, 1, 2, None], shop=["a", "b", None, "a"], amount=[5.0, 20.0, 3.0, 1.0]
    )
    with server.client() as client:
        assert client.push("orders", come, event_time=now) == Pushed(4, 4, 0, 0)
        assert client.push("orders@1", come, event_time=now) == Pushed(4, 0, 4, 0)
        got = client.get("users", {"user_id": [1, 2, 3]}, event_times=True)
        assert got.to_dict() == {
            "spent.orders": [2, 1, 0],
            "spent.sum": [25.0, 3.0, None],
            "spent.mean_large": [20.0, -1.0, -1.0],
            "spent.last_shop": ["b", None, None],
            "spent.shops": [2, 0, 0],
            "seen.visits": [0, 0, 0],
        }
        assert (got.view_status == 1).all()
        assert client.get("shops", {"shop": ["a", "b"]}).to_dict() == {
            "earned.orders": [2, 1],
            "earned.most": [5.0, 20.0],
        }


def test_the_schema_of_a_server_spells_its_windows_out(server: Server) -> None:
    """For each feature it says the kind, the boundaries in words, the zone, the value of no event, and ties."""
    with server.client() as client:
        features = client.describe("users").features
    said = {f.name: f.aggregate for f in features if f.aggregate is not None}
    hopping, rolling = "floor(T - 24 h, 1 h) <= event time <= T", "T - 24 h < event time <= T"
    days = "the start of the day 1 day before T's in America/New_York <= event time <= T"
    assert {name: (a.kind, a.boundaries, a.zone, a.empty_json) for name, a in said.items()} == {
        "spent.orders": ("hopping", hopping, "", "0"),
        "spent.sum": ("hopping", hopping, "", "null"),
        "spent.mean_large": ("rolling", rolling, "", "null"),
        "spent.last_shop": ("calendar", days, "America/New_York", "null"),
        "spent.shops": ("rolling", rolling, "", "0"),
        "seen.visits": ("rolling", rolling, "", "0"),
    }
    assert {a.ties for a in said.values()} == {"event_time, known_at, sequence"}
    assert (said["spent.mean_large"].function, said["spent.mean_large"].where) == ("mean", "(amount > 10)")


def test_events_stream_in(server: Server) -> None:
    """Every message counts; what is refused ends the stream and says how many came before; the rest stays."""
    now = datetime.now(UTC)
    with server.client() as client:
        batches = (orders([f"{i}.{j}" for j in range(10)]) for i in range(20))
        assert client.push_stream("orders", batches, event_time=now) == Pushed(200, 200, 0, 0)
        bad = [orders(["x"]), orders(["y"], amount=[-1.0]), orders(["z"])]
        with pytest.raises(InvalidRequest, match="less than the min") as refused:
            client.push_stream("orders", bad, event_time=now)
        assert refused.value.metadata["messages_written"] == "1"
        assert client.get("users", {"user_id": [1]}).to_dict()["spent.orders"] == [201]


def test_refusals_say_what_to_do_and_change_nothing(server: Server) -> None:
    """A null id, a time ahead, a bound, an unknown source, rows of a view over events, an instant that is gone."""
    now = datetime.now(UTC)
    with server.client() as client:
        client.push("orders", orders(["1"]), event_time=now)
        client.push("visits", {"user_id": [1] * 4}, event_time=now)
        columns = {"orders": [1], "sum": [1.0], "mean_large": [1.0], "last_shop": ["a"], "shops": [1], "user_id": [1]}
        for kind, words, call in (
            (InvalidRequest, "order_id: is null", lambda: client.push("orders", orders([None]), event_time=now)),
            (
                InvalidRequest,
                "the last instant accepted",
                lambda: client.push("orders", orders(["2"]), event_time=now + timedelta(hours=5)),
            ),
            (
                InvalidRequest,
                r"view seen@1, user user_id=1: feature 'visits' .* would hold 5 events .* max_events = 4\. Declare",
                lambda: client.push("visits", {"user_id": [2, 1]}, event_time=now),
            ),
            (
                InvalidRequest,
                "would hold 4 distinct values .* max_distinct = 3",
                lambda: client.push("orders", orders(list("567"), shop=list("bcd")), event_time=now),
            ),
            (UnknownName, "did you mean 'orders'", lambda: client.push("order", orders(["1"]), event_time=now)),
            (InvalidRequest, "push them to orders@1", lambda: client.write("spent", columns, event_time=now)),
            (
                InvalidRequest,
                "ask for that instant or a later one",
                lambda: client.get("users", {"user_id": [1]}, as_of=now - timedelta(days=1)),
            ),
        ):
            with pytest.raises(kind, match=words):
                call()
        got = client.get("users", {"user_id": [1, 2]}).to_dict()
        assert (got["spent.orders"], got["seen.visits"]) == ([1, 0], [4, 0])


def order(source: str = "orders", at: bytes | None = None, known: bytes = b"", **changes: Any) -> pb.PushEventsRequest:
    """Return a push of an order; ``changes`` replaces columns, None leaves one out."""
    row = {
        "user_id": packed("user_id", "q", 1),
        "shop": texts("shop", "a"),
        "amount": packed("amount", "d", 1.0),
        "order_id": texts("order_id", "1"),
    }
    given = [column for column in (row | changes).values() if column is not None]
    times = {"event_times": int64(now_us()) if at is None else at, "known_at": known}
    return pb.PushEventsRequest(source=source, columns=given, **times)


def int64(value: int) -> bytes:
    return value.to_bytes(8, "little")


# What is pushed, the reason, the fields at fault, and a part of the message.
BAD_PUSHES: dict[str, tuple[Callable[[], pb.PushEventsRequest], str, set[str], str]] = {
    "unknown source": (lambda: order("order"), "UNKNOWN_NAME", set(), "event source 'order'; did you mean 'orders'?"),
    "unknown version": (lambda: order("orders@2"), "UNKNOWN_NAME", set(), "did you mean 'orders@1'?"),
    "missing column": (lambda: order(shop=None), "INVALID_REQUEST", {"columns.shop"}, "missing column 'shop' (string)"),
    "unknown column": (
        lambda: order(more=texts("shops", "a")), "INVALID_REQUEST", {"columns.shops"}, "did you mean 'shop'?",
    ),
    "wrong type": (
        lambda: order(amount=packed("amount", "f", 1.0)), "INVALID_REQUEST", {"columns.amount"},
        "expected float64, got float32",
    ),
    "ragged columns": (
        lambda: order(amount=packed("amount", "d", 1.0, 2.0)), "INVALID_REQUEST", {"columns"}, "columns differ",
    ),
    "under the min": (
        lambda: order(amount=packed("amount", "d", -1.0)), "INVALID_REQUEST", {"rows[0].amount"}, "less than the min",
    ),
    "null id": (
        lambda: order(order_id=nulls(texts("order_id", ""), False)), "INVALID_REQUEST", {"rows[0].order_id"}, "is null",
    ),
    "not UTF-8": (
        lambda: order(order_id=texts("order_id", b"gr\xfc\xdfe")), "INVALID_REQUEST", {"columns.order_id"},
        "row 0 is not valid UTF-8",
    ),
    "too many events": (
        lambda: order(user_id=packed("user_id", "q", *[1] * 10_001)), "TOO_LARGE", {"columns.user_id"},
        "10,001 rows; the most in one request is 10,000",
    ),
    "half an event time": (lambda: order(at=b"1234"), "INVALID_REQUEST", {"event_times"}, "4 bytes are not a whole"),
    "event time in the future": (
        lambda: order(at=int64(now_us() + HOUR_US)), "INVALID_REQUEST", {"rows[0].event_time", "rows[0].known_at"},
        "the last instant accepted now",
    ),
    "known in the future": (
        lambda: order(known=int64(now_us() + HOUR_US)), "INVALID_REQUEST", {"rows[0].known_at"},
        "the last instant accepted now",
    ),
}  # fmt: skip


def test_bad_pushes(server: Server) -> None:
    """Each is refused with its code, reason and fields, alone or on a stream; nothing of it counts, and others do."""
    with server.stub() as stub:
        for case, (make, reason, fields, message) in BAD_PUSHES.items():
            code = grpc.StatusCode.NOT_FOUND if reason == "UNKNOWN_NAME" else grpc.StatusCode.INVALID_ARGUMENT
            messages = [pb.StreamEventsRequest(request=made) for made in (order(), make())]
            for error in (
                refusal(lambda: stub.PushEvents(make())),  # noqa: B023
                refusal(lambda: stub.StreamEvents(iter(messages))),  # noqa: B023
            ):
                assert (error.code, error.reason, set(error.violations or ())) == (code, reason, fields), case
                assert message in error.message
            assert error.metadata is not None
            assert error.metadata["messages_written"] == "1", case
        with server.client() as client:
            assert client.get("users", {"user_id": [1]}).to_dict()["spent.orders"] == [1]


def test_late_events_are_told_and_not_counted(server: Server) -> None:
    """What no window can hold any more is acknowledged as late; late within a window counts there."""
    now = datetime.now(UTC)
    with server.client() as client:
        assert client.push("orders", orders(["1"]), event_time=now) == Pushed(1, 1, 0, 0)
        assert client.push("orders", orders(["2"]), event_time=now - timedelta(days=40)) == Pushed(1, 0, 0, 1)
        assert client.push("orders", orders(["3"]), event_time=now - timedelta(hours=3)) == Pushed(1, 1, 0, 0)
        assert client.get("users", {"user_id": [1]}).to_dict()["spent.orders"] == [2]


def test_history_and_pushes_make_one_count(project: Project) -> None:
    """Pushed before the load, in it, or after it: each order counts once; a second load changes nothing."""
    now = datetime.now(UTC)
    ids = [str(i) for i in range(10)]
    table = pa.table(orders(ids) | {"at": [now] * 10})
    pq.write_table(table, project.folder / "orders.parquet")
    with featserve.open(project.folder, write=True) as embedded:
        embedded.push("orders", orders(["8", "9", "10"]), event_time=now)
        for _ in range(2):
            assert embedded.materialize("spent").rows_read == 10
            assert embedded.get("users", {"user_id": [1]}).to_dict()["spent.orders"] == [11]
        assert embedded.push("orders", orders(["0", "11"]), event_time=now) == Pushed(2, 2, 0, 0)  # 0 is new to shops
        assert embedded.get("users", {"user_id": [1]}).to_dict()["spent.orders"] == [12]
        pq.write_table(table.slice(0, 0), project.folder / "orders.parquet")
        embedded.materialize("spent")
        assert embedded.get("users", {"user_id": [1]}).to_dict()["spent.orders"] == [4]


def test_files_are_pushed_from_the_command_line(tmp_path: Path) -> None:
    """`featserve push` counts a file here or on a server, and again counts nothing; `materialize --to` needs ids."""
    project = Project.make(tmp_path, DEFINITIONS.replace(*VISITS_IN_A_FILE))
    now, folder = datetime.now(UTC), tmp_path
    pq.write_table(pa.table(orders(["1", "2"]) | {"at": [now] * 2}), folder / "orders.parquet")
    (folder / "more.csv").write_text(f"user_id,shop,amount,order_id,when\n1,a,2.5,3,{now.isoformat()}\n")
    pushed = run("push", "orders", folder / "orders.parquet", "--event-time", "at", "-C", folder).stdout
    assert re.search(r"2 +2 +0 +0", pushed)
    run("materialize", "spent", "-C", folder)
    with Server(project) as server:
        more = ("push", "orders@1", folder / "more.csv", "--event-time", "when", "-C", folder, "--to", server.address)
        assert re.search(r"1 +1 +0 +0", run(*more).stdout)
        assert re.search(r"1 +0 +1 +0", run(*more).stdout)
        run("materialize", "spent", "--to", server.address, "-C", folder)
        refused = run("materialize", "seen", "--to", server.address, "-C", folder, code=1)
        assert "events of visits@1 have no event id" in " ".join(refused.output.split())
        assert "order" in run("push", "ordrs", folder / "more.csv", "-C", folder, "--to", server.address, code=1).output
        with server.client() as client:
            assert client.get("users", {"user_id": [1]}).to_dict()["spent.sum"] == [4.5]


MESSAGES, EVENTS = 3, 10
"""Messages on a stream, and orders in a message; the first message's are for 1.0 each, the second's for 2.0, ..."""


def stream(user: int, number: int) -> list[dict[str, list[Any]]]:
    """Return the messages of a user's stream, in a shop of the user's own; they are known by their ids."""
    return [
        orders(
            [f"{user} {number} {message} {i}" for i in range(EVENTS)],
            user_id=[user] * EVENTS,
            shop=[f"shop {user}"] * EVENTS,
            amount=[message + 1.0] * EVENTS,
        )
        for message in range(MESSAGES)
    ]


def totals(streams: int, messages: int = 0) -> tuple[int, float, int]:
    """Return the orders of a user, their sum and those of the shop after so many streams, and messages of the next."""
    events = EVENTS * (MESSAGES * streams + messages)
    paid = EVENTS * (streams * sum(range(MESSAGES + 1)) + sum(range(messages + 1)))
    return events, float(paid), events


def counted(reader: featserve.Client | featserve.Embedded) -> list[tuple[int, float, int]]:
    """Return what ``totals`` does, as users 0 and 1 are served it."""
    users = reader.get("users", {"user_id": [0, 1]}).to_dict()
    shops = reader.get("shops", {"shop": ["shop 0", "shop 1"]}).to_dict()
    paid = [total or 0.0 for total in users["spent.sum"]]
    return list(zip(users["spent.orders"], paid, shops["earned.orders"], strict=True))


class Pusher(threading.Thread):
    """Sends a user's streams to a server until it is gone; each is acknowledged at its end."""

    def __init__(self, server: Server, user: int, acknowledged: int) -> None:
        super().__init__()
        self._server, self._user, self.acknowledged = server, user, acknowledged
        self.error: FeatserveError | None = None

    def run(self) -> None:
        with self._server.client(timeout=30.0) as client:
            try:
                for number in itertools.count(self.acknowledged):
                    client.push_stream("orders", stream(self._user, number), event_time=datetime.now(UTC))
                    self.acknowledged = number + 1
            except FeatserveError as error:
                self.error = error


def killed(server: Server, streams: Sequence[int], seconds: float) -> list[int]:
    """Kill a server that two users send streams to; return how many streams of each it has acknowledged by then."""
    pushers = [Pusher(server, user, acknowledged) for user, acknowledged in enumerate(streams)]
    for pusher in pushers:
        pusher.start()
    threading.Event().wait(seconds)
    server.kill()
    for pusher in pushers:
        pusher.join()
        assert isinstance(pusher.error, ServingError), pusher.error
    return [pusher.acknowledged for pusher in pushers]


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_server_loses_no_event_and_counts_none_twice(
    project: Project, transport: str, rng: np.random.Generator, kills: int
) -> None:
    """Killed while events stream in: streams that were acknowledged count, and of the next one its first messages.

    That one is sent again to the server that comes after: then it counts, too, in every view, and once.
    """
    streams, cut = [0, 0], 0
    with ExitStack() as stack:
        server = stack.enter_context(Server(project))
        for turn in range(kills):
            streams = killed(server, streams, rng.uniform(0.05, 0.5))
            with featserve.open(project.folder) as embedded:
                found = counted(embedded)
            written = []
            for user in (0, 1):
                written += [n for n in range(MESSAGES + 1) if found[user] == totals(streams[user], n)]
            assert len(written) == 2, f"turn {turn}: {found} after {streams} streams"
            cut += sum(0 < messages < MESSAGES for messages in written)
            server = stack.enter_context(Server(project))
            with server.client() as client:
                for user, messages in enumerate(written):
                    again = client.push_stream("orders", stream(user, streams[user]), event_time=datetime.now(UTC))
                    known = EVENTS * messages
                    assert again == Pushed(EVENTS * MESSAGES, EVENTS * MESSAGES - known, known, 0), f"turn {turn}"
                streams = [acknowledged + 1 for acknowledged in streams]
                assert counted(client) == [totals(acknowledged) for acknowledged in streams], f"turn {turn}"
            if EVENTS * MESSAGES * max(streams) > 3_000:  # before a rolling window is full, others go on
                server.close()
                project = Project.make(project.folder.parent / f"project {turn}", DEFINITIONS, **TRANSPORTS[transport])
                server, streams = stack.enter_context(Server(project)), [0, 0]
    assert cut or kills == 1, "no kill came between the messages of a stream"
