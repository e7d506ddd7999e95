"""``featserve materialize`` and ``push``: views from their sources, and files of events, into the store.

Here, or through a running server.

Comes in: a project, the names of views, an instant. Each view is on its own: one whose source is at fault does not
keep the others from loading, and Ctrl-C ends the one at hand between two batches.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from featserve.batch import Arrival, EventBatch, Pushed
from featserve.catalog import Snapshot
from featserve.cli.show import STDERR, note, show, show_error, table
from featserve.cli.target import Target
from featserve.client import Client
from featserve.config import Config
from featserve.definitions import CsvSource, FeatureView, ParquetSource
from featserve.embedded import Embedded, clock_us, instant_us
from featserve.errors import CallerError, FeatserveError, SourceError
from featserve.materialize import Loaded, visible_batches
from featserve.plan import Plans
from featserve.registry import Load, Registry
from featserve.sources import source_files
from featserve.types import from_us
from featserve.wire import encode_push, encode_rows

MESSAGE_ROWS = 5_000
MESSAGE_BYTES = 4 << 20
"""What a message to a server holds at most, but for a row that is longer on its own."""

Note = Callable[[int, float], None]
LoadView = Callable[[FeatureView, Note], Loaded]


class Interrupted(Exception):
    """Ctrl-C was pressed."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A view that was loaded."""

    view: str
    loaded: Loaded
    seconds: float


def materialize(config: Config, names: tuple[str, ...], as_of: datetime | None, target: Target | None) -> int:
    """Load views, print what was loaded, and return the exit code: 1 where a source was at fault, 130 on Ctrl-C."""
    as_of_us = instant_us(as_of)
    with ExitStack() as stack:
        if target is None:
            project = stack.enter_context(Embedded(config, "write"))
            snapshot = project.plans.snapshot
            load_view = _loads_here(project, as_of_us)
        else:
            registry = stack.enter_context(Registry.open(config.registry.url, create=False))
            snapshot = registry.snapshot()
            load_view = _sends(config, registry, stack.enter_context(target.connect()), as_of_us)
        views, gone = chosen(snapshot, names, config.folder)
        for view in gone:
            note("Left out:", f"{view.id}; its files are gone, and only services with a later version read it.")
        return _load_all(views, load_view, remote=target is not None)


def chosen(snapshot: Snapshot, names: tuple[str, ...], root: Path) -> tuple[list[FeatureView], list[FeatureView]]:
    """Return the views that ``names`` mean, and those that are left out because they are over.

    Without names: of each view the latest version, and the others that services read. One that only services with a
    later version read is left out where its files are gone.
    """
    if not snapshot.views:
        raise CallerError("nothing is applied yet: run `featserve apply` first")
    if names:
        return list({view.id: view for view in map(snapshot.view, names)}.values()), []
    views = [view for view in snapshot.views.values() if view.source is not None]
    if not views:
        raise CallerError("no feature view has a source to load; their rows are only written online")
    services = snapshot.services.values()
    current = {snapshot.view(view.name).id for view in views}
    current.update(v.id for s in services if s.id == snapshot.service(s.name).id for v in s.views)
    wanted = current | {view.id for service in services for view in service.views}
    gone = [view for view in views if view.id in wanted - current and not _has_files(view, root)]
    return [view for view in views if view.id in wanted and view not in gone], gone


def _has_files(view: FeatureView, root: Path) -> bool:
    try:
        return bool(source_files(view.rows, root))
    except SourceError:
        return False


def _loads_here(project: Embedded, as_of_us: int) -> LoadView:
    def load_view(view: FeatureView, note: Note) -> Loaded:
        return project.materialize(view.id, as_of=from_us(as_of_us), progress=note)

    return load_view


