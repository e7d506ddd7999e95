"""Training frames: labels of every kind in; the served vector's names, types and values out."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import featserve
from featserve.batch import EntityKeys
from featserve.definitions import FeatureService, FeatureView, Field, ParquetSource
from featserve.engine import read
from featserve.offline import OfflineEngine
from featserve.plan import compile_service
from featserve.store.memory import MemoryStore
from featserve.training import METADATA, training_frame
from featserve.types import Bool, Bytes, Float32, Float64, Int32, Int64, String, Timestamp, Type, Vector, column
from tests.serving import Project
from tests.training_world import ACTIVITY, EXPECTED, FEATURES, HOUR, LABELS, NOON, SERVICE, US, USER, frame_of, labels
from tests.transforms import HEAD, made

pytest_plugins = ["tests.joined"]

# What is joined


def test_each_label_gets_one_row_in_its_place(engine: OfflineEngine, root: Path) -> None:
    """Labels in any order, repeated, of nobody, or with a null key have one row each, with the values of their time."""
    frame = frame_of(engine, root, LABELS)
    assert frame.column_names == [*LABELS, *FEATURES]
    assert frame.select(FEATURES).to_pydict() == EXPECTED
    given = frame.select(list(LABELS)).to_pydict()
    assert given == LABELS | {"when": [t.replace(tzinfo=UTC) for t in LABELS["when"]]}


def test_event_times_and_statuses_say_why(engine: OfflineEngine, root: Path) -> None:
    """On request a frame has each view's event time, null where there is no row, and each feature's status."""
    frame = frame_of(engine, root, LABELS, event_times=True, statuses=True)
    added = ["activity.event_time", "weather.event_time", *(f"{name}.status" for name in FEATURES)]
    assert frame.column_names == [*LABELS, *FEATURES, *added]
    late = NOON + 10 * US
    assert frame["activity.event_time"].type == pa.timestamp("us", "UTC")
    assert frame["activity.event_time"].to_pylist() == [
        late, NOON, None, None, None, NOON, late, late, late, None, NOON
    ]  # fmt: skip
    p, n, f, e = "PRESENT", "NULL", "NOT_FOUND", "EXPIRED"
    assert frame["activity.clicks.status"].to_pylist() == [p, p, f, f, f, n, p, p, e, f, p]
    assert frame["activity.rate.status"].to_pylist() == [n, p, f, f, f, p, n, n, e, f, p]
    assert frame["ratio.out.status"].to_pylist() == [p, p, n, n, n, n, p, p, n, n, p]
    assert frame["age.hour.status"].to_pylist() == [p] * 11
    origin = json.loads(frame.schema.metadata[METADATA.encode()])
    assert (origin["service"], origin["hash"]) == (SERVICE.id, SERVICE.hash)
    assert origin["views"]["activity@1"] == {"PRESENT": 6, "NOT_FOUND": 4, "EXPIRED": 1}


def write_csv(path: Path, table: Any) -> None:
    """Write labels as a spreadsheet does: quoted where needed, times without an offset, nothing for a null."""
    rows = table.to_pylist()
    lines = [",".join(table.column_names)]
    for row in rows:
        cells = [
            "" if v is None else v.replace(tzinfo=None).isoformat(" ") if isinstance(v, datetime) else str(v)
            for v in row.values()
        ]
        lines.append(",".join(f'"{c}"' if "," in c else c for c in cells))
    path.write_text("\n".join(lines))


def as_parquet(table: Any, folder: Path) -> Any:
    pq.write_table(table, folder / "labels.parquet")
    return folder / "labels.parquet"


def as_csv(table: Any, folder: Path) -> Any:
    write_csv(folder / "labels.csv", table)
    return str(folder / "labels.csv")


def as_csv_with_offsets(table: Any, folder: Path) -> Any:
    pyarrow.csv.write_csv(table, folder / "labels.csv")
    return folder / "labels.csv"


def as_gzipped_csv(table: Any, folder: Path) -> Any:
    with pa.CompressedOutputStream(str(folder / "labels.csv.gz"), "gzip") as stream:
        pyarrow.csv.write_csv(table, stream)
    return folder / "labels.csv.gz"


FEATURE_SCHEMA = pa.schema(
    zip(FEATURES, [pa.int64(), pa.float64(), pa.string(), pa.float64(), pa.float64(), pa.int64()], strict=True)
)
KINDS: dict[str, Callable[[Any, Path], Any]] = {
    "arrow": lambda table, folder: table,
    "arrow in chunks": lambda table, folder: pa.concat_tables([table.slice(0, 4), table.slice(4, 0), table.slice(4)]),
    "pandas": lambda table, folder: table.to_pandas(),
    "pandas of arrow types": lambda table, folder: table.to_pandas(types_mapper=pandas.ArrowDtype),
    "pandas with an index": lambda table, folder: table.to_pandas().set_index(np.arange(len(table))[::-1]),
    "polars": lambda table, folder: polars.from_arrow(table),
    "a mapping of lists": lambda table, folder: table.to_pydict(),
    "a mapping of arrays": lambda table, folder: {
        n: table[n].to_numpy(zero_copy_only=False) for n in table.column_names
    },
    "parquet": as_parquet,
    "csv": as_csv,
    "csv with offsets": as_csv_with_offsets,
    "gzipped csv": as_gzipped_csv,
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_kind_give_one_frame(kind: str, engine: OfflineEngine, root: Path, tmp_path: Path) -> None:
    """Frames of any library, mappings and files of one content give the same features, types and all."""
    table, expected = pa.table(LABELS), pa.table(EXPECTED, schema=FEATURE_SCHEMA)
    if kind.startswith(("pandas", "a mapping of arrays")):  # pandas makes integers beside a null floats
        keep = [i for i, user in enumerate(LABELS["user_id"]) if user is not None]
        table, expected = table.take(keep), expected.take(keep)
    found = frame_of(engine, root, KINDS[kind](table, tmp_path))
    assert found.select(FEATURES).replace_schema_metadata().equals(expected)
    assert found.column_names == [*LABELS, *FEATURES]
    assert found["late"].to_pylist() == table["late"].to_pylist() or "csv" in kind


@pytest.mark.parametrize(
    "times",
    [
        pa.array([NOON.replace(tzinfo=None)], pa.timestamp("us")),
        pa.array([NOON], pa.timestamp("us", "Asia/Kathmandu")),
        pa.array([NOON], pa.timestamp("us", "-08:00")),
        pa.array([NOON], pa.timestamp("ns", "UTC")),
        pa.array([NOON], pa.timestamp("ms", "America/New_York")),
        pa.array([NOON], pa.timestamp("s")),
        [NOON.astimezone(timezone(timedelta(hours=5, minutes=45)))],
        np.array(["2024-03-10T12:00:00"], "M8[s]"),
        np.array(["2024-03-10T12:00:00.000000000"], "M8[ns]"),
        pandas.Series([pandas.Timestamp(NOON).tz_convert("Europe/Berlin")]),
        polars.Series([NOON]).dt.convert_time_zone("Asia/Tokyo"),
    ],
    ids=str,
)
def test_an_instant_is_the_same_in_every_zone_and_unit(times: Any, engine: OfflineEngine, root: Path) -> None:
    """Times of any zone and unit are instants; without a zone they are UTC."""
    times = pa.array(times.to_arrow() if isinstance(times, polars.Series) else times)
    service = FeatureService("s", [ACTIVITY["clicks"]])
    frame = frame_of(engine, root, pa.table({"user_id": [1], "when": times}), service, event_times=True)
    assert frame["activity.clicks"].to_pylist() == [10]
    assert frame["activity.event_time"].to_pylist() == [NOON]


def test_a_date_is_its_midnight(engine: OfflineEngine, root: Path) -> None:
    """A column of dates means the start of each day, UTC."""
    given = labels((1, NOON, 1.0), (1, NOON, 1.0)) | {"when": [date(2024, 3, 10), date(2024, 3, 11)]}
    frame = frame_of(engine, root, given, statuses=True)
    assert frame["activity.clicks.status"].to_pylist() == ["NOT_FOUND", "EXPIRED"]


def test_no_labels_give_no_rows(engine: OfflineEngine, root: Path) -> None:
    """An empty label frame has a frame of no rows, with all columns and types."""
    some = frame_of(engine, root, LABELS, event_times=True, statuses=True)
    none = frame_of(engine, root, pa.table(LABELS).slice(0, 0), event_times=True, statuses=True)
    assert none.num_rows == 0
    assert none.schema.equals(some.schema)


def test_five_views_are_five_joins_of_one_view(engine: OfflineEngine, root: Path) -> None:
    """A service of several views has of each what a service of that view alone has."""
    views = [
        FeatureView(f"v{i}", USER, ACTIVITY.features, ttl=i * HOUR or None, source=ACTIVITY.source) for i in range(5)
    ]
    together = frame_of(engine, root, LABELS, FeatureService("all", views), statuses=True)
    for view in views:
        alone = frame_of(engine, root, LABELS, FeatureService("one", [view]), statuses=True)
        names = [name for name in alone.column_names if name.startswith(view.name)]
        assert together.select(names).equals(alone.select(names))


# The schema that is served

TYPES: dict[str, Type] = {
    "b": Bool, "i": Int32, "l": Int64, "f": Float32, "d": Float64, "s": String, "r": Bytes, "t": Timestamp,
    "v": Vector(3),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [Float32, Float64], ids=str)
def test_a_frame_has_the_schema_of_the_served_vector(dtype: Type, engine: OfflineEngine, tmp_path: Path) -> None:
    """Names, order and types of the features, of transforms too, are those of the answer's own Arrow table."""
    fields = [Field(name, type) for name, type in TYPES.items()]
    view = FeatureView("v", USER, fields, source=ParquetSource("v.parquet", event_time="at"))
    copies = [
        made(f"def copy_{f.name}({f.name}):\n    return {f.name}", {f.name: view[f.name]}, [Field("out", f.type)])
        for f in fields
    ]
    service = FeatureService("s", [*copies, view["t", "s", "v"], view["d", "b", "i", "r", "f", "l"]], dtype=dtype)
    values: dict[str, Any] = {
        "b": [True], "i": pa.array([1], pa.int32()), "l": [2], "f": pa.array([0.1], pa.float32()), "d": [0.1],
        "s": ["a"], "r": [b"\xff"], "t": [NOON], "v": pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3)),
    }  # fmt: skip
    pq.write_table(pa.table({"user_id": [1], "at": [NOON], **values}), tmp_path / "v.parquet")
    frame = training_frame(engine, service, {"user_id": [1, 2], "when": [NOON, NOON]}, "when", root=tmp_path)
    keys = EntityKeys.of({"user_id": column(Int64, [1, 2])}, service.keys)
    served = read(MemoryStore(), compile_service(service), keys, 0).to_arrow()
    names = [name for name, _, _ in service.fields]
    assert frame.select(names).schema.remove_metadata() == served.schema
    row = frame.slice(0, 1).to_pydict()
    assert row["v.d"] == row["copy_d.out"] == [0.1 if dtype is Float64 else float(np.float32(0.1))]
    assert [row[f"copy_{n}.out"] for n in TYPES] == [row[f"v.{n}"] for n in TYPES]
    assert all(frame[name][1].as_py() is None for name in names)


