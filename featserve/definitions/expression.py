"""Expressions over the columns of an event: what an aggregate is of, and which events it takes.

Written as ``col("price") * col("quantity")`` or ``col("delay_min") > 15``. Each operator stands once in ``OPERATORS``,
with its NumPy form, which the online path runs, and its SQL form, which offline engines run; both mean the same:

- Arithmetic is in float64. A division by zero is null.
- A null makes null, but for ``&`` and ``|`` where the other side decides. ``is_null`` is never null.
- NaN is null, wherever it comes from: engines differ in how they order it.

Knows no event source and no engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np

from featserve.errors import DefinitionError, hint
from featserve.types import Array, Bool, Column, Float64, Int64, Mask, String, Timestamp, Type, column, to_us

Json = Any
Form = Literal["number", "comparison", "logic"]


@dataclass(frozen=True, slots=True, eq=False)
class Expression:
    """A column, a literal, or an operator over expressions. ``operator`` is "col", "literal" or one of ``OPERATORS``.

    Python's operators and comparisons of expressions are expressions; ``col`` makes one of a column's name.
    """

    operator: str
    arguments: tuple[Any, ...]

    def __add__(self, other: object) -> Expression:
        return _of("+", self, other)

    def __radd__(self, other: object) -> Expression:
        return _of("+", other, self)

    def __sub__(self, other: object) -> Expression:
        return _of("-", self, other)

    def __rsub__(self, other: object) -> Expression:
        return _of("-", other, self)

    def __mul__(self, other: object) -> Expression:
        return _of("*", self, other)

    def __rmul__(self, other: object) -> Expression:
        return _of("*", other, self)

    def __truediv__(self, other: object) -> Expression:
        return _of("/", self, other)

    def __rtruediv__(self, other: object) -> Expression:
        return _of("/", other, self)

    def __lt__(self, other: object) -> Expression:
        return _of("<", self, other)

    def __le__(self, other: object) -> Expression:
        return _of("<=", self, other)

    def __gt__(self, other: object) -> Expression:
        return _of(">", self, other)

    def __ge__(self, other: object) -> Expression:
        return _of(">=", self, other)

    def __eq__(self, other: object) -> Expression:  # type: ignore[override]
        return _of("==", self, other)

    def __ne__(self, other: object) -> Expression:  # type: ignore[override]
        return _of("!=", self, other)

    def __and__(self, other: object) -> Expression:
        return _of("&", self, other)

    def __or__(self, other: object) -> Expression:
        return _of("|", self, other)

    def __invert__(self) -> Expression:
        return _of("~", self)

    def is_null(self) -> Expression:
        """Return whether it is null."""
        return _of("is_null", self)

    def __bool__(self) -> bool:
        raise DefinitionError(f"{self}: an expression is neither true nor false; write & | ~ for and, or, not")

    def __str__(self) -> str:
        if self.operator == "col":
            return str(self.arguments[0])
        if self.operator == "literal":
            return repr(self.arguments[0])
        shown = [str(argument) for argument in self.arguments]
        return f"({shown[0]} {self.operator} {shown[1]})" if len(shown) == 2 else f"{self.operator}({shown[0]})"

    def columns(self) -> set[str]:
        """Return the names of the columns that it reads."""
        if self.operator == "col":
            return {self.arguments[0]}
        return set().union(*(a.columns() for a in self.arguments if isinstance(a, Expression)))

    def to_dict(self) -> Json:
        """Return it as nested lists, which JSON holds exactly."""
        return [self.operator, *(a.to_dict() if isinstance(a, Expression) else a for a in self.arguments)]

    @classmethod
    def from_dict(cls, d: Json) -> Expression:
        operator, *arguments = d
        if operator in OPERATORS:
            arguments = [cls.from_dict(argument) for argument in arguments]
        return cls(operator, tuple(arguments))


def col(name: str) -> Expression:
    """Return the expression that is the event's column ``name``."""
    if not isinstance(name, str):
        raise DefinitionError(f"col({name!r}): expected the name of a column")
    return Expression("col", (name,))


