"""Capture of a transform's code: what is taken, what changes its hash, and what cannot be taken."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from featserve.definitions import Field, OnDemandTransform, RequestColumn, on_demand_transform
from featserve.definitions.code import MAIN, Code, capture
from featserve.errors import DefinitionError
from featserve.trial import check_transform
from featserve.types import Float64
from tests.captures import HELPERS, PROJECTS
from tests.transforms import TRANSFORM, load, load_one

X = np.array([1.0, 2.0])


def rebuilt(transform: OnDemandTransform) -> Code:
    """Return the code as a registry gives it back."""
    held = json.loads(json.dumps(transform.to_dict()))["code"]
    return Code(held["entry"], held["modules"])


@pytest.mark.parametrize("project", PROJECTS)
def test_captured_code_runs_without_its_files(project: str, tmp_path: Path) -> None:
    """Whatever of a project a function uses is captured, and runs when all of its files are gone."""
    body, files, expected = PROJECTS[project]
    folder = tmp_path / "project"
    transform = load_one(folder, body, files)
    shutil.rmtree(folder)
    before = set(sys.modules)
    found = rebuilt(transform).function(X)
    assert found.tolist() == expected
    check_transform(transform)
    names = {name.partition("/")[0] for name in files}
    assert not {name.partition(".")[0] for name in set(sys.modules) - before} & names


def test_only_what_is_used_is_captured(tmp_path: Path) -> None:
    """Other definitions, helpers that nothing calls and modules that nothing uses are not in the code."""
    body = f"import helpers, other\nfrom helpers import scale\n{TRANSFORM}def f(x):\n    return scale(x)"
    code = load_one(tmp_path, body, {"helpers": HELPERS, "other": "X = 1"}).code
    assert list(code.modules) == [MAIN, "helpers"]
    assert code.modules[MAIN] == "from helpers import scale\ndef f(x):\n    return scale(x)\n"
    assert "unused" not in code.modules["helpers"]


def test_the_captured_function_can_be_made_twice(tmp_path: Path) -> None:
    """Two copies of one code share no variable."""
    body = f"CALLS = []\n{TRANSFORM}def f(x):\n    CALLS.append(1)\n    return x * len(CALLS)"
    code = load_one(tmp_path, body).code
    first, second = (Code(code.entry, code.modules).function for _ in range(2))
    assert [first(X)[0], first(X)[0], second(X)[0]] == [1, 2, 1]


# Hashes

PLAIN = f"""
from helpers import scale
LIMIT = 5.0
{TRANSFORM}
def f(x):
    y = np.minimum(x, LIMIT)
    return scale(y)
"""
SAME = {
    "comments and blank lines": PLAIN.replace("    y =", "    # why\n\n    y ="),
    "docstrings": PLAIN.replace("    y =", '    """What it is."""\n    y ='),
    "annotations": PLAIN.replace("def f(x):", "def f(x: np.ndarray) -> np.ndarray:\n    y: np.ndarray").replace(
        "LIMIT = 5", "LIMIT: float = 5"
    ),
    "how it is written": PLAIN.replace("np.minimum(x, LIMIT)", "(np.minimum(x,\n        LIMIT ) )"),
    "a script below it": PLAIN + 'if __name__ == "__main__":\n    LIMIT = 6\n',
    "what it does not use": "OTHER = 1\nimport math\n" + PLAIN + "def g(x):\n    return LIMIT\n",
}
OTHER = {
    "the function": PLAIN.replace("minimum", "maximum"),
    "a constant": PLAIN.replace("LIMIT = 5.0", "LIMIT = 6.0"),
    "a constant, later": PLAIN + "LIMIT = 6.0\n",
    "a default": PLAIN.replace("scale(y)", "scale(y, 2)"),
    "where a helper comes from": PLAIN.replace("from helpers", "from others"),
}


def hash_of(folder: Path, body: str, helpers: str = HELPERS, file: str = "features.py") -> str:
    return load_one(folder, body, {"helpers": helpers, "others": HELPERS}, file).hash


@pytest.mark.parametrize("change", SAME)
def test_what_changes_no_value_changes_no_hash(change: str, tmp_path: Path) -> None:
    """Comments, docstrings, annotations, layout and unused code are not part of a transform's meaning."""
    assert hash_of(tmp_path / "a", PLAIN) == hash_of(tmp_path / "b", SAME[change])


