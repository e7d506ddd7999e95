"""Answers as they are handed to a model: values, status, typed columns and frames."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featserve.batch import Arrival, EntityKeys
from featserve.definitions import Entity, FeatureService, FeatureView, Field
from featserve.engine import Engine
from featserve.errors import UnknownName
from featserve.matrix import FeatureMatrix, Status
from featserve.plan import Plans
from featserve.store.memory import MemoryStore
from featserve.types import (
    Bool,
    Bytes,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    Timestamp,
    Type,
    Vector,
    column,
)
from tests.online_model import check_frames
from tests.random_data import (
    SCALAR_TYPES,
    random_batch,
    random_entity,
    random_keys,
    random_service,
    random_view,
    snapshot_of,
)

USER = Entity("user", {"user": Int64})
NOW_US = 1_700_000_000_000_000
NAN = float("nan")


def answer(
    fields: list[Field], rows: dict[str, list[Any]], *, dtype: Type = Float32, ask: list[int] | None = None
) -> FeatureMatrix:
    """Write rows of users 0, 1, 2, … and return what a service of all fields answers about those in ``ask``."""
    view = FeatureView("v", USER, fields)
    service = FeatureService("s", [view], dtype=dtype)
    engine = Engine(MemoryStore(), Plans(snapshot_of([view], [service])))
    count = len(next(iter(rows.values())))
    columns = {f.name: column(f.type, rows[f.name]) for f in fields} | {"user": column(Int64, range(count))}
    arrival = Arrival(columns, np.full(count, NOW_US), np.full(count, NOW_US))
    engine.write(engine.plans.view("v"), arrival, now_us=NOW_US, max_future_skew_us=0)
    keys = EntityKeys.of({"user": range(count) if ask is None else ask}, service.keys)
    return engine.read(engine.plans.service("s"), keys, NOW_US, event_times=True)


@pytest.mark.parametrize(
    ("type", "dtype", "tensor"),
    [
        *((type, Float32, type in (Bool, Float32, Float64)) for type in SCALAR_TYPES),
        *((type, Float64, type in (Bool, Float32, Float64, Int32)) for type in SCALAR_TYPES),
        (Vector(3), Float32, True),
        (Vector(3), Float64, True),
    ],
)
def test_what_the_tensor_holds(type: Type, dtype: Type, tensor: bool) -> None:
    """The tensor holds what its dtype holds exactly, floats rounded to it; everything else is a typed column."""
    matrix = answer([Field("a", type)], {"a": [None]}, dtype=dtype)
    assert (matrix.values.shape[1], len(matrix.columns)) == ((type.length, 0) if tensor else (0, 1))
    assert matrix.values.dtype == dtype.dtype
    assert matrix.column("v.a").type == (dtype if type in (Float32, Float64) else type)


def test_names_follow_the_tensor() -> None:
    """Columns of the tensor are named in order, a vector's elements by number; typed columns are not among them."""
    fields = [Field("a", Float32), Field("s", String), Field("e", Vector(2)), Field("b", Bool), Field("n", Int64)]
    matrix = answer(fields, {f.name: [None] for f in fields})
    assert matrix.names == ("v.a", "v.e[0]", "v.e[1]", "v.b")
    assert matrix.values.shape == (1, 4)
    assert list(matrix.to_dict()) == ["v.a", "v.s", "v.e", "v.b", "v.n"]


def test_nulls_defaults_and_nans_are_told_apart() -> None:
    """A stored NaN is a value, a null is none, and a default stands in for a null without changing its status."""
    fields = [
        Field("a", Float64), Field("d", Float64, default=7), Field("b", Bool), Field("c", Bool, default=True),
        Field("s", String), Field("t", String, default="none"), Field("n", Int64, default=-1), Field("e", Vector(2)),
    ]  # fmt: skip
    rows: dict[str, list[Any]] = {
        "a": [NAN, None], "d": [NAN, None], "b": [False, None], "c": [False, None],
        "s": ["", None], "t": ["", None], "n": [0, None], "e": [[NAN, 1.0], None],
    }  # fmt: skip
    matrix = answer(fields, rows, ask=[0, 1, 2])
    absent: list[Any] = [None, 7.0, None, True, None, "none", -1, None]
    expected = [[NAN, NAN, False, False, "", "", 0, [NAN, 1.0]], absent, absent]
    assert repr(list(zip(*matrix.to_dict().values(), strict=True))) == repr([tuple(row) for row in expected])
    assert matrix.status.tolist() == [[Status.PRESENT] * 8, [Status.NULL] * 8, [Status.NOT_FOUND] * 8]
    assert matrix.view_status.tolist() == [[Status.PRESENT], [Status.PRESENT], [Status.NOT_FOUND]]
    assert matrix.valid is not None
    assert matrix.valid.tolist() == [[True] * 8, [False] * 8, [False] * 8]
    assert repr(matrix.values[1].tolist()) == repr([NAN, 7.0, NAN, 1.0, NAN, NAN])
    check_frames(matrix)


