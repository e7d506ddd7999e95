"""The trial of a transform at apply: what breaks the contract is refused, and what keeps it is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import numpy as np
import pytest

from featserve.catalog import Snapshot
from featserve.definitions import Entity, FeatureView, Field, OnDemandTransform, RequestColumn
from featserve.definitions.code import MAIN, Code
from featserve.errors import DefinitionError
from featserve.purity import named_outside
from featserve.registry import Registry
from featserve.trial import check_transform
from featserve.types import Bool, Bytes, Float32, Float64, Int32, Int64, String, Timestamp, Type, Vector
from tests.transforms import load

INPUTS = 'inputs={"x": facts["x"], "y": facts["y"], "name": facts["name"], "taste": facts["taste"]}'
PARAMETERS = "x, y, name, taste"
TYPES: dict[str, Type] = {
    "flag": Bool,
    "level": Int32,
    "count": Int64,
    "rate": Float32,
    "x": Float64,
    "y": Float64,
    "name": String,
    "token": Bytes,
    "seen": Timestamp,
    "taste": Vector(3),
}


def declared(function: str, above: str = "", *, outputs: str = 'Field("out", Float64)', nulls: str = "strict") -> str:
    """Return a definitions file's body: what stands above, and a transform ``bad`` whose function's body is given."""
    valid = ", valid" if nulls == "pass" else ""
    return (
        f'{above}\n@on_demand_transform({INPUTS}, outputs=[{outputs}], nulls="{nulls}")\n'
        f"def bad({PARAMETERS}{valid}):\n" + indent(function, "    ")
    )


# What a function may do wrong: the body of the file, and what the refusal says.
REFUSED: dict[str, tuple[str, str]] = {
    # It depends on its neighbours.
    "normalised by the mean": (declared("return (x - x.mean()) / x.std()"), "row depends on its neighbours"),
    "a running sum": (declared("return np.cumsum(x)"), "depends on its neighbours"),
    "sorted": (declared("return np.sort(x)"), "depends on its neighbours"),
    "a rank": (declared("return np.argsort(np.argsort(x)).astype(float)"), "depends on its neighbours"),
    "the row before": (declared("return x - np.roll(x, 1)"), "depends on its neighbours"),
    "the share of the greatest": (declared("return x / np.abs(x).max()"), "depends on its neighbours"),
    "the number of rows": (declared("return x + len(x)"), "depends on its neighbours"),
    "only in a large batch": (
        declared("return x if len(x) < 5000 else x.astype(np.float32).astype(float)"),
        r"in one of 8357",
    ),
    "text beside it": (
        declared("return np.full(len(x), name[0], np.dtypes.StringDType())", outputs='Field("out", String)'),
        "depends on its neighbours",
    ),
    "through a helper": (declared("return center(x)", "def center(x):\n    return x - np.median(x)"), "neighbours"),
    "in one of two outputs": (
        declared('return {"a": x, "b": x - x.min()}', outputs='Field("a", Float64), Field("b", Float64)'),
        "output 'b' of a row depends on its neighbours",
    ),
    "a null that its neighbours make": (
        declared("return x, np.full(len(x), valid['x'].all())", nulls="pass"),
        "depends on its neighbours",
    ),
    "the sign of zero": (declared("return x * 0.0 * (1 if len(x) > 1 else -1)"), "depends on its neighbours"),
    "a matrix product": (
        declared("return taste @ W", "W = np.array([0.1, 0.7, -0.3], np.float32)", outputs='Field("out", Float32)'),
        r"That is rounding: matrix products.*np\.vecdot, np\.einsum",
    ),
    "a mean over axis 0": (
        declared("return np.stack([x, y, x * y, x - y, x + y, x * x, y * y, x, y, x]).mean(axis=0)"),
        "sums over axis 0",
    ),
    # It is not as declared.
    "another dtype": (
        declared("return x.astype(np.float32)"),
        r"returned float32 of shape \(61,\) for output 'out'; it declares float64: float64 of shape \(61,\)",
    ),
    "integers for floats": (declared("return x > 0"), "returned bool of shape"),
    "fixed-width text": (
        declared("return np.where(x > 0, 'a', 'bc')", outputs='Field("out", String)'),
        r"returned <U2 of shape \(61,\) for output 'out'; it declares string: StringDType\(\)",
    ),
    "instants of another unit": (
        declared("return np.full(len(x), np.datetime64(0, 'ns'))", outputs='Field("out", Timestamp)'),
        r"returned datetime64\[ns\].*declares timestamp: datetime64\[us\]",
    ),
    "a row too few": (declared("return x[1:]"), r"returned float64 of shape \(60,\)"),
    "one value for all rows": (declared("return np.float64(1.0)"), "returned a float64; it declares output 'out'"),
    "a list": (declared("return x.tolist()"), "returned a list; it declares output 'out', and returns its array"),
    "nothing": (declared("x + 1"), "returned a NoneType; it declares output 'out'"),
    "a column instead of a row": (declared("return x[:, None]"), r"shape \(61, 1\)"),
    "a vector of another length": (
        declared("return taste[:, :2]", outputs='Field("out", Vector(3))'),
        r"float32 of shape \(61, 2\) for output 'out'; it declares vector\[3\]: float32 of shape \(61, 3\)",
    ),
    "other names": (
        declared('return {"a": x, "c": y}', outputs='Field("a", Float64), Field("b", Float64)'),
        r"returned outputs \['a', 'c'\]; it declares \['a', 'b'\]",
    ),
    "a name too many": (declared('return {"out": x, "more": y}'), r"returned outputs \['out', 'more'\]"),
    "an array for two outputs": (
        declared("return x", outputs='Field("a", Float64), Field("b", Float64)'),
        "it declares 2 outputs, and returns a mapping of their arrays by name",
    ),
    "a mask of another length": (declared("return x, np.ones(3, bool)"), r"returned bool of shape \(3,\) as the mask"),
    "a mask of numbers": (declared("return x, np.ones(len(x))"), "as the mask of output 'out'"),
    "text for bytes": (
        declared("return np.array(['a'] * len(x), object)", outputs='Field("out", Bytes)'),
        "returned a str in row 0 of output 'out', not bytes",
    ),
    "something else only beside nulls": (
        declared("return x if valid['x'].all() else x.astype(np.float32)", nulls="pass"),
        "on generated rows with nulls, transform bad@1 returned float32",
    ),
    # It raises.
    "it raises": (declared("raise ValueError('no such rate')"), "bad@1 failed: ValueError: no such rate"),
    "it raises in a helper": (declared("return f(x)", "def f(x):\n    return x['a']"), "failed: IndexError"),
    # It changes its inputs.
    "it adds to its input": (declared("x += 1\nreturn x"), "failed: ValueError: .*read-only"),
    "it fills its input": (declared("x[x < 0] = 0\nreturn x"), "failed: ValueError: .*read-only"),
    "it changes a view of a vector": (declared("taste[:, 0] = 0\nreturn x"), "failed: ValueError: .*read-only"),
    "it lifts the protection": (declared("x.setflags(write=True)\nx += 1\nreturn x"), "it changes its inputs"),
    "it changes what is below": (declared("x.base[:] = 1.0\nreturn x"), "it changes its inputs"),
    # It reads the clock.
    "time.time": (declared("return x + time.time()", "import time"), r"it reads the clock \(time\.time\)"),
    "time of another name": (
        declared("return x * (now() > 0)", "from time import time_ns as now"),
        r"reads the clock \(time\.time_ns\)",
    ),
    "datetime.now": (
        declared("return x * datetime.now().year", "from datetime import datetime"),
        r"reads the clock \(datetime\.datetime\.now\)",
    ),
    "date.today": (declared("return x * dt.date.today().year", "import datetime as dt"), "reads the clock"),
    "a clock by hook": (
        declared("return x * getattr(dt.datetime, 'utc' + 'now')().year", "import datetime as dt"),
        r"reads the clock \(datetime\.utcnow\)",
    ),
    "datetime64 now": (
        declared('return (np.datetime64("now") - np.datetime64(0, "s")).astype(float) * x'),
        r"reads the clock \(datetime64\('now'\)\)",
    ),
    "datetime64 of an array": (
        declared('return np.array(["Today"], dtype="M8[D]").astype(float) * x'),
        r"reads the clock \(datetime64\('Today'\)\)",
    ),
    "the clock in a helper": (
        declared(
            "return age(x)",
            "import time\ndef age(x):\n    return later(x)\ndef later(x):\n    return x - clock()\n"
            "def clock():\n    return time.monotonic() // 1e9",
        ),
        r"reads the clock \(time\.monotonic\)",
    ),
    "the clock where no row leads": (
        declared("return x if (x < 1e300).all() else x * time.time()", "import time"),
        r"reads the clock \(time\.time\)",
    ),
    "the clock when it is loaded": (
        declared("return x + START", "import time\nSTART = time.time() // 1e9"),
        r"reads the clock \(time\.time\)",
    ),
    # It draws random numbers.
    "random": (declared("return x + random.random()", "import random"), r"draws random numbers \(random\.random\)"),
    "random by name": (declared("return x + uniform(0, 1)", "from random import uniform"), "draws random numbers"),
    "numpy.random": (
        declared("return x + np.random.rand(len(x))"),
        r"draws random numbers \(numpy\.random\.rand\)",
    ),
    "a generator": (
        declared("return x + RNG.normal(size=len(x)) * 0", "RNG = np.random.default_rng(1)"),
        r"draws random numbers \(numpy\.random\.default_rng\)",
    ),
    "a generator by name": (
        declared("return x + Generator(PCG64(1)).normal()", "from numpy.random import PCG64, Generator"),
        "draws random numbers",
    ),
    "uuid": (declared("return x + uuid.uuid4().int % 2", "import uuid"), "draws random numbers"),
    # It uses what is outside.
    "open": (
        declared("return x * len(open('features.py').read())"),
        r"it uses files \(builtins\.open\)",
    ),
    "pathlib": (
        declared("return x * len(Path('features.py').read_text())", "from pathlib import Path"),
        r"uses files \(pathlib\.Path\)",
    ),
    "np.load": (
        declared("return x * np.load('table.npy')[0]"),
        r"uses files \(_?io\.open\)",
    ),
    "np.fromfile": (declared("return x * np.fromfile('table.npy')[-1]"), r"uses files \(numpy\.fromfile\)"),
    "a file when it is loaded": (
        declared("return x * TABLE[0]", "TABLE = np.load('table.npy')"),
        r"uses files \(_?io\.open\)",
    ),
    "the environment": (
        declared("return x * len(os.environ.get('HOME', ''))", "import os"),
        r"uses the operating system \(os\.environ\.get\)",
    ),
    "a module by its name": (
        declared("return importlib.import_module('math').pi * x", "import importlib"),
        "imports modules by their name",
    ),
    "hash of text": (
        declared("return np.array([hash(n) % 7 for n in name.tolist()], float)"),
        r"uses hash\(\), whose answer for text is another in each process",
    ),
    # It remembers.
    "a counter": (
        declared("SEEN.append(1)\nreturn x + len(SEEN)", "SEEN = []"),
        "depends on its neighbours|gave two answers",
    ),
    "a default that grows": (
        declared("return x + grow()", "def grow(seen=[]):\n    seen.append(1)\n    return len(seen) > 1"),
        "depends on its neighbours|gave two answers",
    ),
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Open one registry for all refusals: each leaves it empty."""
    with Registry.open(f"sqlite:///{tmp_path_factory.mktemp('registry') / 'registry.db'}") as registry:
        yield registry


