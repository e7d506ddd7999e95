"""What is measured side by side: how each is started, and how it is asked.

A ``System`` has a client, a process in its own environment that takes one order after the other, and ``load``: how
h2load loads it, which costs next to nothing; without it, the client itself makes the load from threads.
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
from pathlib import Path
from typing import Any

from bench import h2load, load, servers
from bench.h2load import Loaded
from bench.peers.environments import NotThere
from bench.project import ENTITIES, FEATURES
from bench.report import ROOT

START_S = 120.0
WARM_UP_S = 0.3
AT_ONCE = 8
FEAST_METHOD = "/GrpcFeatureServer/GetOnlineFeatures"
FEAST_PATH = "/get-online-features"

Load = Callable[[int, int, float], Loaded]
"""Asks for so many keys at a time on eight connections; then come the seed, and the seconds."""


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
    """``entities``: how many it holds, of which any may be asked for. ``slow``: it answers few hundred a second."""

    name: str
    client: Client
    entities: int = ENTITIES
    load: Load | None = None
    slow: bool = False


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

    def ask(keys: int, seed: int, seconds: float) -> Loaded:
        body = load.framed(_body(client, keys, entities, seed))
        return loaded(address, body, keys, seconds, path=FEAST_METHOD)

    return System("Feast, gRPC", client, entities, ask, slow=True)


def feast_http(stack: ExitStack, python: Path, folder: Path, entities: int) -> System:
    """Feast's Python HTTP server, ``feast serve``, of one worker that is not restarted every 1,000 requests.

    Nor does it close a connection that waits for its turn, as it would after 30 seconds.
    """
    port = free_port()
    address = f"127.0.0.1:{port}"
    options = ["--host", "127.0.0.1", "--port", str(port), "--max-requests", "0", "--keep-alive-timeout", "3600"]
    command = [str(python.with_name("feast")), "serve", *options]
    stack.enter_context(program(command, port, folder))
    client = asked(stack, Client(python, "feast_http", address))

    def ask(keys: int, seed: int, seconds: float) -> Loaded:
        body = _body(client, keys, entities, seed)
        return loaded(address, body, keys, seconds, path=FEAST_PATH, protocol=h2load.HTTP1)

    return System("Feast, HTTP", client, entities, ask, slow=True)


def _body(client: Client, keys: int, entities: int, seed: int) -> bytes:
    """Return a request that a client encodes, as it takes the code that the peer generates."""
    return base64.b64decode(client.tell({"body": keys, "entities": entities, "seed": seed}))


def loaded(address: str, body: bytes, keys: int, seconds: float, **how: Any) -> Loaded:
    """Load a server with a request. Raises RuntimeError where answers are too small to hold what was asked for."""
    found = h2load.run(address, body, seconds=seconds, warm_up_s=WARM_UP_S, connections=AT_ONCE, **how)
    least = keys * FEATURES * 4
    if found.message_bytes < max(found.ended, 1) * least:
        raise RuntimeError(f"{found.ended} answers in {found.message_bytes} bytes, of at least {least} each")
    return found


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
        load.warm(address, ENTITIES)
    except RuntimeError as error:
        raise NotThere(str(error)) from None
    return System(
        name,
        asked(stack, Client(sys.executable, client, address)),
        load=lambda keys, seed, seconds: loaded(address, next(load.bodies(keys, ENTITIES, seed)), keys, seconds),
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
