"""What a service takes and what its answers hold: the schema that a client fetches once and a plan is compiled to.

Plain values; knows no definition, wire or store.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from featserve.types import Type


@dataclass(frozen=True, slots=True)
class ViewSchema:
    """A view version that a service reads; ``ttl_us`` is None where its rows are served for ever."""

    name: str
    version: int
    hash: str
    keys: tuple[str, ...]
    ttl_us: int | None
    owner: str = ""
    description: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class AggregateSchema:
    """What a feature over a window means, spelled out.

    ``function`` of the expression ``of`` an event, of the events themselves where that is empty; over the events of the
    source ``events`` (its id) that satisfy ``where``, all if empty. ``boundaries``: which event times the window at T
    holds, of which ``kind`` it is; ``zone``: a calendar's. ``empty_json``: the value of an empty window. ``ties``: what
    decides which of two events is the later one.
    """

    function: str
    of: str
    where: str
    events: str
    kind: str
    boundaries: str
    zone: str
    empty_json: str
    ties: str


@dataclass(frozen=True, slots=True)
class FeatureSchema:
    """One feature of an answer.

    ``view``: index into the schema's views, None for the output of the transform that ``transform`` names. Either
    ``tensor``, its first column there, or ``column``, its index among the typed columns, is set. ``aggregate``: set
    where it is one over a window.
    """

    name: str
    type: Type
    view: int | None
    tensor: int | None
    column: int | None
    description: str = ""
    default_json: str = ""
    transform: str = ""
    aggregate: AggregateSchema | None = None


@dataclass(frozen=True, slots=True)
class ServiceSummary:
    """A service that can be asked for; ``promoted``: the version that its bare name means."""

    name: str
    version: int
    hash: str
    promoted: bool
    owner: str
    description: str
    features: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ServiceSchema:
    """The schema of one service version. ``width`` counts the tensor's columns, ``dtype`` is theirs."""

    name: str
    version: int
    hash: str
    dtype: Type
    width: int
    keys: dict[str, Type]
    views: tuple[ViewSchema, ...]
    features: tuple[FeatureSchema, ...]
    owner: str = ""
    description: str = ""
    request_columns: dict[str, Type] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"

    @cached_property
    def id(self) -> int:
        """The first 8 bytes of the hash as a big-endian number: what each answer carries."""
        return int(self.hash[:16], 16)

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        assert self.dtype.dtype is not None
        return self.dtype.dtype

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """The name of each tensor column; ``name[i]`` for element i of a vector."""
        names: list[str] = []
        for f in self.features:
            if f.tensor is not None:
                names += [f"{f.name}[{i}]" for i in range(f.type.length)] if f.type.vector else [f.name]
        return tuple(names)

    @cached_property
    def column_features(self) -> tuple[FeatureSchema, ...]:
        """The features that are typed columns, in the order of those."""
        return tuple(f for f in self.features if f.column is not None)
