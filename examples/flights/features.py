"""What a model of departure delays can know as a flight is due to leave New York: weather, aircraft, carrier, route.

The two delay views stand at a flight's scheduled departure, but are known only once it has departed or arrived. That
is what ``known_at`` is for: without it, a carrier's newest row would be the very flight whose delay is to be predicted.
"""

from datetime import timedelta

import numpy as np
from numpy.typing import NDArray

from featserve import (
    Aggregate,
    Bool,
    Calendar,
    Entity,
    EventSource,
    FeatureService,
    FeatureView,
    Field,
    Float32,
    Float64,
    Int32,
    Int64,
    ParquetSource,
    RequestColumn,
    RequestTime,
    Rolling,
    String,
    Timestamp,
    on_demand_transform,
)

OWNER = "delays@example.com"

Floats = NDArray[np.float32]
Instants = NDArray[np.datetime64]

airport = Entity("airport", {"origin": String}, description="An airport of New York, by its IATA code: EWR, JFK, LGA")
aircraft = Entity("aircraft", {"tailnum": String}, description="An aircraft, by its tail number")
carrier = Entity("carrier", {"carrier": String}, description="An airline, by its IATA code")
route = Entity("route", {"origin": String, "dest": String}, description="A route, by the IATA codes of both airports")

hourly_weather = FeatureView(
    "hourly_weather",
    airport,
    [
        Field("temperature_f", Float32, min=-60.0, max=140.0, description="Air temperature, degrees Fahrenheit"),
        Field("dew_point_f", Float32, min=-100.0, max=100.0, description="Dew point, degrees Fahrenheit"),
        Field("humidity_percent", Float32, min=0.0, max=100.0, description="Relative humidity"),
        Field(
            "wind_direction_deg", Float32, min=0.0, max=360.0, description="Where the wind comes from; null: variable"
        ),
        Field("wind_speed_mph", Float32, min=0.0, max=250.0, description="Wind speed, miles per hour"),
        Field("wind_gust_mph", Float32, min=0.0, max=300.0, default=0.0, description="Gusts; null: none were reported"),
        Field("precipitation_in", Float32, min=0.0, description="Rain and melted snow of the hour, inches"),
        Field("pressure_mbar", Float32, min=850.0, max=1100.0, description="Pressure at sea level, millibars"),
        Field(
            "visibility_miles", Float32, min=0.0, not_null=True, description="Visibility, miles; 10 means 10 or more"
        ),
    ],
    # Of the time of an observation the file keeps the hour alone, so it is sure to be known only when that has passed.
    source=ParquetSource(
        "data/weather.parquet",
        event_time="observed_hour",
        delay=timedelta(hours=1),
        columns={
            "temperature_f": "temp",
            "dew_point_f": "dewp",
            "humidity_percent": "humid",
            "wind_direction_deg": "wind_dir",
            "wind_speed_mph": "wind_speed",
            "wind_gust_mph": "wind_gust",
            "precipitation_in": "precip",
            "pressure_mbar": "pressure",
            "visibility_miles": "visib",
        },
    ),
    ttl=timedelta(hours=3),
    owner=OWNER,
    description="The weather at the airport of departure, observed every hour",
    tags={"domain": "weather"},
)

aircraft_attributes = FeatureView(
    "aircraft_attributes",
    aircraft,
    [
        Field("year_built", Int32, min=1903, max=2013, description="Year of manufacture"),
        Field("kind", String, description="Fixed wing with one or more engines, or rotorcraft"),
        Field(
            "manufacturer", String, not_null=True, description="As registered, so one maker may have several spellings"
        ),
        Field("model", String, not_null=True, description="As registered"),
        Field("engines", Int32, min=1, max=4, description="Number of engines"),
        Field("engine_kind", String, default="unknown", description="Turbo-fan, turbo-jet, reciprocating, ..."),
        Field("seats", Int32, min=1, description="Number of seats"),
        Field("cruising_speed_mph", Float32, min=0.0, description="Average cruising speed; registered for few"),
    ],
    source=ParquetSource(
        "data/aircraft.parquet",
        event_time="listed_at",
        columns={"year_built": "year", "kind": "type", "engine_kind": "engine", "cruising_speed_mph": "speed"},
    ),
    owner=OWNER,
    description="What the register says of an aircraft; it holds for as long as nothing newer is said",
    tags={"domain": "fleet"},
)

