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
int64 or float64. A read finds, for all windows of all rows at once, the struct of the first bucket: by counting where
each bucket has one, else by bisection. It takes from it the words that stand for the whole window, of which ``finals``
makes rows. What is kept in two parts (``Layout.in_parts``) is two records: a read finds a struct in each, and merges
the two. Rows are kept, and served again, until a first bucket moves on. Knows no store and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from featserve.batch import Int64s
from featserve.codec import MAGIC, MAX_ROW_BYTES, VERSION, RowCodec, Rows
from featserve.definitions import FeatureView, Rolling
from featserve.errors import CorruptRow, InvalidRequest, TooLarge, invalid
from featserve.finals import NO_STRINGS, Cut, Finals, Made, Strings, from_words, to_words
from featserve.folding import filled, fold
from featserve.series import Events, Layout, Pool, Run, State, value_dtype
from featserve.types import Array, Mask, from_us
from featserve.windows import first_period, first_periods, starts

KIND = 2
EXACT, NEWEST, SEEN, WAITING, STRINGS, COUNTS = 4, 5, 6, 7, 8, 9
HELD_BYTES = 32 << 20
"""What the rows of a view that are kept take at most, with the records that they were made of."""

Coded = tuple[Int64s, Array, Mask]
"""A column of codes: the record of each, the codes, and which of them are there."""


@dataclass(frozen=True, slots=True, eq=False)
class _Parsed:
    """n records in one array of ``words``, with zeros behind them. ``header``: shape (words of it, n)."""

    data: bytes
    words: Int64s
    header: Int64s
    structs: Int64s
    """Where the structs of each series start, and the waiting events behind them: shape (series + 1, n)."""
    strings: Int64s
    """Where the strings of each start, in bytes, shape (n,)."""

    @property
    def counts(self) -> Int64s:
        return self.header[COUNTS:]


class _Firsts(NamedTuple):
    """The first bucket of each cut, shape (cuts, 1), and the earliest start, at any instant from one up to another.

    ``made``: the rows that records were read as.
    """

    since_us: int
    until_us: int
    firsts: Int64s
    earliest: Int64s
    made: Made


