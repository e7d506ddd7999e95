"""The verbs, one function each: take the words of a command line, call the library, show the result."""

from __future__ import annotations

import getpass
import os
import shlex
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from featserve.catalog import Snapshot
from featserve.changes import compare
from featserve.cli.answer import Answer
from featserve.cli.columns import read_columns
from featserve.cli.condition import show_status
from featserve.cli.explain import show_stages, show_stages_json
from featserve.cli.inventory import (
    Described,
    definition_json,
    find,
    show_all,
    show_all_json,
    show_definition,
    show_services,
)
from featserve.cli.load import materialize as load_views
from featserve.cli.load import push as push_file
from featserve.cli.show import (
    columns_of,
    counted,
    note,
    show,
    show_changes,
    show_history,
    show_json,
    show_plan,
    show_unchanged,
)
from featserve.cli.starter import NEXT, TOLD, write_starter
from featserve.cli.target import Target, Verb, asks
from featserve.config import TRANSPORTS, Config, load_config
from featserve.embedded import Embedded, clock_us, instant_us
from featserve.errors import RegistryMissing
from featserve.project import load_definitions
from featserve.registry import Registry
from featserve.server.app import run
from featserve.server.logs import configure
from featserve.stages import Stages

CONFLICTS = (
    "nothing can be applied while there are conflicts. A version never changes its meaning: undo the edit, or raise "
    "version=... and both are served side by side"
)


def instant(text: str) -> datetime:
    """Return the instant that a text in ISO 8601 means; without an offset it is UTC."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a time as in 2026-01-31 or 2026-01-31T12:00:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def project(verb: Verb) -> Verb:
    """Add the option that every verb has: the project's folder."""
    return click.option(
        "-C",
        "--project",
        "folder",
        type=click.Path(exists=True, path_type=Path),
        default=".",
        envvar="FEATSERVE_PROJECT",
        help="The project's folder, by default the current one.  [env var: FEATSERVE_PROJECT]",
    )(verb)


def settings(folder: Path) -> Config:
    """Load a project's settings; messages name its folder in full."""
    return load_config(folder.resolve())


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
server = asks("--server", "Ask this running server.")


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=".")
def init(folder: Path) -> None:
    """Make a small, commented project that works at once.

    \b
    Example:
      featserve init shop
    """
    write_starter(folder, datetime.now(UTC))
    show(Text.assemble("Made a project in ", (str(folder), "bold"), ":"))
    show(*(f"  {name:<16} {what}" for name, what in TOLD.items()))
    commands = [] if folder.resolve() == Path.cwd() else [(f"cd {shlex.quote(str(folder))}", "")]
    show("", "Try it:")
    for command, what in (*commands, *NEXT):
        click.echo(f"  {command:<42}  # {what}" if what else f"  {command}")


@click.command()
@project
@click.option("--detailed-exitcode", is_flag=True, help="Exit with 2 where there is something to apply.")
@click.pass_context
def plan(ctx: click.Context, folder: Path, detailed_exitcode: bool) -> None:
    """Show what apply would change.

    Exits with 1 where a definition conflicts with what was applied under its version.

    \b
    Example:
      featserve plan
    """
    config = settings(folder)
    definitions = load_definitions(config)
    try:
        with Registry.open(config.registry.url, create=False) as registry:
            stored = registry.snapshot()
    except RegistryMissing:
        stored = Snapshot()
    changes = compare(stored, definitions)
    show_plan(changes, stored.revision)
    if changes.conflicts:
        note("Error:", CONFLICTS, "bold red")
        ctx.exit(1)
    if changes.writes and detailed_exitcode:
        ctx.exit(2)


@click.command()
@project
def apply(folder: Path) -> None:
    """Publish the project's definitions.

    All of them, or none where one conflicts with what was applied under its version.

    A running server takes them within seconds, without a restart.

    \b
    Example:
      featserve apply
    """
    config = settings(folder)
    definitions = load_definitions(config)
    with Registry.open(config.registry.url) as registry:
        changes = registry.apply(definitions, user(), clock_us())
        show_changes(changes.writes)
        revision = registry.revision()
    if changes.writes:
        counts = ((len(changes.of("create")), "created"), (len(changes.of("update")), "updated"))
        done = ", ".join(f"{number:,} {action}" for number, action in counts if number)
        show("", Text.assemble(("Applied: ", "bold"), f"{done}. The registry is at revision {revision}."))
    else:
        show_unchanged(revision)


