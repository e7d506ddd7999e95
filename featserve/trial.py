"""Tries an on-demand transform before it is applied: on generated batches, whole, in parts and row by row.

Comes in: a definition. Goes out: nothing, or a DefinitionError that says how the function breaks the contract: it
raises, its answer is not as declared, it depends on a row's neighbours, changes its inputs, or uses a clock, a file or
random numbers. Seeded by the definition's hash, so the same function is judged the same everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from featserve.definitions import Field, OnDemandTransform
from featserve.definitions.code import Code
from featserve.errors import DefinitionError, TransformError
from featserve.purity import called_outside, named_outside
from featserve.transform import Slots, Step, compile_steps, field_of, run, slot_of
from featserve.types import Array, Column, Mask, Timestamp, column

ROWS = 61
"""Odd and not small: blocks, vector lanes and their remainders are all met."""
PARTS = (1, 7, 32)
REPEATS = 137
"""How often the rows stand in the largest batch, which is longer than what NumPy works on at once."""


def check_transform(transform: OnDemandTransform) -> None:
    """Refuse a transform that breaks the contract of an on-demand transform, with a DefinitionError that says how."""
    what = f"transform {transform.id} is refused:"
    _refuse_outside(what, named_outside(transform.code))
    rng = np.random.default_rng(int(transform.hash[:16], 16))
    steps = compile_steps([transform])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for label, nulls in (("without nulls", False), ("with nulls", True)):
            slots = {slot_of(given): _random(rng, field_of(given), nulls) for given in transform.inputs.values()}
            before = {name: col.take(np.arange(ROWS)) for name, col in slots.items()}
            try:
                whole = _outputs(steps, slots, ROWS)
                if not all(_equal(slots[name], before[name]) for name in before):
                    raise DefinitionError(f"{what} it changes its inputs; copy an array before you change it")
                if not all(map(_equal, whole, _watched(what, transform, slots))):
                    raise DefinitionError(f"{what} called twice with the same rows, it gave two answers")
                for size, start, part in _parts(steps, slots):
                    _compare(what, steps, whole, start, part, size)
            except TransformError as error:
                raise DefinitionError(f"{what} on generated rows {label}, {error}") from error


def _outputs(steps: Sequence[Step], slots: Slots, rows: int) -> list[Column]:
    filled = dict(slots)
    run(steps, filled, rows)
    return [filled[result.slot] for step in steps for result in step.results]


def _watched(what: str, transform: OnDemandTransform, slots: Slots) -> list[Column]:
    """Make the function anew and run it while its calls are seen; it has run once, so what it imports is there."""
    code = Code(transform.code.entry, transform.code.modules)
    with called_outside(code) as found:
        answer = _outputs(compile_steps([replace(transform, code=code)]), slots, ROWS)
    _refuse_outside(what, found)
    return answer


def _refuse_outside(what: str, found: list[str]) -> None:
    if found:
        raise DefinitionError(
            f"{what} it {found[0]}; a transform is a pure function of its declared inputs (the instant that is asked "
            "for is one: RequestTime())"
        )


def _parts(steps: Sequence[Step], slots: Slots) -> Iterator[tuple[int, int, list[Column]]]:
    """Yield answers for the rows in small batches, and repeated in a large one: batch size, first row, answer."""
    for size in PARTS:
        for start in range(0, ROWS, size):
            rows = np.arange(start, min(start + size, ROWS))
            yield size, start, _outputs(steps, {name: col.take(rows) for name, col in slots.items()}, len(rows))
    rows = np.tile(np.arange(ROWS), REPEATS)
    yield len(rows), 0, _outputs(steps, {name: col.take(rows) for name, col in slots.items()}, len(rows))


def _compare(what: str, steps: Sequence[Step], whole: list[Column], start: int, part: list[Column], size: int) -> None:
    for result, expected, found in zip((r for step in steps for r in step.results), whole, part, strict=True):
        rows = (start + np.arange(len(found))) % ROWS
        same = _same(expected.take(rows), found)
        if not same.all():
            at = int(np.argmin(same))
            one, other = expected.take(rows[at : at + 1]), found.take(np.array([at]))
            raise DefinitionError(
                f"{what} output {result.name!r} of a row depends on its neighbours: it is {one.to_list()[0]!r} in a "
                f"batch of {ROWS} rows, and {other.to_list()[0]!r} in one of {size}{_rounded(one.values, other.values)}"
            )


def _rounded(one: Array, other: Array) -> str:
    """Return what to do about an answer that differs in its last digits."""
    if one.dtype.kind != "f" or not np.allclose(one, other, rtol=1e-4, equal_nan=True):
        return ""
    return (
        ". That is rounding: matrix products, and sums over axis 0, add up in another order for another number of "
        "rows; np.vecdot, np.einsum and sums over the last axis of a stack do not"
    )


def _same(a: Column, b: Column) -> Mask:
    """Return bool of shape (n,): equal to the last bit, NaN being equal to NaN."""
    if a.offsets is not None:
        return np.array([x == y for x, y in zip(a.to_list(), b.to_list(), strict=True)], np.bool_)
    valid_a = np.ones(len(a), np.bool_) if a.valid is None else a.valid
    valid_b = np.ones(len(b), np.bool_) if b.valid is None else b.valid
    bits = f"V{a.values.itemsize}"
    equal = (a.values.view(bits) == b.values.view(bits)) | ((a.values != a.values) & (b.values != b.values))
    if a.type.vector:
        equal = equal.all(axis=1)
    return np.asarray((valid_a == valid_b) & (equal | ~valid_a))


def _equal(a: Column, b: Column) -> bool:
    return bool(_same(a, b).all())


def _random(rng: np.random.Generator, f: Field, nulls: bool) -> Column:
    """Return a column of random values that the field's constraints allow, a third of them null if ``nulls``."""
    type = f.type
    if f.allowed is not None:
        choices = column(type, [f.value(v) for v in f.allowed])
        values = choices.take(rng.integers(0, len(choices), ROWS))
    elif type.variable:
        texts = ["", "a", "JFK", "é", "longer text of some words", "0", "-1.5"]
        chosen = [texts[i] for i in rng.integers(0, len(texts), ROWS)]
        values = column(type, chosen if type.name == "string" else [c.encode() for c in chosen])
    elif type.name == "bool":
        values = Column(type, rng.integers(0, 2, ROWS).astype(np.bool_))
    else:
        values = Column(type, _numbers(rng, f))
    if not nulls or f.not_null or f.default is not None:
        return values
    return Column(type, values.values, values.offsets, rng.random(ROWS) > 0.33)


def _numbers(rng: np.random.Generator, f: Field) -> Array:
    type = f.type
    shape = (ROWS, type.length) if type.vector else (ROWS,)
    if type.floating:
        values = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, shape)
        values.flat[: values.size // 8] = 0.0
        low, high = (bound if bound is not None and np.isfinite(bound) else None for bound in (f.min, f.max))
        if low is not None:
            values = low + (np.abs(values) if high is None else (high - low) * rng.random(shape))
        elif high is not None:
            values = high - np.abs(values)
        return np.clip(values, f.min, f.max).astype(type.dtype)
    assert type.dtype is not None
    least, most = np.iinfo(type.dtype).min, np.iinfo(type.dtype).max
    low, high = (0, 2 * 10**15) if type is Timestamp else (-1_000, 1_000)
    if f.min is not None and f.max is None:
        low, high = f.min, min(f.min + high - low, most)
    elif f.max is not None and f.min is None:
        low, high = max(f.max - (high - low), least), f.max
    elif f.min is not None:
        low, high = f.min, f.max
    return rng.integers(low, high, shape, type.dtype, endpoint=True)