carrier_last_departure = FeatureView(
    "carrier_last_departure",
    carrier,
    [
        Field("departure_delay_min", Float32, not_null=True, min=-180.0, max=2880.0, description="Negative: early"),
        Field("departed_from", String, allowed=["EWR", "JFK", "LGA"], description="The airport that it left"),
        Field("flight_number", Int32, min=1, description="The flight that it was"),
        Field("departed_at", Timestamp, not_null=True, description="When it left the gate"),
    ],
    source=ParquetSource(
        "data/departures.parquet",
        event_time="scheduled_departure",
        known_at="known_at",
        columns={"departed_from": "origin"},
    ),
    ttl=timedelta(days=1),
    owner=OWNER,
    description="The carrier's latest flight out of New York, by schedule, of those reported to have left",
    tags={"domain": "operations"},
)

route_last_arrival = FeatureView(
    "route_last_arrival",
    route,
    [
        Field("arrival_delay_min", Float32, not_null=True, min=-180.0, max=2880.0, description="Negative: early"),
        Field("air_time_min", Float32, not_null=True, min=1.0, description="From take-off to landing, minutes"),
        Field("flown_by", String, description="The carrier of that flight"),
        Field("arrived_at", Timestamp, not_null=True, description="When it reached the gate"),
    ],
    source=ParquetSource(
        "data/arrivals.parquet",
        event_time="scheduled_departure",
        known_at="known_at",
        columns={"flown_by": "carrier"},
    ),
    ttl=timedelta(days=7),
    owner=OWNER,
    description="The latest flight on the route, by scheduled departure, of those reported to have arrived",
    tags={"domain": "operations"},
)

# What has happened lately. Each window says which kind of "7 days" or "hour" it is; there is no default.

departures = EventSource(
    "departures",
    [
        Field("flight_id", Int64, not_null=True, description="The flight, so that one reported twice counts once"),
        Field("carrier", String, not_null=True, description="The airline"),
        Field("tailnum", String, description="The aircraft, where it was reported"),
        Field("origin", String, allowed=["EWR", "JFK", "LGA"], description="The airport that it left"),
        Field("dest", String, not_null=True, description="Where it went"),
        Field("departure_delay_min", Int32, not_null=True, min=-180, max=2880, description="Negative: early"),
    ],
    source=ParquetSource("data/departures.parquet", event_time="departed_at", known_at="known_at"),
    event_id="flight_id",
    owner=OWNER,
    description="Flights that left the gate, as they are reported",
    tags={"domain": "operations"},
)

DAY = timedelta(days=1)
NEW_YORK = "America/New_York"

carrier_week = FeatureView(
    "carrier_week",
    carrier,
    events=departures,
    aggregates=[
        Aggregate(
            "mean_delay_168h",
            "mean",
            "departure_delay_min",
            over=Rolling(7 * DAY),
            description="Mean delay of the flights that left in the last 168 hours, minutes",
        ),
        Aggregate(
            "mean_delay_7_days",
            "mean",
            "departure_delay_min",
            over=Calendar(7, "day", NEW_YORK),
            description="Mean delay of those that left today in New York or on the six days before, minutes",
        ),
    ],
    owner=OWNER,
    description="How late the carrier has been, by both meanings of a week",
    tags={"domain": "operations"},
)

airport_hour = FeatureView(
    "airport_hour",
    airport,
    events=departures,
    aggregates=[
        Aggregate(
            "departures_1h",
            "count",
            over=Rolling(timedelta(hours=1), max_events=1_000),
            description="Flights that left the airport in the last hour and were reported",
        )
    ],
    owner=OWNER,
    description="How busy the airport is",
    tags={"domain": "operations"},
)

