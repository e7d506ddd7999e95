"""Loading definition files: what is collected, what is refused, and that a load leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest

from featserve.catalog import Definitions
from featserve.config import Config, ProjectConfig
from featserve.definitions import Entity, FeatureView
from featserve.errors import DefinitionError
from featserve.project import load_definitions

IMPORTS = """\
from datetime import timedelta
from featserve.definitions import Entity, FeatureService, FeatureView, Field
from featserve.types import Float32, Int64, String
"""
WEATHER = IMPORTS + (
    'airport = Entity("airport", {"origin": String})\n'
    'weather = FeatureView("weather", airport, [Field("temp", Float32)], ttl=timedelta(hours=3))\n'
)
SERVICE = 'service = FeatureService("fraud", [weather])\n'


def load(folder: Path, *patterns: str, **files: str) -> Definitions:
    """Write ``files``, by name without ``.py``, into ``folder`` and load what ``patterns`` name."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    return load_definitions(Config(folder, ProjectConfig(patterns or ("features.py",))))


def test_module_level_definitions_are_collected(tmp_path: Path) -> None:
    """Entities, views and services in variables of the file are found, by name and version."""
    definitions = load(tmp_path, features=WEATHER + SERVICE)
    assert list(definitions.entities) == ["airport"]
    assert list(definitions.views) == ["weather@1"]
    assert list(definitions.services) == ["fraud@1"]
    assert definitions.services["fraud@1"].views[0] is definitions.views["weather@1"]


def test_what_a_definition_is_made_of_is_collected(tmp_path: Path) -> None:
    """A service brings its views, and a view its entity, although no variable holds them."""
    text = IMPORTS + dedent("""
        def make():
            airport = Entity("airport", {"origin": String})
            return FeatureService("fraud", [FeatureView("weather", airport, [Field("temp", Float32)], version=3)])
        service = make()
    """)
    definitions = load(tmp_path, features=text)
    assert (list(definitions.entities), list(definitions.views)) == (["airport"], ["weather@3"])


def test_lists_are_not_searched(tmp_path: Path) -> None:
    """Only the module's own variables count, and a file that has none says so."""
    text = WEATHER.replace("weather =", "views = [").rstrip() + "]\ndel airport\n"
    with pytest.raises(DefinitionError, match=r"features\.py: there is no definition \(entity, event source"):
        load(tmp_path, features=text)


def test_definitions_are_frozen(tmp_path: Path) -> None:
    """What was loaded cannot be changed."""
    definitions = load(tmp_path, features=WEATHER)
    with pytest.raises(TypeError):
        definitions.views["other@1"] = definitions.views["weather@1"]  # type: ignore[index]


def test_globs_and_order(tmp_path: Path) -> None:
    """Globs name several files, files may stand in folders, and a file named twice is run once."""
    definitions = load(
        tmp_path,
        "views/*.py",
        "features.py",
        "views/b.py",
        features=WEATHER,
        **{"views/a": IMPORTS + 'user = Entity("user", {"user_id": Int64})\n'},
        **{"views/b": IMPORTS + 'shop = Entity("shop", {"shop_id": Int64})\n'},
    )
    assert list(definitions.entities) == ["user", "shop", "airport"]


def test_an_absolute_file_and_one_that_is_no_identifier(tmp_path: Path) -> None:
    """A definition file may lie outside of the folder, and have any name that ends in .py."""
    project = tmp_path / "project"
    definitions = load(
        project,
        "my-features.v2.py",
        str(tmp_path / "shared" / "*.py"),
        "../shared/extra.py",
        **{"my-features.v2": WEATHER},
        **{"../shared/extra": IMPORTS + 'user = Entity("user", {"user_id": Int64})\n'},
    )
    assert list(definitions.entities) == ["airport", "user"]


@pytest.mark.parametrize("pattern", ["missing.py", "views/*.py", "../*/none.py"])
def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path, pattern: str) -> None:
    """A file that is not there is never silently left out."""
    with pytest.raises(DefinitionError, match=r"no file '.*' in "):
        load(tmp_path, "features.py", pattern, features=WEATHER)


def test_a_sibling_is_imported(tmp_path: Path) -> None:
    """A definition file imports modules and packages beside it, and several files share one sibling."""
    definitions = load(
        tmp_path,
        "features.py",
        "more.py",
        entities=IMPORTS + 'airport = Entity("airport", {"origin": String})\n',
        **{"shapes/__init__": "from .fields import TEMP\n"},
        **{"shapes/fields": IMPORTS + 'TEMP = Field("temp", Float32)\n'},
        features=IMPORTS + "from entities import airport\nfrom shapes import TEMP\n"
        'weather = FeatureView("weather", airport, [TEMP])\n',
        more=IMPORTS + "import entities\nfrom features import weather\n" + SERVICE,
    )
    assert definitions.views["weather@1"].entity is definitions.entities["airport"]
    assert definitions.services["fraud@1"].views[0] is definitions.views["weather@1"]