def _sends(config: Config, registry: Registry, client: Client, as_of_us: int) -> LoadView:
    """Return what sends a view's rows to a server, in messages that it takes, and records the load."""
    limit_rows = min(MESSAGE_ROWS, config.server.max_rows)
    limit_bytes = min(MESSAGE_BYTES, (config.server.max_message_mb << 20) // 4)

    def load_view(view: FeatureView, note: Note) -> Loaded:
        assert view.source is not None
        started, rows_read = time.monotonic(), 0

        def count(rows: int, part: float) -> None:
            nonlocal rows_read
            rows_read = rows
            note(rows, part)

        rows = view.rows if view.events is None else view.events.rows
        arrivals = (
            portion
            for _, batch in visible_batches(rows, config.folder, as_of_us, count)
            for portion in portions(batch, limit_rows, limit_bytes)
        )
        if view.events is None:
            stored = client.write_messages(encode_rows(view.id, portion) for portion in arrivals).stored
        elif view.events.event_id is None:
            raise CallerError(
                f"{view.id}: events of {view.events.id} have no event id, so those sent twice would count twice. Stop "
                "the server and load them without --to, or declare event_id in a new version"
            )
        else:
            stored = client.push_messages(encode_push(view.events.id, portion) for portion in arrivals).counted
        seconds = time.monotonic() - started
        registry.record_load(Load(view.id, as_of_us, clock_us(), rows_read, stored, view.source.path, seconds))
        return Loaded(rows_read, stored)

    return load_view


def portions(batch: EventBatch, limit_rows: int, limit_bytes: int) -> Iterator[Arrival]:
    """Yield a batch in parts of at most ``limit_rows`` rows and ``limit_bytes`` bytes, or one row that is longer."""
    sizes = np.full(len(batch), 3 * 8, np.int64)
    for column in batch.columns.values():
        sizes += column.type.width if column.offsets is None else 4 + np.diff(column.offsets)
    ends = np.cumsum(sizes)
    start = 0
    while start < len(batch):
        before = int(ends[start - 1]) if start else 0
        fits = int(np.searchsorted(ends, before + limit_bytes, side="right"))
        stop = min(max(fits, start + 1), start + limit_rows)
        part = batch.take(np.arange(start, stop))
        yield Arrival(part.columns, part.event_time_us, part.known_at_us, part.sequence)
        start = stop


def push(
    config: Config, reference: str, path: Path, event_time: str, known_at: str | None, target: Target | None
) -> int:
    """Push the events of a Parquet or CSV file, print what became of them, and return the exit code."""
    made = CsvSource if path.name.endswith((".csv", ".csv.gz")) else ParquetSource
    source = made(str(path.resolve()), event_time=event_time, known_at=known_at)
    limit_rows = min(MESSAGE_ROWS, config.server.max_rows)
    limit_bytes = min(MESSAGE_BYTES, (config.server.max_message_mb << 20) // 4)
    totals = {"events": 0, "counted": 0, "duplicates": 0, "late": 0}
    with ExitStack() as stack:
        if target is None:
            project = stack.enter_context(Embedded(config, "write"))
            plan, send = project.plans.events(reference), partial(project.take, reference)
        else:
            registry = stack.enter_context(Registry.open(config.registry.url, create=False))
            plan = Plans(registry.snapshot()).events(reference)
            client = stack.enter_context(target.connect())
            send = partial(_push_message, client, plan.source.id)
        bar, check = stack.enter_context(_progress()), stack.enter_context(_interruptible())
        note = _noted(bar, bar.add_task(plan.source.id, total=1.0, rows=0), check)
        try:
            # Whether a time is too far ahead, the push says.
            for _, batch in visible_batches(replace(plan.source.rows, source=source), config.folder, 2**63 - 1, note):
                for portion in portions(batch, limit_rows, limit_bytes):
                    done = asdict(send(portion))
                    totals = {name: count + done[name] for name, count in totals.items()}
                    check()
            interrupted = False
        except Interrupted:
            interrupted = True
    shown = table(*totals, right=[*totals])
    shown.add_row(*(f"{count:,}" for count in totals.values()))
    show(shown)
    if interrupted:
        show("Interrupted. These events stay pushed; those that have an id may be pushed again.")
    return 130 if interrupted else 0


def _push_message(client: Client, source: str, events: Arrival) -> Pushed:
    return client.push_messages([encode_push(source, events)])


def _load_all(views: list[FeatureView], load_view: LoadView, *, remote: bool) -> int:
    finished: list[Finished] = []
    refused: list[SourceError] = []
    try:
        with _progress() as progress, _interruptible() as check:
            for view in views:
                check()
                started = time.monotonic()
                try:
                    task = progress.add_task(view.id, total=1.0, rows=0)
                    loaded = load_view(view, _noted(progress, task, check))
                    finished.append(Finished(view.id, loaded, time.monotonic() - started))
                    progress.stop_task(task)
                except SourceError as error:
                    refused.append(error)
    except Interrupted:
        _show_finished(finished, refused)
        _tell_interrupted(view, finished, remote)
        return 130
    except FeatserveError:
        _show_finished(finished, refused)
        raise
    _show_finished(finished, refused)
    return 1 if refused else 0


def _noted(progress: Progress, task: TaskID, check: Callable[[], None]) -> Note:
    """Return what moves the bar of a view, and leaves its load once Ctrl-C was pressed."""

    def note(rows: int, part: float) -> None:
        progress.update(task, completed=part, rows=rows)
        check()

    return note


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Yield a function that raises Interrupted once Ctrl-C was pressed, so that no commit is cut short.

    Pressed again, it ends the program where it stands, which loses nothing that is stored.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise Interrupted

    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _show_finished(finished: list[Finished], refused: list[SourceError]) -> None:
    if finished:
        numbers = ["rows read", "stored", "rows/s", "seconds"]
        made = table("view", *numbers, right=numbers)
        for done in finished:
            read, stored = done.loaded.rows_read, done.loaded.rows_stored
            made.add_row(done.view, f"{read:,}", f"{stored:,}", f"{read / done.seconds:,.0f}", f"{done.seconds:.2f}")
        show(made)
    for error in refused:
        show_error(error)


def _tell_interrupted(view: FeatureView, finished: list[Finished], remote: bool) -> None:
    loaded = f" Loaded: {', '.join(done.view for done in finished)}." if finished else ""
    left = (
        f"The rows of {view.id} that the server has already taken stay"
        if remote
        else f"Nothing of {view.id} became visible"
    )
    note("Interrupted.", f"{left}.{loaded} Run the same command again to load the rest.")


class _Rate(ProgressColumn):
    """Rows read so far, how many a second, and whether they are all read and now being stored."""

    def render(self, task: Task) -> Text:
        rows = task.fields["rows"]
        rate = f", {rows / task.elapsed:,.0f} rows/s" if task.elapsed else ""
        storing = ", storing" if task.finished and task.stop_time is None else ""
        return Text(f"{rows:,} rows{rate}{storing}")


def _progress() -> Progress:
    """Return progress bars on standard error; without a terminal there is none."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeElapsedColumn(),
        console=STDERR,
        disable=not STDERR.is_terminal,
        transient=True,
    )