# An open project


def test_an_open_project_joins_and_writes_nothing(tmp_path: Path, root: Path) -> None:
    """``featserve.open(path).training_frame`` reads sources beside the project, and leaves its folder as it was."""
    for file in root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    body = f"""{HEAD}
view = FeatureView(
    "activity", user, [Field("clicks", Int64)], source=featserve.ParquetSource("activity.parquet", event_time="at"),
)
service = FeatureService("s", [view])
""".replace("import numpy as np", "import numpy as np\nimport featserve")
    project = Project.make(tmp_path, body)
    with featserve.open(tmp_path, write=True):
        pass
    labels_file = tmp_path / "labels.parquet"
    pq.write_table(pa.table({"user_id": [2, 1], "when": [NOON, NOON]}), labels_file)
    before = sorted(tmp_path.rglob("*"))
    steps: list[tuple[int, int]] = []
    with featserve.open(project.folder) as opened:
        frame = opened.training_frame(
            "s@1", labels_file, time="when", progress=lambda what, done, total: steps.append((done, total))
        )
        with pytest.raises(featserve.FeatserveError, match="unknown feature service 't'"):
            opened.training_frame("t", labels_file, time="when")
    assert frame["activity.clicks"].to_pylist() == [None, 10]
    assert sorted(tmp_path.rglob("*")) == before
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1]
