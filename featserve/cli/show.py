"""What the verbs print: tables for a person, the words for times and sizes, and errors.

Everything that is asked for goes to standard output, everything else (progress, errors) to standard error. Without a
terminal there is no colour, and a table is as wide as $COLUMNS says, else 120.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from featserve.catalog import KINDS_BY_NAME
from featserve.changes import Action, Change, Plan
from featserve.errors import FeatserveError, Unavailable
from featserve.registry import HistoryEntry
from featserve.types import from_us

PLAIN_WIDTH = 120
SECOND_US = 1_000_000
AGES = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))

STDOUT = Console(
    highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH, emoji=False
)
STDERR = Console(highlight=False, stderr=True, emoji=False)

ACTIONS: dict[Action, tuple[str, str]] = {
    "create": ("+", "green"),
    "update": ("~", "yellow"),
    "conflict": ("!", "bold red"),
    "absent": ("-", "dim"),
}
"""How a plan marks what it does: sign and style, in the order that a plan is shown."""

COUNTED: dict[Action, str] = {
    "create": "to create",
    "update": "to update",
    "conflict": "in conflict",
    "unchanged": "unchanged",
    "absent": "no longer declared",
}
"""How a plan counts what it does."""


def show(*parts: RenderableType) -> None:
    """Print texts and tables to standard output; without a terminal no line ends in blanks."""
    if STDOUT.is_terminal:
        STDOUT.print(*parts, sep="\n")
        return
    with STDOUT.capture() as captured:
        STDOUT.print(*parts, sep="\n")
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def show_json(value: Any) -> None:
    """Print one JSON value on a line."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def show_error(error: FeatserveError) -> None:
    """Print an error to standard error, with those of its violations that the message does not state."""
    note("Error:", str(error), "bold red")
    for violation in error.violations:
        if violation.description not in str(error):
            STDERR.print(Text(f"  {violation.field}: {violation.description}"), soft_wrap=True)
    if isinstance(error, Unavailable):
        STDERR.print("  Is the server running there? `featserve serve` starts one.", soft_wrap=True)


def note(label: str, message: str, style: str = "bold") -> None:
    """Print a line to standard error."""
    STDERR.print(Text.assemble((label, style), " ", message), soft_wrap=True)


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    """Return an empty table; the columns ``right`` are numbers. What does not fit goes on in the next line."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def facts(pairs: Iterable[tuple[str, RenderableType]]) -> Table:
    """Return names and values, one below the other; empty values are left out."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        if value not in ("", None):
            made.add_row(f"  {name}", Text(value) if isinstance(value, str) else value)
    return made


def instant(us: int | None) -> str:
    """Return an instant in UTC, to the second, or the microsecond where it has a fraction of one."""
    if us is None:
        return ""
    found = from_us(us)
    return f"{us} us" if found is None else found.replace(tzinfo=None).isoformat(" ")


def second(us: int) -> str:
    """Return an instant in UTC, cut to the second."""
    return instant(us // SECOND_US * SECOND_US)


def age(us: int) -> str:
    """Return a duration by its two greatest units: ``3 d 4 h``."""
    seconds = us // SECOND_US
    if seconds < 1:
        return "under 1 s"
    for i, (unit, size) in enumerate(AGES):
        count, rest = divmod(seconds, size)
        if count:
            smaller = rest // AGES[i + 1][1] if i + 1 < len(AGES) else 0
            return f"{count:,} {unit} {smaller} {AGES[i + 1][0]}" if smaller else f"{count:,} {unit}"
    raise AssertionError


def ttl(us: int | None) -> str:
    """Return how long a row is served."""
    return "for ever" if us is None else age(us)


def size(count: int) -> str:
    """Return bytes with a unit."""
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1_000:
            return f"{value:.1f} {unit}" if unit != "bytes" else f"{count} bytes"
        value /= 1_000
    return f"{value:,.1f} GB"


def columns_of(types: Iterable[tuple[str, object]]) -> str:
    """Return ``origin string, day timestamp``."""
    return ", ".join(f"{name} {type_}" for name, type_ in types)


def counted(count: int, noun: str) -> str:
    """Return ``1 row``, ``1,200 rows``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def show_changes(changes: Sequence[Change]) -> None:
    """Print what an apply does, grouped by action."""
    for action, (sign, style) in ACTIONS.items():
        for change in (c for c in changes if c.action == action):
            told = f"{change.id} is no longer declared; it stays, and is served" if action == "absent" else change.id
            show(Text(f"{sign} {action:<8} {KINDS_BY_NAME[change.kind].label:<19} {told}", style))
            for detail in change.details:
                show(Text(f"      {detail}", style))


def show_plan(plan: Plan, revision: int) -> None:
    """Print what an apply would do."""
    show_changes(plan.changes)
    numbers = [f"{len(plan.of(action)):,} {words}" for action, words in COUNTED.items() if plan.of(action)]
    if plan.of("create", "update", "conflict", "absent"):
        show("")
    if plan.writes or plan.conflicts:
        show(Text.assemble(("Plan: ", "bold"), ", ".join(numbers), "."))
    else:
        show_unchanged(revision)


def show_unchanged(revision: int) -> None:
    """Say that an apply has nothing to do."""
    show(Text.assemble(("Nothing to change: ", "bold"), f"revision {revision} has all that is declared."))


def show_history(entries: Sequence[HistoryEntry]) -> None:
    """Print what applies wrote."""
    made = table("revision", "at (UTC)", "who", "what", right=["revision"])
    for entry in entries:
        what = Text(f"{entry.action} {KINDS_BY_NAME[entry.kind].label} {entry.id}")
        for detail in entry.details:
            what.append(f"\n{detail}", "dim")
        made.add_row(str(entry.revision), second(entry.at_us), Text(entry.who), what)
    show(made if entries else "Nothing has been applied yet.")
