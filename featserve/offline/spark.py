"""The distributed engine: the same SQL on Apache Spark, through PySpark.

With no session given it starts one in local mode, in this process's Java; the files of a source must be where every
executor of a given session finds them.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import sqlglot
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession, functions
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.storagelevel import StorageLevel

from featserve.errors import DefinitionError, SourceError, TransformError
from featserve.offline.memory import machine_mebibytes, mebibytes
from featserve.offline.scan import Scan
from featserve.offline.sql import find_rows, source_rows
from featserve.offline.windows import find_aggregates

LOCAL = {
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    # The default of 200 is for clusters; here each would be a task of its own, however few rows there are.
    "spark.sql.shuffle.partitions": "8",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
SESSION = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.caseSensitive": "false",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    # A time without a zone is UTC, and times before 1900 are what they say.
    "spark.sql.parquet.inferTimestampNTZ.enabled": "false",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
}

LEAST_MEBIBYTES = 512
"""Spark does not start with less than 450 MiB of Java heap."""

ROW = "_row"


class SparkEngine:
    """An OfflineEngine over Spark.

    ``session``: the Spark session to work in, beside whatever else it does; None for one in local mode on all cores,
    whose Java heap, where the join happens, may grow to ``memory_limit``: to half of the machine's memory if None. A
    session that this process already has keeps the heap that it began with.
    """

    def __init__(self, *, session: SparkSession | None = None, memory_limit: str | None = None) -> None:
        self._owned = session is None and not _is_running()
        self._session = session or _local_session(memory_limit)

    def find(self, labels: Any, scans: Sequence[Scan], folder: Path, progress: Callable[[str], None]) -> Iterator[Any]:
        session = self._session.newSession()  # its own settings and names of tables
        for name, value in SESSION.items():
            session.conf.set(name, value)
        last_us = int(labels.column("_time").to_numpy().max(initial=-(2**63)))
        _frame(session, labels).createOrReplaceTempView("labels")
        for scan in scans:
            try:
                found = _find(session, scan, last_us, progress)
            except (PySparkException, Py4JError) as error:
                reason = str(error).partition("\n")[0]
                raise SourceError(f"{scan.source}: Spark cannot read or join it: {reason}") from None
            yield found

    def map_batches(self, function: Callable[[Any], Any], table: Any, schema: Any) -> Any:
        # Spark reads a dot in a name as a field of a struct: in there columns go by number.
        names, numbers = table.column_names, [f"column{i}" for i in range(len(schema))]

        def each(batches: Iterator[Any]) -> Iterator[Any]:
            for batch in batches:
                answer = function(batch.select(range(len(names))).rename_columns(names))
                yield answer.append_column(ROW, batch.column(len(names))).rename_columns([*numbers, ROW])

        session = self._session.newSession()
        for name, value in SESSION.items():
            session.conf.set(name, value)
        given = table.append_column(ROW, pa.array(np.arange(len(table))))
        given = given.rename_columns([f"column{i}" for i in range(len(given.column_names))])
        types = pa.schema([*zip(numbers, schema.types, strict=True), (ROW, pa.int64())])
        try:
            with _pandas_unmentioned():
                mapped = _frame(session, given).mapInArrow(each, from_arrow_schema(types))
            answer = mapped.toArrow().sort_by(ROW)
        except PySparkException as error:
            raise _raised(error) from None
        return answer.select(numbers).rename_columns(schema.names).cast(schema)

    def close(self) -> None:
        if self._owned:
            self._session.stop()


def _frame(session: SparkSession, table: Any) -> DataFrame:
    with _pandas_unmentioned():
        return session.createDataFrame(table)


@contextmanager
def _pandas_unmentioned() -> Iterator[None]:
    """Keep Spark from warning of a pandas that it does not know yet: nothing here uses any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
        yield


def _raised(error: PySparkException) -> TransformError:
    """Return the error for what went wrong in a Python worker: what the worker raised, where it says that."""
    told = re.search(r"^featserve\.errors\.TransformError: (.*)", str(error), re.MULTILINE | re.DOTALL)
    if told:
        return TransformError(told[1].strip())
    return TransformError(f"Spark cannot run the transforms: {str(error).strip().splitlines()[-1]}")


def _is_running() -> bool:
    """Say whether this process has a session: whoever started that one stops it."""
    try:
        return not SparkSession.active().sparkContext._jsc.sc().isStopped()
    except PySparkException:
        return False


def _local_session(memory_limit: str | None) -> SparkSession:
    heap = max(LEAST_MEBIBYTES, machine_mebibytes() // 2) if memory_limit is None else mebibytes(memory_limit)
    if heap < LEAST_MEBIBYTES:
        raise DefinitionError(
            f"memory limit {memory_limit!r} is too little for Spark; the least that it takes is {LEAST_MEBIBYTES}M"
        )
    # Transforms run in Python processes of the executors: let those be this Python, with the same packages.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master("local[*]").appName("featserve").config("spark.driver.memory", f"{heap}m")
    for name, value in LOCAL.items():
        builder = builder.config(name, value)
    try:
        with _pandas_unmentioned():
            session = builder.getOrCreate()
    except PySparkException as error:
        raise DefinitionError(
            f"offline engine 'spark': Spark does not start; it needs Java 17 or newer: {error}"
        ) from None
    session.sparkContext.setLogLevel("ERROR")
    return session


def _find(session: SparkSession, scan: Scan, last_us: int, progress: Callable[[str], None]) -> Any:
    _files(session, scan).createOrReplaceTempView("source_files")
    rows = session.sql(_spark_sql(source_rows(scan, "source_files", "unix_micros")))
    rows.createOrReplaceTempView("source_rows")
    steps, answer = (
        find_rows(scan, last_us) if scan.aggregation is None else find_aggregates(scan, last_us, frames=False)
    )
    held = []
    for step, tables in steps.items():
        progress(f"{scan.view}: {step}")
        for table, query in tables.items():
            frame = session.sql(_spark_sql(query)).persist(StorageLevel.MEMORY_AND_DISK)
            frame.createOrReplaceTempView(table)
            held.append(frame)
    progress(f"{scan.view}: features")
    found = session.sql(_spark_sql(answer)).toArrow()
    for frame in held:
        frame.unpersist()
    return found


def _spark_sql(query: str) -> str:
    return str(sqlglot.transpile(query, read="duckdb", write="spark", identify=True)[0])


def _files(session: SparkSession, scan: Scan) -> DataFrame:
    """Return the columns of the files that are read, with ``_file`` and ``_position``."""
    names = dict.fromkeys([*scan.columns.values(), scan.event_time, scan.known_at or scan.event_time])
    # One frame a file: of a frame over several, a row tells the path of its file, in some encoding, and not its number.
    frames = [
        session.read.parquet(str(file)).select(
            *("`" + name.replace("`", "``") + "`" for name in names),
            functions.lit(number).alias("_file"),
            functions.col("_metadata.row_index").alias("_position"),
        )
        for number, file in enumerate(scan.files)
    ]
    return reduce(DataFrame.unionAll, frames)
