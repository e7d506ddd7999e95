"""The bytes of rows and keys, against an encoder and a decoder that follow the documented layout cell by cell."""

from __future__ import annotations

import struct
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from featserve import codec as codec_module
from featserve.batch import EventBatch
from featserve.codec import BLOCK_ROWS, STAMP, RowCodec, Rows, check_key_sizes, encode_keys, key_prefix, key_ranks
from featserve.definitions import Entity, FeatureView, Field
from featserve.errors import CorruptRow, InvalidRequest
from featserve.types import (
    Bool,
    Bytes,
    Column,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    Timestamp,
    Type,
    Vector,
    column,
)
from tests.random_data import (
    KEY_TYPES,
    SCALAR_TYPES,
    Cell,
    cells_of,
    column_of_cells,
    random_batch,
    random_entity,
    random_keys,
    random_view,
)

RUNS = (("<d", (Float64,)), ("<q", (Int64, Timestamp)), ("<f", (Float32,)), ("<i", (Int32,)), ("?", (Bool,)))
USER = Entity("user", {"user": Int64})
NOW_US = 1_700_000_000_000_000


def signed(n: int) -> bytes:
    """Return an int64 as bytes that sort as the numbers do: big-endian, the sign bit flipped."""
    return struct.pack(">Q", n + 2**63)


def naive_default(f: Field) -> bytes:
    """Return the bytes that stand in the place of a null."""
    if f.default is not None:
        cell = cells_of(column(f.type, [f.value(f.default)]))[0]
        assert cell is not None
        return cell
    if f.type.floating:
        return (
            struct.pack("<d", float("nan")) if f.type is Float64 else struct.pack("<f", float("nan"))
        ) * f.type.length
    return bytes(f.type.width)


def naive_runs(view: FeatureView) -> list[list[Field]]:
    """Return the fixed-width features of each run, in declared order; vectors stand among the float32s."""
    return [[f for f in view.features if f.type in types or (f.type.vector and Float32 in types)] for _, types in RUNS]


def naive_encode(view: FeatureView, stamp: tuple[int, int, int], cells: dict[str, Cell]) -> bytes:
    """Return one row, put together piece by piece."""
    row = b"\xf5\x01\x00\x00" + bytes.fromhex(view.hash)[:4] + b"".join(map(signed, stamp))
    for first in range(0, len(view.features), 64):
        bits = [cells[f.name] is not None for f in view.features[first : first + 64]]
        row += struct.pack(">Q", sum(1 << i for i, present in enumerate(bits) if present))
    held = {f.name: naive_default(f) if cells[f.name] is None else cells[f.name] for f in view.features}
    for run in naive_runs(view):
        row += b"".join(held[f.name] or b"" for f in run)
    strings = [held[f.name] or b"" for f in view.features if f.type.variable]
    ends = [sum(map(len, strings[: i + 1])) for i in range(len(strings))]
    return row + struct.pack(f"<{len(ends)}I", *ends) + b"".join(strings)


