"""Runs on-demand transforms: the one caller of their functions, for the server and for training frames alike.

Comes in: columns by slot (``view.feature``, ``request:name``, ``request_time``). Goes out: the outputs' columns, added
under ``transform.output``. Knows neither a request nor a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from featserve.definitions import Field, OnDemandTransform, Outputs, RequestColumn, Selection
from featserve.errors import TransformError
from featserve.stages import Stages
from featserve.types import Array, Bytes, Column, Mask, String, Timestamp, Type, column

REQUEST_TIME = "request_time"

STRINGS = np.dtypes.StringDType()
INSTANTS = np.dtype("<M8[us]")
OBJECTS = np.dtype(object)

Slots = dict[str, Column]


def request_slot(name: str) -> str:
    """Return the slot of a request column; no feature's name holds a colon."""
    return f"request:{name}"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a function: the slot that it is read from.

    ``nullable``: whether a null there is one; otherwise a default stands in for it.
    """

    name: str
    slot: str
    nullable: bool


@dataclass(frozen=True, slots=True)
class Result:
    """One output of a function, the slot that it goes to, and the NumPy dtype that it must have."""

    name: str
    slot: str
    field: Field
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One transform, compiled. ``strict``: rows with a null input are kept from the function."""

    id: str
    function: Any
    parameters: tuple[Parameter, ...]
    results: tuple[Result, ...]
    strict: bool


def compile_steps(transforms: Sequence[OnDemandTransform]) -> tuple[Step, ...]:
    """Return the steps of transforms in order of use. Raises DefinitionError where captured code does not run."""
    return tuple(
        Step(
            t.id,
            t.code.function,
            tuple(Parameter(name, slot_of(given), field_of(given).default is None) for name, given in t.inputs.items()),
            tuple(Result(f.name, f"{t.name}.{f.name}", f, _dtype(f.type)) for f in t.outputs),
            t.nulls == "strict",
        )
        for t in transforms
    )


def _dtype(type: Type) -> np.dtype[Any]:
    """Return the NumPy dtype in which functions take and return values of a type."""
    special: dict[Type, np.dtype[Any]] = {String: STRINGS, Bytes: OBJECTS, Timestamp: INSTANTS}
    if type in special:
        return special[type]
    assert type.dtype is not None
    return type.dtype


def slot_of(given: object) -> str:
    """Return the slot that an input is read from."""
    match given:
        case Selection(view, (name,)):
            return f"{view.name}.{name}"
        case Outputs(transform, (name,)):
            return f"{transform.name}.{name}"
        case RequestColumn(name, _):
            return request_slot(name)
        case _:
            return REQUEST_TIME


def field_of(given: object) -> Field:
    """Return the field that an input is read from; of the request's own columns, one without a default."""
    match given:
        case Selection(view, (name,)):
            return view.feature(name)
        case Outputs(transform, (name,)):
            return transform.output(name)
        case RequestColumn(name, type_):
            return Field(name, type_)
        case _:
            return Field(REQUEST_TIME, Timestamp)


def run(steps: Sequence[Step], slots: Slots, rows: int, stages: Stages | None = None) -> None:
    """Run the steps in order on ``rows`` rows, adding their outputs to ``slots``; each is one of ``stages``.

    Raises TransformError, naming the transform, where a function raises or its answer is not as declared.
    """
    with np.errstate(all="ignore"):  # a division by zero is the function's own affair: it gives inf or NaN
        for step in steps:
            if stages is not None:
                stages.begin(f"transform {step.id}")
            given = [slots[p.slot] if p.nullable else without_nulls(slots[p.slot]) for p in step.parameters]
            answers = _strict(step, given, rows) if step.strict else _call(step, given, rows)
            for result, answer in zip(step.results, answers, strict=True):
                slots[result.slot] = with_default(result.field, answer)


def _strict(step: Step, given: list[Column], rows: int) -> list[Column]:
    """Call the function with the rows that have no null input; the others' outputs are null."""
    masks = [col.valid for col in given if col.valid is not None]
    if not masks:
        return _call(step, given, rows)
    seen: Mask = reduce(np.logical_and, masks)
    given = [without_nulls(col) for col in given]
    if seen.all():
        return _call(step, given, rows)
    index = np.flatnonzero(seen)
    answers = _call(step, [col.take(index) for col in given], len(index))
    if not len(index):
        return [_nulls(result.field.type, rows) for result in step.results]
    place = np.where(seen, np.cumsum(seen) - 1, 0)
    spread = [col.take(place) for col in answers]
    return [
        Column(col.type, col.values, col.offsets, seen if col.valid is None else seen & col.valid) for col in spread
    ]


