"""Reading batch sources: what the files hold, in order, or an error that names file, column and row."""

from __future__ import annotations

import csv
import gzip
import io
import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve.batch import EventBatch
from featserve.definitions import CsvSource, Entity, FeatureView, Field, ParquetSource, Rows, Source
from featserve.errors import SourceError
from featserve.sources import read_batches, source_files, source_rows
from featserve.types import (
    NEVER_US,
    Bool,
    Bytes,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    Timestamp,
    Type,
    Vector,
    from_us,
    to_us,
)

START = datetime(2024, 2, 29, 12, tzinfo=UTC)


def view(source: Source | None, features: dict[str, Type] | None = None, keys: dict[str, Type] | None = None) -> Rows:
    fields = [Field(name, type) for name, type in (features or {"a": Float64}).items()]
    return FeatureView("v", Entity("thing", keys or {"id": Int64}), fields, source=source).rows


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), path, **options)


def small(path: Path, ids: Iterable[int] = (1, 2, 3), **columns: Any) -> None:
    ids = list(ids)
    ts = pa.array([START + timedelta(seconds=i) for i in ids], pa.timestamp("us", "UTC"))
    parquet(path, {"id": pa.array(ids, pa.int64()), "ts": ts, "a": pa.array(map(float, ids), pa.float64())} | columns)


def rows(batches: Iterable[EventBatch]) -> list[dict[str, Any]]:
    """Return every row as Python values."""
    found = []
    for batch in batches:
        columns = {name: column.to_list() for name, column in batch.columns.items()}
        columns |= {"event": batch.event_time_us.tolist(), "known": batch.known_at_us.tolist()}
        columns |= {"sequence": batch.sequence.tolist()}
        found += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return found


def refused(wanted: Rows, root: Path) -> str:
    with pytest.raises(SourceError) as caught:
        list(read_batches(wanted, root))
    return str(caught.value)


EVERY: dict[str, Type] = {
    "flag": Bool,
    "small": Int32,
    "large": Int64,
    "single": Float32,
    "number": Float64,
    "name": String,
    "blob": Bytes,
    "at": Timestamp,
}
ARROW = {
    "id": pa.string(),
    "shard": pa.int32(),
    "ts": pa.timestamp("us", "UTC"),
    "seen": pa.timestamp("us"),
    "flag": pa.bool_(),
    "small": pa.int32(),
    "large": pa.int64(),
    "single": pa.float64(),
    "number": pa.float64(),
    "name": pa.string(),
    "blob": pa.binary(),
    "at": pa.timestamp("us", "UTC"),
}


