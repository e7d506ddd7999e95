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

Slots = dict[str, Column]


def request_slot(name: str) -> str:
    """Return the slot of a request column; no feature's name holds a colon."""
    return f"request:{name}"


@dataclass(frozen=True, slots=True)
class Step:
    """One transform, compiled.

    ``inputs``: for each parameter its slot, and whether a null there is one: a default stands in for it.
    """

    id: str
    function: Any
    inputs: tuple[tuple[str, str, bool], ...]
    outputs: tuple[tuple[str, Field], ...]
    strict: bool


def compile_steps(transforms: Sequence[OnDemandTransform]) -> tuple[Step, ...]:
    """Return the steps of transforms in order of use. Raises DefinitionError where captured code does not run."""
    return tuple(
        Step(
            t.id,
            t.code.function,
            tuple((name, slot_of(given), field_of(given).default is None) for name, given in t.inputs.items()),
            tuple((f"{t.name}.{f.name}", f) for f in t.outputs),
            t.nulls == "strict",
        )
        for t in transforms
    )


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
            given = {name: slots[slot] if null else without_nulls(slots[slot]) for name, slot, null in step.inputs}
            answers = _strict(step, given, rows) if step.strict else _call(step, given, rows)
            for (slot, f), answer in zip(step.outputs, answers, strict=True):
                slots[slot] = with_default(f, answer)


def _strict(step: Step, given: Mapping[str, Column], rows: int) -> list[Column]:
    """Call the function with the rows that have no null input; the others' outputs are null."""
    masks = [col.valid for col in given.values() if col.valid is not None]
    if not masks:
        return _call(step, given, rows)
    seen: Mask = reduce(np.logical_and, masks)
    if seen.all():
        return _call(step, {name: without_nulls(col) for name, col in given.items()}, rows)
    index = np.nonzero(seen)[0]
    if not len(index):
        return [_nulls(f.type, rows) for _, f in step.outputs]
    taken = {name: without_nulls(col).take(index) for name, col in given.items()}
    place = np.where(seen, np.cumsum(seen) - 1, 0)
    answers = []
    for col in _call(step, taken, len(index)):
        spread = Column(col.type, col.values, col.offsets, col.valid).take(place)
        answers.append(
            Column(spread.type, spread.values, spread.offsets, seen if spread.valid is None else seen & spread.valid)
        )
    return answers


def _call(step: Step, given: Mapping[str, Column], rows: int) -> list[Column]:
    arguments: dict[str, Any] = {name: _argument(col) for name, col in given.items()}
    if not step.strict:
        arguments["valid"] = {name: _read_only(_mask(col)) for name, col in given.items()}
    try:
        answer = step.function(**arguments)
    except Exception as error:
        raise TransformError(
            f"transform {step.id} failed: {error.__class__.__name__}: {error}", metadata={"transform": step.id}
        ) from error
    names = [f.name for _, f in step.outputs]
    if not isinstance(answer, Mapping):
        if len(names) != 1:
            raise broken(
                step.id, f"returned {_kind(answer)}; it declares {len(names)} outputs and returns a mapping of them"
            )
        answer = {names[0]: answer}
    if sorted(answer) != sorted(names):
        raise broken(step.id, f"returned outputs {sorted(answer)}; it declares {sorted(names)}")
    return [_answer(step, f, answer[f.name], rows) for _, f in step.outputs]


def _argument(col: Column) -> Array:
    """Return a column as the function takes it: read-only."""
    if col.type is String:
        return _read_only(np.array([v.decode() for v in col.to_bytes_list()], STRINGS))
    if col.type is Bytes:
        values = np.empty(len(col), object)
        values[:] = col.to_bytes_list()
        return _read_only(values)
    return _read_only(col.values.view(INSTANTS) if col.type is Timestamp else col.values)


def _read_only(values: Array) -> Array:
    view = values.view()
    view.flags.writeable = False
    return view


def _answer(step: Step, f: Field, answer: Any, rows: int) -> Column:
    """Return one output as a column, proved to be of the declared type and length."""
    values, valid = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
    shape = (rows, f.type.length) if f.type.vector else (rows,)
    expected = {String: STRINGS, Bytes: np.dtype(object), Timestamp: INSTANTS}.get(f.type, f.type.dtype)
    if not isinstance(values, np.ndarray) or values.dtype != expected or values.shape != shape:
        raise broken(
            step.id,
            f"returned {_kind(values)} for output {f.name!r}; it declares {f.type}: {expected} of shape {shape}",
        )
    if valid is not None:
        if not isinstance(valid, np.ndarray) or valid.dtype != np.bool_ or valid.shape != (rows,):
            raise broken(
                step.id, f"returned {_kind(valid)} as the mask of output {f.name!r}; a mask is bool of shape {(rows,)}"
            )
        valid = None if valid.all() else valid
    if f.type.variable:
        held = values.tolist() if valid is None else [v if ok else None for v, ok in zip(values, valid, strict=True)]
        return column(f.type, held, f"{step.id}.{f.name}")
    stored: Array = values.view("<i8") if f.type is Timestamp else values
    return Column(f.type, np.ascontiguousarray(stored), None, valid)


def with_default(f: Field, col: Column) -> Column:
    """Return a feature's column with its default, else NaN, zero or nothing, in the place of its nulls."""
    if col.valid is None:
        return col
    default = column(f.type, [f.value(f.default)]) if f.default is not None else _nulls(f.type, 1)
    both = _concatenated(without_nulls(col), default)
    filled = both.take(np.where(col.valid, np.arange(len(col)), len(col)))
    return Column(col.type, filled.values, filled.offsets, col.valid)


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
