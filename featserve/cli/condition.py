"""``featserve status``: where a project's registry and store are, what was loaded when, and who holds the store.

Comes in: a project's settings. Goes out: tables or one JSON object. Opens the store for reading only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass

from rich.text import Text

from featserve.catalog import Snapshot
from featserve.cli.show import STDERR, facts, second, show, show_json, size, table
from featserve.codec import key_prefix
from featserve.config import Config
from featserve.definitions import FeatureView
from featserve.registry import Load, Registry
from featserve.store import is_held, open_store


@dataclass(frozen=True, slots=True)
class StoreCondition:
    """A store on disk: ``size_bytes`` is None where there is none yet, ``rows`` are those of each view, if counted."""

    path: str
    size_bytes: int | None
    held: bool
    rows: Mapping[str, int]


def show_status(config: Config, *, count: bool, as_json: bool) -> None:
    """Print a project's condition. ``count``: also the rows that the store has now, which reads all of its keys."""
    with Registry.open(config.registry.url, create=False) as registry:
        snapshot, address = registry.snapshot(), registry.address
        loads = {load.view: load for load in registry.loads()}
    store = _look_at_store(config, snapshot.views.values() if count else ())
    show_it = _show_json if as_json else _show_tables
    show_it(config, address, snapshot, loads, store)


def _look_at_store(config: Config, views: Iterable[FeatureView]) -> StoreCondition:
    path = config.store.path
    if not path.exists():
        return StoreCondition(str(path), None, False, {view.id: 0 for view in views})
    with closing(open_store(path, "read", block_cache_mb=8, row_cache_mb=0)) as store, STDERR.status("Counting rows"):
        rows = {view.id: store.count(key_prefix(view)) for view in views}
        return StoreCondition(str(path), store.size_bytes(), is_held(path), rows)


def _show_tables(
    config: Config, address: str, snapshot: Snapshot, loads: Mapping[str, Load], store: StoreCondition
) -> None:
    stored = "none yet: `featserve materialize` makes it"
    if store.size_bytes is not None:
        held = "open for writing in another process (a server, or a load)" if store.held else "not open for writing"
        stored = f"{size(store.size_bytes)}, {held}"
    show(
        facts(
            [
                ("project", str(config.folder)),
                ("registry", address),
                ("", f"revision {snapshot.revision}"),
                ("store", store.path),
                ("", stored),
            ]
        ),
        "",
    )
    counted = ["rows in store"] if store.rows else []
    numbers = ["rows read", "stored", *counted]
    made = table("view", "source", "last loaded (UTC)", "as of (UTC)", *numbers, right=numbers)
    for view in snapshot.views.values():
        source = Text("" if view.source is None else view.source.path)
        load = loads.get(view.id)
        told = (
            ["never" if view.source else "", "", "", ""]
            if load is None
            else [second(load.finished_at_us), second(load.as_of_us), f"{load.rows_read:,}", f"{load.rows_stored:,}"]
        )
        made.add_row(view.id, source, *told, *(f"{store.rows[view.id]:,}" for _ in counted))
    show(made if snapshot.views else "Nothing is applied yet: `featserve apply`.")


def _show_json(
    config: Config, address: str, snapshot: Snapshot, loads: Mapping[str, Load], store: StoreCondition
) -> None:
    views = {
        view.id: {
            "source": None if view.source is None else view.source.path,
            "last_load": asdict(loads[view.id]) if view.id in loads else None,
            "rows": store.rows.get(view.id),
        }
        for view in snapshot.views.values()
    }
    show_json(
        {
            "project": str(config.folder),
            "registry": {"url": address, "revision": snapshot.revision},
            "store": {"path": store.path, "size_bytes": store.size_bytes, "held": store.held},
            "views": views,
        }
    )
