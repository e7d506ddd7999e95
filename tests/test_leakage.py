"""The leakage report: what careless joins would make of a training set, against a naive join and naive statistics."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import featserve
from featserve.config import load_config
from featserve.definitions import FeatureService
from featserve.errors import CallerError, InvalidRequest, SourceError
from featserve.leakage import (
    MAX_DRAWN,
    FeatureLeakage,
    LeakageReport,
    correlation_ratio,
    differs,
    leakage,
    pearson,
)
from featserve.offline import OfflineEngine, open_engine
from featserve.project import load_definitions
from featserve.types import Float64, String, Vector, column
from tests.command_line import run
from tests.serving import Project

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
NAN = float("nan")

DEFINITIONS = """
from datetime import timedelta

import numpy as np

from featserve import (
    Bool, Entity, FeatureService, FeatureView, Field, Float32, Float64, Int64, ParquetSource, RequestColumn,
    RequestTime, String, Timestamp, Vector, on_demand_transform,
)

user = Entity("user", {"user_id": Int64})
reported = FeatureView(
    "reported",
    user,
    [
        Field("amount", Float64),
        Field("kind", String),
        Field("shape", Vector(2)),
        Field("big", Bool),
        Field("seen", Timestamp),
        Field("tries", Float32, default=7.0),
    ],
    ttl=timedelta(minutes=4),
    source=ParquetSource("reported.parquet", event_time="at", known_at="known"),
)
delayed = FeatureView(
    "delayed",
    user,
    [Field("count", Int64)],
    source=ParquetSource("delayed.parquet", event_time="at", delay=timedelta(minutes=3)),
)


@on_demand_transform(
    inputs={"amount": reported["amount"], "asked": RequestTime(), "offer": RequestColumn("offer", Float64)},
    outputs=[Field("ratio", Float64), Field("minute", Int64)],
)
def weighed(amount, asked, offer):
    return {"ratio": offer / amount, "minute": asked.astype("M8[m]").astype(np.int64)}