def random_rows(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Return rows with every type that CSV can hold, nulls and awkward texts among them."""

    def text() -> str:
        return "".join(rng.choices("ab,;\"'\n é漢", k=rng.choice([0, 1, 2, 30])))

    def time() -> datetime | None:
        unit_us = rng.choice([1, 10**6, 86_400 * 10**6])
        return from_us(rng.randrange(0, 2 * 10**15) // unit_us * unit_us)

    made = [
        {
            "id": text(),
            "shard": rng.randrange(-(2**31), 2**31),
            "ts": time(),
            "seen": time(),
            "flag": rng.random() < 0.5,
            "small": rng.randrange(-(2**31), 2**31),
            "large": rng.randrange(-(2**63), 2**63),
            "single": rng.gauss(0, 1e3),
            "number": rng.choice([rng.gauss(0, 1), float("inf"), 0.1, 1e-300]),
            "name": rng.choice([text(), "NA", "null", ""]),
            "blob": text().encode(),
            "at": time(),
        }
        for _ in range(count)
    ]
    return [{k: None if k in EVERY and rng.random() < 0.2 else v for k, v in row.items()} for row in made]


def spelled(value: Any, rng: random.Random) -> str:
    """Return one CSV cell: text always quoted, times with, without or at another offset."""
    if value is None:
        return rng.choice(["", "NA", "null"])
    if isinstance(value, bytes | str):
        return '"' + (value.decode() if isinstance(value, bytes) else value).replace('"', '""') + '"'
    if isinstance(value, datetime):
        if value.time() == datetime.min.time() and rng.random() < 0.5:
            return str(value.date())
        east = rng.choice([0, 2, -5])
        local = (value.replace(tzinfo=None) + timedelta(hours=east)).isoformat(rng.choice("T "))
        return local + (rng.choice(["", "Z", "+00:00"]) if east == 0 else f"{east:+03d}{rng.choice(['', ':00', '00'])}")
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def same(first: Iterable[EventBatch], second: Iterable[EventBatch]) -> None:
    """Assert that two readings are identical to the byte: values, validity and times."""

    def joined(batches: Iterable[EventBatch], name: str) -> Any:
        return np.concatenate([batch.columns[name].values for batch in batches])

    first, second = list(first), list(second)
    assert first
    assert rows(first) == rows(second)
    for name, column in first[0].columns.items():
        if column.offsets is None:
            a, b = joined(first, name), joined(second, name)
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_csv_and_parquet_of_the_same_data_are_the_same_batches(tmp_path: Path, seed: int, name: str) -> None:
    """A CSV file, plain or gzip, and a Parquet file of the same rows give identical batches, and those rows."""
    rng = random.Random(f"{seed} {name}")
    data = random_rows(rng, 3_000)
    parquet(
        tmp_path / "rows.parquet",
        {k: pa.array([row[k] for row in data], t) for k, t in ARROW.items()},
        row_group_size=700,
    )
    order = rng.sample([*ARROW, "unused"], len(ARROW) + 1)
    lines = [";".join(order), *(";".join(spelled(row.get(k, 7), rng) for k in order) for row in data)]
    content = ("\r\n".join(lines) + rng.choice(["", "\n", "\n\n"])).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    keys = {"id": String, "shard": Int32}
    from_csv = view(CsvSource(name, event_time="ts", known_at="seen", delimiter=";"), EVERY, keys)
    from_parquet = view(ParquetSource("rows.parquet", event_time="ts", known_at="seen"), EVERY, keys)
    same(read_batches(from_csv, tmp_path, batch_rows=1_000), read_batches(from_parquet, tmp_path, batch_rows=999))
    found = rows(read_batches(from_csv, tmp_path))
    assert len(found) == len(data)
    for at, (got, row) in enumerate(zip(found, data, strict=True)):
        single = None if row["single"] is None else float(np.float32(row["single"]))
        times = {"event": to_us(row["ts"]), "known": to_us(row["seen"]), "sequence": at}
        expected = {k: v for k, v in row.items() if k not in ("ts", "seen")} | {"single": single} | times
        assert got == expected, at


def test_vectors_and_renamed_columns(tmp_path: Path) -> None:
    """Vectors come from any list of floats, and a feature may have another name in the file, or share a column."""
    small(tmp_path / "f.parquet", **{"Some Name.x": pa.array([[1.0, 2.0], None, [3.0, 4.0]])})
    source = ParquetSource("f.parquet", event_time="ts", columns={"v": "Some Name.x", "at": "ts", "b": "a"})
    found = rows(read_batches(view(source, {"v": Vector(2), "at": Timestamp, "a": Float64, "b": Float32}), tmp_path))
    assert [row["v"] for row in found] == [[1.0, 2.0], None, [3.0, 4.0]]
    assert [(row["a"], row["b"]) for row in found] == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    assert [to_us(row["at"]) for row in found] == [row["event"] for row in found]


def test_globs_read_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    """A glob's files come sorted, sequence counts on over them, and hidden files and folders are left out."""
    for name, ids in (("b/2.parquet", [7, 8]), ("a/9.parquet", [5]), ("b/10.parquet", [6]), ("b/empty.parquet", [])):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        small(tmp_path / "data" / name, ids)
    (tmp_path / "data/b/.half-written.parquet").write_bytes(b"")
    (tmp_path / "data/b/folder.parquet").mkdir()
    for pattern in (
        "data/*/*.parquet",
        "data/**/*.parquet",
        f"{tmp_path}/data/[ab]/*.parquet",
        "data/../data/*/*.parquet",
    ):
        wanted = view(ParquetSource(pattern, event_time="ts"))
        found = rows(read_batches(wanted, tmp_path, batch_rows=1))
        assert [(row["id"], row["sequence"]) for row in found] == [(5, 0), (6, 1), (7, 2), (8, 3)]
        assert source_rows(wanted, tmp_path) == 4
        assert len(source_files(wanted, tmp_path)) == 4


def test_a_name_with_glob_characters_is_a_file_first(tmp_path: Path) -> None:
    """A file that is called like a pattern is read, also below a root that looks like one."""
    root = tmp_path / "[1]*"
    root.mkdir()
    small(root / "x[0].parquet", [4])
    small(root / "y.parquet", [5])
    for path, expected in (("x[0].parquet", [4]), ("*.parquet", [4, 5])):
        found = rows(read_batches(view(ParquetSource(path, event_time="ts")), root))
        assert [row["id"] for row in found] == expected


def test_known_at_is_the_event_time_plus_the_delay(tmp_path: Path) -> None:
    """Without a known-at column a row is known its declared delay after its event time, by default at once."""
    small(tmp_path / "f.parquet")
    for delay in (timedelta(0), timedelta(minutes=10, microseconds=1)):
        for row in rows(read_batches(view(ParquetSource("f.parquet", event_time="ts", delay=delay)), tmp_path)):
            assert row["event"] == to_us(START + timedelta(seconds=row["id"]))
            assert row["known"] - row["event"] == delay // timedelta(microseconds=1)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    """Progress grows over the files of both formats, and ends at its total."""
    for i in range(3):
        small(tmp_path / f"{i}.parquet", range(100))
        (tmp_path / f"{i}.csv").write_text("id,ts,a\n" + "1,2024-01-01,2\n" * 50)
    for source in (ParquetSource("*.parquet", event_time="ts"), CsvSource("*.csv", event_time="ts")):
        calls: list[tuple[int, int]] = []
        follow = partial(lambda calls, done, total: calls.append((done, total)), calls)
        count = len(rows(read_batches(view(source), tmp_path, batch_rows=30, progress=follow)))
        assert calls == sorted(calls)
        assert calls[-1][0] == calls[-1][1] == (count if source.format == "parquet" else 3 * (8 + 50 * 15))
        assert len({total for _, total in calls}) == 1
    assert source_rows(view(CsvSource("*.csv", event_time="ts")), tmp_path) is None


def test_batches_stay_within_the_limit(tmp_path: Path) -> None:
    """No batch is longer than asked for, and none is empty."""
    small(tmp_path / "f.parquet", range(1_000))
    (tmp_path / "f.csv").write_text("id,ts,a\n" + "1,2024-01-01,2\n" * 1_000)
    for source in (ParquetSource("f.parquet", event_time="ts"), CsvSource("f.csv", event_time="ts")):
        lengths = [len(batch) for batch in read_batches(view(source), tmp_path, batch_rows=300)]
        assert max(lengths) <= 300
        assert min(lengths) > 0
        assert sum(lengths) == 1_000


def test_reading_may_stop_early(tmp_path: Path) -> None:
    """A reader that stops after the first batch leaves nothing behind that warns or hangs."""
    (tmp_path / "f.csv").write_text("id,ts,a\n" + "1,2024-01-01,2\n" * 1_500_000)
    for _ in range(5):
        batches = read_batches(view(CsvSource("f.csv", event_time="ts")), tmp_path)
        next(batches)
        del batches


def test_an_empty_source_has_no_batches(tmp_path: Path) -> None:
    """A Parquet file without rows, or a CSV file of a header alone, is a source of nothing; its types still count."""
    small(tmp_path / "f.parquet", [])
    for header in ("id,ts,a", "id,ts,a\n", "\ufeffid,ts,a\r\n\r\n"):
        (tmp_path / "f.csv").write_text(header, encoding="utf-8")
        assert list(read_batches(view(CsvSource("f.csv", event_time="ts")), tmp_path)) == []
    assert list(read_batches(view(ParquetSource("f.parquet", event_time="ts")), tmp_path)) == []
    message = refused(view(ParquetSource("f.parquet", event_time="ts"), {"a": Int64}), tmp_path)
    assert message.endswith("f.parquet: column 'a': expected int64, got double")


def test_quoted_null_spellings_are_text(tmp_path: Path) -> None:
    """Only an unquoted null spelling is null, and only those that the source declares."""
    (tmp_path / "f.csv").write_text(
        'id,ts,s\n1,2024-01-01,-\n2,2024-01-01,"-"\n3,2024-01-01,""\n4,2024-01-01,NA\n5,2024-01-01,\n'
    )
    found = rows(read_batches(view(CsvSource("f.csv", event_time="ts", nulls=["-"]), {"s": String}), tmp_path))
    assert [row["s"] for row in found] == [None, "-", "", "NA", ""]


def test_no_file(tmp_path: Path) -> None:
    """A path that matches nothing is shown in full with the nearest name; a folder and a view without source say so."""
    small(tmp_path / "weather.parquet")
    message = refused(view(ParquetSource("wether.parquet", event_time="ts")), tmp_path)
    assert message == f"source of v@1: no file matches {tmp_path}/wether.parquet; did you mean 'weather.parquet'?"
    assert f"no file matches {tmp_path}/no/*.csv" in refused(view(CsvSource("no/*.csv", event_time="ts")), tmp_path)
    (tmp_path / "data").mkdir()
    assert "is a folder; name its files, as in data/*.parquet" in refused(
        view(ParquetSource("data", event_time="ts")), tmp_path
    )
    assert "v@1 has no source" in refused(view(None), tmp_path)
    assert "d**a/x" in refused(view(ParquetSource("d**a/x", event_time="ts")), tmp_path)


def test_missing_columns(tmp_path: Path) -> None:
    """A column that a file lacks or holds twice is named with the file, the view and the nearest names."""
    small(tmp_path / "f.parquet", temperature=[1, 2, 3])
    (tmp_path / "f.csv").write_text("id,ts,a,temperature\n1,2024-01-01,1,2\n")
    for source in (ParquetSource("f.parquet", event_time="ts"), CsvSource("f.csv", event_time="ts")):
        message = refused(view(source, {"temprature": Float64}), tmp_path)
        file = tmp_path / f"f.{source.format}"
        assert message == f"{file}: no column 'temprature', which v@1 needs; did you mean 'temperature'?"
    for source in (ParquetSource("f.parquet", event_time="when"), CsvSource("f.csv", event_time="ts", known_at="when")):
        assert "no column 'when', which v@1 needs" in refused(view(source), tmp_path)
    (tmp_path / "twice.csv").write_text("id,ts,a,a\n1,2024-01-01,2,3\n")
    assert "2 columns named 'a'" in refused(view(CsvSource("twice.csv", event_time="ts")), tmp_path)
    twice = pa.table([pa.array([1]), pa.array([1.0]), pa.array([2.0])], names=["id", "a", "a"])
    pq.write_table(twice.append_column("ts", pa.array([START])), tmp_path / "twice.parquet")
    assert "2 columns named 'a'" in refused(view(ParquetSource("twice.parquet", event_time="ts")), tmp_path)


def test_every_file_of_a_glob_is_checked_first(tmp_path: Path) -> None:
    """A file of another schema is named before any row of the files before it is read."""
    small(tmp_path / "1.parquet")
    small(tmp_path / "2.parquet", a=["x", "y", "z"])
    with pytest.raises(SourceError, match=r"2\.parquet: column 'a': expected float64, got string"):
        read_batches(view(ParquetSource("*.parquet", event_time="ts")), tmp_path)
    small(tmp_path / "2.parquet", a=[1, 2, 3])
    assert len(rows(read_batches(view(ParquetSource("*.parquet", event_time="ts")), tmp_path))) == 6


def times(*values: int | None) -> Any:
    return pa.array(values, pa.timestamp("us", "UTC"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": pa.array([1, 2, None])}, "column 'id', row 2: null; every row has a value of key 'id'"),
        ({"ts": times(1, None, 3)}, "column 'ts', row 1: null; every row has an event time"),
        ({"seen": times(1, None, 3)}, "column 'seen', row 1: null; every row has a known-at"),
        ({"ts": pa.array([1, 2, 3])}, "column 'ts': expected timestamp, got int64 (a number has no unit"),
        ({"ts": pa.array([0, 1000, 1], pa.timestamp("ns"))}, "column 'ts', row 2: expected timestamp, got 1970-01-01T"),
        ({"a": pa.array([1, 2**31, 3])}, "column 'a', row 1: expected int32, got 2147483648 (out of range)"),
        ({"a": pa.array([1.0, 2.0, 3.0])}, "column 'a': expected int32, got double"),
        ({"id": pa.array(["1", "2", "3"])}, "column 'id': expected int64, got string"),
    ],
)
def test_rows_that_are_not_as_declared(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    """A null where none may be, or a value of another type, names the file, the column and the row in it."""
    good = {"id": pa.array([1, 2, 3]), "ts": times(1, 2, 3), "seen": times(1, 2, 3), "a": pa.array([1, 2, 3])}
    parquet(tmp_path / "1.parquet", good)
    parquet(tmp_path / "2.parquet", good | columns, row_group_size=1)
    wanted = view(ParquetSource("*.parquet", event_time="ts", known_at="seen"), {"a": Int32})
    assert f"{tmp_path}/2.parquet: {message}" in refused(wanted, tmp_path)


def test_times_at_the_end_of_time(tmp_path: Path) -> None:
    """An event time that the delay would carry past 64 bits, or that means no time at all, is refused."""
    for last, delay, ok in ((2**63 - 1, 0, True), (2**63 - 1, 1, False), (2**63 - 2, 1, True), (NEVER_US, 0, False)):
        parquet(tmp_path / "f.parquet", {"id": [1, 2], "ts": times(0, last), "a": [1.0, 2.0]})
        wanted = view(ParquetSource("f.parquet", event_time="ts", delay=timedelta(microseconds=delay)))
        if ok:
            assert rows(read_batches(wanted, tmp_path))[1]["known"] == last + delay
        else:
            assert f"column 'ts', row 1: {last} microseconds" in refused(wanted, tmp_path)


def test_damaged_parquet(tmp_path: Path) -> None:
    """A Parquet file that is foreign, empty, cut short or overwritten in the middle is named."""
    path = tmp_path / "f.parquet"
    small(path, range(5_000))
    whole = path.read_bytes()
    wanted = view(ParquetSource("f.parquet", event_time="ts"))
    for content in (
        b"",
        b"not parquet",
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:4] + b"\xff" * 3_000 + whole[3_004:],
    ):
        path.write_bytes(content)
        assert refused(wanted, tmp_path).startswith(f"{path}: cannot be read as Parquet")


CSV_HEAD = "id,ts,a,s\n1,2024-01-01T00:00:00Z,1,x\n2,2024-01-01,2,y\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3,2024-01-01,x,z\n", "column 'a', row 2: expected int32, got 'x'"),
        ("3,2024-01-01,1.5,z\n", "column 'a', row 2: expected int32, got '1.5'"),
        ("3,2024-01-01,3000000000,z\n", "column 'a', row 2: expected int32, got 3000000000 (out of range)"),
        ("3,2024-01-01,3\n", "row 2: Expected 4 columns, got 3"),
        ("3,2024-01-01,3,z,?\n", "row 2: Expected 4 columns, got 5"),
        (",2024-01-01,3,z\n", "column 'id', row 2: null"),
        ("3,,3,z\n", "column 'ts', row 2: null"),
        ("3,2024-01-01,3," + "z" * 9_000_000 + "\n", "a row is longer than 4 MiB"),
        ("3,2024-02-30,3,z\n", "column 'ts', row 2: expected timestamp, got '2024-02-30'"),
        ("3,2024-01-01T00:00:00.0000001Z,3,z\n", "column 'ts', row 2: expected timestamp"),
        ("3,01/02/2024,3,z\n", "column 'ts', row 2: expected timestamp, got '01/02/2024' (not an ISO 8601"),
        ('3,2024-01-01,3,"z\n', "row 2: a quoted value is not closed"),
        ('3,2024-01-01,3,"z\n' + "4,2024-01-01,4,z\n" * 800_000, "row 2: a quoted value is not closed"),
        (b"3,2024-01-01,3,\xff\n", "column 's', row 2: expected string, got invalid UTF8 data"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_malformed_csv_rows(tmp_path: Path, line: str | bytes, message: str, suffix: str) -> None:
    """A malformed row in the middle of a CSV file is named by its position, whatever stands after it."""
    tail = "" if '"z' in str(line) else "4,2024-01-01,4,z\n" * 5
    content = CSV_HEAD.encode() + (line.encode() if isinstance(line, str) else line) + tail.encode()
    path = tmp_path / f"f.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    wanted = view(CsvSource(path.name, event_time="ts"), {"a": Int32, "s": String})
    assert f"{path}: {message}" in refused(wanted, tmp_path)


def test_malformed_csv_row_far_into_the_file(tmp_path: Path) -> None:
    """The row is counted over the blocks that a large file is read in, blank lines left out."""
    lines = [f"{i},2024-01-01,{i},x" for i in range(400_000)]
    lines[-3] = "5,2024-01-01,oops,x"
    (tmp_path / "f.csv").write_text("id,ts,a,s\n\n" + "\n".join(lines) + "\n")
    message = refused(view(CsvSource("f.csv", event_time="ts"), {"a": Int64}), tmp_path)
    assert message.endswith("column 'a', row 399997: expected int64, got 'oops'")
    lines[-3] = "5,2024-01-01T25:00,5,x"
    (tmp_path / "f.csv").write_text("id,ts,a,s\n" + "\n".join(lines) + "\n")
    message = refused(view(CsvSource("f.csv", event_time="ts"), {"a": Int64}), tmp_path)
    assert "column 'ts', row 399997: expected timestamp, got '2024-01-01T25:00'" in message


def test_quotes_inside_of_unquoted_values_are_text(tmp_path: Path) -> None:
    """A quote that is not the first character of a value is part of it; an odd one does not make the file refused."""
    (tmp_path / "f.csv").write_text('id,ts,s\n1,2024-01-01,5" pipe\n2,2024-01-01,"two\nlines"\n')
    found = rows(read_batches(view(CsvSource("f.csv", event_time="ts"), {"s": String}), tmp_path))
    assert [row["s"] for row in found] == ['5" pipe', "two\nlines"]


def test_unreadable_csv(tmp_path: Path) -> None:
    """A CSV file without a header, a damaged or cut gzip, and a type that CSV cannot hold are named."""
    path = tmp_path / "f.csv"
    path.write_text("\n")
    wanted = view(CsvSource("f.csv", event_time="ts"))
    assert refused(wanted, tmp_path) == f"{path}: is empty; a CSV source has a header line"
    path.write_bytes(b"id,\xff\xff,ts\n")
    assert refused(wanted, tmp_path).startswith(f"{path}: no column 'a'")
    path.write_text('id,"ts\n')
    assert refused(wanted, tmp_path).startswith(f"{path}: its header line:")
    path.write_text("id,ts,a,v\n1,2024-01-01,2,[1]\n")
    message = refused(view(CsvSource("f.csv", event_time="ts"), {"v": Vector(1)}), tmp_path)
    assert "column 'v': CSV holds no vector[1]; use Parquet" in message
    both = CsvSource("f.csv", event_time="ts", columns={"b": "a"})
    assert "column 'a': read both as int64 and as bool" in refused(view(both, {"a": Int64, "b": Bool}), tmp_path)
    text = io.StringIO()
    csv.writer(text).writerows([["id", "ts", "a"], *([i, "2024-01-01", random.random()] for i in range(100_000))])
    packed = gzip.compress(text.getvalue().encode())
    wanted = view(CsvSource("f.csv.gz", event_time="ts"))
    for damaged in (packed[:-100], packed[:1_000], b"plain", packed[:5_000] + b"\0" * 100 + packed[5_100:]):
        (tmp_path / "f.csv.gz").write_bytes(damaged)
        assert refused(wanted, tmp_path).startswith(f"{path}.gz: cannot be read as CSV")
