"""featserve in your own process: the same answers as a server's, from the embedded store, with no network.

Comes in: a project's folder. Knows no transport.
"""

from __future__ import annotations

import logging
import threading
import time as clock
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow

from featserve.backfill import load_windows
from featserve.batch import Arrival, Pushed, Written
from featserve.config import Config, load_config
from featserve.engine import Engine
from featserve.errors import FeatserveError, StoreError, invalid
from featserve.frames import Frame, request_of, rows_of
from featserve.leakage import LeakageReport, leakage
from featserve.materialize import Loaded, Progress, load
from featserve.matrix import FeatureMatrix
from featserve.offline import Engine as EngineName
from featserve.offline import OfflineEngine, open_engine
from featserve.offline import Progress as JoinProgress
from featserve.plan import Plans
from featserve.registry import Load, Registry
from featserve.schema import ServiceSchema
from featserve.stages import Stages
from featserve.store import Access, open_store
from featserve.store.follow import Behind, Follower
from featserve.training import training_frame
from featserve.types import to_us

log = logging.getLogger("featserve")


def open(path: str | PathLike[str], *, write: bool = False, follow: bool = False) -> Embedded:
    """Open the project in folder ``path`` in this process.

    ``write``: also write and materialize; only one process may, and a running server is one. Without it any number of
    processes read, each what was there when it first asked; the store is opened then, so training frames and schemas
    need none. ``follow``: also what a server or another process on this machine writes from then on, a few milliseconds
    after it, and what is applied. Raises DefinitionError, RegistryError or StoreError.
    """
    if write and follow:
        raise invalid("follow", "a project that is open to write has nobody to follow; leave out write or follow")
    return Embedded(load_config(Path(path)), "write" if write else "follow" if follow else "read")


