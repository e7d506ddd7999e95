"""Load tests of a real server, from processes of their own and from the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featserve.errors import Unavailable, UnknownName
from featserve.load_test import (
    Load,
    LoadTest,
    Range,
    Reads,
    Result,
    Writes,
    describe_view,
    run,
)
from featserve.types import Int64, column
from tests.command_line import run as run_verb
from tests.serving import TRANSPORTS, Project, Server

pytest_plugins = ["tests.served"]

READS = Reads("wide", ("user_id",), (Range("user_id", Int64, 1, 1_000),))
BRIEF = ("--rounds", "2", "--round", "0.3", "--warm-up", "0")


@pytest.fixture(scope="module")
def server(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server of these tests alone: they write to it."""
    with Server(Project.make(tmp_path_factory.mktemp("loaded"), **TRANSPORTS[transport])) as server:
        yield server


def stored(server: Server) -> None:
    """Write the rows that the tests ask for."""
    rows = {"user_id": np.arange(1, 1_001)} | {f"f{i}": np.full(1_000, i / 2) for i in range(50)}
    with server.client() as client:
        client.write("numbers", rows, event_time=np.datetime64(time.time_ns() // 1_000, "us"))


def test_a_server_is_measured_by_several_processes(server: Server) -> None:
    """Open and closed loop from two processes, with writes beside: every request is answered and counted once."""
    stored(server)
    expected = describe_view(server.address, "numbers")
    rows = {name: column(type_, np.arange(1, 11).astype(type_.dtype)) for name, type_ in expected.items()}
    loads = (Load(5, None, 3), Load(1, 100.0, 2))
    writes = Writes("numbers", rows, 1_000)
    test = LoadTest(server.address, READS, loads, writes, processes=2, rounds=2, round_s=0.5, warm_up_s=0.2)
    seen: list[tuple[int, float]] = []
    result = run(test, 123, lambda number, part: seen.append((number, part)))
    assert result.started_us == 123
    assert result.found == 1.0
    assert result.service.startswith("wide@1#")
    assert seen == sorted(seen)
    assert seen[-1] == (1, 1.0)
    assert [point.load for point in result.points] == list(loads)
    for point in result.points:
        total, written = point.total(), point.total_writes()
        assert len(point.rounds) == len(point.writes) == 2
        assert total.errors == written.errors == {}
        assert total.latency.count == total.lag.count == total.arrived > 20
        assert written.arrived == pytest.approx(10, abs=10)
    assert result.points[1].total().arrived == pytest.approx(100, abs=50)


def test_what_the_server_refuses_ends_the_test(server: Server) -> None:
    """An unknown service or view, or no server, is one error before any load."""
    test = LoadTest(server.address, replace(READS, service="nosuch"), (Load(1, None, 1),), rounds=1, round_s=0.1)
    with pytest.raises(UnknownName, match="nosuch"):
        run(test, 0)
    with pytest.raises(UnknownName, match="nosuch"):
        describe_view(server.address, "nosuch")
    with pytest.raises(Unavailable):
        run(LoadTest("127.0.0.1:1", READS, (Load(1, None, 1),)), 0)


def test_the_verb_measures_and_compares(server: Server, tmp_path: Path) -> None:
    """The command line measures, says which quantiles it cannot tell, draws, keeps, and compares what it kept."""
    stored(server)
    files: tuple[str | Path, ...] = ("--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    words = ["load-test", "wide", "user_id=1..1000", "--server", server.address, *BRIEF]
    shown = run_verb(*words, *files).stdout
    assert "100 % of a sample have rows" in shown
    assert "+N: it takes N samples more" in shown
    assert (tmp_path / "a.png").stat().st_size > 1_000
    compared = run_verb("load-test", "compare", tmp_path / "a.json", tmp_path / "a.json")
    assert "cannot tell" in compared.stdout
    assert "too few rounds" in compared.stderr
    found = json.loads(run_verb("load-test", "compare", "--json", tmp_path / "a.json", tmp_path / "a.json").stdout)
    assert {c["ratio"] for c in found} == {1.0}


def test_the_verb_draws_from_files(server: Server, tmp_path: Path) -> None:
    """String keys come from a file, integers from ranges and lists; what has no rows is told."""
    (tmp_path / "keys.csv").write_text("country,zip\nNZ,1010\nAT,1020\n")
    words = ["load-test", "--server", server.address, *BRIEF, "--zipf", "1", "ranking", "user_id=1,2,3"]
    shown = run_verb(*words, "--keys-file", tmp_path / "keys.csv")
    assert "3 of user_id" in shown.stdout
    assert "2 of country, zip" in shown.stdout
    assert "measures mostly missing" in shown.stderr


def test_the_verb_offers_rates_from_processes_while_it_writes(server: Server, tmp_path: Path) -> None:
    """Each rate comes from two processes while a file's rows are written; all is in the result, the rows are served."""
    stored(server)
    written = [{"user_id": user} | {f"f{i}": 7.5 for i in range(50)} for user in range(1, 101)]
    (tmp_path / "rows.json").write_text(json.dumps(written))
    writes = ("--write", "numbers", "--write-file", tmp_path / "rows.json", "--write-rate", "1000")
    words = ["load-test", "wide", "user_id=1..1000", "--server", server.address, "--rounds", "2", "--round", "0.5"]
    loads = ("--rate", "40,120", "--batch", "10", "--connections", "4", "--processes", "2", "--warm-up", "0.1")
    shown = run_verb(*words, *loads, *writes, "--json", tmp_path / "a.json").stdout
    assert "processes that send: 2" in shown
    assert shown.count("writes to numbers, 1,000 rows/s") == 2
    result = Result.load(tmp_path / "a.json")
    assert result.settings["processes"] == 2
    assert [point.load for point in result.points] == [Load(10, 40.0, 4), Load(10, 120.0, 4)]
    slow, fast = (point.total() for point in result.points)
    assert slow.arrived == pytest.approx(40, abs=30)
    assert fast.arrived == pytest.approx(120, abs=49)
    for point in result.points:
        assert point.total().errors == point.total_writes().errors == {}
        assert point.total_writes().arrived == pytest.approx(10, abs=9)
    with server.client() as client:
        assert (client.get("wide", {"user_id": np.arange(1, 101)}).values == 7.5).all()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--rate", "fast"], 2, "is not numbers"),
        (["--rate", "0"], 1, "over 0"),
        (["--processes", "0"], 1, "processes"),
        (["--batch", "1,20000"], 1, "the most in one request is 10,000"),
        (["--write", "numbers"], 2, "go together"),
        (["--write", "nosuch", "--write-file", __file__], 1, "nosuch"),
        (["--write", "numbers", "--write-file", __file__], 1, "ends in .py"),
    ],
)
def test_the_verb_refuses_loads_that_are_none(words: list[str], code: int, message: str, server: Server) -> None:
    """A rate, a number of processes or writes that cannot be are one message, and no load."""
    told = run_verb("load-test", "wide", "user_id=1", "--server", server.address, *words, code=code)
    assert message in " ".join(told.stderr.split())
    assert told.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["user_id=1..x"], "whole numbers"),
        (["user_id=5..1"], "no range"),
        (["usr_id=1..5"], "did you mean 'user_id'"),
        ([], "no values for user_id"),
        (["user_id=1", "user_id=2"], "given twice"),
    ],
)
def test_the_verb_refuses_wrong_columns(words: list[str], message: str, server: Server) -> None:
    """A column that is unknown, missing, given twice or no range is one message."""
    assert message in run_verb("load-test", "wide", *words, "--server", server.address, code=1).stderr


