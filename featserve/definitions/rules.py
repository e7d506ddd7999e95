"""What every definition obeys: names, versions, durations, tags, and the hash of a meaning."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from featserve.errors import DefinitionError

Json = dict[str, Any]

NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


def check_name(kind: str, name: object) -> str:
    """Return ``name`` if it is lower case letters, digits and underscores, starting with a letter."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise DefinitionError(f"{kind} name {name!r}: use up to 63 of a-z, 0-9 and _, a letter first")
    return name


def check_version(what: str, version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version < 2**31:
        raise DefinitionError(f"{what}: version {version!r} is not a whole number from 1 up")


def micros(what: str, duration: object, *, zero: bool = False) -> int:
    """Return a timedelta as int microseconds; refuses a negative one and, unless ``zero``, an empty one."""
    if not isinstance(duration, timedelta):
        raise DefinitionError(f"{what}: {duration!r} is not a datetime.timedelta")
    us = duration // timedelta(microseconds=1)
    if us < 0 or (us == 0 and not zero):
        raise DefinitionError(f"{what}: {duration} is not {'zero or ' if zero else ''}a positive duration")
    if us >= 2**63:
        raise DefinitionError(f"{what}: {duration} is longer than 2**63 microseconds; leave it out to mean for ever")
    return us


def hours(us: int) -> str:
    """Return a duration in the greatest unit that divides it, hours at most: how long a day is depends."""
    units = (("h", 3_600_000_000), ("min", 60_000_000), ("s", 1_000_000), ("ms", 1_000), ("us", 1))
    unit, size = next((unit, size) for unit, size in units if us % size == 0)
    return f"{us // size:,} {unit}"


def content_hash(meaning: Json) -> str:
    """Return the SHA-256 (64 hex digits) of the canonical JSON of what can change a value."""
    return hashlib.sha256(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def unique(what: str, kind: str, names: Iterable[str]) -> None:
    """Refuse a name that stands twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DefinitionError(f"{what}: {kind} {name!r} stands twice")
        seen.add(name)


def check_chosen(what: str, kind: str, names: object) -> None:
    """Refuse what stands between the brackets of ``view["a", "b"]`` if it is no names."""
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
        raise DefinitionError(f"{what}: {names!r} names no {kind}s; choose them by name, as in ['a', 'b']")


def check_texts(what: str, **texts: object) -> None:
    """Refuse an owner or a description that is no string."""
    for role, text in texts.items():
        if not isinstance(text, str):
            raise DefinitionError(f"{what}: {role} {text!r} is not a string")


def check_tags(what: str, tags: object) -> dict[str, str]:
    if not isinstance(tags, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in tags.items()):
        raise DefinitionError(f"{what}: tags is a mapping of strings to strings")
    return dict(tags)
