"""Servers as fixtures: one that many tests share, and as many more as a test starts.

A plugin: a test module takes it with ``pytest_plugins = ["tests.served"]``. What asks for a server runs once for each
transport, so a transport is added to ``serving.TRANSPORTS`` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.streams import has_room
from tests.serving import TRANSPORTS, Project, Server, until


@pytest.fixture(scope="session", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Name each transport in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def server(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run one server for all the tests that leave it as it was."""
    project = Project.make(tmp_path_factory.mktemp("served"), **TRANSPORTS[transport])
    project.damage()
    with Server(project) as server:
        yield server


@pytest.fixture(scope="session")
def following(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server that takes new definitions at once; tests add some of their own, and leave the others alone."""
    settings: dict[str, Any] = {"registry_poll_seconds": 0.02}
    with Server(Project.make(tmp_path_factory.mktemp("following"), **TRANSPORTS[transport] | settings)) as server:
        yield server


@pytest.fixture(scope="session")
def of_eight(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server that takes eight calls at a time, and writes that are large enough to keep it busy."""
    settings: dict[str, Any] = {"max_concurrent": 8, "max_rows": 100_000, "max_message_mb": 256}
    with Server(Project.make(tmp_path_factory.mktemp("small"), **TRANSPORTS[transport] | settings)) as server:
        yield server


@pytest.fixture
def small(of_eight: Server) -> Server:
    """Give that server when it has room for eight calls: what another test left under way has ended."""
    with of_eight.stub() as stub:
        until("there is room for eight calls", lambda: has_room(stub, 8))
    return of_eight


@pytest.fixture
def start(transport: str, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Give a function that starts a server of the test's own; its arguments are [server] settings."""
    started: list[Server] = []

    def starter(**settings: Any) -> Server:
        project = Project.make(tmp_path / f"project-{len(started)}", **TRANSPORTS[transport] | settings)
        started.append(Server(project))
        return started[-1].ready()

    yield starter
    for server in started:
        server.close()


@pytest.fixture
def before_its_message(request: pytest.FixtureRequest, transport: str) -> None:
    """Say of a test that it needs a call to be seen before its message: on pygrpc-native it is known to fail."""
    if transport == "native":
        request.applymarker(pytest.mark.xfail(reason="pygrpc-native hands a call over once its message is whole"))
