"""Expressions over the columns of an event: the NumPy form and the SQL form on DuckDB mean what the oracle says."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featserve.definitions import Expression, col, evaluate, sql, type_of
from featserve.definitions.expression import OPERATORS
from featserve.types import Bool, Column, Float32, Float64, Int32, Int64, String, Timestamp, Type, column
from tests.offline.worlds import array
from tests.windows_model import value_of

POOLS: dict[str, tuple[Type, list[Any]]] = {
    "a": (Float64, [0.0, -0.0, 1.5, -2.0, float("nan"), float("inf"), float("-inf"), 1e300, 5e-324, None]),
    "b": (Float64, [0.0, -0.0, 1.5, 3.0, float("nan"), float("inf"), -1e300, None]),
    "f": (Float32, [0.0, -0.0, 1.5, float(np.float32(0.1)), float("nan"), float("inf"), None]),
    "i": (Int64, [0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63), None]),
    "j": (Int32, [0, 1, -7, 2**31 - 1, -(2**31), None]),
    "s": (String, ["", "x", "é", "a'b", "\\", "X", None]),
    "t": (String, ["", "x", "y", None]),
    "p": (Bool, [True, False, None]),
    "q": (Bool, [True, False, None]),
    "at": (Timestamp, [0, -1, 1_700_000_000_000_000, None]),
    "on": (Timestamp, [0, 1, 1_700_000_000_000_000, None]),
}
TYPES = {name: type for name, (type, _) in POOLS.items()}
NUMBERS = ("a", "b", "f", "i", "j")
LITERALS = (0, 1, -2.5, 2**53 + 1, 0.1)


def random_expression(rng: np.random.Generator, form: str, depth: int) -> Expression:
    """Return a random expression that is a "number" or "logic"."""
    if form == "number":
        if depth == 0 or rng.random() < 0.2:
            return col(NUMBERS[rng.integers(len(NUMBERS))])
        operator = "+-*/"[rng.integers(4)]
        given: list[Any] = [random_expression(rng, "number", depth - 1) for _ in range(2)]
        if rng.random() < 0.3:
            given[rng.integers(2)] = Expression("literal", (LITERALS[rng.integers(len(LITERALS))],))
        return Expression(operator, tuple(given))
    kind = rng.integers(6)
    if depth == 0:
        return col("p" if kind % 2 else "q")
    if kind == 0:
        return Expression("~", (random_expression(rng, "logic", depth - 1),))
    if kind == 1:
        return random_expression(rng, ("number", "logic")[rng.integers(2)], depth - 1).is_null()
    if kind <= 3:
        pair = tuple(random_expression(rng, "logic", depth - 1) for _ in range(2))
        return Expression("&|"[kind - 2], pair)
    operators = [name for name, rule in OPERATORS.items() if rule.form == "comparison"]
    pairs = [("s", "t"), ("at", "on"), ("p", "q")]
    chosen = rng.integers(6)
    sides = [col(name) for name in pairs[chosen]] if chosen < 3 else [
        random_expression(rng, "number", depth - 1) for _ in range(2)
    ]  # fmt: skip
    return Expression(operators[rng.integers(len(operators))], tuple(sides))


@pytest.fixture
def world(rng: np.random.Generator, tmp_path: Path) -> tuple[list[dict[str, Any]], dict[str, Column], str]:
    """Return 400 random events: as Python values, as columns, and as a Parquet file, of which DuckDB has statistics."""
    rows = [{name: pool[rng.integers(len(pool))] for name, (_, pool) in POOLS.items()} for _ in range(400)]
    columns = {name: column(type, [row[name] for row in rows]) for name, type in TYPES.items()}
    made = {name: array(type, [row[name] for row in rows]) for name, type in TYPES.items()}
    made |= {name: made[name].view(pa.int64()) for name in ("at", "on")}  # as the queries have them
    path = tmp_path / "events.parquet"
    pq.write_table(pa.table({"row": np.arange(400), **made}), path, row_group_size=100)
    return rows, columns, f"read_parquet('{path}')"


def test_every_form_means_the_same(
    world: tuple[list[dict[str, Any]], dict[str, Column], str], rng: np.random.Generator
) -> None:
    """On random events with nulls, NaN, infinities and -0.0, of every operator both forms are the oracle's."""
    rows, columns, table = world
    used: set[str] = set()
    for number in range(150):
        expression = random_expression(rng, ("number", "logic")[number % 2], int(rng.integers(1, 5)))
        used |= operators_of(expression)
        expected = [value_of(expression, row) for row in rows]
        found = evaluate(expression, columns, len(rows))
        assert found.type == type_of(expression, TYPES, "")
        assert same(found.to_list(), expected), str(expression)
        text = sql(expression, TYPES, lambda name: f'"{name}"')
        answer = duckdb.sql(f"SELECT {text} FROM {table} ORDER BY row").fetchall()
        assert same([value for (value,) in answer], expected), (str(expression), text)
    assert used == set(OPERATORS)


def operators_of(expression: Expression) -> set[str]:
    inner = (operators_of(a) for a in expression.arguments if isinstance(a, Expression))
    return set().union(*inner) | ({expression.operator} & OPERATORS.keys())


def same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(
        (a is None) == (b is None) and isinstance(a, bool) == isinstance(b, bool) and a == b
        for a, b in zip(found, expected, strict=True)
    )


def test_literals(world: tuple[list[dict[str, Any]], dict[str, Column], str]) -> None:
    """Texts with quotes and backslashes, instants and numbers beside a column mean themselves in both forms."""
    rows, columns, table = world
    for expression in (
        col("s") == "a'b",
        col("s") != "\\",
        col("s") < "é",
        col("i") == 2**53 + 1,
        col("j") >= -7,
        col("a") > 2.5,
        col("at") >= datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC),
        1 / col("j"),
        3 - col("f"),
        col("p") == True,  # noqa: E712 - an expression
    ):
        expected = [value_of(expression, row) for row in rows]
        assert same(evaluate(expression, columns, len(rows)).to_list(), expected), str(expression)
        text = sql(expression, TYPES, lambda name: f'"{name}"')
        answer = duckdb.sql(f"SELECT {text} FROM {table} ORDER BY row").fetchall()
        assert same([value for (value,) in answer], expected), (str(expression), text)


def test_long_expressions_stay_short_as_sql() -> None:
    """The SQL of a long expression is as long as it is: nothing is written twice at each level."""
    expression = col("a")
    for _ in range(200):
        expression = expression / col("b") + 1
    assert len(sql(expression, TYPES, str)) < 40_000
