"""Several processes behind one port: what they answer, who follows whom, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from click.testing import CliRunner

import featserve
from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.cli import main
from featserve.config import Config, load_config
from featserve.errors import ServingError, StoreLocked, UnknownName
from featserve.server import app
from featserve.server.app import run
from featserve.server.workers import MOST_DEATHS, Part, Spares, cores, share
from featserve.store import is_held
from tests.server.messages import numbers, refusal, wide
from tests.server.test_drain import stored
from tests.server.test_forward import VISITS, visit
from tests.server.watched import fetch
from tests.serving import DEFINITIONS, PATIENCE_S, TRANSPORTS, Project, Server, until

pytest_plugins = ["tests.served"]

CONNECTIONS = 16
"""With eight, all of them went to one of two workers in one of 128 runs."""
PRESENT, NOT_FOUND = b"\x01", b"\x03"


def make(folder: Path, transport: str, store: dict[str, Any] | None = None, **server: Any) -> Project:
    project = Project.make(folder, DEFINITIONS + VISITS)
    caches = {"block_cache_mb": 8, "row_cache_mb": 3}
    project.configure(store=caches | (store or {}), server={"port": 0, "workers": 2} | TRANSPORTS[transport] | server)
    return project


def test_connections_of_a_server_that_has_ended_leave_the_port(transport: str, tmp_path: Path) -> None:
    """Workers take a port on which another server, which shared it with nobody, closed connections a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as ended:
        port = ended.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            ended.accept()[0].close()
            assert client.recv(1) == b""
    left = [s for s in psutil.net_connections("tcp") if s.laddr[1:] == (port,) and s.status == psutil.CONN_TIME_WAIT]
    assert left, "nothing was left of the connection: the test shows nothing"
    with Server(make(tmp_path, transport, port=port)) as server, server.stub() as stub:
        assert server.port == port
        assert stub.GetFeatures(wide(1)).rows == 1


