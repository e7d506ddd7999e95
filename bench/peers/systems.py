"""What is measured side by side: how each is started, and how it is asked.

A ``System`` has a client, a process in its own environment that takes one order after the other, and ``connect``: a
connection for load that costs next to nothing; without it, the client itself makes the load from threads.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from bench import load, servers
from bench.load import Connection, Http2Connection
from bench.peers.environments import NotThere
from bench.peers.http1 import Http1Connection
from bench.project import ENTITIES
from bench.report import ROOT

START_S = 120.0
BODIES = 1_000
FEAST_METHOD = "/GrpcFeatureServer/GetOnlineFeatures"
FEAST_PATH = "/get-online-features"

Connect = Callable[[int, int], Connection]
"""Makes a connection that asks for so many keys at a time; the second number is the seed."""


class Client:
    """A client process: ``tell`` gives it an order, and returns its answer."""

    def __init__(self, python: Path | str, module: str, *arguments: str) -> None:
        self._command = [str(python), "-m", f"bench.peers.clients.{module}", *arguments]
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def tell(self, order: dict[str, Any]) -> Any:
        """Raises NotThere with what the client said where it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise NotThere(f"`{' '.join(self._command)}` ended:\n{self._process.stderr.read()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class System:
    """``entities``: how many it holds, of which any may be asked for."""

    name: str
    client: Client
    entities: int = ENTITIES
    connect: Connect | None = None


@contextmanager
def program(command: list[str], port: int, folder: Path) -> Iterator[None]:
    """Run a server until the end; it is there when it takes connections. Raises NotThere if it ends before that."""
    log = folder / f"{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    try:
        ends = time.monotonic() + START_S
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > ends:
                raise NotThere(f"`{' '.join(command)}` did not start:\n{log.read_text()[-2_000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def start_redis(stack: ExitStack, redis_server: str, folder: Path) -> int:
    """Start a Redis that keeps everything in memory; return its port."""
    port, options = free_port(), ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    stack.enter_context(program([redis_server, "--port", str(port), *options], port, folder))
    return port


def asked(stack: ExitStack, client: Client) -> Client:
    """Return a client that is closed at the end."""
    stack.callback(client.close)
    return client


def redis(stack: ExitStack, name: str, python: Path, port: int, kind: str) -> System:
    """Redis through redis-py; ``kind``: blobs or hashes."""
    return System(name, asked(stack, Client(python, f"redis_{kind}", str(port))))


def feast_grpc(stack: ExitStack, python: Path, folder: Path, entities: int) -> System:
    """Feast's Python gRPC server, ``feast listen``, with the threads that it has by default."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [str(python.with_name("feast")), "listen", "--address", address]
    stack.enter_context(program(command, port, folder))
    client = asked(stack, Client(python, "feast_grpc", address))

    def connect(keys: int, seed: int) -> Connection:
        messages = (load.framed(body) for body in _bodies(client, keys, entities, seed))
        return Http2Connection(address, messages, FEAST_METHOD, length_varies=True)

    return System("Feast, gRPC", client, entities, connect)


def feast_http(stack: ExitStack, python: Path, folder: Path, entities: int) -> System:
    """Feast's Python HTTP server, ``feast serve``, of one worker that is not restarted every 1,000 requests."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [
        str(python.with_name("feast")),
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-requests",
        "0",
    ]
    stack.enter_context(program(command, port, folder))
    client = asked(stack, Client(python, "feast_http", address))
    return System(
        "Feast, HTTP",
        client,
        entities,
        lambda keys, seed: Http1Connection(address, _bodies(client, keys, entities, seed), FEAST_PATH),
    )


def _bodies(client: Client, keys: int, entities: int, seed: int) -> Iterator[bytes]:
    """Yield requests that a client encodes, over and over: it takes the code that the peer generates."""
    found = client.tell({"bodies": BODIES, "keys": keys, "entities": entities, "seed": seed})
    return cycle([base64.b64decode(body) for body in found])


def bare(stack: ExitStack, folder: Path) -> System:
    """The bare handler on grpcio; see bench.bare."""
    return _grpc(stack, "bare handler, grpcio", servers.bare(folder), "bare_grpc")


def served(stack: ExitStack, folder: Path, transport: str) -> System:
    """featserve's server on a transport, with a store of its own."""
    copied = copy_project(folder, folder.with_name(f"{folder.name}-{transport}"))
    settings = f'[server]\nport = 0\ntransport = "{transport}"\n'
    (copied / "featserve.toml").write_text(settings, encoding="utf-8")
    return _grpc(stack, f"featserve, {transport}", servers.ours(copied), "featserve_grpc")


def _grpc(stack: ExitStack, name: str, server: servers.Server, client: str) -> System:
    try:
        address = stack.enter_context(server).address
    except RuntimeError as error:
        raise NotThere(str(error)) from None
    return System(
        name,
        asked(stack, Client(sys.executable, client, address)),
        connect=lambda keys, seed: Http2Connection(address, load.bodies(keys, ENTITIES, seed)),
    )


def in_process(stack: ExitStack, folder: Path) -> System:
    """featserve in the client's own process."""
    return System("featserve, in process", asked(stack, Client(sys.executable, "featserve_here", str(folder))))


def copy_project(folder: Path, to: Path) -> Path:
    """Copy a project; the files of rows, which never change, are the same ones under another name."""

    def copy(source: str, target: str) -> None:
        if source.endswith((".sst", ".parquet")):
            os.link(source, target)
        else:
            shutil.copy2(source, target)

    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, copy_function=copy)
    return to