def user() -> str:
    """Return the name of who runs this; a number where the machine knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@click.command()
@click.argument("views", nargs=-1, metavar="[VIEW]...")
@project
@click.option(
    "--as-of", type=instant, metavar="TIME", help="Load the rows that were visible at this instant, by default now."
)
@asks("--to", "Send the rows to this running server.")
@click.pass_context
def materialize(
    ctx: click.Context, views: tuple[str, ...], folder: Path, as_of: datetime | None, target: Target | None
) -> None:
    """Load views from their sources into the store.

    VIEW is name (its highest version) or name@version. Without any, all views that have a source: the highest version
    of each, and older ones that a service still reads; of these, one that only services with a later version read is
    left out when its files are gone. Only one process may have the store open for writing: while a server runs, send it
    the rows with --to.

    Safe to run again, and beside writes: a row never replaces a newer one. Safe to interrupt: a view becomes visible as
    a whole or not at all (with --to, in batches of rows). A view whose source is at fault is told, and the others are
    loaded.

    \b
    Examples:
      featserve materialize
      featserve materialize orders profile@2 --as-of 2026-01-31T12:00:00Z
      featserve materialize --to 127.0.0.1:7070
    """
    ctx.exit(load_views(settings(folder), views, as_of, target))


@click.command()
@click.argument("source")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@project
@click.option("--event-time", default="event_time", metavar="COLUMN", show_default=True, help="When an event happened.")
@click.option("--known-at", metavar="COLUMN", help="When it became known; by default when it happened.")
@asks("--to", "Send the events to this running server.")
@click.pass_context
def push(
    ctx: click.Context,
    source: str,
    file: Path,
    folder: Path,
    event_time: str,
    known_at: str | None,
    target: Target | None,
) -> None:
    """Count the events of a file in the windows of views.

    SOURCE is an event source, name (its highest version) or name@version: its events count in every view over it. FILE
    is a Parquet or CSV file with its fields as columns. Events with an id count once, so a file may be pushed again.

    \b
    Examples:
      featserve push clicks today.parquet --to 127.0.0.1:7070
      featserve push clicks@2 today.csv --event-time clicked_at
    """
    ctx.exit(push_file(settings(folder), source, file, event_time, known_at, target))


@click.command()
@project
@click.option("--host", help="The address to listen on, instead of that in featserve.toml.")
@click.option("--port", type=click.IntRange(0, 65_535), help="The port, instead of that in featserve.toml; 0: any.")
@click.option("--transport", type=click.Choice(TRANSPORTS), help="The transport, instead of that in featserve.toml.")
@click.option(
    "--workers",
    type=click.IntRange(0, 1_024),
    help="How many processes serve, instead of featserve.toml; 0: each core.",
)
def serve(folder: Path, host: str | None, port: int | None, transport: str | None, workers: int | None) -> None:
    """Serve the features until Ctrl-C or SIGTERM.

    Then requests in flight finish, the store is closed, and the exit code is 0.

    With several workers one more process writes the store, which they follow. `kill -USR2` replaces all of them, one
    after the other, and no request fails.

    Logs are JSON lines on standard error.

    \b
    Example:
      featserve serve --port 7070
    """
    config = settings(folder)
    given: dict[str, Any] = {"host": host, "port": port, "transport": transport, "workers": workers}
    given = {name: value for name, value in given.items() if value is not None}
    config = replace(config, server=replace(config.server, **given))
    configure()
    run(config, ready=lambda address: tell_served(config, address))


def tell_served(config: Config, address: str) -> None:
    """Print where a server listens, what it serves and how it is stopped."""
    with Registry.open(config.registry.url, create=False) as registry:
        services = registry.snapshot().services
    show(Text.assemble("Listening on ", (address, "bold")))
    if config.server.tls_certificate is not None:
        show("  with TLS" + (", to clients that show a certificate" if config.server.tls_client_ca else ""))
    for service in services.values():
        features = counted(len(service.fields), "feature")
        show(f"  {service.id}: {features} by {columns_of(service.keys.items())}")
    if not services:
        show("  nothing is applied yet; what `featserve apply` publishes is served without a restart")
    show(f"Ctrl-C or `kill {os.getpid()}` stops it.")


@click.command()
@click.argument("service")
@click.argument("keys", nargs=-1, metavar="[KEY=VALUE]...")
@project
@server
@click.option(
    "--keys-file",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take keys from the columns of this .csv, .json or .parquet file.",
)
@click.option(
    "--as-of",
    type=instant,
    metavar="TIME",
    help="Ask as of this instant, by default now. Of each entity the newest row is stored: NOT_FOUND if that is later.",
)
@click.option("--explain", is_flag=True, help="Also show what the time was spent on, and what made each value.")
@as_json
def get(
    service: str,
    keys: tuple[str, ...],
    folder: Path,
    target: Target | None,
    file: Path | None,
    as_of: datetime | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Get features, and why each is what it is.

    SERVICE is name (its promoted version), name@version or name#hash. Without --server the project's store is read in
    this process, with the rows that it has now.

    KEY=VALUE names a key (or request) column. Several entities are written key=a,b,c; a value that holds a comma as a
    JSON list, key='["a,b","c"]'. A column with one value goes with every row. A timestamp is ISO 8601, bytes are 0x and
    hex digits, or base64: and base64.

    With --json each row is an object on a line: its keys, values, statuses, and each view's event time and age in
    seconds. NaN and the infinities are strings.

    \b
    Examples:
      featserve get churn customer_id=1001,1002
      featserve get churn --keys-file customers.csv --json
      featserve get churn@1 customer_id=1001 --server 127.0.0.1:7070 --explain
      featserve get churn customer_id=1001 --server features.example:7070 --ca ca.pem
    """
    with target.connect() if target else Embedded(settings(folder), "read") as source:
        schema = source.describe(service)
        columns = read_columns(keys, file, schema.keys | schema.request_columns)
        if not columns:
            raise click.UsageError(f"Name the entities: KEY=VALUE for {columns_of(schema.keys.items())}.")
        entities = {name: values for name, values in columns.items() if name in schema.keys}
        request = {name: values for name, values in columns.items() if name not in schema.keys}
        now_us = instant_us(as_of)
        stages = Stages() if explain else None
        if explain:  # the first request of a process also pays for what is loaded when it is first used
            source.get(service, entities, request=request, as_of=as_of, event_times=True)
        begun_ns = time.perf_counter_ns()
        matrix = source.get(service, entities, request=request, as_of=as_of, event_times=True, stages=stages)
        took_ns = time.perf_counter_ns() - begun_ns
    answer = Answer(matrix, columns, now_us)
    if as_json:
        answer.show_json()
    else:
        answer.show()
    if stages is not None and as_json:
        show_stages_json(stages.timed(), matrix.schema, took_ns)
    elif stages is not None:
        show_stages(stages.timed(), matrix.schema, took_ns, None if target is None else target.address)


