"""The temporal join of a training frame, beside the least that any join could do: DuckDB's own ASOF join, on one time.

Comes in: a number of rows and of labels. Goes out: seconds, peak memory and what was wrong, each join in a process of
its own, over generated files in a temporary folder. ``python -m bench.offline_join`` prints them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featserve.definitions import Entity, FeatureView, Field, ParquetSource, Selection
from featserve.matrix import Status
from featserve.offline.duckdb import DuckDBEngine
from featserve.offline.join import JoinedView, join
from featserve.types import Float32, Float64, Int32, Int64

FIRST_US = 1_700_000_000_000_000
DAY_US = 86_400_000_000
YEAR_US = 365 * DAY_US
REPEATS = 3
SAMPLE = 500
FEATURES = {"f0": Float64, "f1": Float64, "f2": Float32, "f3": Int64, "f4": Int32}
Measured = dict[str, Any]


def connect(folder: Path) -> Any:
    connection = duckdb.connect(config={"preserve_insertion_order": False, "temp_directory": str(folder / "spill")})
    connection.execute("SET enable_progress_bar = false")
    return connection


def write_files(folder: Path, rows: int, labels: int, entities: int) -> None:
    """Write rows.parquet, whose rows are known up to a day after they happened, and labels.parquet, in no order."""
    with connect(folder) as connection:
        connection.execute(
            f"""COPY (SELECT user_id, make_timestamp({FIRST_US} + happened) AS event_time,
                    make_timestamp({FIRST_US} + happened + (hash(i * 13 + 5) % {DAY_US})::BIGINT) AS known_at,
                    (hash(i * 17) % 1000003) / 1000003 AS f0, (hash(i * 19) % 1000003) / 1000003 AS f1,
                    ((hash(i * 23) % 1000003) / 1000003)::FLOAT AS f2, (hash(i * 29) % 1000)::BIGINT AS f3,
                    (hash(i * 31) % 100)::INTEGER AS f4
                FROM (SELECT i, (hash(i) % {entities})::BIGINT AS user_id,
                        (hash(i * 7 + 1) % {YEAR_US})::BIGINT AS happened FROM range({rows}) AS r(i)))
                TO '{folder / "rows.parquet"}' (FORMAT parquet)"""
        )
        connection.execute(
            f"""COPY (SELECT (hash(i * 3 + 2) % {entities})::BIGINT AS user_id,
                    {FIRST_US} + (hash(i * 11 + 3) % {YEAR_US})::BIGINT AS time_us
                FROM range({labels}) AS r(i)) TO '{folder / "labels.parquet"}' (FORMAT parquet)"""
        )


def view(name: str = "rows") -> FeatureView:
    source = ParquetSource("rows.parquet", event_time="event_time", known_at="known_at")
    features = [Field(feature, type) for feature, type in FEATURES.items()]
    user = Entity("user", {"user_id": Int64})
    return FeatureView(name, user, features, ttl=timedelta(days=30), source=source)


def read_labels(folder: Path) -> tuple[Any, Any]:
    table = pq.read_table(folder / "labels.parquet")
    return table.select(["user_id"]), table.column("time_us").to_numpy()


def measure_ours(folder: Path, views: int = 1, memory_limit: str | None = None) -> Measured:
    """Return what one join of ours took, how many labels it lost, and how many of a sample it got wrong."""
    keys, time_us = read_labels(folder)
    wanted = [Selection(view(f"rows{i}"), tuple(FEATURES)) for i in range(views)]
    measured, answers = timed(
        lambda: list(join(DuckDBEngine(memory_limit=memory_limit), keys, time_us, wanted, root=folder))
    )
    lost = sum(len(time_us) - len(column) for answer in answers for column in answer.columns.values())
    return measured | {"rows_lost": lost, "sample_wrong": count_wrong(folder, answers[0])}


def measure_asof(folder: Path) -> Measured:
    """Return what DuckDB's ASOF join on the event time took: no known-at, no ttl, ties as they fall, in no order."""
    keys, time_us = read_labels(folder)
    labels = pa.table({"label": np.arange(len(time_us)), "user_id": keys.column(0), "time_us": time_us})
    with connect(folder) as connection:
        connection.register("labels", labels)
        query = f"""SELECT label, {", ".join(FEATURES)}
            FROM labels ASOF LEFT JOIN read_parquet('{folder / "rows.parquet"}') AS r
            ON labels.user_id = r.user_id AND make_timestamp(labels.time_us) >= r.event_time"""
        return timed(lambda: connection.sql(query).to_arrow_table())[0]


