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


def check_texts(what: str, **texts: object) -> None:
    """Refuse an owner or a description that is no string."""
    for role, text in texts.items():
        if not isinstance(text, str):
            raise DefinitionError(f"{what}: {role} {text!r} is not a string")


def check_tags(what: str, tags: object) -> dict[str, str]:
    if not isinstance(tags, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in tags.items()):
        raise DefinitionError(f"{what}: tags is a mapping of strings to strings")
    return dict(tags)
