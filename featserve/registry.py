"""The registry: which definition each ``name@version`` means, who applied it when, and what was loaded for it.

Comes in: a database's URL, a project's ``Definitions``. Goes out: plans, immutable snapshots, history. SQLAlchemy Core
over a SQLite file or PostgreSQL. Writers take one lock for the whole registry at the start of their transaction, so an
apply compares with what it then changes, and lands whole or not at all. Knows no file of definitions and no store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa

from featserve.catalog import KINDS, KINDS_BY_NAME, Definition, Definitions, Kind, Snapshot, parse_reference
from featserve.changes import Change, Plan, compare
from featserve.errors import CallerError, RegistryConflict, RegistryError, RegistryMissing, Violation, unknown
from featserve.trial import check_transform

__all__ = ["Change", "HistoryEntry", "Load", "Plan", "Registry", "Snapshot"]

SCHEMA_VERSION = "1"
WAIT_SECONDS = 30

metadata = sa.MetaData()

meta = sa.Table("featserve_meta", metadata, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))

definitions_table = sa.Table(
    "featserve_definitions",
    metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("applied_at_us", sa.BigInteger, nullable=False),
)

changes_table = sa.Table(
    "featserve_changes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)
"""The history. Its greatest id is the registry's revision."""

loads_table = sa.Table(
    "featserve_loads",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("view", sa.Text, nullable=False),
    sa.Column("as_of_us", sa.BigInteger, nullable=False),
    sa.Column("finished_at_us", sa.BigInteger, nullable=False),
    sa.Column("rows_read", sa.BigInteger, nullable=False),
    sa.Column("rows_stored", sa.BigInteger, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
)

READ, WRITE = "read", "write"

BEGIN = {
    ("sqlite", READ): ["BEGIN"],
    ("sqlite", WRITE): ["BEGIN IMMEDIATE"],
    # One snapshot for all the statements of a read.
    ("postgresql", READ): ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"],
    # The number is this registry's own; the lock goes with the transaction, however that ends.
    ("postgresql", WRITE): [
        f"SET LOCAL lock_timeout = '{WAIT_SECONDS}s'",
        "SELECT pg_advisory_xact_lock(7310585612018)",
    ],
}
"""How a transaction begins, by database and access: a writer first takes the one lock of the registry."""

ACTIONS = {"create": "created", "update": "updated"}


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One definition written by one apply: ``action`` is "created" or "updated", ``details`` its differences."""

    revision: int
    at_us: int
    who: str
    kind: str
    id: str
    hash: str
    action: str
    details: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """One finished load of a view (``name@version``) from its source into the online store."""

    view: str
    as_of_us: int
    finished_at_us: int
    rows_read: int
    rows_stored: int
    source: str
    seconds: float


class Registry:
    """An open registry. Safe to share between threads; close it, or use it as a context manager.

    ``address``: its database's URL without the password. Every method raises RegistryError when the database cannot be
    reached or read.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.address = engine.url.render_as_string(hide_password=True)

    @classmethod
    def open(cls, url: str, create: bool = True) -> Registry:
        """Open the registry at ``sqlite:///FILE`` or ``postgresql://…``.

        ``create``: make its tables where there are none; otherwise that is a RegistryMissing, and nothing is written.
        Raises RegistryError for a database that is unreachable, damaged, or of another schema version.
        """
        registry = cls(_engine(url, create))
        try:
            version = registry._schema_version()
            if version is None and create:
                version = registry._create_tables()
            if version is None:
                raise RegistryMissing(f"no registry at {registry.address} yet: `featserve apply` makes it")
            if version != SCHEMA_VERSION:
                raise RegistryError(
                    f"the registry at {registry.address} has schema version {version}; this featserve reads and writes "
                    f"version {SCHEMA_VERSION}: use the featserve that made it, or another registry"
                )
        except BaseException:
            registry.close()
            raise
        return registry

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def plan(self, definitions: Definitions) -> Plan:
        """Return what ``apply`` would change, conflicts included; writes nothing."""
        return compare(self.snapshot(), definitions)

    def apply(self, definitions: Definitions, who: str, now_us: int) -> Plan:
        """Store ``definitions`` in one transaction, and return what that changed.

        ``who`` and ``now_us`` go into the history. What is already stored is left alone, and adds no history. Raises
        RegistryConflict, having written nothing, if the meaning of a stored version would change, and DefinitionError
        if a new transform breaks the contract of one.
        """
        # A project's own function may run for any time, so before the lock is taken. As nothing is ever deleted, all
        # that is created under the lock was new here.
        for change in self.plan(definitions).of("create"):
            if change.kind == "on_demand_transform":
                check_transform(definitions.transforms[change.id])
        with self._transaction(WRITE) as connection:
            plan = compare(self._read(connection), definitions)
            if plan.conflicts:
                raise _conflict(plan.conflicts)
            for change in plan.writes:
                kind = KINDS_BY_NAME[change.kind]
                self._write(connection, kind, change, definitions.of(kind)[change.id], who, now_us)
        return plan

    def snapshot(self) -> Snapshot:
        """Return everything that the registry holds, as of one instant.

        Raises RegistryError naming the row if a stored definition is damaged or its hash is not that of its body.
        """
        with self._transaction(READ) as connection:
            return self._read(connection)

    def revision(self) -> int:
        """Return the number of the latest change, 0 before the first: what a snapshot taken now would have."""
        with self._transaction(READ) as connection:
            return self._revision(connection)

    def history(self, name: str | None = None) -> list[HistoryEntry]:
        """Return what applies have written, oldest first: of all, of ``name``, or of ``name@version``."""
        query = sa.select(changes_table).order_by(changes_table.c.id)
        if name is not None:
            bare, version, _ = parse_reference("definition", name)
            query = query.where(changes_table.c.name == bare)
            if version is not None:
                query = query.where(changes_table.c.version == version)
        with self._transaction(READ) as connection:
            rows = connection.execute(query).all()
            if name is not None and not rows:
                known = connection.execute(sa.select(changes_table.c.name).distinct()).scalars()
                raise unknown("definition", name, known)
        return [
            HistoryEntry(
                row.id,
                row.at_us,
                row.who,
                row.kind,
                KINDS_BY_NAME[row.kind].id(row.name, row.version),
                row.hash,
                row.action,
                tuple(json.loads(row.detail)),
            )
            for row in rows
        ]

    def record_load(self, load: Load) -> None:
        """Add a finished load."""
        with self._transaction(WRITE) as connection:
            connection.execute(loads_table.insert().values(asdict(load)))

    def loads(self, view: str | None = None) -> list[Load]:
        """Return the finished loads, of all views or of one ``name@version``, in the order they were recorded."""
        columns = [column for column in loads_table.c if column.name != "id"]
        query = sa.select(*columns).order_by(loads_table.c.id)
        if view is not None:
            query = query.where(loads_table.c.view == view)
        with self._transaction(READ) as connection:
            return [Load(*row) for row in connection.execute(query)]

    @contextmanager
    def _transaction(self, access: str) -> Iterator[sa.Connection]:
        engine = self._engine.execution_options(featserve_access=access)
        with _explained(self.address), engine.begin() as connection:
            yield connection

    def _schema_version(self) -> str | None:
        """Return the stored schema version, None where there are no tables yet."""
        with self._transaction(READ) as connection:
            if not sa.inspect(connection).has_table(meta.name):
                return None
            version: str | None = connection.execute(sa.select(meta.c.value).where(meta.c.key == "schema")).scalar()
            return version or "unknown"

    def _create_tables(self) -> str:
        with self._transaction(WRITE) as connection:
            if not sa.inspect(connection).has_table(meta.name):  # or else another process just made them
                metadata.create_all(connection)
                connection.execute(meta.insert().values(key="schema", value=SCHEMA_VERSION))
        return self._schema_version() or "unknown"

    def _revision(self, connection: sa.Connection) -> int:
        return connection.execute(sa.select(sa.func.max(changes_table.c.id))).scalar() or 0

    def _read(self, connection: sa.Connection) -> Snapshot:
        revision = self._revision(connection)
        rows = sorted(connection.execute(sa.select(definitions_table)), key=lambda row: (row.name, row.version))
        if foreign := {row.kind for row in rows} - set(KINDS_BY_NAME):
            raise RegistryError(f"the registry at {self.address} holds kinds unknown to this featserve: {foreign}")
        found: dict[str, _Decoded] = {}
        for kind in KINDS:
            stored = {kind.id(row.name, row.version): row for row in rows if row.kind == kind.name}
            found[kind.field] = _Decoded(stored, partial(self._decode, kind, found))
        snapshot: dict[str, Any] = {field: {id_: some[id_] for id_ in some.rows} for field, some in found.items()}
        return Snapshot(**snapshot, revision=revision)

    def _decode(self, kind: Kind, found: Mapping[str, Mapping[str, Any]], row: Any) -> Definition:
        """Return the definition in a row, proved to be the one that was applied."""
        try:
            definition = kind.decode(json.loads(row.body), found)
        except (CallerError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._damaged(kind, row, f"its body cannot be read ({error.__class__.__name__}: {error})") from None
        if (definition.name, kind.version(definition)) != (row.name, row.version):
            raise self._damaged(kind, row, f"its body is that of another, {definition.name!r}")
        if definition.hash != row.hash:
            raise self._damaged(kind, row, f"its hash is {row.hash[:16]}, but that of its body {definition.hash[:16]}")
        return definition

    def _damaged(self, kind: Kind, row: Any, why: str) -> RegistryError:
        return RegistryError(
            f"the registry at {self.address}: {kind.label} {kind.id(row.name, row.version)}: {why}; the row was "
            "damaged, or changed by other means than `featserve apply`: restore it from a backup"
        )

    def _write(
        self, connection: sa.Connection, kind: Kind, change: Change, definition: Definition, who: str, now_us: int
    ) -> None:
        key = {"kind": kind.name, "name": definition.name, "version": kind.version(definition)}
        body = json.dumps(definition.to_dict())
        if change.action == "create":
            written: Any = definitions_table.insert().values(key)
        else:
            same = sa.and_(*(definitions_table.c[column] == value for column, value in key.items()))
            written = definitions_table.update().where(same)
        connection.execute(written.values(hash=definition.hash, body=body, applied_at_us=now_us))
        connection.execute(
            changes_table.insert().values(
                **key,
                at_us=now_us,
                who=who,
                hash=definition.hash,
                action=ACTIONS[change.action],
                detail=json.dumps(change.details),
            )
        )


class _Decoded(dict[str, Definition]):
    """The definitions of one kind by id, each decoded when first asked for: whatever it is made of comes first."""

    def __init__(self, rows: Mapping[str, Any], decode: Callable[[Any], Definition]) -> None:
        super().__init__()
        self.rows = rows
        self._decode = decode

    def __missing__(self, id_: str) -> Definition:
        definition = self[id_] = self._decode(self.rows[id_])
        return definition


def _conflict(conflicts: tuple[Change, ...]) -> RegistryConflict:
    lines = [f"{c.kind.replace('_', ' ')} {c.id} ({'; '.join(c.details)})" for c in conflicts]
    return RegistryConflict(
        f"the meaning of what is already applied would change: {', '.join(lines)}. Nothing was applied. A version "
        "never changes its meaning: undo the edit, or raise version=… and both are served side by side",
        violations=[Violation(c.id, "; ".join(c.details)) for c in conflicts],
    )


def _engine(url: str, create: bool) -> sa.Engine:
    """Return an engine whose transactions begin as ``BEGIN`` says."""
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        if not create and not path.is_file():
            raise RegistryMissing(f"no registry at {path} yet: `featserve apply` makes it")
        with _explained(url):
            path.parent.mkdir(parents=True, exist_ok=True)
        # A connection per use: a file that was restored from a backup is seen, and no handle outlives its thread.
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(path)), poolclass=sa.NullPool, connect_args={"timeout": WAIT_SECONDS}
        )
        sa.event.listen(engine, "connect", _leave_transactions_to_us)
    elif url.startswith("postgresql://"):
        try:
            address = sa.make_url(url).set(drivername="postgresql+psycopg")
        except (sa.exc.ArgumentError, ValueError):  # whose message may hold the password
            raise RegistryError("the registry's URL is not postgresql://USER:PASSWORD@HOST:PORT/DATABASE") from None
        with _explained(address.render_as_string(hide_password=True)):
            # A restarted database is found again at the next use.
            engine = sa.create_engine(address, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    else:
        raise RegistryError(f"registry {url.partition('://')[0]}://…: neither sqlite:///FILE nor postgresql://…")
    sa.event.listen(engine, "begin", _begin)
    return engine


def _leave_transactions_to_us(connection: Any, record: object) -> None:
    """Keep Python's sqlite3 from starting transactions by itself, later than ``BEGIN`` would."""
    connection.isolation_level = None


def _begin(connection: sa.Connection) -> None:
    access = connection.get_execution_options().get("featserve_access", READ)
    for statement in BEGIN[connection.dialect.name, access]:
        connection.exec_driver_sql(statement)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn the database's errors into a RegistryError that names the registry."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise RegistryError(f"the registry at {where} cannot be used: {' '.join(str(error.orig).split())}") from error
    except (sa.exc.SQLAlchemyError, OSError) as error:
        raise RegistryError(f"the registry at {where} cannot be used: {error}") from error
    except ModuleNotFoundError as error:
        raise RegistryError(f"a registry in PostgreSQL needs `pip install 'featserve[postgres]'`: {error}") from error
