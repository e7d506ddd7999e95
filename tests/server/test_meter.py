"""The counters of a server in this process, held against naive ones on random answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from featserve.config import load_config
from featserve.matrix import FeatureMatrix, Status
from featserve.plan import ReadPlan, compile_service
from featserve.project import load_definitions
from featserve.server import meter as meter_module
from featserve.server.meter import AGE_US, Buckets, Ended, Meter
from featserve.server.service import Call, Record
from featserve.server.tally import Tally
from featserve.server.telemetry import Telemetry
from featserve.server.together import Asked, Share
from featserve.types import Column
from featserve.wire import pack_rows
from tests.server.watched import WITH_TRANSFORMS
from tests.serving import Project


def test_buckets_count_as_a_naive_histogram_does(rng: np.random.Generator) -> None:
    """One by one or as an array, each value is in the first bucket whose bound it does not exceed."""
    values = np.concatenate([rng.integers(-5, 10**10, 2_000), np.array([*AGE_US, 0], np.int64)])
    one, many = Buckets(AGE_US), Buckets(AGE_US)
    for v in values.tolist():
        one.add(v)
    many.add_all(values[:1_000])
    many.add_all(values[1_000:])
    many.add_all(values[:0])
    naive = [0] * (len(AGE_US) + 1)
    for v in values.tolist():
        naive[next((i for i, bound in enumerate(AGE_US) if v <= bound), len(AGE_US))] += 1
    assert one.counts == many.counts == naive
    assert one.sum == many.sum == sum(values.tolist())


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ReadPlan]:
    project = Project.make(tmp_path_factory.mktemp("plans"), WITH_TRANSFORMS)
    definitions = load_definitions(load_config(project.folder))
    return {service.name: compile_service(service) for service in definitions.services.values()}


def random_matrix(plan: ReadPlan, rng: np.random.Generator, *, plain: bool) -> FeatureMatrix:
    """Return an answer of random statuses; no feature of a row that a view does not have is valid."""
    rows, schema = int(rng.integers(1, 50)), plan.schema
    absent = [Status.PRESENT] if plain else [Status.PRESENT, Status.NOT_FOUND, Status.EXPIRED]
    status = rng.choice(np.array(absent, np.uint8), (rows, len(schema.views)))
    valid = None
    if not plain or rng.random() < 0.5:
        valid = rng.random((rows, len(schema.features))) < 0.8
        for i, f in enumerate(schema.features):
            if f.view is not None:
                valid[:, i] &= status[:, f.view] == Status.PRESENT
    times = rng.integers(0, 10**12, status.shape)
    columns = tuple(Column(f.type, np.zeros(rows, np.int64)) for f in schema.column_features)
    return FeatureMatrix(schema, np.zeros((rows, schema.width)), columns, status, valid, times)


def missing(matrix: FeatureMatrix) -> tuple[bytes, bytes] | None:
    """Return what a share says that was answered with these rows."""
    return None if matrix.valid is None else (matrix.view_status.tobytes(), pack_rows(matrix.valid))


def test_tallies_are_what_the_statuses_of_every_value_say(plans: dict[str, ReadPlan], rng: np.random.Generator) -> None:
    """Rows, missing rows, expired rows and nulls of each view are those of a count over all values of all answers."""
    for plan in plans.values():
        tally, expected = Tally(plan), np.zeros((len(plan.views), 3), np.int64)
        rows = 0
        for i in range(40):
            matrix = random_matrix(plan, rng, plain=i % 2 == 0)
            tally.add(matrix)
            rows += len(matrix)
            for number in range(len(plan.views)):
                expected[number, 0] += (matrix.view_status[:, number] == Status.NOT_FOUND).sum()
                expected[number, 1] += (matrix.view_status[:, number] == Status.EXPIRED).sum()
                mine = [j for j, f in enumerate(plan.schema.features) if f.view == number]
                expected[number, 2] += (matrix.status[:, mine] == Status.NULL).sum()
        assert tally.rows == rows
        assert np.array([tally.not_found, tally.expired, tally.nulls]).T.tolist() == expected.tolist()


def test_requests_that_share_a_read_are_counted_as_if_alone(
    plans: dict[str, ReadPlan], rng: np.random.Generator
) -> None:
    """Requests counted by the one answer that they share count as much as one by one, each with its own duration."""
    plan, shared, alone = plans["ranking"], Meter(), Meter()
    for _ in range(20):
        matrix = random_matrix(plan, rng, plain=False)
        if rng.random() < 0.5:
            matrix = replace(matrix, event_times=None)
        times_ns = np.sort(rng.integers(1, 10**9, len(matrix)))[::-1].tolist()
        share = Share(Asked(plan), list(range(len(matrix))), [], len(matrix), 10**12, missing(matrix))
        begun_ns = [5 - time_ns for time_ns in times_ns]
        if matrix.event_times is None:
            shared.note_together([(share, 5)], begun_ns)
        else:
            shared.add_together(share, matrix, 5, begun_ns)
        for row, time_ns in enumerate(times_ns):
            record = Record()
            record.plan, record.matrix, record.now_us = plan, matrix.part(row, row + 1), 10**12
            record.ages = matrix.event_times is not None
            alone.add("GetFeatures", "OK", 5, 5 + time_ns, record)
    key = ("GetFeatures", plan.schema.hash, "OK")
    assert shared.durations.keys() == alone.durations.keys() == {key}
    assert shared.durations[key].counts == alone.durations[key].counts
    ages, expected = ({view: (b.counts, b.sum) for view, b in meter.ages.items()} for meter in (shared, alone))
    assert ages == expected
    assert len(ages) == len(plan.views)
    assert shared.ages_due_ns == alone.ages_due_ns > 5
    one, many = (meter.tallies[plan.schema.hash] for meter in (alone, shared))
    assert (one.rows, one.not_found, one.expired, one.nulls) == (many.rows, many.not_found, many.expired, many.nulls)


def test_what_is_noted_is_counted_when_it_is_looked_at(
    plans: dict[str, ReadPlan], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Requests for rows that were there are counted as if alone, however many are noted before somebody looks."""
    monkeypatch.setattr(meter_module, "MOST_NOTED", 150)
    shared, alone = Meter(), Meter()
    for _ in range(200):
        requests = int(rng.integers(1, 17))
        begun_ns = np.sort(rng.integers(1, 10**9, requests)).tolist()
        if rng.random() < 0.5:  # all taken at once
            begun_ns = [begun_ns[0]] * requests
        of = rng.integers(2, size=requests)
        ended: list[Ended] = []
        for i, name in enumerate(("wide", "compact")):
            plan, numbers = plans[name], np.flatnonzero(of == i).tolist()
            if not numbers:
                continue
            share = Share(Asked(plan), numbers, [], 3 * len(numbers))
            ended.append((share, ended_ns := 10**9 + int(rng.integers(10**9))))
            for number in numbers:
                record = Record()
                record.plan, record.whole = plan, 3
                alone.add("GetFeatures", "OK", begun_ns[number], ended_ns, record)
        shared.note_together(ended, begun_ns)
        if rng.random() < 0.05:
            assert {hash: tally.rows for hash, tally in shared.tallies.items()} == {
                hash: tally.rows for hash, tally in alone.tallies.items()
            }
    counts, expected = ({key: (b.counts, b.sum) for key, b in m.durations.items()} for m in (shared, alone))
    assert counts == expected
    assert len(counts) == 2