def test_an_answer_without_nulls_has_no_validity() -> None:
    """Where every value is there, there is no mask, and every status is PRESENT."""
    matrix = answer([Field("a", Float32), Field("s", String)], {"a": [1, NAN], "s": ["x", ""]})
    assert matrix.valid is None
    assert set(matrix.status.ravel().tolist()) == {Status.PRESENT}
    assert matrix.event_times is not None
    assert matrix.event_times.tolist() == [[NOW_US], [NOW_US]]
    assert len(matrix) == 2


def test_integers_are_exact_in_every_frame() -> None:
    """Integers over 2**53 beside a null keep every bit, in lists, in Arrow and in pandas."""
    big = [2**63 - 1, -(2**63), 2**53 + 1, None]
    matrix = answer([Field("n", Int64), Field("i", Int32)], {"n": big, "i": [2**31 - 1, None, 0, -(2**31)]})
    assert matrix.to_dict()["v.n"] == big
    assert matrix.to_arrow()["v.n"].to_pylist() == big
    frame = matrix.to_pandas()
    assert [None if value is pd.NA else value for value in frame["v.n"]] == big
    assert [str(dtype) for dtype in frame.dtypes] == ["Int64", "Int32"]


def test_pandas_dtypes_do_not_depend_on_nulls() -> None:
    """A feature has the same pandas dtype in an answer with nulls and in one without."""
    fields = [
        Field(name, type)
        for name, type in zip("abcdefgh", (Bool, Int32, Int64, Float32, Float64, String, Timestamp, Bytes), strict=True)
    ]
    values: list[Any] = [True, 1, 1, 1.0, 1.0, "x", datetime(2024, 1, 1, tzinfo=UTC), b"x"]
    full = answer(fields, {f.name: [v] for f, v in zip(fields, values, strict=True)}).to_pandas()
    bare = answer(fields, {f.name: [None] for f in fields}).to_pandas()
    assert full.dtypes.tolist() == bare.dtypes.tolist()
    assert full.iloc[0].tolist()[:6] == values[:6]


def test_a_float64_is_rounded_to_the_dtype_of_the_service() -> None:
    """Float64 features of a Float32 service are rounded to nearest, those beyond it to infinity, without a warning."""
    values = [0.1, 1e300, -1e300, 1e-300, 3.4028235677973366e38, 3.4028235677973362e38]
    matrix = answer([Field("a", Float64)], {"a": values})
    with np.errstate(over="ignore"):
        assert matrix.values[:, 0].tolist() == np.array(values).astype(np.float32).tolist()
    assert answer([Field("a", Float64)], {"a": values}, dtype=Float64).values[:, 0].tolist() == values


def test_float32_values_survive_a_float64_service() -> None:
    """A float32 feature, alone or in a vector, is the same number in float64."""
    matrix = answer([Field("a", Float32), Field("e", Vector(2))], {"a": [0.1], "e": [[0.1, 3e38]]}, dtype=Float64)
    assert matrix.values.tolist() == np.array([[0.1, 0.1, 3e38]], np.float32).astype(float).tolist()
    assert matrix.column("v.e").values.dtype == np.float32


def test_a_column_that_is_not_there() -> None:
    """Asking for a column by a wrong name offers the nearest."""
    matrix = answer([Field("alpha", Float32), Field("beta", Float32)], {"alpha": [1], "beta": [2]})
    with pytest.raises(UnknownName, match=r"unknown feature 'v.alhpa'; did you mean 'v.alpha'"):
        matrix.column("v.alhpa")


@pytest.mark.parametrize("trial", range(40))
def test_frames_of_random_answers(trial: int, seed: int) -> None:
    """Lists, Arrow and pandas hold exactly the values of any answer, of any type, null, default or missing."""
    rng = np.random.default_rng([seed, trial])
    entity = random_entity(rng, "e")
    view = random_view(rng, "v", entity, features=9)
    service = random_service(rng, "s", [view])
    engine = Engine(MemoryStore(), Plans(snapshot_of([view], [service])))
    keys = random_keys(rng, entity, 9)
    batch = random_batch(rng, view, {n: c.take(np.arange(len(c) // 2 + 1)) for n, c in keys.items()}, NOW_US, 9)
    arrival = Arrival(batch.columns, batch.event_time_us, batch.known_at_us)
    engine.write(engine.plans.view("v"), arrival, now_us=NOW_US, max_future_skew_us=2**53)
    check_frames(engine.read(engine.plans.service("s"), EntityKeys.of(keys, service.keys), NOW_US))
