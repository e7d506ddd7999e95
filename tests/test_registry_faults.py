"""Registries that are damaged, foreign, missing or unreachable, and what each error says."""

from __future__ import annotations

import os
import random
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from featserve.definitions import FeatureService
from featserve.errors import RegistryError
from featserve.registry import Registry
from tests.declarations import NOW_US, declare, view

if TYPE_CHECKING:
    from tests.postgres import Cluster

pytest_plugins = ["tests.postgres"]


def execute(url: str, statement: str) -> None:
    """Change a registry's database behind its back."""
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        connection.execute(statement)
        connection.close()
    else:
        with psycopg.connect(url, autocommit=True) as other:
            other.execute(statement.encode())


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("SET body = replace(body, '10800000000', '10800000001')", "its hash is [0-9a-f]{16}, but that of its body"),
        ("SET hash = 'abc'", "its hash is abc, but that of its body"),
        ("SET body = '{'", r"its body cannot be read \(JSONDecodeError"),
        ("SET body = '[]'", r"its body cannot be read \(TypeError"),
        ("SET body = '{}'", r"its body cannot be read \(KeyError: 'name'\)"),
        ("SET body = replace(body, 'float32', 'float33')", r"its body cannot be read \(DefinitionError: unknown type"),
        ("SET body = replace(body, 'weather', 'whether')", "its body is that of another, 'whether'"),
    ],
)
def test_a_tampered_row_is_named(registry_url: str, statement: str, complaint: str) -> None:
    """A stored definition whose body is not what was applied is named, and neither read nor built upon."""
    with Registry.open(registry_url) as registry:
        registry.apply(declare(view()), "ann", NOW_US)
        execute(registry_url, f"UPDATE featserve_definitions {statement} WHERE kind = 'feature_view'")
        with pytest.raises(RegistryError, match=f"feature view weather@1: {complaint}"):
            registry.snapshot()
        with pytest.raises(RegistryError, match="feature view weather@1"):
            registry.apply(declare(view("user")), "ann", NOW_US)


def test_a_missing_row_is_noticed(registry: Registry, registry_url: str) -> None:
    """A service whose view was deleted from the database is named."""
    registry.apply(declare(FeatureService("fraud", [view()])), "ann", NOW_US)
    execute(registry_url, "DELETE FROM featserve_definitions WHERE kind = 'feature_view'")
    with pytest.raises(RegistryError, match=r"feature service fraud@1: .*KeyError: 'weather@1'"):
        registry.snapshot()


def test_an_unknown_kind_is_not_ignored(registry: Registry, registry_url: str) -> None:
    """A kind of definition from a newer featserve is an error, not silently left out."""
    registry.apply(declare(view()), "ann", NOW_US)
    execute(registry_url, "UPDATE featserve_definitions SET kind = 'window' WHERE kind = 'entity'")
    with pytest.raises(RegistryError, match=r"holds kinds unknown to this featserve: \{'window'\}"):
        registry.snapshot()


def test_another_schema_version_is_refused(registry_url: str) -> None:
    """A registry that another featserve laid out is not touched."""
    Registry.open(registry_url).close()
    execute(registry_url, "UPDATE featserve_meta SET value = '99'")
    for create in (True, False):
        with pytest.raises(RegistryError, match="has schema version 99; this featserve reads and writes version 1"):
            Registry.open(registry_url, create)


def test_opening_without_create(registry_url: str) -> None:
    """Without ``create`` a missing registry is an error with its remedy, and an existing one is opened."""
    with pytest.raises(RegistryError, match="yet: `featserve apply` makes it"):
        Registry.open(registry_url, create=False)
    if registry_url.startswith("sqlite"):
        assert not Path(registry_url.removeprefix("sqlite:///")).parent.exists()
    with Registry.open(registry_url) as registry:
        registry.apply(declare(view()), "ann", NOW_US)
    with Registry.open(registry_url, create=False) as registry:
        assert registry.snapshot().view("weather") == view()


def test_an_empty_sqlite_file_is_no_registry_yet(tmp_path: Path) -> None:
    """What a creation that was killed at once leaves behind is created anew."""
    (tmp_path / "r.db").touch()
    with pytest.raises(RegistryError, match="yet: `featserve apply`"):
        Registry.open(f"sqlite:///{tmp_path}/r.db", create=False)
    with Registry.open(f"sqlite:///{tmp_path}/r.db") as registry:
        assert registry.revision() == 0


def test_a_damaged_sqlite_file_is_named(tmp_path: Path) -> None:
    """A file that is no database, or is cut short, is an error that names it."""
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(random.Random(1).randbytes(10_000))
    with pytest.raises(RegistryError, match=r"garbage\.db cannot be used: file is not a database"):
        Registry.open(f"sqlite:///{garbage}")
    cut = tmp_path / "cut.db"
    with Registry.open(f"sqlite:///{cut}") as registry:
        registry.apply(declare(*(view(f"v{i}") for i in range(30))), "ann", NOW_US)
        os.truncate(cut, cut.stat().st_size // 3)
        with pytest.raises(RegistryError, match=r"cut\.db cannot be used: database disk image is malformed"):
            registry.snapshot()


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("sqlite:////proc/nowhere/r.db", "cannot be used: .*No such file"),
        ("sqlite:////proc", "cannot be used: unable to open database file"),
        ("postgresql://u:secret@127.0.0.1:1/d", r"u:\*\*\*@127\.0\.0\.1:1/d cannot be used: connection failed"),
        ("postgresql://u:secret@h:port/d", "URL is not postgresql://USER:PASSWORD@HOST:PORT/DATABASE"),
        ("mysql://u:secret@h/d", "registry mysql://…: neither sqlite:///FILE nor postgresql://…"),
    ],
)
def test_an_unreachable_registry_is_named(url: str, complaint: str) -> None:
    """A registry that cannot be opened says where it is and why, and never shows the password."""
    with pytest.raises(RegistryError, match=complaint) as caught:
        Registry.open(url)
    assert "secret" not in str(caught.value)


def test_a_restarted_database_is_found_again(registry: Registry, registry_url: str, postgres: Cluster) -> None:
    """A registry that is polled outlives the death of its connections."""
    registry.apply(declare(view()), "ann", NOW_US)
    if registry_url.startswith("postgresql"):
        postgres.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname IS NOT NULL"
        )
    assert registry.revision() == registry.snapshot().revision


def test_other_tables_are_left_alone(registry_url: str) -> None:
    """The registry may share its database with tables of common names."""
    if registry_url.startswith("sqlite"):
        Path(registry_url.removeprefix("sqlite:///")).parent.mkdir()
    for table in ("meta", "definitions", "changes", "loads"):
        execute(registry_url, f"CREATE TABLE {table} (x INTEGER)")
    with Registry.open(registry_url) as registry:
        registry.apply(declare(view()), "ann", NOW_US)
        assert registry.snapshot().view("weather")
