"""The ``OfflineEngine`` protocol: where the rows of batch sources are joined to labels, as of each label's own time.

An engine finds rows. What they mean for a label (its status, the order of the answer) is said once, in
``offline.join``. Backends are named only in ``open_engine``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from featserve.errors import DefinitionError
from featserve.offline.scan import Scan

Engine = Literal["duckdb", "spark"]

Progress = Callable[[str, int, int], None]
"""Called as a step begins, and once at the end, with what it does and how many steps are done and there are in all."""

FIND_STEPS = 5
"""The steps of each scan that an engine reports."""


class OfflineEngine(Protocol):
    """Something that runs the SQL of ``offline.sql`` and ``offline.windows`` over Parquet files."""

    def find(self, labels: Any, scans: Sequence[Scan], folder: Path, progress: Callable[[str], None]) -> Iterator[Any]:
        """Yield for each scan a pyarrow Table: the row that each label sees, in any order; none where there is none.

        Of a scan with an aggregation it is a row for each label, whose ``_event_time`` may be null. ``labels``: a
        pyarrow Table with int32 ``_row``, int64 ``_time``, the key columns, of which null ones see nothing, and the
        starts of windows, int64 ``_start_0`` and so on. ``folder``: for temporary files. ``progress`` is called as each
        of ``FIND_STEPS`` steps begins. The tables have the columns ``_row``, ``_event_time`` (int64) and the scan's
        features, where timestamps are int64 and vectors lists. Raises SourceError for a file that cannot be read,
        TooLarge where memory or disk does not suffice.
        """

    def map_batches(self, function: Callable[[Any], Any], table: Any, schema: Any) -> Any:
        """Return a pyarrow Table of ``schema``: ``function`` of each record batch of ``table``, in the table's order.

        ``function`` takes and returns a pyarrow RecordBatch of the same number of rows; it can be pickled, and does not
        depend on how the rows are batched.
        """

    def close(self) -> None:
        """Let go of what the engine holds. Closing twice is allowed."""


def open_engine(name: Engine = "duckdb", *, memory_limit: str | None = None) -> OfflineEngine:
    """Open an offline engine: "duckdb" within this process, or "spark" in local mode.

    ``memory_limit``, such as "500M" or "4G": what it may use before it spills to disk; None for 80 % of the machine's
    memory on DuckDB, half of it on Spark. Raises DefinitionError for an engine that is not known or not installed, and
    for a limit that is no size.
    """
    try:
        if name == "duckdb":
            from featserve.offline.duckdb import DuckDBEngine

            return DuckDBEngine(memory_limit=memory_limit)
        if name == "spark":
            from featserve.offline.spark import SparkEngine

            return SparkEngine(memory_limit=memory_limit)
    except ModuleNotFoundError as error:
        extra = "spark" if name == "spark" else "train"
        raise DefinitionError(
            f"offline engine {name!r} needs {error.name}, which is not installed: pip install 'featserve[{extra}]'"
        ) from None
    raise DefinitionError(f"offline engine {name!r} is neither 'duckdb' nor 'spark'")
