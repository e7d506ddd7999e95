"""Batches of rows and keys, to and from the bytes that a store holds.

A row is a fixed part, the same length for every row of a view version, then the bytes of its strings:

    offset  bytes              what
    0       1                  0xF5
    1       1                  format version, 1
    2       2                  zero
    4       4                  fingerprint: the first 4 bytes of the view's content hash
    8       8 + 8 + 8          event time, known at, sequence: the row's stamp
    32      8 * ceil(F / 64)   validity: bit i % 64 of word i / 64 is 0 where feature i, as declared, is null
    ...                        float64s; int64s and timestamps; float32s and vectors; int32s; bools
    ...     4 * S              where each string or bytes value ends, counted from the end of the fixed part
    ...                        the bytes of the strings, in declared order

The header, up to and with the validity, is big-endian words of 8 bytes; the rest is little-endian. The stamp's three
int64 have the sign bit flipped, so that a store orders rows by comparing ``row[8:32]`` as bytes and needs to know
nothing else of them. As every word of an ordinary row lies in a known range (the right fingerprint, times that are
visible now, every feature valid), one comparison of all words tells that a batch is ordinary. A null's place holds the
feature's default (NaN, zero or nothing where it has none), so reading needs no pass for nulls.

A key is the view's prefix, then its key columns in order: big-endian integers; strings with their length in front, but
for the last column, which ends where the key ends. Equal keys are equal values; different values never collide.

Batches are encoded and decoded as arrays; nothing here touches one cell at a time. Knows no store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from featserve.batch import EventBatch, Int64s
from featserve.definitions import FeatureView, Field
from featserve.errors import CorruptRow, TooLarge, invalid
from featserve.types import Array, Bytes, Column, Mask, Type, column, concat, gather

MAGIC = 0xF5
VERSION = 1
STAMP = slice(8, 32)
PREFIX_BYTES = 8
MAX_KEY_BYTES = 4_096
MAX_ROW_BYTES = 64 << 20
MAX_STRINGS_BYTES = 256 << 20
"""The most that the strings of one view may take in one answer: a request can name a large row ten thousand times."""
BLOCK_ROWS = 4_096
"""Rows encoded at once: a block stays in the processor's cache while its columns are written across it."""
FEW = 8
"""So many keys take no longer one by one than as an array."""

_SIGN = np.uint64(1 << 63)
_RAW = {width: np.dtype(f"V{width}") for width in (1, 4, 8, 9, 12, 16)}
_INTEGER = {width: np.dtype(f"<i{width}") for width in (1, 4, 8)}
_PREFIXED = {width: np.dtype([("prefix", np.uint64), ("key", f">i{width}")]) for width in (1, 4, 8)}
# One run of values for each stored dtype, widest first.
_RUNS = ("<f8", "<i8", "<f4", "<i4", "|b1")


def key_prefix(view: FeatureView, kind: str = "") -> bytes:
    """Return the 8 bytes that start every key of a view version: a hash of its name, version and content hash.

    ``kind``: what is kept of it beside its rows.
    """
    return hashlib.sha256(f"{view.id}:{view.hash}{kind}".encode()).digest()[:PREFIX_BYTES]


def encode_keys(columns: Sequence[Column]) -> list[bytes]:
    """Return the keys of n entities, without a prefix, from their key columns in the entity's order."""
    last = len(columns) - 1
    parts = [_key_part(col, i == last) for i, col in enumerate(columns)]
    return parts[0] if last == 0 else [b"".join(part) for part in zip(*parts, strict=True)]


def keys_under(columns: Sequence[Column]) -> Callable[[bytes], list[bytes]]:
    """Return what gives the keys of n entities as a store has them, under a prefix; see ``encode_keys``."""
    first = columns[0]
    if len(columns) == 1 and first.offsets is None:
        few = len(first.values) < FEW
        return integers_under(first.values.tobytes(), first.values.itemsize) if few else _under(first.values)
    keys = encode_keys(columns)
    return lambda prefix: [prefix + key for key in keys]


