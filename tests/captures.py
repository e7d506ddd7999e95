"""Projects in all the ways in which a transform's function may use helpers, for the tests of its capture."""

from __future__ import annotations

import numpy as np

from tests.transforms import TRANSFORM

HELPERS = """
    SCALE = 10.0

    def scale(x):
        return _inner(x)

    def _inner(x):
        return x * SCALE

    def unused(x):
        import missing_module
        return undefined_name
"""

# What a project may look like: the body of the definitions file, the modules beside it, and the answer for 1 and 2.
PROJECTS: dict[str, tuple[str, dict[str, str], list[float]]] = {
    "a helper in the same file": (
        f"""
        def double(x):
            return x * 2
        {TRANSFORM}
        def f(x):
            return double(x)
        """,
        {},
        [2, 4],
    ),
    "a helper defined below its user": (
        f"""
        {TRANSFORM}
        def f(x):
            return double(x)
        def double(x):
            return two() * x
        def two():
            return 2
        """,
        {},
        [2, 4],
    ),
    "helpers that call each other": (
        f"""
        def even(n):
            return n == 0 or odd(n - 1)
        def odd(n):
            return n != 0 and even(n - 1)
        {TRANSFORM}
        def f(x):
            return x * even(4)
        """,
        {},
        [1, 2],
    ),
    "import of a module": (
        f"import helpers\n{TRANSFORM}def f(x):\n    return helpers.scale(x)",
        {"helpers": HELPERS},
        [10, 20],
    ),
    "import of a module by another name": (
        f"import helpers as h\n{TRANSFORM}def f(x):\n    return h.scale(x) + h.SCALE",
        {"helpers": HELPERS},
        [20, 30],
    ),
    "import from a module": (
        f"from helpers import scale\n{TRANSFORM}def f(x):\n    return scale(x)",
        {"helpers": HELPERS},
        [10, 20],
    ),
    "import from a module by another name": (
        f"from helpers import scale as times, SCALE as S\n{TRANSFORM}def f(x):\n    return times(x) + S",
        {"helpers": HELPERS},
        [20, 30],
    ),
    "import of a module in a folder": (
        f"import lib.helpers\n{TRANSFORM}def f(x):\n    return lib.helpers.scale(x)",
        {"lib/helpers": HELPERS},
        [10, 20],
    ),
    "imports of two modules of one folder": (
        f"import lib.a\nimport lib.b\n{TRANSFORM}def f(x):\n    return lib.a.one(x) + lib.b.two(x)",
        {"lib/a": "def one(x):\n    return x", "lib/b": "def two(x):\n    return 2 * x"},
        [3, 6],
    ),
    "import of a module in a folder by another name": (
        f"import lib.deep.helpers as h\n{TRANSFORM}def f(x):\n    return h.scale(x)",
        {"lib/deep/helpers": HELPERS},
        [10, 20],
    ),
    "import of a module from a package": (
        f"from lib import helpers\n{TRANSFORM}def f(x):\n    return helpers.scale(x)",
        {"lib/__init__": "raise_never = 1", "lib/helpers": HELPERS},
        [10, 20],
    ),
    "a name that a package passes on": (
        f"import lib\n{TRANSFORM}def f(x):\n    return lib.scale(x)",
        {"lib/__init__": "from lib.helpers import scale", "lib/helpers": HELPERS},
        [10, 20],
    ),
    "relative imports within a package": (
        f"from lib.a import one\n{TRANSFORM}def f(x):\n    return one(x)",
        {
            "lib/__init__": "",
            "lib/a": """
                from . import b
                from .deep import c as see
                from .deep.c import THREE
                def one(x):
                    from .deep.c import four
                    return b.two(x) + see.three(x) + THREE + four()
            """,
            "lib/b": "def two(x):\n    return 2 * x",
            "lib/deep/c": """
                from ..b import two
                THREE = 3
                def three(x):
                    return two(x) * THREE
                def four():
                    return 4
            """,
        },
        [15, 23],
    ),
    "imports inside of functions": (
        f"""
        {TRANSFORM}
        def f(x):
            import math
            import helpers
            from lib.helpers import SCALE as s
            return helpers.scale(x) + math.floor(1.5) + s
        """,
        {"helpers": HELPERS, "lib/helpers": "SCALE = 100.0"},
        [111, 121],
    ),
    "helpers of one name in two modules": (
        f"""
        from a import scale
        import b
        {TRANSFORM}
        def f(x):
            return scale(x) + b.scale(x) + _inner(x)
        def _inner(x):
            return 1000 * x
        """,
        {
            "a": "from b import scale as other\ndef scale(x):\n    return _inner(x)\ndef _inner(x):\n    return x",
            "b": "def scale(x):\n    return _inner(x)\ndef _inner(x):\n    return 100 * x",
        },
        [1101, 2202],
    ),
    "a helper module of the captured module's usual names": (
        f"import definitions, transform\n{TRANSFORM}def f(x):\n    return definitions.one(x) + transform.one(x)",
        {"definitions": "def one(x):\n    return x", "transform": "def one(x):\n    return x"},
        [2, 4],
    ),
    "constants, and what is done to them": (
        f"""
        FACTOR: float = 2.0
        FACTOR += 1
        TABLE = {{}}
        KEYS = ["a", "b"]
        for key in KEYS:
            TABLE[key] = len(TABLE) + 1.0
        TABLE["b"] = 5.0
        TABLE.update(c=7.0)
        SORTED = np.array([3.0, 1.0])
        SORTED.sort()
        if len(KEYS) > 1:
            OFFSET = 100.0
        else:
            OFFSET = 0.0
        LOW, (HIGH, *_) = 0.5, [0.25, 9]
        UNUSED = undefined_function()  if False else None
        {TRANSFORM}
        def f(x):
            return x * FACTOR + TABLE["a"] + TABLE["b"] + TABLE["c"] + SORTED[0] + OFFSET + LOW + HIGH
        """,
        {},
        [117.75, 120.75],
    ),
    "a constant of another module that is filled there": (
        f"from tables import TABLE\n{TRANSFORM}def f(x):\n    return x * TABLE['a']",
        {"tables": "TABLE = {'a': 1.0}\nfor k in list(TABLE):\n    TABLE[k] += 2.0"},
        [3, 6],
    ),
    "classes": (
        f"""
        from __future__ import annotations
        from dataclasses import dataclass
        from enum import Enum
        from typing import NamedTuple
        class Kind(Enum):
            FAST = 2.0
        class Pair(NamedTuple):
            '''A pair.'''
            a: float
            b: float = 3.0
        @dataclass(frozen=True)
        class Model(object):
            weight: float
            bias: float = 1.0
            def predict(self, x: np.ndarray) -> np.ndarray:
                '''Predict.'''
                return x * self.weight + self.bias + BONUS
        class Better(Model):
            def predict(self, x):
                return super().predict(x) + Pair(1.0).b
        BONUS = 10.0
        {TRANSFORM}
        def f(x):
            return Better(Kind.FAST.value).predict(x)
        """.replace("from __future__ import annotations", ""),
        {},
        [16, 18],
    ),
    "decorators of helpers": (
        f"""
        import functools
        def twice(function):
            @functools.wraps(function)
            def wrapped(*args):
                return 2 * function(*args)
            return wrapped
        @twice
        def shift(x):
            return x + OFFSET
        @functools.lru_cache
        def offset():
            return 1.0
        OFFSET = offset()
        {TRANSFORM}
        def f(x):
            return shift(x)
        """,
        {},
        [4, 6],
    ),
    "lambdas, comprehensions and defaults": (
        f"""
        WEIGHTS = [1.0, 2.0]
        START = 5.0
        add = lambda a, b=START: a + b
        {TRANSFORM}
        def f(x):
            scale = sum(w for w in WEIGHTS)
            return add(x) * scale + sum([(lambda v: v * w)(1.0) for w in WEIGHTS])
        """,
        {},
        [21, 24],
    ),
    "names that mean something else in an inner scope": (
        f"""
        def scale(x):
            return x * 10
        def apply(function, x):
            return function(x)
        {TRANSFORM}
        def f(x):
            def inner(scale):
                return scale + 1
            return apply(inner, scale(x)) + sum(scale for scale in [0.0])
        """,
        {},
        [11, 21],
    ),
    "an import that may fail": (
        f"""
        try:
            import package_that_is_not_there as extra
        except ImportError:
            extra = None
        {TRANSFORM}
        def f(x):
            return x if extra is None else extra.f(x)
        """,
        {},
        [1, 2],
    ),
    "a helper that uses a constant of the definitions file": (
        f"from helpers import scale\nRATE = 3.0\n{TRANSFORM}def f(x):\n    return scale(x) * RATE",
        {"helpers": "def scale(x):\n    from features import RATE\n    return x * RATE"},
        [9, 18],
    ),
    "code that only runs as a script": (
        f"""
        RATE = 2.0
        {TRANSFORM}
        def f(x):
            return x * RATE
        if __name__ == "__main__":
            RATE = undefined_name
        """,
        {},
        [2, 4],
    ),
    "installed packages": (
        f"import numpy.linalg\nfrom math import pi\n{TRANSFORM}"
        "def f(x):\n    return x * pi + numpy.linalg.norm([3., 4.])",
        {},
        [5 + np.pi, 5 + 2 * np.pi],
    ),
}
