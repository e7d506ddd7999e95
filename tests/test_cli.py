"""The command line: what each verb prints, what it exits with.

Here verbs run in this process; what is signalled, locked or served is in test_cli_processes.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import featserve
from featserve.batch import EventBatch
from featserve.cli import VERBS, main, verbs
from featserve.cli.columns import read_columns
from featserve.cli.load import portions
from featserve.cli.show import age, size
from featserve.errors import InvalidRequest
from featserve.types import Bool, Bytes, Float32, Int64, String, Timestamp, Type, Vector, column
from tests.command_line import DEFINITIONS, NOW, declare, run, write_data


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a project whose small views are loaded, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("project")
    declare(folder)
    write_data(folder)
    run("apply", "-C", folder)
    run("materialize", "score", "area", "-C", folder)
    return folder


@pytest.fixture
def own(loaded: Path, tmp_path: Path) -> Path:
    """Copy the project, for a test that changes it."""
    return shutil.copytree(loaded, tmp_path / "own")


def answers(*words: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run("get", *words, "--json").stdout.splitlines()]


FRAUD = ("fraud", "user_id=1,2,3,4", "country=NZ", 'zip=["1010","a,b","1010","?"]')


def test_statuses_are_told(loaded: Path) -> None:
    """JSON tells present, null, expired and missing values apart, gives defaults, and ages that fit the event times."""
    rows = answers(*FRAUD, "-C", loaded)
    assert [row["statuses"]["score.risk"] for row in rows] == ["PRESENT", "NULL", "EXPIRED", "NOT_FOUND"]
    assert [row["values"]["score.risk"] for row in rows] == [0.1, None, None, None]
    assert [row["values"]["area.name"] for row in rows] == ["Auckland \x1b[31m", "nowhere"] * 2
    assert [row["statuses"]["area.name"] for row in rows] == ["PRESENT", "NULL", "PRESENT", "NOT_FOUND"]
    assert rows[1]["values"]["area.rent"] == "Infinity"
    assert rows[1]["values"]["area.shape"] == ["NaN"] * 6
    assert rows[0]["values"]["score.tag"] == "0x0061"
    assert rows[0]["values"]["score.seen"] == NOW.isoformat().replace("+00:00", "Z")
    view = rows[2]["views"]["score@1"]
    assert view["event_time"] == (NOW - timedelta(days=3)).isoformat().replace("+00:00", "Z")
    elapsed = (datetime.now(UTC) - NOW + timedelta(days=3)).total_seconds()
    assert elapsed - 60 < view["age_seconds"] <= elapsed
    assert rows[3]["views"]["score@1"] == {"status": "NOT_FOUND", "event_time": None, "age_seconds": None}


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_get_is_readable_at_every_width(loaded: Path, columns: int) -> None:
    """Nothing is wider than the terminal, every value and reason is there, and no stored byte acts on the terminal."""
    text = run("get", *FRAUD, "-C", loaded, columns=columns).stdout
    assert max(map(len, text.splitlines())) <= columns
    assert all(word in text for word in ("0.1", "NULL", "EXPIRED", "NOT_FOUND", "Infinity", "nowhere", "400 d", "3 d"))
    assert "\x1b" not in text
    assert text.count("user_id=") == (0 if columns == 200 else 4)


def test_as_of_is_the_instant_asked_for(loaded: Path) -> None:
    """An earlier instant brings an expired row back, hides one that came later, and one after the clock is refused."""
    before = (NOW - timedelta(days=2)).isoformat()
    rows = answers(*FRAUD, "--as-of", before, "-C", loaded)
    assert [row["statuses"]["score.risk"] for row in rows] == ["NOT_FOUND", "NOT_FOUND", "PRESENT", "NOT_FOUND"]
    assert rows[2]["views"]["score@1"]["age_seconds"] == 86_400
    refused = run("get", *FRAUD, "--as-of", "2100-01-01", "-C", loaded, code=1)
    assert "as_of: 2100-01-01 00:00:00+00:00 is after the clock" in refused.stderr


def test_keys_come_from_files(loaded: Path, tmp_path: Path) -> None:
    """CSV, JSON, JSON lines and Parquet give the same answers, other columns are ignored, and a word adds a column."""
    rows = [{"user_id": i, "zip": z, "other": "x"} for i, z in ((1, "1010"), (2, "a,b"))]
    files = [tmp_path / name for name in ("a.csv", "b.json", "c.json", "d.json", "e.parquet")]
    files[0].write_text('zip,other,user_id\n1010,x,1\n"a,b",x,2\n')
    files[1].write_text(json.dumps(rows))
    files[2].write_text("\n".join(map(json.dumps, rows)))
    files[3].write_text(json.dumps({name: [row[name] for row in rows] for name in rows[0]}))
    pq.write_table(pa.Table.from_pylist(rows), files[4])
    as_of = ("--as-of", NOW.isoformat())
    asked = answers("fraud", "user_id=1,2", "country=NZ", 'zip=["1010","a,b"]', *as_of, "-C", loaded)
    for file in files:
        assert answers("fraud", "country=NZ", "--keys-file", file, *as_of, "-C", loaded) == asked, file


EXPECTED = {"i": Int64, "s": String, "b": Bool, "t": Timestamp, "y": Bytes, "f": Float32, "v": Vector(2)}


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("i=-5,7", [-5, 7]),
        ("s=a,,é", ["a", "", "é"]),
        ('s=["a,b", "[", ""]', ["a,b", "[", ""]),
        ("s=a=b", ["a=b"]),
        ("b=true,FALSE", [True, False]),
        ("t=2026-01-31T12:00:00Z,2026-01-31", [datetime(2026, 1, 31, 12, tzinfo=UTC), datetime(2026, 1, 31)]),
        (f"y=0x00ff,base64:{base64.b64encode(b'a,').decode()}", [b"\x00\xff", b"a,"]),
        ("f=1e3,nan", [1000.0, float("nan")]),
        ("v=[1, 2.5]", [[1, 2.5]]),
        ("v=[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ("i=[1, null]", [1, None]),
    ],
)
def test_words_are_values(word: str, values: list[Any]) -> None:
    """Each type is read as documented, and is then a column of that type."""
    name = word.partition("=")[0]
    found = read_columns([word], None, EXPECTED)[name]
    assert repr(found) == repr(values)
    assert len(column(EXPECTED[name], found)) == len(values)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("i=1.5", "i[0]: expected int64, got '1.5'"),
        ("i=1,x", "i[1]: expected int64, got 'x'"),
        ("i=", "i[0]: expected int64, got ''"),
        ("b=1", "expected bool (true or false), got '1'"),
        ("t=noon", "expected timestamp (as in 2026-01-31T12:00:00Z), got 'noon'"),
        ("y=ff", "expected bytes (0x and hex digits, or base64: and base64), got 'ff'"),
        ("s=[a", "'[a' starts as a JSON list and is none"),
        ("v=1", "expected vector[2], got '1'"),
        ("ii=1", "unknown column 'ii'; did you mean 'i'?"),
        ("i", "'i' is not NAME=VALUE; the columns are i, s, b"),
    ],
)
def test_words_that_are_no_values_are_refused(word: str, message: str) -> None:
    """What is not plainly a value of its type is an error that names the column, the row and the spelling."""
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        read_columns([word], None, EXPECTED)


def test_portions_fit_the_messages(rng: np.random.Generator) -> None:
    """A batch is cut in order into parts within both limits, but for single rows that are longer on their own."""
    types: dict[str, Type] = {"k": Int64, "s": String, "v": Vector(3)}
    lengths = rng.choice([0, 10, 500, 3_000], 300)
    columns = {
        "k": column(Int64, np.arange(300)),
        "s": column(String, ["x" * n for n in lengths]),
        "v": column(types["v"], rng.random((300, 3)).astype("f4")),
    }
    times = rng.integers(0, 1_000, 300)
    parts = list(portions(EventBatch(columns, times, times + 1, np.arange(300)), 20, 2_000))
    assert [len(text) for part in parts for text in part.columns["s"].to_list()] == lengths.tolist()
    assert np.concatenate([part.source_positions for part in parts]).tolist() == list(range(300))
    for part in parts:
        rows = len(part.event_time_us)
        taken = sum(len(text) for text in part.columns["s"].to_list()) + rows * (24 + 8 + 4 + 12)
        assert rows == 1 or (rows <= 20 and taken <= 2_000)


def test_plan_and_apply_follow_the_definitions(tmp_path: Path) -> None:
    """A plan states and exits with what is to be done, an apply does it once, and a conflict is refused by both."""
    declare(tmp_path)
    here = ("-C", tmp_path)
    assert "Plan: 8 to create." in run("plan", *here).stdout
    assert not (tmp_path / ".featserve").exists()
    run("plan", "--detailed-exitcode", *here, code=2)
    assert "Applied: 8 created. The registry is at revision 8." in run("apply", *here).stdout
    assert "Nothing to change: revision 8" in run("plan", "--detailed-exitcode", *here).stdout
    assert "Nothing to change: revision 8" in run("apply", *here).stdout
    declare(tmp_path, DEFINITIONS.replace('owner="risk"', 'owner="fraud team"'))
    update = run("apply", *here).stdout
    assert "~ update   feature view        score@1\n      owner: 'risk' -> 'fraud team'" in update
    declare(tmp_path, DEFINITIONS.replace("days=2", "days=1"))
    for verb in ("plan", "apply"):
        refused = run(verb, *here, code=1)
        assert "ttl: 2 days, 0:00:00 -> 1 day, 0:00:00" in refused.output
        assert "undo the edit, or raise version=" in refused.stderr
    history = json.loads(run("history", "score", "--json", *here).stdout)
    assert [entry["action"] for entry in history] == ["created", "updated"]
    assert "owner: 'risk' -> 'fraud team'" in run("history", *here).stdout


@pytest.mark.parametrize("verb", ["list", "describe", "status", "history"])
def test_inventory_is_readable_and_complete(loaded: Path, verb: str) -> None:
    """At 80 columns nothing is wider, and every definition is named; without a terminal there is no colour."""
    text = run(verb, "-C", loaded, columns=80).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    named = {"score@1", "area@1", "clicks@1"} | (set() if verb == "status" else {"fraud@1", "user", "place"})
    assert all(name in text for name in named), text


def test_json_is_complete(loaded: Path) -> None:
    """What a program needs to know of definitions and loads is in the JSON."""
    listed = json.loads(run("list", "--json", "-C", loaded).stdout)
    assert [(s["name"], s["promoted"], s["keys"]) for s in listed["services"]] == [
        ("bulk", True, ["user_id"]),
        ("fraud", True, ["user_id", "country", "zip"]),
    ]
    service = json.loads(run("describe", "fraud@1", "--json", "-C", loaded).stdout)
    assert service["keys"] == {"user_id": "int64", "country": "string", "zip": "string"}
    assert [f["name"] for f in service["features"]][3:] == ["area.rent", "area.name", "area.shape"]
    assert [f["view"] for f in service["features"]][2:4] == ["score@1", "area@1"]
    view = json.loads(run("describe", "score", "--json", "-C", loaded).stdout)
    assert (view["kind"], view["ttl_us"], view["features"][0]["max"]) == ("feature_view", 172_800_000_000, 1.0)
    status = json.loads(run("status", "--json", "--count", "-C", loaded).stdout)
    assert status["views"]["score@1"]["last_load"]["rows_read"] == 4
    assert [status["views"][name]["rows"] for name in ("score@1", "area@1", "big@1")] == [3, 2, 0]
    assert status["store"]["held"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("get", "froud", "user_id=1"), "unknown feature service 'froud'; did you mean 'fraud'?"),
        (("get", "fraud@7", "user_id=1"), "unknown feature service 'fraud@7'; did you mean 'fraud@1'?"),
        (("get", "fraud", "usr=1"), "unknown column 'usr'"),
        (("get", "fraud", "user_id=1"), "missing key column 'country' (string); missing key column 'zip' (string)"),
        (("get", "fraud", "user_id=1,2", "country=A,B,C", "zip=1"), "user_id has 2, country has 3"),
        (("describe", "scor"), "unknown service, view, transform or entity 'scor'; did you mean 'score'?"),
        (("describe", "score@3"), "unknown version 'score@3'; did you mean 'score@1'?"),
        (("history", "scor"), "unknown definition 'scor'; did you mean 'score'?"),
        (("materialize", "clicks"), "clicks@1 has no source"),
        (("materialize", "scores"), "unknown feature view 'scores'; did you mean 'score'?"),
        (("materialize", "--as-of", "2100-01-01"), "as_of: 2100-01-01 00:00:00+00:00 is after the clock"),
        (("list", "--server", "127.0.0.1:1"), "Is the server running there? `featserve serve` starts one."),
    ],
)
def test_errors_are_one_message(loaded: Path, words: tuple[str, ...], message: str) -> None:
    """What the library refuses is one message on standard error that says what there is, and exit code 1."""
    result = run(*words, "-C", loaded, code=1)
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("get",), "Missing argument 'SERVICE'"),
        (("get", "fraud"), "Name the entities: KEY=VALUE for user_id int64, country string, zip string."),
        (("get", "fraud", "--as-of", "noon"), "'noon' is not a time as in 2026-01-31 or"),
        (("get", "fraud", "--server", "7070"), "'7070' is not HOST:PORT"),
        (("get", "fraud", "--server", "127.0.0.1:70000"), "'127.0.0.1:70000' is not HOST:PORT"),
        (("get", "fraud", "--server", "http://127.0.0.1:7070"), "'http://127.0.0.1:7070' is not HOST:PORT"),
        (("get", "fraud", "--keys-file", "none.csv"), "File 'none.csv' does not exist"),
        (("serve", "--port", "70000"), "70000 is not in the range"),
        (("materialise",), "No such command 'materialise'"),
    ],
)
def test_wrong_command_lines_are_usage_errors(loaded: Path, words: tuple[str, ...], message: str) -> None:
    """A wrong command line is exit code 2 and says what is wrong with it."""
    at = () if words[0] == "materialise" else ("-C", loaded)
    assert message in run(*words, *at, code=2).stderr


def test_each_step_names_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a project, a registry, a definition or a store, the error names the command that makes it."""
    assert f"`featserve init {tmp_path}`" in run("plan", "-C", tmp_path, code=1).stderr
    declare(tmp_path)
    monkeypatch.setenv("FEATSERVE_PROJECT", str(tmp_path))
    for words in (("list",), ("status",), ("materialize",), ("get", "fraud", "user_id=1")):
        assert "`featserve apply` makes it" in run(*words, code=1).stderr
    run("apply")
    assert "load one with `featserve materialize`" in run("get", "bulk", "user_id=1", code=1).stderr
    assert "none yet: `featserve materialize` makes it" in run("status").stdout


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, loaded: Path) -> None:
    """An error that is no featserve error is a bug, and is not hidden behind a message."""

    def fail(folder: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(verbs, "settings", fail)
    assert isinstance(CliRunner().invoke(main, ["plan", "-C", str(loaded)]).exception, ZeroDivisionError)


def test_every_verb_has_help_with_an_example() -> None:
    """``--help`` of each verb says what it does, shows an example, and fits 100 columns."""
    for verb in VERBS:
        text = CliRunner().invoke(main, [verb, "--help"]).stdout
        assert re.search(rf"Examples?:\n +featserve {verb} ?", text), text
        assert max(map(len, text.splitlines())) <= 100
    assert run("--version").stdout == f"featserve {featserve.__version__}\n"


def test_the_list_of_verbs_loads_none() -> None:
    """What ``featserve --help`` says of a verb is what the verb says, and takes loading neither it nor the library."""
    for name, (_, _, what) in VERBS.items():
        verb = main.get_command(click.Context(main), name)
        assert verb is not None
        assert (verb.name, verb.get_short_help_str(100)) == (name, what)
    script = (
        "import sys; from featserve.cli import main; main(['--help'], standalone_mode=False); "
        "sys.exit(str({'numpy', 'grpc', 'pyarrow', 'sqlalchemy', 'rich'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert ended.stderr == "set()\n"
    assert all(f"  {name} " in ended.stdout for name in VERBS)


def test_a_bad_source_keeps_no_other_from_loading(own: Path) -> None:
    """A view whose file is at fault is told with file and column, the others are loaded, and the exit code is 1."""
    (own / "data" / "area.parquet").write_bytes(b"not Parquet")
    result = run("materialize", "area", "score", "-C", own, code=1)
    assert re.search(r"score@1 +4 +3 ", result.stdout)
    assert "area.parquet: cannot be read as Parquet" in result.stderr


VERSIONS = """
from featserve import Entity, FeatureService, FeatureView, Field, Int64, ParquetSource

user = Entity("user", {"user_id": Int64})


def view(name, version):
    source = ParquetSource(f"{name}{version}.parquet", event_time="at")
    return FeatureView(name, user, [Field("n", Int64)], source=source, version=version)


unread1, a1, b1, b2, c1, old = view("unread", 1), view("a", 1), view("b", 1), view("b", 2), view("c", 1), view("old", 1)
first1 = FeatureService("first", [a1, b1, old])
second1 = FeatureService("second", [b1])
"""
NEXT_VERSIONS = """
unread2, a2, c2 = view("unread", 2), view("a", 2), view("c", 2)
first2 = FeatureService("first", [a2, b2, c1], version=2)
"""


def loads(folder: Path, code: int = 0) -> tuple[list[str], str]:
    """Return the views that were loaded, and what was told beside."""
    result = run("materialize", "-C", folder, code=code)
    return [line.split()[0] for line in result.stdout.splitlines() if "@" in line], result.stderr


def test_which_versions_are_loaded(tmp_path: Path) -> None:
    """Of each view the latest version is loaded, and what services read; what is over may lose its files."""
    at = pa.array([NOW], pa.timestamp("us", "UTC"))
    for name in ("unread1", "unread2", "a1", "a2", "b1", "b2", "c1", "c2", "old1"):
        pq.write_table(pa.table({"user_id": [1], "at": at, "n": [1]}), tmp_path / f"{name}.parquet")
    declare(tmp_path, VERSIONS)
    run("apply", "-C", tmp_path)
    declare(tmp_path, VERSIONS + NEXT_VERSIONS)
    run("apply", "-C", tmp_path)
    assert loads(tmp_path) == (["a@1", "a@2", "b@1", "b@2", "c@1", "c@2", "old@1", "unread@2"], "")
    (tmp_path / "unread1.parquet").unlink()
    (tmp_path / "a1.parquet").unlink()
    loaded, told = loads(tmp_path)
    assert loaded == ["a@2", "b@1", "b@2", "c@1", "c@2", "old@1", "unread@2"]
    assert told == "Left out: a@1; its files are gone, and only services with a later version read it.\n"
    for name in ("b1", "c1", "old1", "unread2"):
        (tmp_path / f"{name}.parquet").unlink()
    loaded, told = loads(tmp_path, code=1)
    assert loaded == ["a@2", "b@2", "c@2"]
    assert all(f"source of {name}: no file matches" in told for name in ("b@1", "c@1", "old@1", "unread@2"))
    assert "source of a@1: no file" in run("materialize", "a@1", "-C", tmp_path, code=1).stderr


def test_loading_again_changes_no_answer(own: Path) -> None:
    """A second load of the same files gives the same answers, to the last field."""
    words = (*FRAUD, "--as-of", NOW.isoformat(), "-C", own)
    first = answers(*words)
    assert re.search(r"score@1 +4 +3 ", run("materialize", "score", "area", "-C", own).stdout)
    assert answers(*words) == first


def test_words_for_sizes_and_ages() -> None:
    """Ages and sizes are said by their greatest units."""
    second = 1_000_000
    ages = {0: "under 1 s", 59: "59 s", 60: "1 min", 3_661: "1 h 1 min", 90_000: "1 d 1 h", 86_400 * 4_000: "4,000 d"}
    assert {n: age(n * second) for n in ages} == ages
    assert [size(n) for n in (0, 999, 1_000, 123_456_789, 10**13)] == [
        "0 bytes", "999 bytes", "1.0 kB", "123.5 MB", "10,000.0 GB"
    ]  # fmt: skip