def integers_under(raw: bytes, width: int) -> Callable[[bytes], list[bytes]]:
    """Return what gives the keys of n entities under a prefix, from ``raw``: n integers of ``width`` bytes each."""
    if len(raw) == width:
        one = raw[::-1]
        return lambda prefix: [prefix + one]
    if len(raw) < FEW * width:
        few = [raw[at : at + width][::-1] for at in range(0, len(raw), width)]
        return lambda prefix: [prefix + key for key in few]
    return _under(np.frombuffer(raw, _INTEGER[width]))


def _under(values: Array) -> Callable[[bytes], list[bytes]]:
    """Return the same from many numbers: whole keys are made as one array."""
    whole = np.empty(len(values), _PREFIXED[values.itemsize])
    whole["key"] = values

    def under(prefix: bytes) -> list[bytes]:
        whole["prefix"] = np.frombuffer(prefix, np.uint64)
        made: list[bytes] = whole.view(_RAW[whole.itemsize]).tolist()
        return made

    return under


def _key_part(col: Column, last: bool) -> list[bytes]:
    if col.offsets is None:
        if len(col.values) == 1:
            return [col.values.tobytes()[::-1]]
        raw: list[bytes] = col.values.byteswap().view(_RAW[col.values.itemsize]).tolist()
        return raw
    values = col.to_bytes_list()
    if last:
        return values
    return [len(v).to_bytes(4, "big") + v for v in values]


def key_ranks(columns: Sequence[Column]) -> Array:
    """Return numbers of shape (n,) that compare as the keys of the n entities do."""
    first = columns[0]
    if len(columns) == 1 and first.offsets is None:
        return first.values.view(f"u{first.values.itemsize}")
    keys = encode_keys(columns)
    ranks = {key: i for i, key in enumerate(sorted(set(keys)))}
    return np.fromiter(map(ranks.__getitem__, keys), np.int64, len(keys))


def check_key_sizes(columns: Mapping[str, Column], first_row: int = 0) -> None:
    """Refuse a key value over 4,096 bytes, naming its column and, counted from ``first_row``, its row."""
    for name, col in columns.items():
        if col.offsets is not None and len(col.values) > MAX_KEY_BYTES:
            lengths = np.diff(col.offsets)
            row = int(np.argmax(lengths))
            if lengths[row] > MAX_KEY_BYTES:
                raise invalid(
                    f"keys.{name}",
                    f"row {first_row + row} is {lengths[row]:,} bytes long; the most is {MAX_KEY_BYTES:,}",
                )


def event_time_us(row: bytes) -> int:
    """Return the event time of one row, int64 microseconds."""
    return int.from_bytes(row[8:16], "big") - 2**63


