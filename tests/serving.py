"""A real project, and a real server process on a real port, for the tests that need them."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy as np
import psutil

import featserve
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.batch import EventBatch
from featserve.config import load_config
from featserve.engine import encode_rows
from featserve.plan import Plans
from featserve.project import load_definitions
from featserve.registry import Registry
from featserve.server.app import run
from featserve.store import open_store
from featserve.types import Float64, Int64, column

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60.0
"""How long a test waits for what must happen, before it says that it did not: machines are shared and slow."""

TRANSPORTS: dict[str, dict[str, Any]] = {"grpcio": {}, "native": {"transport": "native"}}
"""The transports that the server has, each with the [server] settings that choose it."""

Asked = TypeVar("Asked")

DAMAGED = (9_000_001, 9_000_002)
"""Users whose rows are cut short, and all zeros."""

DEFINITIONS = """
from datetime import timedelta

from featserve import (
    Bool, Bytes, Entity, FeatureService, FeatureView, Field, Float32, Float64, Int32, Int64, String, Timestamp, Vector,
)

user = Entity("user", {"user_id": Int64})
place = Entity("place", {"country": String, "zip": String})
device = Entity("device", {"serial": Bytes, "made": Timestamp, "model": Int32, "real": Bool})

activity = FeatureView(
    "activity",
    user,
    [
        Field("clicks", Int64, min=0),
        Field("rate", Float64, min=0.0, max=1.0, default=0.5),
        Field("score", Float32, not_nan=True),
        Field("active", Bool),
        Field("level", Int32, not_null=True),
        Field("last_seen", Timestamp),
        Field("plan", String, allowed=["free", "paid", "gewerblich-ü"], default="free"),
        Field("token", Bytes),
        Field("taste", Vector(4)),
    ],
    ttl=timedelta(hours=1),
    owner="growth",
    description="What a user does",
)
weather = FeatureView("weather", place, [Field("temp", Float32), Field("wind", Float64)], owner="sky")
health = FeatureView("health", device, [Field("charge", Float32)])
numbers = FeatureView("numbers", user, [Field(f"f{i}", Float64) for i in range(50)])

ranking = FeatureService("ranking", [activity, weather], dtype=Float64, owner="growth", description="Ranks")
compact = FeatureService("compact", [activity["score", "rate", "plan"], weather["temp"]])
devices = FeatureService("devices", [health])
wide = FeatureService("wide", [numbers])
"""

NEXT_VERSION = """
ranking_2 = FeatureService("ranking", [activity["score"], health], version=2)
"""
"""Put behind the definitions, it changes what the name ``ranking`` means, key columns included."""


@dataclass(frozen=True)
class Project:
    """A project's folder. ``settings``: what its featserve.toml says, by section and key."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, definitions: str = DEFINITIONS, **server: Any) -> Project:
        """Write a project with small caches and a free port, and apply it."""
        folder.mkdir(parents=True, exist_ok=True)
        project = cls(folder)
        project.configure(store={"block_cache_mb": 8, "row_cache_mb": 1}, server={"port": 0} | server)
        project.apply(definitions)
        return project

    def configure(self, **sections: Mapping[str, Any]) -> None:
        """Write featserve.toml; one process serves where it does not say how many."""
        sections["server"] = {"workers": 1} | dict(sections.get("server", {}))
        lines = [
            line
            for name, keys in sections.items()
            for line in (f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items()))
        ]
        (self.folder / "featserve.toml").write_text("\n".join(lines))

    def apply(self, definitions: str) -> None:
        """Apply what a definitions file says."""
        (self.folder / "features.py").write_text(definitions)
        config = load_config(self.folder)
        with Registry.open(config.registry.url) as registry:
            registry.apply(load_definitions(config), "tests", time.time_ns() // 1_000)

    def damage(self) -> None:
        """Put rows of ``numbers`` into the store that no featserve writes, for the users ``DAMAGED``."""
        config = load_config(self.folder)
        with Registry.open(config.registry.url) as registry:
            plan = Plans(registry.snapshot()).view("numbers")
        columns = {"user_id": column(Int64, DAMAGED)} | {f"f{i}": column(Float64, [1.0] * 2) for i in range(50)}
        times = np.zeros(2, np.int64)
        keys, rows = encode_rows(plan, EventBatch(columns, times, times, times))
        store = open_store(config.store.path, "write")
        store.write_many(keys, [rows[0][:-1], bytes(len(rows[1]))])
        store.close()

    @property
    def store(self) -> Path:
        return self.folder / ".featserve" / "store"


class Server:
    """A server in a process of its own. ``stop`` it, ``kill`` it, or use it as a context manager, which kills it."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.log = project.folder / "server.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.process", "serve", str(project.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=os.environ | {"GRPC_VERBOSITY": "ERROR", "TMPDIR": str(project.folder)},
            )

    def ready(self) -> Self:
        """Wait until it takes requests."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline().decode().strip() if selector.select(PATIENCE_S) else ""
        assert line, f"the server did not start: {self.log.read_text()}"
        self.address = line
        return self

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ask it to stop; return its exit code."""
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def close(self) -> None:
        """Kill it, if it runs, and close its pipes."""
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def memory_bytes(self) -> int:
        """Return what it holds in memory."""
        size: int = psutil.Process(self.process.pid).memory_info().rss
        return size

    def most_memory_bytes(self) -> int:
        """Return the most that it ever held in memory."""
        (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(line) << 10

    def apply(self, definitions: str) -> None:
        """Apply more definitions, and wait until it has taken them."""
        before = self.revision()
        self.project.apply((self.project.folder / "features.py").read_text() + "\n" + definitions)
        until("the server has taken the new definitions", lambda: self.revision() > before)

    def revision(self) -> int:
        """Return the number of the latest snapshot that it says it took."""
        revisions: list[int] = [event["revision"] for event in self.events() if "revision" in event]
        return revisions[-1]

    def events(self) -> list[dict[str, Any]]:
        """Return what it has logged, but for a line that is being written."""
        lines = self.log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    @contextmanager
    def channel(self, *options: tuple[str, Any]) -> Iterator[grpc.Channel]:
        """Open a plain channel of gRPC's, with a connection of its own."""
        with grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1), *options]) as channel:
            yield channel

    @contextmanager
    def stub(self, *options: tuple[str, Any]) -> Iterator[FeatureServingServiceStub]:
        """Open a channel, and give the generated stub on it."""
        with self.channel(*options) as channel:
            yield FeatureServingServiceStub(channel)

    def client(self, timeout: float = PATIENCE_S) -> featserve.Client:
        return featserve.connect(self.address, timeout=timeout)

    def __enter__(self) -> Self:
        return self.ready()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def until(what: str, holds: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """Wait until ``holds()`` is true, and return it: for what another process does and nobody announces."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"after {seconds:g} s still not: {what}"
        time.sleep(0.005)
    return found


def served_here(project: Project, ask: Callable[[str], Asked]) -> Asked:
    """Serve in this process, of which a test has changed a part, while ``ask`` is run with the address in a thread."""
    asked: list[Future[Asked]] = []

    def ready(address: str) -> None:
        asked.append(pool.submit(ask, address))
        asked[0].add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGTERM))

    with ThreadPoolExecutor(1) as pool:
        run(load_config(project.folder), ready)
    return asked[0].result()
