"""The flights example: its data is what the package says, in honest instants, and its definitions fit it."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import featserve
from examples.flights import features, prepare
from featserve.batch import EventBatch
from featserve.checks import check_rows
from featserve.config import load_config
from featserve.definitions import FeatureView
from featserve.project import load_definitions
from featserve.sources import read_batches
from featserve.types import Timestamp

EXAMPLE = Path(features.__file__).parent
VIEWS = [
    features.hourly_weather,
    features.aircraft_attributes,
    features.carrier_last_departure,
    features.route_last_arrival,
]
WINDOWS = [features.carrier_week, features.airport_hour, features.aircraft_week]
MINUTE_US = 60_000_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project folder with the data made anew."""
    folder = tmp_path_factory.mktemp("flights")
    prepare.prepare(folder / "data")
    return folder


@pytest.fixture(scope="module")
def flights(root: Path) -> pd.DataFrame:
    frame: pd.DataFrame = pq.read_table(root / "data/flights.parquet").to_pandas()
    return frame


@pytest.fixture(scope="module")
def raw() -> pd.DataFrame:
    """Return the package's own rows, in the order of ``flights``: scheduled departures are in order of the clock."""
    with zipfile.ZipFile(prepare.package_folder() / "flights.csv.zip") as archive, archive.open("flights.csv") as file:
        frame = pd.read_csv(file)
    return frame.sort_values(["year", "month", "day", "sched_dep_time"], kind="stable", ignore_index=True)


def load(view: FeatureView, root: Path) -> Iterator[EventBatch]:
    return read_batches(view.rows, root)


def find(flights: pd.DataFrame, carrier: str, number: int, origin: str, day: str) -> dict[str, Any]:
    """Return the flight that leaves on a day in New York."""
    days = flights.scheduled_departure.dt.tz_convert("America/New_York").dt.strftime("%m-%d")
    chosen = (flights.carrier == carrier) & (flights.flight_number == number) & (flights.origin == origin)
    (found,) = flights[chosen & (days == day)].to_dict("records")
    return {str(name): value for name, value in found.items()}


def clock(times: pd.Series, zone: str) -> Any:
    local = times.dt.tz_convert(zone)
    return local.dt.hour * 100 + local.dt.minute


def test_every_row_is_there(root: Path) -> None:
    """Every flight, observation and aircraft of the package is in the files, and each view reads all of its rows."""
    names = ("flights", "weather", "aircraft", "departures", "arrivals")
    expected = [336_776, 26_115, 3_322, 328_521, 327_346]
    assert [pq.read_metadata(root / f"data/{name}.parquet").num_rows for name in names] == expected
    assert [sum(map(len, load(view, root))) for view in VIEWS] == expected[1:]


