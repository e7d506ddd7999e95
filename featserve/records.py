"""Records of windowed views, to and from the bytes that a store holds, and to the rows that a plan reads.

A record is words of 8 bytes, little-endian but for the first:

    word     what
    0        as in a plain row: 0xF5, format version, a kind (2: a record), zero, fingerprint of the view
    1 2 3    the place of a row's stamp: zero, so that of two records of an entity the later written one stays
    4        the newest max(event time, known at) that was folded: a read as of an earlier instant is refused
    5 6      the newest event time that was folded, and that of the entity: later where its other part has a newer one
    7 8      events that wait to become visible; bytes of strings at the end
    9 ...    for each series, how many structs it has
    ...      the structs of each series, as ``series.Series`` says; waiting events; strings, each once

A string's word is where it starts, in bytes from the first, times 2^32, plus its length. Narrower values are widened to
int64 or float64. A read finds, for all windows of all rows at once, the struct of the first bucket by bisection, and
takes from it what stands for the whole window. What is kept in two parts (``Layout.in_parts``) is two records: a read
finds a struct in each, and merges the two. Knows no store and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from featserve.aggregates import DType
from featserve.batch import EventBatch, Int64s
from featserve.codec import MAGIC, MAX_ROW_BYTES, VERSION, RowCodec, Rows
from featserve.definitions import FeatureView
from featserve.errors import CorruptRow, TooLarge, invalid
from featserve.folding import fold, merged
from featserve.series import Events, Layout, Measure, Place, Pool, Run, Series, State, value_dtype
from featserve.types import NEVER_US, Array, Column, Mask, Type, from_us, gather
from featserve.windows import first_period, first_periods, starts

KIND = 2
EXACT, NEWEST, SEEN, WAITING, STRINGS, COUNTS = 4, 5, 6, 7, 8, 9

Coded = tuple[Int64s, Array, Mask]
"""A column of codes: the record of each, the codes, and which of them are there."""


@dataclass(frozen=True, slots=True, eq=False)
class _Parsed:
    """n records in one array of words. ``header``: shape (n, words). ``base``: where each starts, shape (n,)."""

    data: bytes
    words: Int64s
    header: Int64s
    base: Int64s
    structs: Int64s
    """Where the structs of each series start, shape (n, series), and the waiting events behind them."""

    @property
    def counts(self) -> Int64s:
        return self.header[:, COUNTS:]


class _Structs(NamedTuple):
    """The first struct of one cut in each of n records, shape (n, words), and how many are there from it on."""

    words: Int64s
    held: Int64s


class RecordCodec:
    """Encodes, decodes and reads the records of one view version over events."""

    def __init__(self, view: FeatureView) -> None:
        self.layout = Layout.of(view)
        self.rows = RowCodec(view)
        self.head = bytes([MAGIC, VERSION, KIND, 0]) + bytes.fromhex(view.hash)[:4]
        self._head_word = np.frombuffer(self.head, "<i8")[0]
        series = self.layout.series
        self._header = COUNTS + len(series)
        self._widths = np.array([s.width for s in series], np.int64)
        self._waiting_width = 3 + 2 * len(self.layout.operands)
        self._cut_series = np.array([number for number, _ in self.layout.cuts], np.int64)
        self._cut_widths = self._widths[self._cut_series]
        self.empty = self.encode(State.empty(self.layout, 1), Pool())[0]
        """The record of an entity without an event."""

    # Reading

    @np.errstate(all="ignore")  # where nothing is counted, partials are anything
    def read(
        self,
        records: Sequence[bytes | None],
        now_us: int,
        *,
        recent: Sequence[bytes | None] = (),
        as_of: bool = False,
    ) -> Rows:
        """Return n records as the rows that are served at ``now_us``.

        ``recent``: the other parts of what is kept in two, one for each record. ``as_of``: the caller asked for that
        instant. Where an event was folded after it, the read is refused then; otherwise the entity is read as of that
        event, which came while the request was under way. Raises InvalidRequest or CorruptRow.
        """
        found = [self.empty if record is None else record for record in records]
        rows = len(found)
        split = [i for i, part in enumerate(recent) if part is not None and part != self.empty]
        parsed = self._parse([*found, *(part for i in split if (part := recent[i]) is not None)])
        exact, newest = parsed.header[:rows, EXACT], parsed.header[:rows, NEWEST]
        if split:
            exact, newest = exact.copy(), newest.copy()
            exact[split] = np.maximum(exact[split], parsed.header[rows:, EXACT])
            newest[split] = np.maximum(newest[split], parsed.header[rows:, NEWEST])
        instants = None
        if exact.max() > now_us:
            if as_of:
                raise invalid(
                    "as_of",
                    f"view {self.rows.view} holds partials of events up to {from_us(int(exact.max()))}, and "
                    f"{from_us(now_us)} is before: ask for that instant or a later one",
                )
            instants = np.maximum(exact, now_us)
        if parsed.header[:, WAITING].any():
            settled = self._settled(found, parsed, now_us)
            if settled is not None:
                return self.read(settled, now_us, recent=recent)
        firsts, earliest = self._firsts(now_us, instants)
        at, held = self._bisected(parsed, firsts if instants is None else np.append(firsts, firsts[split], axis=0))
        structs = [
            _Structs(parsed.words.take(at[:, i, None] + np.arange(width), mode="clip"), held[:, i])
            for i, width in enumerate(self._cut_widths.tolist())
        ]
        if split:
            structs = [
                self._joined(self.layout.series[series], found, rows, split)
                for series, found in zip(self._cut_series.tolist(), structs, strict=True)
            ]
        columns = {
            f.name: self._feature(parsed, place, structs[place.cut], f.type)
            for f, place in zip(self.rows.features, self.layout.places, strict=True)
        }
        event_time_us = np.where(newest < earliest, NEVER_US, newest)
        fixed = np.empty(rows, self.rows.dtype)
        tail = self.rows.pack(EventBatch(columns, event_time_us, event_time_us, event_time_us), fixed)
        if tail is None or tail.offsets is None:
            return Rows(fixed, None, None)
        return Rows(fixed, tail.values, tail.offsets[:-1])

    def _settled(self, records: list[bytes], parsed: _Parsed, now_us: int) -> list[bytes] | None:
        """Return the records with the events folded that have become visible since they were written, if any have."""
        waiting = parsed.header[: len(records), WAITING]  # nothing waits in what came lately
        owner = np.repeat(np.arange(len(records)), waiting)
        at = _places(parsed.structs[: len(records), -1], waiting, self._waiting_width)
        visible = np.maximum(parsed.words[at], parsed.words[at + 1]) <= now_us
        if not visible.any():
            return None
        pool = Pool()
        rows = np.unique(owner[visible])
        state = self.decode([records[row] for row in rows.tolist()], pool)
        new = self.encode(fold(self.layout, state, Events.none(self.layout), now_us), pool)
        settled = dict(zip(rows.tolist(), new, strict=True))
        return [settled.get(i, record) for i, record in enumerate(records)]

    def _firsts(self, now_us: int, instants: Int64s | None) -> tuple[Int64s, Int64s]:
        """Return the first bucket of each cut, shape (1 or n, cuts), and the earliest start of all, shape (1 or n,)."""
        windows = [window for _, window in self.layout.cuts]
        if instants is None:
            found = np.array([first_period(window, now_us) for window in windows], np.int64)
            return found[None, :, 0], found[:, 1].min(keepdims=True)
        firsts = np.stack([first_periods(window, instants) for window in windows], axis=1)
        return firsts, np.minimum.reduce([starts(window, instants) for window in windows])

    def _bisected(self, parsed: _Parsed, firsts: Int64s) -> tuple[Int64s, Int64s]:
        """Return where the struct of the first bucket of each cut is, and how many are there from it on: (n, cuts)."""
        counts, width = parsed.counts[:, self._cut_series], self._cut_widths
        at = parsed.structs[:, self._cut_series]
        end = at + counts * width
        for power in range(int(counts.max()).bit_length() - 1, -1, -1):
            # All structs up to the one that this many further on is the last of, if that is there and before the first.
            step = width << power
            looked = at + (step - width)
            before = parsed.words.take(looked, mode="clip") < firsts
            before &= looked < end
            at = at + before * step
        return at, (end - at) // width

    def _joined(self, series: Series, structs: _Structs, rows: int, split: Sequence[int]) -> _Structs:
        """Return the structs of ``rows`` records, those behind them merged in: of the other parts of ``split``."""
        words, held = structs.words[:rows], structs.held[:rows]
        sides = []
        for part, there in ((words[split], held[split] > 0), (structs.words[rows:], structs.held[rows:] > 0)):
            columns = [_from_words(part[:, 1 + k], dtype) for k, dtype in enumerate(series.dtypes)]
            counted = len(series.operands)
            sides.append([*(column * there for column in columns[:counted]), *columns[counted:]])
        for k, column in enumerate(merged(series, *sides)):
            words[split, 1 + k] = _to_words(column)
        held[split] += structs.held[rows:]
        return _Structs(words, held)

    def _feature(self, parsed: _Parsed, place: Place, structs: _Structs, type: Type) -> Column:
        """Return one feature from the structs of its cut."""
        if place.count is None:
            return Column(type, structs.held)
        count = structs.words[:, 1 + place.count] * (structs.held > 0)
        if place.measure is None:
            return Column(type, count)
        measure, valid = place.measure, count > 0
        parts = [
            _from_words(structs.words[:, 1 + part], dtype)
            for part, dtype in zip(measure.parts, measure.aggregator.dtypes, strict=True)
        ]
        if measure.coded:
            word = np.where(valid, parts[-1], 0)
            start = 8 * (parsed.structs[:, -1] + parsed.header[:, WAITING] * self._waiting_width)
            strings = np.frombuffer(parsed.data, np.uint8)
            return gather(type, strings, start + (word >> 32), word & 0xFFFFFFFF, None if valid.all() else valid)
        values, known = measure.aggregator.finalize(tuple(parts))
        if known is not None:
            valid = valid & known
        return Column(type, values, None, None if valid.all() else valid)

    # Records as they are stored

    def _parse(self, records: Sequence[bytes]) -> _Parsed:
        """Return records as words; raises CorruptRow for what is none of this view."""
        data = b"".join(records)
        lengths = np.fromiter(map(len, records), np.int64, len(records))
        if (lengths & 7).any() or lengths.min(initial=8 * self._header) < 8 * self._header:
            raise self._corrupt(records)
        words = np.frombuffer(data, "<i8")
        base = (np.cumsum(lengths) - lengths) >> 3
        header = words.take(base[:, None] + np.arange(self._header))
        counts, waiting, strings = header[:, COUNTS:], header[:, WAITING], header[:, STRINGS]
        sizes = np.concatenate([np.full((len(records), 1), self._header), counts * self._widths], axis=1)
        structs = base[:, None] + np.cumsum(sizes, axis=1)
        whole = structs[:, -1] - base + waiting * self._waiting_width + ((strings + 7) >> 3)
        if (
            (header[:, 0] != self._head_word).any()
            or header[:, WAITING:].min(initial=0) < 0
            or (whole << 3 != lengths).any()
        ):
            raise self._corrupt(records)
        return _Parsed(data, words, header, base, structs)

    def _corrupt(self, records: Sequence[bytes]) -> CorruptRow:
        """Say which record is wrong, and how."""
        for i, record in enumerate(records):
            if problem := self._problem(record):
                return CorruptRow(f"view {self.rows.view}: stored record {i} of the batch {problem}")
        return CorruptRow(f"view {self.rows.view}: a stored record is damaged")

    def _problem(self, record: bytes) -> str | None:
        if len(record) < 8 or record[0] != MAGIC:
            return f"is not a featserve row (it starts with {record[:8].hex() or 'nothing'})"
        if record[1:4] != self.head[1:4]:
            return f"has format {record[1]}.{record[2]}, and this featserve reads format {VERSION}.{KIND}"
        if record[4:8] != self.head[4:8]:
            return f"was written under another definition (fingerprint {record[4:8].hex()}, not {self.head[4:8].hex()})"
        if len(record) < 8 * self._header:
            return f"is truncated: {len(record)} of at least {8 * self._header} bytes"
        header = np.frombuffer(record, "<i8", self._header).tolist()
        words = self._header + sum(n * s.width for n, s in zip(header[COUNTS:], self.layout.series, strict=True))
        length = 8 * (words + header[WAITING] * self._waiting_width + (header[STRINGS] + 7) // 8)
        return None if len(record) == length else f"is {len(record):,} bytes long and should be {length:,}"

    @np.errstate(all="ignore")
    def decode(self, records: Sequence[bytes], pool: Pool) -> State:
        """Return the state of n records, their strings in ``pool``; raises CorruptRow."""
        parsed = self._parse(records)
        words, entities = parsed.words, np.arange(len(records))
        strings = _Strings(parsed, self._waiting_width, pool)
        runs = []
        for i, series in enumerate(self.layout.series):
            owner = np.repeat(entities, parsed.counts[:, i])
            at = _places(parsed.structs[:, i], parsed.counts[:, i], series.width)
            columns: list[Array] = [_from_words(words[at + 1 + k], d) for k, d in enumerate(series.dtypes)]
            for measure in series.measures:
                if measure.coded:
                    last = measure.parts[-1]
                    columns[last] = strings.codes(owner, columns[last], _there(series, measure, columns))
            runs.append(Run(owner, words[at], tuple(columns)))
        return State(
            parsed.header[:, EXACT],
            parsed.header[:, NEWEST],
            parsed.header[:, SEEN],
            tuple(runs),
            self._decode_waiting(parsed, strings),
        )

    def _decode_waiting(self, parsed: _Parsed, strings: _Strings) -> Events:
        counts = parsed.header[:, WAITING]
        if not counts.any():
            return Events.none(self.layout)
        at = _places(parsed.structs[:, -1], counts, self._waiting_width)
        block = parsed.words[at[:, None] + np.arange(self._waiting_width)]
        owner = np.repeat(np.arange(len(counts)), counts)
        taken = block[:, 3::2] != 0
        values: list[Array | None] = []
        for i, operand in enumerate(self.layout.operands):
            word = block[:, 4 + 2 * i]
            if operand.of is None:
                values.append(None)
            elif operand.coded:
                values.append(strings.codes(owner, word, taken[:, i]))
            else:
                values.append(_from_words(word, value_dtype(operand)))
        return Events(owner, block[:, 0], block[:, 1], block[:, 2], taken, tuple(values))

    def encode(self, state: State, pool: Pool) -> list[bytes]:
        """Return the record of each entity. Raises TooLarge for one of over 64 MiB."""
        heap = _Heap(pool, len(state), self._coded(state))
        header = np.zeros((len(state), self._header), np.int64)
        header[:, 0] = self._head_word
        header[:, EXACT], header[:, NEWEST], header[:, SEEN] = state.exact_us, state.newest_us, state.seen_us
        header[:, WAITING], header[:, STRINGS] = np.bincount(state.waiting.owner, minlength=len(state)), heap.sizes
        for i, run in enumerate(state.runs):
            header[:, COUNTS + i] = np.bincount(run.owner, minlength=len(state))
        sizes = np.concatenate([np.full((len(state), 1), self._header), header[:, COUNTS:] * self._widths], axis=1)
        words = sizes.sum(axis=1) + header[:, WAITING] * self._waiting_width + ((heap.sizes + 7) >> 3)
        if (words > MAX_ROW_BYTES >> 3).any():
            raise TooLarge(f"view {self.rows.view}: the record of an entity would be over {MAX_ROW_BYTES >> 20} MiB")
        base = np.cumsum(words) - words
        out = np.zeros(int(words.sum()), np.int64)
        out[base[:, None] + np.arange(self._header)] = header
        self._write_structs(out, state, header, base[:, None] + np.cumsum(sizes, axis=1), heap)
        data, starts, ends = out.tobytes(), (8 * base).tolist(), (8 * (base + words)).tolist()
        return [data[start:end] for start, end in zip(starts, ends, strict=True)]

    def _write_structs(self, out: Int64s, state: State, header: Int64s, structs: Int64s, heap: _Heap) -> None:
        """Write all that is behind the headers to ``out``."""
        strings = iter(heap.words)
        for i, (series, run) in enumerate(zip(self.layout.series, state.runs, strict=True)):
            at = _places(structs[:, i], header[:, COUNTS + i], series.width)
            columns = list(run.columns)
            for measure in series.measures:
                if measure.coded:
                    columns[measure.parts[-1]] = next(strings)
            for k, column in enumerate([run.number, *columns]):
                out[at + k] = _to_words(column)
        waiting, ends = state.waiting, structs[:, -1]
        at = _places(ends, header[:, WAITING], self._waiting_width)
        for k, times in enumerate((waiting.event_time_us, waiting.known_at_us, waiting.sequence)):
            out[at + k] = times
        for i, (operand, values) in enumerate(zip(self.layout.operands, waiting.values, strict=True)):
            out[at + 3 + 2 * i] = waiting.taken[:, i]
            if values is not None:
                out[at + 4 + 2 * i] = next(strings) if operand.coded else _to_words(values)
        heap.write(out, ends + header[:, WAITING] * self._waiting_width)

    def _coded(self, state: State) -> list[Coded]:
        """Return every column of codes, in the order in which they are written."""
        found = []
        for series, run in zip(self.layout.series, state.runs, strict=True):
            for measure in series.measures:
                if measure.coded:
                    there = _there(series, measure, run.columns)
                    found.append((run.owner, run.columns[measure.parts[-1]], there))
        for i, (operand, values) in enumerate(zip(self.layout.operands, state.waiting.values, strict=True)):
            if operand.coded and values is not None:
                found.append((state.waiting.owner, values, state.waiting.taken[:, i]))
        return found


class _Strings:
    """The strings of parsed records, as codes of a pool."""

    def __init__(self, parsed: _Parsed, waiting_width: int, pool: Pool) -> None:
        self._data, self._pool = parsed.data, pool
        self._starts = 8 * (parsed.structs[:, -1] + parsed.header[:, WAITING] * waiting_width)

    def codes(self, owner: Int64s, words: Array, there: Mask) -> Int64s:
        """Return the code of each word, of the record ``owner``, that is ``there``; zero elsewhere."""
        codes = np.zeros(len(words), np.int64)
        starts = self._starts[owner[there]] + (words[there] >> 32)
        distinct, places = np.unique((starts << 27) | (words[there] & 0xFFFFFFFF), return_inverse=True)
        values = [self._data[word >> 27 : (word >> 27) + (word & 0x7FFFFFF)] for word in distinct.tolist()]
        codes[there] = self._pool.codes(values)[places]
        return codes


class _Heap:
    """The strings behind records. ``sizes``: their bytes by record. ``words``: for each column of codes, its words."""

    def __init__(self, pool: Pool, records: int, coded: Sequence[Coded]) -> None:
        values = pool.values() if coded else []
        lengths = np.fromiter(map(len, values), np.int64, len(values))
        many = max(len(values), 1)
        keys = [owner[there] * many + codes[there] for owner, codes, there in coded]
        distinct = np.unique(np.concatenate(keys)) if keys else np.zeros(0, np.int64)
        self._owner, self._codes = distinct // many, distinct % many
        sizes = lengths[self._codes]
        ends = np.cumsum(sizes)
        self.sizes = np.zeros(records, np.int64)
        np.add.at(self.sizes, self._owner, sizes)
        starts = ends - sizes - (np.cumsum(self.sizes) - self.sizes)[self._owner]
        self.words = []
        for key, (_, _, there) in zip(keys, coded, strict=True):
            place = np.searchsorted(distinct, key)
            words = np.zeros(len(there), np.int64)
            words[there] = (starts[place] << 32) | sizes[place]
            self.words.append(words)
        self._bytes = b"".join([values[code] for code in self._codes.tolist()])

    def write(self, out: Int64s, starts: Int64s) -> None:
        """Write the strings of each record to ``out`` from the word ``starts`` on, shape (records,)."""
        at = _places(8 * starts, self.sizes, 1)
        out.view(np.uint8)[at] = np.frombuffer(self._bytes, np.uint8)


def _there(series: Series, measure: Measure, columns: Sequence[Array]) -> Mask:
    """Return which structs hold partials of a measure."""
    if series.distinct is not None:
        return np.ones(len(columns[0]), np.bool_)
    return columns[measure.count] > 0


def _places(starts: Int64s, counts: Int64s, width: int) -> Int64s:
    """Return where each struct of each run is: ``counts`` of them from each of ``starts`` on, ``width`` apart."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before * width, counts) + np.arange(int(counts.sum())) * width


def _from_words(words: Int64s, dtype: DType) -> Array:
    if dtype.kind == "f":
        return words.view(np.float64).astype(dtype, copy=False)
    return words != 0 if dtype.kind == "b" else words.astype(dtype, copy=False)


def _to_words(values: Array) -> Int64s:
    if values.dtype.kind == "f":
        return values.astype(np.float64, copy=False).view(np.int64)
    return values.astype(np.int64, copy=False)
