"""The embedded engine: DuckDB in this process, which spills to disk what its memory limit does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from featserve.errors import SourceError, TooLarge
from featserve.offline.memory import mebibytes
from featserve.offline.scan import Scan
from featserve.offline.sql import find_rows, source_rows
from featserve.offline.windows import find_aggregates

BATCH_ROWS = 131_072
"""Rows that a function is given at once."""


class DuckDBEngine:
    """An OfflineEngine over DuckDB.

    ``memory_limit``: what it may hold in memory, such as "4GB", beside the labels and the answer; None for DuckDB's own
    limit, 80 % of the machine's.
    """

    def __init__(self, *, memory_limit: str | None = None) -> None:
        self._config: dict[str, Any] = {"preserve_insertion_order": False, "python_enable_replacements": False}
        if memory_limit is not None:
            self._config["memory_limit"] = f"{mebibytes(memory_limit)}MiB"

    def find(self, labels: Any, scans: Sequence[Scan], folder: Path, progress: Callable[[str], None]) -> Iterator[Any]:
        with duckdb.connect(config={**self._config, "temp_directory": str(folder / "spill")}) as connection:
            connection.execute("SET enable_progress_bar = false")
            # A file's statistics leave NaN out, and DuckDB 2.0 takes ISNAN for false where they do not show it.
            connection.execute("SET disabled_optimizers = 'statistics_propagation'")
            connection.register("labels", labels)
            last_us = int(labels.column("_time").to_numpy().max(initial=-(2**63)))
            for scan in scans:
                try:
                    found = _find(connection, scan, last_us, progress)
                except duckdb.OutOfMemoryException as error:
                    reason = str(error).partition("\n")[0]
                    raise TooLarge(
                        f"{scan.source}: the join needs more memory, or disk to spill to: {reason}"
                    ) from None
                except duckdb.Error as error:
                    raise SourceError(f"{scan.source}: cannot be read: {error}") from None
                except RuntimeError as error:
                    if str(error) == "Query interrupted":  # what DuckDB makes of Ctrl-C
                        raise KeyboardInterrupt from None
                    raise
                yield found

    def map_batches(self, function: Callable[[Any], Any], table: Any, schema: Any) -> Any:
        batches = table.to_batches(max_chunksize=BATCH_ROWS)
        return pa.Table.from_batches([function(batch) for batch in batches], schema)

    def close(self) -> None:
        pass


def _find(connection: Any, scan: Scan, last_us: int, progress: Callable[[str], None]) -> Any:
    connection.execute(f"CREATE OR REPLACE TEMP VIEW source_rows AS {source_rows(scan, _files(scan), 'epoch_us')}")
    steps, answer = (
        find_rows(scan, last_us) if scan.aggregation is None else find_aggregates(scan, last_us, frames=True)
    )
    for step, tables in steps.items():
        progress(f"{scan.view}: {step}")
        for table, query in tables.items():
            connection.execute(f"CREATE TEMP TABLE {table} AS {query}")
    progress(f"{scan.view}: features")
    found = connection.sql(answer).to_arrow_table()
    for table in (table for tables in steps.values() for table in tables):
        connection.execute(f"DROP TABLE {table}")
    return found


def _files(scan: Scan) -> str:
    files = ", ".join("'" + str(file).replace("'", "''") + "'" for file in scan.files)
    return (
        "(SELECT *, file_index AS _file, file_row_number AS _position "
        f"FROM read_parquet([{files}], hive_partitioning = false)) AS files"
    )
