"""The settings file: what it says, what it may not say, and where its paths lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from featserve.config import Config, ServerConfig, load_config
from featserve.errors import DefinitionError

FULL = """
[project]
definitions = ["features.py", "views/*.py"]
[registry]
url = "sqlite:///state/registry.db"
[store]
path = "state/store"
durability = "fsync"
block_cache_mb = 8
row_cache_mb = 0
[server]
host = "0.0.0.0"
port = 0
workers = 3
transport = "auto"
max_message_mb = 4
max_rows = 100
max_concurrent = 3
max_streams = 7
default_deadline_ms = 250
drain_seconds = 1
registry_poll_seconds = 0.5
max_future_skew_seconds = 0
tls_certificate = "tls/server.pem"
tls_key = "tls/server.key"
tls_client_ca = "/etc/ssl/clients.pem"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def load(project: Path, text: str, **environment: str) -> Config:
    (project / "featserve.toml").write_text(text)
    return load_config(project, environment)


def test_every_key_is_read(project: Path) -> None:
    """Each key of the file lands in the setting of its name, and relative paths are the project's."""
    config = load(project, FULL)
    assert config.folder == project
    assert config.project.definitions == ("features.py", "views/*.py")
    assert config.registry.url == f"sqlite:///{project}/state/registry.db"
    assert config.store.path == project / "state/store"
    assert (config.store.durability, config.store.block_cache_mb, config.store.row_cache_mb) == ("fsync", 8, 0)
    tls = (project / "tls/server.pem", project / "tls/server.key", Path("/etc/ssl/clients.pem"))
    assert config.server == ServerConfig("0.0.0.0", 0, 3, "auto", 4, 100, 3, 7, 250, 1, 0.5, 0, *tls)


def test_an_empty_file_is_a_project(project: Path) -> None:
    """Every key has its default."""
    config = load(project, "")
    assert config == Config(project)
    assert config.registry.url == f"sqlite:///{project}/.featserve/registry.db"
    assert config.store.path == project / ".featserve/store"
    assert (config.server.host, config.server.port, config.server.drain_seconds) == ("127.0.0.1", 7070, 10)


def test_the_file_itself_can_be_named(project: Path) -> None:
    """The path of the file loads the same settings as the path of its folder."""
    config = load(project, FULL)
    assert load_config(project / "featserve.toml", {}) == config