class Embedded:
    """An open project. Use it as a context manager, or ``close`` it."""

    def __init__(self, config: Config, access: Access) -> None:
        self.config = config
        self._access = access
        self.registry = Registry.open(config.registry.url, create=False)
        self._engine: Engine | None = None
        self._opening = threading.Lock()
        self._closed = threading.Event()
        try:
            self.plans = Plans(self.registry.snapshot())
            if access != "read":
                self._engine = self._open_engine()
        except BaseException:
            self.registry.close()
            raise
        self._watcher = threading.Thread(target=self._watch, name="featserve-registry", daemon=True)
        if access == "follow":
            self._watcher.start()

    @property
    def engine(self) -> Engine:
        """The store with what is applied; only to read, it is opened when this is first used."""
        if self._engine is None:
            with self._opening:
                if self._closed.is_set():
                    raise StoreError("the project is closed")
                self._engine = self._engine or self._open_engine()
        return self._engine

    def _open_engine(self) -> Engine:
        settings = self.config.store
        store = open_store(
            settings.path,
            self._access,
            durability=settings.durability,
            block_cache_mb=settings.block_cache_mb,
            row_cache_mb=settings.row_cache_mb,
        )
        follower = Follower(store, settings.catch_up_ms / 1_000) if self._access == "follow" else None
        return Engine(store, self.plans, follower)

    def get(
        self,
        service: str,
        keys: Frame,
        *,
        request: Frame | None = None,
        as_of: datetime | None = None,
        event_times: bool = False,
        at_least: str = "",
        stages: Stages | None = None,
    ) -> FeatureMatrix:
        """Return the features of ``service`` for a batch of entities, one row for each; see ``Client.get``."""
        if stages is not None:
            stages.begin("plan")
        plan = self.plans.service(service)
        now_us = instant_us(as_of)
        if stages is not None:
            stages.begin("keys")
        checked, columns = request_of(keys, request, plan.schema)
        if at_least:
            self._hold(at_least)
        matrix = self.engine.read(
            plan,
            checked,
            now_us,
            request_columns=columns,
            as_of=as_of is not None,
            event_times=event_times,
            stages=stages,
        )
        if stages is not None:
            stages.end()
        return matrix

    def _hold(self, token: str) -> None:
        """Return once the store holds a write; for that a request may take the server's default deadline."""
        try:
            self.engine.require(token, self.config.server.default_deadline_ms / 1_000)
        except Behind as behind:
            behind.caught_up.result()

    def describe(self, service: str) -> ServiceSchema:
        """Return the schema of a service."""
        return self.plans.service(service).schema

    def write(self, view: str, rows: Frame, *, event_time: Any, known_at: Any | None = None) -> Written:
        """Write rows of a feature view, all or none; see ``Client.write``."""
        self._check_writable()
        plan = self.plans.view(view)
        skew_us = int(self.config.server.max_future_skew_seconds * 1_000_000)
        arrival = rows_of(rows, plan.columns, event_time, known_at)
        return self.engine.write(plan, arrival, now_us=clock_us(), max_future_skew_us=skew_us)

    def push(self, source: str, events: Frame, *, event_time: Any, known_at: Any | None = None) -> Pushed:
        """Count events in the windows of every view over their source, all or none; see ``Client.push``."""
        return self.take(source, rows_of(events, self.plans.events(source).source.types, event_time, known_at))

    def take(self, source: str, events: Arrival) -> Pushed:
        """Push events that are columns already; see ``push``."""
        self._check_writable()
        skew_us = int(self.config.server.max_future_skew_seconds * 1_000_000)
        return self.engine.push(self.plans.events(source), events, now_us=clock_us(), max_future_skew_us=skew_us)

    def materialize(self, view: str, *, as_of: datetime | None = None, progress: Progress | None = None) -> Loaded:
        """Load a view's batch source into the store, as of an instant (now by default), and record it.

        Of a view over events, what was pushed stays, and counts once; see ``backfill.load_windows``.
        """
        self._check_writable()
        plan = self.plans.view(view)
        started = clock.monotonic()
        as_of_us = instant_us(as_of)
        store, folder = self.engine.store, self.config.folder
        if plan.view.events is None:
            loaded = load(store, plan, folder, as_of_us, progress)
        else:
            loaded = load_windows(store, self.plans.windows(plan.view), folder, as_of_us, progress)
        source = plan.view.source
        assert source is not None
        self.registry.record_load(
            Load(
                plan.view.id, as_of_us, clock_us(), loaded.rows_read, loaded.rows_stored, source.path,
                clock.monotonic() - started,
            )
        )  # fmt: skip
        return loaded

    def training_frame(
        self,
        service: str,
        labels: Frame | str | PathLike[str],
        *,
        time: str,
        engine: OfflineEngine | EngineName = "duckdb",
        event_times: bool = False,
        statuses: bool = False,
        progress: JoinProgress | None = None,
    ) -> pyarrow.Table:
        """Return the labels with the features of ``service`` as they could have been known at each row's ``time``.

        One row for each label, in the labels' order; see ``training.training_frame``. ``engine``: "duckdb", "spark", or
        an open engine. Reads the batch sources, not the store.
        """
        definition = self.plans.snapshot.service(service)
        with _opened(engine) as offline:
            return training_frame(
                offline,
                definition,
                labels if not isinstance(labels, PathLike) else Path(labels),
                time,
                root=self.config.folder,
                event_times=event_times,
                statuses=statuses,
                progress=progress,
            )

    def leakage(
        self,
        service: str,
        labels: Frame | str | PathLike[str],
        *,
        time: str,
        label: str,
        engine: OfflineEngine | EngineName = "duckdb",
        progress: JoinProgress | None = None,
    ) -> LeakageReport:
        """Return what careless joins would make of a training set: which values change, how well they tell ``label``.

        ``label``: the labels' column that is to be predicted; see ``leakage.leakage``. The rest is as in
        ``training_frame``.
        """
        definition = self.plans.snapshot.service(service)
        with _opened(engine) as offline:
            return leakage(
                offline,
                definition,
                labels if not isinstance(labels, PathLike) else Path(labels),
                time,
                label,
                root=self.config.folder,
                progress=progress,
            )

    def refresh(self) -> None:
        """Take what was applied since the project was opened."""
        with self._opening:
            self.plans = Plans(self.registry.snapshot())
            if self._engine is not None:
                self._engine.plans = self.plans

    def _watch(self) -> None:
        """Take what is applied, as a server does, until the project is closed."""
        while not self._closed.wait(self.config.server.registry_poll_seconds):
            try:
                if self.registry.revision() != self.plans.snapshot.revision:
                    self.refresh()
            except Exception as error:  # the top of a background loop
                trace = None if isinstance(error, FeatserveError) else error
                log.error("cannot follow the registry, still using the old definitions: %s", error, exc_info=trace)

    def _check_writable(self) -> None:
        if self._access != "write":
            raise StoreError("the project is open for reading; open it with featserve.open(path, write=True)")

    def close(self) -> None:
        """Close the store and the registry."""
        with self._opening:
            self._closed.set()
        if self._watcher.is_alive():
            self._watcher.join()
        if self._engine is not None:
            if self._engine.follower is not None:
                self._engine.follower.close()
            self._engine.store.close()
        self.registry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _opened(engine: OfflineEngine | EngineName) -> Iterator[OfflineEngine]:
    """Open an engine that is named, and close it at the end; leave one open that was."""
    opened = open_engine(engine) if isinstance(engine, str) else engine
    try:
        yield opened
    finally:
        if isinstance(engine, str):
            opened.close()


def instant_us(as_of: datetime | None) -> int:
    """Return an instant that is not after the clock, now by default, as int64 microseconds."""
    now_us = clock_us()
    if as_of is None:
        return now_us
    if to_us(as_of) > now_us:
        raise invalid("as_of", f"{as_of} is after the clock")
    return to_us(as_of)


def clock_us() -> int:
    """Return the machine's time, int64 microseconds since the Unix epoch."""
    return clock.time_ns() // 1_000
