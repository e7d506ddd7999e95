"""Running transforms: what a function is given, what becomes of its answer, and what a broken one does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from featserve.batch import EntityKeys, EventBatch
from featserve.definitions import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    OnDemandTransform,
    Outputs,
    RequestColumn,
    RequestTime,
    Selection,
)
from featserve.engine import NOTHING, encode_rows, read
from featserve.errors import TransformError
from featserve.matrix import FeatureMatrix, Status
from featserve.plan import compile_service, compile_view
from featserve.server.status import code_of
from featserve.stages import Stages
from featserve.store.memory import MemoryStore
from featserve.transform import compile_steps, run
from featserve.types import (
    NEVER_US,
    Bool,
    Bytes,
    Column,
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
from tests.online_model import bits
from tests.random_data import Random, cells_of, random_column, random_default
from tests.transforms import made

TYPES = (Bool, Int32, Int64, Float32, Float64, String, Bytes, Timestamp, Vector(3))
DTYPES = {
    Bool: "np.bool_",
    Int32: "np.int32",
    Int64: "np.int64",
    Float32: "np.float32",
    Float64: "np.float64",
    String: "np.dtypes.StringDType()",
    Bytes: "object",
    Timestamp: "np.dtype('M8[us]')",
    Vector(3): "np.float32",
}
USER = Entity("user", {"user_id": Int64})
NOW_US = 1_700_000_000_000_000


def calculate(
    transform: OnDemandTransform, given: Mapping[str, Column], rows: int, *, stages: Stages | None = None
) -> list[Column]:
    """Return the outputs of one transform whose inputs are request columns, given by name."""
    slots = {f"request:{name}": col for name, col in given.items()}
    run(compile_steps([transform]), slots, rows, stages)
    return [slots[f"{transform.name}.{f.name}"] for f in transform.outputs]


def without_nat(col: Column) -> Column:
    """Return a column without the least int64, which NumPy takes for no instant."""
    if col.type is not Timestamp:
        return col
    return Column(Timestamp, np.where(col.values == NEVER_US, 1, col.values), None, col.valid)


def requests(types: Mapping[str, Type]) -> dict[str, RequestColumn]:
    return {name: RequestColumn(name, type) for name, type in types.items()}


# What a function is given, and what it gives


@pytest.mark.parametrize("type", TYPES, ids=str)
@pytest.mark.parametrize("null_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("nulls", ["strict", "pass"])
def test_every_type_goes_in_and_out(type: Type, null_share: float, nulls: Any, rng: Random) -> None:
    """A function takes each type in its dtype, read-only and contiguous, and gives it back to the last bit."""
    width = f" and x.shape[1:] == ({type.length},)" if type.vector else " and x.ndim == 1"
    source = f"""
        def same(x{", valid" if nulls == "pass" else ""}):
            assert x.dtype == {DTYPES[type]}{width} and not x.flags.writeable and x.flags.c_contiguous
            return {"(x, valid['x'])" if nulls == "pass" else "x"}
    """
    transform = made(source, requests({"x": type}), [Field("out", type)], nulls)
    for rows in 1, 2, 50:
        given = without_nat(random_column(rng, type, rows, null_share=null_share))
        (out,) = calculate(transform, {"x": given}, rows)
        assert cells_of(out) == cells_of(given)
        assert out.valid is None or not out.valid.all()


def test_a_row_with_a_null_is_kept_from_a_strict_function(rng: Random) -> None:
    """The function sees the rows without any null, in order, and no other; theirs are the outputs that are not null."""
    source = """
        def f(x, s):
            assert not (x == -1).any() and not (s == "gone").any()
            return {"double": x * 2, "text": np.strings.add(s, "!"), "seen": np.full(len(x), len(x))}
    """
    outputs = [Field("double", Int64), Field("text", String), Field("seen", Int64)]
    transform = made(source, requests({"x": Int64, "s": String}), outputs)
    for rows in 1, 7, 40:
        valid_x, valid_s = rng.random(rows) < 0.7, rng.random(rows) < 0.7
        x, s = np.where(valid_x, np.arange(rows), -1), [str(i) if ok else "gone" for i, ok in enumerate(valid_s)]
        text = column(String, s)
        given = {"x": Column(Int64, x, None, valid_x), "s": Column(String, text.values, text.offsets, valid_s)}
        double, texts, seen = (out.to_list() for out in calculate(transform, given, rows))
        both = (valid_x & valid_s).tolist()
        assert double == [2 * i if ok else None for i, ok in enumerate(both)]
        assert texts == [f"{i}!" if ok else None for i, ok in enumerate(both)]
        assert seen == [sum(both) if ok else None for ok in both]


def test_a_strict_function_is_not_called_for_nulls_alone() -> None:
    """Where each row has a null there is nothing to ask, and what stands under the nulls is no garbage."""
    transform = made("def f(x):\n    raise ValueError", requests({"x": Float64}), [Field("out", Float64)])
    given = Column(Float64, np.array([1.0, 2.0]), None, np.zeros(2, bool))
    (out,) = calculate(transform, {"x": given}, 2)
    assert out.to_list() == [None, None]
    assert np.isnan(out.values).all()


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_no_rows_are_not_asked_about(type: Type) -> None:
    """A batch of no rows has outputs of no rows, and the function need not know."""
    transform = made("def f(x):\n    return x[0]", requests({"x": type}), [Field("out", type)])
    (out,) = calculate(transform, {"x": random_column(np.random.default_rng(0), type, 0)}, 0)
    assert (len(out), out.type) == (0, type)


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_what_stands_under_a_null_is_the_same_everywhere(type: Type, rng: Random) -> None:
    """With nulls="pass" a function sees NaN, zero or nothing under a null, whatever the caller put there."""
    transform = made("def f(x, valid):\n    return x", requests({"x": type}), [Field("out", type)], "pass")
    given = without_nat(random_column(rng, type, 40, null_share=0.5))
    (out,) = calculate(transform, {"x": given}, 40)
    nothing = b"" if type.variable else bytes(type.width)
    if type.floating:
        nothing = np.full(type.length, np.nan, type.dtype).tobytes()
    assert out.valid is None
    assert cells_of(out) == [nothing if cell is None else cell for cell in cells_of(given)]


def test_masks_are_given_and_taken(rng: Random) -> None:
    """With nulls="pass" a function sees which values are there, and says which of its own are."""
    source = """
        def f(x, y, valid):
            assert not valid["x"].flags.writeable and valid["y"].dtype == bool
            either = np.where(valid["x"], x, y), valid["x"] | valid["y"]
            return {"either": either, "count": valid["x"] * 1 + valid["y"]}
    """
    transform = made(
        source, requests({"x": Float64, "y": Float64}), [Field("either", Float64), Field("count", Int64)], "pass"
    )
    x, y = (random_column(rng, Float64, 30, null_share=0.5) for _ in range(2))
    either, count = calculate(transform, {"x": x, "y": y}, 30)
    first, second = cells_of(x), cells_of(y)
    assert cells_of(either) == [a if a is not None else b for a, b in zip(first, second, strict=True)]
    assert count.to_list() == [(a is not None) + (b is not None) for a, b in zip(first, second, strict=True)]


def test_a_nat_is_a_null() -> None:
    """An instant that could not be calculated is missing, not an instant 292,000 years ago."""
    source = "def f(x):\n    return np.where(x > np.datetime64(0, 'us'), x, np.datetime64('NaT', 'us'))"
    transform = made(source, requests({"x": Timestamp}), [Field("out", Timestamp)])
    (out,) = calculate(transform, {"x": column(Timestamp, [5, -5, 0, None])}, 4)
    assert out.valid is not None
    assert (out.valid.tolist(), out.values.tolist()) == ([True, False, False, False], [5, 0, 0, 0])


def test_an_array_of_any_layout_is_taken(rng: Random) -> None:
    """A view of every second element, a reversed or a broadcast one is the same answer as its copy."""
    source = """
        def f(x, v):
            return {"a": np.repeat(x, 2)[::2], "b": x[::-1][::-1], "c": np.broadcast_to(np.float64(1.5), x.shape),
                    "d": np.asfortranarray(v), "e": x}
    """
    outputs = [*(Field(n, Float64) for n in "abc"), Field("d", Vector(3)), Field("e", Float64)]
    transform = made(source, requests({"x": Float64, "v": Vector(3)}), outputs)
    x, v = random_column(rng, Float64, 20), random_column(rng, Vector(3), 20)
    a, b, c, d, e = calculate(transform, {"x": x, "v": v}, 20)
    assert cells_of(a) == cells_of(b) == cells_of(e) == cells_of(x)
    assert c.values.tolist() == [1.5] * 20
    assert cells_of(d) == cells_of(v)
    assert d.values.flags.c_contiguous


def test_long_and_foreign_text_is_exact() -> None:
    """Text of any length, script and content, and bytes with zeros in them, come out as they went in."""
    texts = ["", "a", "\0", "a\0", "é", "日本", "😀" * 50, "x" * 5_000, "a|b", " "]
    blobs = [text.encode() + b"\xff\0" for text in texts]
    transform = made(
        "def f(s, b):\n    return {'s': s, 'b': b}",
        requests({"s": String, "b": Bytes}),
        [Field("s", String), Field("b", Bytes)],
    )
    s, b = calculate(transform, {"s": column(String, texts), "b": column(Bytes, blobs)}, len(texts))
    assert (s.to_list(), b.to_list()) == (texts, blobs)


def test_a_division_by_zero_is_a_value() -> None:
    """What NumPy would warn of is infinity or NaN, and no warning reaches the log."""
    transform = made("def f(x):\n    return np.log(x) / x", requests({"x": Float64}), [Field("out", Float64)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (out,) = calculate(transform, {"x": column(Float64, [0.0, -1.0, 1.0])}, 3)
    assert repr(out.to_list()) == "[-inf, nan, 0.0]"


# Through the engine


def view_of(*fields: Field) -> FeatureView:
    return FeatureView("v", USER, fields)


def answer(
    service: FeatureService,
    rows: Mapping[str, Column],
    *,
    users: list[int] | None = None,
    request: Mapping[str, Column] = NOTHING,
    now_us: int = NOW_US,
) -> FeatureMatrix:
    """Write one row for each of users 0, 1, ... to every view, and ask for ``users`` (those by default)."""
    store = MemoryStore()
    count = len(next(iter(rows.values())))
    for view in service.views:
        columns = {f.name: rows[f.name] for f in view.features} | {"user_id": Column(Int64, np.arange(count))}
        times = np.full(count, NOW_US - 1)
        store.write_many(*encode_rows(compile_view(view), EventBatch(columns, times, times, np.arange(count))))
    asked = {"user_id": column(Int64, list(range(count)) if users is None else users)}
    plan = compile_service(service)
    return read(store, plan, EntityKeys.of(asked, service.keys), now_us, request_columns=request)


@pytest.mark.parametrize("dtype", [Float32, Float64], ids=str)
@pytest.mark.parametrize("nulls", ["strict", "pass"])
def test_outputs_stand_beside_stored_features(dtype: Type, nulls: Any, rng: Random) -> None:
    """An output that is its input is placed in tensor, columns and validity bits just as the input is."""
    for default in (False, True):
        defaults = [random_default(rng, t) if t is not Timestamp else 1 for t in TYPES]
        fields = [Field(f"f{i}", t, default=defaults[i] if default else None) for i, t in enumerate(TYPES)]
        view = view_of(*fields)
        inputs: dict[str, Selection] = {f.name: view[f.name] for f in fields}
        outs = [Field(f.name, f.type, default=None if f.default is None else f.value(f.default)) for f in fields]
        values = ", ".join(f"'{f.name}': ({f.name}, valid['{f.name}'])" for f in fields)
        every = ", ".join([*inputs, "valid"])
        if nulls == "pass":
            copies = [made(f"def copy({every}):\n    return {{{values}}}", inputs, outs, "pass")]
        else:  # one each: any null of a row would make all of its outputs null
            copies = [
                made(f"def copy_{f.name}({f.name}):\n    return {f.name}", {f.name: view[f.name]}, [out])
                for f, out in zip(fields, outs, strict=True)
            ]
        service = FeatureService("s", [view, *copies], dtype=dtype)
        rows = {f.name: without_nat(random_column(rng, f.type, 30, null_share=0.3)) for f in fields}
        matrix = answer(service, rows, users=[*range(30), 99, 5])
        half = len(fields)
        for i, f in enumerate(fields):
            name = matrix.schema.features[half + i].name
            stored, computed = matrix.column(f"v.{f.name}"), matrix.column(name)
            assert stored.type == computed.type
            if nulls == "pass" and default:  # the function is given the default, and so it is there
                assert computed.valid is None or computed.valid.all()
                assert cells_of(computed) == cells_of(Column(stored.type, stored.values, stored.offsets))
                continue
            if default:
                assert computed.valid is None or computed.valid.all()
                continue
            assert cells_of(stored) == cells_of(computed)
            assert cells_of(Column(*fields_of(stored))) == cells_of(Column(*fields_of(computed)))
            found = matrix.status[:, half + i]
            assert ((found == Status.PRESENT) == (matrix.status[:, i] == Status.PRESENT)).all()
            assert set(found.tolist()) <= {Status.PRESENT, Status.NULL}
        width = matrix.schema.width // 2
        assert bits(matrix.values[:, :width].copy()) == bits(matrix.values[:, width:].copy())


def fields_of(col: Column) -> tuple[Type, Any, Any]:
    return col.type, col.values, col.offsets


def test_a_stored_default_stands_in_for_a_null_input() -> None:
    """A strict function sees the row whose null has a default, with it; a row that does not exist, too."""
    view = view_of(Field("x", Float64, default=7.0), Field("y", Float64))
    double = made("def double(x):\n    return x * 2", {"x": view["x"]}, [Field("out", Float64)])
    total = made("def total(x, y):\n    return x + y", {"x": view["x"], "y": view["y"]}, [Field("out", Float64)])
    service = FeatureService("s", [view, double, total], dtype=Float64)
    rows = {"x": column(Float64, [1.0, None]), "y": column(Float64, [None, 1.0])}
    matrix = answer(service, rows, users=[0, 1, 2])
    assert matrix.to_dict()["double.out"] == [2.0, 14.0, 14.0]
    assert matrix.to_dict()["total.out"] == [None, 8.0, None]
    assert matrix.status.tolist() == [[1, 2, 1, 2], [2, 1, 1, 1], [3, 3, 1, 2]]


@pytest.mark.parametrize("dtype", [Float32, Float64], ids=str)
def test_an_outputs_default_replaces_its_null_and_not_its_status(dtype: Type) -> None:
    """A null output is served as its default, with the status NULL."""
    view = view_of(Field("x", Float64))
    outputs = [
        Field("a", Float64, default=-1.0),
        Field("b", Int32, default=5),
        Field("c", String, default="none"),
        Field("d", Bool, default=True),
        Field("e", Vector(2), default=[1.0, 2.0]),
        Field("g", Int64),
    ]
    source = """
        def f(x):
            n = len(x)
            return {"a": x, "b": np.zeros(n, np.int32), "c": np.full(n, "x", np.dtypes.StringDType()),
                    "d": np.zeros(n, bool), "e": np.zeros((n, 2), np.float32), "g": np.zeros(n, np.int64)}
    """
    service = FeatureService("s", [made(source, {"x": view["x"]}, outputs)], dtype=dtype)
    matrix = answer(service, {"x": column(Float64, [3.0, None])})
    assert {name: values[1] for name, values in matrix.to_dict().items()} == {
        "f.a": -1.0, "f.b": 5, "f.c": "none", "f.d": True, "f.e": [1.0, 2.0], "f.g": None,
    }  # fmt: skip
    assert matrix.status.tolist() == [[Status.PRESENT] * 6, [Status.NULL] * 6]


def test_a_chain_runs_in_order() -> None:
    """A transform takes another's outputs, nulls and defaults included; only what the service lists is served."""
    view = view_of(Field("x", Float64))
    first = made(
        "def first(x):\n    return {'a': x + 1, 'b': x + 2}",
        {"x": view["x"]},
        [Field("a", Float64), Field("b", Float64, default=100.0)],
    )
    second = made("def second(a, b):\n    return a * b", {"a": first["a"], "b": first["b"]}, [Field("out", Float64)])
    third = made(
        "def third(b, s, valid):\n    return np.where(valid['s'], s, b)",
        {"b": first["b"], "s": second["out"]},
        [Field("out", Float64)],
        "pass",
    )
    service = FeatureService("s", [third, second["out"]], dtype=Float64)
    assert [t.name for t in service.transforms] == ["first", "second", "third"]
    matrix = answer(service, {"x": column(Float64, [1.0, None])})
    assert matrix.to_dict() == {"third.out": [6.0, 100.0], "second.out": [6.0, None]}
    assert matrix.names == ("third.out", "second.out")