def _call(step: Step, given: list[Column], rows: int) -> list[Column]:
    """Call the function with columns of ``rows`` rows; without a row there is nothing to ask it."""
    if not rows:
        return [_nulls(result.field.type, 0) for result in step.results]
    arguments: dict[str, Any] = {}
    for parameter, col in zip(step.parameters, given, strict=True):
        arguments[parameter.name] = _argument(col if col.valid is None else _filled(col, _nulls(col.type, 1)))
    if not step.strict:
        arguments["valid"] = {p.name: _read_only(_mask(col)) for p, col in zip(step.parameters, given, strict=True)}
    try:
        answer = step.function(**arguments)
    except (Exception, SystemExit) as error:
        raise TransformError(
            f"transform {step.id} failed: {error.__class__.__name__}: {error}", metadata={"transform": step.id}
        ) from error
    if isinstance(answer, np.ndarray | tuple) and len(step.results) == 1:
        return [_answer(step, step.results[0], answer, rows)]
    names = [result.name for result in step.results]
    if not isinstance(answer, Mapping):
        raise broken(step.id, f"returned {_kind(answer)}; it declares {_declared(names)}")
    if sorted(answer, key=str) != sorted(names):
        raise broken(step.id, f"returned outputs {list(answer)}; it declares {names}")
    return [_answer(step, result, answer[result.name], rows) for result in step.results]


def _declared(names: list[str]) -> str:
    if len(names) == 1:
        return f"output {names[0]!r}, and returns its array"
    return f"{len(names)} outputs, and returns a mapping of their arrays by name"


def _argument(col: Column) -> Array:
    """Return a column as the function takes it: read-only, and in one piece, as in every other batch."""
    if col.offsets is None:
        values = np.ascontiguousarray(col.values)
        return _read_only(values.view(INSTANTS) if col.type is Timestamp else values)
    cells = col.to_bytes_list()
    if col.type is String:
        return _read_only(np.array([cell.decode() for cell in cells], STRINGS))
    values = np.empty(len(col), object)
    values[:] = cells
    return _read_only(values)


def _read_only(values: Array) -> Array:
    view = values.view()
    view.flags.writeable = False
    return view


def _answer(step: Step, result: Result, answer: Any, rows: int) -> Column:
    """Return one output as a column, proved to be of the declared type and length. A NaT is a null."""
    type = result.field.type
    values, valid = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
    shape = (rows, type.length) if type.vector else (rows,)
    if not isinstance(values, np.ndarray) or values.dtype != result.dtype or values.shape != shape:
        raise broken(
            step.id,
            f"returned {_kind(values)} for output {result.name!r}; it declares {type}: {result.dtype} of shape {shape}",
        )
    if valid is not None:
        if not isinstance(valid, np.ndarray) or valid.dtype != np.bool_ or valid.shape != (rows,):
            raise broken(
                step.id,
                f"returned {_kind(valid)} as the mask of output {result.name!r}; a mask is bool of shape {(rows,)}",
            )
        valid = None if valid.all() else valid
    if type.variable:
        return _texts(step, result, values, valid)
    if type is Timestamp:
        missing = np.isnat(values)
        if missing.any():
            valid = ~missing if valid is None else valid & ~missing
        values = values.view("<i8")
    return Column(type, np.ascontiguousarray(values), None, valid)


def _texts(step: Step, result: Result, values: Array, valid: Mask | None) -> Column:
    """Return an output of strings or bytes as a column."""
    cells: list[Any] = values.tolist()
    if result.field.type is String:
        cells = [cell.encode() for cell in cells]
    elif valid is not None:
        cells = [cell if ok else b"" for cell, ok in zip(cells, valid.tolist(), strict=True)]
    for row, cell in enumerate(cells):
        if not isinstance(cell, bytes):
            raise broken(step.id, f"returned {_kind(cell)} in row {row} of output {result.name!r}, not bytes")
    offsets = np.zeros(len(cells) + 1, np.int64)
    np.cumsum([len(cell) for cell in cells], out=offsets[1:])
    return Column(result.field.type, np.frombuffer(b"".join(cells), np.uint8), offsets, valid)


def with_default(f: Field, col: Column) -> Column:
    """Return a feature's column with its default, else NaN, zero or nothing, in the place of its nulls."""
    if col.valid is None:
        return col
    return _filled(col, column(f.type, [f.value(f.default)]) if f.default is not None else _nulls(f.type, 1))


def _filled(col: Column, filler: Column) -> Column:
    """Return a column with the one value of ``filler`` in the place of each null."""
    assert col.valid is not None
    both = _concatenated(col, filler).take(np.where(col.valid, np.arange(len(col)), len(col)))
    return Column(col.type, both.values, both.offsets, col.valid)


def without_nulls(col: Column) -> Column:
    """Return a column whose nulls are taken for the values in their places."""
    return col if col.valid is None else Column(col.type, col.values, col.offsets)


def _concatenated(first: Column, second: Column) -> Column:
    values = np.concatenate([first.values, second.values])
    if first.offsets is None or second.offsets is None:
        return Column(first.type, values)
    return Column(first.type, values, np.concatenate([first.offsets, second.offsets[1:] + len(first.values)]))


def _nulls(type: Type, rows: int) -> Column:
    valid = np.zeros(rows, np.bool_)
    if type.variable:
        return Column(type, np.zeros(0, np.uint8), np.zeros(rows + 1, np.int64), valid)
    filler = np.nan if type.floating else 0
    return Column(type, np.full((rows, type.length) if type.vector else rows, filler, type.dtype), None, valid)


def _mask(col: Column) -> Mask:
    return np.ones(len(col), np.bool_) if col.valid is None else col.valid


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a {value.__class__.__name__}"


def broken(transform: str, what: str) -> TransformError:
    """Return the error for an answer that is not as declared."""
    return TransformError(f"transform {transform} {what}", metadata={"transform": transform})
