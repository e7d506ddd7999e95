"""Messages of the wire contract, to and from the values that the rest of featserve works with.

Comes in and goes out: protobuf messages on one side; keys, batches, matrices and schemas on the other. What arrives is
checked here, so that nothing past this module meets a column of the wrong length or a string that is not UTF-8. Used by
the server and by the client; knows neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from featserve._proto import errors_pb2
from featserve._proto import serving_pb2 as pb
from featserve.batch import Arrival, EntityKeys, Integers, check_request_columns, column_names, ragged
from featserve.definitions import EventSource, FeatureView
from featserve.errors import FeatserveError, TooLarge, Violation, by_reason, invalid
from featserve.matrix import FeatureMatrix
from featserve.schema import AggregateSchema, FeatureSchema, ServiceSchema, ViewSchema
from featserve.stages import Stage
from featserve.types import SCALARS_BY_CODE, VECTOR_CODE, Array, Column, Int64, Mask, Type, concat, type_of_code

FULL_METHOD = "/featserve.v1.FeatureServingService/"


def decode_keys(columns: Iterable[pb.Column], expected: Mapping[str, Type], max_rows: int) -> EntityKeys:
    """Return the checked key columns of a request; raises InvalidRequest or TooLarge that names the column."""
    given: dict[str, Column] = {}
    for message in columns:
        name = message.name
        if name not in expected or name in given:
            raise column_names("keys", [c.name for c in columns], expected)
        given[name] = decode_column(message, expected[name], f"keys.{name}", max_rows)
    return EntityKeys.of(given, expected)


def plain_integers(columns: Sequence[pb.Column], name: str, type_: Type, max_rows: int) -> Integers | None:
    """Return the values of the only column as they came, None where ``decode_keys`` has to look at them."""
    message = columns[0] if len(columns) == 1 else pb.Column()
    data = message.data
    if message.name != name or message.type != type_.code or message.length or message.validity or message.offsets:
        return None
    rows, rest = divmod(len(data), type_.width)
    return Integers(data, rows) if not rest and 0 < rows <= max_rows else None


def join_keys(parts: Sequence[EntityKeys | Integers]) -> EntityKeys | Integers:
    """Return the keys of several requests for the same service, all in one form, one after the other."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.count for part in parts)
    if raw := [part.raw for part in parts if isinstance(part, Integers)]:
        return Integers(b"".join(raw), rows)
    columns = [part.columns for part in parts if isinstance(part, EntityKeys)]
    return EntityKeys({name: concat([given[name] for given in columns]) for name in columns[0]}, rows)


def decode_request_columns(columns: Iterable[pb.Column], expected: Mapping[str, Type], rows: int) -> dict[str, Column]:
    """Return the checked request columns for ``rows`` rows; raises InvalidRequest that names the column."""
    given: dict[str, Column] = {}
    for message in columns:
        type_ = expected.get(message.name)
        if type_ is None or message.name in given:
            raise column_names("request_columns", [c.name for c in columns], expected)
        given[message.name] = decode_column(message, type_, f"request_columns.{message.name}", rows)
    return check_request_columns(given, expected, rows)


def decode_column(message: pb.Column, expected: Type, where: str, max_rows: int) -> Column:
    """Return a column of the ``expected`` type; ``where`` names it in errors."""
    if message.type != expected.code or message.length != (expected.length if expected.vector else 0):
        raise invalid(where, f"expected {expected}, got {_type_told(message)}")
    data = message.data
    if expected.variable:
        column = _decode_strings(message, expected, where)
    else:
        rows, rest = divmod(len(data), expected.width)
        if rest or message.offsets:
            raise invalid(where, f"{len(data):,} bytes are not a whole number of {expected}")
        values: Array = np.frombuffer(data, expected.dtype)
        if expected.name == "bool" and len(data) and np.frombuffer(data, np.uint8).max() > 1:
            raise invalid(where, "a bool is one byte, 0 or 1")
        column = Column(expected, values.reshape(rows, expected.length) if expected.vector else values)
    if len(column) > max_rows:
        raise TooLarge(
            f"{where}: {len(column):,} rows; the most in one request is {max_rows:,}. Send several requests",
            violations=[Violation(where, f"{len(column):,} rows; the most is {max_rows:,}")],
        )
    if message.validity:
        valid = unpack_bits(message.validity, len(column), where)
        return column if valid.all() else Column(column.type, column.values, column.offsets, valid)
    return column


