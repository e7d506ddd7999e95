"""The code of a function as text that runs without the files it came from.

Comes in: a function of a definitions file. Goes out: the source of what it needs, module by module: the function, and
the functions, classes, constants and imports of the project that it uses, directly or through others. Comments,
docstrings and annotations are left out, as they change no value. What comes from installed packages stays an import.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from featserve.errors import DefinitionError

Function = Callable[..., Any]
Definable = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
MAIN = "definitions"
"""What the function's own module is called in captured code."""


@dataclass(frozen=True)
class Code:
    """``entry``: the function's name in the module MAIN; ``modules``: the source of each by name."""

    entry: str
    modules: Mapping[str, str]

    @cached_property
    def function(self) -> Function:
        """The function, made from the captured source alone. Raises DefinitionError where that does not run."""
        made: dict[str, ModuleType] = {}

        def find(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
            if name not in self.modules:
                return builtins.__import__(name, globals, locals, fromlist, level)
            if name not in made:
                module = made[name] = ModuleType(name)
                vars(module)["__builtins__"] = vars(builtins) | {"__import__": find}
                exec(compile(self.modules[name], f"<{self.entry}: {name}>", "exec"), vars(module))
            return made[name]

        try:
            function: Function = getattr(find(MAIN), self.entry)
        except Exception as error:
            raise DefinitionError(
                f"transform {self.entry!r}: its code does not run: {error.__class__.__name__}: {error}"
            ) from error
        return function


def capture(function: Function) -> Code:
    """Return the code of a module-level function.

    Raises DefinitionError for a function without a source file (typed at a prompt), one that uses variables of an
    enclosing function, and one that uses a name which its module does not define at its top level.
    """
    name = getattr(function, "__name__", "?")
    what = f"transform {name!r}"
    if not inspect.isfunction(function) or name == "<lambda>":
        raise DefinitionError(f"{what}: a transform is a function made with def, not {function!r}")
    if function.__closure__:
        used = ", ".join(function.__code__.co_freevars)
        raise DefinitionError(f"{what} uses variables of an enclosing function ({used}); define them in the module")
    module = _Module.load(what, function.__module__, inspect.getsourcefile(function))
    modules = {MAIN: module}
    definition = module.find(name, function.__code__.co_firstlineno)
    if definition is None:
        raise DefinitionError(f"{what}: its source is not in {module.path}; has the file changed since it was loaded?")
    _Capture(what, modules).follow(module, definition)
    return Code(name, {key: found.text(definition) for key, found in modules.items()})


class _Module:
    """One source file of the project, and which of its statements are needed."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree
        self.needed: dict[ast.stmt, None] = {}
        self.imports: dict[str, None] = {}
        self.bound: dict[str, ast.stmt] = {}
        for statement in tree.body:
            for bound in _binds(statement):
                self.bound[bound] = statement

    @classmethod
    def load(cls, what: str, name: str, file: str | None) -> _Module:
        try:
            path = Path(file or "")
            return cls(name, path, ast.parse(path.read_text(encoding="utf-8")))
        except (OSError, SyntaxError) as error:
            raise DefinitionError(f"{what}: cannot read the source of module {name!r}: {error}") from None

    def find(self, name: str, line: int) -> ast.FunctionDef | None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first == line:
                    return node
        return None

    def text(self, entry: ast.stmt) -> str:
        """Return the needed statements in their order, the entry function without its decorators."""
        statements = sorted(self.needed, key=lambda node: node.lineno)
        return "\n".join([*self.imports, *(_bare(node, undecorated=node is entry) for node in statements)]) + "\n"


class _Capture:
    """Follows names from a statement to the statements that define them."""

    def __init__(self, what: str, modules: dict[str, _Module]) -> None:
        self._what, self._modules = what, modules
        self._home = modules[MAIN]

    def follow(self, module: _Module, statement: ast.stmt, entry: bool = True) -> None:
        if statement in module.needed:
            return
        module.needed[statement] = None
        node = _stripped(statement, undecorated=entry)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                self._import(module, inner, [alias.name for alias in inner.names], node, write=False)
        for name in _free_names(node):
            definition = module.bound.get(name)
            if isinstance(definition, ast.Import | ast.ImportFrom):
                self._import(module, definition, [name], node, write=True)
            elif definition is not None:
                self.follow(module, definition, entry=False)
            elif not hasattr(builtins, name):
                raise DefinitionError(
                    f"{self._what} uses {name!r}, which {module.path.name} does not define or import at its top level"
                )

    def _import(
        self,
        module: _Module,
        statement: ast.Import | ast.ImportFrom,
        names: Iterable[str],
        user: ast.AST,
        *,
        write: bool,
    ) -> None:
        """Take the imports of ``names``: follow those of the project's own modules."""
        for alias in statement.names:
            bound = alias.asname or (alias.name.partition(".")[0] if isinstance(statement, ast.Import) else alias.name)
            if write and bound not in names:
                continue
            suffix = f" as {alias.asname}" if alias.asname else ""
            if isinstance(statement, ast.Import):
                line, source, wanted = f"import {alias.name}{suffix}", alias.name, _attributes(user, bound)
            else:
                source = _absolute(statement, module.name)
                line, wanted = f"from {source} import {alias.name}{suffix}", [alias.name]
            if source == "__future__":
                continue
            if write:
                module.imports[line] = None
            found = self._project_module(source)
            for name in wanted if found is not None else ():
                assert found is not None
                definition = found.bound.get(name)
                if definition is None:
                    raise DefinitionError(
                        f"{self._what} uses {name!r} of {source}, which does not define it at its top level"
                    )
                if isinstance(definition, ast.Import | ast.ImportFrom):
                    self._import(found, definition, [name], user, write=True)
                else:
                    self.follow(found, definition, entry=False)

    def _project_module(self, name: str) -> _Module | None:
        """Return a module that lies beside or below the definitions file; None for an installed one."""
        if name in self._modules:
            return self._modules[name]
        loaded = sys.modules.get(name) or importlib.import_module(name)
        file = getattr(loaded, "__file__", None)
        folder = self._home.path.resolve().parent
        if file is None or not Path(file).resolve().is_relative_to(folder) or "site-packages" in Path(file).parts:
            return None
        self._modules[name] = _Module.load(self._what, name, file)
        return self._modules[name]


def _binds(statement: ast.stmt) -> list[str]:
    """Return the names that a top-level statement binds."""
    if isinstance(statement, Definable):
        return [statement.name]
    if isinstance(statement, ast.Import):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    return [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _free_names(node: ast.AST) -> list[str]:
    """Return the names that are read in ``node`` and bound nowhere in it, in order."""
    bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    bound |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    bound |= {n.name for n in ast.walk(node) if isinstance(n, Definable)}
    bound |= {n.name for n in ast.walk(node) if isinstance(n, ast.ExceptHandler) and n.name is not None}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import | ast.ImportFrom):
            bound.update(_binds(inner))
    read = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    return list(dict.fromkeys(name for name in read if name not in bound))


def _attributes(node: ast.AST, name: str) -> list[str]:
    """Return the attributes that ``node`` reads of the variable ``name``."""
    found = [
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name
    ]
    return list(dict.fromkeys(found))


def _absolute(statement: ast.ImportFrom, importer: str) -> str:
    if not statement.level:
        return statement.module or ""
    package = importer.split(".")[: -statement.level]
    return ".".join([*package, *([statement.module] if statement.module else [])])


class _Strip(ast.NodeTransformer):
    """Removes docstrings and annotations."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self._body(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._body(node)

    def _body(self, node: Any) -> ast.AST:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None or not isinstance(node.target, ast.Name):
            return self.generic_visit(node)
        return ast.Assign([node.target], self.visit(node.value), lineno=node.lineno)


def _stripped(statement: ast.stmt, *, undecorated: bool) -> ast.stmt:
    copy = ast.parse(ast.unparse(statement)).body[0]
    if undecorated and isinstance(copy, Definable):
        copy.decorator_list = []
    stripped: ast.stmt = ast.fix_missing_locations(_Strip().visit(copy))
    return stripped


def _bare(statement: ast.stmt, *, undecorated: bool) -> str:
    return ast.unparse(_stripped(statement, undecorated=undecorated))
