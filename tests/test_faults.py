"""Killed, full, damaged, locked: whatever happens, what was acknowledged stays, and errors say what to do."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import featserve
from featserve.config import Config, load_config
from featserve.errors import RegistryError, ServingError, StoreError, StoreLocked
from featserve.server.app import run
from tests.disk import SmallDisk
from tests.server.messages import numbers, read_error, refusal, wide
from tests.serving import PATIENCE_S, ROOT, TRANSPORTS, Project, Server, until

pytest_plugins = ["tests.served"]

GROUP = 40
"""Rows in one write of the writers below: all of one value, and written all or none."""


class Writer(threading.Thread):
    """Writes groups of users until the server is gone.

    ``groups`` holds the value acknowledged last and the value attempted last: a group has one or the other.
    """

    def __init__(self, server: Server, groups: dict[int, tuple[int, int]]) -> None:
        super().__init__()
        self._server, self._groups = server, groups
        self.acknowledged = 0
        self.code: grpc.StatusCode | None = None

    def run(self) -> None:
        with self._server.stub() as stub:
            while self.code is None:
                for group, (acknowledged, attempted) in self._groups.items():
                    value = attempted + 1
                    self._groups[group] = (acknowledged, value)
                    call = stub.WriteRows.future(numbers(users_of(group), value), timeout=PATIENCE_S)
                    if call.code() is not grpc.StatusCode.OK:
                        self.code = call.code()
                        break
                    self._groups[group] = (value, value)
                    self.acknowledged += 1


def users_of(group: int) -> range:
    return range(group * GROUP, (group + 1) * GROUP)


def check_groups(project: Project, groups: dict[int, tuple[int, int]]) -> None:
    """Check that each group has the value acknowledged last, or the one attempted after it, in all of its rows.

    What is found is known from then on, as if it had been acknowledged.
    """
    with featserve.open(project.folder, write=True) as embedded:
        for group, (acknowledged, attempted) in groups.items():
            values = embedded.get("wide", {"user_id": users_of(group)}).values - np.arange(50, dtype=np.float32)
            found = {None if np.isnan(value) else int(value) for value in values.ravel()}
            assert len(found) == 1, f"group {group} is there in part: {found}"
            value = found.pop()
            assert value in ((acknowledged or None), attempted), f"group {group}: acknowledged {acknowledged}"
            groups[group] = (value or 0, attempted)


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_server_keeps_what_it_acknowledged(
    transport: str, tmp_path: Path, rng: np.random.Generator, kills: int
) -> None:
    """A server killed in the middle of writes, again and again, loses no row that it acknowledged, and starts again."""
    project = Project.make(tmp_path, **TRANSPORTS[transport])
    parts: list[dict[int, tuple[int, int]]] = [{i * 3 + part: (0, 0) for i in range(10)} for part in range(3)]
    for _ in range(kills):
        with Server(project) as server:
            writers = [Writer(server, groups) for groups in parts]
            for writer in writers:
                writer.start()
            enough = int(rng.integers(60))
            until("rows are written", lambda: sum(w.acknowledged for w in writers) > enough)  # noqa: B023
            server.kill()
            for writer in writers:
                writer.join(PATIENCE_S)
            assert {writer.code for writer in writers} == {grpc.StatusCode.UNAVAILABLE}
        for groups in parts:
            check_groups(project, groups)


BULK = """
from featserve import Entity, FeatureService, FeatureView, Field, Float64, Int64, ParquetSource

user = Entity("user", {"user_id": Int64})
bulk = FeatureView("bulk", user, [Field("value", Float64)], source=ParquetSource("bulk.parquet", event_time="at"))
wide = FeatureService("wide", [bulk], dtype=Float64)
"""
MATERIALIZE = """
import sys, featserve
with featserve.open(sys.argv[1], write=True) as project:
    print("opened", flush=True)
    project.materialize("bulk")