def test_a_relative_folder_gives_absolute_paths(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing the current directory later changes no path."""
    load(project, "")
    monkeypatch.chdir(project.parent)
    assert load_config(Path("project"), {}).store.path == project / ".featserve/store"


def test_absolute_paths_stay(project: Path) -> None:
    """An absolute SQLite or store path, and a PostgreSQL URL, are taken as they are."""
    config = load(project, '[registry]\nurl = "sqlite:////var/lib/r.db"\n[store]\npath = "/var/lib/store"')
    assert (config.registry.url, config.store.path) == ("sqlite:////var/lib/r.db", Path("/var/lib/store"))
    assert load(project, '[registry]\nurl = "postgresql://u:p@h/d"').registry.url == "postgresql://u:p@h/d"


def test_the_environment_wins(project: Path) -> None:
    """What differs between deployments can be set without touching the file."""
    config = load(
        project, FULL, FEATSERVE_REGISTRY_URL="postgresql://h/d", FEATSERVE_STORE_PATH="other", FEATSERVE_PORT="81"
    )
    assert (config.registry.url, config.store.path, config.server.port) == (
        "postgresql://h/d",
        project / "other",
        81,
    )
    assert config.server.max_rows == 100


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("FEATSERVE_PORT", "http", "FEATSERVE_PORT: 'http' is not a whole number"),
        ("FEATSERVE_PORT", "70000", r"FEATSERVE_PORT: \[server\] port: 70000 is not from 0 to 65,535"),
        ("FEATSERVE_REGISTRY_URL", "mysql://u:secret@h", r"FEATSERVE_REGISTRY_URL: \[registry\] url: mysql://… is"),
        ("FEATSERVE_STORE_PATH", "", r"FEATSERVE_STORE_PATH: \[store\] path: expected a path, got ''"),
    ],
)
def test_a_bad_variable_is_named(project: Path, variable: str, value: str, complaint: str) -> None:
    """A wrong value in the environment is blamed on its variable, and shows no password."""
    with pytest.raises(DefinitionError, match=complaint) as caught:
        load(project, "", **{variable: value})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[sever]\nport = 1", "unknown section: 'sever'; did you mean 'server'"),
        ("[server]\nprot = 1", r"unknown key in \[server\]: 'prot'; did you mean 'port'"),
        ("port = 1", "unknown section: 'port'"),
        ("server = 1", r"server = 1 is not a section; write \[server\]"),
        ('[server]\nport = "7070"', r"\[server\] port: expected a whole number, got '7070'"),
        ("[server]\nport = 1.5", r"\[server\] port: expected a whole number, got 1.5"),
        ("[server]\nport = true", r"\[server\] port: expected a whole number, got True"),
        ("[server]\nport = 65536", r"\[server\] port: 65536 is not from 0 to 65,535"),
        ("[server]\nport = -1", r"\[server\] port: -1 is not from 0"),
        ("[server]\nmax_rows = 0", r"\[server\] max_rows: 0 is not from 1"),
        ("[server]\ndrain_seconds = nan", r"\[server\] drain_seconds: nan is not from 0"),
        ("[server]\ndrain_seconds = inf", r"\[server\] drain_seconds: inf is not from 0"),
        ("[server]\nregistry_poll_seconds = 0", r"\[server\] registry_poll_seconds: 0 is not from 0.01"),
        ('[server]\nhost = ""', r"\[server\] host: expected a text that is not empty"),
        ('[server]\ntls_certificate = "a"', r"\[server\] tls_key: not set; TLS needs a certificate and the key"),
        ('[server]\ntls_key = "a"', r"\[server\] tls_certificate: not set; TLS needs"),
        ('[server]\ntls_client_ca = "a"', r"\[server\] tls_certificate and tls_key: not set; TLS needs"),
        ("[server]\ntls_key = 3", r"\[server\] tls_key: expected a path, got 3"),
        ('[store]\ndurability = "none"', r"\[store\] durability: 'none' is not one of process, fsync"),
        ("[store]\npath = 3", r"\[store\] path: expected a path, got 3"),
        ('[project]\ndefinitions = "features.py"', r"\[project\] definitions: expected a list"),
        ("[project]\ndefinitions = []", r"\[project\] definitions: expected a list of at least one"),
        ("[project]\ndefinitions = [1]", r"\[project\] definitions: expected a list"),
        ('[registry]\nurl = "mysql://h/d"', r"\[registry\] url: mysql://… is neither sqlite:///FILE nor postgresql"),
        ('[registry]\nurl = "sqlite://"', r"\[registry\] url: sqlite://… is neither"),
        ('[registry]\nurl = "sqlite:///:memory:"', r"\[registry\] url: sqlite://… is neither"),
        ("[server]\nport = \n", r"at line 2"),
        ("[server]\nport = 1\nport = 2\n", r"at line 3"),
    ],
)
def test_a_mistake_is_named(project: Path, text: str, complaint: str) -> None:
    """A wrong section, key, type, range or choice is an error that names the file and the key."""
    with pytest.raises(DefinitionError, match=complaint) as caught:
        load(project, text)
    assert str(project / "featserve.toml") in str(caught.value)


def test_a_folder_without_a_project_says_how_to_make_one(tmp_path: Path) -> None:
    """A missing file, or folder, names what is missing and the command that makes it."""
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "featserve.toml"):
        with pytest.raises(DefinitionError, match=r"there is no .*featserve init"):
            load_config(path, {})


def test_a_file_that_is_not_text_is_named(project: Path) -> None:
    """Bytes that are no UTF-8 are an error of the file, not a traceback."""
    (project / "featserve.toml").write_bytes(b"\xff\xfe[server]")
    with pytest.raises(DefinitionError, match=r"featserve\.toml: 'utf-8' codec"):
        load_config(project, {})


def test_a_section_checks_itself() -> None:
    """A section made in code is held to the same limits as one from a file."""
    with pytest.raises(DefinitionError, match=r"\[server\] port: 70000"):
        ServerConfig(port=70_000)
