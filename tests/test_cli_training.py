"""``featserve train`` and ``featserve leakage``: labels in, a training frame or a report out, nothing half done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import featserve
from tests.command_line import command, run
from tests.serving import PATIENCE_S, Project, until

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
UTC_TIMES = pa.timestamp("us", "UTC")

DEFINITIONS = """
from datetime import timedelta

import numpy as np

from featserve import (
    Entity, FeatureService, FeatureView, Field, Float32, Int64, ParquetSource, RequestColumn, String,
    on_demand_transform,
)

user = Entity("user", {"user_id": Int64})
score = FeatureView(
    "score",
    user,
    [Field("risk", Float32), Field("band", String, default="none")],
    ttl=timedelta(hours=2),
    source=ParquetSource("score.parquet", event_time="at", delay=timedelta(minutes=30)),
)
home = FeatureView(
    "home", user, [Field("rooms", Int64)], source=ParquetSource("home.parquet", event_time="at")
)


@on_demand_transform(
    inputs={"amount": RequestColumn("amount", Float32), "risk": score["risk"]}, outputs=[Field("weighed", Float32)]
)
def loss(amount, risk):
    return amount * risk


fraud = FeatureService("fraud", [score, home, loss])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a project that is applied and never loaded, and has labels of every status."""
    Project.make(tmp_path, DEFINITIONS)
    score = {"user_id": [1, 2, 1], "at": pa.array([NOON - HOUR, NOON - 5 * HOUR, NOON], UTC_TIMES)}
    score |= {"risk": pa.array([0.25, 0.5, 0.75], pa.float32()), "band": ["low", "mid", None]}
    home = {"user_id": [1], "at": pa.array([NOON - 100 * HOUR], UTC_TIMES), "rooms": pa.array([3], pa.int64())}
    labels = {
        "user_id": [1, 2, 3, 1],
        "asked_at": pa.array([NOON, NOON, NOON, NOON + HOUR], UTC_TIMES),
        "amount": pa.array([10.0, 20.0, 30.0, 40.0], pa.float32()),
        "fraud": [True, False, None, False],
    }
    for name, columns in (("score", score), ("home", home), ("labels", labels)):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    return tmp_path


def train(folder: Path, *words: str | Path, labels: str = "labels.parquet", code: int = 0) -> tuple[str, str]:
    """Run the verb; return what it printed, and what it said on standard error."""
    done = run(
        "train", "fraud", "--labels", folder / labels, "--time", "asked_at", "-C", folder, *words, code=code
    )  # fmt: skip
    return done.stdout, done.stderr


def test_frame_is_that_of_the_library(folder: Path) -> None:
    """The file holds the labels and the features that they could know, as the library's own frame does."""
    out = folder / "train.parquet"
    told, progress = train(folder, "--out", out)
    frame = pq.read_table(out)
    assert frame.column_names == [
        "user_id", "asked_at", "amount", "fraud", "score.risk", "score.band", "home.rooms", "loss.weighed"
    ]  # fmt: skip
    assert frame["score.risk"].to_pylist() == [0.25, None, None, 0.75]
    assert frame["score.band"].to_pylist() == ["low", "none", "none", "none"]
    assert frame["home.rooms"].to_pylist() == [3, None, None, 3]
    assert frame["loss.weighed"].to_pylist() == [2.5, None, None, 30.0]
    with featserve.open(folder, write=True) as project:
        assert frame == project.training_frame("fraud", folder / "labels.parquet", time="asked_at")
    assert "4, each with 4 features" in told
    lines = {line.split()[0]: line for line in told.splitlines() if line}
    assert lines["score@1"].split()[1:] == ["50.00", "%", "25.00", "%", "25.00", "%"]
    assert lines["home@1"].split()[1:] == ["50.00", "%", "50.00", "%", "0.00", "%"]
    assert progress == ""


def test_frame_says_what_it_was_made_of(folder: Path) -> None:
    """The file's metadata name the service, its hash and what the labels saw of each view."""
    train(folder, "--out", folder / "train.parquet")
    origin = json.loads(pq.read_schema(folder / "train.parquet").metadata[b"featserve"])
    with featserve.open(folder, write=True) as project:
        assert origin["hash"] == project.describe("fraud").hash
    assert origin["service"] == "fraud@1"
    assert origin["views"]["score@1"] == {"PRESENT": 2, "NOT_FOUND": 1, "EXPIRED": 1}


def test_labels_from_csv(folder: Path) -> None:
    """Labels as CSV give the features that they give as Parquet."""
    train(folder, "--out", folder / "first.parquet")
    pyarrow.csv.write_csv(pq.read_table(folder / "labels.parquet"), folder / "labels.csv")
    train(folder, "--out", folder / "second.parquet", labels="labels.csv")
    features = ["user_id", "asked_at", "score.risk", "score.band", "home.rooms", "loss.weighed"]
    first, second = (pq.read_table(folder / f"{name}.parquet", columns=features) for name in ("first", "second"))
    assert first == second


