"""Labels of a training set: from whatever holds them to checked columns.

Comes in: a frame of any library, a mapping of columns, or a file. Goes out: ``Labels``, in the order that they came in.
Knows no view and no offline engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from featserve.arrow import arrow_type, column_from_arrow, first_refused
from featserve.errors import InvalidRequest, SourceError, Violation, hint, invalid
from featserve.frames import Frame
from featserve.sources import parse_times
from featserve.types import Column, Float32, Float64, Int32, Int64, String, Timestamp, Type

Int64s = npt.NDArray[np.int64]

FILES = (".parquet", ".csv", ".csv.gz")
NULLS = ("", "NA", "null")
"""The spellings of a missing value in a CSV file, as in a CsvSource."""


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Labels, checked: ``table`` as given, ``columns`` those that were wanted, ``time_us`` int64 of shape (n,)."""

    table: Any
    columns: dict[str, Column]
    time_us: Int64s


def read_labels(labels: Frame | str | Path, wanted: Mapping[str, Type], time: str) -> Labels:
    """Return labels with the ``wanted`` columns and the timestamp column ``time``, whatever else they hold.

    ``labels``: a pyarrow Table, a pandas or polars DataFrame, a mapping of columns, or a Parquet or CSV file. A time
    without a zone is UTC. Raises SourceError for a file that cannot be read, InvalidRequest that names the column:
    missing, twice there, of another type, or a null time.
    """
    table = _read_file(Path(labels), wanted, time) if isinstance(labels, str | Path) else _table(labels)
    names = Counter(table.column_names)
    wrong = [(n, f"missing column {n!r}{hint(n, names)}") for n in dict.fromkeys((*wanted, time)) if n not in names]
    wrong += [(name, f"column {name!r} stands {times} times") for name, times in names.items() if times > 1]
    if wrong:
        raise InvalidRequest(
            f"labels: {'; '.join(description for _, description in wrong)}",
            violations=[Violation(f"labels.{name}", description) for name, description in wrong],
        )
    columns = {name: column_from_arrow(type, table.column(name), f"labels.{name}") for name, type in wanted.items()}
    instants = column_from_arrow(Timestamp, table.column(time), f"labels.{time}")
    if instants.valid is not None:
        raise invalid(f"labels.{time}", f"row {int(np.argmin(instants.valid))} is null; every label has a time")
    return Labels(table, columns, instants.values)


def _table(labels: Frame) -> Any:
    """Return a frame of any library as a pyarrow Table."""
    try:
        if isinstance(labels, pa.Table):
            return labels
        if hasattr(labels, "to_arrow"):  # polars
            return labels.to_arrow()
        if hasattr(labels, "iloc"):  # pandas
            return pa.Table.from_pandas(labels, preserve_index=False).replace_schema_metadata()
        if isinstance(labels, Mapping):
            return pa.table({str(name): values for name, values in labels.items()})
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise invalid("labels", f"cannot be taken as columns of one type each: {error}") from None
    raise invalid("labels", f"expected a pyarrow Table, a DataFrame or a file, got {labels.__class__.__name__}")


def _read_file(path: Path, wanted: Mapping[str, Type], time: str) -> Any:
    if not path.name.endswith(FILES):
        raise SourceError(f"labels {path}: a label file is {', '.join(FILES[:-1])} or {FILES[-1]}")
    try:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:  # read_table would load pandas
                return file.read()
        return _read_csv(path, dict(wanted) | {time: Timestamp})
    except FileNotFoundError:
        near = hint(path.name, (f.name for f in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise SourceError(f"labels {path}: there is no such file{near}") from None
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"labels {path}: cannot be read: {error}") from None


def _read_csv(path: Path, types: Mapping[str, Type]) -> Any:
    """Return the columns of a CSV file; those of ``types`` as exactly as a CsvSource reads them."""
    for name, type in types.items():
        if type.vector:
            raise SourceError(f"labels {path}: column {name!r}: CSV holds no {type}; use Parquet")
    wide = {Int32: Int64, Float32: Float64, Timestamp: String}
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(use_threads=False),  # only then does an error say its row
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: arrow_type(wide.get(type, type)) for name, type in types.items()},
            null_values=NULLS,
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    for name in (name for name, type in types.items() if type is Timestamp and name in table.column_names):
        texts = table.column(name)
        try:
            parsed = parse_times(texts)
        except pa.ArrowInvalid:
            row = first_refused(texts, parse_times)
            raise invalid(
                f"labels.{name}, row {row}", f"expected timestamp, got {texts[row].as_py()!r} (not an ISO 8601 time)"
            ) from None
        table = table.set_column(table.column_names.index(name), name, parsed)
    return table
