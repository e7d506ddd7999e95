"""A project and the means to run ``featserve`` on it, for the tests of the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner, Result

from featserve.cli import main
from featserve.cli.show import STDOUT
from tests.serving import PATIENCE_S, ROOT

NOW = datetime.now(UTC).replace(microsecond=0)
BIG_ROWS = 300_000

DEFINITIONS = """
from datetime import timedelta

from featserve import (
    Bytes, Entity, FeatureService, FeatureView, Field, Float32, Float64, Int64, ParquetSource, String, Timestamp, Vector
)

user = Entity("user", {"user_id": Int64}, description="Who pays")
place = Entity("place", {"country": String, "zip": String})

score = FeatureView(
    "score",
    user,
    [Field("risk", Float32, min=0.0, max=1.0, description="How likely"), Field("seen", Timestamp), Field("tag", Bytes)],
    ttl=timedelta(days=2),
    source=ParquetSource("data/score.parquet", event_time="at"),
    owner="risk",
    description="What the bureau says",
)
area = FeatureView(
    "area",
    place,
    [Field("name", String, default="nowhere"), Field("shape", Vector(6)), Field("rent", Float64, not_null=True)],
    source=ParquetSource("data/area.parquet", event_time="at"),
)
big = FeatureView(
    "big",
    user,
    [Field(f"f{i}", Float64) for i in range(8)],
    source=ParquetSource("data/big.parquet", event_time="at"),
)
clicks = FeatureView("clicks", user, [Field("count", Int64)])
fraud = FeatureService("fraud", [score, area["rent", "name", "shape"]], owner="risk", description="Is it them?")
bulk = FeatureService("bulk", [big["f0"]])
"""


def write_data(folder: Path) -> None:
    """Write the sources: a user of each status, a place with a null, and a view of many rows."""
    at = pa.timestamp("us", "UTC")
    (folder / "data").mkdir()
    ages = (timedelta(hours=1), timedelta(hours=1), timedelta(days=3), timedelta(hours=5))
    score = {
        "user_id": [1, 2, 3, 1],
        "at": pa.array([NOW - age for age in ages], at),
        "risk": pa.array([0.1, None, 0.3, 0.9], pa.float32()),
        "seen": pa.array([NOW] * 4, at),
        "tag": [b"\x00a", b"", b"c", b"d"],
    }
    area = {
        "country": ["NZ", "NZ"],
        "zip": ["1010", "a,b"],
        "at": pa.array([NOW - timedelta(days=400)] * 2, at),
        "name": ["Auckland \x1b[31m", None],
        "shape": pa.array([[0.5] * 6, [float("nan")] * 6], pa.list_(pa.float32())),
        "rent": [1.5, float("inf")],
    }
    big = {"user_id": np.arange(BIG_ROWS), "at": pa.array([NOW - timedelta(days=1)] * BIG_ROWS, at)}
    big |= {f"f{i}": np.arange(BIG_ROWS) + i / 8 for i in range(8)}
    for name, columns in (("score", score), ("area", area), ("big", big)):
        pq.write_table(pa.table(columns), folder / "data" / f"{name}.parquet", row_group_size=50_000)


def declare(folder: Path, definitions: str = DEFINITIONS) -> None:
    (folder / "featserve.toml").write_text("[store]\nblock_cache_mb = 8\nrow_cache_mb = 0\n")
    (folder / "features.py").write_text(definitions)


def run(*words: str | Path, code: int = 0, columns: int = 120) -> Result:
    """Run a verb in this process, as from a pipe of a given width, and check its exit code."""
    STDOUT.width = columns
    result = CliRunner().invoke(main, [str(word) for word in words])
    told = f"{words}: {result.exit_code}\n{result.output}"
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert result.exit_code == code, told
    return result


def command(*words: str | Path) -> list[str]:
    """Return what runs a verb in a process of its own."""
    return [sys.executable, "-m", "featserve", *map(str, words)]


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run ``featserve serve`` on a free port; give its address and its process, which is dead at the end."""
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command("serve", "--port", "0", "--workers", "1", "-C", folder),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line.startswith("Listening on 127.0.0.1:"), (folder / "server.log").read_text()
        yield line.split()[-1], server
    finally:
        server.kill()
        server.wait(PATIENCE_S)
        server.stdout.close()
