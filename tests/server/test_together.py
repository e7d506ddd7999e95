"""Reads that come at the same time: answered together or alone, each gets what it would have got by itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest

import featserve
from featserve._proto import serving_pb2 as pb
from featserve.engine import fill
from featserve.errors import CorruptRow, DeadlineExceeded, FeatserveError
from featserve.server import together as together_module
from featserve.server.service import READS, WRITES, Call, Limits, Record, Service
from featserve.server.together import MOST_KNOWN_BYTES, MOST_ONCE, TOGETHER_BYTES, Known, Sharing
from tests.server.messages import activity, now_us, numbers, packed, ranking, read_error, texts, weather, wide
from tests.serving import DAMAGED, Project, Server

pytest_plugins = ["tests.served"]

PAST_US = 1_700_000_000_000_000
TTL_US = 3_600_000_000
"""That of activity."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Open a project with some rows in process; its clock stands still, so that an answer is one of bytes."""
    project = Project.make(tmp_path_factory.mktemp("together"))
    project.damage()
    then_us = now_us() + 60_000_000
    with featserve.open(project.folder, write=True) as opened:
        service = Service(opened.engine, Limits(10_000, 60_000_000), lambda: then_us)
        writes = [numbers(range(20), 1.0), activity(1, now_us()), weather("de", "10115", 20.5, 3.25)]
        for write in [*writes, activity(2, now_us() - 10**10)]:
            service.write_rows(write.SerializeToString(), Call())
        yield service


