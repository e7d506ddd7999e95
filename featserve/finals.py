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

from featserve.aggregates import FLOAT64, INT64, Aggregator, DType, Partials
from featserve.batch import Int64s
from featserve.codec import RowCodec, Rows
from featserve.folding import joined
from featserve.series import Layout, Measure
from featserve.types import NEVER_US, Array, Column, Mask, gather

ROW_BYTES = 300
"""What a row that is kept takes beside its record: its bytes, two ids and its part of the dictionary."""

MOST_ASKED = 1 << 15
"""Records of which it is remembered how they were asked for: some hundred bytes each."""


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


class _Alike(NamedTuple):
    """Words that one function merges, all as float64 or all as int64: ``at``, and the numbers of those that count them.

    What is narrower loses nothing by that: a sum is that wide, and the least or the greatest of two is one of them.
    """

    ufunc: np.ufunc
    dtype: DType
    at: slice
    counts: Int64s


class _Merge(NamedTuple):
    """Words that are merged together: the partials of an aggregate, and the number of the word that counts them."""

    aggregator: Aggregator
    counted: int
    parts: list[tuple[int, DType]]


class Finals:
    """Makes the rows of one view version."""

    def __init__(self, layout: Layout, rows: RowCodec) -> None:
        self._rows = rows
        columns = [() if p.count is None else (p.count, *(p.measure.parts if p.measure else ())) for p in layout.places]
        wanted = {(place.cut, column) for place, some in zip(layout.places, columns, strict=True) for column in some}
        counts: list[tuple[int, int]] = []
        alike: dict[tuple[np.ufunc, DType], list[tuple[tuple[int, int], tuple[int, int]]]] = {}
        apart: list[tuple[int, Measure]] = []
        for cut, (series_number, _) in enumerate(layout.cuts):
            series = layout.series[series_number]
            counts += [(cut, i) for i in range(len(series.operands)) if (cut, i) in wanted]
            for measure in series.measures:
                if (cut, measure.parts[0]) not in wanted:
                    continue
                if measure.aggregator.ufunc is None:
                    apart.append((cut, measure))
                    continue
                for part, dtype in zip(measure.parts, measure.aggregator.dtypes, strict=True):
                    key = measure.aggregator.ufunc, FLOAT64 if dtype.kind == "f" else INT64
                    alike.setdefault(key, []).append(((cut, part), (cut, measure.count)))
        order = [*counts, *(word for words in alike.values() for word, _ in words)]
        order += [(cut, part) for cut, measure in apart for part in measure.parts]
        numbers = {word: number for number, word in enumerate(order)}
        self.cuts = np.array([cut for cut, _ in numbers], np.int64)
        """The words that rows are made of, those that are merged alike in a row: the cut of each, shape (words,)."""
        self.offsets = np.array([[1 + column] for _, column in numbers], np.int64).reshape(-1, 1)
        """Where in its struct each is: int64 of shape (words, 1)."""
        self._counts = len(counts)
        self._alike: list[_Alike] = []
        start = len(counts)
        for (ufunc, dtype), words in alike.items():
            counted = np.array([numbers[count] for _, count in words], np.int64)
            self._alike.append(_Alike(ufunc, dtype, slice(start, start + len(words)), counted))
            start += len(words)
        self._apart: list[_Merge] = []
        for cut, measure in apart:
            typed = [(numbers[cut, part], d) for part, d in zip(measure.parts, measure.aggregator.dtypes, strict=True)]
            self._apart.append(_Merge(measure.aggregator, numbers[cut, measure.count], typed))
        self._finals: list[_Final] = []
        for place, some in zip(layout.places, columns, strict=True):
            at, of = [numbers[place.cut, column] for column in some], place.measure
            parts = tuple(zip(at[1:], of.aggregator.dtypes, strict=True)) if of else ()
            self._finals.append(_Final(place.cut, at[0] if at else None, parts, of.aggregator.finalize if of else None))

        made = [(i, final.count) for i, final in enumerate(self._finals) if final.finalize]
        self._made = np.array([i for i, _ in made], np.int64)
        """The features that have no value where nothing is counted, and in ``_counted`` the words that count it."""
        self._counted = np.array([count for _, count in made], np.int64)

    def merged(self, one: Int64s, other: Int64s) -> Int64s:
        """Return the words of n structs that stand for the events of two each, all of shape (words, n)."""
        words = other.copy()
        words[: self._counts] += one[: self._counts]
        here, there = one[: self._counts] > 0, other[: self._counts] > 0
        for ufunc, dtype, at, counts in self._alike:
            mine, (x, y, out) = here[counts], (side[at].view(dtype) for side in (one, other, words))
            np.copyto(out, x, where=mine)
            ufunc(x, y, out=out, where=mine & there[counts])
        for aggregator, counted, parts in self._apart:
            sides = ([from_words(side[i], dtype) for i, dtype in parts] for side in (one, other))
            both = joined(aggregator, here[counted], there[counted], *sides)
            for (i, _), part in zip(parts, both, strict=True):
                words[i] = to_words(part)
        return words

    def both(self, whole: Cut, late: Cut, split: Int64s | slice) -> Cut:
        """Return what windows need of entities of which some, at ``split``, have a recent part, too: ``late``.

        ``split``: a slice where that is all of them.
        """
        if isinstance(split, slice):
            exact, newest = np.maximum(whole.exact, late.exact), np.maximum(whole.newest, late.newest)
            return Cut(exact, newest, whole.held, self.merged(whole.words, late.words))
        exact, newest, words = whole.exact.copy(), whole.newest.copy(), whole.words.copy()
        exact[split] = np.maximum(exact[split], late.exact)
        newest[split] = np.maximum(newest[split], late.newest)
        words[:, split] = self.merged(words.take(split, axis=1), late.words)
        return Cut(exact, newest, whole.held, words)

    def rows(self, cut: Cut, earliest_us: Int64s, strings: Strings) -> Rows:
        """Return the rows of n entities. ``earliest_us``: where the first window of each begins, shape (n,) or (1,)."""
        words, held = cut.words, cut.held
        event_time_us, known_at_us = np.where(cut.newest < earliest_us, NEVER_US, cut.newest), cut.exact
        codec = self._rows
        fixed = np.empty(len(event_time_us), codec.dtype)
        texts: dict[str, Column] = {}
        valid = np.ones((len(self._finals), len(fixed)), np.bool_)
        valid[self._made] = words[self._counted] > 0
        runs = {name: fixed[name] for name in codec.dtype.names or ()}
        for f, final, there in zip(codec.features, self._finals, valid, strict=True):
            if final.finalize is None:
                values: Array = held[final.cut] if final.count is None else words[final.count]
            else:
                values, known = final.finalize(tuple(from_words(words[i], dtype) for i, dtype in final.parts))
                if known is not None:
                    there &= known
            if f.type.variable:
                word = np.where(there, values, 0)
                texts[f.name] = gather(f.type, strings.data, strings.starts + (word >> 32), word & 0xFFFFFFFF, there)
            else:
                run, at = codec.place[f.name]
                runs[run][:, at] = values
        return codec.finish(fixed, event_time_us, known_at_us, valid, texts)


class Made:
    """Rows that were made of records, each with its recent part, by the ids of both, and what was cut out of records.

    The records are not let go of before that. So what is where a record was in memory is that record, and no read has
    to look at what is in it. A row is kept only from the second time on that it is asked for: the next push makes it
    another one. ``held``: what all of it takes, in bytes.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], bytes] = {}
        self._cuts: dict[int, bytes] = {}
        self._records: list[bytes | None] = []
        self._asked: dict[int, int] = {}
        """With which recent part each record was asked for last, by the ids of both."""
        self.held = 0

    def get(self, pairs: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Return the row of each pair, None where it is not here."""
        return list(map(self._rows.get, pairs))

    def again(self, pairs: Sequence[tuple[int, int]]) -> list[int]:
        """Return which of the pairs were asked for before, as far as is remembered; all of them are from now on."""
        asked = self._asked
        again = []
        if not asked.items().isdisjoint(pairs):
            again = [i for i, (record, recent) in enumerate(pairs) if asked.get(record) == recent]
        if len(asked) > MOST_ASKED:
            asked.clear()
        asked.update(pairs)
        return again

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