@pytest.mark.parametrize("change", OTHER)
def test_what_changes_a_value_changes_the_hash(change: str, tmp_path: Path) -> None:
    """The code of the function and its constants are part of its meaning."""
    assert hash_of(tmp_path / "a", PLAIN) != hash_of(tmp_path / "b", OTHER[change])


@pytest.mark.parametrize("edit", [("SCALE = 10.0", "SCALE = 11.0"), ("return x * SCALE", "return SCALE * x")])
def test_a_helper_is_part_of_the_hash(edit: tuple[str, str], tmp_path: Path) -> None:
    """An edit of a helper's code, or of a constant that it uses, is another meaning; an unused helper's is not."""
    assert hash_of(tmp_path / "a", PLAIN) != hash_of(tmp_path / "b", PLAIN, HELPERS.replace(*edit))
    assert hash_of(tmp_path / "a", PLAIN) == hash_of(tmp_path / "b", PLAIN, HELPERS + "\n    unused_too = 1\n")


def test_the_place_of_a_file_is_not_part_of_the_hash(tmp_path: Path) -> None:
    """The definitions file may be called, and lie, where it likes."""
    files = ["features.py", "fraud.py", "teams/risk/fraud.py", "2024-defs/features.py"]
    hashes = {hash_of(tmp_path / str(i), PLAIN.replace("scale(y)", "y"), file=file) for i, file in enumerate(files)}
    assert len(hashes) == 1


# Refusals

