"""What a model of departure delays can know as a flight is due to leave New York: weather, aircraft, carrier, route.

The two delay views stand at a flight's scheduled departure, but are known only once it has departed or arrived. That
is what ``known_at`` is for: without it, a carrier's newest row would be the very flight whose delay is to be predicted.
"""

from datetime import timedelta

from featserve import Entity, FeatureService, FeatureView, Field, Float32, Int32, ParquetSource, String, Timestamp

OWNER = "delays@example.com"

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

departure_delay_model = FeatureService(
    "departure_delay_model",
    [hourly_weather, aircraft_attributes, carrier_last_departure, route_last_arrival],
    dtype=Float32,
    owner=OWNER,
    description="The vector of a model that predicts how late a flight will depart",
    tags={"model": "departure-delay"},
)