@click.command()
@click.argument("name", required=False)
@project
@server
@as_json
def describe(name: str | None, folder: Path, target: Target | None, as_json: bool) -> None:
    """Describe a service, view or entity.

    NAME is name (its highest version), name@version, or a service's name#hash; without it, everything is described. A
    server describes services only.

    \b
    Examples:
      featserve describe churn
      featserve describe orders@1 --json
    """
    if target is None:
        found: list[Described] = [*find(applied(folder), name)]
    else:
        with target.connect() as client:
            names = [name] if name else [s.name for s in client.list_services() if s.promoted]
            found = [client.describe(reference) for reference in names]
    for i, definition in enumerate(found):
        if as_json:
            show_json(definition_json(definition))
            continue
        if i:
            show("")
        show_definition(definition)


@click.command("list")
@project
@server
@as_json
def list_(folder: Path, target: Target | None, as_json: bool) -> None:
    """List what was applied.

    A server lists its services only. The bare name of a service means its promoted version.

    \b
    Example:
      featserve list
    """
    if target is None:
        snapshot = applied(folder)
        (show_all_json if as_json else show_all)(snapshot)
        return
    with target.connect() as client:
        services = client.list_services()
    if as_json:
        show_json({"services": [asdict(service) for service in services]})
    else:
        show_services(services)


def applied(folder: Path) -> Snapshot:
    """Return what the project's registry holds."""
    with Registry.open(settings(folder).registry.url, create=False) as registry:
        return registry.snapshot()


@click.command()
@project
@click.option("--count", is_flag=True, help="Count the rows that the store has now; this reads all of its keys.")
@as_json
def status(folder: Path, count: bool, as_json: bool) -> None:
    """Show what was loaded when, and who holds the store.

    \b
    Example:
      featserve status --count
    """
    show_status(settings(folder), count=count, as_json=as_json)


@click.command()
@click.argument("name", required=False)
@project
@as_json
def history(name: str | None, folder: Path, as_json: bool) -> None:
    """Show what was applied when, and by whom.

    NAME is name or name@version; without it, everything is shown.

    \b
    Example:
      featserve history orders
    """
    with Registry.open(settings(folder).registry.url, create=False) as registry:
        entries = registry.history(name)
    if as_json:
        show_json([asdict(entry) for entry in entries])
    else:
        show_history(entries)