def test_rows_with_nulls_are_counted_as_one_by_one(
    plans: dict[str, ReadPlan], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Answers of which some rows are not there, or hold a null, are counted: those noted, and large ones right away."""
    monkeypatch.setattr(meter_module, "MOST_NOTED", 150)
    monkeypatch.setattr(meter_module, "MOST_BYTES_NOTED", 50)
    plan, meter, expected = plans["ranking"], Meter(), Tally(plans["ranking"])
    noted_bytes = []
    for i in range(300):
        matrix = replace(random_matrix(plan, rng, plain=False), event_times=None)
        assert matrix.valid is not None
        noted_bytes.append(len(pack_rows(matrix.valid)))
        expected.add(matrix)
        if rng.random() < 0.5:
            record = Record()
            record.plan, record.matrix = plan, matrix
            meter.add("GetFeatures", "OK", 5, 6, record)
        else:
            share = Share(Asked(plan), [0], [], len(matrix), missing=missing(matrix))
            meter.note_together([(share, 6)], [5])
        if i % 70 == 0:
            assert meter.tallies[plan.schema.hash].rows == expected.rows
    (found,) = meter.tallies.values()
    assert [found.rows, found.not_found, found.expired, found.nulls] == [
        expected.rows, expected.not_found, expected.expired, expected.nulls
    ]  # fmt: skip
    assert sum(meter.durations["GetFeatures", plan.schema.hash, "OK"].counts) == 300
    assert min(noted_bytes) < 50 < max(noted_bytes)


def test_ages_are_those_of_the_rows_that_were_served(plans: dict[str, ReadPlan], rng: np.random.Generator) -> None:
    """The ages that are counted are now minus the event time, of rows that are present, and of no others."""
    plan, meter, now = plans["ranking"], Meter(ages_every_ns=0), 10**12
    naive = {view.id: Buckets(AGE_US) for view in plan.schema.views}
    for _ in range(20):
        matrix = random_matrix(plan, rng, plain=False)
        assert matrix.event_times is not None
        record = Record()
        record.ages, record.plan, record.matrix, record.now_us = True, plan, matrix, now
        meter.add("GetFeatures", "OK", 1, 2, record)
        for i, view in enumerate(plan.schema.views):
            for row in range(len(matrix)):
                if matrix.view_status[row, i] == Status.PRESENT:
                    naive[view.id].add(now - int(matrix.event_times[row, i]))
    assert {v: (b.counts, b.sum) for v, b in meter.ages.items()} == {v: (b.counts, b.sum) for v, b in naive.items()}


def test_ages_are_looked_at_so_often_and_no_more(plans: dict[str, ReadPlan], rng: np.random.Generator) -> None:
    """Of requests a millisecond apart, one in ten is looked at; what has no ages in it takes no turn."""
    telemetry = Telemetry(None, meter := Meter(ages_every_ns=10_000_000))
    plan, wanted = plans["wide"], 0
    for at_ns in range(1_000_000, 101_000_000, 1_000_000):
        for matrix in (None, random_matrix(plan, rng, plain=True)):
            record = Record()
            record.ages, record.plan, record.matrix = at_ns >= meter.ages_due_ns, plan, matrix
            wanted += record.ages and matrix is not None
            meter.add("GetFeatures", "OK", at_ns, at_ns + 1, record)
    assert wanted == 10
    call = Call()
    for due_ns, ages in ((0, True), (2**63, False)):
        meter.ages_due_ns = due_ns
        with telemetry.watch("GetFeatures", call):
            assert call.record is not None
            assert call.record.ages is ages
