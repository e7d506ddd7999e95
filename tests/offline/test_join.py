"""The contract of every offline engine: the value at T, against a naive join that looks at every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve.definitions import Entity, FeatureView, Field, ParquetSource, Selection
from featserve.errors import SourceError
from featserve.matrix import Status
from featserve.offline import OfflineEngine
from featserve.offline.join import JoinedView, join
from featserve.types import NEVER_US, Float64, Int64, String, Timestamp
from tests.offline.worlds import FIRST, LAST, NOON, World, array, exact, make_world, naive

USER = Entity("user", {"user_id": Int64})


def joined(engine: OfflineEngine, world: World) -> list[JoinedView]:
    return list(join(engine, world.labels, np.array(world.time_us, np.int64), world.selections, root=world.root))


def values(column: Any) -> list[Any]:
    """Return the Python values of a column, instants as microseconds."""
    if pa.types.is_timestamp(column.type):
        column = pa.chunked_array([chunk.view(pa.int64()) for chunk in column.chunks], pa.int64())
    return list(column.to_pylist())


def differences(world: World, answers: list[JoinedView]) -> tuple[int, list[str]]:
    """Return how many cells were compared with the naive join, and which of them differ."""
    cells = 0
    found: list[str] = []
    for view, answer in zip(world.views, answers, strict=True):
        assert answer.view == view
        columns = {name: values(column) for name, column in answer.columns.items()}
        assert all(len(column) == len(world.time_us) for column in columns.values())
        for label in range(len(world.time_us)):
            status, event_time_us, row = naive(world, view, label)
            expected = (status, NEVER_US if event_time_us is None else event_time_us)
            got = (Status(answer.status[label]).name, int(answer.event_time_us[label]))
            if got != expected:
                found.append(f"{view.id}, label {label}: {got}, expected {expected}")
            for name, value in row.items():
                cells += 1
                if exact(columns[name][label]) != exact(value):
                    found.append(f"{view.id}.{name}, label {label}: {columns[name][label]!r}, expected {value!r}")
    return cells, found


def test_random_worlds(duckdb_engine: OfflineEngine, rng: np.random.Generator, tmp_path: Path) -> None:
    """Every cell of a few random worlds, with all types, formats and statuses, is the naive join's."""
    statuses: Counter[int] = Counter()
    for number in range(4):
        root = tmp_path / str(number)
        root.mkdir()
        world = make_world(rng, root)
        answers = joined(duckdb_engine, world)
        _, found = differences(world, answers)
        assert not found, found[:10]
        for answer in answers:
            statuses.update(answer.status.tolist())
    assert set(statuses) == {Status.PRESENT, Status.NOT_FOUND, Status.EXPIRED}


@pytest.mark.slow
def test_very_many_cells(
    engine: OfflineEngine, request: pytest.FixtureRequest, rng: np.random.Generator, tmp_path: Path
) -> None:
    """A million random cells on DuckDB, a fifth of that on Spark, and not one differs from the naive join's."""
    # A small join takes Spark seconds, however few its labels are.
    spark = request.node.callspec.params["engine"] == "spark"
    labels, enough = (20_000, 200_000) if spark else (4_000, 1_000_000)
    cells = 0
    number = 0
    while cells < enough:
        root = tmp_path / str(number)
        root.mkdir()
        world = make_world(rng, root, views=5, rows=150, labels=labels)
        more, found = differences(world, joined(engine, world))
        assert not found, found[:10]
        cells += more
        number += 1