def _of(operator: str, *arguments: object) -> Expression:
    return Expression(operator, tuple(a if isinstance(a, Expression) else _literal(a) for a in arguments))


def _literal(value: object) -> Expression:
    """Return a literal: a bool, number or string, or an instant as ``["literal", microseconds, "timestamp"]``."""
    if isinstance(value, datetime):
        return Expression("literal", (to_us(value), Timestamp.name))
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise DefinitionError(
            f"{value!r} stands in an expression: use a column, a finite number, a bool, a string or a datetime"
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise DefinitionError(f"{value} stands in an expression and does not fit int64")
    return Expression("literal", (value,))


def type_of(expression: Expression, types: Mapping[str, Type], what: str) -> Type:
    """Return the type of an expression over columns of ``types``; raises DefinitionError, with ``what`` in front."""
    operator, arguments = expression.operator, expression.arguments
    if operator == "col":
        (name,) = arguments
        if name not in types:
            raise DefinitionError(f"{what}: there is no column {name!r}{hint(name, types)}")
        if types[name].vector:
            raise DefinitionError(f"{what}: column {name!r} is a {types[name]}, which no expression takes")
        return types[name]
    if operator == "literal":
        return _literal_type(expression)
    given = [type_of(argument, types, what) for argument in arguments]
    form = OPERATORS[operator].form
    fits = {
        "number": all(_number(t) for t in given),
        "logic": all(t is Bool for t in given) or operator == "is_null",
        "comparison": len(set(given)) == 1 or all(_number(t) for t in given),
    }[form]
    if not fits:
        raise DefinitionError(f"{what}: {expression} takes no {' and '.join(str(t) for t in given)}")
    return Float64 if form == "number" else Bool


def _number(type: Type) -> bool:
    return type.dtype is not None and type.dtype.kind in "if" and type is not Timestamp


def _literal_type(expression: Expression) -> Type:
    value, *kind = expression.arguments
    if kind:
        return Timestamp
    return {bool: Bool, int: Int64, float: Float64, str: String}[type(value)]


def evaluate(expression: Expression, columns: Mapping[str, Column], rows: int) -> Column:
    """Return the value of an expression for each of ``rows`` events, of its ``type_of``."""
    operator, arguments = expression.operator, expression.arguments
    if operator == "col":
        return _without_nan(columns[arguments[0]])
    if operator == "literal":
        one = column(_literal_type(expression), [arguments[0]])
        return one.take(np.zeros(rows, np.int64))
    given = [evaluate(argument, columns, rows) for argument in arguments]
    valid = [np.ones(rows, np.bool_) if c.valid is None else c.valid for c in given]
    rule = OPERATORS[operator]
    if rule.form == "logic":
        values, known = rule.numpy([c.values for c in given], valid)
        return Column(Bool, values & known, None, known)
    known = np.logical_and.reduce(valid)
    with np.errstate(all="ignore"):
        values = rule.numpy(*_comparable(given, rule.form))
    if rule.form == "number":
        return _without_nan(Column(Float64, values, None, known))
    return Column(Bool, values.astype(np.bool_, copy=False), None, known)


def _comparable(columns: Sequence[Column], form: Form) -> list[Array]:
    """Return the values of columns as arrays that NumPy compares or computes as SQL does."""
    if columns[0].offsets is not None:
        return [np.array(c.to_bytes_list(), dtype=object) for c in columns]
    if form == "number" or any(c.type.floating for c in columns):
        return [c.values.astype(np.float64) for c in columns]
    return [c.values for c in columns]


def _without_nan(col: Column) -> Column:
    """Return a column with NaN as null."""
    if not col.type.floating or not (nan := np.isnan(col.values)).any():
        return col
    return Column(col.type, col.values, None, ~nan if col.valid is None else col.valid & ~nan)


def sql(expression: Expression, types: Mapping[str, Type], quoted: Callable[[str], str]) -> str:
    """Return an expression in DuckDB's dialect. Timestamps are int64 microseconds; ``quoted`` names a column."""
    text = _sql(expression, types, quoted)
    # Not by comparing with NaN: DuckDB takes that for false where the statistics of a file show no such value. Within
    # arithmetic NaN makes NaN, so it is enough to look at the end.
    return f"(CASE WHEN ISNAN({text}) THEN NULL ELSE {text} END)" if type_of(expression, types, "").floating else text


def _sql(expression: Expression, types: Mapping[str, Type], quoted: Callable[[str], str]) -> str:
    """Return an expression whose value may be NaN in place of null."""
    operator, arguments = expression.operator, expression.arguments
    if operator == "col":
        return quoted(arguments[0])
    if operator == "literal":
        return _sql_literal(expression)
    rule = OPERATORS[operator]
    given = [(_sql if rule.form == "number" else sql)(argument, types, quoted) for argument in arguments]
    kinds = [type_of(argument, types, "") for argument in arguments]
    if rule.form == "number" or (rule.form == "comparison" and any(kind.floating for kind in kinds)):
        given = [
            text if kind is Float64 else f"CAST({text} AS DOUBLE)" for text, kind in zip(given, kinds, strict=True)
        ]
    return rule.sql.format(*given)


def _sql_literal(expression: Expression) -> str:
    value = expression.arguments[0]
    kind = _literal_type(expression)
    if kind is String:
        return "'" + str(value).replace("'", "''") + "'"
    if kind is Bool:
        return "TRUE" if value else "FALSE"
    return f"CAST('{value!r}' AS {'DOUBLE' if kind is Float64 else 'BIGINT'})"


@dataclass(frozen=True, slots=True)
class Operator:
    """``form``: what it takes and gives. ``numpy``: over arrays; for logic, over values and masks. ``sql``: as text."""

    form: Form
    numpy: Callable[..., Any]
    sql: str


def _divide(a: Array, b: Array) -> Array:
    return np.where(b == 0, np.nan, a / np.where(b == 0, 1, b))


def _and(values: Sequence[Array], valid: Sequence[Mask]) -> tuple[Array, Mask]:
    (a, b), (known_a, known_b) = values, valid
    return a & b, (known_a & known_b) | (known_a & ~a) | (known_b & ~b)


def _or(values: Sequence[Array], valid: Sequence[Mask]) -> tuple[Array, Mask]:
    (a, b), (known_a, known_b) = values, valid
    return (a & known_a) | (b & known_b), (known_a & known_b) | (known_a & a) | (known_b & b)


OPERATORS = {
    "+": Operator("number", np.add, "({0} + {1})"),
    "-": Operator("number", np.subtract, "({0} - {1})"),
    "*": Operator("number", np.multiply, "({0} * {1})"),
    "/": Operator("number", _divide, "({0} / NULLIF({1}, 0))"),
    "==": Operator("comparison", np.equal, "({0} = {1})"),
    "!=": Operator("comparison", np.not_equal, "({0} <> {1})"),
    "<": Operator("comparison", np.less, "({0} < {1})"),
    "<=": Operator("comparison", np.less_equal, "({0} <= {1})"),
    ">": Operator("comparison", np.greater, "({0} > {1})"),
    ">=": Operator("comparison", np.greater_equal, "({0} >= {1})"),
    "&": Operator("logic", _and, "({0} AND {1})"),
    "|": Operator("logic", _or, "({0} OR {1})"),
    "~": Operator("logic", lambda values, valid: (~values[0], valid[0]), "(NOT {0})"),
    "is_null": Operator("logic", lambda values, valid: (~valid[0], np.ones_like(valid[0])), "({0} IS NULL)"),
}
