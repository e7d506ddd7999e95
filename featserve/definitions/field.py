"""One feature or column: its name, type, default, and what its values must satisfy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from featserve.definitions.rules import Json, check_name, check_texts
from featserve.errors import DefinitionError, InvalidRequest
from featserve.types import Bytes, Type, column, parse_type


@dataclass(frozen=True, slots=True)
class Field:
    """One feature of a view.

    ``default`` replaces a null in the value served, never its status. ``min``, ``max`` (inclusive; numbers and
    timestamps), ``allowed`` (a list of values), ``not_null`` and ``not_nan`` are checked on every write, before
    anything is stored.
    """

    name: str
    type: Type
    _: KW_ONLY
    description: str = ""
    default: Any = None
    min: Any = None
    max: Any = None
    allowed: Collection[Any] | None = None
    not_null: bool = False
    not_nan: bool = False

    def __post_init__(self) -> None:
        check_name("feature", self.name)
        what = f"feature {self.name!r}"
        if not isinstance(self.type, Type):
            raise DefinitionError(f"{what}: {self.type!r} is not a type such as Int64, Float32, String or Vector(16)")
        check_texts(what, description=self.description)
        for role in ("not_null", "not_nan"):
            if not isinstance(getattr(self, role), bool):
                raise DefinitionError(f"{what}: {role} {getattr(self, role)!r} is neither True nor False")
        ordered = not self.type.variable and not self.type.vector and self.type.name != "bool"
        for role in ("min", "max"):
            if getattr(self, role) is not None:
                if not ordered:
                    raise DefinitionError(f"{what}: {role} does not apply to {self.type}")
                object.__setattr__(self, role, self._value(role, getattr(self, role)))
        if self.min is not None and self.max is not None and self.min > self.max:
            raise DefinitionError(f"{what}: min {self.min} is greater than max {self.max}")
        if self.allowed is not None:
            if self.type.vector:
                raise DefinitionError(f"{what}: allowed does not apply to {self.type}")
            listed = isinstance(self.allowed, Collection) and not isinstance(self.allowed, str | bytes | Mapping)
            if not listed or not self.allowed:
                raise DefinitionError(f"{what}: allowed {self.allowed!r} is not a list of at least one {self.type}")
            object.__setattr__(self, "allowed", tuple(sorted({self._value("allowed", v) for v in self.allowed})))
        if self.not_nan and not self.type.floating:
            raise DefinitionError(f"{what}: not_nan does not apply to {self.type}")
        if self.default is not None:
            object.__setattr__(self, "default", self._value("default", self.default))
            if self.allowed is not None and self.default not in self.allowed:
                raise DefinitionError(f"{what}: default {self.default!r} is not one of the allowed values")
            if (self.min is not None and self.default < self.min) or (self.max is not None and self.default > self.max):
                raise DefinitionError(f"{what}: default {self.default!r} is outside of min and max")

    @property
    def constrained(self) -> bool:
        """Whether there is a value that it does not take."""
        return self.not_null or self.not_nan or self.min is not None or self.max is not None or self.allowed is not None

    def _value(self, role: str, value: Any) -> Any:
        """Return ``value`` in the one form that JSON holds exactly: instants in microseconds, bytes in latin-1.

        A float32 is the shortest decimal that means it: 0.1, not 0.10000000149011612.
        """
        try:
            col = column(self.type, [value], role)
        except InvalidRequest as error:
            raise DefinitionError(f"feature {self.name!r}: {error}") from None
        if col.null_count or (self.type.floating and np.isnan(col.values).any()):
            raise DefinitionError(f"feature {self.name!r}: {role} holds {value!r}, which is no value")
        if self.type.variable:
            return col.to_bytes_list()[0].decode("latin-1" if self.type is Bytes else "utf-8")
        if col.values.dtype == np.float32:
            shortest = [float(str(number)) for number in col.values.ravel()]
            return shortest if self.type.vector else shortest[0]
        return col.values[0].item()

    def value(self, stored: Any) -> Any:
        """Return a ``default`` or an ``allowed`` value as ``types.column`` takes it."""
        return stored.encode("latin-1") if self.type is Bytes else stored

    def to_dict(self) -> Json:
        return self.meaning() | {"description": self.description}

    def meaning(self) -> Json:
        return {
            "name": self.name,
            "type": str(self.type),
            "default": self.default,
            "min": self.min,
            "max": self.max,
            "allowed": None if self.allowed is None else list(self.allowed),
            "not_null": self.not_null,
            "not_nan": self.not_nan,
        }

    @classmethod
    def from_dict(cls, d: Json) -> Field:
        rest = d | {"type": parse_type(d["type"])}
        if rest["type"] is Bytes:
            default, allowed = d["default"], d["allowed"]
            rest["default"] = None if default is None else default.encode("latin-1")
            rest["allowed"] = None if allowed is None else [value.encode("latin-1") for value in allowed]
        return cls(**rest)
