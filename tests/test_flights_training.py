"""The flights example, trained and served: its transforms, parity of both paths, and what careless joins would leak."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import featserve
from examples.flights import features, model, prepare
from examples.flights.project import SERVICE
from featserve.config import load_config
from featserve.definitions import OnDemandTransform
from featserve.project import load_definitions
from featserve.registry import Registry
from featserve.types import NEVER_US

EXAMPLE = Path(features.__file__).parent
INSTANTS = [
    datetime(2013, 1, 1, 11, 0, tzinfo=UTC),  # the first day: hardly anything is known yet
    datetime(2013, 3, 10, 21, 0, tzinfo=UTC),  # the day that clocks went forward
    datetime(2013, 7, 10, 22, 0, tzinfo=UTC),
    datetime(2013, 11, 3, 14, 0, tzinfo=UTC),  # the day that they went back
    datetime(2013, 11, 27, 22, 0, tzinfo=UTC),
]


def call(transform: OnDemandTransform, **inputs: np.ndarray[Any, Any]) -> Any:
    return transform.code.function(**inputs)


def floats(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, np.float32)


def test_new_york_is_that_of_the_zone_database() -> None:
    """Clocks in New York are those of the IANA database, at each hour of 2007 to 2037 and around each change."""
    hours = np.arange(
        np.datetime64("2007-01-01T00:00", "us"), np.datetime64("2037-12-31T00:00", "us"), np.timedelta64(1, "h")
    )
    near = np.concatenate([hours[::7], *(hours[::5] + np.timedelta64(d, "us") for d in (-1, 1))])
    zone = ZoneInfo("America/New_York")
    offsets = {}
    for instant in near.tolist():
        offset = instant.replace(tzinfo=UTC).astimezone(zone).utcoffset()
        offsets[instant] = instant + offset
    shown = features.new_york(near)
    assert shown.tolist() == [offsets[instant] for instant in near.tolist()]
    changes = np.flatnonzero(np.diff((features.new_york(hours) - hours).astype(np.int64)))
    assert len(changes) == 2 * 31


def test_local_departure() -> None:
    """The hour and the weekend are those of New York, not of UTC."""
    departure = np.array(["2013-07-06T03:30", "2013-07-06T04:00", "2013-12-02T04:59", "2013-12-02T05:00"], "M8[us]")
    answer = call(features.local_departure, departure=departure)
    assert answer["hour"].tolist() == [23.5, 0.0, pytest.approx(23 + 59 / 60, abs=1e-5), 0.0]
    assert answer["is_weekend"].tolist() == [False, True, True, False]  # Fri, Sat, Sun, Mon


def test_runway_wind() -> None:
    """Wind along the runway is all headwind from either end, and wind across it all crosswind."""
    answer = call(
        features.runway_wind, direction_deg=floats(30, 210, 120, 300, 75), speed_mph=floats(10, 10, 10, 20, 8)
    )
    half = 8 * np.sqrt(0.5)
    assert answer["headwind_mph"].tolist() == pytest.approx([10, 10, 0, 0, half], abs=1e-5)
    assert answer["crosswind_mph"].tolist() == pytest.approx([0, 0, 10, 20, half], abs=1e-5)


def test_schedule() -> None:
    """The ratio is that of the request's minutes to the stored ones."""
    assert call(features.schedule, scheduled_minutes=floats(150), air_time_min=floats(100)).tolist() == [1.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the example's project with its data, applied."""
    folder = tmp_path_factory.mktemp("flights")
    for name in ("features.py", "featserve.toml"):
        shutil.copy(EXAMPLE / name, folder)
    prepare.prepare(folder / "data")
    config = load_config(folder)
    with Registry.open(config.registry.url) as registry:
        registry.apply(load_definitions(config), "tests", 1)
    return folder


@pytest.fixture
def project(folder: Path) -> Iterator[featserve.Embedded]:
    """Open the project with an empty store."""
    shutil.rmtree(folder / ".featserve" / "store", ignore_errors=True)
    with featserve.open(folder, write=True) as project:
        yield project


def exactly(values: Any) -> list[Any]:
    """Return values so that equal means equal to the last bit."""
    return [value.hex() if isinstance(value, float) else value for value in values.to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize("instant", INSTANTS, ids=str)
def test_served_at_an_instant_is_trained_on_at_it(project: featserve.Embedded, folder: Path, instant: datetime) -> None:
    """Values, statuses and event times of each flight due then are the same online and offline, to the last bit."""
    flights = pq.read_table(folder / "data" / "flights.parquet")
    near = pc.and_(
        pc.greater_equal(flights["scheduled_departure"], instant),
        pc.less(flights["scheduled_departure"], instant + timedelta(hours=3)),
    )
    asked = flights.filter(pc.and_(near, pc.is_valid(flights["tailnum"])))
    assert len(asked) > 40
    for view in project.engine.plans.snapshot.views.values():
        project.materialize(view.id, as_of=instant)
    served = project.get(SERVICE, asked, as_of=instant, event_times=True)
    labels = asked.append_column("at", pa.array([instant] * len(asked), pa.timestamp("us", "UTC")))
    frame = project.training_frame(SERVICE, labels, time="at", event_times=True, statuses=True)
    answer = served.to_arrow()
    names = [f.name for f in served.schema.features]
    assert answer.column_names == names
    for i, name in enumerate(names):
        assert answer[name].type == frame[name].type, name
        assert exactly(answer[name]) == exactly(frame[name]), name
        statuses = [featserve.Status(status).name for status in served.status[:, i]]
        assert statuses == frame[f"{name}.status"].to_pylist(), name
    assert served.event_times is not None
    for i, read in enumerate(served.schema.views):
        times = frame[f"{read.name}.event_time"].cast(pa.int64()).fill_null(NEVER_US)
        assert served.event_times[:, i].tolist() == times.to_pylist()
    assert np.array_equal(model.matrix_of(frame, served.names), served.values, equal_nan=True)


@pytest.mark.slow
def test_leakage_exposes_the_delays(project: featserve.Embedded, folder: Path) -> None:
    """On all flights the two delays tell little honestly, and nearly everything to a join that ignores known_at."""
    report = project.leakage(
        SERVICE, folder / "data" / "flights.parquet", time="scheduled_departure", label="departure_delay_min"
    )
    found = {f.feature: f for f in report.features}
    assert report.rows == 336_776
    assert [f.feature for f in report.features[:2]] == [
        "route_last_arrival.arrival_delay_min",
        "carrier_last_departure.departure_delay_min",
    ]
    arrival, departure = report.features[:2]
    assert arrival.honest == pytest.approx(0.105, abs=0.005)
    assert departure.honest == pytest.approx(0.161, abs=0.005)
    assert arrival.event_time_only == pytest.approx(0.901, abs=0.005)
    assert departure.event_time_only == pytest.approx(0.842, abs=0.005)
    assert min(arrival.event_time_only_rows, departure.event_time_only_rows) > 0.9 * report.rows
    for name in ("aircraft_attributes.seats", "local_departure.hour"):  # known all along, or computed from the label
        assert found[name].event_time_only_rows == found[name].latest_value_rows == 0
        assert found[name].honest == found[name].event_time_only == found[name].latest_value
