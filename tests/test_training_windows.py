"""Training frames of windows: the features of a view over events, and transforms of them, at each label's own time."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve.definitions import (
    Aggregate,
    Calendar,
    CsvSource,
    Entity,
    EventSource,
    FeatureService,
    FeatureView,
    Field,
    ParquetSource,
    Rolling,
    col,
    on_demand_transform,
)
from featserve.errors import SourceError
from featserve.leakage import leakage
from featserve.offline import OfflineEngine, open_engine
from featserve.training import METADATA, training_frame
from featserve.types import Float64, Int64, String, to_us

USER = Entity("user", {"user_id": Int64})
HOUR = timedelta(hours=1)
MIDNIGHT = datetime(2024, 11, 3, 4, tzinfo=UTC)  # in New York, on a day of 25 hours
FIELDS = [Field("user_id", Int64), Field("order_id", String), Field("paid", Float64, min=0.0), Field("shop", String)]
PARQUET = ParquetSource("orders.parquet", event_time="at", known_at="known")


@pytest.fixture(scope="module")
def engine() -> OfflineEngine:
    return open_engine("duckdb")


def orders(source: object = PARQUET) -> FeatureView:
    events = EventSource("orders", FIELDS, source=source, event_id="order_id")  # type: ignore[arg-type]
    today, day = Calendar(1, "day", "America/New_York"), Rolling(24 * HOUR)
    return FeatureView(
        "spending",
        USER,
        events=events,
        aggregates=[
            Aggregate("orders_today", "count", over=today),
            Aggregate("paid_today", "sum", "paid", over=today, default=0.0),
            Aggregate("paid_24h", "sum", "paid", over=day),
            Aggregate("last_shop", "last", "shop", over=day, where=col("paid") > 1),
        ],
    )


def write(folder: Path, rows: list[tuple[int | None, str | None, float, str, float, float]]) -> None:
    """Write orders of (user, id, paid, shop, hours after midnight, hours until known)."""
    users, ids, paid, shops, hours, delays = zip(*rows, strict=True)
    at = [MIDNIGHT + hour * HOUR for hour in hours]
    known = [t + delay * HOUR for t, delay in zip(at, delays, strict=True)]
    times = {"at": pa.array(at, pa.timestamp("us", "UTC")), "known": pa.array(known, pa.timestamp("us", "UTC"))}
    columns = {"user_id": pa.array(users, pa.int64()), "order_id": pa.array(ids, pa.string())}
    pq.write_table(
        pa.table({**columns, "paid": pa.array(paid, pa.float64()), "shop": shops, **times}), folder / "orders.parquet"
    )


ROWS: list[tuple[int | None, str | None, float, str, float, float]] = [
    (1, "a", 2.0, "north", 0, 0),
    (1, "b", 3.0, "south", 10, 5),
    (1, "b", 3.0, "south", 10, 9),  # the same order once more
    (1, "c", 0.5, "west", 20, 0),
    (None, "d", 9.0, "north", 20, 0),
    (None, "e", 9.0, "north", -2, 0),  # of nobody: it takes no one's place
    (2, "e", 7.0, "north", -1, 0),
]
LABELS = {
    "user_id": pa.array([1, 1, 1, 2, 3, None], pa.int64()),
    "at": pa.array([MIDNIGHT + h * HOUR for h in (14, 15, 24.5, 0, 0, 0)], pa.timestamp("us", "UTC")),
    "bought": [0, 1, 1, 0, 1, 0],
}


@on_demand_transform(
    inputs={"day": orders()["paid_24h"], "today": orders()["paid_today"]}, outputs=[Field("earlier", Float64)]
)
def earlier(day, today):  # type: ignore[no-untyped-def]
    return {"earlier": day - today}


def service(view: FeatureView) -> FeatureService:
    names = tuple(f.name for f in view.features)
    return FeatureService("fraud", [view[names], earlier], dtype=Float64)


def test_a_training_frame_of_windows(engine: OfflineEngine, tmp_path: Path) -> None:
    """Windows follow the local day of 25 hours, count an order once and from when it was known, and skip null keys."""
    write(tmp_path, ROWS)
    frame = training_frame(
        engine, service(orders()), pa.table(LABELS), "at", root=tmp_path, event_times=True, statuses=True
    )
    found = {name: frame.column(f"spending.{name}").to_pylist() for name in ("orders_today", "last_shop", "event_time")}
    assert found["orders_today"] == [1, 2, 3, 0, 0, None]
    assert found["last_shop"] == ["north", "south", "south", "north", None, None]
    hours = [None if t is None else (t - MIDNIGHT) / HOUR for t in found["event_time"]]
    assert hours == [0, 10, 20, -1, None, None]
    assert frame.column("spending.paid_today").to_pylist() == [2.0, 5.0, 5.5, 0.0, 0.0, 0.0]
    assert frame.column("spending.paid_24h").to_pylist() == [2.0, 5.0, 3.5, 7.0, None, None]
    assert frame.column("earlier.earlier").to_pylist() == [0.0, 0.0, -2.0, 7.0, None, None]
    statuses = frame.column("spending.paid_today.status").to_pylist()
    assert statuses == ["PRESENT", "PRESENT", "PRESENT", "NULL", "NULL", "NOT_FOUND"]
    origin = json.loads(frame.schema.metadata[METADATA.encode()])
    assert origin["views"] == {"spending@1": {"PRESENT": 5, "NOT_FOUND": 1, "EXPIRED": 0}}


def test_csv_and_a_delay(engine: OfflineEngine, tmp_path: Path) -> None:
    """Events of a CSV with a declared delay count from that long after their event time, a null key being no error."""
    lines = [f"{'' if user is None else user},{id_},{paid},{shop},{(MIDNIGHT + hour * HOUR).isoformat()}"
             for user, id_, paid, shop, hour, _ in ROWS]  # fmt: skip
    (tmp_path / "orders.csv").write_text("\n".join(["user_id,order_id,paid,shop,at", *lines]) + "\n")
    view = orders(CsvSource("orders.csv", event_time="at", delay=4 * HOUR))
    frame = training_frame(engine, FeatureService("s", [view["orders_today"]]), pa.table(LABELS), "at", root=tmp_path)
    assert frame.column("spending.orders_today").to_pylist() == [2, 2, 3, 0, 0, None]


def test_events_that_break_a_constraint(engine: OfflineEngine, tmp_path: Path) -> None:
    """An event below a field's min, or without an id, refuses the frame and names the row."""
    for row, problem in (
        ((1, "f", -1.0, "north", 0.0, 0.0), "rows[7].paid: -1.0 is less than the min 0.0"),
        ((1, None, 1.0, "north", 0.0, 0.0), "rows[7].order_id: is null"),
    ):
        write(tmp_path, [*ROWS, row])
        with pytest.raises(SourceError) as refused:
            training_frame(engine, service(orders()), pa.table(LABELS), "at", root=tmp_path)
        assert problem in str(refused.value)