REFUSED = {
    "a lambda": (
        'f = on_demand_transform(inputs={"x": facts["x"]}, outputs=[Field("o", Float64)])(lambda x: x)',
        "def",
    ),
    "a built-in": ('f = on_demand_transform(inputs={"x": facts["x"]}, outputs=[Field("o", Float64)])(np.sin)', "def"),
    "a closure": (
        f"def make(k):\n    {TRANSFORM}    def f(x):\n        return x * k\n    return f\ng = make(2)",
        r"variables of an enclosing function \(k\)",
    ),
    "a function within a function": (
        f"def make():\n    {TRANSFORM}    def f(x):\n        return x\n    return f\ng = make()",
        r"'f': it is not defined at the top level of .*features\.py",
    ),
    "a function within a loop": (
        f"for k in (1, 2):\n    {TRANSFORM}    def f(x):\n        return x * k",
        r"not defined at the top level",
    ),
    "another decorator below": (
        "import functools\ndef checked(g):\n    @functools.wraps(g)\n    def inner(x):\n        return g(x)\n"
        f"    return inner\n{TRANSFORM}@checked\ndef f(x):\n    return x",
        "another decorator wraps it",
    ),
    "an undefined name": (
        f"{TRANSFORM}def f(x):\n    return scael(x)",
        r"'f' uses 'scael', which features\.py does not define or import by name at its top level",
    ),
    "an undefined name of a helper": (
        f"from helpers import unused\n{TRANSFORM}def f(x):\n    return unused(x)",
        r"uses 'undefined_name', which helpers\.py does not define",
    ),
    "an undefined attribute of a module": (
        f"import helpers\n{TRANSFORM}def f(x):\n    return helpers.scael(x)",
        r"uses 'scael' of helpers, which does not define",
    ),
    "a star import": (f"from helpers import *\n{TRANSFORM}def f(x):\n    return scale(x)", "'scale'.*by name"),
    "a star import of a helper": (
        f"import lib\n{TRANSFORM}def f(x):\n    return lib.scale(x)",
        "uses 'scale' of lib, which does not define or import it by name",
    ),
    "a module as a value": (
        f"import helpers\n{TRANSFORM}def f(x):\n    return getattr(helpers, 'scale')(x)",
        "uses the module 'helpers' as a value",
    ),
    "another transform as a function": (
        f"{TRANSFORM}def g(x):\n    return x\n{TRANSFORM}def f(x):\n    return g(x)",
        "'f' uses 'g', which is a transform itself: take its output as an input",
    ),
    "a variable that is kept": (
        f"CALLS = 0\n{TRANSFORM}def f(x):\n    global CALLS\n    CALLS += 1\n    return x * CALLS",
        r"changes a variable of its module \(global CALLS\)",
    ),
    "the place of the file": (f"{TRANSFORM}def f(x):\n    return x * len(__file__)", "uses '__file__'"),
    "parameters that are no inputs": (
        f"{TRANSFORM}def f(z):\n    return z",
        "the function takes z, its declared inputs are x; they have the same names",
    ),
    "a parameter too many": (f"{TRANSFORM}def f(x, k=2):\n    return x * k", "the function takes x, k"),
    "any parameters": (f"{TRANSFORM}def f(**given):\n    return given['x']", "the function takes nothing"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_captured_is_refused(kind: str, tmp_path: Path) -> None:
    """Code that could not run without its files, or not the same each time, is refused with what is wrong with it."""
    body, message = REFUSED[kind]
    with pytest.raises(DefinitionError, match=message) as refused:
        load(tmp_path, body, {"helpers": HELPERS, "lib/__init__": "from helpers import *"})
    assert "features.py" in str(refused.value)


def test_a_function_typed_at_a_prompt_is_refused() -> None:
    """A function without a source file says so."""
    space: dict[str, object] = {"__name__": "__main__"}
    exec(compile("def f(x):\n    return x", "<stdin>", "exec"), space)
    with pytest.raises(DefinitionError, match="module '__main__' has no source file"):
        capture(space["f"])  # type: ignore[arg-type]


def test_a_file_that_changed_since_it_was_loaded_is_refused(tmp_path: Path) -> None:
    """What is captured is what was loaded: a function that is no longer where it was is not guessed at."""
    path = tmp_path / "late.py"
    path.write_text("\n\ndef f(x):\n    return x\n")
    space: dict[str, object] = {"__name__": "late"}
    exec(compile(path.read_text(), str(path), "exec"), space)
    path.write_text("def f(x):\n    return x\n")
    with pytest.raises(DefinitionError, match=r"or that file changed since it was loaded"):
        capture(space["f"])  # type: ignore[arg-type]
    path.write_bytes(b"\xff\xfe\x00def f(x")
    with pytest.raises(DefinitionError, match=r"cannot read the source of module 'late'"):
        capture(space["f"])  # type: ignore[arg-type]


def test_code_that_does_not_run_names_the_transform() -> None:
    """Captured code whose package is not installed here says which transform needs which."""
    code = Code("f", {MAIN: "import package_that_is_not_there\ndef f(x):\n    return x"})
    with pytest.raises(DefinitionError, match=r"transform 'f': its code does not run: .*package_that_is_not_there"):
        _ = code.function


def test_a_helper_outside_of_the_project_folder_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module on the path that no installed package brought is the project's, wherever it lies."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "geodesy.py").write_text("RADIUS = 6371.0\ndef arc(x):\n    return x * RADIUS\n")
    monkeypatch.syspath_prepend(str(tmp_path / "shared"))
    body = f"from geodesy import arc\n{TRANSFORM}def f(x):\n    return arc(x)"
    try:
        code = load_one(tmp_path / "project", body).code
    finally:
        sys.modules.pop("geodesy", None)
    assert code.modules["geodesy"] == "RADIUS = 6371.0\ndef arc(x):\n    return x * RADIUS\n"


def scaled(amount: np.ndarray) -> np.ndarray:
    return amount * 2


def test_a_function_of_an_imported_module_can_be_declared() -> None:
    """The decorator can be called on a function of any module that has a file."""
    declare = on_demand_transform(inputs={"amount": RequestColumn("amount", Float64)}, outputs=[Field("o", Float64)])
    transform = declare(scaled)
    assert transform.name == "scaled"
    assert dict(transform.code.modules) == {MAIN: "def scaled(amount):\n    return amount * 2\n"}
