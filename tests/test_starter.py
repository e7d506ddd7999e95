"""The starter project: the commands that ``featserve init`` prints work, and the answers are those of its sample."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from featserve.cli.starter import CUSTOMERS, FILES, NEXT, order_counts, profiles, write_starter
from featserve.config import load_config
from featserve.errors import CallerError
from featserve.project import load_definitions
from tests.serving import PATIENCE_S, ROOT

# What a person has who has installed featserve: the command on the path, and a terminal 80 columns wide.
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "80",
    "FEATSERVE_PORT": "0",
}


def shell(command: str, folder: Path) -> str:
    """Run a line in bash, and return what it prints."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert done.stderr == "", command
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Make a project with ``featserve init``; return its folder and the commands that this printed."""
    folder = tmp_path_factory.mktemp("starter")
    printed = shell("featserve init 'my shop'", folder)
    assert all(len(line) <= 80 for line in printed.splitlines())
    commands = [line.strip() for line in printed.partition("Try it:\n")[2].splitlines()]
    assert commands[0] == "cd 'my shop'"
    return folder / "my shop", commands[1:]


@pytest.fixture(scope="module")
def loaded(made: tuple[Path, list[str]]) -> tuple[Path, list[str], str]:
    """Run the printed commands up to the first ``get``; return what follows it, and what it answered."""
    folder, commands = made
    assert [command.partition("  #")[0].rstrip() for command in commands] == [command for command, _ in NEXT]
    first = next(i for i, command in enumerate(commands) if command.startswith("featserve get"))
    answer = ""
    for command in commands[: first + 1]:
        answer = shell(command, folder)
    return folder, commands[first + 1 :], answer


@pytest.fixture
def served(loaded: tuple[Path, list[str], str]) -> Iterator[tuple[Path, str, str, subprocess.Popen[str]]]:
    """Run the printed ``serve`` in the background, on a free port."""
    folder, (serve, ask), _ = loaded
    command = serve.partition("  #")[0].split()
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    listening = process.stdout.readline()
    assert listening.startswith("Listening on 127.0.0.1:"), listening
    yield folder, ask, listening.split()[-1], process
    if process.poll() is None:
        process.kill()
        process.wait(PATIENCE_S)
    process.stdout.close()


def newest(path: Path, time_column: str) -> dict[int, dict[str, str]]:
    """Return the last row of each customer by its time: what every row of the sample is visible for."""
    with path.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row[time_column])
    return {int(row["customer_id"]): row for row in rows}


@pytest.mark.slow
def test_printed_commands_show_values(loaded: tuple[Path, list[str], str]) -> None:
    """The first thing that a new user asks for is there: values with their ages, and a null that is called one."""
    answer = loaded[2]
    assert re.search(r"^customer_id=1002$", answer, re.MULTILINE)
    assert re.search(r"^orders\.spent_30d +\d+\.\d+ +PRESENT", answer, re.MULTILINE)
    assert re.search(r"^orders\.days_since_last +null +NULL", answer, re.MULTILINE)
    assert re.search(r"^profile\.country +[A-Z]{2} +PRESENT +[\d-]{10} [\d:]{8} +\d+ d", answer, re.MULTILINE)
    assert "NOT_FOUND" not in answer
    assert "EXPIRED" not in answer


@pytest.mark.slow
def test_server_gives_the_same_answer(
    served: tuple[Path, str, str, subprocess.Popen[str]], loaded: tuple[Path, list[str], str]
) -> None:
    """The printed question to the server gets the answer of the store; the server then stops when asked, with 0."""
    folder, ask, address, process = served
    answer = shell(ask.replace("127.0.0.1:7070", address), folder)
    changing = r" at .*| *\d+ (d|h|min|s)\b"
    assert re.sub(changing, "", answer) == re.sub(changing, "", loaded[2])
    process.terminate()
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_answers_are_those_of_the_sample(loaded: tuple[Path, list[str], str]) -> None:
    """Every customer's features are those of the newest row in the files, by a reading of them that shares no code."""
    folder = loaded[0]
    asked = ",".join(map(str, CUSTOMERS))
    rows = [json.loads(line) for line in shell(f"featserve get churn --json customer_id={asked}", folder).splitlines()]
    orders, people = newest(folder / "data/orders.csv", "day_end"), newest(folder / "data/profiles.csv", "changed_at")
    assert len(rows) == len(CUSTOMERS)
    for row in rows:
        customer = row["keys"]["customer_id"]
        bought, person = orders[customer], people.get(customer)
        assert row["values"] == {
            "orders.orders_30d": int(bought["orders_30d"]),
            "orders.spent_30d": float(bought["spent_30d"]),
            "orders.days_since_last": float(bought["days_since_last"]) if bought["days_since_last"] else None,
            "profile.country": person["country"] if person else None,
            "profile.plan": (person["plan"] if person else "") or "free",
        }
        assert row["views"]["orders@1"]["event_time"] == bought["day_end"]
        assert row["views"]["profile@1"]["status"] == ("PRESENT" if person else "NOT_FOUND")


def test_sample_is_visible_when_it_is_made(seed: int) -> None:
    """Whatever the time of day, every sample row is known when the project is made, and the newest has not expired."""
    chance = random.Random(seed)
    nows = [datetime(2026, 3, 1, hour, minute, tzinfo=UTC) for hour, minute in ((0, 0), (1, 59), (2, 0), (23, 59))]
    nows += [datetime.fromtimestamp(chance.uniform(1e9, 3e9), UTC) for _ in range(50)]
    for now in nows:
        ends = [datetime.fromisoformat(line.split(",")[1]) for line in order_counts(now).splitlines()[1:]]
        changes = [datetime.fromisoformat(line.split(",")[1]) for line in profiles(now).splitlines()[1:]]
        assert max(ends) + timedelta(hours=2) <= now
        assert min(ends) > now - timedelta(days=89)
        assert max(changes) <= now


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Where one file of the project is there already, init says which, and touches nothing."""
    (tmp_path / "features.py").write_text("mine")
    with pytest.raises(CallerError, match=r"already has features\.py; nothing was written"):
        write_starter(tmp_path, datetime.now(UTC))
    assert [path.name for path in tmp_path.iterdir()] == ["features.py"]
    assert (tmp_path / "features.py").read_text() == "mine"


def test_settings_are_the_defaults(tmp_path: Path) -> None:
    """What the commented settings state is what featserve does without them, and the definitions load."""
    write_starter(tmp_path, datetime.now(UTC))
    config = load_config(tmp_path, {})
    (tmp_path / "featserve.toml").write_text("")
    assert config == load_config(tmp_path, {})
    written = FILES["featserve.toml"](datetime.now(UTC))
    # Metrics have no port until one is set: what the comment shows is an example.
    uncommented = re.sub(r"^# ((?!prometheus_port)\w+ = \d+)", r"\1", written, flags=re.MULTILINE)
    assert "\nmax_rows = " in uncommented
    (tmp_path / "featserve.toml").write_text(uncommented)
    assert config == load_config(tmp_path, {})
    assert list(load_definitions(config).services) == ["churn@1"]
