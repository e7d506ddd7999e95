"""What windows are served as: from the words of structs, as records hold them, to the rows that a plan reads.

Comes in: for each window of each entity, the words of the one struct that stands for all of it. Goes out: rows. Each
feature is made for all entities at once, from contiguous words. ``Made`` keeps rows. Knows no store, and no layout of
records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from featserve.aggregates import Aggregator, DType, Partials
from featserve.batch import Int64s
from featserve.codec import RowCodec, Rows
from featserve.folding import joined
from featserve.series import Layout
from featserve.types import NEVER_US, Array, Column, Mask, gather

ROW_BYTES = 300
"""What a row that is kept takes beside its record: its bytes, two ids and its part of the dictionary."""


class Strings(NamedTuple):
    """The bytes that words of strings point into, uint8, and where those of each entity start, shape (n,)."""

    data: Array
    starts: Int64s


NO_STRINGS = Strings(np.zeros(0, np.uint8), np.zeros(0, np.int64))


class Cut(NamedTuple):
    """What the windows of one instant need of n records: ``exact`` and ``newest`` as in ``State``, of shape (n,).

    ``held``: how many structs each cut holds, shape (cuts, n). ``words``: of the first of them, zero where there is
    none, shape (words, n).
    """

    exact: Int64s
    newest: Int64s
    held: Int64s
    words: Int64s

    def part(self, rows: slice) -> Cut:
        """Return that of some of the records."""
        return Cut(*(array[..., rows] for array in self))


@dataclass(frozen=True, slots=True)
class _Final:
    """How a feature is made of words: ``count`` and ``parts`` are the numbers of those that it takes.

    ``count``: None for a distinct count, which is how many structs its ``cut`` holds. ``finalize``: None where the
    value is the count.
    """

    cut: int
    count: int | None
    parts: tuple[tuple[int, DType], ...]
    finalize: Callable[[Partials], tuple[Array, Mask | None]] | None


class _Merge(NamedTuple):
    """Words that are merged together: the partials of an aggregate, and the number of the word that counts them."""

    aggregator: Aggregator
    counted: int
    parts: list[tuple[int, DType]]


class Finals:
    """Makes the rows of one view version."""

    def __init__(self, layout: Layout, rows: RowCodec) -> None:
        self._rows = rows
        numbers: dict[tuple[int, int], int] = {}
        self._finals: list[_Final] = []
        for place in layout.places:
            measure = place.measure
            columns = [] if place.count is None else [place.count, *(measure.parts if measure else ())]
            at = [numbers.setdefault((place.cut, column), len(numbers)) for column in columns]
            parts = tuple(zip(at[1:], measure.aggregator.dtypes, strict=True)) if measure else ()
            finalize = measure.aggregator.finalize if measure else None
            self._finals.append(_Final(place.cut, at[0] if at else None, parts, finalize))
        self.cuts = np.array([cut for cut, _ in numbers], np.int64)
        """The words that rows are made of: the cut of each, int64 of shape (words,)."""
        self.offsets = np.array([[1 + column] for _, column in numbers], np.int64).reshape(-1, 1)
        """Where in its struct each is: int64 of shape (words, 1)."""
        self._counts: list[int] = []
        self._merges: list[_Merge] = []
        for cut, (series_number, _) in enumerate(layout.cuts):
            series = layout.series[series_number]
            self._counts += [numbers[cut, i] for i in range(len(series.operands)) if (cut, i) in numbers]
            for measure in series.measures:
                if (cut, measure.parts[0]) in numbers:
                    parts_at = [numbers[cut, part] for part in measure.parts]
                    typed = list(zip(parts_at, measure.aggregator.dtypes, strict=True))
                    self._merges.append(_Merge(measure.aggregator, numbers[cut, measure.count], typed))

    def merged(self, one: Int64s, other: Int64s) -> Int64s:
        """Return the words of n structs that stand for the events of two each, all of shape (words, n)."""
        words = np.empty_like(one)
        words[self._counts] = one[self._counts] + other[self._counts]
        for aggregator, counted, parts in self._merges:
            sides = ([from_words(side[i], dtype) for i, dtype in parts] for side in (one, other))
            both = joined(aggregator, one[counted] > 0, other[counted] > 0, *sides)
            for (i, _), part in zip(parts, both, strict=True):
                words[i] = to_words(part)
        return words

    def both(self, whole: Cut, late: Cut | None, split: Int64s) -> Cut:
        """Return what windows need of entities of which some, at ``split``, have a recent part, too: ``late``."""
        if late is None or not len(split):
            return whole
        exact, newest, words = whole.exact.copy(), whole.newest.copy(), whole.words.copy()
        exact[split] = np.maximum(exact[split], late.exact)
        newest[split] = np.maximum(newest[split], late.newest)
        words[:, split] = self.merged(words[:, split], late.words)
        return Cut(exact, newest, whole.held, words)

    def rows(self, cut: Cut, earliest_us: Int64s, strings: Strings) -> Rows:
        """Return the rows of n entities. ``earliest_us``: where the first window of each begins, shape (n,) or (1,)."""
        words, held = cut.words, cut.held
        event_time_us, known_at_us = np.where(cut.newest < earliest_us, NEVER_US, cut.newest), cut.exact
        codec = self._rows
        fixed = np.empty(len(event_time_us), codec.dtype)
        texts: dict[str, Column] = {}
        valid = np.ones((len(self._finals), len(fixed)), np.bool_)
        for f, final, there in zip(codec.features, self._finals, valid, strict=True):
            values = held[final.cut] if final.count is None else words[final.count]
            if final.finalize is not None:
                np.greater(values, 0, out=there)
                values, known = final.finalize(tuple(from_words(words[i], dtype) for i, dtype in final.parts))
                if known is not None:
                    there &= known
            if f.type.variable:
                word = np.where(there, values, 0)
                texts[f.name] = gather(f.type, strings.data, strings.starts + (word >> 32), word & 0xFFFFFFFF, there)
            else:
                run, at = codec.place[f.name]
                fixed[run][:, at] = values
        return codec.finish(fixed, event_time_us, known_at_us, valid, texts)


class Made:
    """Rows that were made of records, each with its recent part, by the ids of both, and what was cut out of records.

    The records are not let go of before that. So what is where a record was in memory is that record, and no read has
    to look at what is in it. ``held``: what all of it takes, in bytes.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], bytes] = {}
        self._cuts: dict[int, bytes] = {}
        self._records: list[bytes | None] = []
        self.held = 0

    def get(self, pairs: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Return the row of each pair, None where it is not here."""
        return list(map(self._rows.get, pairs))

    def add(
        self,
        pairs: Sequence[tuple[int, int]],
        records: Sequence[bytes | None],
        recent: Sequence[bytes | None],
        rows: Sequence[bytes],
    ) -> None:
        """Take the rows of records with their recent parts, whose ids are ``pairs``."""
        self._hold([record for record in records if id(record) not in self._cuts])
        self._hold(recent)
        self.held += ROW_BYTES * len(rows)
        self._rows.update(zip(pairs, rows, strict=True))

    def cuts(self, records: Sequence[bytes]) -> list[bytes | None]:
        """Return what was cut out of each record, None where it is not here."""
        return list(map(self._cuts.get, map(id, records)))

    def add_cuts(self, records: Sequence[bytes], cuts: Sequence[bytes]) -> None:
        """Take what was cut out of records."""
        self._hold(records)
        self.held += ROW_BYTES * len(records)
        self._cuts.update(zip(map(id, records), cuts, strict=True))

    def _hold(self, records: Sequence[bytes | None]) -> None:
        self._records += records
        self.held += sum(map(len, filter(None, records)))


def from_words(words: Int64s, dtype: DType) -> Array:
    """Return values from how they are stored in words, each of shape (n,)."""
    if dtype.kind == "f":
        return words.view(np.float64).astype(dtype, copy=False)
    return words != 0 if dtype.kind == "b" else words.astype(dtype, copy=False)


def to_words(values: Array) -> Int64s:
    """Return values as they are stored in words, each of shape (n,)."""
    if values.dtype.kind == "f":
        return values.astype(np.float64, copy=False).view(np.int64)
    return values.astype(np.int64, copy=False)