def test_leakage_of_windows(engine: OfflineEngine, tmp_path: Path) -> None:
    """Careless joins count events before they were known, or all of an entity's events, whatever the label's time."""
    write(tmp_path, ROWS)
    report = leakage(engine, service(orders()), pa.table(LABELS), "at", "bought", root=tmp_path)
    found = {f.feature: f for f in report.features}
    assert found["spending.orders_today"].event_time_only_rows == 1
    assert found["spending.orders_today"].latest_value_rows == 3
    assert found["spending.last_shop"].latest_value_rows == 1
    assert np.isfinite(found["spending.orders_today"].honest or np.nan)


def test_the_label_time_is_the_end_of_every_window(engine: OfflineEngine, tmp_path: Path) -> None:
    """An event at exactly T counts, and one a microsecond later does not."""
    write(tmp_path, [(1, "a", 2.0, "north", 0, 0)])
    times = pa.array([to_us(MIDNIGHT) + d for d in (-1, 0, 24 * 3_600_000_000 - 1, 24 * 3_600_000_000)], pa.int64())
    labels = pa.table({"user_id": pa.array([1] * 4, pa.int64()), "at": times.cast(pa.timestamp("us", "UTC"))})
    frame = training_frame(engine, FeatureService("s", [orders()["paid_24h"]]), labels, "at", root=tmp_path)
    assert frame.column("spending.paid_24h").to_pylist() == [None, 2.0, 2.0, None]
