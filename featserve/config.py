"""The settings of one project: a folder with a ``featserve.toml``.

Comes in: the folder, or the file. Goes out: a frozen, checked ``Config`` with absolute paths. Every key has a default,
so an empty file is a valid project. Knows no definition, registry or store: only where they are.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from featserve.errors import DefinitionError, hint

FILE = "featserve.toml"

SQLITE = "sqlite:///"
POSTGRESQL = "postgresql://"

ENVIRONMENT = {
    "FEATSERVE_REGISTRY_URL": ("registry", "url"),
    "FEATSERVE_STORE_PATH": ("store", "path"),
    "FEATSERVE_PORT": ("server", "port"),
    "OTEL_EXPORTER_OTLP_ENDPOINT": ("telemetry", "otlp_endpoint"),
    "OTEL_SERVICE_NAME": ("telemetry", "service_name"),
}
"""Variables that win over the file, for what differs between two deployments of one project."""

TRANSPORTS = ("grpcio", "native", "auto")
TLS_FILES = {"tls_certificate", "tls_key", "tls_client_ca"}

YEAR_SECONDS = 365 * 86_400.0


def between(default: Any, low: float, high: float) -> Any:
    """Declare a number of a section with its bounds, both included."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, slots=True)
class ProjectConfig:
    """``[project]``. ``definitions``: Python files or globs, relative to the project's folder."""

    definitions: tuple[str, ...] = ("features.py",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "definitions", check(self, "project")["definitions"])


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """``[registry]``. ``url``: ``sqlite:///FILE`` (relative to the project's folder) or ``postgresql://…``."""

    url: str = f"{SQLITE}.featserve/registry.db"

    def __post_init__(self) -> None:
        check(self, "registry")
        if not self.url.startswith((SQLITE, POSTGRESQL)) or self.url in (SQLITE, f"{SQLITE}:memory:"):
            scheme = self.url.partition("://")[0]  # the rest may hold a password
            raise DefinitionError(
                f"[registry] url: {scheme}://… is neither {SQLITE}FILE nor {POSTGRESQL}USER@HOST/DATABASE"
            )


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """``[store]``. ``path``: the online store's folder. ``durability``: what an acknowledged write survives, the
    death of the "process" or of the machine ("fsync"). ``row_cache_mb``: memory for rows that were read,
    ``block_cache_mb`` for parts of files; all workers together have so much. ``catch_up_ms``: how often who follows the
    store looks for what was written."""

    path: Path = Path(".featserve/store")
    durability: str = field(default="process", metadata={"choices": ("process", "fsync")})
    block_cache_mb: int = between(384, 1, 2**20)
    row_cache_mb: int = between(640, 0, 2**20)
    catch_up_ms: float = between(2.0, 0.1, 3_600_000)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(check(self, "store")["path"]))


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """``[server]``. Where it listens (``port`` 0: any free one), and the limits of everything that it takes on.

    ``workers``: processes that serve, 0 for one for each core; with one there is no writer beside it. The limits hold
    for each. ``max_streams``: calls, streams among them, that one connection may have under way on pygrpc-native; a
    client with more holds those back itself. ``transport``: "grpcio"; "native", which is pygrpc-native; or "auto",
    whichever keeps every promise. ``default_deadline_ms``: for a request that carries none. ``drain_seconds``: how long
    requests in flight may take after SIGTERM. ``registry_poll_seconds``: how often it looks for a newly applied
    definition.
    ``max_future_skew_seconds``: how far ahead of the clock a written row's time may be.

    ``tls_certificate``, ``tls_key``: files in PEM, both or neither; without them nothing is encrypted. With
    ``tls_client_ca`` a client has to show a certificate of one of these CAs.
    """

    host: str = "127.0.0.1"
    port: int = between(7070, 0, 65_535)
    workers: int = between(0, 0, 1_024)
    transport: str = field(default="grpcio", metadata={"choices": TRANSPORTS})
    max_message_mb: int = between(16, 1, 2_047)
    max_rows: int = between(10_000, 1, 10_000_000)
    max_concurrent: int = between(512, 1, 1_000_000)
    max_streams: int = between(16, 1, 1_000_000)
    default_deadline_ms: int = between(5_000, 1, 3_600_000)
    drain_seconds: float = between(10.0, 0, 3_600)
    registry_poll_seconds: float = between(2.0, 0.01, 86_400)
    max_future_skew_seconds: float = between(300.0, 0, YEAR_SECONDS)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def __post_init__(self) -> None:
        values = check(self, "server")
        for name in TLS_FILES & values.keys():
            object.__setattr__(self, name, Path(values[name]))
        missing = [name for name in ("tls_certificate", "tls_key") if name not in values]
        if missing and TLS_FILES & values.keys():
            raise DefinitionError(
                f"[server] {' and '.join(missing)}: not set; TLS needs a certificate and the key that belongs to it"
            )


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """``[telemetry]``. What the server tells about itself, in OpenTelemetry's terms.

    ``otlp_endpoint``: where traces are sent, OTLP over gRPC (``http://localhost:4317``; ``https://`` for TLS); without
    it nothing is traced. ``sample_ratio``: the part of requests that is traced where the caller has not decided.
    ``service_name``: what the server is called in traces and metrics. ``prometheus_port``: where metrics are read, on
    the server's host (0: any free port); without it nothing is counted. With several workers it is the writer's, and
    worker 1 has the next one, and so on.
    """

    otlp_endpoint: str | None = None
    sample_ratio: float = between(0.01, 0, 1)
    service_name: str = "featserve"
    prometheus_port: int | None = between(None, 0, 65_535)

    def __post_init__(self) -> None:
        check(self, "telemetry")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise DefinitionError(
                f"[telemetry] otlp_endpoint: {self.otlp_endpoint!r} is no URL as in http://localhost:4317"
            )