aircraft_week = FeatureView(
    "aircraft_week",
    aircraft,
    events=departures,
    aggregates=[
        Aggregate(
            "destinations_7_days",
            "distinct_count",
            "dest",
            over=Calendar(7, "day", NEW_YORK),
            max_distinct=200,
            description="Where it went from New York, today there or on the six days before, each destination once",
        )
    ],
    owner=OWNER,
    description="How varied the aircraft's routes are",
    tags={"domain": "operations"},
)

# Computed at the moment of the request, by the same code that computes them for a training frame.

RUNWAY_DEG = 30.0
"""Each of the three airports has a runway 4/22, which lies about 30 degrees from true north."""


@on_demand_transform(
    inputs={"direction_deg": hourly_weather["wind_direction_deg"], "speed_mph": hourly_weather["wind_speed_mph"]},
    outputs=[
        Field("headwind_mph", Float32, description="Along the runway; take-off is from the end that faces the wind"),
        Field("crosswind_mph", Float32, description="Across it; much of it closes the runway"),
    ],
    owner=OWNER,
)
def runway_wind(direction_deg: Floats, speed_mph: Floats) -> dict[str, Floats]:
    """The wind along and across runway 4/22 of the airport of departure."""
    angle = np.radians(direction_deg.astype(np.float64) - RUNWAY_DEG)
    return {
        "headwind_mph": np.abs(speed_mph * np.cos(angle)).astype(np.float32),
        "crosswind_mph": np.abs(speed_mph * np.sin(angle)).astype(np.float32),
    }


def new_york(instants: Instants) -> Instants:
    """Return UTC instants as clocks in New York show them: daylight saving time as the law has had it since 2007."""
    january = instants.astype("M8[Y]").astype(np.int64) * 12
    forward = first_sunday(january + 2) + np.timedelta64(7 * 24 + 7, "h")  # the second of March, 2:00 EST
    back = first_sunday(january + 10) + np.timedelta64(6, "h")  # the first of November, 2:00 EDT
    summer = (instants >= forward) & (instants < back)
    return instants - np.where(summer, np.timedelta64(4, "h"), np.timedelta64(5, "h"))


def first_sunday(months: NDArray[np.int64]) -> Instants:
    """Return the first Sunday of each month, counted from January 1970; day 3 of that, the 4th, was a Sunday."""
    days = months.astype("M8[M]").astype("M8[D]").astype(np.int64)
    return (days + (3 - days) % 7).astype("M8[D]")


@on_demand_transform(
    inputs={"departure": RequestTime()},
    outputs=[
        Field("hour", Float32, description="Hours since midnight in New York, with their fraction"),
        Field("is_weekend", Bool, description="Saturday or Sunday in New York"),
    ],
    owner=OWNER,
)
def local_departure(departure: Instants) -> dict[str, NDArray[np.generic]]:
    """When the flight leaves on the clocks of New York; a request is made as of the scheduled departure."""
    clock = new_york(departure)
    days = clock.astype("M8[D]")
    hour = (clock - days) / np.timedelta64(1, "h")
    weekday = (days.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday, and Monday is 0
    return {"hour": hour.astype(np.float32), "is_weekend": weekday >= 5}


@on_demand_transform(
    inputs={
        "scheduled_minutes": RequestColumn("scheduled_minutes", Float32),
        "air_time_min": route_last_arrival["air_time_min"],
    },
    outputs=[Field("to_last_air_time", Float32, description="Scheduled minutes by those last flown; more is slack")],
    owner=OWNER,
)
def schedule(scheduled_minutes: Floats, air_time_min: Floats) -> Floats:
    """The time that the schedule gives this flight, by what the last one on the route spent in the air."""
    return scheduled_minutes / air_time_min


departure_delay_model = FeatureService(
    "departure_delay_model",
    [
        hourly_weather,
        aircraft_attributes,
        carrier_last_departure,
        route_last_arrival,
        carrier_week,
        airport_hour,
        aircraft_week,
        runway_wind,
        local_departure,
        schedule,
    ],
    dtype=Float32,
    owner=OWNER,
    description="The vector of a model that predicts how late a flight will depart",
    tags={"model": "departure-delay"},
)

carrier_report = FeatureService(
    "carrier_report",
    [carrier_week],
    dtype=Float64,
    owner=OWNER,
    description="How late each carrier has been, for people to read",
)
