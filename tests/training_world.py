"""Two views with their sources, a service of them with transforms, labels, and what each label sees."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featserve.definitions import (
    CsvSource,
    Entity,
    FeatureService,
    FeatureView,
    Field,
    ParquetSource,
    RequestColumn,
    RequestTime,
)
from featserve.offline import OfflineEngine
from featserve.training import training_frame
from featserve.types import Float32, Float64, Int64, String
from tests.transforms import made

NOON = datetime(2024, 3, 10, 12, tzinfo=UTC)
US = timedelta(microseconds=1)
HOUR = timedelta(hours=1)
USER = Entity("user", {"user_id": Int64})
PLACE = Entity("place", {"country": String, "zip": String})

ACTIVITY = FeatureView(
    "activity",
    USER,
    [Field("clicks", Int64), Field("rate", Float64, default=0.5), Field("plan", String)],
    ttl=HOUR,
    source=ParquetSource("activity.parquet", event_time="at", known_at="known"),
)
WEATHER = FeatureView(
    "weather", PLACE, [Field("temp", Float32)], source=CsvSource("weather.csv", event_time="at", delay=5 * US)
)
RATIO = made(
    "def ratio(amount, clicks):\n    return amount / clicks",
    {"amount": RequestColumn("amount", Float64), "clicks": ACTIVITY["clicks"]},
    [Field("out", Float64)],
)
AGE = made(
    "def age(now, rate, valid):\n    return np.where(valid['rate'], now.astype('M8[h]').astype(np.int64) % 24, -1)",
    {"now": RequestTime(), "rate": ACTIVITY["rate"]},
    [Field("hour", Int64)],
    "pass",
)
SERVICE = FeatureService("s", [ACTIVITY, RATIO, WEATHER, AGE], dtype=Float64)
FEATURES = ["activity.clicks", "activity.rate", "activity.plan", "ratio.out", "weather.temp", "age.hour"]


def write_sources(folder: Path) -> None:
    """Write the sources: two rows of user 1, one of user 2 with a null, one of user 3 known late; two places."""
    times = [NOON, NOON + 10 * US, NOON, NOON]
    rows = {
        "user_id": [1, 1, 2, 3],
        "clicks": [10, 20, None, 40],
        "rate": [0.25, None, 1.0, 2.0],
        "plan": ["free", "paid", "", None],
        "at": pa.array(times, pa.timestamp("us", "UTC")),
        "known": pa.array([NOON, NOON + 10 * US, NOON, NOON + HOUR], pa.timestamp("us", "UTC")),
    }
    pq.write_table(pa.table(rows), folder / "activity.parquet")
    (folder / "weather.csv").write_text(
        f'country,zip,temp,at\nde,"1",20.5,{NOON.isoformat()}\nd,"e1",1.5,{NOON.isoformat()}\n'
    )


def labels(*rows: tuple[int | None, datetime, float | None]) -> dict[str, list[Any]]:
    """Return labels as a mapping: user, time and amount of each; all in one place."""
    users, times, amounts = (list(values) for values in zip(*rows, strict=True))
    place = {"country": ["de"] * len(rows), "zip": ["1"] * len(rows)}
    return {"user_id": users, "when": times, "amount": amounts, **place, "late": [i % 2 == 0 for i in range(len(rows))]}


LABELS = labels(
    (1, NOON + 10 * US, 5.0),
    (1, NOON, 5.0),
    (9, NOON, 1.0),
    (1, NOON - US, 5.0),
    (None, NOON + HOUR, 5.0),
    (2, NOON + 5 * US, None),
    (1, NOON + 10 * US, 5.0),
    (1, NOON + 10 * US + HOUR, 5.0),
    (1, NOON + 10 * US + HOUR + US, 5.0),
    (3, NOON + HOUR - US, 5.0),
    (3, NOON + HOUR, 5.0),
)
EXPECTED = {
    "activity.clicks": [20, 10, None, None, None, None, 20, 20, None, None, 40],
    "activity.rate": [0.5, 0.25, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 2.0],
    "activity.plan": ["paid", "free", None, None, None, "", "paid", "paid", None, None, None],
    "ratio.out": [0.25, 0.5, None, None, None, None, 0.25, 0.25, None, None, 0.125],
    "weather.temp": [20.5, None, None, None, 20.5, 20.5, 20.5, 20.5, 20.5, 20.5, 20.5],
    "age.hour": [12, 12, 12, 11, 13, 12, 12, 13, 13, 12, 13],
}


def frame_of(engine: OfflineEngine, root: Path, given: Any, service: FeatureService = SERVICE, **rest: Any) -> Any:
    return training_frame(engine, service, given, "when", root=root, **rest)
