"""Which transport serves: what the settings say, as far as it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from featserve.cli import main, verbs
from featserve.config import Config, ServerConfig
from featserve.errors import DefinitionError
from featserve.server import transport
from featserve.server.grpcio import GrpcioServer
from featserve.server.native import NativeServer
from tests.command_line import command
from tests.serving import PATIENCE_S, ROOT, Project, Server


@pytest.fixture
def nowhere_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no process that is started from here on find pygrpc-native."""
    (tmp_path / "sitecustomize.py").write_text("import sys\n\nsys.modules['pygrpc_native'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = subprocess.run([sys.executable, "-c", "import pygrpc_native"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in found.stderr


def chosen(**server: Any) -> Any:
    return transport.transport(ServerConfig(**server))


def test_the_settings_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it is grpcio; "native" is pygrpc-native, and so will "auto" be, once that keeps every promise."""
    assert chosen() is chosen(transport="grpcio") is chosen(transport="auto") is GrpcioServer
    assert chosen(transport="native") is NativeServer
    monkeypatch.setattr(transport, "NATIVE_CONFORMS", True)
    assert chosen(transport="auto") is NativeServer


def test_auto_is_native_only_where_all_of_the_suite_passes_on_it() -> None:
    """While tests of the suite are marked as failing on pygrpc-native, "auto" is grpcio; when none is, it is not."""
    marked = [path.name for path in (ROOT / "tests").rglob("*.py") if "mark.xfail(" in path.read_text(encoding="utf-8")]
    assert (set(marked) <= {Path(__file__).name}) == transport.NATIVE_CONFORMS


def test_tls_is_grpcios(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TLS "auto" is grpcio whatever pygrpc-native can, and "native" an error that says what to do."""
    monkeypatch.setattr(transport, "NATIVE_CONFORMS", True)
    files: dict[str, Path] = {"tls_certificate": Path("server.pem"), "tls_key": Path("server.key")}
    assert chosen(**files) is chosen(transport="auto", **files) is GrpcioServer
    with pytest.raises(DefinitionError, match="'native' has no TLS: choose 'grpcio' or 'auto', or leave TLS to"):
        chosen(transport="native", **files)


@pytest.mark.usefixtures("nowhere_installed")
@pytest.mark.parametrize(("transport", "workers"), [("grpcio", 1), ("auto", 1), ("auto", 2)])
def test_everything_works_without_the_package(transport: str, workers: int, tmp_path: Path) -> None:
    """Where pygrpc-native cannot be imported a server starts, takes rows and answers, in one process or several."""
    project = Project.make(tmp_path / "project", transport=transport, workers=workers)
    with Server(project) as server, server.client() as client:
        rows = {"country": ["nz"], "zip": ["1010"], "temp": [9.5], "wind": [0.25]}
        written = client.write("weather", rows, event_time=datetime.now(UTC))
        asked = {"user_id": [1], "country": ["nz"], "zip": ["1010"]}
        found = client.get("ranking", asked, at_least=written.token).to_dict()
    assert (found["weather.temp"], found["weather.wind"], found["activity.plan"]) == ([9.5], [0.25], ["free"])


@pytest.mark.usefixtures("nowhere_installed")
def test_a_transport_that_is_missing_is_named(tmp_path: Path) -> None:
    """Asked for by name, pygrpc-native is not quietly replaced: the error says what to install or to choose."""
    project = Project.make(tmp_path / "project", transport="native")
    done = subprocess.run(command("serve", "-C", project.folder), capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (1, "")
    assert "'native' needs pygrpc-native: pip install 'featserve[native]', or choose 'grpcio'" in done.stderr


def test_the_command_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``serve --transport`` is served with, whatever the file says; a name that is none is refused."""
    served: list[Config] = []
    monkeypatch.setattr(verbs, "run", lambda config, ready: served.append(config))
    Project.make(tmp_path / "project", transport="auto")
    serve = ["serve", "--project", str(tmp_path / "project")]
    for arguments in (serve, [*serve, "--transport", "native"]):
        assert CliRunner().invoke(main, arguments).exit_code == 0
    assert [config.server.transport for config in served] == ["auto", "native"]
    assert "'grpcio', 'native', 'auto'" in CliRunner().invoke(main, [*serve, "--transport", "nativ"]).output