def one_view(
    folder: Path, rows: Sequence[tuple[int, int, int, float | None]], ttl_us: int | None = None, files: int = 1
) -> FeatureView:
    """Write rows of (user, event time, known-at, value) in order, and return their view."""
    per_file = -(-len(rows) // files)
    for number in range(files):
        part = rows[number * per_file : (number + 1) * per_file]
        users, event_times, known_ats, numbers = zip(*part, strict=True) if part else ((), (), (), ())
        table = pa.table(
            {
                "user_id": array(Int64, users),
                "event_time": array(Timestamp, event_times),
                "known_at": array(Timestamp, known_ats),
                "value": array(Float64, numbers),
            }
        )
        pq.write_table(table, folder / f"rows {number:03}.parquet")
    source = ParquetSource("rows *.parquet", event_time="event_time", known_at="known_at")
    ttl = None if ttl_us is None else timedelta(microseconds=ttl_us)
    return FeatureView("rows", USER, [Field("value", Float64)], ttl=ttl, source=source)


def ask(
    engine: OfflineEngine, view: FeatureView, folder: Path, labels: Sequence[tuple[int | None, int]]
) -> list[tuple[str, float | None]]:
    """Return the status and value that each label of (user, time) sees."""
    keys = pa.table({"user_id": array(Int64, [user for user, _ in labels])})
    times = np.array([time for _, time in labels], np.int64)
    [answer] = join(engine, keys, times, [Selection(view, ("value",))], root=folder)
    names = [Status(status).name for status in answer.status]
    return list(zip(names, answer.columns["value"].to_pylist(), strict=True))


def test_an_older_row_wins_while_the_newest_is_unknown(engine: OfflineEngine, tmp_path: Path) -> None:
    """A row that has happened and is not known yet is not seen; the one before it is."""
    view = one_view(
        tmp_path, [(1, NOON, NOON + 1, 1.0), (1, NOON + 10, NOON + 100, 2.0), (1, NOON + 20, NOON + 30, 3.0)]
    )
    seen = ask(engine, view, tmp_path, [(1, NOON + at) for at in (0, 1, 10, 29, 30, 100)])
    assert seen == [("NOT_FOUND", None), *[("PRESENT", 1.0)] * 3, ("PRESENT", 3.0), ("PRESENT", 3.0)]


def test_ties_go_to_the_later_known_then_to_the_later_in_the_source(engine: OfflineEngine, tmp_path: Path) -> None:
    """Of rows with one event time the last known wins, then the last in the files; its null is not filled."""
    rows = [(1, NOON, NOON + 5, 1.0), (1, NOON, NOON + 2, 2.0), (1, NOON, NOON + 2, 3.0), (1, NOON, NOON - 9, 4.0)]
    last = [(1, NOON, NOON + 5, 5.0), (1, NOON, NOON + 7, 6.0), (1, NOON, NOON + 7, None)]
    view = one_view(tmp_path, [*rows, *last], files=3)
    seen = ask(engine, view, tmp_path, [(1, NOON + at) for at in (-1, 0, 1, 2, 5, 7)])
    assert [value for _, value in seen] == [None, 4.0, 4.0, 3.0, 5.0, None]
    assert [status for status, _ in seen] == ["NOT_FOUND"] + ["PRESENT"] * 5


def test_many_files_keep_their_order(engine: OfflineEngine, tmp_path: Path) -> None:
    """Position in the source is by file, then by row, whatever the files' sizes and how many read them."""
    view = one_view(tmp_path, [(i % 7, NOON, NOON, float(i)) for i in range(300)], files=12)
    assert [value for _, value in ask(engine, view, tmp_path, [(i, NOON) for i in range(7)])] == [
        float(max(i for i in range(300) if i % 7 == user)) for user in range(7)
    ]


def test_both_ends_of_a_ttl_are_closed(engine: OfflineEngine, tmp_path: Path) -> None:
    """A row counts from its own microsecond to exactly its ttl later, and then is expired, not missing."""
    view = one_view(tmp_path, [(1, NOON, NOON, 1.0)], ttl_us=10)
    seen = ask(engine, view, tmp_path, [(1, NOON + at) for at in (-1, 0, 10, 11)])
    assert [status for status, _ in seen] == ["NOT_FOUND", "PRESENT", "PRESENT", "EXPIRED"]


def test_an_expired_newest_row_hides_older_ones(engine: OfflineEngine, tmp_path: Path) -> None:
    """The newest row that is known decides, though an older one was known later."""
    view = one_view(tmp_path, [(1, NOON, NOON, 1.0), (1, NOON - 5, NOON + 9, 2.0)], ttl_us=3)
    assert ask(engine, view, tmp_path, [(1, NOON + 3), (1, NOON + 9)]) == [("PRESENT", 1.0), ("EXPIRED", None)]


@pytest.mark.parametrize("ttl_us", [1, 2**62, 2**63 - 2, 2**63 - 1, None])
def test_the_ends_of_time(duckdb_engine: OfflineEngine, tmp_path: Path, ttl_us: int | None) -> None:
    """The first and the last instant of int64 are instants like others: no age and no ttl overflows."""
    view = one_view(tmp_path, [(1, FIRST, FIRST, 1.0), (2, LAST, FIRST, 2.0), (3, FIRST, LAST, 3.0)], ttl_us)
    labels = [(user, time) for user in (1, 2, 3) for time in (FIRST, FIRST + 1, 0, LAST - 1, LAST)]
    rows = {1: (FIRST, FIRST), 2: (LAST, FIRST), 3: (FIRST, LAST)}
    expected = [
        "NOT_FOUND"
        if max(rows[user]) > time
        else "PRESENT"
        if ttl_us is None or time - rows[user][0] <= ttl_us
        else "EXPIRED"
        for user, time in labels
    ]
    assert [status for status, _ in ask(duckdb_engine, view, tmp_path, labels)] == expected


def test_null_keys_and_repeated_labels(engine: OfflineEngine, tmp_path: Path) -> None:
    """A label with a null key sees nothing, and each of equal labels gets its own row, in the labels' order."""
    view = one_view(tmp_path, [(1, NOON, NOON, 1.0), (2, NOON, NOON, 2.0)])
    labels = [(2, NOON), (None, NOON), (1, NOON), (2, NOON), (3, NOON), (2, NOON)]
    assert [value for _, value in ask(engine, view, tmp_path, labels)] == [2.0, None, 1.0, 2.0, None, 2.0]


def test_no_labels_and_no_rows(engine: OfflineEngine, tmp_path: Path) -> None:
    """No labels give no rows, and a source without rows gives missing ones."""
    view = one_view(tmp_path, [])
    assert ask(engine, view, tmp_path, []) == []
    assert ask(engine, view, tmp_path, [(1, NOON), (None, NOON)]) == [("NOT_FOUND", None)] * 2


def test_one_event_time_for_everything(engine: OfflineEngine, tmp_path: Path) -> None:
    """Many rows and labels of one entity and one event time do not multiply: each label finds the last one known."""
    rows = [(1, NOON, NOON + i // 2, float(i)) for i in range(20_000)]
    labels = [(1, NOON + i) for i in range(10_000)]
    seen = ask(engine, one_view(tmp_path, rows), tmp_path, labels)
    assert seen == [("PRESENT", float(2 * i + 1)) for i in range(10_000)]


def test_a_source_that_damage_shows_only_while_read(engine: OfflineEngine, tmp_path: Path) -> None:
    """A file whose footer is sound and whose pages are not is an error that names the source, and nothing else."""
    view = one_view(tmp_path, [(i, NOON, NOON, float(i) / 3) for i in range(5_000)])
    path = tmp_path / "rows 000.parquet"
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(0xAB for _ in range(4, len(data) // 2))
    path.write_bytes(bytes(data))
    with pytest.raises(SourceError, match=r"source of rows@1: .*rows \*\.parquet: "):
        ask(engine, view, tmp_path, [(1, NOON)])


def test_progress_counts_to_its_end(duckdb_engine: OfflineEngine, rng: np.random.Generator, tmp_path: Path) -> None:
    """Progress names each step before it, counts up by one, and ends at the total that it told from the start."""
    world = make_world(rng, tmp_path)
    told: list[tuple[str, int, int]] = []
    times = np.array(world.time_us, np.int64)

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    list(join(duckdb_engine, world.labels, times, world.selections, root=tmp_path, progress=progress))
    assert [done for _, done, _ in told] == list(range(told[-1][2] + 1))
    assert {total for _, _, total in told} == {told[-1][2]}
    assert told[0][0] == "view0@1: source"


def test_selections_of_one_view_are_one_join(duckdb_engine: OfflineEngine, tmp_path: Path) -> None:
    """A view that is selected twice is joined once, with the features of both selections in order of first use."""
    source = ParquetSource("all.parquet", event_time="at")
    view = FeatureView("v", USER, [Field("a", Int64), Field("b", String), Field("c", Int64)], source=source)
    table = {"user_id": [1], "at": array(Timestamp, [NOON]), "a": [5], "b": ["x"], "c": [7]}
    pq.write_table(pa.table(table), tmp_path / "all.parquet")
    selections = [Selection(view, ("c",)), Selection(view, ("a", "c"))]
    [answer] = join(duckdb_engine, pa.table({"user_id": [1]}), np.array([NOON]), selections, root=tmp_path)
    assert {name: column.to_pylist() for name, column in answer.columns.items()} == {"c": [7], "a": [5]}


def test_no_temporary_file_is_left(duckdb_engine: OfflineEngine, rng: np.random.Generator, tmp_path: Path) -> None:
    """Temporary files go where they are told to, and are gone after the join, finished or given up."""
    sources, temporary = tmp_path / "sources", tmp_path / "temporary"
    sources.mkdir()
    temporary.mkdir()
    world = make_world(rng, sources)
    times = np.array(world.time_us, np.int64)
    started = join(duckdb_engine, world.labels, times, world.selections, root=sources, temp_folder=temporary)
    next(started)
    assert list(temporary.iterdir())
    started.close()
    assert not list(temporary.iterdir())