def test_preparing_again_gives_the_same_files(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run replaces each file by an equal one, prints a line for each and leaves nothing else."""
    (tmp_path / ".weather.parquet").write_bytes(b"left by a run that was killed")
    prepare.prepare(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 5
    first = {path.name: path.read_bytes() for path in (root / "data").iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.parametrize(
    ("flight", "expected"),
    [
        # New York to Houston in winter: 5:15 EST, delayed by 2; 8:19 CST, delayed by 11.
        (("UA", 1545, "EWR", "01-01"), ("01-01 10:15", "01-01 14:19", "01-01 10:17", "01-01 14:30")),
        # To Puerto Rico, an hour ahead in winter: 5:45 EST, early by 1; 10:22 AST, early by 18.
        (("B6", 725, "JFK", "01-01"), ("01-01 10:45", "01-01 14:22", "01-01 10:44", "01-01 14:04")),
        # Overnight, the clocks go forward in flight: 21:45 EST, late by 81; 0:34 EST, late by 89, so at 3:03 EDT.
        (("B6", 35, "JFK", "03-09"), ("03-10 02:45", "03-10 05:34", "03-10 04:06", "03-10 07:03")),
        # The first flight after the clocks went forward: 5:15 EDT; 8:14 CDT, early by 32.
        (("UA", 258, "EWR", "03-10"), ("03-10 09:15", "03-10 13:14", "03-10 09:12", "03-10 12:42")),
        # Landing after midnight, in the night that the clocks go back: 20:40 EDT; 23:59 PDT, late by 11.
        (("B6", 523, "JFK", "11-02"), ("11-03 00:40", "11-03 06:59", "11-03 00:38", "11-03 07:10")),
        # The first flight after the clocks went back: 5:20 EST; 8:00 CST, early by 9.
        (("UA", 322, "EWR", "11-03"), ("11-03 10:20", "11-03 14:00", "11-03 10:19", "11-03 13:51")),
        # To Honolulu, six hours behind in summer: 10:00 EDT, early by 10; 14:30 HST, early by 31.
        (("HA", 51, "JFK", "07-04"), ("07-04 14:00", "07-05 00:30", "07-04 13:50", "07-04 23:59")),
        # To Phoenix, which has no summer time: 6:55 EDT, early by 8; 9:06 MST, early by 46.
        (("US", 88, "EWR", "07-04"), ("07-04 10:55", "07-04 16:06", "07-04 10:47", "07-04 15:20")),
        # To the Virgin Islands, level with New York in summer: 8:00 EDT; 12:00 AST, late by 7.
        (("AA", 655, "JFK", "07-04"), ("07-04 12:00", "07-04 16:00", "07-04 12:00", "07-04 16:07")),
    ],
)
def test_instants_worked_out_by_hand(
    flights: pd.DataFrame, flight: tuple[str, int, str, str], expected: tuple[str, ...]
) -> None:
    """Scheduled and actual times of these flights are the instants that a person with a calendar finds."""
    found = find(flights, *flight)
    names = ("scheduled_departure", "scheduled_arrival", "departed_at", "arrived_at")
    assert tuple(found[name].strftime("%m-%d %H:%M") for name in names) == expected


def test_clocks_agree_with_the_package(flights: pd.DataFrame, raw: pd.DataFrame) -> None:
    """Shown on local clocks, every instant is the clock time in the package, which the instants of delays never saw.

    All 328,521 departures and all arrivals but one agree: its clock time falls into the hour that spring leaves out.
    """
    left = flights.departed_at.notna()
    shown = clock(flights.departed_at[left], "America/New_York")
    assert (shown == raw.dep_time[left] % 2400).all()
    hours = raw.time_hour.astype("datetime64[us, UTC]")
    assert (flights.scheduled_departure.dt.floor("h") == hours).all()
    zones = flights.dest.map(prepare.zone_of_airports(prepare.package_folder()))
    wrong = 0
    for zone, rows in flights[flights.arrived_at.notna()].groupby(zones):
        scheduled = clock(rows.scheduled_arrival, str(zone)) != raw.sched_arr_time[rows.index] % 2400
        arrived = clock(rows.arrived_at, str(zone)) != raw.arr_time[rows.index] % 2400
        assert not scheduled.any()
        wrong += int(arrived.sum())
    assert wrong == 1


def test_flights_take_as_long_as_flights_do(flights: pd.DataFrame) -> None:
    """From gate to gate is the time in the air and 5 minutes to 4 hours on the ground; schedules come close to it."""
    ground = (flights.arrived_at - flights.departed_at).dt.total_seconds() / 60 - flights.air_time_min
    assert ground.dropna().between(5, 240).all()
    block = (flights.scheduled_arrival - flights.scheduled_departure).dt.total_seconds() / 60
    air = flights.groupby(["origin", "dest"]).air_time_min.transform("median").fillna(flights.air_time_min)
    assert (block - air).dropna().between(-10, 140).all()


def test_nothing_is_known_before_it_happened(root: Path) -> None:
    """In every view a row is known at or after its event time, and a delay is known after the fact."""
    for view in VIEWS:
        for batch in load(view, root):
            assert (batch.known_at_us >= batch.event_time_us).all()
            check_rows(view.rows, batch)
    for view, happened in zip(VIEWS[2:], ("departed_at", "arrived_at"), strict=True):
        for batch in load(view, root):
            assert view.feature(happened).type is Timestamp
            at = batch.columns[happened].values
            assert (batch.known_at_us >= at + 5 * MINUTE_US).all()
            assert (np.diff(batch.known_at_us) >= 0).all()
            if happened == "departed_at":
                delay_us = batch.columns["departure_delay_min"].values.astype(np.int64) * MINUTE_US
                assert (at == batch.event_time_us + delay_us).all()


@pytest.mark.parametrize(
    ("view", "delay"),
    [
        (features.carrier_last_departure, "departure_delay_min"),
        (features.route_last_arrival, "arrival_delay_min"),
    ],
    ids=["departures", "arrivals"],
)
def test_a_careless_join_sees_the_future(
    root: Path, flights: pd.DataFrame, seed: int, view: FeatureView, delay: str
) -> None:
    """At its scheduled departure, a flight's newest row by event time was mostly unknown, and often its own delay."""
    keys = list(view.entity.keys)
    rows = pd.concat(
        pd.DataFrame({name: batch.columns[name].to_list() for name in (*keys, delay)}).assign(
            event=batch.event_time_us, known=batch.known_at_us
        )
        for batch in load(view, root)
    ).sort_values(["event", "known"], kind="stable")
    groups = dict(list(rows.groupby(keys)))
    labels = flights[flights[delay].notna()].sample(500, random_state=seed)
    unknown = careless_own = honest_own = 0
    for label in labels.to_dict("records"):
        at = label["scheduled_departure"].value // 1_000
        group = groups[tuple(label[key] for key in keys)]
        past = group[group.event <= at]
        newest = past.iloc[-1]
        unknown += int(newest.known > at)
        careless_own += int(newest.event == at and newest[delay] == label[delay])
        honest_own += int((past[past.known <= at].event == at).any())
    assert unknown > 450
    assert careless_own > 300
    assert honest_own == 0


def test_definitions_load_as_a_project() -> None:
    """The project's settings and definitions load, and the model's service spans every view and entity."""
    definitions = load_definitions(load_config(EXAMPLE))
    views = [view.id for view in (*VIEWS, *WINDOWS)]
    assert set(definitions.views) == set(views)
    assert set(definitions.services) == {"departure_delay_model@1", "carrier_report@1"}
    service = definitions.services["departure_delay_model@1"]
    assert [view.id for view in service.views] == views
    assert list(service.keys) == ["origin", "tailnum", "carrier", "dest"]
    for view in definitions.views.values():
        assert view.owner
        assert view.description
        assert all(f.description for f in view.features)


def test_definitions_use_public_names_alone() -> None:
    """The example's definitions import nothing but the standard library, NumPy and what featserve exports."""
    tree = ast.parse((EXAMPLE / "features.py").read_text())
    imported = {
        node.module: {alias.name for alias in node.names} for node in tree.body if isinstance(node, ast.ImportFrom)
    }
    assert imported.keys() == {"datetime", "numpy.typing", "featserve"}
    assert imported["featserve"] <= set(featserve.__all__)
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert plain == {"numpy"}