class RecordCodec:
    """Encodes, decodes and reads the records of one view version over events."""

    def __init__(self, view: FeatureView) -> None:
        self.layout = Layout.of(view)
        self.rows = RowCodec(view)
        self.head = bytes([MAGIC, VERSION, KIND, 0]) + bytes.fromhex(view.hash)[:4]
        self._head_word = np.frombuffer(self.head, "<i8")[0]
        series = self.layout.series
        self._header = COUNTS + len(series)
        self._header_places = np.arange(self._header)[:, None]
        self._widths = np.array([s.width for s in series], np.int64)
        self._waiting_width = 3 + 2 * len(self.layout.operands)
        self._nothing = bytes(8 * int(self._widths.max()))
        self._cut_series = np.array([number for number, _ in self.layout.cuts], np.int64)
        self._cut_widths: Int64s = self._widths[self._cut_series, None]
        self._shared = np.flatnonzero([series[number].distinct is not None for number in self._cut_series])
        """The cuts of which a bucket may have many structs."""
        self._finals = Finals(self.layout, self.rows)
        self._kept = _Firsts(0, 0, np.zeros((0, 1), np.int64), np.zeros(1, np.int64), Made())
        rolls = any(isinstance(window, Rolling) for _, window in self.layout.cuts)
        self._lasting = not (rolls or self.rows.variable)
        """Whether rows are kept with the first buckets: not where those are others each microsecond."""
        self._cuts = self._lasting and self.layout.in_parts and self.layout.long
        """Whether what windows need of records is kept, too: where they are long, and pushes leave them as they are."""
        self.empty = self.encode(State.empty(self.layout, 1), Pool())[0]
        """The record of an entity without an event."""

    # Reading

    def read(
        self,
        records: Sequence[bytes | None],
        now_us: int,
        *,
        recent: Sequence[bytes | None] = (),
        as_of: bool = False,
    ) -> Rows:
        """Return n records as the rows that are served at ``now_us``, each known at the newest event in it.

        ``recent``: the other parts of what is kept in two, one for each record. ``as_of``: the caller asked for that
        instant. Where an event was folded after it, the read is refused then; otherwise the entity is read as of that
        event, which came while the request was under way. Raises InvalidRequest or CorruptRow.
        """
        recent = recent or [None] * len(records)
        if not self._lasting:
            return self._read(records, recent, now_us, as_of)[0]
        made = self._at(now_us).made
        pairs = list(zip(map(id, records), map(id, recent), strict=True))
        rows: Any = made.get(pairs)
        if None in rows:
            if not any(rows):
                return self._make(made, pairs, records, recent, now_us, as_of)
            missing = [i for i, row in enumerate(rows) if row is None]
            try:
                new: Any = [[column[i] for i in missing] for column in (pairs, records, recent)]
                fresh = self._make(made, new[0], new[1], new[2], now_us, as_of)
            except (CorruptRow, InvalidRequest):
                self._read(records, recent, now_us, as_of)  # says it of the whole batch
                raise
            for i, row in zip(missing, self.rows.join(fresh.fixed, None), strict=True):
                rows[i] = row
        decoded = self.rows.decode(rows)
        if decoded.known_by(now_us):
            return decoded
        return self._read(records, recent, now_us, as_of)[0]  # an event came, and was read, after this instant

    def _make(
        self,
        made: Made,
        pairs: Sequence[tuple[int, int]],
        records: Sequence[bytes | None],
        recent: Sequence[bytes | None],
        now_us: int,
        as_of: bool,
    ) -> Rows:
        """Return what ``_read`` does, and keep what lasts and was asked for before."""
        fresh, lasts = self._read(records, recent, now_us, as_of)
        if lasts and (again := made.again(pairs)):
            old: Any = [[column[i] for i in again] for column in (pairs, records, recent)]
            made.add(old[0], old[1], old[2], self.rows.join(fresh.fixed[again], None))
        return fresh

    @np.errstate(all="ignore")  # where nothing is counted, partials are anything
    def _read(
        self, records: Sequence[bytes | None], recent: Sequence[bytes | None], now_us: int, as_of: bool = False
    ) -> tuple[Rows, bool]:
        """Return what ``read`` does, and whether the rows stay the same until a first bucket moves on."""
        found: Any = records if all(records) else [self.empty if record is None else record for record in records]
        split: Int64s | slice = slice(None)
        lately: Any = recent
        if not all(recent) or self.empty in recent:
            parted = [i for i, part in enumerate(recent) if part is not None and part != self.empty]
            split, lately = np.array(parted, np.int64), [recent[i] for i in parted]
        kept = self._at(now_us)
        with suppress(CorruptRow):  # which one of all it is, is said of all
            if self._cuts and (whole := self._whole(found, kept)) is not None:
                late = self._cut(self._parse(lately), kept.firsts) if lately else None
                cut = whole if late is None else self._finals.both(whole, late, split)
                if np.maximum.reduce(cut.exact) <= now_us:
                    return self._finals.rows(cut, kept.earliest, NO_STRINGS), True
        return self._read_again(found, split, lately, now_us, as_of)

    def _read_again(
        self, found: Sequence[bytes], split: Int64s | slice, lately: Sequence[bytes], now_us: int, as_of: bool
    ) -> tuple[Rows, bool]:
        """Return what ``_read`` does, of whole records. ``lately``: the recent parts of the entities ``split``."""
        rows = len(found)
        parsed = self._parse([*found, *lately])
        exact = parsed.header[EXACT, :rows].copy()
        if lately:
            exact[split] = np.maximum(exact[split], parsed.header[EXACT, rows:])
        instants = None
        if np.maximum.reduce(exact) > now_us:
            if as_of:
                raise invalid(
                    "as_of",
                    f"view {self.rows.view} holds partials of events up to {from_us(int(exact.max()))}, and "
                    f"{from_us(now_us)} is before: ask for that instant or a later one",
                )
            instants = np.maximum(exact, now_us)
        waits = bool(np.count_nonzero(parsed.header[WAITING]))
        if waits:
            settled = self._settled(found, parsed, now_us)
            if settled is not None:
                return self._read_again(settled, split, lately, now_us, as_of=False)[0], False
        kept = self._at(now_us)
        firsts, earliest = kept.firsts, kept.earliest
        if instants is not None:
            firsts, earliest = self._each_at(instants)
            if lately:
                firsts = np.append(firsts, firsts[:, split], axis=1)
        cut = self._cut(parsed, firsts)
        if lately:
            cut = self._finals.both(cut.part(slice(rows)), cut.part(slice(rows, None)), split)
        strings = Strings(np.frombuffer(parsed.data, np.uint8), parsed.strings)
        made = self._finals.rows(cut, earliest, strings)
        return made, instants is None and not waits

    def _whole(self, records: Sequence[bytes], kept: _Firsts) -> Cut | None:
        """Return what the windows of now need of records, kept or cut out of them; None where an event waits."""
        cuts = kept.made.cuts(records)
        if None in cuts:
            new = list({id(record): record for record, cut in zip(records, cuts, strict=True) if cut is None}.values())
            parsed = self._parse(new)
            if np.count_nonzero(parsed.header[WAITING]):
                return None
            cut = self._cut(parsed, kept.firsts)
            table = np.concatenate([cut.exact[None], cut.newest[None], cut.held, cut.words]).T.copy()
            kept.made.add_cuts(new, table.view(f"V{8 * table.shape[1]}").ravel().tolist())
            cuts = kept.made.cuts(records)
        joined = np.frombuffer(b"".join(cuts), np.int64)  # type: ignore[arg-type]
        table = joined.reshape(len(records), -1).T.copy()
        windows = len(self.layout.cuts)
        return Cut(table[0], table[1], table[2 : 2 + windows], table[2 + windows :])

    def _cut(self, parsed: _Parsed, firsts: Int64s) -> Cut:
        """Return what windows need of records, where ``firsts`` are their first buckets."""
        at, held = self._found(parsed, firsts)
        words = parsed.words.take(at[self._finals.cuts] + self._finals.offsets, mode="clip")
        return Cut(parsed.header[EXACT], parsed.header[NEWEST], held, words)

    def _settled(self, records: Sequence[bytes], parsed: _Parsed, now_us: int) -> list[bytes] | None:
        """Return the records with the events folded that have become visible since they were written, if any have."""
        waiting = parsed.header[WAITING, : len(records)]  # nothing waits in what came lately
        owner = np.repeat(np.arange(len(records)), waiting)
        at = _places(parsed.structs[-1, : len(records)], waiting, self._waiting_width)
        visible = np.maximum(parsed.words[at], parsed.words[at + 1]) <= now_us
        if not visible.any():
            return None
        pool = Pool()
        rows = np.unique(owner[visible])
        state = self.decode([records[row] for row in rows.tolist()], pool)
        new = self.encode(fold(self.layout, state, Events.none(self.layout), now_us), pool)
        settled = dict(zip(rows.tolist(), new, strict=True))
        return [settled.get(i, record) for i, record in enumerate(records)]

    def _at(self, now_us: int) -> _Firsts:
        """Return the first bucket of each cut at an instant, as it is kept until one of them moves on."""
        kept = self._kept
        if not kept.since_us <= now_us < kept.until_us or kept.made.held > HELD_BYTES:
            numbers, begins, ends = zip(*(first_period(window, now_us) for _, window in self.layout.cuts), strict=True)
            firsts = np.array(numbers, np.int64)[:, None]
            kept = self._kept = _Firsts(now_us, min(ends), firsts, np.array([min(begins)], np.int64), Made())
        return kept

    def _each_at(self, instants: Int64s) -> tuple[Int64s, Int64s]:
        """Return the first bucket of each cut at each instant, shape (cuts, n), and the earliest start of each."""
        windows = [window for _, window in self.layout.cuts]
        firsts = np.stack([first_periods(window, instants) for window in windows])
        return firsts, np.minimum.reduce([starts(window, instants) for window in windows])

    def _found(self, parsed: _Parsed, firsts: Int64s) -> tuple[Int64s, Int64s]:
        """Return where the struct of the first bucket of each cut is, that of zeros where there is none: (cuts, n).

        And how many structs there are from it on, of the same shape.
        """
        words, width = parsed.words, self._cut_widths
        counts, begin = parsed.counts[self._cut_series], parsed.structs[self._cut_series]
        low, high = self._bracket(words, counts, begin, firsts)
        for power in range(int(np.maximum.reduce(high - low, axis=None)).bit_length() - 1, -1, -1):
            # All structs up to the one that is this many further on, if it is there and before the first bucket.
            looked = low + ((1 << power) - 1)
            before = words.take(begin + looked * width, mode="clip") < firsts
            before &= looked < high
            low += before.astype(np.int64) << power
        held = counts - low
        return np.where(held > 0, begin + low * width, len(words) - width), held

    def _bracket(self, words: Int64s, counts: Int64s, begin: Int64s, firsts: Int64s) -> tuple[Int64s, Int64s]:
        """Return between which structs of each cut the first of its bucket, or of a later one, is: both (cuts, n).

        Where each bucket has one struct, that is at most as far from an end of the series as their numbers are apart:
        what is left are as many structs as buckets between the ends have none, and none at all where all have.
        """
        end = counts - 1
        first = words.take(begin, mode="clip")
        last = words.take(begin + end * self._cut_widths, mode="clip")
        # Unsigned, as two numbers may be further apart than int64 tells.
        ahead = (np.maximum(first, firsts) - first).view(np.uint64)
        behind = (np.maximum(last, firsts) - firsts).view(np.uint64)
        high = np.minimum(ahead, counts.view(np.uint64)).view(np.int64)
        low = np.maximum(end - np.minimum(behind, counts.view(np.uint64)).view(np.int64), 0)
        if len(self._shared):
            low[self._shared], high[self._shared] = 0, counts[self._shared]
        return low, high

    # Records as they are stored

    def _parse(self, records: Sequence[bytes]) -> _Parsed:
        """Return records as words; raises CorruptRow for what is none of this view."""
        data = b"".join([*records, self._nothing])
        if len(data) & 7:
            raise self._corrupt(records)
        ends = np.fromiter(map(len, records), np.int64, len(records)).cumsum()
        words = np.frombuffer(data, "<i8")
        base = np.zeros(len(records), np.int64)
        base[1:] = ends[:-1] >> 3
        header = words.take(base + self._header_places, mode="clip")
        sizes = np.empty((len(self._widths) + 1, len(records)), np.int64)
        np.add(base, self._header, out=sizes[0])
        np.multiply(header[COUNTS:], self._widths[:, None], out=sizes[1:])
        structs = sizes.cumsum(axis=0)
        strings = (structs[-1] + header[WAITING] * self._waiting_width) << 3
        # The first record that is shorter than its header is not as long as that says.
        wrong = header[0] != self._head_word
        wrong |= strings + ((header[STRINGS] + 7) & -8) != ends
        if np.count_nonzero(wrong) or np.count_nonzero(header[WAITING:] < 0):
            raise self._corrupt(records)
        return _Parsed(data, words, header, structs, strings)

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
        strings = _Strings(parsed, pool)
        runs = []
        for i, series in enumerate(self.layout.series):
            owner = np.repeat(entities, parsed.counts[i])
            at = _places(parsed.structs[i], parsed.counts[i], series.width)
            columns: list[Array] = [from_words(words[at + 1 + k], d) for k, d in enumerate(series.dtypes)]
            for measure in series.measures:
                if measure.coded:
                    last = measure.parts[-1]
                    columns[last] = strings.codes(owner, columns[last], series.there(measure, columns))
            runs.append(Run(owner, words[at], tuple(columns)))
        return State(
            parsed.header[EXACT],
            parsed.header[NEWEST],
            parsed.header[SEEN],
            tuple(runs),
            self._decode_waiting(parsed, strings),
        )

    def _decode_waiting(self, parsed: _Parsed, strings: _Strings) -> Events:
        counts = parsed.header[WAITING]
        if not counts.any():
            return Events.none(self.layout)
        at = _places(parsed.structs[-1], counts, self._waiting_width)
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
                values.append(from_words(word, value_dtype(operand)))
        return Events(owner, block[:, 0], block[:, 1], block[:, 2], taken, tuple(values))

    def encode(self, state: State, pool: Pool) -> list[bytes]:
        """Return the record of each entity. Raises TooLarge for one of over 64 MiB."""
        runs = [filled(series, run) for series, run in zip(self.layout.series, state.runs, strict=True)]
        state = replace(state, runs=tuple(runs))
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
                out[at + k] = to_words(column)
        waiting, ends = state.waiting, structs[:, -1]
        at = _places(ends, header[:, WAITING], self._waiting_width)
        for k, times in enumerate((waiting.event_time_us, waiting.known_at_us, waiting.sequence)):
            out[at + k] = times
        for i, (operand, values) in enumerate(zip(self.layout.operands, waiting.values, strict=True)):
            out[at + 3 + 2 * i] = waiting.taken[:, i]
            if values is not None:
                out[at + 4 + 2 * i] = next(strings) if operand.coded else to_words(values)
        heap.write(out, ends + header[:, WAITING] * self._waiting_width)

    def _coded(self, state: State) -> list[Coded]:
        """Return every column of codes, in the order in which they are written."""
        found = []
        for series, run in zip(self.layout.series, state.runs, strict=True):
            for measure in series.measures:
                if measure.coded:
                    there = series.there(measure, run.columns)
                    found.append((run.owner, run.columns[measure.parts[-1]], there))
        for i, (operand, values) in enumerate(zip(self.layout.operands, state.waiting.values, strict=True)):
            if operand.coded and values is not None:
                found.append((state.waiting.owner, values, state.waiting.taken[:, i]))
        return found


class _Strings:
    """The strings of parsed records, as codes of a pool."""

    def __init__(self, parsed: _Parsed, pool: Pool) -> None:
        self._data, self._starts, self._pool = parsed.data, parsed.strings, pool

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


def _places(starts: Int64s, counts: Int64s, width: int) -> Int64s:
    """Return where each struct of each run is: ``counts`` of them from each of ``starts`` on, ``width`` apart."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before * width, counts) + np.arange(int(counts.sum())) * width