class RowCodec:
    """Encodes and decodes the rows of one view version."""

    def __init__(self, view: FeatureView) -> None:
        self.view = view.id
        self.features = tuple(view.features)
        fixed = [(f, f.type.dtype.str) for f in self.features if f.type.dtype is not None]
        runs = {run: [f for f, dtype in fixed if dtype == run] for run in _RUNS}
        self.runs = {run: members for run, members in runs.items() if members}
        self.variable: tuple[str, ...] = tuple(f.name for f in self.features if f.type.variable)
        self.place: dict[str, tuple[str, int]] = {}
        """Where a feature is: its run and its first element there; for strings "ends" and its number."""
        words = 4 + (len(self.features) + 63) // 64
        fields: list[tuple[Any, ...]] = [("words", ">u8", (words,))]
        for run, members in self.runs.items():
            at = 0
            for f in members:
                self.place[f.name] = (run, at)
                at += f.type.length
            fields.append((run, run, (at,)))
        for i, name in enumerate(self.variable):
            self.place[name] = ("ends", i)
        if self.variable:
            fields.append(("ends", "<u4", (len(self.variable),)))
        self.dtype = np.dtype(fields)
        self.width = self.dtype.itemsize
        self.head = bytes([MAGIC, VERSION, 0, 0]) + bytes.fromhex(view.hash)[:4]
        ones = np.ones((1, len(self.features)), np.bool_)
        self.all_valid = _pack(ones)[0].astype(">u8").tobytes()
        """The validity of an ordinary row, as it is stored."""
        self.lowest = np.concatenate([_words(self.head), np.zeros(3, np.uint64), _pack(ones)[0]])
        """The least header of an ordinary row: uint64 of shape (words,)."""
        self.span = np.zeros_like(self.lowest)
        """How far above it each word may be, times left aside: uint64 of shape (words,)."""
        self.span[1:4] = 2**64 - 1
        self.defaults = {f.name: column(f.type, [f.value(f.default)]) for f in self.features if f.default is not None}
        nothing = np.zeros(1, np.int64)
        self.absent = self.encode(
            EventBatch({f.name: _nulls(f.type) for f in self.features}, nothing, nothing, nothing)
        )[0]
        """The row that stands for one that does not exist: every feature null, its default in its place."""

    def encode(self, batch: EventBatch) -> list[bytes]:
        """Return the n rows of ``batch``, whose columns are of the view's types."""
        rows: list[bytes] = []
        fixed = np.empty(min(len(batch), BLOCK_ROWS), self.dtype)
        for start in range(0, len(batch), BLOCK_ROWS):
            part = fixed[: len(batch) - start]
            rows += self.join(part, self._pack_block(batch, slice(start, start + len(part)), part))
        return rows

    def pack(self, batch: EventBatch, fixed: Array) -> Column | None:
        """Write the fixed parts of the n rows of ``batch`` to ``fixed``; return what follows each, if strings do.

        ``fixed``: of ``dtype`` and shape (n,). ``join`` makes rows of both, or of the same places of both.
        """
        tails = [
            self._pack_block(batch, slice(start, start + BLOCK_ROWS), fixed[start : start + BLOCK_ROWS])
            for start in range(0, len(batch), BLOCK_ROWS)
        ]
        return concat([tail for tail in tails if tail is not None]) if self.variable else None

    def join(self, fixed: Array, tail: Column | None) -> list[bytes]:
        """Return the rows that ``pack`` took apart."""
        starts: list[bytes] = fixed.view(f"V{self.width}").tolist()
        return starts if tail is None else list(map(bytes.__add__, starts, tail.to_bytes_list()))

    def _pack_block(self, batch: EventBatch, block: slice, fixed: Array) -> Column | None:
        words = fixed["words"]
        words[:, 0] = self.lowest[0]
        for i, times in enumerate((batch.event_time_us, batch.known_at_us, batch.sequence)):
            words[:, i + 1] = times[block].view(np.uint64) ^ _SIGN
        words[:, 4:] = self.lowest[4:]
        nulls = [(i, valid) for i, f in enumerate(self.features) if (valid := batch.columns[f.name].valid) is not None]
        if nulls:
            validity = np.ones((len(fixed), len(self.features)), np.bool_)
            for i, valid in nulls:
                validity[:, i] = valid[block]
            words[:, 4:] = _pack(validity)
        for run, members in self.runs.items():
            values = fixed[run]
            for f in members:
                _, at = self.place[f.name]
                place = slice(at, at + f.type.length) if f.type.vector else at
                values[:, place] = self._filled(f, batch.columns[f.name], block)
        return self._pack_strings(fixed, batch.columns, block) if self.variable else None

    def finish(
        self, fixed: Array, event_time_us: Int64s, known_at_us: Int64s, valid: Mask, strings: Mapping[str, Column]
    ) -> Rows:
        """Return rows that are made in place: ``fixed`` of ``dtype`` and shape (n,), all but its heads and strings.

        They have no sequence. ``valid``: of shape (features, n); in the places of nulls of fixed width may be anything.
        """
        words = fixed["words"]
        words[:, 0] = self.lowest[0]
        words[:, 1] = event_time_us.view(np.uint64) ^ _SIGN
        words[:, 2] = known_at_us.view(np.uint64) ^ _SIGN
        words[:, 3] = _SIGN
        if np.count_nonzero(valid) == valid.size:
            words[:, 4:] = self.lowest[4:]
        else:
            words[:, 4:] = _pack(valid.T)
            for f, there in zip(self.features, valid, strict=True):
                if not (f.type.variable or there.all()):
                    run, at = self.place[f.name]
                    fixed[run][~there, at : at + f.type.length] = self._filler(f)
        if not self.variable:
            return Rows(fixed, None, None)
        tail = self._pack_strings(fixed, strings, slice(0, len(fixed)))
        assert tail.offsets is not None
        return Rows(fixed, tail.values, tail.offsets[:-1])

    def _filled(self, f: Field, col: Column, block: slice) -> Array:
        """Return the block's values with the default, NaN or zero in the place of the nulls."""
        values = col.values[block]
        if col.valid is None:
            return values
        valid = col.valid[block]
        filler = np.asarray(self._filler(f), values.dtype)
        return np.where(valid[:, None] if f.type.vector else valid, values, filler)

    def _filler(self, f: Field) -> Any:
        """Return what stands in the place of a null."""
        default = self.defaults.get(f.name)
        return default.values[0] if default is not None else np.nan if f.type.floating else 0

    def _pack_strings(self, fixed: Array, columns: Mapping[str, Column], block: slice) -> Column:
        """Return the bytes of the strings of each row, interleaved in one gather; write where they end to ``fixed``."""
        pools: list[Array] = []
        base = 0
        shape = (len(fixed), len(self.variable))
        starts, lengths = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, name in enumerate(self.variable):
            col = columns[name]
            assert col.offsets is not None
            first, stop = col.offsets[:-1][block], col.offsets[1:][block]
            data = col.values[first[0] : stop[-1]]
            filler = self.defaults[name].values if name in self.defaults else np.zeros(0, np.uint8)
            begin, length = first - first[0], stop - first
            if col.valid is not None:
                begin = np.where(col.valid[block], begin, len(data))
                length = np.where(col.valid[block], length, len(filler))
            starts[:, i], lengths[:, i] = begin + base, length
            pools += [data, filler]
            base += len(data) + len(filler)
        ends = np.cumsum(lengths, axis=1)
        if int(ends[:, -1].max()) > MAX_ROW_BYTES:
            row = block.start + int(ends[:, -1].argmax())
            raise invalid(f"rows[{row}]", f"its strings are over {MAX_ROW_BYTES >> 20} MiB together")
        fixed["ends"] = ends
        joined = gather(Bytes, np.concatenate(pools), starts.ravel(), lengths.ravel())
        assert joined.offsets is not None
        return Column(Bytes, joined.values, joined.offsets[:: len(self.variable)])

    def decode(self, rows: Sequence[bytes]) -> Rows:
        """Return ``rows`` as arrays.

        Raises CorruptRow for a row that is truncated, and TooLarge for strings that take over 256 MiB. The heads of the
        rows are not looked at: ``check_heads`` does, or the caller.
        """
        width = self.width
        if not self.variable:
            data = b"".join(rows)
            if len(data) != len(rows) * width or not all(rows):  # one too long moves the head of another
                raise self.corrupt(rows)
            return Rows(np.frombuffer(data, self.dtype), None, None)
        data = b"".join([row[:width] for row in rows])
        if len(data) != len(rows) * width:
            raise self.corrupt(rows)
        fixed = np.frombuffer(data, self.dtype)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows)) - width
        ends = fixed["ends"]
        if (ends[:, -1] != lengths).any() or (ends.shape[1] > 1 and (ends[:, 1:] < ends[:, :-1]).any()):
            raise self.corrupt(rows)
        if (size := int(lengths.sum())) > MAX_STRINGS_BYTES:
            raise TooLarge(
                f"view {self.view}: the strings of {len(rows):,} rows take {size:,} bytes; the most in one answer is "
                f"{MAX_STRINGS_BYTES:,}. Ask for fewer rows"
            )
        strings = np.frombuffer(b"".join([row[width:] for row in rows]), np.uint8)
        return Rows(fixed, strings, np.cumsum(lengths) - lengths)

    def check_heads(self, decoded: Rows, rows: Sequence[bytes]) -> None:
        """Raise CorruptRow where a row is foreign: of another definition, another format, or no row at all."""
        if (decoded.fixed["words"][:, 0] != self.lowest[0]).any():
            raise self.corrupt(rows)

    def corrupt(self, rows: Sequence[bytes]) -> CorruptRow:
        """Say which row is wrong, and how."""
        for i, row in enumerate(rows):
            problem = self._problem(row)
            if problem:
                return CorruptRow(
                    f"view {self.view}: stored row {i} of the batch {problem}; materialize the view again"
                )
        return CorruptRow(f"view {self.view}: a stored row is damaged; materialize the view again")

    def _problem(self, row: bytes) -> str | None:
        if len(row) < 8 or row[0] != MAGIC:
            return f"is not a featserve row (it starts with {row[:8].hex() or 'nothing'})"
        if row[1] != VERSION:
            return f"has row format {row[1]}, and this featserve reads format {VERSION}"
        head = self.head
        if row[4:8] != head[4:8]:
            return f"was written under another definition (fingerprint {row[4:8].hex()}, not {head[4:8].hex()})"
        if len(row) < self.width:
            return f"is truncated: {len(row)} of {self.width} bytes"
        ends = np.frombuffer(row[: self.width], self.dtype)["ends"][0].tolist() if self.variable else [0]
        if len(row) != self.width + ends[-1] or ends != sorted(ends):
            return f"is {len(row)} bytes long and should be {self.width + ends[-1]}"
        return None if row[:8] == head else "has a damaged header"


