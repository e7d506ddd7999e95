"""Training frames: for each label row the features of a service as they could have been known at that row's time.

Comes in: a service, labels, an offline engine. Goes out: a pyarrow Table, one row for each label in the labels' order,
with the served vector's names, order and types. On-demand transforms run through ``transform``, as they do online.
Reads no clock.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featserve.arrow import arrow_type, column_from_arrow, column_to_arrow
from featserve.codec import check_key_sizes
from featserve.definitions import (
    FeatureService,
    FeatureView,
    Field,
    Json,
    OnDemandTransform,
    Outputs,
    Selection,
)
from featserve.errors import invalid
from featserve.frames import Frame
from featserve.labels import Labels, read_labels
from featserve.matrix import Status
from featserve.offline import OfflineEngine, Progress
from featserve.offline.join import JoinedView, join
from featserve.transform import (
    REQUEST_TIME,
    Slots,
    Step,
    compile_steps,
    field_of,
    request_slot,
    run,
    slot_of,
    with_default,
    without_nulls,
)
from featserve.types import NEVER_US, Column, Timestamp, Type, parse_type

Int64s = npt.NDArray[np.int64]

METADATA = "featserve"
"""Where in a training frame's metadata it says what it was made of."""

EVENT_TIME, STATUS = ".event_time", ".status"
STATUS_NAMES = [status.name for status in Status]