def test_a_transform_used_twice_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A diamond of transforms calls the shared one once a request."""
    view = view_of(Field("x", Float64))
    root = made("CALLS = []\ndef root(x):\n    CALLS.append(len(CALLS))\n    return x + CALLS[-1]", {"x": view["x"]},
                [Field("out", Float64)])  # fmt: skip
    left, right = (
        made(f"def {n}(x):\n    return x", {"x": root["out"]}, [Field("out", Float64)]) for n in ("left", "right")
    )
    matrix = answer(FeatureService("s", [left, right], dtype=Float64), {"x": column(Float64, [5.0])})
    assert matrix.to_dict() == {"left.out": [5.0], "right.out": [5.0]}


def test_request_time_is_the_instant_asked_for() -> None:
    """Each row gets the same instant, in microseconds, and a service that does not take it pays nothing for it."""
    view = view_of(Field("seen", Timestamp))
    age = made(
        "def age(now, seen):\n    return (now - seen).astype(np.int64)",
        {"now": RequestTime(), "seen": view["seen"]},
        [Field("us", Int64)],
    )
    when = made("def when(now):\n    return now", {"now": RequestTime()}, [Field("at", Timestamp)])
    service = FeatureService("s", [age, when])
    matrix = answer(service, {"seen": column(Timestamp, [NOW_US - 5, NOW_US - 7])}, now_us=NOW_US + 1)
    assert matrix.to_dict()["age.us"] == [6, 8]
    assert matrix.column("when.at").values.tolist() == [NOW_US + 1] * 2
    assert compile_service(service).request_time
    assert not compile_service(FeatureService("t", [view])).request_time


def test_request_columns_reach_the_function(rng: Random) -> None:
    """A request column of every type arrives as it was sent, and the sender's array is left alone."""
    view = view_of(Field("x", Float64))
    inputs = {f"r{i}": RequestColumn(f"r{i}", t) for i, t in enumerate(TYPES)}
    outputs = [Field(f"r{i}", t) for i, t in enumerate(TYPES)]
    values = ", ".join(f"'{name}': ({name}, valid['{name}'])" for name in inputs)
    echo = made(f"def echo({', '.join([*inputs, 'valid'])}):\n    return {{{values}}}", inputs, outputs, "pass")
    given = {f"r{i}": without_nat(random_column(rng, t, 9, null_share=0.3)) for i, t in enumerate(TYPES)}
    for name, col in given.items():
        if col.type.floating:  # a signalling NaN becomes a quiet one in a tensor of the other precision
            given[name] = Column(
                col.type, np.where(np.isnan(col.values), col.values.dtype.type(np.nan), col.values), None, col.valid
            )
    before = {name: col.values.tobytes() for name, col in given.items()}
    matrix = answer(FeatureService("s", [view, echo], dtype=Float64), {"x": column(Float64, [1.0] * 9)}, request=given)
    for name, col in given.items():
        found = matrix.column(f"echo.{name}")
        if col.type is Float32:  # served in the precision of the service
            assert found.type is Float64
            found = Column(Float32, found.values.astype(np.float32), None, found.valid)
        assert [c for c in cells_of(found) if c is not None] == [c for c in cells_of(col) if c is not None]
        assert found.null_count == col.null_count
        assert col.values.tobytes() == before[name]