def test_the_verb_refuses_a_remote_server() -> None:
    """The command line does not load another machine by accident."""
    words = ["load-test", "wide", "user_id=1..9", "--server", "192.0.2.1:7070"]
    assert "--allow-remote" in run_verb(*words, code=1).stderr


def test_a_server_that_dies_is_counted(start: Callable[..., Server]) -> None:
    """A server that dies under load leaves a result, whose errors say what happened from then on."""
    server = start()

    def kill(number: int, part: float) -> None:
        if part > 0.3 and server.process.poll() is None:
            server.kill()

    loads = (Load(1, 100.0, 2),)
    result = run(LoadTest(server.address, READS, loads, rounds=2, round_s=1, warm_up_s=0), 0, kill)
    total = result.points[0].total()
    assert result.found == 0
    assert set(total.errors) <= {"UNAVAILABLE", "CANCELLED"}
    assert total.errors["UNAVAILABLE"] > 10
    assert total.latency.count > 10
    assert total.latency.count + total.errors.total() == total.arrived
    assert not total.kept_up


def test_the_verb_fails_where_nothing_was_answered(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that dies before the load leaves a result without an answer, which is told as a failure."""
    server, running = start(), import_module("featserve.load_test.run")  # in the package that is a function
    received = running._received

    def receive_and_kill(pipe: Any) -> Any:
        message = received(pipe)  # at first that a process has its connections, and is ready
        if server.process.poll() is None:
            server.kill()
        return message

    monkeypatch.setattr(running, "_received", receive_and_kill)
    words = ["load-test", "wide", "user_id=1..9", "--server", server.address, *BRIEF, "--rate", "50"]
    told = run_verb(*words, "--json", tmp_path / "a.json", code=1)
    assert "not one request was answered" in told.stderr
    total = Result.load(tmp_path / "a.json").points[0].total()
    assert total.errors.total() == total.arrived > 0