"""


@pytest.mark.slow
def test_a_killed_load_is_there_whole_or_not_at_all(tmp_path: Path, rng: np.random.Generator) -> None:
    """A process killed while it loads leaves the old values or the new ones, never some, and no files behind."""
    project = Project.make(tmp_path, BULK)
    users = np.arange(100_000)
    before = 0
    for attempt in range(1, 13):
        at = pa.array(np.full(len(users), attempt), pa.timestamp("us"))
        table = pa.table({"user_id": users, "value": users + attempt / 256, "at": at})
        pq.write_table(table, tmp_path / "bulk.parquet")
        with subprocess.Popen(
            [sys.executable, "-c", MATERIALIZE, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
        ) as loading:
            assert loading.stdout is not None
            assert loading.stdout.readline() == b"opened\n"
            try:
                loading.wait(float(rng.random()) * 0.8)
            except subprocess.TimeoutExpired:
                loading.kill()
        with featserve.open(tmp_path, write=True) as embedded:
            found = embedded.get("wide", {"user_id": users}).values[:, 0]
        loads = {round(value * 256) for value in (np.nan_to_num(found) - users * (not np.isnan(found[0]))).tolist()}
        assert loads in ({before}, {attempt}), f"seen: {loads}"
        before = loads.pop()
        assert list(project.store.parent.glob(".store*")) == []


def test_a_full_disk(transport: str, tmp_path: Path, small_disk: SmallDisk) -> None:
    """A write that finds no space is refused with what to do; reads go on, and with space nothing is missing."""
    project = Project.make(tmp_path / "project", **TRANSPORTS[transport])
    project.configure(
        store={"path": str(small_disk.folder / "store"), "block_cache_mb": 8, "row_cache_mb": 1},
        server={"port": 0, "max_rows": 100_000} | TRANSPORTS[transport],
    )
    acknowledged = 0
    with Server(project) as server, server.stub() as stub:
        while True:
            users = range(acknowledged, acknowledged + 1_000)
            ended = stub.WriteRows.future(numbers(users, 1.0), timeout=PATIENCE_S)
            if ended.exception() is not None:
                break
            acknowledged += 1_000
        error = read_error(ended.exception())
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
        assert "no space left on the device. Free some and start again; what was written is kept" in error.message
        assert refusal(lambda: stub.WriteRows(numbers([1], 2.0))).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.GetFeatures(wide(*range(acknowledged))).status == b"\x01" * acknowledged
        assert stub.GetFeatures(wide(acknowledged)).status == b"\x03"
        with server.client() as client, pytest.raises(featserve.errors.StoreFull, match="Free some"):
            client.write("weather", {"country": ["a"], "zip": ["1"], "temp": [0.0], "wind": [0.0]}, event_time=[0])
        assert server.stop() == 0
    assert acknowledged >= 1_000
    small_disk.enlarge()
    with featserve.open(project.folder, write=True) as embedded:
        found = embedded.get("wide", {"user_id": range(acknowledged + 1_000)}).view_status[:, 0].tolist()
        assert found == [featserve.Status.PRESENT] * acknowledged + [featserve.Status.NOT_FOUND] * 1_000
        rows = {"country": ["a"], "zip": ["1"], "temp": [0.0], "wind": [0.0]}
        assert embedded.write("weather", rows, event_time=[0]).stored == 1


def broken_manifest(config: Config) -> None:
    for file in config.store.path.glob("MANIFEST-*"):
        file.write_bytes(b"\xff" * 100)


def broken_registry(config: Config) -> None:
    Path(config.registry.url.removeprefix("sqlite:///")).write_bytes(b"no database" * 1_000)


def lost_files(config: Config) -> None:
    (config.store.path / "CURRENT").unlink()


def a_file_in_its_place(config: Config) -> None:
    config.store.path.rename(config.store.path.with_name("elsewhere"))
    config.store.path.write_text("a file")


NO_START: dict[str, tuple[Callable[[Config], None], type[ServingError], str]] = {
    "damaged store": (broken_manifest, StoreError, r"cannot open the store at .*store: it is damaged"),
    "store that lost a file": (lost_files, StoreError, r"cannot open the store at .*store"),
    "file for a store": (a_file_in_its_place, StoreError, r"cannot open the store at .*store"),
    "damaged registry": (broken_registry, RegistryError, r"registry.db cannot be used"),
}


@pytest.mark.parametrize("case", NO_START)
def test_a_server_that_cannot_start_says_why(tmp_path: Path, case: str) -> None:
    """What is damaged or in the way is an error that names the place, and nothing is made or removed there."""
    Project.make(tmp_path)
    with featserve.open(tmp_path, write=True) as embedded:
        rows = {"country": ["a"], "zip": ["1"], "temp": [0.0], "wind": [0.0]}
        embedded.write("weather", rows, event_time=[0])
    config = load_config(tmp_path)
    damage, kind, message = NO_START[case]
    damage(config)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*.sst")}
    with pytest.raises(kind, match=message):
        run(config, ready=lambda address: pytest.fail("it serves"))
    assert before == {path: path.stat().st_size for path in tmp_path.rglob("*.sst")}


def test_a_registry_that_cannot_be_reached(tmp_path: Path) -> None:
    """A server whose PostgreSQL is down does not start, and names its address without the password."""
    project = Project.make(tmp_path)
    project.configure(registry={"url": "postgresql://reader:secret@127.0.0.1:1/features"}, server={"port": 0})
    with pytest.raises(RegistryError, match=r"reader:\*\*\*@127.0.0.1:1/features cannot be used"):
        run(load_config(tmp_path))


def test_one_server_at_a_time(server: Server) -> None:
    """A second server on a project, or on a port, does not start, and gives back what it took; the first serves on."""
    with pytest.raises(StoreLocked, match=r"another process has it open for writing. Stop that server"):
        run(load_config(server.project.folder))
    other = Project.make(server.project.folder / "other", port=server.port)
    for _ in range(2):
        with pytest.raises(ServingError, match=rf"cannot listen on 127.0.0.1:{server.port}.*Choose another"):
            run(load_config(other.folder))
    with server.stub() as stub:
        assert stub.GetFeatures(wide(1)).rows == 1
