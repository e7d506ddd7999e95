"""What is scanned as it is, and what goes through the one reader first."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve.definitions import CsvSource, Entity, FeatureView, Field, ParquetSource
from featserve.errors import SourceError
from featserve.offline.scan import Scan, open_scan
from featserve.types import Float32, Int32, Int64, String, Timestamp, Type, Vector
from tests.offline.worlds import FIRST, LAST, NOON, array

USER = Entity("user", {"user_id": Int64})


def view_of(type: Type, delay: timedelta = timedelta(0), path: str = "rows*.parquet") -> FeatureView:
    source = ParquetSource(path, event_time="at", delay=delay)
    return FeatureView("v", USER, [Field("x", type)], source=source)


def write(folder: Path, name: str = "rows.parquet", **columns: Any) -> None:
    known = {"user_id": pa.array([1, 2]), "at": array(Timestamp, [NOON, NOON + 1]), "x": pa.array([1, 2])}
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({**known, **columns}), folder / name)


def scan(view: FeatureView, folder: Path) -> Scan:
    temporary = folder / "temporary"
    temporary.mkdir()
    return open_scan(view.rows, ["x"], folder, temporary)


@pytest.mark.parametrize(
    ("type", "column", "direct"),
    [
        (Int64, pa.array([1, None]), True),
        (Int64, pa.array([1, 2], pa.uint16()), True),
        (Int64, pa.array([1, 2], pa.uint32()), False),
        (Int64, pa.array([1, 2], pa.uint64()), False),
        (Int32, pa.array([1, 2**31 - 1], pa.int64()), True),
        (Float32, pa.array([0.1, -1e38], pa.float64()), True),
        (Float32, pa.array([0.1, float("inf")], pa.float64()), False),
        (Float32, pa.array([1, 2**24]), True),
        (String, pa.array(["a", None], pa.large_string()), True),
        (String, pa.array(["a", "b"]).dictionary_encode(), False),
        (Timestamp, array(Timestamp, [FIRST + 2, LAST - 1]), True),
        (Timestamp, array(Timestamp, [NOON, LAST]), False),
        (Timestamp, pa.array([1_000, 2_000]).cast(pa.timestamp("ns")), False),
        (Vector(2), pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)), True),
        (Vector(2), pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)), False),
        (Vector(2), pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64())), False),
    ],
)
def test_files_are_scanned_as_they_are_where_footers_prove_them(
    tmp_path: Path, type: Type, column: Any, direct: bool
) -> None:
    """A Parquet file is scanned itself exactly where its footer shows that any reader gives the declared values."""
    write(tmp_path, x=column)
    found = scan(view_of(type), tmp_path)
    assert (found.files == (tmp_path / "rows.parquet",)) == direct
    assert found.int64_times != direct


def test_a_value_out_of_range_is_refused_by_row(tmp_path: Path) -> None:
    """What the footer cannot allow is left to the reader, which names the file, the column and the row."""
    write(tmp_path, x=pa.array([1, 2**31]))
    with pytest.raises(SourceError, match=r"rows\.parquet: column 'x', row 1: expected int32, got 2147483648"):
        scan(view_of(Int32), tmp_path)


@pytest.mark.parametrize("name", ["user_id", "at"])
def test_a_row_without_key_or_time_is_refused(tmp_path: Path, name: str) -> None:
    """A null where every row must have a value is an error that names the file, the column and the row."""
    column = {"user_id": pa.array([1, None]), "at": array(Timestamp, [NOON, None])}[name]
    write(tmp_path, **{name: column})
    with pytest.raises(SourceError, match=rf"rows\.parquet: column '{name}', row 1: null"):
        scan(view_of(Int64), tmp_path)


def test_a_delay_beyond_time_is_refused(tmp_path: Path) -> None:
    """An event time that has no known-at within int64 is an error, not an overflow."""
    write(tmp_path, at=array(Timestamp, [NOON, LAST - 5]))
    with pytest.raises(SourceError, match=r"column 'at', row 1: .*out of range"):
        scan(view_of(Int64, timedelta(microseconds=6)), tmp_path)


def test_files_of_two_types_are_read_as_one(tmp_path: Path) -> None:
    """Files that hold a column in different types go through the reader, in the order of their names."""
    write(tmp_path, "rows1.parquet", x=pa.array([1, 2], pa.int32()))
    write(tmp_path, "rows0.parquet", x=pa.array([3, 4], pa.int64()))
    found = scan(view_of(Int64), tmp_path)
    assert found.int64_times
    assert pq.read_table(found.files[0]).column("x").to_pylist() == [3, 4, 1, 2]


@pytest.mark.parametrize("name", ["rows[1].parquet", "rows*.parquet", "rows_%41.parquet", "_rows.parquet"])
def test_names_that_an_engine_could_misread_are_not_given_to_it(tmp_path: Path, name: str) -> None:
    """A file whose name could be taken for a pattern, an encoded path or a hidden file goes through the reader."""
    write(tmp_path, name)
    assert scan(view_of(Int64, path="*rows*.parquet"), tmp_path).int64_times


@pytest.mark.parametrize("name", ["file_index", "User_ID", "_position"])
def test_columns_that_an_engine_could_confuse_go_through_the_reader(tmp_path: Path, name: str) -> None:
    """A file with a column that engines add themselves, or two that differ only in case, goes through the reader."""
    write(tmp_path, **{name: pa.array([7, 7])})
    assert scan(view_of(Int64), tmp_path).int64_times


def test_only_the_wanted_features_are_written(tmp_path: Path) -> None:
    """A feature that is not asked for is not in the temporary file, however much of it had to be read."""
    write(tmp_path, x=pa.array([1, 2]).cast(pa.uint64()), other=pa.array(["a", "b"]).dictionary_encode())
    source = ParquetSource("rows.parquet", event_time="at")
    view = FeatureView("v", USER, [Field("x", Int64), Field("other", String, allowed=["a", "b"])], source=source)
    assert pq.read_schema(scan(view, tmp_path).files[0]).names == ["user_id", "x", "_event_time", "_known_at"]


def test_csv_is_converted_with_its_times(tmp_path: Path) -> None:
    """CSV becomes a Parquet file of the declared types, with int64 times and the delay added."""
    (tmp_path / "rows.csv").write_text("user_id,at,x\n1,2023-11-14T22:13:20Z,NA\n2,2023-11-14 22:13:20.000001,5\n")
    source = CsvSource("rows.csv", event_time="at", delay=timedelta(microseconds=3))
    found = scan(FeatureView("v", USER, [Field("x", Int32)], source=source), tmp_path)
    assert pq.read_table(found.files[0]).to_pydict() == {
        "user_id": [1, 2],
        "x": [None, 5],
        "_event_time": [NOON, NOON + 1],
        "_known_at": [NOON + 3, NOON + 4],
    }
    assert found.delay_us == 0