@pytest.mark.parametrize("kind", REFUSED)
def test_a_broken_contract_is_refused(
    kind: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apply names the transform, says what is wrong with it, and writes nothing at all."""
    body, message = REFUSED[kind]
    np.save(tmp_path / "table.npy", np.ones(3))
    monkeypatch.chdir(tmp_path)
    definitions = load(tmp_path, body + '\nservice = FeatureService("s", [facts, bad])')
    with pytest.raises(DefinitionError, match=message) as refused:
        registry.apply(definitions, "ann", 0)
    assert str(refused.value).startswith("transform bad@1 is refused: ")
    assert (registry.snapshot(), registry.history()) == (Snapshot(), [])


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import pandas as pd\ndef f(x):\n    return pd.Timestamp.now()", ["reads the clock (pandas.Timestamp.now)"]),
        ("import os.path\ndef f(x):\n    return os.path.join('a', 'b')", []),
        ("from urllib.parse import quote\ndef f(x):\n    return quote(x)", []),
        (
            "import requests as r, http.client\ndef f(x):\n    return http.client.OK",
            ["uses the network (http.client.OK)"],
        ),
        ("def f(kind):\n    return kind == 'now'", []),
        ("def now(x):\n    return x\ndef f(x):\n    return now(x)", []),
        ("def f(x):\n    return x.astype('M8[us]') > WHEN\nWHEN = 'today'", []),
        ("def f(x):\n    open = x\n    return open", []),
        ("import io, uuid\ndef f(x):\n    return uuid.uuid5(uuid.NAMESPACE_DNS, io.StringIO('a').read())", []),
        ("from datetime import datetime, timedelta\ndef f(x):\n    return datetime(2020, 1, 1) + timedelta(1)", []),
        ("def hash(x):\n    return x\ndef f(x):\n    return hash(x)", []),
    ],
)
def test_what_code_names_of_the_outside(source: str, told: list[str]) -> None:
    """Clocks, chance and files are found by what they are, and not by words that only sound like them."""
    assert named_outside(Code("f", {MAIN: source})) == told


# Honest functions: an expression of the inputs, and the type of what it gives.
STRINGS = "np.dtypes.StringDType()"
HONEST: list[tuple[str, Type]] = [
    *((f"np.{f}(x)", Float64) for f in ("sin", "cos", "tan", "arctan", "sinh", "tanh", "exp", "expm1", "exp2", "cbrt")),
    *((f"np.{f}(np.abs(x))", Float64) for f in ("log", "log2", "log10", "log1p", "sqrt", "spacing", "arcsinh")),
    *((f"np.{f}(x / 1e4)", Float64) for f in ("arcsin", "arccos", "arctanh")),
    *((f"np.{f}(rate)", Float32) for f in ("sin", "cos", "tan", "exp", "tanh", "floor", "rint", "sign", "square")),
    *((f"np.{f}(np.abs(rate))", Float32) for f in ("log", "log1p", "sqrt", "reciprocal")),
    *((f"np.{f}(x, y)", Float64) for f in ("arctan2", "hypot", "floor_divide", "fmod", "remainder", "copysign")),
    *((f"np.{f}(x, y)", Float64) for f in ("add", "divide", "maximum", "fmin", "logaddexp", "nextafter", "heaviside")),
    ("np.power(np.abs(x), 0.37)", Float64),
    ("np.abs(rate) ** rate", Float32),
    ("np.float_power(np.abs(x), y / 1e4)", Float64),
    ("np.where(x > y, x, y)", Float64),
    ("np.clip(x, -1.0, 1.0)", Float64),
    ("np.select([x > 1, y > 1], [x, y], 0.0)", Float64),
    ("np.nan_to_num(x / (y - y), nan=-1.0)", Float64),
    ("np.round(x, 2)", Float64),
    ("x / y", Float64),
    ("1 / (1 + np.exp(-x))", Float64),
    ("np.interp(x, [-1.0, 0.0, 2.0], [5.0, 6.0, 9.0])", Float64),
    ("np.polyval([1.0, -2.0, 3.0], x)", Float64),
    ("np.piecewise(x, [x < 0, x >= 0], [lambda v: -v, lambda v: v * v])", Float64),
    ("np.searchsorted(np.array([-1.0, 0.0, 5.0]), x)", Int64),
    ("np.digitize(x, [0.0, 1.0])", Int64),
    ("np.isin(level, [1, 2, 3])", Bool),
    ("np.isfinite(x) & flag", Bool),
    ("np.logical_xor(flag, x > 0)", Bool),
    ("level // 7 + level % 3", Int32),
    ("np.bitwise_and(count, 255) << 3", Int64),
    ("np.gcd(count, 12)", Int64),
    ("(count * 2654435761) % 1024", Int64),
    ("x.astype(np.float32)", Float32),
    ("x.astype(np.int32)", Int32),
    # Text and bytes.
    ("np.strings.upper(name)", String),
    ("np.strings.add(name, '!')", String),
    ("np.strings.strip(name)", String),
    ("np.strings.replace(name, 'a', 'é')", String),
    ("np.strings.str_len(name)", Int64),
    ("np.strings.startswith(name, 'J')", Bool),
    ("np.strings.find(name, 'e')", Int64),
    ("name == 'JFK'", Bool),
    (f"np.where(x > 0, 'up', 'down').astype({STRINGS})", String),
    (f"np.array([n[::-1] for n in name.tolist()], {STRINGS})", String),
    ("np.isin(name, ['JFK', 'LGA'])", Bool),
    ("np.array([crc32(n.encode()) % 100 for n in name.tolist()], np.int64)", Int64),
    ("np.array([len(t) for t in token], np.int64)", Int64),
    ("np.array([t + b'!' for t in token] + [None], object)[:-1]", Bytes),
    # Instants.
    ("seen + np.timedelta64(90, 'm')", Timestamp),
    ("seen.astype('M8[D]').astype('M8[us]')", Timestamp),
    ("(seen - np.datetime64('2020-01-01')) / np.timedelta64(1, 'h')", Float64),
    ("(seen.astype('M8[h]').astype(np.int64) % 24).astype(np.int32)", Int32),
    ("(seen.astype('M8[D]').astype(np.int64) + 3) % 7", Int64),
    ("np.is_busday(seen.astype('M8[D]'))", Bool),
    ("seen > np.datetime64('2001-09-09T01:46:40')", Bool),
    ("np.where(x > 0, seen, np.datetime64('NaT', 'us'))", Timestamp),
    ("np.array([local(t) for t in seen.astype(np.int64).tolist()], np.int32)", Int32),
    # Vectors.
    ("np.linalg.norm(taste, axis=1)", Float32),
    ("np.exp(taste[:, 0]) + np.log1p(np.abs(taste[:, 1]))", Float32),
    ("taste.sum(axis=1)", Float32),
    ("taste.mean(axis=1, dtype=np.float64)", Float64),
    ("taste.std(axis=1)", Float32),
    ("np.median(taste, axis=1)", Float32),
    ("taste.max(axis=1) - taste.min(axis=1)", Float32),
    ("taste / np.linalg.norm(taste, axis=1, keepdims=True)", Vector(3)),
    ("softmax(taste)", Vector(3)),
    ("np.vecdot(taste, W)", Float32),
    ("np.einsum('ij,ij->i', taste, taste)", Float32),
    ("np.einsum('ij,jk->ik', taste, M)", Vector(3)),
    ("(taste[:, None, :] @ M)[:, 0, :]", Vector(3)),
    ("(taste * W).sum(axis=1)", Float32),
    ("np.stack([x, y, x * y], axis=1).astype(np.float32)", Vector(3)),
    ("np.stack([x, y, x - y] * 5, axis=-1).mean(axis=-1)", Float64),
    ("taste.argmax(axis=1)", Int64),
    ("np.take_along_axis(taste, np.argsort(taste, axis=1), axis=1)", Vector(3)),
    ("np.cumsum(taste, axis=1)", Vector(3)),
]
AROUND = """
import numpy as np
from datetime import datetime, timedelta, timezone
from zlib import crc32
from zoneinfo import ZoneInfo
NEW_YORK = ZoneInfo("America/New_York")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
W = np.array([0.1, 0.7, -0.3], np.float32)
M = np.array([[0.1, 0.2, 0.3], [0.7, -0.1, 0.5], [0.9, 0.4, 0.6]], np.float32)
def local(us):
    return (EPOCH + timedelta(microseconds=us)).astimezone(NEW_YORK).hour
def softmax(v):
    e = np.exp(v - v.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
"""


def transform_of(expression: str, type: Type) -> OnDemandTransform:
    """Return a transform of an expression of some inputs, which can be of every type."""
    inputs = {name: RequestColumn(name, TYPES[name]) for name in TYPES if re.search(rf"\b{name}\b", expression)}
    text = f"{AROUND}\ndef honest({', '.join(inputs)}):\n    return {expression}\n"
    return OnDemandTransform("honest", inputs, [Field("out", type)], Code("honest", {MAIN: text}))


@pytest.mark.parametrize(("expression", "type"), HONEST, ids=[expression for expression, _ in HONEST])
def test_an_honest_function_is_not_refused(expression: str, type: Type) -> None:
    """NumPy functions of a row give the same bits in every batch, so none of them is refused."""
    check_transform(transform_of(expression, type))


@pytest.mark.parametrize("bounds", [{"min": 5000}, {"max": -5000}, {"min": 10, "max": 12}, {"min": 2**62}])
def test_generated_rows_keep_the_constraints(bounds: dict[str, int]) -> None:
    """A function may rely on what its inputs declare: a generated row never breaks it."""
    fields = [Field("a", Int64, **bounds), Field("b", Float64, **{k: float(v) for k, v in bounds.items()})]  # type: ignore[arg-type]
    fields += [Field("c", String, allowed=["red", "blue"]), Field("d", Int32, not_null=True)]
    low, high = bounds.get("min", -(2**63)), bounds.get("max", 2**63 - 1)
    checks = f"assert a.min() >= {low} and a.max() <= {high} and b.min() >= {low} and b.max() <= {high}"
    text = f"import numpy as np\ndef f(a, b, c, d):\n    {checks}\n    assert np.isin(c, ['red', 'blue']).all()\n"
    code = Code("f", {MAIN: text + "    return b - d\n"})
    view = FeatureView("v", Entity("user", {"user_id": Int64}), fields)
    check_transform(OnDemandTransform("f", {f.name: view[f.name] for f in fields}, [Field("o", Float64)], code))
    normalised = Code("f", {MAIN: "def f(b):\n    return b - b.mean()\n"})
    with pytest.raises(DefinitionError, match="neighbours"):
        check_transform(OnDemandTransform("f", {"b": view["b"]}, [Field("o", Float64)], normalised))


UFUNCS = [name for name in dir(np) if isinstance(getattr(np, name), np.ufunc) and not getattr(np, name).signature]
SIGNED_ZEROS = ("fmax", "fmin")
"""Of 0.0 and -0.0 they give either, as it happens to fall in a vector of the processor."""


@pytest.mark.parametrize("name", [name for name in UFUNCS if name not in SIGNED_ZEROS])
def test_a_ufunc_gives_the_same_bits_in_every_batch(name: str, rng: np.random.Generator) -> None:
    """What NumPy computes of a row does not depend on how many others are computed with it, to the last bit."""
    function, rows = getattr(np, name), 203
    for dtype in "?", "<i4", "<i8", "<f4", "<f8":
        given = [values_of(rng, dtype, rows) for _ in range(function.nin)]
        if dtype[1:2] == "i" and len(given) == 2:
            given[1] = np.abs(given[1]) % 20  # no negative powers and shifts
        with np.errstate(all="ignore"):
            try:
                whole = bits_of(function(*given))
            except TypeError:  # it has no loop for this type
                continue
            for size in 1, 2, 7, 32:
                parts = [bits_of(function(*(a[i : i + size].copy() for a in given))) for i in range(0, rows, size)]
                for found, *others in zip(whole, *parts, strict=True):
                    assert (np.concatenate(others) == found).all(), f"{name} of {dtype}, {size} at a time"


@pytest.mark.parametrize("name", SIGNED_ZEROS)
def test_a_ufunc_that_does_not_differs_in_the_sign_of_zero(name: str) -> None:
    """The two ufuncs whose bits depend on the batch do so for zeros of both signs, and give zeros."""
    zeros, rows = np.array([0.0, -0.0], np.float32), 61
    given = zeros[np.arange(rows) % 2], zeros[np.arange(rows) // 2 % 2]
    whole = getattr(np, name)(*given)
    parts = [getattr(np, name)(*(a[i : i + 1] for a in given)) for i in range(rows)]
    assert np.concatenate(parts).tolist() == whole.tolist() == [0.0] * rows


def values_of(rng: np.random.Generator, dtype: str, rows: int) -> np.ndarray:
    """Return numbers of every size, zeros, infinities and NaNs."""
    if dtype == "?":
        return rng.random(rows) < 0.5
    if dtype[1] == "i":
        return rng.integers(-1000, 1000, rows).astype(dtype)
    values = rng.normal(size=rows) * 10.0 ** rng.integers(-30, 30, rows)
    return np.where(
        rng.random(rows) < 0.2, rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-310], rows), values
    ).astype(dtype)


def bits_of(answer: np.ndarray | tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Return each output as bits, which NaN and -0.0 cannot fool."""
    return [out.view(f"V{out.itemsize}") for out in (answer if isinstance(answer, tuple) else (answer,))]