def test_a_feature_only_a_transform_takes_is_not_served() -> None:
    """A service of outputs alone reads what they need, and answers with nothing else."""
    view = view_of(Field("x", Float64), Field("y", Float64))
    total = made("def total(x, y):\n    return x + y", {"x": view["x"], "y": view["y"]}, [Field("out", Float64)])
    matrix = answer(
        FeatureService("s", [total], dtype=Float64), {"x": column(Float64, [1.0]), "y": column(Float64, [2.0])}
    )
    assert matrix.to_dict() == {"total.out": [3.0]}
    assert (matrix.values.shape, matrix.view_status.tolist()) == ((1, 1), [[Status.PRESENT]])


# What a broken function does

BROKEN = {
    "raise KeyError('rate')": "transform f@1 failed: KeyError: 'rate'",
    "raise SystemExit('bye')": "transform f@1 failed: SystemExit: bye",
    "x[0] = 1\n    return x": "transform f@1 failed: ValueError: assignment destination is read-only",
    "return x.astype(np.float32)": r"returned float32 of shape (2,) for output 'out'; it declares float64: float64",
    "return x[:1]": "returned float64 of shape (1,) for output 'out'",
    "return x[:, None]": "returned float64 of shape (2, 1) for output 'out'",
    "return x.astype('>f8')": "returned >f8 of shape (2,) for output 'out'",
    "return None": "returned a NoneType; it declares output 'out', and returns its array",
    "return {'other': x}": "returned outputs ['other']; it declares ['out']",
    "return {1: x}": "returned outputs [1]; it declares ['out']",
    "return x, x": "returned float64 of shape (2,) as the mask of output 'out'",
    "return x, None, None": "returned a tuple for output 'out'",
    "return np.ma.masked_array(x, x > 0).tolist()": "returned a list",
}


