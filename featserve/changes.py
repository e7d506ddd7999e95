"""What applying a project's definitions would change in a registry, said so that a person can judge it.

Comes in: the definitions that are stored and those that are declared. Goes out: a ``Plan``, one ``Change`` for each
definition of either. Pure: reads no file and no database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from featserve.catalog import KINDS, Definition, Definitions, Kind
from featserve.definitions import Json, content_hash

Action = Literal["create", "update", "conflict", "unchanged", "absent"]


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one definition.

    ``action``: "create" it; "update" what does not change its meaning (owner, description, tags, a whole entity);
    "conflict": its meaning changed under the same version, so nothing can be applied; "unchanged"; "absent": stored
    but no longer declared, which keeps it. ``details``: each difference, as ``ttl: 3:00:00 -> 4:00:00``.
    """

    kind: str
    id: str
    action: Action
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.action} {self.kind.replace('_', ' ')} {self.id}"
        return f"{text}: {'; '.join(self.details)}" if self.details else text


@dataclass(frozen=True, slots=True)
class Plan:
    """Every change, conflicts included, in the order of the kinds and then of the ids."""

    changes: tuple[Change, ...]

    def of(self, *actions: Action) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.action in actions)

    @property
    def conflicts(self) -> tuple[Change, ...]:
        return self.of("conflict")

    @property
    def writes(self) -> tuple[Change, ...]:
        """What an apply writes; empty when there is nothing to do."""
        return self.of("create", "update")


def compare(stored: Definitions, declared: Definitions) -> Plan:
    """Return what makes ``stored`` hold everything that is ``declared``."""
    return Plan(
        tuple(
            _change(kind, id_, stored.of(kind).get(id_), declared.of(kind).get(id_))
            for kind in KINDS
            for id_ in sorted({*stored.of(kind), *declared.of(kind)}, key=_by_version)
        )
    )


def _by_version(id_: str) -> tuple[str, int]:
    name, _, version = id_.partition("@")
    return name, int(version or 0)


def _change(kind: Kind, id_: str, old: Definition | None, new: Definition | None) -> Change:
    if new is None:
        return Change(kind.name, id_, "absent")
    if old is None:
        return Change(kind.name, id_, "create")
    details = differences(old.to_dict(), new.to_dict())
    if kind.versioned and old.hash != new.hash:
        return Change(kind.name, id_, "conflict", details or (f"hash: {old.hash[:12]} -> {new.hash[:12]}",))
    return Change(kind.name, id_, "update" if details else "unchanged", details)


def differences(old: Json, new: Json) -> tuple[str, ...]:
    """Return each difference between two bodies of one kind (``to_dict``), for a person to read."""
    before, after = _facts(old), _facts(new)
    lines = []
    for subject in {**before, **after}:
        if subject not in before or subject not in after:
            lines.append(f"{subject}: {'removed' if subject in before else 'added'}")
            continue
        was, now = before[subject], after[subject]
        for fact in {**was, **now}:
            if was.get(fact) != now.get(fact):
                label = f"{subject}: {fact} " if fact else f"{subject}: "
                lines.append(f"{label}{was.get(fact, 'none')} -> {now.get(fact, 'none')}")
    if [s for s in before if s in after] != [s for s in after if s in before]:
        lines.append("features: in another order")
    return tuple(lines)


def _facts(body: Json) -> dict[str, dict[str, str]]:
    """Return what a body says as subject -> fact -> text; what it says of itself has an empty fact."""
    facts: dict[str, dict[str, str]] = {}
    for key, value in body.items():
        if key in LISTS:
            for item in value:
                facts |= _item_facts(LISTS[key], item)
        elif isinstance(value, Mapping):
            facts[key] = dict(_show(k, v) for k, v in value.items())
        else:
            name, text = _show(key, value)
            if text != "none" or key in DURATIONS:  # no source is one less subject; no ttl is a ttl of none
                facts[name] = {"": text}
    return facts


def _item_facts(subject: str, item: Json) -> dict[str, dict[str, str]]:
    """Return what one feature or output says: a field of a view or transform, or what a service takes of one."""
    for kind in ("view", "transform"):
        if kind in item:
            chosen: dict[str, dict[str, str]] = {f"{subject} {item[kind]}.{name}": {} for name in item["names"]}
            return {f"{kind} {item[kind]}": {"": _reference(kind, item)}} | chosen
    return {f"{subject} {item['name']}": dict(_show(key, value) for key, value in item.items())}


def _reference(kind: str, item: Mapping[str, Any]) -> str:
    return f"{item[kind]}@{item['version']} ({item['hash'][:12]})"


def _show(key: str, value: Any) -> tuple[str, str]:
    """Return a fact's name and its value as a person writes them."""
    if key in DURATIONS:
        return key.removesuffix("_us"), "none" if value is None else str(timedelta(microseconds=value))
    if value is None:
        return key, "none"
    if key == "keys":
        return key, ", ".join(f"{name} {type_}" for name, type_ in value)
    if key == "modules":  # of captured code
        return key, f"of {len(value)} with hash {content_hash(value)[:12]}"
    if isinstance(value, Mapping):  # an input of a transform
        for kind in ("view", "transform"):
            if kind in value:
                return key, f"{value['name']!r} of {_reference(kind, value)}"
        return key, ", ".join(f"{k} {v}" for k, v in value.items())
    return key, str(value) if key in ("type", "dtype") else repr(value)


LISTS = {"features": "feature", "outputs": "output"}
DURATIONS = ("ttl_us", "delay_us")
