"""Every error that featserve raises on purpose, as one small tree.

    FeatserveError
    ├── CallerError             the request, the definition or the data is wrong; trying again will not help
    │   ├── DefinitionError     a definition, or the configuration, contradicts itself or another
    │   ├── RegistryConflict    an apply would change what a published version means
    │   ├── InvalidRequest      a request does not fit the schema that it names
    │   ├── UnknownName         a service, view, feature or version that does not exist
    │   ├── SchemaMismatch      ``name#hash`` is not what is served
    │   ├── TooLarge            a request is over a declared limit
    │   │   └── AnswerTooLarge      its answer is
    │   └── SourceError         a source file is missing, unreadable, or not as declared
    └── ServingError            ours: the request was fine
        ├── Overloaded          refused at once, before any work was done; try again with backoff
        ├── DeadlineExceeded    the caller stopped waiting, so the work was not done
        ├── Unavailable         the server is starting, draining or gone
        │   └── NotBegun            it stops, and has not begun with the call: made again, even a push counts once
        ├── RegistryError       the registry's database cannot be opened, read or written, or was tampered with
        │   └── RegistryMissing     nothing was applied yet
        ├── TransformError      an on-demand transform raised, or broke its declaration
        └── StoreError          the store cannot be opened, read or written
            ├── StoreLocked     another process has it open for writing
            ├── StoreFull       no space left on the device
            └── CorruptRow      a stored row is truncated, foreign or damaged

A message states what was asked, what exists, and the nearest name. ``reason`` is a constant that a program can
compare; ``violations`` name the fields at fault. ``server/status.py`` maps each class to its gRPC code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

MAX_VIOLATIONS = 16
"""The most violations that one error lists."""

MAX_HINTED = 128
"""The longest name that is compared with others: the comparison takes the square of its length."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a request: ``field`` is a path such as ``keys.origin`` or ``rows[3].temp``."""

    field: str
    description: str


class FeatserveError(Exception):
    """The root. ``str(error)`` is the whole message, fit to be shown to a user."""

    reason: ClassVar[str] = "ERROR"

    def __init__(
        self, message: str, *, violations: Iterable[Violation] = (), metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})


class CallerError(FeatserveError):
    reason = "CALLER_ERROR"


class DefinitionError(CallerError):
    reason = "INVALID_DEFINITION"


class RegistryConflict(CallerError):
    reason = "REGISTRY_CONFLICT"


class InvalidRequest(CallerError):
    reason = "INVALID_REQUEST"


class UnknownName(CallerError):
    reason = "UNKNOWN_NAME"


class SchemaMismatch(CallerError):
    reason = "SCHEMA_MISMATCH"


class TooLarge(CallerError):
    reason = "TOO_LARGE"


class AnswerTooLarge(TooLarge):
    pass


class SourceError(CallerError):
    reason = "SOURCE_ERROR"


class ServingError(FeatserveError):
    reason = "SERVING_ERROR"


class Overloaded(ServingError):
    reason = "OVERLOADED"


class DeadlineExceeded(ServingError):
    reason = "DEADLINE_EXCEEDED"


class Unavailable(ServingError):
    reason = "UNAVAILABLE"


class NotBegun(Unavailable):
    reason = "NOT_BEGUN"


class RegistryError(ServingError):
    reason = "REGISTRY_ERROR"


class RegistryMissing(RegistryError):
    reason = "REGISTRY_MISSING"


class TransformError(ServingError):
    reason = "TRANSFORM_FAILED"


class StoreError(ServingError):
    reason = "STORE_ERROR"


class StoreLocked(StoreError):
    reason = "STORE_LOCKED"


class StoreFull(StoreError):
    reason = "STORE_FULL"


class CorruptRow(StoreError):
    reason = "CORRUPT_ROW"


def invalid(field: str, description: str) -> InvalidRequest:
    """Return an InvalidRequest with one violation; the message is ``field: description``."""
    return InvalidRequest(f"{field}: {description}", violations=[Violation(field, description)])


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """Return an UnknownName that offers the nearest of the ``known`` names, or lists a few of them."""
    return UnknownName(
        f"unknown {kind} {name!r}{hint(name, known)}", metadata={"kind": kind.replace(" ", "_"), "name": name}
    )


def hint(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x' or 'y'?``, else ``; there is: …``, else ``; there are none``."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6) if len(name) <= MAX_HINTED else []
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    if not names:
        return "; there are none"
    shown = ", ".join(repr(n) for n in names[:8])
    return f"; there is: {shown}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def by_reason(reason: str) -> type[FeatserveError] | None:
    """Return the class whose ``reason`` this is, None where there is none."""
    kinds: list[type[FeatserveError]] = [FeatserveError]
    for kind in kinds:
        if kind.reason == reason:
            return kind
        kinds += kind.__subclasses__()
    return None