@pytest.mark.parametrize("body", BROKEN)
def test_a_broken_answer_is_an_error_that_names_the_transform(body: str) -> None:
    """The request fails with what the function did, INTERNAL as it is not the caller's fault, and with no traceback."""
    transform = made(f"def f(x):\n    {body}", requests({"x": Float64}), [Field("out", Float64)])
    with pytest.raises(TransformError) as failed:
        calculate(transform, {"x": column(Float64, [1.0, 2.0])}, 2)
    assert BROKEN[body] in str(failed.value)
    assert (failed.value.metadata, failed.value.reason) == ({"transform": "f@1"}, "TRANSFORM_FAILED")
    assert code_of(failed.value) == 13


def test_an_answer_that_is_wrong_for_some_values_fails_then() -> None:
    """A dtype that depends on the data passes until it is wrong, and is an error of that request alone."""
    source = "def f(x):\n    return x if (x < 1e9).all() else x.astype(np.int64)"
    transform = made(source, requests({"x": Float64}), [Field("out", Float64)])
    assert calculate(transform, {"x": column(Float64, [1.0])}, 1)[0].to_list() == [1.0]
    with pytest.raises(TransformError, match=r"f@1 returned int64 of shape \(1,\)"):
        calculate(transform, {"x": column(Float64, [1e10])}, 1)
    assert calculate(transform, {"x": column(Float64, [2.0])}, 1)[0].to_list() == [2.0]


