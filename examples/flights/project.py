"""The example as a project made afresh, for the demonstration and the server that stays.

Comes in: nothing but the package of the flights. Goes out: data, a registry and an online store as of one instant, each
made by the command that its user would type, with what that prints.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from examples.flights.prepare import DATA, prepare
from featserve.config import load_config
from featserve.store import is_held

FOLDER = Path(__file__).parent
MADE = FOLDER / ".featserve"
SERVICE = "departure_delay_model"
REPORT = "carrier_report"
THEN = datetime(2013, 11, 27, 22, tzinfo=UTC)
"""The afternoon before Thanksgiving, in a storm: 17:00 in New York."""
LATER = THEN + timedelta(hours=1)
THEN_TEXT = f"{THEN:%Y-%m-%dT%H:%MZ}"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("FEATSERVE_")}
WIDTH = 100


def make_afresh() -> None:
    """Make data, registry and store anew; refuses while a server of the example runs."""
    config = load_config(FOLDER, {})
    if config.store.path.exists() and is_held(config.store.path):
        raise SystemExit(
            f"a server has {config.store.path} open; stop it (`make serve` ends with Ctrl-C) and try again"
        )
    shutil.rmtree(MADE, ignore_errors=True)
    prepare()


def command(*words: str, first: int | None = None, last: int | None = None) -> None:
    """Run the command line in the example's folder, and print the command and what it says, or some lines of that."""
    print(f"$ featserve {' '.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "featserve", *words],
        cwd=FOLDER,
        env=ENVIRONMENT | {"COLUMNS": str(WIDTH)},
        stdout=subprocess.PIPE,  # progress and errors go to the terminal
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    lines = done.stdout.splitlines()
    kept = lines[:first] if last is None else lines[-last:]
    print(*kept, sep="\n")
    if first is not None and len(lines) > first:
        print(f"... and {len(lines) - first} lines more")


def reported_between(first: datetime, last: datetime) -> Any:
    """Return the departures that were reported after ``first``, until ``last``, as a pyarrow Table, in their order."""
    departures = pq.read_table(DATA / "departures.parquet")
    known_at = departures["known_at"]
    return departures.filter(pc.and_(pc.greater(known_at, first), pc.less_equal(known_at, last)))


def flights_at(instant: datetime) -> Any:
    """Return the flights that were scheduled to leave at an instant, as a pyarrow Table, by carrier and number."""
    flights = pq.read_table(DATA / "flights.parquet")
    found = flights.filter(pc.equal(flights["scheduled_departure"], instant))
    return found.sort_by([("carrier", "ascending"), ("flight_number", "ascending")])


def flights_of(ids: Any) -> Any:
    """Return the flights with these ids, but for those whose aircraft was not reported, as a pyarrow Table."""
    flights = pq.read_table(DATA / "flights.parquet")
    return flights.filter(pc.and_(pc.is_in(flights["flight_id"], ids), pc.is_valid(flights["tailnum"])))
