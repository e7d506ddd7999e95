"""What ``materialize`` refuses of a source, a training frame refuses, in the same words; footers only save reading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve.arrow import column_to_arrow
from featserve.definitions import CsvSource, Entity, FeatureService, FeatureView, Field, ParquetSource
from featserve.errors import InvalidRequest, SourceError
from featserve.materialize import load
from featserve.offline import OfflineEngine
from featserve.offline.scan import open_scan
from featserve.plan import compile_view
from featserve.store.memory import MemoryStore
from featserve.training import training_frame
from featserve.types import Bool, Float32, Float64, Int32, Int64, String, Timestamp, Vector
from tests.offline.worlds import LAST, NOON, array
from tests.random_data import random_batch, random_entity, random_keys, random_view

USER = Entity("user", {"user_id": Int64})
NAN = float("nan")
PROVEN: list[tuple[Field, Any]] = [
    (Field("x", Int64, not_null=True), pa.array([1, 2])),
    (Field("x", Int32, min=-1, max=3), pa.array([-1, 3, None], pa.int64())),
    (Field("x", Float32, min=0.1), pa.array([0.1, 5e30], pa.float32())),
    (Field("x", Float32, max=0.1), pa.array([0.1, -5e30])),
    (Field("x", Float64, min=0), pa.array([-0.0, NAN, 1.0])),
    (Field("x", Float64, not_nan=True, max=2), pa.array([1, 2])),
    (Field("x", Timestamp, min=NOON), array(Timestamp, [NOON, LAST - 1])),
    (Field("x", String, not_null=True), pa.array(["", "a"])),
]
DOUBTFUL: list[tuple[Field, Any]] = [
    (Field("x", Int64, not_null=True), pa.array([1, None])),
    (Field("x", Int64, min=2), pa.array([2, 1])),
    (Field("x", Float32, max=0.1), pa.array([0.11])),
    (Field("x", Float64, not_nan=True), pa.array([1.0])),
    (Field("x", Float64, min=0), pa.array([NAN])),
    (Field("x", Bool, allowed=[True]), pa.array([True])),
    (Field("x", String, allowed=["a"]), pa.array(["a"])),
    (Field("x", Vector(1), not_nan=True), pa.array([[1.0]], pa.list_(pa.float32(), 1))),
    (Field("x", Int32), pa.array([1, 2**32 - 1], pa.uint32())),
]


def one_view(folder: Path, field: Field, values: Any) -> FeatureView:
    """Write rows of feature x, as they are, beside one that nothing is declared of, and return their view."""
    rows = {
        "user_id": pa.array(range(len(values))),
        "at": array(Timestamp, [NOON] * len(values)),
        "x": values,
        "free": pa.array([1.5] * len(values)),
    }
    pq.write_table(pa.table(rows), folder / "rows.parquet", compression="none", use_dictionary=False)
    features = [field, Field("free", Float64)]
    return FeatureView("v", USER, features, source=ParquetSource("rows.parquet", event_time="at"))


def overwrite_pages(path: Path) -> None:
    """Make every value of a file unreadable, and leave its footer."""
    first_footer_byte = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[-8:-4], "little")
    path.write_bytes(b"PAR1" + b"\xff" * (first_footer_byte - 4) + path.read_bytes()[first_footer_byte:])


@pytest.mark.parametrize(("field", "values", "proven"), [(*c, True) for c in PROVEN] + [(*c, False) for c in DOUBTFUL])
def test_rows_are_read_only_where_footers_prove_nothing(
    tmp_path: Path, field: Field, values: Any, proven: bool
) -> None:
    """A constraint that the statistics prove costs no reading; one that they cannot is looked up in the rows."""
    view = one_view(tmp_path, field, values)
    overwrite_pages(tmp_path / "rows.parquet")
    if proven:
        assert open_scan(view.rows, ["free"], tmp_path, tmp_path).files == (tmp_path / "rows.parquet",)
        return
    with pytest.raises(SourceError, match=r"rows\.parquet: cannot be read as Parquet"):
        open_scan(view.rows, ["free"], tmp_path, tmp_path)


def test_a_constraint_that_is_kept_is_no_reason_to_copy(tmp_path: Path) -> None:
    """Files whose constraints had to be looked up, and are kept, are scanned as they are."""
    view = one_view(tmp_path, Field("x", String, allowed=["a"]), pa.array(["a", None]))
    assert open_scan(view.rows, ["x"], tmp_path, tmp_path).files == (tmp_path / "rows.parquet",)


def refusal_of_load(view: FeatureView, root: Path) -> str | None:
    """Return what a load says of the source, None where it loads it; see that it stored nothing that it refused."""
    store = MemoryStore()
    try:
        load(store, compile_view(view), root, LAST)
    except SourceError as error:
        assert store.count(b"") == 0
        return str(error)
    return None


def refusal_of_scan(view: FeatureView, names: list[str], root: Path, folder: Path) -> str | None:
    try:
        open_scan(view.rows, names, root, folder)
    except SourceError as error:
        return str(error)
    return None


def write_source(rng: np.random.Generator, view: FeatureView, folder: Path) -> FeatureView:
    """Write random rows of ``view`` to one or two files, in types and under names that hide them at times."""
    other = {pa.int32(): pa.int64(), pa.float32(): pa.float64(), pa.string(): pa.dictionary(pa.int32(), pa.string())}
    wide = {f.name for f in view.features if rng.random() < 0.2}
    keys = random_keys(rng, view.entity, 3)
    for number in range(int(rng.integers(1, 3))):
        batch = random_batch(rng, view, keys, NOON, int(rng.integers(0, 6)), null_share=0.1)
        columns = {name: column_to_arrow(col) for name, col in batch.columns.items()}
        columns |= {n: c.cast(other.get(c.type, c.type)) for n, c in columns.items() if n in wide}
        columns |= {"at": array(Timestamp, batch.event_time_us.tolist())}
        columns |= {"known": array(Timestamp, batch.known_at_us.tolist())}
        pq.write_table(
            pa.table(columns),
            folder / f"{'rows' if rng.random() < 0.8 else '_rows'}{number}.parquet",
            row_group_size=int(rng.integers(1, 5)),
            write_statistics=bool(rng.random() < 0.8),
        )
    return replace(view, source=ParquetSource("*rows*.parquet", event_time="at", known_at="known"))


def test_what_a_load_refuses_a_frame_refuses(rng: np.random.Generator, tmp_path: Path) -> None:
    """Whichever features are wanted, random sources are refused exactly where a load refuses them, with its message."""
    refused = as_they_are = 0
    for i in range(400):
        folder = tmp_path / str(i)
        folder.mkdir()
        entity = random_entity(rng, "e")
        view = write_source(rng, random_view(rng, "v", entity, features=4, constraints=True), folder)
        wanted = [f.name for f in view.features if rng.random() < 0.5] or ["f0"]
        expected = refusal_of_load(view, folder)
        temporary = folder / "temporary"
        temporary.mkdir()
        assert refusal_of_scan(view, wanted, folder, temporary) == expected, view
        refused += expected is not None
        as_they_are += expected is None and not list(temporary.iterdir())
    assert 100 < refused < 350
    assert as_they_are > 15


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_a_frame_of_rows_that_break_a_constraint(engine: OfflineEngine, tmp_path: Path, format: str) -> None:
    """A row that could never be served is no training data: the frame is refused, though another feature is wanted."""
    count = 70_000
    rows = {
        "user_id": range(count),
        "at": ["2024-01-01"] * count,
        "x": [1.0] * (count - 1) + [-1.0],
        "y": [0.5] * count,
    }
    table = pa.table(rows)
    if format == "csv":
        pa.csv.write_csv(table, tmp_path / "rows.csv")
        source = CsvSource("rows.csv", event_time="at")
    else:
        pq.write_table(table.set_column(1, "at", table["at"].cast(pa.timestamp("us"))), tmp_path / "rows.parquet")
        source = ParquetSource("rows.parquet", event_time="at")
    view = FeatureView("v", USER, [Field("x", Float64, min=0), Field("y", Float64)], source=source)
    labels = {"user_id": [1], "when": pa.array([NOON], pa.timestamp("us"))}
    with pytest.raises(SourceError) as refused:
        training_frame(engine, FeatureService("s", [view["y"]]), labels, "when", root=tmp_path)
    assert str(refused.value) == f"rows.{format}: v@1: rows[69999].x: -1.0 is less than the min 0.0"
    assert str(refused.value) == refusal_of_load(view, tmp_path)


def test_a_label_that_no_request_could_ask_for(tmp_path: Path) -> None:
    """A key that is too long to be served is refused in labels as it is in a request."""
    view = FeatureView("v", Entity("e", {"k": String}), [Field("x", Int64)], source=ParquetSource("n", event_time="at"))
    labels = {"k": ["a", "x" * 4_097], "when": pa.array([NOON, NOON], pa.timestamp("us"))}
    with pytest.raises(InvalidRequest, match=r"keys\.k: row 1 is 4,097 bytes long; the most is 4,096"):
        training_frame(None, FeatureService("s", [view]), labels, "when", root=tmp_path)  # type: ignore[arg-type]
