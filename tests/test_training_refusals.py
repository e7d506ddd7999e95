"""What a training frame is refused for: labels, label files, sources and transforms that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve.definitions import FeatureService, FeatureView, Field, RequestColumn
from featserve.errors import FeatserveError, InvalidRequest, SourceError, TransformError
from featserve.offline import OfflineEngine
from featserve.types import Float32, Float64, Int64, Vector
from tests.training_world import ACTIVITY, LABELS, NOON, USER, frame_of, labels
from tests.transforms import made

pytest_plugins = ["tests.joined"]

BAD_LABELS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no key column": (lambda d: without(d, "user_id"), r"missing column 'user_id'"),
    "a misspelt key column": (
        lambda d: without(d, "user_id") | {"userid": d["user_id"]},
        r"missing column 'user_id'; did you mean 'userid'\?",
    ),
    "no time column": (lambda d: without(d, "when"), "missing column 'when'"),
    "no request column": (lambda d: without(d, "amount"), "missing column 'amount'"),
    "several missing": (lambda d: {"user_id": d["user_id"]}, "missing column 'country'.*missing column 'when'"),
    "keys of another type": (
        lambda d: d | {"user_id": ["1"] * 2},
        r"labels\.user_id: expected int64, got string",
    ),
    "keys that are no integers": (
        lambda d: d | {"user_id": [1.0, 2.5]},
        r"labels\.user_id: expected int64, got double",
    ),
    "text of numbers": (lambda d: d | {"zip": [1, 2]}, r"labels\.zip: expected string, got int64"),
    "a request column of another type": (
        lambda d: d | {"amount": ["1", "2"]},
        r"labels\.amount: expected float64, got string",
    ),
    "times that are text": (
        lambda d: d | {"when": ["2024-03-10", "2024-03-11"]},
        r"labels\.when: expected timestamp, got string",
    ),
    "times that are numbers": (
        lambda d: d | {"when": [1710072000, 1710072000]},
        r"labels\.when: expected timestamp, got int64 \(a number has no unit",
    ),
    "a null time": (lambda d: d | {"when": [NOON, None]}, r"labels\.when: row 1 is null; every label has a time"),
    "times finer than a microsecond": (
        lambda d: d | {"when": np.array([0, 1_001], "M8[ns]")},
        r"labels\.when, row 1: expected timestamp.*finer than a microsecond",
    ),
    "columns of different lengths": (lambda d: d | {"amount": [1.0]}, "labels: cannot be taken as columns"),
    "a column of mixed types": (lambda d: d | {"note": [1, "a"]}, "labels: cannot be taken as columns"),
    "a pandas column of mixed types": (
        lambda d: pandas.DataFrame(d | {"user_id": pandas.Series([1, "a"], dtype=object)}),
        "labels: cannot be taken as columns.*user_id",
    ),
    "a column that stands twice": (
        lambda d: pa.table([*pa.table(d).columns, pa.array([1, 2])], [*d, "amount"]),
        "labels: column 'amount' stands 2 times",
    ),
    "a column of a feature's name": (
        lambda d: d | {"ratio.out": [1.0, 2.0]},
        "the labels have a column of the name 'ratio.out', which is to be added; rename it",
    ),
    "a column of a status' name": (
        lambda d: d | {"ratio.out.status": [1, 2]},
        "a column of the name 'ratio.out.status'",
    ),
    "a column of an event time's name": (lambda d: d | {"weather.event_time": [1, 2]}, "'weather.event_time'"),
    "no frame at all": (lambda d: 5, "labels: expected a pyarrow Table, a DataFrame or a file, got int"),
    "a list of rows": (lambda d: [d], "expected a pyarrow Table, a DataFrame or a file, got list"),
}


def without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {n: values for n, values in given.items() if n != name}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_do_not_fit_are_refused(kind: str, engine: OfflineEngine, root: Path) -> None:
    """Each thing that can be wrong with labels is an InvalidRequest that names the column, before any join."""
    change, message = BAD_LABELS[kind]
    given = change(labels((1, NOON, 1.0), (2, NOON, 1.0)))
    steps: list[str] = []
    with pytest.raises(InvalidRequest, match=message) as refused:
        frame_of(engine, root, given, event_times=True, statuses=True, progress=lambda what, *_: steps.append(what))
    assert refused.value.violations
    assert steps == []


def test_an_event_time_may_not_hide_a_feature(engine: OfflineEngine, root: Path) -> None:
    """A view with a feature called event_time cannot have event times added, and says so."""
    view = FeatureView("v", USER, [Field("event_time", Int64)], source=ACTIVITY.source)
    with pytest.raises(InvalidRequest, match=r"the service has a column of the name 'v\.event_time'"):
        frame_of(engine, root, LABELS, FeatureService("s", [view]), event_times=True)


BAD_FILES: dict[str, tuple[str, bytes | None, type[FeatserveError], str]] = {
    "that is not there": ("labels.parquet", None, SourceError, "labels.parquet: there is no such file"),
    "of another format": ("labels.json", b"{}", SourceError, r"a label file is \.parquet, \.csv or \.csv\.gz"),
    "that is no Parquet": ("labels.parquet", b"PAR1 or not", SourceError, r"labels\.parquet: cannot be read: "),
    "that is empty": ("labels.csv", b"", SourceError, r"labels\.csv: cannot be read: .*[Ee]mpty"),
    "that is no gzip": ("labels.csv.gz", b"user_id\n", SourceError, r"labels\.csv\.gz: cannot be read: "),
    "with a row too short": ("labels.csv", b"a,b\n1,2\n3\n", SourceError, "Row #3: Expected 2 columns, got 1"),
    "with a word for a number": (
        "labels.csv",
        b"user_id,when,amount,country,zip\n1,2024-03-10,1.0,de,1\nx,2024-03-10,1.0,de,1\n",
        SourceError,
        r"Row #3: CSV conversion error to int64: invalid value 'x'",
    ),
    "with a word for a time": (
        "labels.csv",
        b"user_id,when,amount,country,zip\n1,2024-03-10,1.0,de,1\n1,noon,1.0,de,1\n",
        InvalidRequest,
        r"labels\.when, row 1: expected timestamp, got 'noon' \(not an ISO 8601 time\)",
    ),
    "without the time column": ("labels.csv", b"user_id,amount,country,zip\n1,1.0,de,1\n", InvalidRequest, "'when'"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_label_file_that_does_not_fit_is_refused(
    kind: str, engine: OfflineEngine, root: Path, tmp_path: Path
) -> None:
    """A label file that is missing, damaged or of other content is an error that names it."""
    name, content, error, message = BAD_FILES[kind]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        frame_of(engine, root, tmp_path / name)


def test_csv_holds_no_vectors(engine: OfflineEngine, root: Path, tmp_path: Path) -> None:
    """A service that takes a vector from the labels needs them in another format, and says so."""
    norm = made(
        "def norm(v):\n    return np.linalg.norm(v, axis=1)",
        {"v": RequestColumn("v", Vector(2))},
        [Field("o", Float32)],
    )
    service = FeatureService("s", [ACTIVITY, norm])
    (tmp_path / "labels.csv").write_text("user_id,when,v\n1,2024-03-10,\n")
    with pytest.raises(SourceError, match=r"column 'v': CSV holds no vector\[2\]; use Parquet"):
        frame_of(engine, root, tmp_path / "labels.csv", service)
    given = {"user_id": [1, 1], "when": [NOON] * 2, "v": [[3.0, 4.0], None]}
    assert frame_of(engine, root, given, service)["norm.o"].to_pylist() == [5.0, None]


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage(path: Path) -> None:
    """Overwrite the first values in a file whose footer is whole."""
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(bytes(data))


def retyped(path: Path, name: str, type: Any) -> Any:
    table = pq.read_table(path)
    return table.set_column(table.column_names.index(name), name, table[name].cast(type))


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "moved": (lambda path: path.unlink(), r"no file matches .*activity\.parquet"),
    "unreadable": (
        lambda path: path.write_bytes(b"PAR1" + bytes(100)),
        r"activity\.parquet: cannot be read as Parquet",
    ),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-20]), r"activity\.parquet: cannot be read"),
    "a folder": (replace_by_folder, r"activity\.parquet is a folder"),
    "without a column": (
        lambda path: pq.write_table(pq.read_table(path).drop_columns("clicks"), path),
        r"activity\.parquet: no column 'clicks', which activity@1 needs",
    ),
    "without its time": (
        lambda path: pq.write_table(pq.read_table(path).drop_columns("at"), path),
        r"activity\.parquet: no column 'at'",
    ),
    "of another type": (
        lambda path: pq.write_table(retyped(path, "clicks", pa.string()), path),
        r"column 'clicks'.*expected int64, got string",
    ),
    "with a null time": (
        lambda path: pq.write_table(
            pq.read_table(path).set_column(4, "at", pa.array([NOON, None, NOON, NOON], pa.timestamp("us", "UTC"))), path
        ),
        r"column 'at', row 1: null; every row has an event time",
    ),
    "damaged inside": (damage, r"activity\.parquet"),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_source_that_changed_is_refused(kind: str, engine: OfflineEngine, root: Path, tmp_path: Path) -> None:
    """A source file that moved, changed or broke since it was declared is a SourceError that names it."""
    for file in root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change, message = BAD_SOURCES[kind]
    change(tmp_path / "activity.parquet")
    with pytest.raises(SourceError, match=message):
        frame_of(engine, tmp_path, LABELS)


def test_a_view_that_is_only_written_online_has_no_frame(engine: OfflineEngine, root: Path) -> None:
    """Without a source there is no history to join, which is an error and not a frame of nulls."""
    view = FeatureView("live", USER, [Field("x", Float64)])
    with pytest.raises(SourceError, match="live@1 has no source to read: its rows are only written online"):
        frame_of(engine, root, LABELS, FeatureService("s", [view]))


def test_a_transform_that_fails_is_named(engine: OfflineEngine, root: Path) -> None:
    """What a function raises over labels is the error that it is online."""
    bad = made(
        "def bad(amount):\n    raise KeyError('rate')",
        {"amount": RequestColumn("amount", Float64)},
        [Field("o", Float64)],
    )
    with pytest.raises(TransformError, match="transform bad@1 failed: KeyError: 'rate'"):
        frame_of(engine, root, LABELS, FeatureService("s", [ACTIVITY, bad]))