def test_an_edit_is_seen_by_the_next_load(tmp_path: Path) -> None:
    """Loading again reads the file and its siblings anew, even when size and second are the same."""
    sibling = "HOURS = {}\n"
    text = "from times import HOURS\n" + WEATHER.replace("hours=3", "hours=HOURS")
    for hours in (3, 4, 5):
        definitions = load(tmp_path, features=text, times=sibling.format(hours))
        assert definitions.views["weather@1"].ttl_us == hours * 3_600_000_000
    assert not (tmp_path / "__pycache__").exists()


def test_two_projects_do_not_mix(tmp_path: Path) -> None:
    """Two projects with files of the same names each get their own."""
    for name in ("one", "two", "one"):
        text = IMPORTS + f'from names import NAME\nassert NAME == "{name}"\nitem = Entity(NAME, {{"id": Int64}})\n'
        definitions = load(tmp_path / name, features=text, names=f'NAME = "{name}"\n')
        assert list(definitions.entities) == [name]


def test_the_interpreter_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load, good or bad, restores the path, the modules that it hid, and forgets its own."""
    other = type(sys)("siblings")
    monkeypatch.setitem(sys.modules, "siblings", other)
    before = set(sys.modules), list(sys.path), sys.dont_write_bytecode
    load(tmp_path, siblings="X = 1\n", features="import siblings\nassert siblings.X == 1\n" + WEATHER)
    with pytest.raises(DefinitionError):
        load(tmp_path, features="import siblings\nassert siblings.X == 2\n" + WEATHER)
    assert (set(sys.modules), sys.path, sys.dont_write_bytecode) == before
    assert sys.modules["siblings"] is other


def test_a_project_cannot_replace_featserve_or_the_standard_library(tmp_path: Path) -> None:
    """A file called like one of ours, or like a library module, is a definition file and no more."""
    definitions = load(tmp_path, "types.py", "featserve.py", types=WEATHER, featserve=WEATHER + SERVICE)
    assert isinstance(definitions.views["weather@1"], FeatureView)
    assert isinstance(definitions.entities["airport"], Entity)
    assert sys.modules["types"].__name__ == "types"


def test_dataclasses_work_in_a_definition_file(tmp_path: Path) -> None:
    """A definition file is a real module: what looks its module up by name finds it."""
    text = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
    assert load(tmp_path, features=text + WEATHER).views


def test_the_same_definition_twice_is_one(tmp_path: Path) -> None:
    """Equal definitions in two files are one definition, as is one under two variables."""
    definitions = load(tmp_path, "features.py", "copy.py", features=WEATHER + "again = weather\n", copy=WEATHER)
    assert list(definitions.views) == ["weather@1"]


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (("hours=3", "hours=4"), "feature view 'weather@1'.*ttl: 3:00:00 -> 4:00:00"),
        (("[Field", "description='x', features=[Field"), "feature view 'weather@1'.*description: '' -> 'x'"),
        (('{"origin": String}', '{"origin": Int64}'), "entity 'airport'.*keys: origin string -> origin int64"),
    ],
)
def test_two_definitions_under_one_name_are_refused(tmp_path: Path, edit: tuple[str, str], complaint: str) -> None:
    """Two different definitions of one name and version are an error that names both places and the difference."""
    with pytest.raises(DefinitionError, match=complaint) as caught:
        load(tmp_path, "features.py", "other.py", features=WEATHER, other=WEATHER.replace(*edit))
    assert "is defined twice, differently: features.py: " in str(caught.value)
    assert ", and other.py: " in str(caught.value)


def test_two_versions_stand_side_by_side(tmp_path: Path) -> None:
    """Another version is another definition."""
    second = 'second = FeatureView("weather", airport, [Field("wind", Float32)], version=2)\n'
    assert list(load(tmp_path, features=WEATHER + second).views) == ["weather@1", "weather@2"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 1\n1 / 0\n", r"^features\.py:2: ZeroDivisionError: division by zero$"),
        ("import no_such_module_here\n", r"^features\.py:1: ModuleNotFoundError: No module named 'no_such"),
        ("x = 1\nif x\n", r"^features\.py:2: SyntaxError: expected ':'"),
        ("raise SystemExit(3)\n", r"^features\.py:1: SystemExit: 3"),
        (IMPORTS + "\nField('Temp', Float32)\n", r"^features\.py:5: feature name 'Temp'"),
        ("def f():\n    raise ValueError('no')\n\nf()\n", r"^features\.py:2: ValueError: no"),
        ("import json\n\njson.loads('{')\n", r"^features\.py:3: JSONDecodeError"),
        ("import helper\n", r"^helper\.py:2: KeyError: 'x'"),
        ("import broken\n", r"^broken\.py:1: SyntaxError"),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    """A failing file is one line that names the file, the line of the project's own code, and the exception."""
    with pytest.raises(DefinitionError, match=complaint) as caught:
        load(tmp_path, features=text, helper="x = {}\nx['x']\n", broken="def\n")
    assert "Traceback" not in str(caught.value)


def test_a_file_that_is_no_python_is_refused(tmp_path: Path) -> None:
    """A definition file of another kind, or of bytes that are no text, is named."""
    (tmp_path / "features.json").write_text("{}")
    with pytest.raises(DefinitionError, match=r"features\.json: a definition file is Python"):
        load(tmp_path, "features.json")
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(DefinitionError, match=r"bytes\.py.*: SyntaxError"):
        load(tmp_path, "bytes.py")