def timed(call: Callable[[], Any]) -> tuple[Measured, Any]:
    """Return the seconds, the processor seconds and the peak memory of ``call``, and its answer.

    ``over_start_mb``: how far memory rose above what the process held before it.
    """
    before_mb, started, started_cpu = peak_mb(), time.perf_counter(), time.process_time()
    answer = call()
    measured = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - started_cpu}
    return measured | {"peak_mb": peak_mb(), "over_start_mb": peak_mb() - before_mb}, answer


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def count_wrong(folder: Path, answer: JoinedView) -> int:
    """Return how many of some labels have another status or value than a join of each label with each row gives."""
    keys, time_us = read_labels(folder)
    chosen = np.linspace(0, len(time_us) - 1, SAMPLE).astype(np.int64)
    sample = pa.table({"label": chosen, "user_id": keys.column(0).take(pa.array(chosen)), "time_us": time_us[chosen]})
    with connect(folder) as connection:
        connection.register("sample", sample)
        rows = connection.execute(
            f"""SELECT label, time_us - epoch_us(event_time) <= {view().ttl_us}, {", ".join(FEATURES)}
                FROM sample LEFT JOIN (SELECT *, file_row_number FROM read_parquet('{folder / "rows.parquet"}')) AS r
                ON sample.user_id = r.user_id AND greatest(epoch_us(event_time), epoch_us(known_at)) <= time_us
                QUALIFY row_number() OVER (PARTITION BY label
                    ORDER BY event_time DESC, known_at DESC, file_row_number DESC) = 1"""
        ).fetchall()
    wrong = SAMPLE - len(rows)
    for label, fresh, *values in rows:
        status = Status.NOT_FOUND if fresh is None else Status.PRESENT if fresh else Status.EXPIRED
        got = [column[label].as_py() for column in answer.columns.values()]
        wrong += answer.status[label] != status or got != (values if fresh else [None] * len(values))
    return int(wrong)


def apart(measure: Callable[..., Measured], *args: Any) -> Measured:
    """Return what ``measure`` returns in a process of its own, whose peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def run(
    rows: int = 10_000_000, labels: int = 1_000_000, *, entities: int = 100_000, memory_limit: str = "200MB"
) -> Measured:
    """Measure the joins, taking turns; return the median times and the highest peaks.

    ``five_views``: as much again for each of five views in one join. ``limited``: one view under ``memory_limit``.
    """
    with tempfile.TemporaryDirectory(prefix="featserve-bench-") as name:
        folder = Path(name)
        write_files(folder, rows, labels, entities)
        ours, asof = [], []
        for _ in range(REPEATS):
            asof.append(apart(measure_asof, folder))
            ours.append(apart(measure_ours, folder))
        five = apart(measure_ours, folder, 5)
        limited = apart(measure_ours, folder, 1, memory_limit)
        parquet_mb = (folder / "rows.parquet").stat().st_size >> 20
    medians = {
        f"{who}_{what}": round(statistics.median(m[what] for m in measured), 2)
        for who, measured in (("ours", ours), ("asof", asof))
        for what in ("seconds", "cpu_s", "peak_mb", "over_start_mb")
    }
    return {
        "rows": rows,
        "labels": labels,
        "parquet_mb": parquet_mb,
        **medians,
        "ratio": round(medians["ours_seconds"] / medians["asof_seconds"], 2),
        "cpu_ratio": round(medians["ours_cpu_s"] / medians["asof_cpu_s"], 2),
        "five_views": five,
        "memory_limit": memory_limit,
        "limited": limited,
        "rows_lost": sum(m["rows_lost"] for m in (*ours, five, limited)),
        "sample_wrong": sum(m["sample_wrong"] for m in (*ours, five, limited)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument("--memory-limit", default="200MB")
    options = parser.parse_args()
    print(json.dumps(run(**vars(options)), indent=2))
