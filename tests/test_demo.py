"""``make demo`` as a stranger runs it: it ends by itself, and says what it promises to."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import PATIENCE_S, ROOT

MUST_SAY = (
    r"^flights\.parquet +336,776 rows$",
    r"^Applied: \d+ created\.",
    r"^carrier_last_departure@1 +328,521 +\d+ +[\d,]+ +\d+\.\d\d$",
    r"^hourly_weather( +PRESENT \d+ (min|h)){5}$",
    r"^aircraft_attributes( +(PRESENT 330 d|NOT_FOUND)){5}$",
    r"^  crosswind_mph( +[\d.]+){5}$",
    r"^ +1 flight +a request: p50 [\d.]+ ms, p90 [\d.]+ ms",
    r"^ +16 flights a request: p50 [\d.]+ ms, p90 [\d.]+ ms",
    r"^carrier_week( +PRESENT \d+ min){5}$",
    r"^  rows +336,776, each with 34 features$",
    r"^route_last_arrival\.arrival_delay_min +pearson +0\.105 +0\.901 ",
    r"^carrier_last_departure\.departure_delay_min +pearson +0\.161 +0\.842 ",
    r"ROC AUC 0\.[67]\d\d\.",
    r"^16 flights x 34 features, 544 values: .*$\n^.*equal to the last bit\.$",
    r"^69 departures pushed, 69 counted; pushed again, 0 counted and 69 known by their flight_id\.$",
    r"^VX +7\.18 min +3\.63 min +3\.55$",
    r"^What is served of events loaded and pushed equals what a training frame holds, to the last bit\.$",
    r"The server was told to stop, and did\.",
)


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """It starts afresh, says all of it within 100 columns and about 150 lines, and exits with 0."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns(".featserve", "data"))
    made = tmp_path / "examples" / "flights" / ".featserve"
    (made / "store").mkdir(parents=True)
    for name in ("registry.db", "store/CURRENT", "server.log"):
        (made / name).write_text("left by a run that was killed")
    done = subprocess.run([sys.executable, "-m", "examples.flights.demo"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    for pattern in MUST_SAY:
        assert re.search(pattern, done.stdout, re.MULTILINE), f"{pattern} is not in\n{done.stdout}"
    lines = done.stdout.splitlines()
    assert len(lines) <= 155
    assert not [line for line in lines if len(line) > 100 and not line.startswith(("$ ", "The whole report"))]
    assert (made / "leakage.html").stat().st_size > 50_000


@pytest.mark.slow
def test_serve(tmp_path: Path) -> None:
    """The server that stays says how to ask it, in a terminal and in Python; both work, and SIGTERM ends it with 0."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns(".featserve", "data"))
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "examples.flights.serve", "--port", "0"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert server.stdout is not None
        said = ""
        for line in server.stdout:
            said += line
            if "print(matrix" in line:
                break
        asked = re.search(r"^(\S+/featserve get departure_delay_model .*--as-of \S+)$", said, re.MULTILINE | re.DOTALL)
        assert asked, said
        told = subprocess.run(asked[1], shell=True, capture_output=True, text=True, check=True).stdout
        assert "departure_delay_model@1: 2 rows at 2013-11-27 22:00:00 UTC" in told
        assert told.count("PRESENT") > 20
        snippet = said[said.index("from datetime import") :]
        told = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True).stdout
        assert told.startswith("{'hourly_weather.temperature_f': [39.9")
        server.terminate()
        assert server.wait(PATIENCE_S) == 0, (tmp_path / "server.log").read_text()
    finally:
        server.kill()
        server.communicate()
