"""An empty registry of each kind for the tests: a SQLite file, and a database in a private PostgreSQL.

PostgreSQL runs as a cluster in a temporary folder on a free loopback port, and is gone at the end. A plugin: a test
module takes it with ``pytest_plugins = ["tests.postgres"]``. A missing PostgreSQL is a failure, not a skip: what is not
run here is run nowhere.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from featserve.registry import Registry

ACCOUNT = "postgres"
"""Who runs the cluster when root runs the tests: PostgreSQL refuses to run as root."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running PostgreSQL server."""

    port: int

    def url(self, database: str) -> str:
        return f"postgresql://{ACCOUNT}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run one statement outside of any transaction."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement.encode())


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """Start a private cluster, and stop it at the end."""
    binaries = _binaries()
    folder = Path(tempfile.mkdtemp(prefix="featserve-postgres-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, ACCOUNT)
        data, port = folder / "data", _free_port()
        _run(binaries / "initdb", "-D", data, "-U", ACCOUNT, "--auth=trust", "--no-sync", "--encoding=UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        _run(binaries / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        try:
            yield Cluster(port)
        finally:
            _run(binaries / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the URL of an empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state/registry.db"
        return
    cluster: Cluster = request.getfixturevalue("postgres")
    name = re.sub(r"\W", "_", tmp_path.name).lower()
    cluster.execute(f"CREATE DATABASE {name}")
    yield cluster.url(name)
    cluster.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    with Registry.open(registry_url) as registry:
        yield registry


def _binaries() -> Path:
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), *map(Path, os.get_exec_path())]
    for folder in reversed(found):
        if (folder / "initdb").is_file() and (folder / "pg_ctl").is_file():
            return folder
    pytest.fail("PostgreSQL's initdb and pg_ctl are missing: run tests/setup.sh, which installs them")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _run(*command: object) -> None:
    as_account = ["runuser", "-u", ACCOUNT, "--"] if os.geteuid() == 0 else []
    # Not captured by a pipe: the server inherits it, and would keep it open.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run([*as_account, *map(str, command)], stdout=output, stderr=output, cwd="/", check=False)
        output.seek(0)
        assert done.returncode == 0, output.read().decode()
