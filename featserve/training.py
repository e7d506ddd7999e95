"""Training frames: for each label row the features of a service as they could have been known at that row's time.

Comes in: a service, labels, an offline engine. Goes out: a pyarrow Table, one row for each label in the labels' order,
with the served vector's names, order and types. On-demand transforms run through ``transform``, as they do online.
Reads no clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from featserve.arrow import arrow_type, column_from_arrow, column_to_arrow
from featserve.definitions import (
    FeatureService,
    FeatureView,
    Field,
    Json,
    OnDemandTransform,
    Outputs,
    Selection,
)
from featserve.errors import InvalidRequest, SourceError, Violation, hint, invalid
from featserve.frames import Frame
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

STATUS_NAMES = [status.name for status in Status]


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Labels, checked: ``table`` as given, ``columns`` the key and request columns, ``time_us`` int64 of shape (n,)."""

    table: Any
    columns: dict[str, Column]
    time_us: Int64s


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

    ``labels``: a pyarrow Table, a pandas or polars DataFrame, or a Parquet or CSV file, with the service's key columns,
    its request columns, and the timestamp column ``time`` (naive means UTC). ``root``: the folder that source paths are
    relative to. ``event_times``: add ``<view>.event_time``, null where there is no row. ``statuses``: add
    ``<feature>.status``. A row with a null key gets nulls, NOT_FOUND. The table's metadata says under METADATA, as
    JSON, what it was made of: the service, its hash, and how many labels saw each view with each status. Raises
    InvalidRequest for labels that do not fit, SourceError for a source that does not, TransformError.
    """
    checked = labels_of(service, labels, time)
    names = [name for name, _, _ in service.fields]
    if clash := sorted(set(names) & set(checked.table.column_names)):
        raise invalid(f"labels.{clash[0]}", f"the labels have a column of the name of feature {clash[0]!r}; rename it")
    slots, views = look_up(engine, service, checked, root=root, progress=progress)
    table = checked.table
    for name, f, _ in service.fields:
        table = table.append_column(name, column_to_arrow(served(f, slots[name], service.dtype)))
    if event_times:
        for joined in views.values():
            table = table.append_column(f"{joined.view.name}.event_time", _event_times(joined))
    if statuses:
        for name, _, source in service.fields:
            table = table.append_column(f"{name}.status", _statuses(slots[name], views.get(source.id)))
    origin = {"service": service.id, "hash": service.hash, "views": {id_: _counts(v) for id_, v in views.items()}}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA: json.dumps(origin)})


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
        with np.errstate(over="ignore"):  # what float32 cannot hold is served as infinity
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
    """Return labels, read if they are a file, and checked to have what ``service`` asks for."""
    wanted = dict(service.keys) | service.request_columns
    return check_labels(read_labels(labels, wanted, time), wanted, time)


def read_labels(labels: Frame | str | Path, wanted: Mapping[str, Type], time: str) -> Any:
    """Return labels as a pyarrow Table; of a CSV file, the ``wanted`` columns are read with their types."""
    if isinstance(labels, pa.Table):
        return labels
    if isinstance(labels, str | Path):
        return _read_file(Path(labels), wanted, time)
    if hasattr(labels, "to_arrow"):  # polars
        return labels.to_arrow()
    if hasattr(labels, "iloc"):  # pandas
        return pa.Table.from_pandas(labels, preserve_index=False)
    if isinstance(labels, Mapping):
        return pa.table(dict(labels))
    raise invalid("labels", f"expected a pyarrow Table, a DataFrame or a file, got {labels.__class__.__name__}")


def _read_file(path: Path, wanted: Mapping[str, Type], time: str) -> Any:
    if path.suffix not in (".parquet", ".csv"):
        raise SourceError(f"labels {path}: a label file is .parquet or .csv")
    try:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:  # read_table would load pandas
                return file.read()
        types = {name: arrow_type(type_) for name, type_ in wanted.items()} | {time: arrow_type(Timestamp)}
        return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
    except FileNotFoundError:
        raise SourceError(f"labels {path}: there is no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"labels {path}: cannot be read: {error}") from None


def check_labels(table: Any, wanted: Mapping[str, Type], time: str) -> Labels:
    """Return checked labels. Raises InvalidRequest that names a column: missing, of another type, or a null time."""
    names = table.column_names
    missing = [
        Violation(f"labels.{name}", f"missing column {name!r}{hint(name, names)}")
        for name in (*wanted, time)
        if name not in names
    ]
    if missing:
        raise InvalidRequest(f"labels: {'; '.join(v.description for v in missing)}", violations=missing)
    columns = {name: column_from_arrow(type_, table.column(name), f"labels.{name}") for name, type_ in wanted.items()}
    instants = column_from_arrow(Timestamp, table.column(time), f"labels.{time}")
    if instants.valid is not None:
        raise invalid(f"labels.{time}", f"row {int(np.argmin(instants.valid))} is null; every label has a time")
    return Labels(table, columns, instants.values)
