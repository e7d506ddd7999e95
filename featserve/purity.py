"""What the code of a transform uses beside its arguments: clocks, random numbers, files, the machine it runs on.

Comes in: captured code. Goes out: what of the outside it uses, each as a phrase fit for an error. Two ways that see
different things: what the source names, also where no test leads to it, and what is called while it runs, by whatever
name. Neither stops those who hide it; both find what is there by mistake.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from featserve.definitions.code import Code
from featserve.definitions.syntax import Importer, aliases, bound, chains, free_names

CLOCK, CHANCE, SYSTEM, FILES, NETWORK = (
    "reads the clock",
    "draws random numbers",
    "uses the operating system",
    "uses files",
    "uses the network",
)
OUTSIDE = {
    "time": CLOCK,
    "random": CHANCE,
    "_random": CHANCE,
    "secrets": CHANCE,
    "uuid.uuid1": CHANCE,
    "uuid.uuid4": CHANCE,
    "numpy.random": CHANCE,
    "os": SYSTEM,
    "posix": SYSTEM,
    "nt": SYSTEM,
    "subprocess": SYSTEM,
    "importlib": "imports modules by their name",
    "builtins.__import__": "imports modules by their name",
    "io.open": FILES,
    "io.FileIO": FILES,
    "_io.open": FILES,
    "builtins.open": FILES,
    "builtins.input": FILES,
    "pathlib.Path": FILES,
    "numpy.fromfile": FILES,
    "socket": NETWORK,
    "_socket": NETWORK,
    "http.client": NETWORK,
    "urllib.request": NETWORK,
    "builtins.hash": "uses hash(), whose answer for text is another in each process (zlib.crc32 and hashlib are not)",
    "builtins.id": "uses id(), an address in memory",
}
"""What is outside of a pure function, by module or by name in one."""

PURE = ("os.path", "posix.fspath")
CLOCKS = ("now", "utcnow", "today")
"""The clocks of datetime, pandas and others, as methods and as words that NumPy takes for an instant."""
OPENS = ("io.open", "_io.open", "io.open_code", "posix.open", "nt.open")
OWN_DATA = ("zoneinfo", "importlib", "tzdata")
"""Packages that read the files they come with."""


def named_outside(code: Code) -> list[str]:
    """Return what of the outside the source of ``code`` names."""
    found: dict[str, None] = {}
    for name, source in code.modules.items():
        tree, importer = ast.parse(source), Importer(name, False)
        own = {own for statement in tree.body for own in bound(statement)}
        names = [f"builtins.{read}" for statement in tree.body for read in free_names(statement) if read not in own]
        named = [dotted for dotted in names if dotted in OUTSIDE]
        for statement in tree.body:
            for alias in aliases(statement, importer):
                if alias.module not in code.modules:
                    used = chains(tree, alias.bound)
                    named += [".".join((alias.module, *alias.path, *chain[1:])) for chain in used]
        found.update(dict.fromkeys([*filter(None, map(_told, named)), *_written_clocks(tree)]))
    return list(found)


@contextmanager
def called_outside(code: Code) -> Iterator[list[str]]:
    """Give a list that fills with what of the outside the code calls while the context lasts, in this thread."""
    found: list[str] = []
    own = f"<{code.entry}: "

    def watch(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            dotted, caller = _home(called), frame
        elif event == "call" and frame.f_back is not None and not frame.f_code.co_filename.startswith(own):
            dotted, caller = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}", frame.f_back
        else:
            return
        is_own = caller.f_code.co_filename.startswith(own)
        if (told := _told(dotted)) and (is_own or (dotted in OPENS and not _reads_own_data(caller))):
            found.append(told)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _told(dotted: str) -> str | None:
    """Return what is outside about a name, None where nothing is."""
    parts = dotted.split(".")
    prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    if any(prefix in PURE for prefix in prefixes):
        return None
    if parts[-1] in CLOCKS:
        return f"{CLOCK} ({dotted})"
    return next((f"{OUTSIDE[prefix]} ({dotted})" for prefix in prefixes if prefix in OUTSIDE), None)


def _home(called: Any) -> str:
    """Return the dotted name of a built-in function, or of a method with the module of its object."""
    owner = getattr(called, "__self__", None)
    kind = owner if isinstance(owner, type) else type(owner)
    if kind.__module__ != "builtins":
        return f"{kind.__module__}.{called.__name__}"
    return f"{getattr(called, '__module__', None) or getattr(owner, '__name__', '')}.{called.__name__}"


def _reads_own_data(frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in OWN_DATA:
            return True
        frame = frame.f_back
    return False


def _written_clocks(tree: ast.AST) -> Iterator[str]:
    """Yield the words that the source has NumPy read as the present: making an instant is no call that can be seen."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        constants = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
        texts = [value for value in constants if isinstance(value, str)]
        if "datetime64" in ast.unparse(call) or any(text.lstrip("<>=").startswith("M8") for text in texts):
            yield from (f"{CLOCK} (datetime64({text!r}))" for text in texts if text.lower() in CLOCKS)