model = FeatureService("model", [reported, delayed, weighed], dtype=Float64)
"""


def make(folder: Path, rng: np.random.Generator, rows: int, labels: int) -> dict[str, list[dict[str, Any]]]:
    """Write a project with random sources and labels, whose times, values and nulls often coincide; return the rows."""

    def some(count: int, *values: Any) -> list[Any]:
        return [values[i] for i in rng.integers(len(values), size=count)]

    def times(count: int, most: int) -> list[datetime]:
        return [NOON + MINUTE * int(m) for m in rng.integers(0, most, count)]

    at = times(rows, 12)
    made = {
        "reported": {
            "user_id": some(rows, *range(6)),
            "at": at,
            "known": [t + MINUTE * int(m) for t, m in zip(at, rng.integers(0, 5, rows), strict=True)],
            "amount": some(rows, 0.5, 1.0, -2.0, 1e9, NAN, None),
            "kind": some(rows, "a", "b", "", None),
            "shape": some(rows, [0.0, 1.0], [NAN, 1.0], None),
            "big": some(rows, True, False, None),
            "seen": some(rows, NOON, NOON + MINUTE, None),
            "tries": some(rows, 1.5, 7.0, None),
        },
        "delayed": {"user_id": some(rows, *range(6)), "at": times(rows, 12), "count": some(rows, -1, 0, 5, None)},
        "labels": {
            "user_id": some(labels, *range(7), None),
            "when": times(labels, 16),
            "offer": some(labels, 1.0, 2.5),
            "loss": some(labels, 0.0, 1.5, -4.0, 1e6, NAN, None),
        },
    }
    Project.make(folder, DEFINITIONS)
    types = {"at": pa.timestamp("us", "UTC"), "known": pa.timestamp("us", "UTC"), "when": pa.timestamp("us", "UTC")}
    types |= {
        "seen": pa.timestamp("us", "UTC"),
        "tries": pa.float32(),
        "shape": pa.list_(pa.float32()),
        "big": pa.bool_(),
    }
    for name, columns in made.items():
        table = pa.table({key: pa.array(values, types.get(key)) for key, values in columns.items()})
        pq.write_table(table, folder / f"{name}.parquet")
    return {name: [dict(zip(c, row, strict=True)) for row in zip(*c.values(), strict=True)] for name, c in made.items()}


def seen(rows: list[dict[str, Any]], label: dict[str, Any], how: str, ttl: timedelta | None) -> dict[str, Any] | None:
    """Return the row of a view that a label sees under a join: look at every row."""
    newest = None
    for row in rows:
        known = row.get("known", row["at"] + 3 * MINUTE)
        if row["user_id"] != label["user_id"]:
            continue
        if how != "latest_value" and row["at"] > label["when"]:
            continue
        if how == "honest" and known > label["when"]:
            continue
        order = (row["at"],) if how == "event_time_only" else (row["at"], known)
        if newest is None or order >= newest[0]:
            newest = (order, row)
    if newest is None or (how != "latest_value" and ttl is not None and newest[1]["at"] < label["when"] - ttl):
        return None
    return newest[1]


def naive(made: dict[str, list[dict[str, Any]]], how: str) -> dict[str, list[Any]]:
    """Return the values of every feature under a join."""
    found: dict[str, list[Any]] = {}
    for label in made["labels"]:
        reported = seen(made["reported"], label, how, 4 * MINUTE) or {}
        delayed = seen(made["delayed"], label, how, None) or {}
        values = {f"reported.{name}": reported.get(name) for name in ("amount", "kind", "shape", "big", "seen")}
        values["reported.tries"] = 7.0 if reported.get("tries") is None else reported["tries"]
        values["delayed.count"] = delayed.get("count")
        amount = reported.get("amount")
        values["weighed.ratio"] = None if amount is None else label["offer"] / amount
        values["weighed.minute"] = None if amount is None else int(label["when"].timestamp()) // 60
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def naive_correlation(values: list[Any], label: list[Any], measure: str) -> float | None:
    """Return a correlation by the book."""
    numbers = [(v.timestamp() if isinstance(v, datetime) else v, y) for v, y in zip(values, label, strict=True)]
    both = [(v, y) for v, y in numbers if v is not None and y is not None and not math.isnan(y)]
    if measure == "correlation ratio":
        groups = {v: [y for w, y in both if w == v] for v, _ in both}
        y = [y for _, y in both]
        if len(groups) == len(both) or len(set(y)) < 2:
            return None
        within = sum(sum((y - np.mean(group)) ** 2 for y in group) for group in groups.values())
        total = sum((v - np.mean(y)) ** 2 for v in y)
        return float(np.sqrt(max(0.0, 1 - within / (len(y) - len(groups)) / (total / (len(y) - 1)))))
    both = [(v, y) for v, y in both if math.isfinite(v)]
    if len({v for v, _ in both}) < 2 or len({y for _, y in both}) < 2:
        return None
    return float(np.asarray(np.corrcoef(np.array(both, np.float64).T))[0, 1])


@pytest.fixture(scope="module")
def engine() -> Iterator[OfflineEngine]:
    engine = open_engine("duckdb")
    yield engine
    engine.close()


def service_of(folder: Path) -> FeatureService:
    return load_definitions(load_config(folder)).services["model@1"]


@pytest.mark.parametrize("number", range(4))
def test_report_is_the_naive_one(engine: OfflineEngine, rng: np.random.Generator, tmp_path: Path, number: int) -> None:
    """Counts and correlations of every feature and transform are those of three naive joins and textbook formulas."""
    rng = rng.spawn(number + 1)[number]
    made = make(tmp_path, rng, rows=80, labels=150)
    report = leakage(engine, service_of(tmp_path), tmp_path / "labels.parquet", "when", "loss", root=tmp_path)
    joins = {how: naive(made, how) for how in ("honest", "event_time_only", "latest_value")}
    loss = [label["loss"] for label in made["labels"]]
    assert (report.service, report.label, report.rows) == ("model@1", "loss", 150)
    assert sorted(f.feature for f in report.features) == sorted(joins["honest"])
    for f in report.features:
        expected = {"kind": "correlation ratio", "shape": "n/a"}.get(f.feature.partition(".")[2], "pearson")
        assert f.measure == expected
        for how, values in joins.items():
            told = None if f.measure == "n/a" else naive_correlation(values[f.feature], loss, f.measure)
            assert getattr(f, how) == (None if told is None else pytest.approx(told, abs=1e-9)), (f.feature, how)
        for how in ("event_time_only", "latest_value"):
            pairs = zip(joins["honest"][f.feature], joins[how][f.feature], strict=True)
            changed = sum(repr(honest) != repr(careless) for honest, careless in pairs)
            assert getattr(f, f"{how}_rows") == changed, (f.feature, how)
    gains = [f.gained for f in report.features]
    assert gains == sorted(gains, reverse=True)


def test_a_leak_is_exposed(engine: OfflineEngine, tmp_path: Path) -> None:
    """A feature that is the label itself, reported later, tells everything under a careless join and nothing else."""
    labels = 400
    when = [NOON + MINUTE * i for i in range(labels)]
    loss = np.random.default_rng(1).normal(size=labels)
    make(tmp_path, np.random.default_rng(2), rows=1, labels=1)
    utc = pa.timestamp("us", "UTC")
    rows = {"user_id": [1] * labels, "at": pa.array(when, utc), "known": pa.array([t + MINUTE for t in when], utc)}
    empty = {
        "kind": pa.string(),
        "shape": pa.list_(pa.float32()),
        "big": pa.bool_(),
        "seen": utc,
        "tries": pa.float32(),
    }
    rows |= {"amount": pa.array(loss)} | {name: pa.nulls(labels, type_) for name, type_ in empty.items()}
    pq.write_table(pa.table(rows), tmp_path / "reported.parquet")
    asked = {"user_id": [1] * labels, "when": when, "offer": [1.0] * labels, "loss": loss}
    first = leakage(engine, service_of(tmp_path), asked, "when", "loss", root=tmp_path).features[0]
    assert (first.feature, first.event_time_only_rows, first.latest_value_rows) == ("reported.amount", 400, 400)
    assert first.event_time_only == pytest.approx(1.0)
    assert first.honest is not None
    assert abs(first.honest) < 0.2
    assert first.latest_value is None  # one row, the same for every label
    assert first.gained == pytest.approx(1.0 - abs(first.honest))


def test_differences_are_of_values() -> None:
    """NaN is NaN, zeros are equal whatever their sign, a null differs from every value and from no null."""
    numbers = column(Float64, [1.0, NAN, 0.0, None, None, 0.0, NAN])
    others = column(Float64, [1.0, NAN, -0.0, None, 0.0, None, 1.0])
    assert differs(numbers, others).tolist() == [False, False, False, False, True, True, True]
    texts, more = column(String, ["a", None, "", "b", None]), column(String, ["a", None, None, "a", ""])
    assert differs(texts, more).tolist() == [False, False, True, True, True]
    vectors = column(Vector(2), [[1.0, NAN], [1.0, 2.0], None])
    assert differs(vectors, column(Vector(2), [[1.0, NAN], [1.0, 3.0], None])).tolist() == [False, True, False]
    assert differs(column(String, []), column(String, [])).tolist() == []


@pytest.mark.filterwarnings("error")
def test_correlations_at_their_limits() -> None:
    """What is constant, missing or too little has no correlation; huge numbers have one."""
    assert pearson(np.array([]), np.array([])) is None
    assert pearson(np.array([1.0, NAN]), np.array([1.0, 2.0])) is None
    assert pearson(np.full(9, 0.1), np.arange(9.0)) is None
    assert pearson(np.array([1e308, -1e308, np.inf]), np.array([5e-324, 0.0, 1.0])) == pytest.approx(1.0)
    assert pearson(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1.0)
    assert pearson(np.array([np.inf, 1.0, 2.0, 3.0]), np.array([0.0, NAN, 2.0, 3.0])) == pytest.approx(1.0)
    assert correlation_ratio(np.array([], np.int64), np.array([])) is None
    assert correlation_ratio(np.array([0, 1, 2]), np.array([1.0, 2.0, 3.0])) is None  # a category for each row
    assert correlation_ratio(np.array([0, 0, 1, 1]), np.array([5.0, 5.0, 9.0, 9.0])) == pytest.approx(1.0)
    assert correlation_ratio(np.array([0, 1, 0, 1]), np.array([5.0, 5.0, 9.0, 9.0])) == 0.0
    assert correlation_ratio(np.array([0, 1, -1, 1]), np.full(4, 3.0)) is None


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("los", "missing column 'los'; did you mean 'loss'?"),
        ("kind", "labels.kind: expected float64, got string"),
        ("when", "labels.when: expected float64, got timestamp"),
    ],
)
def test_labels_that_are_none(engine: OfflineEngine, tmp_path: Path, label: str, message: str) -> None:
    """A label that is missing, or neither a number nor a bool, is refused by name."""
    make(tmp_path, np.random.default_rng(0), rows=3, labels=3)
    table = pq.read_table(tmp_path / "labels.parquet").append_column("kind", pa.array(["a", "b", "c"]))
    with pytest.raises(InvalidRequest) as caught:
        leakage(engine, service_of(tmp_path), table, "when", label, root=tmp_path)
    assert message in str(caught.value)


def test_bools_are_labels(engine: OfflineEngine, tmp_path: Path) -> None:
    """A bool counts as 0 and 1."""
    make(tmp_path, np.random.default_rng(0), rows=60, labels=80)
    table = pq.read_table(tmp_path / "labels.parquet")
    late = [None if i % 9 == 0 else i % 2 == 0 for i in range(80)]
    as_bools = table.append_column("late", pa.array(late))
    as_numbers = table.append_column("late", pa.array(late).cast(pa.int8()))
    reports = [
        leakage(engine, service_of(tmp_path), labels, "when", "late", root=tmp_path)
        for labels in (as_bools, as_numbers)
    ]
    assert reports[0] == reports[1]
    assert any(f.honest is not None for f in reports[0].features)


def test_a_source_at_fault(engine: OfflineEngine, tmp_path: Path) -> None:
    """A source that moved is an error that names it."""
    make(tmp_path, np.random.default_rng(0), rows=3, labels=3)
    (tmp_path / "delayed.parquet").unlink()
    with pytest.raises(SourceError, match="delayed"):
        leakage(engine, service_of(tmp_path), tmp_path / "labels.parquet", "when", "loss", root=tmp_path)


def test_progress_runs_through_all_joins(engine: OfflineEngine, tmp_path: Path) -> None:
    """Progress is told join by join, never goes back, and ends at all of its steps."""
    make(tmp_path, np.random.default_rng(0), rows=9, labels=9)
    told: list[tuple[str, int, int]] = []
    leakage(
        engine, service_of(tmp_path), tmp_path / "labels.parquet", "when", "loss", root=tmp_path,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    done = [step[1] for step in told]
    assert done == sorted(done)
    assert told[-1][1:] == (told[-1][2], told[-1][2])
    assert list(dict.fromkeys(step[0].partition(":")[0] for step in told)) == [
        "honest",
        "event time only",
        "latest value",
    ]


REPORT = LeakageReport(
    "model@1",
    "loss_$<&",
    4_000,
    (
        FeatureLeakage("view.a", "float32", "pearson", -0.25, 0.75, 1_000, None, 3_999),
        FeatureLeakage("view.b", "vector[2]", "n/a", None, None, 0, None, 4_000),
    ),
)


def test_plot_as_a_picture(tmp_path: Path) -> None:
    """A .png is a picture, also of more features than fit one, and of no rows."""
    many = replace(REPORT, features=REPORT.features * MAX_DRAWN)
    for number, report in enumerate((REPORT, many, replace(REPORT, rows=0))):
        path = tmp_path / f"{number}.png"
        report.plot(path)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.stat().st_size > 5_000


def test_plot_as_a_page(tmp_path: Path) -> None:
    """An .html page has the drawing and every number in it, and loads nothing."""
    REPORT.plot(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    for part in ("<svg", "view.a", "-0.250", "+0.750", "1,000", "3,999", "n/a", "4,000 labels"):
        assert part in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_plot_that_cannot_be_written(tmp_path: Path) -> None:
    """Another suffix and a missing folder are refused, and nothing is left behind."""
    with pytest.raises(CallerError, match=r"\.png or \.html"):
        REPORT.plot(tmp_path / "report.pdf")
    with pytest.raises(CallerError, match="cannot be written"):
        REPORT.plot(tmp_path / "nowhere" / "report.png")
    assert not list(tmp_path.iterdir())


def test_method_and_verb_agree(tmp_path: Path) -> None:
    """The method of an open project, the verb and its JSON give one report."""
    make(tmp_path, np.random.default_rng(5), rows=60, labels=80)
    with featserve.open(tmp_path, write=True) as project:
        report = project.leakage("model", tmp_path / "labels.parquet", time="when", label="loss")
    words = (
        "leakage",
        "model",
        "--labels",
        tmp_path / "labels.parquet",
        "--time",
        "when",
        "--label",
        "loss",
        "-C",
        tmp_path,
    )
    assert json.loads(run(*words, "--json").stdout) == json.loads(json.dumps(report.to_dict()))
    shown = run(*words, "--plot", tmp_path / "plot.png").stdout
    assert all(f.feature in shown for f in report.features)
    assert (tmp_path / "plot.png").exists()
    assert "ends in .png or .html" in run(*words, "--plot", tmp_path / "plot.gif", code=1).stderr


def test_serving_does_not_load_it() -> None:
    """A server loads neither the report nor what draws it, and the command line draws nothing until it is asked to."""
    check = "import sys; import {}; print(*[name for name in {} if name in sys.modules])"
    parts = ("featserve.leakage", "featserve.training", "matplotlib", "duckdb")
    for module, absent in (("featserve.server.app, featserve.engine", parts), ("featserve.cli", parts[2:])):
        done = subprocess.run(
            [sys.executable, "-c", check.format(module, absent)], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == ""