def training_frame(
    engine: OfflineEngine,
    service: FeatureService,
    labels: Frame | str | Path,
    time: str,
    *,
    root: Path,
    event_times: bool = False,
    statuses: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Return the labels' columns, then the features of ``service`` as of each label's own ``time``, as a pyarrow Table.

    ``labels``: a pyarrow Table, a pandas or polars DataFrame, a mapping of columns, or a Parquet or CSV file, with the
    service's key columns, its request columns, and the timestamp column ``time`` (naive means UTC). ``root``: the
    folder that source paths are relative to. ``event_times``: add ``<view>.event_time``, null where there is no row.
    ``statuses``: add ``<feature>.status``. A row with a null key gets nulls, NOT_FOUND. The table's metadata says under
    METADATA, as JSON, what it was made of: the service, its hash, and how many labels saw each view with each status.
    Raises InvalidRequest for labels that do not fit, SourceError for a source that does not, TransformError.
    """
    checked = labels_of(service, labels, time)
    _check_names(service, checked.table.column_names, event_times, statuses)
    slots, views = look_up(engine, service, checked, root=root, progress=progress)
    table = checked.table
    for name, f, _ in service.fields:
        table = table.append_column(name, column_to_arrow(served(f, slots[name], service.dtype)))
    if event_times:
        for joined in views.values():
            table = table.append_column(f"{joined.view.name}{EVENT_TIME}", _event_times(joined))
    if statuses:
        for name, _, source in service.fields:
            table = table.append_column(f"{name}{STATUS}", _statuses(slots[name], views.get(source.id)))
    origin = {"service": service.id, "hash": service.hash, "views": {id_: _counts(v) for id_, v in views.items()}}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA: json.dumps(origin)})


def _check_names(service: FeatureService, names: Collection[str], event_times: bool, statuses: bool) -> None:
    """Refuse labels with a column of the name of one that is added to them, before the work is done."""
    taken = set(names)
    features = [name for name, _, _ in service.fields]
    added = [*features, *(f"{view.name}{EVENT_TIME}" for view in service.views if event_times)]
    for name in [*added, *(f"{feature}{STATUS}" for feature in features if statuses)]:
        if name in taken:
            kind = "the labels have" if name in names else "the service has"
            raise invalid(f"labels.{name}", f"{kind} a column of the name {name!r}, which is to be added; rename it")
        taken.add(name)


def look_up(
    engine: OfflineEngine,
    service: FeatureService,
    labels: Labels,
    *,
    root: Path,
    views: Iterable[FeatureView] | None = None,
    as_of_us: Int64s | None = None,
    progress: Progress | None = None,
) -> tuple[Slots, dict[str, JoinedView]]:
    """Return the columns of a service's features, by name, and what the labels see of each view, but for its columns.

    ``views``: the service's own, or others of the same names, versions and features in their place. ``as_of_us``: int64
    of shape (n,), the instants at which views are seen; the labels' own unless given, and those of transforms always.
    """
    slots: Slots = {request_slot(name): labels.columns[name] for name in service.request_columns}
    slots[REQUEST_TIME] = Column(Timestamp, labels.time_us)
    keys = pa.table({name: column_to_arrow(labels.columns[name]) for name in service.keys})
    selections = [Selection(view, service.reads(view)) for view in (service.views if views is None else views)]
    at_us = labels.time_us if as_of_us is None else as_of_us
    seen: dict[str, JoinedView] = {}
    for joined in join(engine, keys, at_us, selections, root=root, progress=progress):
        for name, values in joined.columns.items():
            slot = f"{joined.view.name}.{name}"
            f = joined.view.feature(name)
            slots[slot] = with_default(f, column_from_arrow(f.type, values, slot))
        seen[joined.view.id] = JoinedView(joined.view, {}, joined.status, joined.event_time_us)
    _transformed(engine, service, slots, len(labels.time_us))
    return slots, seen


def _transformed(engine: OfflineEngine, service: FeatureService, slots: Slots, rows: int) -> None:
    """Add the outputs of the service's transforms to ``slots``, computed where the engine computes."""
    if not service.transforms:
        return
    given = [given for t in service.transforms for given in t.inputs.values() if not isinstance(given, Outputs)]
    fields = {slot_of(one): field_of(one) for one in given}
    # A null that a default stands in for is sent as the default: Arrow holds no value in a null's place.
    columns = {s: slots[s] if f.default is None else without_nulls(slots[s]) for s, f in fields.items()}
    outputs = {f"{t.name}.{f.name}": f for t in service.transforms for f in t.outputs}
    answer = engine.map_batches(
        partial(compute, json.dumps(_bodies(service)), {slot: str(f.type) for slot, f in fields.items()}),
        pa.table({slot: column_to_arrow(col) for slot, col in columns.items()}),
        pa.schema([(slot, arrow_type(f.type)) for slot, f in outputs.items()]),
    )
    assert len(answer) == rows
    for slot, f in outputs.items():
        slots[slot] = with_default(f, column_from_arrow(f.type, answer.column(slot), slot))


def compute(bodies: str, types: Mapping[str, str], batch: Any) -> Any:
    """Return the outputs of transforms for one Arrow record batch of their inputs, by slot.

    ``bodies``: the definitions as JSON, and ``types`` by slot, so that an engine can send this to any process.
    """
    slots = {name: column_from_arrow(parse_type(type_), batch.column(name), name) for name, type_ in types.items()}
    steps = _steps(bodies)
    run(steps, slots, batch.num_rows)
    outputs = {result.slot: slots[result.slot] for step in steps for result in step.results}
    return pa.record_batch([column_to_arrow(col) for col in outputs.values()], list(outputs))


def _bodies(service: FeatureService) -> Json:
    sources = [source for t in service.transforms for source in t.sources]
    views = {source.id: source.to_dict() for source in sources if isinstance(source, FeatureView)}
    return {"views": views, "transforms": [t.to_dict() for t in service.transforms]}


@lru_cache(maxsize=32)
def _steps(bodies: str) -> tuple[Step, ...]:
    held = json.loads(bodies)
    views = {id_: FeatureView.from_dict(body) for id_, body in held["views"].items()}
    transforms: dict[str, OnDemandTransform] = {}
    for body in held["transforms"]:
        transform = OnDemandTransform.from_dict(body, views, transforms)
        transforms[transform.id] = transform
    return compile_steps(tuple(transforms.values()))


def served(f: Field, col: Column, dtype: Type) -> Column:
    """Return a feature as it is served: floats of the service's precision, a default where the value is null."""
    valid = None if f.default is not None else col.valid
    if f.type.floating and not f.type.vector:
        with np.errstate(over="ignore", invalid="ignore"):  # as in the engine: beyond float32 is infinity
            return Column(dtype, col.values.astype(dtype.dtype, copy=False), None, valid)
    return Column(col.type, col.values, col.offsets, valid)


def _counts(joined: JoinedView) -> dict[str, int]:
    found = np.bincount(joined.status, minlength=len(Status) + 1)
    return {status.name: int(found[status]) for status in (Status.PRESENT, Status.NOT_FOUND, Status.EXPIRED)}


def _event_times(joined: JoinedView) -> Any:
    there = joined.event_time_us != NEVER_US
    return column_to_arrow(Column(Timestamp, np.where(there, joined.event_time_us, 0), None, there))


def _statuses(col: Column, joined: JoinedView | None) -> Any:
    """Return the status of each row of a feature, as strings of a dictionary."""
    status = np.full(len(col), Status.PRESENT, np.uint8) if joined is None else joined.status.copy()
    if col.valid is not None:
        status[(status == Status.PRESENT) & ~col.valid] = Status.NULL
    return pa.DictionaryArray.from_arrays(pa.array((status - 1).view(np.int8)), STATUS_NAMES)


def labels_of(service: FeatureService, labels: Frame | str | Path, time: str) -> Labels:
    """Return labels that have what ``service`` asks for, with keys that it could be asked for online."""
    checked = read_labels(labels, dict(service.keys) | service.request_columns, time)
    check_key_sizes({name: checked.columns[name] for name in service.keys})
    return checked