@pytest.fixture(scope="module")
def pair(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run two workers that take new definitions at once."""
    with Server(make(tmp_path_factory.mktemp("pair"), transport, registry_poll_seconds=0.02)) as server:
        yield server


@pytest.fixture
def start_pair(transport: str, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Give a function that starts two workers of the test's own."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(Server(make(tmp_path, transport, **settings)))


@contextmanager
def stubs(server: Server, *options: tuple[str, Any]) -> Iterator[list[FeatureServingServiceStub]]:
    """Open connections to all workers; a connection stays with its worker."""
    with ExitStack() as stack:
        yield [stack.enter_context(server.stub(*options)) for _ in range(CONNECTIONS)]


def processes(server: Server) -> dict[int, int]:
    """Return the process that serves in each place, as the logs say."""
    return {event["worker"]: event["process"] for event in server.events() if event["message"] == "serving"}


class Load(threading.Thread):
    """Reads and writes through the client until told to stop; ``pushes``, too. ``failed``: what any call raised."""

    def __init__(self, server: Server, user: int, pushes: bool) -> None:
        super().__init__()
        self._server, self._user, self._pushes = server, user, pushes
        self.stop, self.calls, self.failed = threading.Event(), 0, list[Exception]()

    def run(self) -> None:
        with featserve.connect(self._server.address, timeout=PATIENCE_S, connections=3) as client:
            while not self.stop.is_set():
                try:
                    at = [time.time_ns() // 1_000]
                    rows = {"country": [str(self._user)], "zip": ["1"], "temp": [float(self.calls)], "wind": [0.0]}
                    token = client.write("weather", rows, event_time=at).token
                    keys = {"user_id": [1], "country": [str(self._user)], "zip": ["1"]}
                    found = client.get("compact", keys, at_least=token).column("weather.temp").to_list()
                    assert found == [float(self.calls)]
                    self.calls += 1
                    if self._pushes:
                        token = client.push("visits", {"user_id": [self._user]}, event_time=at).token
                        visits = client.get("users", {"user_id": [self._user]}, at_least=token)
                        assert visits.column("seen.n").to_list() == [self.calls]
                except Exception as error:  # noqa: BLE001 - shown by who stops it
                    self.failed.append(error)


@contextmanager
def loaded(server: Server, *, pushes: bool = False) -> Iterator[list[Load]]:
    """Run while clients read and write, and maybe push; no call of theirs may fail, and no event count twice."""
    loads = [Load(server, user, pushes) for user in range(3)]
    for load in loads:
        load.start()
    until("all are at work", lambda: min(load.calls for load in loads) > 5)
    yield loads
    seen = [load.calls for load in loads]
    until("all go on", lambda: all(load.calls > before + 5 for load, before in zip(loads, seen, strict=True)))
    for load in loads:
        load.stop.set()
    for load in loads:
        load.join(PATIENCE_S)
    assert [error for load in loads for error in load.failed] == []


def test_what_was_written_is_read_from_every_worker(pair: Server) -> None:
    """A request that names a write is answered with it on every connection; one on the same connection need not."""
    with stubs(pair) as all_stubs:
        for user in range(100, 160):
            writer = all_stubs[user % CONNECTIONS]
            if user % 2:
                token = writer.WriteRows(numbers([user], float(user))).token
            else:
                token = writer.StreamRows(iter([pb.StreamRowsRequest(request=numbers([user], float(user)))])).token
            assert writer.GetFeatures(wide(user)).status == PRESENT
            for stub in all_stubs:
                assert stub.GetFeatures(wide(user, at_least=token)).status == PRESENT
                asked = pb.StreamFeaturesRequest(request=wide(user, at_least=token))
                assert next(stub.StreamFeatures(iter([asked]))).response.status == PRESENT


def test_refusals_are_those_of_one_process(pair: Server, server: Server) -> None:
    """Whatever a write is refused with, code, message and details come through a worker as they are."""
    late = int(time.time_ns() // 1_000) + 10**15
    requests = [
        pb.WriteRowsRequest(view="nubmers"),
        numbers([1], float("nan"), late),
        numbers([], 1.0),
        numbers(range(20_000), 1.0),
    ]
    with pair.stub() as ours, server.stub() as theirs:
        for request in requests:
            mine, other = (refusal(lambda: stub.WriteRows(request)) for stub in (ours, theirs))  # noqa: B023
            assert (mine.code, mine.reason, mine.metadata) == (other.code, other.reason, other.metadata)
            assert mine.violations is not None
            assert mine.violations.keys() == (other.violations or {}).keys()
        stream = [pb.StreamRowsRequest(request=request) for request in (numbers([1], 1.0), *requests[:1])]
        refused = refusal(lambda: ours.StreamRows(iter(stream)))
        assert (refused.code, refused.metadata) == (
            grpc.StatusCode.NOT_FOUND,
            {"kind": "feature_view", "name": "nubmers", "messages_written": "1"},
        )
        assert refusal(lambda: ours.WriteRows(numbers([1], 1.0), timeout=1e-6)).code is (
            grpc.StatusCode.DEADLINE_EXCEEDED
        )
        assert ours.StreamRows(iter(())) == pb.StreamRowsResponse()


def test_tokens_that_are_none(pair: Server) -> None:
    """A token of another store, or none at all, is refused; one of a write that never comes is given up in time."""
    with pair.stub() as stub:
        token = stub.WriteRows(numbers([170], 1.0)).token
        store = token.partition("-")[0]
        assert refusal(lambda: stub.GetFeatures(wide(1, at_least="x"))).violations is not None
        assert "another store" in refusal(lambda: stub.GetFeatures(wide(1, at_least="0000-1"))).message
        began = time.monotonic()
        late = refusal(lambda: stub.GetFeatures(wide(1, at_least=f"{store}-999999"), timeout=2))
        assert (late.code, late.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert "write 999,999 was asked for; the store here holds " in late.message
        assert 1 < time.monotonic() - began < 30
        asked = pb.StreamFeaturesRequest(request=wide(1, at_least=f"{store}-999999"))
        assert refusal(lambda: next(stub.StreamFeatures(iter([asked]), timeout=5))).reason == "DEADLINE_EXCEEDED"


def test_a_registry_change_reaches_all(pair: Server) -> None:
    """What is applied is served on every connection, without a restart, and the writer takes rows of it."""
    more = """
added = FeatureView("added", place, [Field("rain", Float32)])
new = FeatureService("new", [weather, added])
"""
    pair.project.apply((pair.project.folder / "features.py").read_text() + more)
    request = pb.DescribeServiceRequest(service="new")
    with stubs(pair) as all_stubs:
        for stub in all_stubs:
            until("a worker serves it", lambda: stub.DescribeService.future(request).exception() is None)  # noqa: B023
    with pair.client() as client:

        def stored() -> int:
            rows = {"country": ["de"], "zip": ["1"], "rain": [0.5]}
            try:
                return client.write("added", rows, event_time=datetime.now(UTC)).stored
            except UnknownName:
                return 0

        until("the writer knows the view", stored)


def test_sighup_reaches_all(start_pair: Callable[..., Server]) -> None:
    """SIGHUP to the parent makes every process look at the registry."""
    server = start_pair(registry_poll_seconds=86_400)
    server.project.apply(
        (server.project.folder / "features.py").read_text() + '\nnew = FeatureService("new", [weather])'
    )
    server.signal(signal.SIGHUP)

    def taken() -> set[int]:
        return {event["worker"] for event in server.events() if event["message"] == "took a new snapshot"}

    until("all have taken it", lambda: taken() == {0, 1, 2})
    assert server.stop() == 0


def test_a_worker_that_lags(start_pair: Callable[..., Server]) -> None:
    """A worker that has not caught up answers from before; asked for a write, it catches up first."""
    server = start_pair(store={"catch_up_ms": 3_600_000})
    with stubs(server) as all_stubs:
        token = all_stubs[0].WriteRows(numbers([1], 1.0)).token
        seen = {stub.GetFeatures(wide(1)).status for stub in all_stubs}
        assert seen == {PRESENT, NOT_FOUND}
        assert {stub.GetFeatures(wide(1, at_least=token)).status for stub in all_stubs} == {PRESENT}
        # One that is stopped for a while holds up its own connections alone.
        worker = processes(server)[2]
        psutil.Process(worker).suspend()
        written = all_stubs[0].WriteRows.future(numbers([2], 1.0), timeout=2)
        asked = [stub.GetFeatures.future(wide(1), timeout=2) for stub in all_stubs]
        codes = {call.code() for call in asked}
        assert codes == {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}
        written.code()
        psutil.Process(worker).resume()
        latest = all_stubs[0].WriteRows(numbers([3], 1.0)).token
        assert {stub.GetFeatures(wide(3, at_least=latest)).status for stub in all_stubs} == {PRESENT}


@pytest.mark.slow
def test_a_killed_writer_is_replaced(start_pair: Callable[..., Server]) -> None:
    """While there is no writer, reads go on and writes wait for the next one; what went with it the client repeats."""
    server = start_pair()
    with stubs(server, ("grpc.enable_retries", 0)) as all_stubs:
        token = all_stubs[0].WriteRows(numbers([1], 1.0)).token
        with loaded(server):
            killed = processes(server)[0]
            psutil.Process(killed).kill()
            until("it is gone", lambda: not psutil.pid_exists(killed))
            waiting = all_stubs[0].PushEvents.future(pb.PushEventsRequest.FromString(visit(7)), timeout=PATIENCE_S)
            while processes(server)[0] == killed:
                for stub in all_stubs:
                    assert stub.GetFeatures(wide(1, at_least=token)).status == PRESENT
        assert waiting.result().counted == 1
    assert server.stop() == 0


@pytest.mark.slow
def test_a_rolling_restart_fails_no_call(start_pair: Callable[..., Server]) -> None:
    """Under load every process is replaced by another, and every call of the clients succeeds, pushes too."""
    server = start_pair()
    before = processes(server)
    with loaded(server, pushes=True):
        server.signal(signal.SIGUSR2)
        server.signal(signal.SIGUSR2)  # once is enough
        until("it is over", lambda: [e for e in server.events() if e["message"] == "restarted"], 2 * PATIENCE_S)
    assert not set(processes(server).values()) & set(before.values())
    assert [event for event in server.events() if event["level"] == "error"] == []
    assert server.stop() == 0


@pytest.mark.slow
def test_a_worker_that_cannot_start_takes_down_no_other(start_pair: Callable[..., Server]) -> None:
    """A process that cannot be started is tried ever later, as long as a worker serves, and is back once it can be.

    A restart of all begins with those that serve, and is given up as they cannot be started either.
    """
    server = start_pair()
    registry = server.project.folder / ".featserve" / "registry.db"
    sound, killed = registry.read_bytes(), processes(server)[1]
    registry.write_bytes(b"no database" * 1_000)
    began = time.monotonic()
    psutil.Process(killed).kill()
    until("it was tried often", lambda: server.events()[-1].get("times", 0) > MOST_DEATHS)
    assert time.monotonic() - began > 0.2 + 0.4 + 0.8 + 1.6 + 3.2
    server.signal(signal.SIGUSR2)
    until("it is given up", lambda: any("restart is given up" in event["message"] for event in server.events()))
    with server.stub() as stub:
        assert stub.GetFeatures(wide(1)).status == NOT_FOUND
    registry.write_bytes(sound)
    until("it is back", lambda: processes(server)[1] != killed)
    assert server.stop() == 0


@pytest.mark.slow
def test_a_crash_loop_ends(start_pair: Callable[..., Server]) -> None:
    """Where no worker serves and none can be started, all end with an error, after a few attempts."""
    server = start_pair()
    registry = server.project.folder / ".featserve" / "registry.db"
    registry.write_bytes(b"no database" * 1_000)
    for number in (1, 2):
        psutil.Process(processes(server)[number]).kill()
    assert server.process.wait(4 * PATIENCE_S) == 1
    assert re.search(r"worker [12] died 6 times in a row", server.log.read_text())
    assert not is_held(server.project.store)


@pytest.mark.slow
def test_no_process_outlives_the_parent(start_pair: Callable[..., Server]) -> None:
    """When the parent is killed, its processes end, and the store is free."""
    server = start_pair()
    left = psutil.Process(server.process.pid).children()
    assert len(left) == 4  # one of them a spare
    server.kill()
    assert psutil.wait_procs(left, PATIENCE_S)[1] == []
    assert not is_held(server.project.store)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_when_stopped_under_load(start_pair: Callable[..., Server]) -> None:
    """Of writes through all workers while they stop, each was acknowledged and is there, or was refused."""
    server = start_pair()
    acknowledged: list[int] = []

    def write(first: int) -> grpc.StatusCode:
        with server.stub(("grpc.enable_retries", 0)) as stub:
            user = first
            while True:
                code = stub.WriteRows.future(numbers([user], 1.0), timeout=PATIENCE_S).code()
                if code is not grpc.StatusCode.OK:
                    return code
                acknowledged.append(user)
                user += 1

    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write, first * 100_000) for first in range(4)]
        until("rows are written", lambda: len(acknowledged) > 30)
        assert server.stop() == 0
        assert {work.result() for work in writing} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert all(stored(server, acknowledged))


def test_what_processes_share(tmp_path: Path) -> None:
    """The caches are shared out, and each process has a port of its own for metrics, unless any will do."""
    project = Project(tmp_path)
    project.configure(store={"block_cache_mb": 90, "row_cache_mb": 2}, telemetry={"prometheus_port": 9_000})
    config = load_config(tmp_path)
    shares = [share(config, Part(number, tmp_path / "writer"), 3) for number in range(3)]
    assert {(s.store.block_cache_mb, s.store.row_cache_mb) for s in shares} == {(30, 1)}
    assert [s.telemetry.prometheus_port for s in shares] == [9_000, 9_001, 9_002]
    assert 1 <= cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("available", "supervised"), [(7, [7]), (1, [])])
def test_without_a_number_there_is_a_worker_for_each_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int, supervised: list[int]
) -> None:
    """Where neither the file nor the command line says how many, `serve` has as many as cores; of one, no others."""
    found: list[int] = []
    alone: list[Config] = []

    async def serve(config: Config, ready: Callable[[str], None]) -> None:
        alone.append(config)

    monkeypatch.setattr(app, "cores", lambda: available)
    monkeypatch.setattr(app, "supervise", lambda config, workers, ready: found.append(workers))
    monkeypatch.setattr(app, "serve", serve)
    (Project.make(tmp_path / "project").folder / "featserve.toml").write_text("[server]\nport = 0\n")
    assert CliRunner().invoke(main, ["serve", "--project", str(tmp_path / "project")]).exit_code == 0
    assert (found, len(alone)) == (supervised, 1 - len(supervised))


def test_what_keeps_workers_from_starting_is_said(pair: Server) -> None:
    """A store that is held and a port that is taken are the errors that one process has; nothing is left running."""
    before = psutil.Process().children(recursive=True)
    with pytest.raises(StoreLocked, match="another process has it open for writing"):
        run(load_config(pair.project.folder))
    other = Project.make(pair.project.folder / "other", port=pair.port, workers=2)
    with pytest.raises(ServingError, match=rf"cannot listen on 127.0.0.1:{pair.port}.*Choose another"):
        run(load_config(other.folder))
    assert set(psutil.Process().children(recursive=True)) <= set(before)


@pytest.mark.slow
def test_each_worker_has_metrics(transport: str, tmp_path: Path) -> None:
    """Every process has a page of its own, which says what it is, and how far its store lags: the writer's does not.

    A worker lags ever longer until it catches up, as it does when it is asked for a write. The sum of all pages counts
    a write once: the call in the worker that took it, the rows in the writer.
    """
    project = make(tmp_path, transport, store={"catch_up_ms": 3_600_000})
    with (tmp_path / "featserve.toml").open("a") as settings:
        settings.write("\n[telemetry]\nprometheus_port = 0\n")
    with Server(project) as server, stubs(server) as all_stubs:
        pages = until(
            "all have an address",
            lambda: len(found := [e for e in server.events() if e["message"] == "metrics"]) == 3 and found,
        )

        def lags() -> dict[int, float]:
            texts = {event["worker"]: fetch(event["address"]) for event in pages}
            assert all(f'service_instance_id="{number}"' in text for number, text in texts.items())
            found = {n: re.search(r"^featserve_store_lag_seconds (\S+)$", t, re.MULTILINE) for n, t in texts.items()}
            return {number: float(match[1]) for number, match in found.items() if match is not None}

        until("both workers lag", lambda: min((lag := lags())[1], lag[2]) > 1)
        began = time.monotonic()
        token = all_stubs[0].WriteRows(numbers([1], 1.0)).token
        for stub in all_stubs:
            assert stub.GetFeatures(wide(1, at_least=token)).status == PRESENT
        caught_up = lags()
        assert caught_up[0] == 0
        texts = {event["worker"]: fetch(event["address"]) for event in pages}
        calls = {n: re.findall(r"_duration_seconds_count{.*WriteRows.*} (\S+)", text) for n, text in texts.items()}
        rows = {n: re.findall(r"^featserve_rows_written_total.* (\S+)$", t, re.MULTILINE) for n, t in texts.items()}
        assert not calls[0]
        assert sorted(calls[1] + calls[2]) == ["1.0"]
        assert rows == {0: ["1.0"], 1: [], 2: []}
        assert 0 < max(caught_up[1], caught_up[2]) < time.monotonic() - began


def test_spares(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spare that could not be started fails nobody who asks later; one of before a deploy is given to nobody."""

    async def scenario() -> None:
        spares = Spares()
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/nowhere")
            spares.prepare()
            with pytest.raises(ServingError, match="cannot start a process"):
                await spares.load()
        first = await spares.take()
        assert first.process.returncode is None
        assert spares._next is not None
        old = await spares._next
        spares.renew()
        assert await spares.take() is not old
        assert await old.process.wait() == -signal.SIGKILL
        await spares.end()

    asyncio.run(scenario())
