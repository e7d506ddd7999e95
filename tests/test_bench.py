"""What the measurements are built on: the load that they make, the counts that they read, and their verdicts."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest

from bench import counts, grid, h2load, load, overload, project, report, servers
from bench.peers import __main__ as peers
from bench.peers import page, rows, targets
from bench.peers.rounds import KEYS, Cell, Cells, Length
from bench.peers.systems import Client
from featserve.load_test import Histogram

ENTITIES = 2_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a loaded project of few entities."""
    made = tmp_path_factory.mktemp("bench")
    project.make(made, ENTITIES)
    project.materialize(made)
    return made


@pytest.fixture
def address(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a server, with the [server] settings that the test asks for."""
    settings = getattr(request, "param", "")
    (folder / "featserve.toml").write_text(f"[server]\nport = 0\n{settings}", encoding="utf-8")
    with servers.ours(folder) as server:
        yield server.address


def test_load_is_answered(address: str) -> None:
    """Every connection of the closed loop gets answers, one after the other, as do those of h2load's loops."""
    load.warm(address, ENTITIES, at_once=500)
    measured = load.run(address, 10, entities=ENTITIES, requests=200, connections=3)
    assert measured.requests >= 200
    assert 0 < measured.p50_us <= measured.p99_us
    body = next(load.bodies(10, ENTITIES, 1))
    answer_bytes = overload.bytes_of_answer(address, body)
    for rate, calls in ((None, 1), (None, 4), (100.0, 1)):
        loaded = h2load.run(address, body, seconds=0.5, warm_up_s=0.5, connections=3, calls=calls, rate=rate)
        assert 0 < len(loaded.taken_us) < loaded.ended <= loaded.started
        assert loaded.answered(answer_bytes) == pytest.approx(loaded.ended, abs=3 * calls)
    assert loaded.started == pytest.approx(100, abs=20)


def test_requests_that_end_are_all_answered(address: str) -> None:
    """Connections that have come to the end of their messages have all answers, and can be given others."""
    messages = load.bodies(10, ENTITIES, 1)
    opened = [load.Http2Connection(address, iter(())) for _ in range(3)]
    for count in (2, 7):
        asked = islice(messages, count)
        for connection in opened:
            connection.messages = asked
        assert load.keep_busy(opened, lambda answered, _, count=count: answered >= count) > 0  # type: ignore[misc]
    assert sum(len(connection.latencies_s) for connection in opened) == 9
    assert load.drive(opened, lambda answered, _: answered >= 0) > 0


@pytest.mark.slow
def test_a_grid_of_rows_and_features_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of rows and features is asked for with warm caches and with cold ones, and all are answered."""
    for name, value in {"ENTITIES": ENTITIES, "ROUNDS": 1, "SECONDS": 0.2, "ROWS": (1, 100)}.items():
        monkeypatch.setattr(grid, name, value)
    figures = grid.measure(tmp_path)
    assert [figure.name for figure in figures] == [
        f"{cache}, {rows} x {width} features"
        for cache, width, rows in product(("warm", "cold"), grid.WIDTHS, ("1 row", "100 rows"))
    ]
    assert min(figure.value for figure in figures) > 0
    assert not any("errors" in figure.note for figure in figures)


@pytest.mark.parametrize("address", ["max_concurrent = 1\n"], indirect=True)
def test_refusals_are_told_from_answers(address: str) -> None:
    """A server that may have one call under way refuses some of many; what h2load took for answers is told apart."""
    body = next(load.bodies(300, ENTITIES, 1))
    loaded = h2load.run(address, body, seconds=1.0, rate=1_000.0)
    assert loaded.started == pytest.approx(1_000, abs=150)
    assert 0 < loaded.answered(overload.bytes_of_answer(address, body)) < loaded.ended
    with pytest.raises(h2load.NotLoaded, match="did not load"):
        h2load.run("127.0.0.1:1", body, seconds=0.1)


def test_a_wait_in_the_client_counts_since_a_call_was_due() -> None:
    """Of 10 a second the n-th is due n tenths after the first: what is sent later has waited, what is early has not.

    What was sent is what ended and what can be under way, of what was started.
    """
    sent_us = np.array([0, 900_000, 150_000, 190_000])
    loaded = h2load.Loaded(1.0, np.full(4, 5), sent_us, 0, started=10, ended=4, message_bytes=0)
    assert loaded.since_due_us(10.0).tolist() == pytest.approx([5, 600_005, 50_005, 5])
    assert [loaded.sent(at_once) for at_once in (3, 100)] == [7, 10]


def test_a_tail_is_bounded_without_knowing_whose_it_is() -> None:
    """A quantile of any part of some latencies is at most what is told, and that is the one of the slowest."""
    taken = np.random.default_rng(1).permutation(10_000)
    for of, quantile in product((99, 1_000, 10_000), (0.9, 0.99)):
        bound = h2load.at_most(taken, of, quantile)
        assert np.quantile(np.sort(taken)[-of:], quantile, method="inverted_cdf") == bound
        assert np.quantile(taken[:of], quantile, method="inverted_cdf") <= bound


def test_a_client_takes_orders(folder: Path, address: str) -> None:
    """A client of the comparison answers the values that were written, and as many calls as were ordered."""
    client = Client(sys.executable, "featserve_grpc", address)
    try:
        assert client.tell({"check": [0, 7, 1_999]}) == rows.read(folder)[[0, 7, 1_999]].tolist()
        order = {"measure": 5, "entities": ENTITIES, "connections": 2, "calls": 20, "seconds": 0.1, "patience_s": 30}
        found = client.tell(order)
        assert len(found["taken_ns"]) >= 20
        assert found["seconds"] >= 0.1
        assert len(client.tell(order | {"calls": 10**9, "patience_s": 0.2})["taken_ns"]) < 10_000
    finally:
        client.close()


def test_versions_tell_the_server_from_its_client() -> None:
    """The version of the Redis that is asked stands beside those of packages, of which redis-py is its client."""
    told = peers.versions()
    assert {"feast", "redis-py", "redis-server"} <= told.keys()
    assert all(re.match(r"\d+\.\d+", version) for version in told.values())


def test_redis_commands_hold_their_rows() -> None:
    """A command that is laid out as an array is the one that a client would send."""
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    parts = [b"HSET", b"hash:0000000", *(part for i in range(3) for part in (b"f%d" % i, b"\0" * 4))]
    expected = [b"HSET", b"hash:0000012", *(part for i in range(3) for part in (b"f%d" % i, values[1, i].tobytes()))]
    template = rows.command(parts)
    at = rows.places(template, values.shape[1])
    assert rows.filled(template, at, values, 11)[len(template) :] == rows.command(expected)


DUMP = """\
fn=(1) main
cfn=(2) malloc
calls=3 0
cfn=(3) free
calls=9 0
fn=(4) _other
cfn=(2)
calls=4 0
cfn=(5) realloc
calls=1 0
totals: 1234
"""


def test_counts_are_read(tmp_path: Path) -> None:
    """Of a dump, the total and the calls of allocators are read, of functions that are named once."""
    (tmp_path / "dump").write_text(DUMP)
    assert counts.instructions(tmp_path / "dump") == 1234
    assert counts.allocations(tmp_path / "dump") == 8


@pytest.mark.parametrize(
    ("instructions", "allocations", "worse"),
    [(1_029, 10, 0), (1_031, 10, 1), (1_000, 11, 1), (500, 5, 0), (2_000, 20, 2)],
)
def test_a_dearer_request_is_told(instructions: int, allocations: int, worse: int) -> None:
    """Over 3 % more instructions, or one more allocation, are each told; fewer are not."""
    baseline = {"one": {"instructions": 1_000, "allocations": 10}}
    counted = {"one": {"instructions": instructions, "allocations": allocations}}
    assert len(counts.compare(counted, baseline)) == worse
    assert counts.compare(counted, {}) == ["one: no baseline"]


def run_counts(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str, instructions: int = 0) -> int:
    """Run what ``make counts`` does, with a baseline in ``folder``, as if that many instructions had been counted."""
    counted = {"one": {"instructions": instructions, "allocations": 10}}
    monkeypatch.setattr(counts, "ROOT", folder)
    monkeypatch.setattr(counts, "BASELINE", folder / "counts.json")
    monkeypatch.setattr(counts, "count", lambda: counted)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("sys.argv", ["counts", *words])
    return counts.main()


@pytest.mark.parametrize(("words", "code"), [([], 1), (["--may-skip"], 0)])
def test_a_python_without_a_baseline_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], code: int
) -> None:
    """Where there is nothing to compare with, that is said, and fails unless it may be: no change passes unseen."""
    (tmp_path / "counts.json").write_text('{"CPython 2.7 vax": {}}')
    assert run_counts(tmp_path, monkeypatch, *words) == code
    assert re.match(r"Not counted: no baseline for \w+ 3\.\d+ \w+, only for CPython 2\.7 vax;", capsys.readouterr().out)


@pytest.mark.parametrize(("instructions", "code"), [(1_029, 0), (1_031, 1)])
def test_a_dearer_request_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instructions: int, code: int) -> None:
    """What was accepted is the baseline; the exit code says whether what is counted then is within it."""
    assert run_counts(tmp_path, monkeypatch, "--accept", instructions=1_000) == 0
    assert run_counts(tmp_path, monkeypatch, instructions=instructions) == code


def test_a_tail_is_held_against_what_can_be_told() -> None:
    """Our p99 is compared with Feast's, or a lower quantile where it has too few calls; without a p99, with none."""
    ours, theirs = Cell(), Cell()
    cells: Cells = {(targets.NATIVE, 1, 8): ours, (targets.FEAST, 1, 8): theirs}
    ours.add([1_000_000] * 9_999, 1.0)
    theirs.add([100_000_000] * 199, 1.0)
    assert [figure.name.partition(" ")[0] for figure in targets.figures(cells)] == ["answers/s"]
    ours.add([1_000_000], 1.0)
    assert [figure.name.partition(" ")[0] for figure in targets.figures(cells)] == ["answers/s"]
    for quantile, calls in (("p50", 200), ("p90", 1_000), ("p99", 10_000)):
        theirs.add([100_000_000] * (calls - theirs.latency.count), 1.0)
        (tail,) = (figure for figure in targets.figures(cells) if figure.name.startswith("p99"))
        assert f"to the {quantile} of" in tail.name
        assert tail.value == pytest.approx(0.01, rel=0.01)


def test_ratios_and_page_come_from_the_cells(tmp_path: Path) -> None:
    """A ratio that meets its target passes, one that was not measured is left out, and the page holds what was."""
    cells: Cells = {}
    for name, taken_ns in ((targets.HERE, 10_000), (targets.BLOBS, 100_000), (targets.FEAST, 5_000_000)):
        for keys in KEYS:
            cells[name, keys, 1] = cell = Cell()
            cell.add([taken_ns] * 20_000, 1.0)
    found = targets.figures(cells)
    assert [figure.verdict for figure in found] == ["PASS", "PASS"]
    assert found[0].value == pytest.approx(0.1)
    machine = {"at": "now", "cpus": 2, "cpu": "fast", "python": "3.11", "load_average": (0.1,), "commit": "0123abcdef"}
    machine["stolen"] = 0.042
    told = {"machine": machine, "versions": {"redis": "7"}, "missing": {"Feast, HTTP": "no such package"}}
    path = page.write(tmp_path, cells, found, told | {"entities": 9, "feast_entities": 3}, Length(1, 1, 1, 1))
    text = path.read_text(encoding="utf-8")
    assert "\n| featserve, in process | 10.0 / " in text
    assert "**Not measured: Feast, HTTP.** no such package" in text
    assert "commit 0123abcde, on 2 CPUs" in text
    assert "4.2 % of the processors stolen" in text
    assert (tmp_path / page.PLOT).stat().st_size > 1_000


def test_what_is_kept_names_its_commit_and_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is shown later of a benchmark says when it ran, of which commit and with what changes, and where."""
    path, machine = tmp_path / "latest.json", report.until_now(report.machine())
    assert 0 <= machine["stolen"] <= 1
    for changed, told in ((True, ", with changes;"), (False, ";")):
        report.keep("one", "One", [report.Figure("rate", 5.0, "req/s", 4.0)], machine | {"changed": changed}, path)
        report.show_kept(path)
        shown = capsys.readouterr().out
        assert f"{machine['at'][:16]} UTC, commit {machine['commit'][:9]}{told} {machine['cpus']} CPUs, " in shown
        assert re.search(r"rate +5\.00 req/s +>= 4\.00 +PASS", shown)


def test_a_tail_of_few_samples_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A p99 of fewer than 10,000 samples is shown as not told, and meets no target."""
    latency = Histogram()
    for _ in range(9_999):
        latency.record(1_000)
    assert np.isnan([report.p99_us(latency), report.told_p99(1.0, latency.count)]).all()
    report.show("Tail", [report.Figure("p99", report.p99_us(latency), "us", 2.0, at_most=True)])
    assert re.search(r"p99 +not told +<= 2\.00 +MISS", capsys.readouterr().out)
    latency.record(1_000)
    assert [report.p99_us(latency), report.told_p99(1.0, latency.count)] == pytest.approx([1.0, 1.0], rel=0.01)
