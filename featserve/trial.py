"""Tries an on-demand transform before it is applied: on generated batches, whole, in parts and row by row.

Comes in: a definition. Goes out: nothing, or a DefinitionError that says how the function breaks the contract: it
raises, its answer is not as declared, it depends on a row's neighbours, changes its inputs, or reads a clock, a file or
random numbers. Seeded by the definition's hash, so the same function is judged the same everywhere.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import numpy as np

from featserve.definitions import Field, OnDemandTransform
from featserve.errors import DefinitionError, TransformError
from featserve.transform import Slots, Step, compile_steps, field_of, run, slot_of
from featserve.types import Column, Mask, Timestamp, column

ROWS = 61
"""Odd and not small: blocks, vector lanes and their remainders are all met."""

IMPURE = {
    "time": "reads the clock",
    "datetime": "reads the clock",
    "random": "draws random numbers",
    "_random": "draws random numbers",
    "numpy.random": "draws random numbers",
    "secrets": "draws random numbers",
    "posix": "uses the operating system",
    "io": "opens files",
    "_io": "opens files",
    "socket": "uses the network",
    "_socket": "uses the network",
}
CLOCKS = ("now", "utcnow", "today")


def check_transform(transform: OnDemandTransform) -> None:
    """Refuse a transform that breaks the contract of ``semantics: on-demand transforms``."""
    what = f"transform {transform.id}"
    rng = np.random.default_rng(int(transform.hash[:16], 16))
    steps = compile_steps([transform])
    for label, nulls in (("without nulls", False), ("with nulls", True)):
        slots = {slot_of(given): _random(rng, field_of(given), nulls) for given in transform.inputs.values()}
        try:
            whole = _watched(transform, slots, ROWS)
            again = _outputs(transform, steps, slots, ROWS)
            for size in (1, 7, 32):
                parts = [
                    _outputs(transform, steps, _part(slots, start, start + size), min(size, ROWS - start))
                    for start in range(0, ROWS, size)
                ]
                _compare(what, transform, whole, parts, size)
        except TransformError as error:
            raise DefinitionError(f"{what} is refused: on generated rows {label}, {error}") from error
        if any(not _same(a, b).all() for a, b in zip(whole, again, strict=True)):
            raise DefinitionError(f"{what} is refused: called twice with the same rows, it gave two answers")


def _outputs(transform: OnDemandTransform, steps: Sequence[Step], slots: Slots, rows: int) -> list[Column]:
    filled = dict(slots)
    run(steps, filled, rows)
    return [filled[f"{transform.name}.{f.name}"] for f in transform.outputs]


def _watched(transform: OnDemandTransform, slots: Slots, rows: int) -> list[Column]:
    """Run the function while every call that its own code makes is seen; refuse what a pure function does not call."""
    impure: list[str] = []
    own = f"<{transform.code.entry}: "

    def watch(frame: FrameType, event: str, called: Any) -> None:
        caller = frame if event == "c_call" else frame.f_back
        if event not in ("call", "c_call") or caller is None or not caller.f_code.co_filename.startswith(own):
            return
        if event == "call":
            module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        else:
            module, name = _home(called), called.__name__
        if module in IMPURE and (module != "datetime" or name in CLOCKS):
            impure.append(f"it {IMPURE[module]} ({module}.{name})")

    for source in transform.code.modules.values():
        impure += [f"it reads the clock (datetime64({clock!r}))" for clock in _written_clocks(source)]
    steps = compile_steps([transform])
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        answer = _outputs(transform, steps, slots, rows)
    finally:
        sys.setprofile(before)
    if impure:
        raise DefinitionError(
            f"transform {transform.id} is refused: {impure[0]}; a transform is a pure function of its declared inputs "
            "(declare RequestTime() for the instant that is asked for)"
        )
    return answer


def _home(called: Any) -> str:
    """Return the module of a built-in function, or that of the object whose method it is."""
    owner = getattr(called, "__self__", None)
    kind = owner if isinstance(owner, type) else type(owner)
    if kind.__module__ not in ("builtins", "module"):
        return "numpy.random" if kind.__module__.startswith("numpy.random") else kind.__module__
    return str(getattr(called, "__module__", None) or getattr(owner, "__name__", ""))


def _written_clocks(source: str) -> list[str]:
    """Return the clocks that the source asks NumPy for: datetime64("now") is no call that can be watched."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("datetime64"):
            found += [a.value for a in node.args if isinstance(a, ast.Constant) and a.value in ("now", "today")]
    return found


def _compare(
    what: str, transform: OnDemandTransform, whole: list[Column], parts: list[list[Column]], size: int
) -> None:
    for i, f in enumerate(transform.outputs):
        start = 0
        for part in parts:
            rows = np.arange(start, start + len(part[i]))
            same = _same(whole[i].take(rows), part[i])
            if not same.all():
                row = start + int(np.argmin(same))
                raise DefinitionError(
                    f"{what} is refused: output {f.name!r} of a row depends on its neighbours: row {row} of {ROWS} is "
                    f"{whole[i].to_list()[row]!r} in one batch, {part[i].to_list()[row - start]!r} in batches of {size}"
                )
            start += len(part[i])


def _same(a: Column, b: Column) -> Mask:
    """Return bool of shape (n,): equal to the last bit, NaN being equal to NaN."""
    if a.offsets is not None:
        return np.array([x == y for x, y in zip(a.to_list(), b.to_list(), strict=True)], np.bool_)
    valid_a = np.ones(len(a), np.bool_) if a.valid is None else a.valid
    valid_b = np.ones(len(b), np.bool_) if b.valid is None else b.valid
    equal = (a.values == b.values) | ((a.values != a.values) & (b.values != b.values))
    if a.type.vector:
        equal = equal.all(axis=1)
    return np.asarray((valid_a == valid_b) & (equal | ~valid_a))


def _part(slots: Slots, start: int, stop: int) -> Slots:
    return {name: col.take(np.arange(start, min(stop, len(col)))) for name, col in slots.items()}


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


def _numbers(rng: np.random.Generator, f: Field) -> Any:
    type, low, high = f.type, f.min, f.max
    shape = (ROWS, type.length) if type.vector else (ROWS,)
    if type is Timestamp:
        low, high = (0 if low is None else low), (2 * 10**15 if high is None else high)
        return rng.integers(low, high, shape, endpoint=True)
    if not type.floating:
        low, high = (-1_000 if low is None else low), (1_000 if high is None else high)
        return rng.integers(min(low, high), max(low, high), shape, endpoint=True).astype(type.dtype)
    values = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, shape)
    if low is None and high is None:
        values.flat[: values.size // 8] = 0.0
    span = np.clip(values, -np.inf if low is None else low, np.inf if high is None else high)
    return span.astype(type.dtype)