def test_bytes_that_are_none_are_refused_where_they_are() -> None:
    """Of an output of bytes each value is bytes, but where its mask says that there is none."""
    source = "def f(x):\n    values = np.array([b'a', None], object)\n    return values, x > 0"
    transform = made(source, requests({"x": Float64}), [Field("out", Bytes)])
    assert calculate(transform, {"x": column(Float64, [1.0, -1.0])}, 2)[0].to_list() == [b"a", None]
    with pytest.raises(TransformError, match="returned a NoneType in row 1 of output 'out', not bytes"):
        calculate(transform, {"x": column(Float64, [1.0, 1.0])}, 2)


def test_the_transform_of_a_chain_that_failed_is_named() -> None:
    """Of several transforms the error names the one that failed."""
    view = view_of(Field("x", Float64))
    first = made("def first(x):\n    return x", {"x": view["x"]}, [Field("out", Float64)])
    second = made("def second(x):\n    raise ValueError('no')", {"x": first["out"]}, [Field("out", Float64)])
    with pytest.raises(TransformError, match="transform second@1 failed: ValueError: no"):
        answer(FeatureService("s", [first, second]), {"x": column(Float64, [1.0])})


def test_each_transform_is_a_stage() -> None:
    """A watched request says how long each transform took."""
    view = view_of(Field("x", Float64))
    chain = [made("def t0(x):\n    return x", {"x": view["x"]}, [Field("out", Float64)])]
    for i in range(1, 3):
        given: dict[str, Outputs] = {"x": chain[-1]["out"]}
        chain.append(made(f"def t{i}(x):\n    return x", given, [Field("out", Float64)]))
    stages = Stages()
    run(compile_steps(chain), {"v.x": column(Float64, [1.0])}, 1, stages)
    stages.end()
    assert [stage.name for stage in stages.timed()] == [f"transform t{i}@1" for i in range(3)]
    assert all(a.start_ns <= b.start_ns for a, b in pairwise(stages.timed()))
