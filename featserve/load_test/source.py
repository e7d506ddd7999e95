"""What a load test sends: requests as bytes, made from columns that are drawn at random.

``Reads`` and ``Writes`` each name a method of the server and yield its requests without end. They cross to the
processes that send, so they hold plain values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from featserve._proto import serving_pb2 as pb
from featserve.batch import Arrival, Int64s
from featserve.errors import invalid
from featserve.load_test.arrivals import BLOCK, MAX_SIZE, positions
from featserve.types import Array, Column, Type
from featserve.wire import encode_column, encode_rows

MAX_CONNECTIONS = 10_000
MAX_RATE = 1_000_000.0


@dataclass(frozen=True, slots=True)
class Load:
    """How hard a server is loaded.

    ``batch``: the rows that a request asks for. ``rate``: requests a second, which arrive whether or not those before
    them were answered (open loop); None: each of ``connections`` sends its next request when the last one was answered
    (closed loop).
    """

    batch: int
    rate: float | None
    connections: int

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise invalid("batch", f"{self.batch:,} rows; a request asks for at least 1")
        if self.rate is not None and not 0 < self.rate <= MAX_RATE:
            raise invalid("rate", f"{self.rate:g} requests/s; it is over 0 and at most {MAX_RATE:,.0f}")
        if not 1 <= self.connections <= MAX_CONNECTIONS:
            raise invalid("connections", f"{self.connections:,}; there are 1 to {MAX_CONNECTIONS:,}")

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:,.0f}/s"
        return "1 connection" if self.connections == 1 else f"{self.connections:,} connections"


class Axis(Protocol):
    """Columns whose values are drawn together: one of ``size`` for each row."""

    @property
    def size(self) -> int: ...

    def columns(self, at: Int64s) -> dict[str, Column]:
        """Return the columns that hold the values at these positions."""
        ...


@dataclass(frozen=True, slots=True)
class Range:
    """One column of the whole numbers from ``low`` to ``high``, both included."""

    name: str
    type: Type
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.type.dtype is None or self.type.dtype.kind != "i":
            raise invalid(
                self.name, f"is a {self.type}, and a range is of whole numbers; list its values, or use a file"
            )
        bounds = np.iinfo(self.type.dtype)
        if not (bounds.min <= self.low <= self.high <= bounds.max and self.size <= MAX_SIZE):
            raise invalid(
                self.name, f"{self.low}..{self.high} is no range of 1 to {MAX_SIZE:,} numbers that fit {self.type}"
            )

    @property
    def size(self) -> int:
        return self.high - self.low + 1

    def columns(self, at: Int64s) -> dict[str, Column]:
        values: Array = (at + self.low).astype(self.type.dtype)
        return {self.name: Column(self.type, values)}


@dataclass(frozen=True, slots=True)
class Listed:
    """Columns of given values, all of one length; those of a row stay together."""

    values: Mapping[str, Column]

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self.values.values()}
        if len(lengths) != 1 or not 1 <= min(lengths) <= MAX_SIZE:
            raise invalid(", ".join(self.values), f"1 to {MAX_SIZE:,} rows, as many for each column, are drawn from")

    @property
    def size(self) -> int:
        return len(next(iter(self.values.values())))

    def columns(self, at: Int64s) -> dict[str, Column]:
        return {name: column.take(at) for name, column in self.values.items()}


@dataclass(frozen=True, slots=True)
class Reads:
    """Requests for features. ``keys``: which of the columns are keys; the others are request columns.

    ``exponent``: 0 draws every entity equally often, above it they follow Zipf's law.
    """

    service: str
    keys: tuple[str, ...]
    axes: tuple[Axis, ...]
    exponent: float = 0.0

    method = "GetFeatures"

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 10:
            raise invalid("zipf", f"{self.exponent:g}; the exponent is 0 (uniform) to 10")

    def draw(self, rows: int, random: np.random.Generator) -> dict[str, Column]:
        """Return the columns of ``rows`` random rows."""
        drawn: dict[str, Column] = {}
        for axis in self.axes:
            drawn |= axis.columns(positions(axis.size, self.exponent, rows, random))
        return drawn

    def requests(self, batch: int, random: np.random.Generator) -> Iterator[bytes]:
        """Yield requests for ``batch`` rows each. Rows are drawn for many requests at once, and encoded for one."""
        many = max(1, BLOCK // batch) * batch
        while True:
            places = [positions(axis.size, self.exponent, many, random) for axis in self.axes]
            for at in range(0, many, batch):
                message = pb.GetFeaturesRequest(service=self.service)
                for axis, place in zip(self.axes, places, strict=True):
                    for name, column in axis.columns(place[at : at + batch]).items():
                        target = message.keys if name in self.keys else message.request_columns
                        target.append(encode_column(name, column))
                yield message.SerializeToString()


@dataclass(frozen=True, slots=True)
class Writes:
    """Requests that write rows, given ones over and over, each with the present as its event time.

    ``rate``: rows a second.
    """

    view: str
    rows: Mapping[str, Column]
    rate: float

    method = "WriteRows"

    def __post_init__(self) -> None:
        if not 1 <= self.rate <= MAX_RATE:
            raise invalid("write rate", f"{self.rate:g} rows/s; it is 1 to {MAX_RATE:,.0f}")

    def requests(self, batch: int, random: np.random.Generator) -> Iterator[bytes]:
        """Yield writes of ``batch`` random rows each."""
        listed = Listed(self.rows)
        while True:
            columns = listed.columns(random.integers(0, listed.size, batch))
            times = np.full(batch, time.time_ns() // 1_000, np.int64)
            yield encode_rows(self.view, Arrival(columns, times)).SerializeToString()