class Rows:
    """The decoded rows of one view: structured fixed parts (n,), and the string bytes with each row's start in them."""

    __slots__ = ("_base", "_data", "fixed")

    def __init__(self, fixed: Array, data: Array | None, base: Int64s | None) -> None:
        self.fixed, self._data, self._base = fixed, data, base

    def times(self) -> tuple[Int64s, Int64s]:
        """Return the event times and the known-at times, int64 microseconds of shape (n,)."""
        words = self.fixed["words"]
        return (words[:, 1] ^ _SIGN).view(np.int64), (words[:, 2] ^ _SIGN).view(np.int64)

    def known_by(self, time_us: int) -> bool:
        """Say whether no row became known after that instant."""
        return bool(np.maximum.reduce(self.fixed["words"][:, 2]) <= time_us + 2**63)

    def validity(self, features: int) -> Mask:
        """Return bool of shape (n, features), False where a stored value is null."""
        words = np.ascontiguousarray(self.fixed["words"][:, 4:]).astype("<u8").view(np.uint8)
        return np.unpackbits(words, axis=1, count=features, bitorder="little").view(np.bool_)

    def column(self, type: Type, place: tuple[str, int], valid: Mask | None) -> Column:
        """Return one feature as a column, its default where it is null."""
        run, at = place
        if run != "ends":
            values = self.fixed[run][:, at : at + type.length] if type.vector else self.fixed[run][:, at]
            return Column(type, np.ascontiguousarray(values), None, valid)
        assert self._data is not None and self._base is not None
        ends = self.fixed["ends"].astype(np.int64)
        starts = ends[:, at - 1] if at else np.zeros(len(ends), np.int64)
        return gather(type, self._data, self._base + starts, ends[:, at] - starts, valid)


def _words(head: bytes) -> Array:
    return np.frombuffer(head, ">u8").astype(np.uint64)


def _pack(validity: Mask) -> Array:
    """Return bool of shape (n, features) as uint64 words of shape (n, ceil(features / 64))."""
    packed = np.packbits(validity, axis=1, bitorder="little")
    padded = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view("<u8").astype(np.uint64)


def _nulls(type: Type) -> Column:
    """Return a column of one null."""
    valid = np.zeros(1, np.bool_)
    if type.variable:
        return Column(type, np.zeros(0, np.uint8), np.zeros(2, np.int64), valid)
    return Column(type, np.zeros((1, type.length) if type.vector else 1, type.dtype), None, valid)
