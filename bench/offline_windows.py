"""A window in a training frame, beside a query that is written by hand, which takes every event for known at once.

Comes in: a number of events and of labels. Goes out: seconds, peak memory and what was wrong, each query in a process
of its own, over generated files in a temporary folder: a sum, a count and a maximum over rolling seven days, one event
in ten known three hours late. ``python -m bench.offline_windows`` prints them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bench.offline_join import DAY_US, FIRST_US, SAMPLE, Measured, apart, connect, read_labels, timed
from featserve.definitions import Aggregate, Entity, EventSource, FeatureView, Field, ParquetSource, Rolling, Selection
from featserve.offline.duckdb import DuckDBEngine
from featserve.offline.join import JoinedView, join
from featserve.types import Float64, Int64

SPAN_US = 90 * DAY_US
LATE_PART = 10
"""One in so many events is known late."""
LATE_US = 3 * 3_600_000_000
WINDOW = timedelta(days=7)
REPEATS = 3
NAMES = ("total", "number", "greatest")


def write_files(folder: Path, events: int, labels: int, entities: int) -> None:
    """Write events.parquet and labels.parquet, in no order."""
    with connect(folder) as connection:
        connection.execute(
            f"""COPY (SELECT user_id, make_timestamp({FIRST_US} + happened) AS event_time,
                    make_timestamp({FIRST_US} + happened + CASE WHEN late THEN {LATE_US} ELSE 0 END) AS known_at, amount
                FROM (SELECT (hash(i) % {entities})::BIGINT AS user_id,
                        (hash(i * 7 + 1) % {SPAN_US})::BIGINT AS happened,
                        hash(i * 13 + 5) % {LATE_PART} = 0 AS late, (hash(i * 17) % 1000003) / 1000003 AS amount
                    FROM range({events}) AS r(i))) TO '{folder / "events.parquet"}' (FORMAT parquet)"""
        )
        connection.execute(
            f"""COPY (SELECT (hash(i * 3 + 2) % {entities})::BIGINT AS user_id,
                    {FIRST_US} + (hash(i * 11 + 3) % {SPAN_US})::BIGINT AS time_us
                FROM range({labels}) AS r(i)) TO '{folder / "labels.parquet"}' (FORMAT parquet)"""
        )


def view() -> FeatureView:
    source = ParquetSource("events.parquet", event_time="event_time", known_at="known_at")
    events = EventSource("payments", [Field("user_id", Int64), Field("amount", Float64)], source=source)
    over = Rolling(WINDOW)
    aggregates = [
        Aggregate(name, function, "amount", over=over)
        for name, function in zip(NAMES, ("sum", "count", "max"), strict=True)
    ]
    return FeatureView("spending", Entity("user", {"user_id": Int64}), events=events, aggregates=aggregates)


def measure_ours(folder: Path, memory_limit: str | None = None) -> Measured:
    """Return what ours took, how many labels it lost, and how many of a sample it got wrong."""
    keys, time_us = read_labels(folder)
    engine = DuckDBEngine(memory_limit=memory_limit)
    measured, (answer,) = timed(lambda: list(join(engine, keys, time_us, [Selection(view(), NAMES)], root=folder)))
    lost = sum(len(time_us) - len(column) for column in answer.columns.values())
    return measured | {"rows_lost": lost, "sample_wrong": count_wrong(folder, answer)}


def measure_by_hand(folder: Path) -> Measured:
    """Return what a window over events and labels took: each event known at once, no event time, in no order."""
    keys, time_us = read_labels(folder)
    labels = pa.table({"label": np.arange(len(time_us)), "user_id": keys.column(0), "time_us": time_us})
    with connect(folder) as connection:
        connection.register("labels", labels)
        query = f"""
            SELECT label, total, number, greatest FROM (
                SELECT label, SUM(amount) OVER w AS total, COUNT(amount) OVER w AS number,
                    MAX(amount) OVER w AS greatest
                FROM (
                    SELECT NULL AS label, user_id, epoch_us(event_time) AS time_us, amount
                    FROM read_parquet('{folder / "events.parquet"}')
                    UNION ALL SELECT label, user_id, time_us, NULL FROM labels
                ) WINDOW w AS (PARTITION BY user_id ORDER BY time_us
                    RANGE BETWEEN {WINDOW // timedelta(microseconds=1) - 1} PRECEDING AND CURRENT ROW)
            ) WHERE label IS NOT NULL"""
        return timed(lambda: connection.sql(query).to_arrow_table())[0]


def count_wrong(folder: Path, answer: JoinedView) -> int:
    """Return how many of some labels have another value than an aggregate over pairs of labels and events gives."""
    keys, time_us = read_labels(folder)
    chosen = np.linspace(0, len(time_us) - 1, SAMPLE).astype(np.int64)
    sample = pa.table({"label": chosen, "user_id": keys.column(0).take(pa.array(chosen)), "time_us": time_us[chosen]})
    with connect(folder) as connection:
        connection.register("sample", sample)
        rows = connection.execute(
            f"""SELECT label, SUM(amount), COUNT(amount), MAX(amount)
                FROM sample LEFT JOIN read_parquet('{folder / "events.parquet"}') AS e ON sample.user_id = e.user_id
                    AND greatest(epoch_us(event_time), epoch_us(known_at)) <= time_us
                    AND epoch_us(event_time) > time_us - {WINDOW // timedelta(microseconds=1)} GROUP BY label"""
        ).fetchall()
    wrong = SAMPLE - len(rows)
    for label, total, number, greatest in rows:
        got = [answer.columns[name][label].as_py() for name in NAMES]
        close = total is got[0] if total is None or got[0] is None else abs(got[0] - total) <= 1e-12 * abs(total)
        wrong += not close or got[1:] != [number, greatest]
    return wrong


def run(
    events: int = 10_000_000, labels: int = 1_000_000, *, entities: int = 100_000, memory_limit: str = "400MB"
) -> dict[str, Any]:
    """Measure both, taking turns; return the median times and the highest peaks, and ours under ``memory_limit``."""
    with tempfile.TemporaryDirectory(prefix="featserve-bench-") as name:
        folder = Path(name)
        write_files(folder, events, labels, entities)
        ours, hand = [], []
        for _ in range(REPEATS):
            hand.append(apart(measure_by_hand, folder))
            ours.append(apart(measure_ours, folder))
        limited = apart(measure_ours, folder, memory_limit)
    medians = {
        f"{who}_{what}": round(statistics.median(m[what] for m in measured), 2)
        for who, measured in (("ours", ours), ("hand", hand))
        for what in ("seconds", "cpu_s", "peak_mb")
    }
    return {
        "events": events,
        "labels": labels,
        "late": 1 / LATE_PART,
        **medians,
        "ratio": round(medians["ours_seconds"] / medians["hand_seconds"], 2),
        "cpu_ratio": round(medians["ours_cpu_s"] / medians["hand_cpu_s"], 2),
        "memory_limit": memory_limit,
        "limited": limited,
        "rows_lost": sum(m["rows_lost"] for m in (*ours, limited)),
        "sample_wrong": sum(m["sample_wrong"] for m in (*ours, limited)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument("--memory-limit", default="400MB")
    print(json.dumps(run(**vars(parser.parse_args())), indent=2))
