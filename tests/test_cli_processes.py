"""The command line among processes: what is served, locked, stopped and interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

import featserve
from featserve.config import load_config
from featserve.matrix import Status
from featserve.registry import Load, Registry
from tests.command_line import BIG_ROWS, NOW, command, declare, run, serving, write_data
from tests.serving import PATIENCE_S, ROOT, until

pytestmark = pytest.mark.slow

AS_OF = ("--as-of", NOW.isoformat())
ASK = ("fraud", "user_id=1,2", "country=NZ", "zip=1010", "--json", *AS_OF)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a project that is applied, with nothing loaded."""
    declare(tmp_path)
    write_data(tmp_path)
    run("apply", "-C", tmp_path)
    return tmp_path


def loads(folder: Path) -> list[Load]:
    with Registry.open(load_config(folder).registry.url, create=False) as registry:
        return registry.loads()


def statuses(folder: Path, *users: int) -> list[Status]:
    """Return the status of users of the big view, read from the store."""
    with featserve.open(folder) as opened:
        matrix = opened.get("bulk", {"user_id": list(users)})
    return [Status(status) for status in matrix.status[:, 0]]


def test_load_serve_get_and_stop(project: Path) -> None:
    """What was loaded is served; the answers are those of the store; SIGTERM ends the server with exit code 0."""
    run("materialize", "score", "area", "-C", project)
    here = run("get", *ASK, "-C", project).stdout
    with serving(project) as (address, server):
        assert run("get", *ASK, "--server", address).stdout == here
        listed = json.loads(run("list", "--json", "--server", address).stdout)
        assert [service["name"] for service in listed["services"]] == ["bulk", "fraud"]
        described = run("describe", "fraud", "--json", "--server", address).stdout
        assert described == run("describe", "fraud", "--json", "-C", project).stdout
        assert "did you mean 'fraud'" in run("get", "frau", "user_id=1", "--server", address, code=1).stderr
        server.terminate()
        assert server.wait(PATIENCE_S) == 0
        assert server.stdout is not None
        assert "fraud@1: 6 features by user_id int64, country string, zip string" in server.stdout.read()
    logged = [json.loads(line)["message"] for line in (project / "server.log").read_text().splitlines()]
    assert logged[0] == "serving"
    assert logged[-1] == "stopped"
    assert run("get", *ASK, "-C", project).stdout == here


def test_server_holds_the_store(project: Path) -> None:
    """While a server runs, a load says so and what to do; sent to the server, its rows are served and recorded."""
    with serving(project) as (address, _):
        refused = run("materialize", "score", "-C", project, code=1)
        assert "another process has it open for writing" in refused.stderr
        assert "`featserve materialize --to HOST:PORT`" in refused.stderr
        assert json.loads(run("status", "--json", "-C", project).stdout)["store"]["held"] is True
        assert loads(project) == []
        assert "NOT_FOUND" in run("get", *ASK, "--server", address).stdout
        sent = run("materialize", "score", "area", "--to", address, "-C", project).stdout
        assert re.search(r"score@1 +4 +3 ", sent)
        served = run("get", *ASK, "--server", address).stdout
    assert [(load.view, load.rows_read, load.rows_stored) for load in loads(project)] == [
        ("score@1", 4, 3),
        ("area@1", 2, 2),
    ]
    assert [json.loads(line)["values"]["score.seen"] for line in served.splitlines()] == [
        NOW.isoformat().replace("+00:00", "Z")
    ] * 2
    # Loaded once more from the files, where the same rows have the same places: nothing changes.
    run("materialize", "score", "area", "-C", project)
    assert run("get", *ASK, "-C", project).stdout == served


def test_interrupted_load_leaves_nothing(project: Path) -> None:
    """Ctrl-C in the middle of a load: exit code 130, the views before it are there, and nothing of that one is."""
    loading = subprocess.Popen(
        command("materialize", "score", "big", "-C", project),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    store = load_config(project).store.path
    until("the big load has begun", lambda: loads(project) and list(store.parent.glob(f".{store.name}.load-*")))
    loading.send_signal(signal.SIGINT)
    printed, told = loading.communicate(timeout=PATIENCE_S)
    assert loading.returncode == 130, told
    assert "Interrupted. Nothing of big@1 became visible. Loaded: score@1." in told
    assert re.search(r"score@1 +4 +3 ", printed)
    assert [load.view for load in loads(project)] == ["score@1"]
    assert list(store.parent.glob(f".{store.name}.load-*")) == []
    assert statuses(project, 0, 1, BIG_ROWS - 1) == [Status.NOT_FOUND] * 3
    run("materialize", "big", "-C", project)
    assert statuses(project, 0, 1, BIG_ROWS - 1, BIG_ROWS) == [Status.PRESENT] * 3 + [Status.NOT_FOUND]


def test_interrupted_sending_can_be_repeated(project: Path) -> None:
    """Ctrl-C while rows are sent: exit code 130, it says that rows stay, records no load, and a repeat sends all."""
    with serving(project) as (address, _), featserve.connect(address) as client:
        sending = subprocess.Popen(
            command("materialize", "big", "--to", address, "-C", project),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until("a row has arrived", lambda: client.get("bulk", {"user_id": [0]}).status[0, 0] == Status.PRESENT)
        sending.send_signal(signal.SIGINT)
        _, told = sending.communicate(timeout=PATIENCE_S)
        assert sending.returncode == 130, told
        assert "Interrupted. The rows of big@1 that the server has already taken stay." in told
        assert "Traceback" not in told
        assert loads(project) == []
        run("materialize", "big", "--to", address, "-C", project)
        answer = client.get("bulk", {"user_id": list(range(0, BIG_ROWS, 1_000))})
        assert answer.values[:, 0].tolist() == list(range(0, BIG_ROWS, 1_000))
    assert [(load.view, load.rows_read, load.rows_stored) for load in loads(project)] == [("big@1", BIG_ROWS, BIG_ROWS)]


def test_port_in_use_is_said(project: Path) -> None:
    """A port that is taken is one message and exit code 1, and the store is given back."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run("serve", "--port", str(port), "-C", project, code=1)
    assert f"cannot listen on 127.0.0.1:{port}" in refused.stderr
    run("materialize", "score", "-C", project)


def test_terminal_shows_progress(project: Path) -> None:
    """On a terminal a load shows its progress, in colour; what it prints elsewhere stays plain."""
    ours, theirs = os.openpty()
    loading = subprocess.Popen(
        command("materialize", "big", "-C", project),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the end of a terminal that nobody writes to any more
        while more := os.read(ours, 65_536):
            shown += more
    os.close(ours)
    printed, _ = loading.communicate(timeout=PATIENCE_S)
    assert loading.returncode == 0
    assert re.search(r"big@1 .*\x1b\[.* rows/s", shown.decode())
    assert re.search(rf"big@1 +{BIG_ROWS:,} +{BIG_ROWS:,} ", printed)
    assert "\x1b" not in printed
