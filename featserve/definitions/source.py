"""Where the rows of a view come from: batch files, and how they tell their times."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Literal

from featserve.definitions.field import Field
from featserve.definitions.rules import Json, micros
from featserve.errors import DefinitionError
from featserve.types import Type


@dataclass(frozen=True, slots=True)
class Source:
    """Files of rows with an event time. Made by ``ParquetSource`` and ``CsvSource``."""

    format: Literal["parquet", "csv"]
    path: str
    event_time: str
    known_at: str | None = None
    delay: timedelta = timedelta(0)
    columns: Mapping[str, str] = field(default_factory=dict)
    delimiter: str = ","
    nulls: Collection[str] = ("", "NA", "null")

    def __post_init__(self) -> None:
        what = f"{self.format} source {self.path!r}"
        if not isinstance(self.path, str) or not self.path:
            raise DefinitionError(f"{self.format} source: path {self.path!r} is not a file path or glob")
        for role, name in (("event_time", self.event_time), ("known_at", self.known_at)):
            if name is not None and (not isinstance(name, str) or not name):
                raise DefinitionError(f"{what}: {role} {name!r} is not a column name")
        if self.event_time is None:
            raise DefinitionError(f"{what}: event_time is required: the column that says when a row became true")
        if self.known_at is not None and self.delay:
            raise DefinitionError(f"{what}: known_at and delay are two answers to one question; declare one of them")
        micros(f"{what}: delay", self.delay, zero=True)
        if not isinstance(self.columns, Mapping) or not all(
            isinstance(k, str) and isinstance(v, str) for k, v in self.columns.items()
        ):
            raise DefinitionError(f"{what}: columns maps a feature or key name to the source's column name")
        if not isinstance(self.delimiter, str) or not re.fullmatch(r"[^\r\n\"\x00\x80-\U0010ffff]", self.delimiter):
            raise DefinitionError(
                f"{what}: delimiter {self.delimiter!r} is not one ASCII character, or is a quote or line end"
            )
        if not isinstance(self.nulls, Collection) or not all(isinstance(null, str) for null in self.nulls):
            raise DefinitionError(f"{what}: nulls {self.nulls!r} is not a list of strings")
        if isinstance(self.nulls, str | Mapping):
            raise DefinitionError(f"{what}: nulls {self.nulls!r} is not a list; write [{self.nulls!r}]")
        object.__setattr__(self, "columns", dict(self.columns))
        object.__setattr__(self, "nulls", tuple(sorted(set(self.nulls))))

    def column(self, name: str) -> str:
        """Return the name that feature or key column ``name`` has in the files."""
        return self.columns.get(name, name)

    def only(self, names: Collection[str]) -> Source:
        """Return the source with none of its renamings but those of ``names``."""
        return replace(self, columns={name: column for name, column in self.columns.items() if name in names})

    def to_dict(self) -> Json:
        return {
            "format": self.format,
            "path": self.path,
            "event_time": self.event_time,
            "known_at": self.known_at,
            "delay_us": micros("delay", self.delay, zero=True),
            "columns": dict(self.columns),
            "delimiter": self.delimiter,
            "nulls": list(self.nulls),
        }

    @classmethod
    def from_dict(cls, d: Json) -> Source:
        rest = {k: v for k, v in d.items() if k != "delay_us"}
        return cls(**rest, delay=timedelta(microseconds=d["delay_us"]))


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows as a file or a push brings them: those of a feature view, or events.

    ``id``: whose they are. ``keys``: the columns that have a value in every row, with their types. ``features``: the
    other columns. ``source``: their files; None for rows that are only pushed.
    """

    id: str
    keys: Mapping[str, Type]
    features: tuple[Field, ...]
    source: Source | None

    def only(self, names: Collection[str]) -> Rows:
        """Return the rows with none of their features but those of ``names``, in the order that they had."""
        features = tuple(f for f in self.features if f.name in names)
        source = self.source and self.source.only({*self.keys, *(f.name for f in features)})
        return replace(self, features=features, source=source)


def ParquetSource(  # noqa: N802 - reads as a type where it is used
    path: str,
    *,
    event_time: str,
    known_at: str | None = None,
    delay: timedelta = timedelta(0),
    columns: Mapping[str, str] | None = None,
) -> Source:
    """Declare Parquet files as a source.

    ``path``: a file or glob, relative to the project's folder. ``event_time``: the timestamp column that says when a
    row became true. ``known_at``: the column that says when it could first have been used, or else ``delay``: how long
    after its event time. ``columns``: names of features or keys whose column is called otherwise in the files.
    """
    return Source("parquet", path, event_time, known_at, delay, columns or {})


def CsvSource(  # noqa: N802
    path: str,
    *,
    event_time: str,
    known_at: str | None = None,
    delay: timedelta = timedelta(0),
    columns: Mapping[str, str] | None = None,
    delimiter: str = ",",
    nulls: Collection[str] = ("", "NA", "null"),
) -> Source:
    """Declare CSV files (plain or gzip, with a header line, UTF-8) as a source; see ``ParquetSource``.

    Times are ISO 8601; without an offset they mean UTC. ``nulls`` are the spellings of a missing value.
    """
    return Source("csv", path, event_time, known_at, delay, columns or {}, delimiter, nulls)
