"""The shape of the code, read from its syntax trees: sizes, layers, cycles, late imports, broad excepts and names.

Each test collects every breach and fails with all of them, as file:line, so that one run shows what to change.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE_LINES = 500
FUNCTION_LINES = 70

# From the bottom up. A module imports only from the lines before its own; the modules of one package (store, server)
# may also import one another.
LAYERS = (
    ("errors",),
    ("types", "config", "stages", "tls", "turns"),
    ("schema", "batch", "arrow", "aggregates"),
    ("definitions", "frames", "matrix"),
    ("codec", "catalog", "purity", "sources", "transform", "windows"),
    ("checks", "series"),
    ("folding",),
    ("finals",),
    ("records",),
    ("changes", "labels", "offline", "plan", "store", "trial", "wire"),
    ("push",),
    ("registry", "project", "engine"),
    ("training", "materialize"),
    ("backfill", "leakage"),
    ("client", "embedded", "server"),
    ("load_test",),
    ("featserve",),
    ("cli",),
    ("__main__",),
)
# The client talks to a server over the wire contract, and knows nothing of what is behind it.
CLIENT_MUST_NOT_IMPORT = {"engine", "store", "plan", "codec", "registry", "server"}
# Who may name the messages of the wire contract.
READS_PROTOS = ("wire", "server", "client", "load_test")
# Modules that open a backend or a dependency which need not be installed, and so import it when they do.
IMPORTS_LATE = {
    "featserve": "featserve.open and the definitions need the server's parts, the client does not",
    "featserve.__main__": "the command line needs the server's parts",
    "featserve.leakage": "matplotlib, when a plot is asked for",
    "featserve.load_test.plot": "matplotlib, when a plot is asked for",
    "featserve.matrix": "pandas and pyarrow, when a frame or a table is asked for",
    "featserve.store": "the backend that is opened",
    "featserve.offline": "the engine that is opened",
    "featserve.server.transport": "pygrpc-native, where the settings ask for it",
    "featserve.server.telemetry": "OpenTelemetry, where the settings ask for traces or metrics",
}
MAY_SWALLOW = re.compile(r"# .*\btop of a (background loop|request)$")
BANNED_MODULE = re.compile(r"^(utils?|helpers?|common|base(_.*)?)$")
BANNED_CLASS = re.compile(r"(Provider|Manager|Factory)$|^Base[A-Z]")


@dataclass(frozen=True)
class Module:
    """One source file. ``name`` is dotted, such as ``featserve.store.rocksdb``."""

    path: Path
    name: str
    text: str
    tree: ast.Module

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    late: bool


@cache
def modules(*tops: str) -> tuple[Module, ...]:
    """Read the sources under the folders that are named, without the generated ones."""
    found: list[Module] = []
    for top in tops:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if "_proto" not in parts:
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                text = path.read_text()
                found.append(Module(path, name, text, ast.parse(text)))
    return tuple(found)


def product() -> tuple[Module, ...]:
    return modules("featserve")


def everything() -> tuple[Module, ...]:
    return modules("featserve", "bench", "examples", "protos", "tests")


@cache
def imports(module: Module) -> tuple[Import, ...]:
    """Return what a module imports, wherever it stands; ``from featserve import errors`` counts as featserve.errors."""
    late = {id(node) for function in functions(module.tree) for node in ast.walk(function)}
    names = {other.name for other in product()} | {"featserve._proto"}
    found: list[Import] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.at(node.lineno)}: a relative import; write the whole name"
            origin = node.module or ""
            within = [f"{origin}.{alias.name}" for alias in node.names]
            targets = sorted({target if target in names else origin for target in within})
        else:
            continue
        found.extend(Import(target, node.lineno, id(node) in late) for target in targets)
    return tuple(found)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def part(name: str) -> str:
    """Return the layer's name for a module: ``store`` for featserve.store.rocksdb, ``featserve`` for the package."""
    return name.split(".")[1] if "." in name else name


def breaches(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def test_modules_are_short() -> None:
    """No source file reaches 500 lines."""
    sizes = {module: module.text.count("\n") for module in everything()}
    breaches([f"{module.at(size)}: {size} lines" for module, size in sizes.items() if size >= MODULE_LINES])


def test_functions_are_short() -> None:
    """No function reaches 70 lines."""
    found: list[str] = []
    for module in everything():
        for function in functions(module.tree):
            size = (function.end_lineno or function.lineno) - function.lineno + 1
            if size >= FUNCTION_LINES:
                found.append(f"{module.at(function.lineno)}: {function.name} has {size} lines")
    breaches(found)


def test_layers_run_one_way() -> None:
    """A module imports only from layers below its own, and every module has its place in the table."""
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    found: list[str] = []
    for module in product():
        mine = part(module.name)
        if mine not in level:
            found.append(f"{module.at(1)}: {mine} has no place in LAYERS; give it one")
            continue
        for imported in imports(module):
            other = part(imported.target)
            if not imported.target.startswith("featserve") or other in (mine, "_proto"):
                continue
            if level.get(other, -1) >= level[mine]:
                found.append(f"{module.at(imported.line)}: {mine} must not import {other}, which is not below it")
    breaches(found)


def test_client_knows_no_backend() -> None:
    """The client imports neither the engine, nor the store, nor anything else of the server's."""
    found: list[str] = []
    for module in product():
        for imported in imports(module):
            if part(module.name) == "client" and part(imported.target) in CLIENT_MUST_NOT_IMPORT:
                found.append(f"{module.at(imported.line)}: the client must not import {imported.target}")
    breaches(found)


def test_no_import_cycles() -> None:
    """No module imports itself by way of others."""
    names = {module.name for module in product()}
    graph = {
        module.name: {imported.target for imported in imports(module) if imported.target in names and not imported.late}
        for module in product()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        breaches([" <- ".join(error.args[1])])


def test_no_late_imports() -> None:
    """Only a module that opens an optional backend imports inside a function."""
    found: list[str] = []
    for module in modules("featserve", "bench", "examples"):
        for imported in imports(module):
            if imported.late and module.name not in IMPORTS_LATE:
                found.append(f"{module.at(imported.line)}: imports {imported.target} inside a function")
    breaches(found)


def test_protos_stay_at_the_edge() -> None:
    """Only the wire codec, the server and the client know the generated messages."""
    found: list[str] = []
    for module in product():
        for imported in imports(module):
            if imported.target.startswith("featserve._proto") and part(module.name) not in READS_PROTOS:
                found.append(f"{module.at(imported.line)}: {module.name} imports the generated messages")
    breaches(found)


def test_no_error_is_swallowed() -> None:
    """A broad except raises, or stands at the top of a background loop or of a request and says so."""
    found: list[str] = []
    for module in modules("featserve", "bench", "examples", "protos"):
        lines = module.text.splitlines()
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ExceptHandler) or not is_broad(node.type):
                continue
            if not isinstance(node.body[-1], ast.Raise) and not MAY_SWALLOW.search(lines[node.lineno - 1]):
                found.append(f"{module.at(node.lineno)}: a broad except that does not raise")
    breaches(found)


def is_broad(caught: ast.expr | None) -> bool:
    kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")) for kind in kinds
    )


def test_names_say_what_things_are() -> None:
    """No module is called utils or the like, no class Provider, Manager or Factory."""
    found: list[str] = []
    for module in everything():
        if any(BANNED_MODULE.match(word) for word in module.name.split(".")):
            found.append(f"{module.at(1)}: the name {module.name} says nothing")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and BANNED_CLASS.search(node.name):
                found.append(f"{module.at(node.lineno)}: the name {node.name} says nothing")
    breaches(found)
