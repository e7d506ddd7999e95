"""The code of a function as text that runs without the files it came from.

Comes in: a function of a definitions file. Goes out: the source of what it needs, module by module: the function, and
the functions, classes, constants and imports of the project that it uses, directly or through others. Comments,
docstrings and annotations are left out, as they change no value. What comes from installed packages stays an import.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

from featserve.definitions.syntax import (
    Chain,
    Definable,
    Importer,
    Importing,
    aliases,
    bound,
    chains,
    changed,
    free_names,
    stripped,
)
from featserve.errors import DefinitionError

Function = Callable[..., Any]

MAIN = "__transform__"
"""What the function's own module is called in captured code, wherever it lies."""


@dataclass(frozen=True)
class Code:
    """``entry``: the function's name in the module MAIN; ``modules``: the source of each by name."""

    entry: str
    modules: Mapping[str, str]

    @cached_property
    def function(self) -> Function:
        """The function, made from the captured source alone. Raises DefinitionError where that does not run."""
        made: dict[str, ModuleType] = {}
        captured = {prefix for name in self.modules for prefix in _prefixes(name)}

        def load(name: str) -> ModuleType:
            """Return a module, with all that was captured below it; a package of which nothing was used is empty."""
            package, _, child = name.rpartition(".")
            if package:
                load(package)
            if name not in made:
                module = made[name] = ModuleType(name)
                vars(module)["__builtins__"] = vars(builtins) | {"__import__": find}
                text = self.modules.get(name, "")
                exec(compile(text, f"<{self.entry}: {name}>", "exec", dont_inherit=True), vars(module))
                if package:
                    setattr(made[package], child, module)
                for below in sorted(captured):
                    if below.startswith(f"{name}."):
                        load(below)
            return made[name]

        def find(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
            if name not in captured:
                return builtins.__import__(name, globals, locals, fromlist, level)
            for child in [f"{name}.{item}" for item in fromlist or ()]:
                if child in captured:
                    load(child)
            return load(name) if fromlist else load(name.partition(".")[0])

        try:
            function: Function = getattr(load(MAIN), self.entry)
        except (Exception, SystemExit) as error:
            raise DefinitionError(
                f"transform {self.entry!r}: its code does not run: {error.__class__.__name__}: {error}"
            ) from error
        return function


def capture(function: Function) -> Code:
    """Return the code of a function that a module defines at its top level.

    Raises DefinitionError that says what cannot be captured: a lambda, a function made within another or wrapped by
    another decorator, one typed at a prompt, or one that uses what no source file of the project defines by name.
    """
    name = getattr(function, "__name__", "?")
    what = f"transform {name!r}"
    if not inspect.isfunction(function) or name == "<lambda>":
        raise DefinitionError(f"{what}: a transform is a function made with def, not {function!r}")
    if hasattr(function, "__wrapped__"):
        raise DefinitionError(f"{what}: another decorator wraps it; call what that does from the function itself")
    if function.__closure__:
        used = ", ".join(function.__code__.co_freevars)
        raise DefinitionError(f"{what} uses variables of an enclosing function ({used}); define them in the module")
    module = _Module.load(what, function.__module__, inspect.getsourcefile(function))
    definition = module.find(name, function.__code__.co_firstlineno)
    if definition is None:
        raise DefinitionError(
            f"{what}: it is not defined at the top level of {module.path}, or that file changed since it was loaded"
        )
    modules = {MAIN: module}
    _Capture(what, module, modules).follow(module, definition, entry=True)
    return Code(name, {key: found.text() for key, found in modules.items() if found.needed or found.imports})


class _Module:
    """One source file of the project.

    ``bound``: for each name that it defines, the statements that define it or change its value. ``needed``: those that
    were taken, as they are captured; ``imports``: the lines of the imports that were.
    """

    def __init__(self, name: str, path: Path, body: list[ast.stmt]) -> None:
        self.path = path
        self.importer = Importer(name, path.name == "__init__.py" and not name.endswith("__init__"))
        self.body = [statement for statement in body if not _runs_as_a_script(statement)]
        self.needed: dict[ast.stmt, ast.stmt] = {}
        self.imports: dict[str, None] = {}
        self.bound: dict[str, list[ast.stmt]] = {}
        for statement in self.body:
            for name in bound(statement):
                self.bound.setdefault(name, []).append(statement)
        values = {
            name for name, held in self.bound.items() if not any(isinstance(s, Definable | Importing) for s in held)
        }
        for statement in self.body:
            for name in changed(statement) & values:
                if statement not in self.bound[name]:
                    self.bound[name].append(statement)

    @classmethod
    def load(cls, what: str, name: str, file: str | None) -> _Module:
        if file is None or not Path(file).is_file():
            raise DefinitionError(f"{what}: module {name!r} has no source file; define what it needs in a file")
        try:
            return cls(name, Path(file).resolve(), ast.parse(Path(file).read_bytes()).body)
        except (OSError, SyntaxError, ValueError) as error:
            raise DefinitionError(f"{what}: cannot read the source of module {name!r}: {error}") from None

    @property
    def root(self) -> Path:
        """The folder from which the module has its name."""
        return self.path.parents[self.importer.name.count(".") + self.importer.is_package]

    def find(self, name: str, line: int) -> ast.stmt | None:
        """Return the definition of the function whose first line, decorators included, is ``line``."""
        for node in self.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first == line:
                    return node
        return None

    def text(self) -> str:
        """Return the imports and the needed statements, these in their order."""
        statements = sorted(self.needed, key=lambda node: (node.lineno, node.col_offset))
        return "\n".join([*self.imports, *(ast.unparse(self.needed[node]) for node in statements)]) + "\n"


class _Capture:
    """Follows names from a statement to the statements that define them."""

    def __init__(self, what: str, home: _Module, modules: dict[str, _Module]) -> None:
        self._what, self._home, self._modules = what, home, modules

    def follow(self, module: _Module, statement: ast.stmt, *, entry: bool = False) -> None:
        """Take a statement and whatever it uses; the transform's own (``entry``) without its decorators."""
        if statement in module.needed:
            return
        if not entry:
            self._refuse_transform(module, statement)
        node = module.needed[statement] = stripped(statement, module.importer, undecorated=entry)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Global):
                raise DefinitionError(
                    f"{self._what} uses code that changes a variable of its module ({ast.unparse(inner)}); a transform "
                    "keeps nothing from one call to the next"
                )
        for alias in aliases(node, module.importer):
            for chain in chains(node, alias.bound):
                self._need(alias.module, (*alias.path, *chain[1:]))
        for name in free_names(node):
            if name not in module.bound and not hasattr(builtins, name):
                raise DefinitionError(
                    f"{self._what} uses {name!r}, which {module.path.name} does not define or import by name at its "
                    "top level"
                )
            for chain in chains(node, name) if name in module.bound else ():
                self._resolve(module, chain)

    def _refuse_transform(self, module: _Module, statement: ast.stmt) -> None:
        name = getattr(statement, "name", "")
        if isinstance(getattr(getattr(sys.modules.get(module.importer.name), name, None), "code", None), Code):
            raise DefinitionError(
                f"{self._what} uses {name!r}, which is a transform itself: take its output as an input, or move what "
                "they share into a function of its own"
            )

    def _resolve(self, module: _Module, chain: Chain) -> None:
        """Take all that defines or changes the first name of ``chain``, whose others are attributes of it."""
        for statement in module.bound[chain[0]]:
            for alias in aliases(statement, module.importer):
                if alias.bound == chain[0]:
                    found = self._need(alias.module, (*alias.path, *chain[1:]))
                    if isinstance(statement, Importing):
                        module.imports[f"import {found}" if alias.plain and found else alias.line] = None
            if not isinstance(statement, Importing):
                self.follow(module, statement)

    def _need(self, name: str, chain: Chain) -> str | None:
        """Take what ``chain`` names in a module; return the module that it leads to, None for an installed one."""
        module = self._project_module(name)
        if module is None:
            return None
        if not chain:
            raise DefinitionError(f"{self._what} uses the module {name!r} as a value; write what it takes from it")
        if chain[0] in module.bound:
            self._resolve(module, chain)
            return name
        below = f"{name}.{chain[0]}"
        if self._project_module(below) is None:
            raise DefinitionError(
                f"{self._what} uses {chain[0]!r} of {name}, which does not define or import it by name at its top level"
            )
        return self._need(below, chain[1:])

    def _project_module(self, name: str) -> _Module | None:
        """Return a module of the project; None for one that is installed, or is not there."""
        if name not in self._modules:
            file, place = _find(name)
            if place is None or _is_installed(name, place, self._home.root):
                return None
            self._modules[name] = (
                _Module.load(self._what, name, file) if file is not None else _Module(name, place / "__init__.py", [])
            )
        return self._modules[name]


def _runs_as_a_script(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def _find(name: str) -> tuple[str | None, Path | None]:
    """Return the source file of a module, and where it is; None for what has no file, or is in no place."""
    loaded = sys.modules.get(name)
    try:
        spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    except (ImportError, AttributeError, ValueError):
        return None, None
    file = getattr(loaded, "__file__", None) or (spec.origin if spec is not None and spec.has_location else None)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    place = file or (folders[0] if folders else None)
    return file, None if place is None else Path(place).resolve()


def _is_installed(name: str, place: Path, root: Path) -> bool:
    """Say whether a module comes with Python or with an installed package, rather than with the project at ``root``."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top == "featserve" or {"site-packages", "dist-packages"} & set(place.parts):
        return True
    return not place.is_relative_to(root) and top in packages_distributions()


def _prefixes(name: str) -> list[str]:
    """Return a dotted name and the packages that it is in, outermost first."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