def _type_told(message: pb.Column) -> str:
    """Say what type a column claims to be."""
    if message.type == VECTOR_CODE:
        return f"vector[{message.length}]"
    scalar = SCALARS_BY_CODE.get(message.type)
    if scalar is None:
        return f"type number {message.type}"
    return f"{scalar} of length {message.length}, and only a vector has one" if message.length else str(scalar)


def _decode_strings(message: pb.Column, expected: Type, where: str) -> Column:
    raw, data = message.offsets, message.data
    if len(raw) % 4 or not raw:
        raise invalid(where, "offsets are n + 1 uint32, little-endian")
    offsets = np.frombuffer(raw, "<u4").astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(data) or (len(offsets) > 2 and (offsets[1:] < offsets[:-1]).any()):
        raise invalid(where, f"offsets do not rise from 0 to the {len(data):,} bytes of data")
    values = np.frombuffer(data, np.uint8)
    if expected.name == "string" and not data.isascii():
        _check_utf8(data, values, offsets, where)
    return Column(expected, values, offsets)


def _check_utf8(data: bytes, values: Array, offsets: Array, where: str) -> None:
    """Refuse a column whose bytes are not UTF-8, or one of whose values starts in the middle of a character."""
    try:
        data.decode()
        starts = offsets[:-1][offsets[:-1] < len(values)]
        broken = starts[(values[starts] & 0xC0) == 0x80]
        at = int(broken[0]) if len(broken) else None
    except UnicodeDecodeError as error:
        at = error.start
    if at is not None:
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        raise invalid(where, f"row {row} is not valid UTF-8")


def encode_column(name: str, column: Column) -> pb.Column:
    """Return the message of one column."""
    type_ = column.type
    return pb.Column(
        name=name,
        type=type_.code,  # type: ignore[arg-type]
        data=np.ascontiguousarray(column.values).tobytes(),
        offsets=b"" if column.offsets is None else column.offsets.astype("<u4").tobytes(),
        validity=b"" if column.valid is None else np.packbits(column.valid, bitorder="little").tobytes(),
        length=type_.length if type_.vector else 0,
    )


def unpack_bits(data: bytes, rows: int, where: str) -> Mask:
    """Return bool of shape (rows,) from bits, least significant first."""
    if len(data) != (rows + 7) // 8:
        raise invalid(where, f"{len(data):,} bytes of validity for {rows:,} rows")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=rows, bitorder="little").view(np.bool_)


def encode_matrix(
    matrix: FeatureMatrix, *, include_schema: bool = False, include_event_times: bool = True
) -> pb.GetFeaturesResponse:
    """Return the answer that carries ``matrix``, its event times if it has them."""
    schema = matrix.schema
    answer = pb.GetFeaturesResponse(
        schema_id=schema.id, rows=len(matrix), values=matrix.values.tobytes(), status=matrix.view_status.tobytes()
    )
    if matrix.valid is not None and not matrix.valid.all():
        answer.validity = pack_rows(matrix.valid)
    if matrix.columns:
        answer.columns.extend(_typed(matrix))
    if include_event_times and matrix.event_times is not None:
        answer.event_times = matrix.event_times.tobytes()
    if include_schema:
        answer.schema.CopyFrom(encode_schema(schema))
    return answer