def some(rng: np.random.Generator) -> pb.GetFeaturesRequest:
    """Return a request for values of one to five users: there, expired or not there."""
    users = rng.integers(0, 30, size=TOGETHER_BYTES // 8 if rng.random() < 0.1 else rng.integers(1, 6)).tolist()
    request = wide(*users) if rng.random() < 0.5 else ranking(*users)
    if request.service == "ranking" and rng.random() < 0.5:
        request.service = "compact"
    return request


def special(rng: np.random.Generator) -> pb.GetFeaturesRequest:
    """Return a request that is more than that, or wrong."""
    return [
        wide(1, include_event_times=True),
        wide(1, include_schema=True),
        wide(1, include_stages=True),
        wide(1, as_of_us=PAST_US),
        wide(1, at_least="nothing"),
        wide(),
        wide(*range(10_001)),
        pb.GetFeaturesRequest(service="nope"),
        pb.GetFeaturesRequest(service="wide"),
        pb.GetFeaturesRequest(service="wide", keys=[texts("user_id", "x")]),
        pb.GetFeaturesRequest(service="wide", keys=[*wide(1).keys, *wide(1).keys]),
        pb.GetFeaturesRequest(service="wide", keys=[pb.Column(name="user_id", type=3, data=bytes(7))]),  # type: ignore[arg-type]
        pb.GetFeaturesRequest(service="wide", request_columns=[packed("x", "f", 1.0)], keys=wide(1).keys),
    ][rng.integers(13)]


def alone(service: Service, request: pb.GetFeaturesRequest) -> bytes | FeatserveError:
    try:
        return service.get_features_alone(request.SerializeToString(), Call())
    except FeatserveError as error:
        return error


def together(service: Service, *requests: pb.GetFeaturesRequest) -> list[bytes | None]:
    return _answers(service, *(request.SerializeToString() for request in requests))


def _answers(service: Service, *requests: bytes) -> list[bytes | None]:
    """Return the answers, None for each request that no share has taken."""
    answers: list[bytes | None] = [None] * len(requests)
    for share in service.shares(requests):
        for number, answer in zip(share.numbers, service.get_features_together(share)[1], strict=True):
            assert answers[number] is None
            answers[number] = answer
    return answers


def test_who_is_answered_with_others_gets_the_same_bytes(service: Service, rng: np.random.Generator) -> None:
    """Whatever mix of requests comes at once: plain ones get the bytes that they get alone, all others are left."""
    for _ in range(150):
        plain = rng.random(rng.integers(1, 17)) < 0.8
        requests = [some(rng) if each else special(rng) for each in plain]
        for request, is_plain, answer in zip(requests, plain, together(service, *requests), strict=True):
            assert answer == (alone(service, request) if is_plain else None)


def test_who_comes_alone_is_answered_by_what_is_known(service: Service, rng: np.random.Generator) -> None:
    """The same answer or error, and the same record, whether or not a request is answered by what others asked for."""
    failed = 0
    for _ in range(300):
        data = (some(rng) if rng.random() < 0.8 else special(rng)).SerializeToString()
        ages, found = bool(rng.random() < 0.3), list[Any]()
        for answer in (service.get_features, service.get_features_alone):
            record = Record()
            record.ages = ages
            try:
                answered: Any = pb.GetFeaturesResponse.FromString(answer(data, Call((), 5.0, record)))
                answered.ClearField("stages")  # which took other times
            except FeatserveError as error:
                answered = type(error), str(error), error.reason, error.violations
                failed += 1
            matrix = record.matrix
            rows = matrix if matrix is None else [matrix.view_status.tolist(), matrix.valid is None, record.now_us]
            times = None if matrix is None or matrix.event_times is None else matrix.event_times.tolist()
            found.append((answered, record.plan, record.whole, rows, times))
        assert found[0] == found[1]
    assert failed


def test_what_was_seen_before_is_still_what_it_says(service: Service, rng: np.random.Generator) -> None:
    """A request that begins as another did is read as it stands: with other fields, in another order, cut or longer."""
    for _ in range(200):
        request = wide(*rng.integers(0, 30, size=rng.integers(1, 4)).tolist())
        data = request.SerializeToString()
        named = pb.GetFeaturesRequest(service=request.service).SerializeToString()
        odd = [
            data,
            data[len(named) :] + named,  # a canonical encoding has its fields in order
            data + b"\xa2\x06\x04rest",  # a field of a later version
            data + b"\xa2\x06\x08" + data[-8:],
            data + wide(7).keys[0].SerializeToString(),
            data[:-8] + bytes(rng.integers(0, 256, 8).tolist()),
            data[: rng.integers(1, len(data))],
            data + data,
        ]
        for each in [data, *(odd[i] for i in rng.permutation(len(odd))), data]:
            (answer,) = _answers(service, each)
            try:
                expected: bytes | None = service.get_features_alone(each, Call())
            except FeatserveError:
                expected = None
            assert answer == expected, each.hex()


def test_what_is_remembered_of_requests_is_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of odd requests nothing is remembered, and of others no more than so many, which are answered all the same."""
    monkeypatch.setattr(together_module, "MOST_SEEN", 3)
    sharing = Sharing(service.engine.plans, 10_000)
    data = wide(1).SerializeToString()
    for length in range(100):
        field = b"\xa2\x06" + bytes([length]) + bytes(length)
        assert len(sharing.shares([data + field])) == 1
    assert not sharing._seen
    for rows in [*range(1, 10), *range(1, 10)]:
        (share,) = sharing.shares([wide(*range(rows)).SerializeToString()])
        assert [keys.count for keys in share.keys] == [rows]
    assert sum(len(heads) for _, heads in sharing._seen.values()) == len(sharing._seen) == 3


def test_what_is_known_of_a_row_is_what_it_says_now(
    service: Service, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """One row asked for over and over, while rows are written and expire and the clock goes both ways: never of before.

    It is often looked up.
    """
    monkeypatch.setattr(together_module, "MOST_KNOWN_BYTES", 20_000)
    monkeypatch.setattr(together_module, "PAUSE", 2)
    started_us = clock_us = now_us() + 60_000_000
    moving = Service(service.engine, Limits(10_000, 60_000_000), lambda: clock_us)
    made = list[int]()

    def counted(*arguments: Any, **named: Any) -> Any:
        made.append(1)
        return fill(*arguments, **named)

    monkeypatch.setattr(together_module, "fill", counted)

    def write(request: pb.WriteRowsRequest) -> None:
        moving.write_rows(request.SerializeToString(), Call())

    write(numbers(range(5), 0.5, started_us - TTL_US))
    written_us = [started_us]
    for _ in range(600):
        step = rng.random()
        if step < 0.05:
            write(numbers([int(rng.integers(5))], float(rng.integers(9)), clock_us))
        elif step < 0.2:
            written_us.append(clock_us - int(rng.integers(0, TTL_US // 4)))
            write(activity(int(rng.integers(5)), written_us[-1]))
        elif step < 0.23:
            clock_us = int(rng.choice(written_us)) + TTL_US + int(rng.integers(-1, 2))
        elif step < 0.26:
            clock_us += int(rng.integers(-TTL_US, 2 * TTL_US))
        else:
            clock_us += 1_000
        make = (wide, ranking)[rng.integers(2)]
        requests = [make(int(user)) for user in rng.integers(0, 5, rng.integers(1, 5))]
        assert together(moving, *requests) == [alone(moving, request) for request in requests]
    assert 0 < len(made) < 590


def test_what_is_known_is_bounded(rng: np.random.Generator) -> None:
    """A row is known from the second time on, and however many are asked for, what is held takes only so much."""
    known, rows = Known([None, TTL_US]), list[tuple[bytes, bytes]]()
    for i in range(600):
        of_now = bytes(8) + (i + 2**63).to_bytes(8, "big") + rng.bytes(24)
        rows.append((rng.bytes(100_000), of_now))  # all stay, so that none comes to be where another was
        ids, answer = [(id(rows[-1][0]), id(rows[-1][1]))], rng.bytes(200)
        for _ in range(2):
            assert known.get(ids, i) is None
            known.add(ids, rows[-1:], [answer], i)
        assert known.get(ids, i) == [answer]
        assert sum(map(len, known._rows)) <= MOST_KNOWN_BYTES + 100_040
        assert known._answers.keys() == known._ends_us.keys()


def test_all_that_is_asked_for_twice_is_known(rng: np.random.Generator) -> None:
    """However many rows come in between, each is known from its second time on: none takes the place of another."""
    known, rows = Known([None]), [(rng.bytes(400),) for _ in range(MOST_ONCE)]
    ids, answers = [id(row) for (row,) in rows], [rng.bytes(20) for _ in rows]
    for _ in range(2):
        assert known.get(ids, 0) is None
        for at in rng.permutation(len(rows)).tolist():
            known.add(ids[at : at + 1], rows[at : at + 1], answers[at : at + 1], 0)
    assert known.get(ids, 0) == answers


def test_what_is_never_known_is_seldom_looked_for(rng: np.random.Generator) -> None:
    """Where no row is asked for twice few are looked for; where one is again and again nearly all are, from then on."""
    known, row = Known([None]), (rng.bytes(40),)
    looked = 0
    for i in range(3_000):
        if not known.pauses():
            looked += 1
            assert known.get([i], 0) is None
    assert looked < 600
    looked = 0
    for _ in range(3_000):
        if not known.pauses():
            looked += 1
            if known.get([id(row[0])], 0) is None:
                known.add([id(row[0])], [row], [b"answer"], 0)
    assert looked > 2_700


def test_requests_leave_nothing_to_the_garbage_collector(service: Service) -> None:
    """However many requests are answered, alone or together, the garbage collector is never set off by them."""
    requests = [ask(*range(user, user + 10)).SerializeToString() for ask in (wide, ranking) for user in range(5)]
    collected = list[str]()

    def note(phase: str, info: dict[str, int]) -> None:
        collected.append(phase)

    for times in (1, 500):
        gc.collect()
        gc.callbacks.append(note)
        for request in requests * times:
            service.get_features(request, Call())
            service.get_features_alone(request, Call())
        for _ in range(times):
            _answers(service, *requests)
        gc.callbacks.remove(note)
    assert collected == []


def test_one_service_is_read_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests for one service share one read of the store; each service has its own."""
    store, reads = service.engine.store, list[int]()

    def counted(keys: list[bytes], read_many: Any = store.read_many) -> Any:
        reads.append(len(keys))
        return read_many(keys)

    monkeypatch.setattr(store, "read_many", counted)
    together(service, wide(1), wide(2, 3), ranking(1), wide(4))
    assert reads == [4, 2]


def test_nobody_is_answered_where_the_read_fails(service: Service) -> None:
    """A damaged row fails the read of all who share it; it says nothing of whose row it is, so all are asked again."""
    with pytest.raises(CorruptRow):
        together(service, wide(1), wide(DAMAGED[0]))


@pytest.mark.parametrize("method", [*READS, *WRITES])
def test_expired_work_is_dropped_unread(
    service: Service, monkeypatch: pytest.MonkeyPatch, method: str, rng: np.random.Generator
) -> None:
    """A call whose deadline has passed is refused before anything of it is looked at: it could be of any bytes."""
    for name in ("read_many", "write_many", "update"):
        monkeypatch.setattr(service.engine.store, name, None)
    for message in (wide(1).SerializeToString(), rng.bytes(40)):
        with pytest.raises(DeadlineExceeded, match="nothing was done"):
            (READS | WRITES)[method](service, message, Call((), 0))
    with pytest.raises(DeadlineExceeded, match="nothing was done"):
        service.stream_rows().add(rng.bytes(40), Call((), -1.0))


def test_calls_at_once_are_each_answered_as_if_alone(server: Server, rng: np.random.Generator) -> None:
    """Of many reads at once on one connection each gets its own values or its own error, whatever the others ask."""
    users = rng.integers(20_000, 20_030, 100).tolist()
    with server.stub() as stub:
        for user in range(20_000, 20_030):
            stub.WriteRows(numbers([user], float(user)))
        asked = [partial(wide, user) for user in users]
        asked[10] = partial(wide, DAMAGED[0])
        asked[20] = partial(wide, DAMAGED[1])
        asked[30] = partial(pb.GetFeaturesRequest, service="nope")
        calls = [stub.GetFeatures.future(ask(), timeout=60) for ask in asked]
        wrong = {i: read_error(error).code for i, call in enumerate(calls) if (error := call.exception()) is not None}
        assert wrong == {10: grpc.StatusCode.DATA_LOSS, 20: grpc.StatusCode.DATA_LOSS, 30: grpc.StatusCode.NOT_FOUND}
        for i in set(range(100)) - set(wrong):
            assert np.frombuffer(calls[i].result().values, "<f4")[0] == users[i]
