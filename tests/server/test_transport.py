"""Which transport serves: what the settings say, as far as it is installed."""

from __future__ import annotations

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
from tests.serving import Project


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pygrpc-native be missing."""
    monkeypatch.setattr(transport, "find_spec", lambda name: None)


def chosen(**server: Any) -> Any:
    return transport.transport(ServerConfig(**server))


def test_the_settings_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it is grpcio; "native" is pygrpc-native, and so will "auto" be, once that keeps every promise."""
    assert chosen() is chosen(transport="grpcio") is chosen(transport="auto") is GrpcioServer
    assert chosen(transport="native") is NativeServer
    monkeypatch.setattr(transport, "NATIVE_CONFORMS", True)
    assert chosen(transport="auto") is NativeServer


def test_tls_is_grpcios(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TLS "auto" is grpcio whatever pygrpc-native can, and "native" an error that says what to do."""
    monkeypatch.setattr(transport, "NATIVE_CONFORMS", True)
    files: dict[str, Path] = {"tls_certificate": Path("server.pem"), "tls_key": Path("server.key")}
    assert chosen(**files) is chosen(transport="auto", **files) is GrpcioServer
    with pytest.raises(DefinitionError, match="'native' has no TLS: choose 'grpcio' or 'auto', or leave TLS to"):
        chosen(transport="native", **files)


@pytest.mark.usefixtures("not_installed")
def test_everything_works_without_the_package() -> None:
    """Without it "auto" is grpcio, and "native" an error that says what to do."""
    assert chosen() is chosen(transport="auto") is GrpcioServer
    with pytest.raises(DefinitionError, match=r"pip install 'featserve\[native\]', or choose 'grpcio'"):
        chosen(transport="native")


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