def encode_parts(matrix: FeatureMatrix, counts: Sequence[int]) -> tuple[list[bytes], bytes, bytes]:
    """Return the bytes of the answers that carry the rows of ``matrix`` one after the other, so many each.

    They have no event times. Also returns the status of all rows, and what ``pack_rows`` makes of ``matrix.valid``: no
    bytes where there is none.
    """
    schema = matrix.schema
    stops = (0, *counts) if len(counts) == 1 else list(accumulate(counts, initial=0))
    status = matrix.view_status.tobytes()
    validity = b"" if matrix.valid is None else pack_rows(matrix.valid)
    values = matrix.values.tobytes()
    wide, views = schema.width * schema.numpy_dtype.itemsize, len(schema.views)
    answers = []
    for start, stop in pairwise(stops):
        rows = stop - start
        parts: tuple[bytes, ...]
        before, between = _around(schema.id, rows, rows * wide, rows * views)
        parts = (before, values[start * wide : stop * wide], between, status[start * views : stop * views])
        if validity:
            parts += _field(validity, start, stop, len(schema.features))
        if matrix.columns:
            parts += (pb.GetFeaturesResponse(columns=_typed(matrix.part(start, stop))).SerializeToString(),)
        answers.append(b"".join(parts))
    return answers, status, validity


@lru_cache(1_024)
def _around(schema_id: int, rows: int, values: int, status: int) -> tuple[bytes, bytes]:
    """Return what stands in an answer before its values, and between these and its status, of so many bytes each."""
    first = pb.GetFeaturesResponse(schema_id=schema_id, rows=rows, values=bytes(values)).SerializeToString()
    second = pb.GetFeaturesResponse(status=bytes(status)).SerializeToString()
    return first[: len(first) - values], second[: len(second) - status]


def _field(validity: bytes, start: int, stop: int, features: int) -> tuple[bytes, ...]:
    """Return the pieces of an answer's field of validity, of rows from ``start`` up to ``stop``."""
    whole = _whole_row(features)
    own = validity[start * len(whole) : stop * len(whole)]
    return () if own == whole * (stop - start) else (_before_validity(len(own)), own)


@lru_cache(1_024)
def _whole_row(features: int) -> bytes:
    """Return what ``pack_rows`` makes of a row in which all are valid."""
    return pack_rows(np.ones((1, features), np.bool_))


@lru_cache(1_024)
def _before_validity(size: int) -> bytes:
    """Return what stands in an answer before the validity of so many bytes."""
    field: bytes = pb.GetFeaturesResponse(validity=bytes(size)).SerializeToString()
    return field[: len(field) - size]


def _typed(matrix: FeatureMatrix) -> list[pb.Column]:
    """Return the features that the tensor does not hold; which of them are null the answer's validity says."""
    return [encode_column("", Column(column.type, column.values, column.offsets)) for column in matrix.columns]


def pack_rows(valid: Mask) -> bytes:
    """Return bool of shape (rows, features) as bits, least significant first; each row begins with a byte."""
    return np.packbits(valid, axis=1, bitorder="little").tobytes()


