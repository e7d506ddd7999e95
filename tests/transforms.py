"""Projects whose definitions have transforms: written to a folder, and loaded as ``featserve apply`` loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from types import MappingProxyType
from typing import Literal

from featserve.catalog import Definitions
from featserve.config import Config, ProjectConfig
from featserve.definitions import Field, OnDemandTransform
from featserve.definitions.code import MAIN, Code
from featserve.definitions.transform import Input
from featserve.project import load_definitions

HEAD = """\
import numpy as np
from featserve import (
    Bool, Bytes, Entity, FeatureService, FeatureView, Field, Float32, Float64, Int32, Int64, RequestColumn,
    RequestTime, String, Timestamp, Vector, on_demand_transform,
)

user = Entity("user", {"user_id": Int64})
facts = FeatureView("facts", user, [
    Field("flag", Bool), Field("level", Int32), Field("count", Int64), Field("rate", Float32), Field("x", Float64),
    Field("y", Float64), Field("name", String), Field("token", Bytes), Field("seen", Timestamp),
    Field("taste", Vector(3)),
])
"""
TRANSFORM = '@on_demand_transform(inputs={"x": facts["x"]}, outputs=[Field("out", Float64)])\n'
"""Decorates a function of x, a float64, to one float64."""


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write Python files by their path without ``.py``."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(dedent(text))


def load(
    folder: Path, body: str, files: Mapping[str, str] = MappingProxyType({}), file: str = "features.py"
) -> Definitions:
    """Write a definitions file of HEAD and ``body``, and the modules ``files`` beside it, and load it."""
    write(folder, files)
    path = folder / file
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(HEAD + dedent(body))
    return load_definitions(Config(folder, ProjectConfig((file,))))


def load_one(
    folder: Path, body: str, files: Mapping[str, str] = MappingProxyType({}), file: str = "features.py"
) -> OnDemandTransform:
    """Load definitions with one transform, and return that."""
    (transform,) = load(folder, body, files, file).transforms.values()
    return transform


def made(
    source: str,
    inputs: Mapping[str, Input],
    outputs: Sequence[Field],
    nulls: Literal["strict", "pass"] = "strict",
    name: str | None = None,
) -> OnDemandTransform:
    """Return a transform of the first function in ``source``, as a registry would give it back; NumPy is imported."""
    entry = source.partition("def ")[2].partition("(")[0]
    code = Code(entry, {MAIN: "import numpy as np\n" + dedent(source)})
    return OnDemandTransform(name or entry, inputs, outputs, code, nulls=nulls)
