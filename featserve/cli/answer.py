"""One answer of ``featserve get``: rows of values, each with why it is what it is, as a table or as JSON.

Comes in: a matrix and the keys that it was asked for. An event time is shown beside its age at the instant asked for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from featserve.cli.show import SECOND_US, STDOUT, age, counted, instant, show, show_json, table
from featserve.matrix import FeatureMatrix, Status
from featserve.types import NEVER_US, Float32, Float64, Int32, Int64, from_us, to_us

NUMBERS = (Int32, Int64, Float32, Float64)
MAX_SHOWN = 40
STYLES = {Status.NULL: "yellow", Status.EXPIRED: "magenta", Status.NOT_FOUND: "red"}


@dataclass(frozen=True)
class Answer:
    """A matrix with its event times, the keys of its rows, and the instant that they were asked for."""

    matrix: FeatureMatrix
    keys: Mapping[str, Sequence[Any]]
    now_us: int

    def show(self) -> None:
        """Print a line for each entity where that fits the width, else a block for each."""
        schema = self.matrix.schema
        rows = counted(len(self.matrix), "row")
        show(Text.assemble((schema.reference, "bold"), f": {rows} at {instant(self.now_us)} UTC"), "")
        wide = self._wide() if len(self.matrix) > 1 else None
        if wide is not None and needs(wide) <= STDOUT.width:
            show(wide)
            return
        for row in range(len(self.matrix)):
            named = ", ".join(f"{name}={plain(values[row])}" for name, values in self.keys.items())
            show(*([""] if row else []), Text(named, "bold"), self._block(row))

    def show_json(self) -> None:
        """Print one JSON object a row."""
        schema, times = self.matrix.schema, self._times
        names = [f.name for f in schema.features]
        columns, status = self._values, self._status
        for row in range(len(self.matrix)):
            views = {}
            for i, (view, us) in enumerate(zip(schema.views, times[row], strict=True)):
                views[view.id] = {
                    "status": Status(self.matrix.view_status[row, i]).name,
                    "event_time": None if us is None else as_json(from_us(us) or us),
                    "age_seconds": None if us is None else (self.now_us - us) / SECOND_US,
                }
            show_json(
                {
                    "keys": {name: as_json(values[row]) for name, values in self.keys.items()},
                    "values": {name: as_json(column[row]) for name, column in zip(names, columns, strict=True)},
                    "statuses": {name: s.name for name, s in zip(names, status[row], strict=True)},
                    "views": views,
                }
            )

    def _wide(self) -> Table:
        """Return a table with a row for each entity, the ages of its views last."""
        schema, times, status = self.matrix.schema, self._times, self._status
        features = [f.name.replace(".", "\n", 1) for f in schema.features]
        ages = [f"{view.name}\nage" for view in schema.views]
        numbers = {name for name, f in zip(features, schema.features, strict=True) if f.type in NUMBERS}
        made = table(*self.keys, *features, *ages, right={*numbers, *ages})
        columns = self._values
        for row in range(len(self.matrix)):
            cells = [Text(plain(values[row])) for values in self.keys.values()]
            cells += [cell(column[row], s) for column, s in zip(columns, status[row], strict=True)]
            cells += [Text("" if us is None else age(self.now_us - us)) for us in times[row]]
            made.add_row(*cells)
        return made

    def _block(self, row: int) -> Table:
        """Return a table of one entity, with a row for each feature."""
        schema, times, status = self.matrix.schema, self._times[row], self._status[row]
        made = table("feature", "value", "status", "event time (UTC)", "age", right=["age"])
        shown: set[int | None] = set()
        for f, column, s in zip(schema.features, self._values, status, strict=True):
            us = None if f.view is None or f.view in shown else times[f.view]
            shown.add(f.view)
            made.add_row(
                Text(f.name),
                Text("null", "dim") if column[row] is None else Text(plain(column[row])),
                Text(s.name, STYLES.get(s, "")),
                instant(us),
                "" if us is None else age(self.now_us - us),
            )
        return made

    @cached_property
    def _values(self) -> list[Sequence[Any]]:
        """Return the values of each feature: its default, else None, where it is null."""
        found: list[Sequence[Any]] = []
        for f, values in zip(self.matrix.schema.features, self.matrix.to_dict().values(), strict=True):
            single = f.type.vector or (f.type.floating and Float32 in (f.type, self.matrix.schema.dtype))
            found.append([shortest(v) for v in values] if single else values)
        return found

    @cached_property
    def _times(self) -> list[list[int | None]]:
        """Return each row's event time in each view, None where there is no row."""
        assert self.matrix.event_times is not None
        return [[None if us == NEVER_US else us for us in row] for row in self.matrix.event_times.tolist()]

    @cached_property
    def _status(self) -> list[list[Status]]:
        """Return the status of each row's features."""
        return [[Status(s) for s in row] for row in self.matrix.status.tolist()]


def needs(made: Table) -> int:
    """Return the width that a table needs to be printed without folding."""
    return Measurement.get(STDOUT, STDOUT.options.update(width=sys.maxsize), made).maximum


def shortest(value: Any) -> Any:
    """Return a float32 as the float with the fewest digits that means it: 0.1, not 0.10000000149011612."""
    if isinstance(value, list):
        return [shortest(v) for v in value]
    return None if value is None else float(str(np.float32(value)))


def cell(value: Any, status: Status) -> Text:
    """Return a value, or why there is none; a default stands before the reason."""
    if status is Status.PRESENT:
        return Text(plain(value))
    reason = Text(status.name, STYLES[status])
    return reason if value is None else Text.assemble(plain(value), " (", reason, ")")


def plain(value: Any) -> str:
    """Return a value in at most MAX_SHOWN characters, none of which a terminal would act on."""
    if isinstance(value, datetime):
        return instant(to_us(value))
    if isinstance(value, list):
        text = f"[{', '.join(str(v) for v in value[:4])}{', ...' if len(value) > 4 else ''}]"
    else:
        value = as_json(value)
        text = str(value).lower() if isinstance(value, bool) else str(value)
    if text.strip() != text or not text.isprintable() or not text:
        text = ascii(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def as_json(value: Any) -> Any:
    """Return a value as JSON holds it: times in ISO 8601, bytes in hex, NaN and the infinities as strings."""
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, list):
        return [as_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