def decode_matrix(answer: pb.GetFeaturesResponse, schema: ServiceSchema) -> FeatureMatrix:
    """Return the matrix that ``answer`` carries; raises InvalidRequest where it does not fit ``schema``."""
    rows, views, features = answer.rows, len(schema.views), len(schema.features)
    dtype = schema.numpy_dtype
    sizes = [
        ("values", len(answer.values), rows * schema.width * dtype.itemsize),
        ("status", len(answer.status), rows * views),
        ("columns", len(answer.columns), len(schema.column_features)),
    ]
    if answer.validity:
        sizes.append(("validity", len(answer.validity), rows * ((features + 7) // 8)))
    if answer.event_times:
        sizes.append(("event_times", len(answer.event_times), rows * views * 8))
    for what, got, expected in sizes:
        if got != expected:
            raise invalid(f"answer.{what}", f"{got:,} do not fit schema {schema.reference}, which says {expected:,}")
    valid = None
    if answer.validity:
        packed = np.frombuffer(answer.validity, np.uint8).reshape(rows, -1)
        valid = np.unpackbits(packed, axis=1, count=features, bitorder="little").view(np.bool_)
    columns = [
        decode_column(message, f.type, f"answer.{f.name}", 2**31)
        for f, message in zip(schema.column_features, answer.columns, strict=True)
    ]
    if any(len(column) != rows for column in columns):
        raise ragged("answer", {f.name: len(c) for f, c in zip(schema.column_features, columns, strict=True)})
    if valid is not None:
        position = [i for i, f in enumerate(schema.features) if f.column is not None]
        columns = [Column(c.type, c.values, c.offsets, valid[:, i]) for c, i in zip(columns, position, strict=True)]
    return FeatureMatrix(
        schema,
        np.frombuffer(answer.values, dtype).reshape(rows, schema.width),
        tuple(columns),
        np.frombuffer(answer.status, np.uint8).reshape(rows, views),
        valid,
        np.frombuffer(answer.event_times, "<i8").reshape(rows, views) if answer.event_times else None,
    )


def encode_stages(stages: Iterable[Stage]) -> list[pb.Stage]:
    """Return the messages of the stages of a request."""
    return [pb.Stage(name=s.name, start_ns=s.start_ns, duration_ns=s.duration_ns) for s in stages]


def decode_stages(messages: Iterable[pb.Stage]) -> list[Stage]:
    """Return the stages that messages carry."""
    return [Stage(m.name, m.start_ns, m.duration_ns) for m in messages]


def encode_schema(schema: ServiceSchema) -> pb.ServiceSchema:
    """Return the message of a schema."""
    message = pb.ServiceSchema(
        name=schema.name, version=schema.version, hash=schema.hash, dtype=schema.dtype.code,  # type: ignore[arg-type]
        width=schema.width, owner=schema.owner, description=schema.description,
    )  # fmt: skip
    for name, type_ in schema.keys.items():
        message.keys.add(name=name, type=type_.code)
    for name, type_ in schema.request_columns.items():
        message.request_columns.add(name=name, type=type_.code, length=type_.length if type_.vector else 0)
    for view in schema.views:
        message.views.add(
            name=view.name, version=view.version, hash=view.hash, keys=view.keys, ttl_us=view.ttl_us,
            owner=view.owner, description=view.description,
        )  # fmt: skip
    for f in schema.features:
        message.features.add(
            name=f.name, type=f.type.code, length=f.type.length if f.type.vector else 0, view=f.view,
            tensor=f.tensor, column=f.column, description=f.description, default_json=f.default_json,
            transform=f.transform,
            aggregate=None if f.aggregate is None else pb.AggregateSchema(**asdict(f.aggregate)),
        )  # fmt: skip
    return message


def decode_schema(message: pb.ServiceSchema) -> ServiceSchema:
    """Return the schema that a message carries."""
    return ServiceSchema(
        message.name,
        message.version,
        message.hash,
        _type(message.dtype),
        message.width,
        {key.name: _type(key.type) for key in message.keys},
        tuple(
            ViewSchema(
                v.name, v.version, v.hash, tuple(v.keys), v.ttl_us if v.HasField("ttl_us") else None,
                v.owner, v.description,
            )
            for v in message.views
        ),
        tuple(
            FeatureSchema(
                f.name, _type(f.type, f.length), f.view if f.HasField("view") else None,
                f.tensor if f.HasField("tensor") else None, f.column if f.HasField("column") else None,
                f.description, f.default_json, f.transform,
                _aggregate(f.aggregate) if f.HasField("aggregate") else None,
            )
            for f in message.features
        ),
        message.owner,
        message.description,
        {given.name: _type(given.type, given.length) for given in message.request_columns},
    )  # fmt: skip


def _aggregate(message: pb.AggregateSchema) -> AggregateSchema:
    return AggregateSchema(**{field.name: getattr(message, field.name) for field in fields(AggregateSchema)})


def encode_view(view: FeatureView) -> pb.DescribeViewResponse:
    """Return the message that describes a view to those who write its rows."""
    message = pb.DescribeViewResponse(
        name=view.name, version=view.version, hash=view.hash, ttl_us=view.ttl_us, owner=view.owner,
        description=view.description,
    )  # fmt: skip
    for name, type_ in view.entity.keys.items():
        message.keys.add(name=name, type=type_.code)
    for f in view.features:
        message.features.add(
            name=f.name, type=f.type.code, length=f.type.length if f.type.vector else 0,
            description=f.description, default_json="" if f.default is None else json.dumps(f.default),
        )  # fmt: skip
    return message


def decode_view(message: pb.DescribeViewResponse) -> dict[str, Type]:
    """Return the type of each column that a row of the view has: its keys, then its features."""
    return {key.name: _type(key.type) for key in message.keys} | {
        f.name: _type(f.type, f.length) for f in message.features
    }


def encode_events(source: EventSource) -> pb.DescribeEventsResponse:
    """Return the message that describes an event source to those who push its events."""
    message = pb.DescribeEventsResponse(
        name=source.name, version=source.version, hash=source.hash, event_id=source.event_id or "",
        owner=source.owner, description=source.description,
    )  # fmt: skip
    for f in source.fields:
        message.fields.add(
            name=f.name, type=f.type.code, length=f.type.length if f.type.vector else 0, description=f.description
        )
    return message


def decode_events(message: pb.DescribeEventsResponse) -> dict[str, Type]:
    """Return the type of each column that an event has."""
    return {f.name: _type(f.type, f.length) for f in message.fields}


def decode_error(data: bytes, message: str, otherwise: type[FeatserveError]) -> FeatserveError:
    """Return the error of the tree that a google.rpc.Status stands for; ``otherwise``: where it names none."""
    info, bad = errors_pb2.ErrorInfo(), errors_pb2.BadRequest()
    for detail in errors_pb2.ErrorStatus.FromString(data).details:
        if detail.type_url.endswith("/google.rpc.ErrorInfo"):
            info.MergeFromString(detail.value)
        elif detail.type_url.endswith("/google.rpc.BadRequest"):
            bad.MergeFromString(detail.value)
    violations = [Violation(v.field, v.description) for v in bad.field_violations]
    kind = by_reason(info.reason) or otherwise
    return kind(message, violations=violations, metadata=dict(info.metadata))


def _type(code: int, length: int = 1) -> Type:
    found = type_of_code(code, length)
    if found is None:
        raise invalid("schema", f"type number {code} is not known to this client; upgrade featserve")
    return found


def decode_times(data: bytes, where: str) -> Array:
    """Return int64 microseconds of shape (n,)."""
    if len(data) % 8:
        raise invalid(where, f"{len(data):,} bytes are not a whole number of int64")
    return np.frombuffer(data, Int64.dtype)


def decode_rows(
    request: pb.WriteRowsRequest | pb.PushEventsRequest, expected: Mapping[str, Type], max_rows: int
) -> Arrival:
    """Return the rows of a write, or the events of a push, their columns all of one length."""
    names = [message.name for message in request.columns]
    if len(names) != len(expected) or set(names) != expected.keys():
        raise column_names("columns", names, expected)
    given = {m.name: decode_column(m, expected[m.name], f"columns.{m.name}", max_rows) for m in request.columns}
    event_times = decode_times(request.event_times, "event_times")
    known_at = decode_times(request.known_at, "known_at") if request.known_at else None
    positions = decode_times(request.source_positions, "source_positions") if request.source_positions else None
    lengths = {name: len(column) for name, column in given.items()} | {"event_times": len(event_times)}
    lengths |= {n: len(t) for n, t in (("known_at", known_at), ("source_positions", positions)) if t is not None}
    if len(set(lengths.values())) > 1:
        raise ragged("columns", lengths)
    if len(event_times) == 0:
        raise invalid("columns", "the batch is empty; send at least one row")
    return Arrival(given, event_times, known_at, positions)


def encode_rows(view: str, rows: Arrival) -> pb.WriteRowsRequest:
    """Return the message that writes rows of a view."""
    return pb.WriteRowsRequest(view=view, **_parts(rows))


def encode_push(source: str, events: Arrival) -> pb.PushEventsRequest:
    """Return the message that pushes events of a source."""
    return pb.PushEventsRequest(source=source, **_parts(events))


def _parts(rows: Arrival) -> dict[str, Any]:
    return {
        "columns": [encode_column(name, column) for name, column in rows.columns.items()],
        "event_times": _encode_times(rows.event_time_us),
        "known_at": _encode_times(rows.known_at_us),
        "source_positions": _encode_times(rows.source_positions),
    }


def _encode_times(times: Array | None) -> bytes:
    return b"" if times is None else times.astype("<i8").tobytes()


def parse(kind: type[Any], data: bytes) -> Any:
    """Return a message from bytes; raises InvalidRequest for bytes that are not one."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise invalid("request", f"{len(data):,} bytes that are no {kind.DESCRIPTOR.name}: {error}") from None