def test_event_times_and_statuses(folder: Path) -> None:
    """They are columns of the frame where they are asked for."""
    train(folder, "--out", folder / "train.parquet", "--event-times", "--statuses")
    frame = pq.read_table(folder / "train.parquet")
    assert frame["score.event_time"].to_pylist() == [NOON - HOUR, NOON - 5 * HOUR, None, NOON]
    assert frame["score.risk.status"].to_pylist() == ["PRESENT", "EXPIRED", "NOT_FOUND", "PRESENT"]
    assert frame["score.band.status"].to_pylist() == ["PRESENT", "EXPIRED", "NOT_FOUND", "NULL"]


def test_refused_before_any_work(folder: Path) -> None:
    """A file that is no Parquet, or that holds the labels, is no place for a frame, and a limit is a size."""
    assert "as in 4G" in train(folder, "--out", folder / "x.parquet", "--memory-limit", "lots", code=2)[1]
    assert "ends in .parquet" in train(folder, "--out", folder / "train.csv", code=2)[1]
    before = (folder / "labels.parquet").read_bytes()
    assert "holds the labels" in train(folder, "--out", folder / "." / "labels.parquet", code=2)[1]
    assert (folder / "labels.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: drop(folder, "labels", "user_id"), "missing column 'user_id'"),
        (lambda folder: drop(folder, "labels", "amount"), "missing column 'amount'"),
        (lambda folder: drop(folder, "labels", "asked_at"), "missing column 'asked_at'"),
        (lambda folder: drop(folder, "score", "risk"), "risk"),
        (lambda folder: (folder / "score.parquet").unlink(), "score.parquet"),
        (lambda folder: (folder / "home.parquet").write_bytes(b"PAR1 no"), "home.parquet"),
        (lambda folder: (folder / "labels.parquet").write_bytes(b"nothing"), "cannot be read"),
    ],
    ids=["key", "request column", "time", "source column", "source", "unreadable source", "unreadable labels"],
)
def test_bad_input_leaves_what_was_there(folder: Path, change: object, message: str) -> None:
    """What is wrong is named, an earlier frame stays, and nothing is left beside it."""
    out = folder / "frames" / "train.parquet"
    out.parent.mkdir()
    out.write_bytes(b"an earlier frame")
    change(folder)  # type: ignore[operator]
    assert message in train(folder, "--out", out, code=1)[1]
    assert out.read_bytes() == b"an earlier frame"
    assert [path.name for path in out.parent.iterdir()] == ["train.parquet"]


def drop(folder: Path, name: str, column: str) -> None:
    path = folder / f"{name}.parquet"
    pq.write_table(pq.read_table(path).drop_columns([column]), path)


def test_a_folder_that_is_missing(folder: Path) -> None:
    """A frame that cannot be written is an error that names the file."""
    assert "nowhere/train.parquet" in train(folder, "--out", folder / "nowhere" / "train.parquet", code=1)[1]


def test_unknown_service(folder: Path) -> None:
    """The nearest name is offered, for either verb."""
    for verb, more in (("train", ["--out", folder / "x.parquet"]), ("leakage", ["--label", "fraud"])):
        words = (verb, "frau", "--labels", folder / "labels.parquet", "--time", "asked_at", "-C", folder, *more)
        assert "did you mean 'fraud'?" in run(*words, code=1).stderr


def test_leakage_without_a_terminal(folder: Path) -> None:
    """The report is a table on standard output, and standard error stays empty."""
    labels = ("--labels", folder / "labels.parquet", "--time", "asked_at", "--label", "fraud")
    done = run("leakage", "fraud", *labels, "-C", folder)
    assert "fraud of 4 rows" in done.stdout
    assert done.stderr == ""
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning")
def test_spark_gives_the_same_frame(folder: Path) -> None:
    """With --engine spark the file is the same."""
    train(folder, "--out", folder / "first.parquet", "--statuses")
    train(folder, "--out", folder / "second.parquet", "--statuses", "--engine", "spark", "--memory-limit", "2G")
    assert pq.read_table(folder / "first.parquet") == pq.read_table(folder / "second.parquet")


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(folder: Path) -> None:
    """Interrupted in the middle of a join it exits with 130, without a traceback, a file or a part of one."""
    rows = 6_000_000
    many = {"user_id": pa.array(range(rows)), "at": pa.array([NOON] * 1, UTC_TIMES).take(pa.array([0] * rows))}
    many |= {"risk": pa.nulls(rows, pa.float32()), "band": pa.nulls(rows, pa.string())}
    pq.write_table(pa.table(many), folder / "score.parquet")
    words = command(
        "train", "fraud", "--labels", folder / "labels.parquet", "--time", "asked_at", "-C", folder,
        "--out", folder / "train.parquet",
    )  # fmt: skip
    (folder / "tmp").mkdir()
    before = sorted(path.name for path in folder.rglob("*"))
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    until("a join is under way", lambda: list((folder / "tmp").glob("featserve-*")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in errors
    assert process.returncode == 130
    assert sorted(path.name for path in folder.rglob("*")) == before