def naive_decode(view: FeatureView, row: bytes) -> tuple[tuple[int, ...], dict[str, Cell], dict[str, Cell]]:
    """Return the stamp, each feature's value, and what stands in its place where it is null."""
    stamp = tuple(n - 2**63 for n in struct.unpack_from(">3Q", row, 8))
    at = 32 + 8 * -(-len(view.features) // 64)
    words = struct.unpack_from(f">{(at - 32) // 8}Q", row, 32)
    held: dict[str, Cell] = {}
    for run in naive_runs(view):
        for f in run:
            held[f.name] = row[at : at + f.type.width]
            at += f.type.width
    strings = [f for f in view.features if f.type.variable]
    ends = [0, *struct.unpack_from(f"<{len(strings)}I", row, at)]
    at += 4 * len(strings)
    for f, start, end in zip(strings, ends, ends[1:], strict=False):
        held[f.name] = row[at + start : at + end]
    valid = {f.name: bool(words[i // 64] >> i % 64 & 1) for i, f in enumerate(view.features)}
    return stamp, {name: cell if valid[name] else None for name, cell in held.items()}, held


def stamps_of(batch: EventBatch) -> list[tuple[int, int, int]]:
    return list(zip(batch.event_time_us.tolist(), batch.known_at_us.tolist(), batch.sequence.tolist(), strict=True))


def cells_by_row(view: FeatureView, batch: EventBatch) -> list[dict[str, Cell]]:
    cells = {f.name: cells_of(batch.columns[f.name]) for f in view.features}
    return [{name: found[i] for name, found in cells.items()} for i in range(len(batch))]


def read(codec: RowCodec, rows: list[bytes]) -> Rows:
    """Decode rows as a request does."""
    decoded = codec.decode(rows)
    codec.check_heads(decoded, rows)
    return decoded


def some_batch(rng: np.random.Generator, rows: int, features: int = 8) -> tuple[FeatureView, EventBatch]:
    entity = random_entity(rng, "e")
    view = random_view(rng, "v", entity, features=features)
    return view, random_batch(rng, view, random_keys(rng, entity, 5), NOW_US, rows)


@pytest.mark.parametrize("features", [1, 8, 70, 130])
def test_rows_are_what_the_layout_says(
    features: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of an encoded row is where the documentation puts it, and the same bytes decode to the same values."""
    monkeypatch.setattr(codec_module, "BLOCK_ROWS", 5)
    for _ in range(30 if features < 20 else 6):
        view, batch = some_batch(rng, int(rng.integers(1, 23)), features)
        codec = RowCodec(view)
        cells = cells_by_row(view, batch)
        rows = codec.encode(batch)
        assert rows == [naive_encode(view, s, c) for s, c in zip(stamps_of(batch), cells, strict=True)]
        fixed = np.empty(len(batch), codec.dtype)
        tail = codec.pack(batch, fixed)
        picked = rng.integers(len(batch), size=7)
        assert codec.join(fixed[picked], tail and tail.take(picked)) == [rows[i] for i in picked]
        decoded = read(codec, rows)
        naive = [naive_decode(view, row) for row in rows]
        events, known = decoded.times()
        assert list(zip(events.tolist(), known.tolist(), strict=True)) == [stamp[:2] for stamp, _, _ in naive]
        validity = decoded.validity(len(view.features))
        for i, f in enumerate(view.features):
            assert [found[f.name] for _, found, _ in naive] == [row[f.name] for row in cells]
            assert validity[:, i].tolist() == [row[f.name] is not None for row in cells]
            place = codec.place[f.name]
            assert cells_of(decoded.column(f.type, place, validity[:, i])) == [row[f.name] for row in cells]
            assert cells_of(decoded.column(f.type, place, None)) == [held[f.name] for _, _, held in naive]


@pytest.mark.parametrize("rows", [BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 1])
def test_blocks_join_without_a_seam(rows: int, rng: np.random.Generator) -> None:
    """A batch about the size of a block is encoded as its rows one by one are."""
    view = FeatureView(
        "v", USER, [Field("a", Float64, default=1.5), Field("s", String), Field("b", Bytes, default=b"?")]
    )
    batch = random_batch(rng, view, random_keys(rng, USER, 5), NOW_US, rows)
    codec = RowCodec(view)
    encoded = codec.encode(batch)
    assert len(encoded) == rows
    for i in [0, 1, BLOCK_ROWS - 2, *range(BLOCK_ROWS - 1, min(BLOCK_ROWS + 2, rows)), rows - 1]:
        if i < rows:
            assert encoded[i : i + 1] == codec.encode(batch.take(np.array([i])))
    decoded = read(codec, encoded)
    valid = decoded.validity(3)
    for i, f in enumerate(view.features):
        found = decoded.column(f.type, codec.place[f.name], valid[:, i])
        assert cells_of(found) == cells_of(batch.columns[f.name])


def test_an_empty_batch() -> None:
    """No rows are encoded to no rows."""
    codec = RowCodec(FeatureView("v", USER, [Field("s", String)]))
    assert codec.encode(EventBatch({"s": column(String, [])}, *[np.zeros(0, np.int64)] * 3)) == []
    assert encode_keys([column(Int64, [])]) == []


def test_the_format_never_changes() -> None:
    """The bytes of a row and of a key are those of format 1, which stores on disk hold."""
    view = FeatureView(
        "v",
        Entity("e", {"a": String, "k": Int32, "t": String}),
        [Field("s", String), Field("f", Float32), Field("d", Float64), Field("b", Bool), Field("n", Int64, default=7)],
        ttl=timedelta(hours=1),
    )
    columns = {
        "s": column(String, ["é"]), "f": column(Float32, [1.5]), "d": column(Float64, [-2.0]),
        "b": column(Bool, [True]), "n": column(Int64, [None]),
    }  # fmt: skip
    (row,) = RowCodec(view).encode(EventBatch(columns, np.array([1]), np.array([-1]), np.array([0])))
    assert row.hex(" ", -8) == (
        "f501000081f542d0 8000000000000001 7fffffffffffffff 8000000000000000 "
        "000000000000000f 00000000000000c0 0700000000000000 0000c03f01020000 "
        "00c3a9"
    )
    assert key_prefix(view).hex() == "0642ee858fe916ec"
    assert encode_keys([column(String, ["xy"]), column(Int32, [-2]), column(String, ["z"])]) == [
        b"\0\0\0\x02xy\xff\xff\xff\xfez"
    ]


def test_the_absent_row_is_all_null() -> None:
    """The row that stands for none holds every default and no value."""
    view = FeatureView(
        "v",
        USER,
        [Field("a", Int64, default=5), Field("b", Float32), Field("s", String, default="x"), Field("t", String)],
    )
    codec = RowCodec(view)
    _, found, held = naive_decode(view, codec.absent)
    assert set(found.values()) == {None}
    assert held == {"a": struct.pack("<q", 5), "b": struct.pack("<f", float("nan")), "s": b"x", "t": b""}


@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 3), min_size=2, max_size=20))
def test_stamps_compare_as_bytes(stamps: list[tuple[int, int, int]]) -> None:
    """Rows order by the bytes of their stamps as by event time, known-at and sequence."""
    codec = RowCodec(FeatureView("v", USER, [Field("a", Int64)]))
    times = [np.array(part) for part in zip(*stamps, strict=True)]
    rows = codec.encode(EventBatch({"a": column(Int64, [0] * len(stamps))}, *times))
    by_bytes = sorted(range(len(rows)), key=lambda i: rows[i][STAMP])
    assert [stamps[i] for i in by_bytes] == sorted(stamps)


# Views with and without strings, for rows that are damaged.
PLAIN = FeatureView("plain", USER, [Field("a", Float64), Field("b", Bool), Field("v", Vector(3))])
TEXTUAL = FeatureView("textual", USER, [Field("s", String), Field("a", Float64), Field("t", Bytes), Field("u", String)])


def good_rows(view: FeatureView, rows: int = 3) -> list[bytes]:
    generator = np.random.default_rng(3)
    return RowCodec(view).encode(random_batch(generator, view, random_keys(generator, USER, 4), NOW_US, rows))


@pytest.mark.parametrize("view", [PLAIN, TEXTUAL], ids=["plain", "textual"])
def test_a_row_cut_or_lengthened_is_named(view: FeatureView) -> None:
    """A row of any other length than its own is corrupt, and the error says which row and how."""
    rows = good_rows(view)
    for i in range(len(rows)):
        for length in [*range(min(len(rows[i]), 90)), *(len(rows[i]) + n for n in (-2, -1, 1, 99))]:
            bad = rows.copy()
            bad[i] = (rows[i] + bytes(99))[:length]
            with pytest.raises(CorruptRow, match=f"view {view.id}: stored row {i} of the batch") as caught:
                read(RowCodec(view), bad)
            if 8 <= length < RowCodec(view).width:
                assert f"is truncated: {length} of {RowCodec(view).width} bytes" in str(caught.value)
            assert "materialize the view again" in str(caught.value)


@pytest.mark.parametrize("view", [PLAIN, TEXTUAL], ids=["plain", "textual"])
def test_lengths_that_make_up_for_each_other(view: FeatureView) -> None:
    """A byte too few in one row and one too many in the next are both seen, though their sum is right."""
    first, second, third = good_rows(view)
    for bad in ([first[:-1], second + b"x", third], [first + b"x", second[:-1], third], [first + second, b"", third]):
        with pytest.raises(CorruptRow, match="stored row 0 of the batch"):
            read(RowCodec(view), bad)


@pytest.mark.parametrize(
    ("at", "value", "problem"),
    [
        (0, 0xF4, "is not a featserve row"),
        (1, 2, "has row format 2, and this featserve reads format 1"),
        (1, 0, "has row format 0"),
        (2, 1, "has a damaged header"),
        (3, 1, "has a damaged header"),
        (4, None, "was written under another definition"),
        (5, None, "was written under another definition"),
        (6, None, "was written under another definition"),
        (7, None, "was written under another definition"),
    ],
)
@pytest.mark.parametrize("view", [PLAIN, TEXTUAL], ids=["plain", "textual"])
def test_every_byte_of_the_head_is_looked_at(view: FeatureView, at: int, value: int | None, problem: str) -> None:
    """A wrong byte anywhere in the first eight is seen, and the error says what it means."""
    rows = good_rows(view)
    bad = bytearray(rows[1])
    bad[at] = bad[at] ^ 1 if value is None else value
    with pytest.raises(CorruptRow, match=f"view {view.id}: stored row 1 of the batch {problem}"):
        read(RowCodec(view), [rows[0], bytes(bad), rows[2]])


def test_ends_of_strings_that_do_not_fit() -> None:
    """Strings that end before they start, or elsewhere than the row, are corrupt."""
    codec = RowCodec(TEXTUAL)
    (row,) = good_rows(TEXTUAL, 1)
    head = row[: codec.width - 12]
    read(codec, [head + struct.pack("<3I", 2, 4, 6) + b"string"])
    for ends in ([7, 0, 6], [2, 1, 6], [2, 7, 6], [0, 0, 7], [0, 0, 5], [0, 0, 0], [2**32 - 1] * 3):
        with pytest.raises(CorruptRow, match=r"stored row 0 of the batch is \d+ bytes long and should be"):
            read(codec, [head + struct.pack("<3I", *ends) + b"string"])


@pytest.mark.parametrize("view", [PLAIN, TEXTUAL], ids=["plain", "textual"])
@given(garbage=st.lists(st.binary(max_size=120), min_size=1, max_size=4), data=st.data())
def test_garbage_is_corrupt_and_nothing_else(view: FeatureView, garbage: list[bytes], data: st.DataObject) -> None:
    """Whatever bytes stand where rows should, they are named as corrupt: no other error, no values."""
    codec = RowCodec(view)
    good = good_rows(view)
    rows = data.draw(st.permutations(garbage + good))
    if data.draw(st.booleans()):  # of the right length for a fixed part, so that only what is in it can tell
        rows = [row if row in good else (row + bytes(codec.width))[: codec.width] for row in rows]
    assume(not all(row[:8] == codec.head for row in rows))
    with pytest.raises(CorruptRow, match=f"view {view.id}: "):
        read(codec, rows)


def test_rows_of_another_version_of_a_view() -> None:
    """A row of the same layout that was written under another meaning is foreign."""
    other = FeatureView("plain", USER, PLAIN.features, ttl=timedelta(1))
    with pytest.raises(CorruptRow, match=r"another definition \(fingerprint"):
        read(RowCodec(PLAIN), good_rows(other))


def test_a_row_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose strings are over the limit together is refused, naming the row; one at the limit is not."""
    monkeypatch.setattr(codec_module, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(codec_module, "BLOCK_ROWS", 2)
    codec = RowCodec(FeatureView("v", USER, [Field("s", String), Field("t", String)]))

    def encode(length: int) -> list[bytes]:
        texts = ["", "", "", "a" * length]
        return codec.encode(
            EventBatch({"s": column(String, texts), "t": column(String, texts)}, *[np.zeros(4, np.int64)] * 3)
        )

    assert len(encode(50)[3]) == codec.width + 100
    with pytest.raises(InvalidRequest, match=r"rows\[3\]: its strings are over"):
        encode(51)


def values_of(type: Type) -> st.SearchStrategy[Any]:
    """Return strategies of key values that are close to each other, so that they collide if anything does."""
    if type is Bool:
        return st.booleans()
    if type is Int32:
        return st.integers(-(2**31), 2**31 - 1)
    if type in (Int64, Timestamp):
        return st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 2)
    if type is String:
        return st.text(st.sampled_from("1\x002é"), max_size=6)
    return st.binary(max_size=6) | st.lists(st.sampled_from([0, 1, 255]), max_size=6).map(bytes)


@given(data=st.data(), types=st.lists(st.sampled_from(KEY_TYPES), min_size=1, max_size=4))
def test_keys_never_collide(data: st.DataObject, types: list[Type]) -> None:
    """Two entities have the same key exactly if all of their key columns are equal."""
    rows = data.draw(st.lists(st.tuples(*map(values_of, types)), min_size=2, max_size=12))
    keys = encode_keys([column(type, values) for type, values in zip(types, zip(*rows, strict=True), strict=True)])
    for i, key in enumerate(keys):
        for j in range(i):
            assert (key == keys[j]) == (rows[i] == rows[j])


def test_keys_are_what_the_layout_says(rng: np.random.Generator) -> None:
    """Integers stand big-endian in a key; strings have their length in front, but for the last column."""
    for _ in range(100):
        entity = random_entity(rng, "e")
        columns = random_keys(rng, entity, 10)
        cells = {name: cells_of(col) for name, col in columns.items()}
        expected = []
        for i in range(len(next(iter(cells.values())))):
            key = b""
            for position, (name, type) in enumerate(entity.keys.items()):
                cell = cells[name][i] or b""
                last = position == len(entity.keys) - 1
                key += cell[::-1] if not type.variable else cell if last else struct.pack(">I", len(cell)) + cell
            expected.append(key)
        assert encode_keys(list(columns.values())) == expected


def test_ranks_compare_as_keys_do(rng: np.random.Generator) -> None:
    """Sorting by rank sorts by key."""
    for _ in range(50):
        columns = list(random_keys(rng, random_entity(rng, "e"), 12).values())
        keys, ranks = encode_keys(columns), key_ranks(columns)
        assert [keys[i] for i in np.argsort(ranks)] == sorted(keys)


def test_prefixes_tell_views_apart() -> None:
    """Views of another name, version or meaning have other prefixes; what is said about a view is not in it."""
    base = FeatureView("v", USER, [Field("a", Int64)])
    others = [
        FeatureView("w", USER, base.features),
        FeatureView("v", USER, base.features, version=2),
        FeatureView("v", USER, [Field("a", Int32)]),
        FeatureView("v", USER, base.features, ttl=timedelta(1)),
    ]
    prefixes = {key_prefix(view) for view in [base, *others]}
    assert len(prefixes) == 5
    assert {len(prefix) for prefix in prefixes} == {8}
    assert key_prefix(FeatureView("v", USER, base.features, owner="somebody")) == key_prefix(base)


@pytest.mark.parametrize("length", [4_095, 4_096, 4_097, 1 << 20])
def test_long_keys(length: int) -> None:
    """A key value of up to 4,096 bytes is taken; a longer one is refused by column and row."""
    columns = {"n": column(Int64, [1, 2, 3]), "s": column_of_cells(String, [b"a" * 4_000, b"b" * length, b"c"])}
    if length <= 4_096:
        check_key_sizes(columns)
        return
    with pytest.raises(InvalidRequest, match=rf"keys.s: row 1 is {length:,} bytes long; the most is 4,096"):
        check_key_sizes(columns)


@pytest.mark.parametrize("type", [*SCALAR_TYPES, Vector(3)], ids=str)
def test_every_type_alone(type: Type, rng: np.random.Generator) -> None:
    """A view of one feature of any type, null or not, with a default or without, survives its row."""
    for default in (None, cells_of(Column(type, *_ones(type)))[0]):
        stored = None if default is None else Column(type, *_ones(type)).to_list()[0]
        view = FeatureView("v", USER, [Field("a", type, default=stored)])
        batch = random_batch(rng, view, random_keys(rng, USER, 5), NOW_US, 50, null_share=0.5)
        codec = RowCodec(view)
        decoded = read(codec, codec.encode(batch))
        valid = decoded.validity(1)[:, 0]
        assert cells_of(decoded.column(type, codec.place["a"], valid)) == cells_of(batch.columns["a"])
        if default is not None:
            assert {
                c for c, ok in zip(cells_of(decoded.column(type, codec.place["a"], None)), valid, strict=True) if not ok
            } <= {default}


def _ones(type: Type) -> tuple[Any, Any]:
    """Return the values and offsets of a column of one value."""
    if type.variable:
        return np.frombuffer(b"one", np.uint8), np.array([0, 3])
    return np.ones((1, type.length) if type.vector else 1, type.dtype), None