@dataclass(frozen=True, slots=True)
class Config:
    """One project's settings. Relative paths are resolved against ``folder``, whatever the current directory is."""

    folder: Path
    project: ProjectConfig = field(default_factory=ProjectConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        folder = self.folder.resolve()
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "store", replace(self.store, path=folder / self.store.path))
        files = {name: folder / path for name in TLS_FILES if (path := getattr(self.server, name)) is not None}
        object.__setattr__(self, "server", replace(self.server, **files))
        if self.registry.url.startswith(SQLITE):
            database = folder / self.registry.url.removeprefix(SQLITE)
            object.__setattr__(self, "registry", replace(self.registry, url=f"{SQLITE}{database}"))


SECTIONS = {
    "project": ProjectConfig,
    "registry": RegistryConfig,
    "store": StoreConfig,
    "server": ServerConfig,
    "telemetry": TelemetryConfig,
}


def load_config(path: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """Load the settings of the project at ``path``, its folder or its ``featserve.toml``.

    Values of ``environment`` win over the file (``FEATSERVE_REGISTRY_URL``, ``FEATSERVE_STORE_PATH``,
    ``FEATSERVE_PORT``; OpenTelemetry's own ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME``). Raises
    DefinitionError naming the file and the key.
    """
    file = path / FILE if path.is_dir() else path
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DefinitionError(
            f"no project at {path}: there is no {file}; `featserve init {file.parent}` makes one that works at once"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DefinitionError(f"{file}: {error}") from None
    try:
        _known("section", tables, SECTIONS)
        config = Config(file.parent, **{name: _section(name, table) for name, table in tables.items()})
    except DefinitionError as error:
        raise DefinitionError(f"{file}: {error}") from None
    for variable, (section, key) in ENVIRONMENT.items():
        if variable in environment and (environment[variable] or not variable.startswith("OTEL_")):  # empty is unset
            config = _overridden(config, variable, environment[variable], section, key)
    return config


def check(section: Any, title: str) -> dict[str, Any]:
    """Return a section's values by key, lists as tuples; refuses a wrong type, range or choice, naming the key."""
    values = {}
    for f in fields(section):
        value = getattr(section, f.name)
        where = f"[{title}] {f.name}"
        kind, _, absent = str(f.type).partition(" | ")
        if absent and value is None:
            continue
        expected, right = KEY_KINDS[kind]
        if isinstance(value, bool) or not right(value):
            raise DefinitionError(f"{where}: expected {expected}, got {value!r}")
        if "choices" in f.metadata and value not in f.metadata["choices"]:
            raise DefinitionError(f"{where}: {value!r} is not one of {', '.join(f.metadata['choices'])}")
        if "low" in f.metadata and not f.metadata["low"] <= value <= f.metadata["high"]:
            raise DefinitionError(f"{where}: {value} is not from {f.metadata['low']:,} to {f.metadata['high']:,}")
        values[f.name] = tuple(value) if isinstance(value, list) else value
    return values


KEY_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda value: isinstance(value, int)),
    "float": ("a number", lambda value: isinstance(value, int | float)),
    "str": ("a text that is not empty", lambda value: isinstance(value, str) and bool(value)),
    "Path": ("a path", lambda value: isinstance(value, str | Path) and bool(str(value))),
    "tuple[str, ...]": (
        "a list of at least one file or glob",
        lambda value: isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) and v for v in value),
    ),
}


def _section(name: str, table: object) -> Any:
    if not isinstance(table, dict):
        raise DefinitionError(f"{name} = {table!r} is not a section; write [{name}] on a line of its own")
    section: type[Any] = SECTIONS[name]
    _known(f"key in [{name}]", table, [f.name for f in fields(section)])
    return section(**table)


def _known(kind: str, table: dict[str, Any], names: Iterable[str]) -> None:
    known = list(names)
    for key in table:
        if key not in known:
            raise DefinitionError(f"unknown {kind}: {key!r}{hint(key, known)}")


def _overridden(config: Config, variable: str, text: str, section: str, key: str) -> Config:
    try:
        value = int(text) if key == "port" else text
        return replace(config, **{section: replace(getattr(config, section), **{key: value})})
    except ValueError:
        raise DefinitionError(f"{variable}: {text!r} is not a whole number") from None
    except DefinitionError as error:
        raise DefinitionError(f"{variable}: {error}") from None
