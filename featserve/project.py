"""Load what a project's definition files declare.

Comes in: a project's settings. Goes out: ``Definitions``: the module-level entities, views and services of its files,
and those that they are made of. A load leaves no trace in the interpreter: the files, and the modules beside them that
they import, are read anew each time, so edits are seen and two projects do not mix. Knows no registry.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from featserve.catalog import KINDS, Definition, Definitions, Kind
from featserve.changes import differences
from featserve.config import Config
from featserve.errors import DefinitionError

_LOADING = threading.Lock()
"""Held while a load changes the interpreter's import state."""


def load_definitions(config: Config) -> Definitions:
    """Return what the project's definition files declare.

    Raises DefinitionError: a file that is missing or fails (naming the file, the line and the exception), two different
    definitions under one name and version, or no definition at all.
    """
    files = find_files(config)
    found: dict[Kind, dict[str, _Declared]] = {kind: {} for kind in KINDS}
    with _LOADING, _importing_from(config.folder):
        for file in files:
            for name, value in vars(_execute(file, config.folder)).items():
                _collect(found, value, f"{_shown(file, config.folder)}: {name}")
    declared: dict[str, Any] = {k.field: {id_: d.definition for id_, d in found[k].items()} for k in KINDS}
    definitions = Definitions(**declared)
    if not any(definitions.of(kind) for kind in KINDS):
        shown = ", ".join(_shown(file, config.folder) for file in files)
        kinds = ", ".join(kind.label for kind in KINDS)
        raise DefinitionError(f"{shown}: there is no definition ({kinds}) in a variable of the module itself")
    return definitions


def find_files(config: Config) -> list[Path]:
    """Return the definition files, in the order of ``[project] definitions``, each glob's sorted."""
    files: dict[Path, None] = {}
    for pattern in config.project.definitions:
        literal = (config.folder / pattern).resolve()
        matches = [literal] if literal.is_file() else sorted(p.resolve() for p in _glob(config.folder, pattern))
        if not matches:
            raise DefinitionError(
                f"no file {pattern!r} in {config.folder}: [project] definitions in featserve.toml names files or globs"
            )
        files |= dict.fromkeys(matches)
    return list(files)


def _glob(folder: Path, pattern: str) -> Iterator[Path]:
    anchor = Path(pattern).anchor
    try:
        yield from (p for p in Path(anchor or folder).glob(pattern.removeprefix(anchor)) if p.is_file())
    except ValueError as error:
        raise DefinitionError(f"[project] definitions: {pattern!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Declared:
    definition: Definition
    where: str


def _collect(found: Mapping[Kind, dict[str, _Declared]], value: object, where: str) -> None:
    """Add ``value``, if it is a definition, and what it is made of."""
    for kind in KINDS:
        if isinstance(value, kind.type):
            id_ = kind.id(value.name, kind.version(value))
            first = found[kind].setdefault(id_, _Declared(value, where))
            if first.definition.to_dict() != value.to_dict():
                changed = "; ".join(differences(first.definition.to_dict(), value.to_dict()))
                raise DefinitionError(
                    f"{kind.label} {id_!r} is defined twice, differently: {first.where}, and {where} ({changed})"
                )
            for part in kind.parts(value):
                _collect(found, part, where)


def _execute(file: Path, folder: Path) -> ModuleType:
    """Run a definition file as the module that a sibling would import, and return it."""
    name = _module_name(file, folder)
    loaded = sys.modules.get(name)
    if loaded is not None and _file_of(loaded) == file:  # a file before this one imported it
        return loaded
    if loaded is not None or name.partition(".")[0] not in _sibling_names(folder):
        name = f"_definitions_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise DefinitionError(f"{_shown(file, folder)}: a definition file is Python and ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a definition file may raise anything
        raise DefinitionError(_told(error, file, folder)) from None
    return module


def _module_name(file: Path, folder: Path) -> str:
    return ".".join(file.relative_to(folder).with_suffix("").parts) if file.is_relative_to(folder) else file.stem


def _told(error: BaseException, file: Path, folder: Path) -> str:
    """Return ``features.py:12: ValueError: …``: the deepest line of the project's own code, and what it raised."""
    names = _sibling_names(folder)
    path, line = file, 0
    if isinstance(error, SyntaxError) and error.filename:
        path, line = Path(error.filename), error.lineno or 0
    else:
        for frame, number in traceback.walk_tb(error.__traceback__):
            code = Path(frame.f_code.co_filename)
            if code == file or frame.f_globals.get("__name__", "").partition(".")[0] in names:
                path, line = code, number
    where = f"{_shown(path, folder)}:{line}" if line else _shown(path, folder)
    if isinstance(error, DefinitionError):
        return f"{where}: {error}"
    return f"{where}: {error.__class__.__name__}: {error.msg if isinstance(error, SyntaxError) else error}"


def _shown(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let imports find the modules in ``folder`` first, and forget them, and those that they hid, at the end."""
    names = _sibling_names(folder)
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
    path, modules, no_bytecode = list(sys.path), set(sys.modules) - set(hidden), sys.dont_write_bytecode
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    # Bytecode is known to be current by its second and size: an edit within that second would not be seen.
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.dont_write_bytecode = no_bytecode
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if name.partition(".")[0] in names or name.startswith("_definitions_"):
                del sys.modules[name]
        sys.modules.update(hidden)


def _sibling_names(folder: Path) -> set[str]:
    """Return the top-level modules in ``folder``; not featserve and the standard library, which stay as they are."""
    files = [file for pattern in ("*.py", "*/*.py", "*/*/*.py") for file in folder.glob(pattern)]
    names = {Path(file.relative_to(folder).parts[0]).stem for file in files}
    return {name for name in names if name.isidentifier()} - {"featserve", "__main__"} - sys.stdlib_module_names


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file) if file else None
