"""What the statements of a Python module define, change, import and read, told from their syntax alone.

Comes in: parsed statements. Goes out: names, and statements without what changes no value. Runs and imports nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from symtable import SymbolTable, symtable
from typing import Any

Definable = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Importing = ast.Import | ast.ImportFrom
Chain = tuple[str, ...]
"""A name and the attributes that are read of it: ``helpers.geo.distance`` as three parts."""


@dataclass(frozen=True, slots=True)
class Importer:
    """The module that statements stand in: its full name, and whether it is a package's own ``__init__``."""

    name: str
    is_package: bool

    def absolute(self, statement: ast.ImportFrom) -> str:
        """Return the full name of the module that ``statement`` imports from."""
        if not statement.level:
            return statement.module or ""
        parts = self.name.split(".")
        package = parts[: len(parts) - statement.level + self.is_package]
        return ".".join([*package, *filter(None, [statement.module])])


@dataclass(frozen=True, slots=True)
class Alias:
    """One name that an import binds: to a module, or to what ``path`` names in it.

    ``line``: the import of it alone. ``plain``: of ``import a.b`` that binds a, and through it what is below.
    """

    bound: str
    module: str
    path: Chain
    line: str
    plain: bool = False


def aliases(statement: ast.stmt, importer: Importer) -> Iterator[Alias]:
    """Yield what the imports in a statement bind."""
    for node in ast.walk(statement):
        for alias in node.names if isinstance(node, Importing) else ():
            line = f"import {alias.name} as {alias.asname}" if alias.asname else f"import {alias.name}"
            if isinstance(node, ast.ImportFrom):
                source = importer.absolute(node)
                if source != "__future__":
                    yield Alias(alias.asname or alias.name, source, (alias.name,), f"from {source} {line}")
            elif alias.asname:
                yield Alias(alias.asname, alias.name, (), line)
            else:
                top = alias.name.partition(".")[0]
                yield Alias(top, top, (), line, plain=True)


def bound(statement: ast.stmt) -> list[str]:
    """Return the names that a top-level statement defines, also in its branches."""
    table = symtable(ast.unparse(statement), "", "exec")
    return [symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()]


def changed(statement: ast.stmt) -> set[str]:
    """Return the names whose values a top-level statement may change in place.

    It stores to an item or attribute of them, or calls, for no other reason than that, something with them.
    """
    found: set[str] = set()
    if isinstance(statement, Definable):
        return found
    for node in ast.walk(statement):
        if isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
            found.add(_root(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            found.update(_root(part) for part in (call.func, *call.args, *(k.value for k in call.keywords)))
    return found


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def free_names(statement: ast.stmt) -> list[str]:
    """Return the names that a statement reads from its module or from the builtins."""
    found: dict[str, None] = {}

    def read(table: SymbolTable) -> None:
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
                found[symbol.get_name()] = None
        for inner in table.get_children():
            read(inner)

    read(symtable(ast.unparse(statement), "", "exec"))
    return list(found)


def chains(node: ast.AST, name: str) -> list[Chain]:
    """Return each way in which ``node`` reads ``name``: with the attributes, and theirs, that it reads of it."""
    found: dict[Chain, None] = {}

    def visit(node: ast.AST) -> None:
        attributes: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            attributes.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            if inner.id == name and isinstance(inner.ctx, ast.Load):
                found[(name, *reversed(attributes))] = None
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(node)
    return list(found)


class _Strip(ast.NodeTransformer):
    """Removes what changes no value: docstrings, and annotations but for those of a class, which may declare fields."""

    def __init__(self, importer: Importer) -> None:
        self._importer = importer
        self._in_class = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self._body(node, in_class=False)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self._body(node, in_class=False)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._body(node, in_class=True)

    def _body(self, node: Any, *, in_class: bool) -> ast.AST:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        before, self._in_class = self._in_class, in_class
        stripped = self.generic_visit(node)
        self._in_class = before
        return stripped

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if self._in_class:
            return self.generic_visit(node)
        if node.value is None:
            return None
        return ast.Assign([node.target], self.visit(node.value), lineno=node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return ast.ImportFrom(self._importer.absolute(node), node.names, 0)


def stripped(statement: ast.stmt, importer: Importer, *, undecorated: bool) -> ast.stmt:
    """Return a copy without docstrings and annotations, whose imports are absolute."""
    copy = ast.parse(ast.unparse(statement)).body[0]
    if undecorated and isinstance(copy, Definable):
        copy.decorator_list = []
    stripped: ast.stmt = ast.fix_missing_locations(_Strip(importer).visit(copy) or ast.Pass())
    return stripped
