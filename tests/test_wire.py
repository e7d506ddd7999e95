"""Messages to values and back, in both directions; malformed ones refused by name; and whatever bytes may come."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from featserve._proto import serving_pb2 as pb
from featserve.batch import Arrival, EntityKeys, Integers
from featserve.codec import encode_keys, integers_under
from featserve.definitions import Entity, FeatureService, FeatureView, Field
from featserve.engine import Engine
from featserve.errors import InvalidRequest, TooLarge
from featserve.matrix import FeatureMatrix
from featserve.plan import Plans, compile_schema, integer_key
from featserve.server.service import Call, Limits, Service
from featserve.store.memory import MemoryStore
from featserve.types import (
    Array,
    Bool,
    Bytes,
    Column,
    Float32,
    Float64,
    Int64,
    String,
    Timestamp,
    Type,
    Vector,
    column,
)
from featserve.wire import (
    decode_column,
    decode_keys,
    decode_matrix,
    decode_rows,
    decode_schema,
    decode_view,
    encode_column,
    encode_matrix,
    encode_parts,
    encode_rows,
    encode_schema,
    encode_view,
    join_keys,
    plain_integers,
)
from tests.online_model import same
from tests.random_data import (
    cells_of,
    column_of_cells,
    random_batch,
    random_column,
    random_entity,
    random_keys,
    random_service,
    random_type,
    random_view,
    snapshot_of,
)

USER = Entity("user", {"user": Int64})
NOW_US = 1_700_000_000_000_000
HOUR_US = 3_600_000_000


def message(type: Type, data: bytes, **parts: Any) -> pb.Column:
    code: Any = type.code
    return pb.Column(name="c", type=code, data=data, **parts)


def offsets(*ends: int) -> bytes:
    return np.array(ends, "<u4").tobytes()


def test_columns_survive_the_way(rng: np.random.Generator) -> None:
    """Any column, nulls and all, comes out of its message as it went in, bit for bit."""
    for _ in range(300):
        type = random_type(rng)
        col = random_column(rng, type, int(rng.integers(0, 20)), null_share=float(rng.choice([0.0, 0.3, 1.0])))
        sent = pb.Column.FromString(encode_column("c", col).SerializeToString())
        got = decode_column(sent, type, "c", 20)
        assert got.type == type
        assert cells_of(got) == cells_of(col)
        assert (got.valid is None) == (col.null_count == 0)


MALFORMED: list[tuple[Type, pb.Column, str]] = [
    (Int64, message(Int64, bytes(12)), "c: 12 bytes are not a whole number of int64"),
    (Int64, message(Int64, bytes(8), offsets=offsets(0, 8)), "c: 8 bytes are not a whole number of int64"),
    (Int64, message(Float64, bytes(8)), "c: expected int64, got float64"),
    (Int64, message(Timestamp, bytes(8)), "c: expected int64, got timestamp"),
    (Int64, message(String, b"a", offsets=offsets(0, 1)), "c: expected int64, got string"),
    (Int64, message(Int64, bytes(8), length=1), "c: expected int64, got int64 of length 1, and only a vector has one"),
    (Int64, pb.Column(name="c"), "c: expected int64, got type number 0"),
    (Int64, pb.Column(name="c", type=99), "c: expected int64, got type number 99"),  # type: ignore[arg-type]
    (Int64, message(Vector(3), bytes(12), length=3), r"c: expected int64, got vector\[3\]"),
    (Int64, message(Vector(3), bytes(12), length=2**32 - 1), r"c: expected int64, got vector\[4294967295\]"),
    (Vector(3), message(Vector(3), bytes(12)), r"c: expected vector\[3\], got vector\[0\]"),
    (Vector(3), message(Vector(4), bytes(16), length=4), r"c: expected vector\[3\], got vector\[4\]"),
    (Vector(3), message(Vector(3), bytes(16), length=3), r"c: 16 bytes are not a whole number of vector\[3\]"),
    (Vector(3), message(Float32, bytes(12)), r"c: expected vector\[3\], got float32"),
    (Bool, message(Bool, b"\x00\x02"), "c: a bool is one byte, 0 or 1"),
    (Bool, message(Bool, b"\xff"), "c: a bool is one byte, 0 or 1"),
    (Int64, message(Int64, bytes(16), validity=b""), ""),
    (Int64, message(Int64, bytes(72), validity=b"\xff"), "c: 1 bytes of validity for 9 rows"),
    (Int64, message(Int64, bytes(64), validity=b"\xff\xff"), "c: 2 bytes of validity for 8 rows"),
    (String, message(String, b"", offsets=b""), r"c: offsets are n \+ 1 uint32, little-endian"),
    (String, message(String, b"", offsets=b"\0\0\0"), r"c: offsets are n \+ 1 uint32"),
    (String, message(String, b"", offsets=offsets(0, 0)), ""),
    (String, message(String, b"", offsets=offsets(0)), ""),
    (String, message(String, b"abc", offsets=offsets(0)), "c: offsets do not rise from 0 to the 3 bytes of data"),
    (String, message(String, b"abc", offsets=offsets(3)), "c: offsets do not rise"),
    (String, message(String, b"abc", offsets=offsets(1, 3)), "c: offsets do not rise"),
    (String, message(String, b"abc", offsets=offsets(0, 2)), "c: offsets do not rise"),
    (String, message(String, b"abc", offsets=offsets(0, 4)), "c: offsets do not rise"),
    (String, message(String, b"abc", offsets=offsets(0, 2, 1, 3)), "c: offsets do not rise"),
    (String, message(String, b"abc", offsets=offsets(0, 2**32 - 1, 3)), "c: offsets do not rise"),
    (String, message(String, b"\xff", offsets=offsets(0, 1)), "c: row 0 is not valid UTF-8"),
    (String, message(String, "aé".encode(), offsets=offsets(0, 1, 3)), ""),
    (String, message(String, "aé".encode(), offsets=offsets(0, 2, 3)), "c: row 1 is not valid UTF-8"),
    (String, message(String, "日本".encode(), offsets=offsets(0, 0, 4, 4, 6)), "c: row 3 is not valid UTF-8"),
    (String, message(String, b"ab\xc3", offsets=offsets(0, 1, 2, 3)), "c: row 2 is not valid UTF-8"),
    (String, message(String, b"ab\xc3\xa9\xed\xa0\x80", offsets=offsets(0, 4, 4, 7)), "c: row 2 is not valid UTF-8"),
    (Bytes, message(Bytes, b"\xff\xc3", offsets=offsets(0, 1, 2)), ""),
    (Bytes, message(Bytes, b"ab", offsets=offsets(0, 3)), "c: offsets do not rise"),
]


@pytest.mark.parametrize(("type", "sent", "problem"), MALFORMED, ids=lambda value: str(value)[:45].replace("\n", " "))
def test_columns_that_are_malformed(type: Type, sent: pb.Column, problem: str) -> None:
    """A column that its type, its lengths or its bytes contradict is refused by name; one at the edge is not."""
    if not problem:
        decode_column(sent, type, "c", 100)
        return
    with pytest.raises(InvalidRequest, match=f"^{problem}") as caught:
        decode_column(sent, type, "c", 100)
    assert [violation.field for violation in caught.value.violations] == ["c"]


def test_splitting_a_character_anywhere_is_seen(rng: np.random.Generator) -> None:
    """However text is cut into values, it is taken exactly if each value is UTF-8 of its own."""
    text = "aé日😀\0b".encode()
    for _ in range(500):
        cuts = [0, *sorted(rng.integers(0, len(text) + 1, size=int(rng.integers(0, 6))).tolist()), len(text)]
        parts = [text[a:b] for a, b in pairwise(cuts)]
        whole = [is_utf8(part) for part in parts]
        sent = message(String, text, offsets=offsets(*cuts))
        if all(whole):
            assert decode_column(sent, String, "c", 100).to_list() == [part.decode() for part in parts]
            continue
        with pytest.raises(InvalidRequest, match="is not valid UTF-8"):
            decode_column(sent, String, "c", 100)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_rows_are_counted_before_anything_else_is_done() -> None:
    """One row more than the limit is refused, in fixed-width and in string columns; the limit itself is not."""
    for type, values in ((Int64, list(range(11))), (String, ["x"] * 11), (Vector(2), [[0, 0]] * 11)):
        for rows in (10, 11):
            sent = encode_column("k", column(type, values[:rows]))
            if rows == 10:
                assert len(decode_column(sent, type, "c", 10)) == 10
                continue
            with pytest.raises(TooLarge, match=r"c: 11 rows; the most in one request is 10\. Send several requests"):
                decode_column(sent, type, "c", 10)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"user": [1]}, "missing key column 'city'"),
        ({"user": [1], "city": ["a"], "town": ["b"]}, "unknown key column 'town'"),
        ({"user": [1], "cyti": ["a"]}, r"missing key column 'city' \(string\); unknown key column 'cyti'.*'city'"),
        ({"user": [1, 2], "city": ["a"]}, "keys: columns differ in length: user has 2, city has 1 rows"),
        ({"user": [], "city": []}, "keys: the batch is empty; send at least one row"),
        ({"user": [1, None], "city": ["a", "b"]}, "keys.user: row 1 is null; a key has a value in every row"),
        ({}, "missing key column 'user'.*missing key column 'city'"),
    ],
)
def test_keys_that_do_not_fit(keys: dict[str, list[Any]], message: str) -> None:
    """Keys are refused alike, by column and row, whether they come as messages or in process."""
    types = {"user": Int64, "city": String}
    columns = {name: column(types.get(name, String), values) for name, values in keys.items()}
    messages = [encode_column(name, col) for name, col in columns.items()]
    attempts: list[Callable[[], EntityKeys]] = [
        lambda: decode_keys(messages, types, 10),
        lambda: EntityKeys.of(keys, types),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidRequest, match=message):
            attempt()


def test_a_key_column_that_stands_twice() -> None:
    """A column that is sent twice is refused, even with the same values."""
    twice = [encode_column("user", column(Int64, [1]))] * 2
    with pytest.raises(InvalidRequest, match="'user' stands twice"):
        decode_keys(twice, {"user": Int64}, 10)


def test_keys_of_several_requests_are_those_of_each(rng: np.random.Generator) -> None:
    """Decoded keys of requests, joined, are those of each; integers of one key are plain, and give the same keys."""
    plain = 0
    for _ in range(200):
        entity = random_entity(rng, "user")
        requests = [random_keys(rng, entity, int(rng.integers(1, 6))) for _ in range(rng.integers(1, 5))]
        messages = [[encode_column(name, keys[name]) for name in rng.permutation(list(keys))] for keys in requests]
        decoded = [decode_keys(columns, entity.keys, 10) for columns in messages]
        joined = join_keys(decoded)
        assert isinstance(joined, EntityKeys)
        assert joined.count == sum(keys.count for keys in decoded)
        for name, col in joined.columns.items():
            assert cells_of(col) == [cell for keys in decoded for cell in cells_of(keys.columns[name])]
        if (key := integer_key(entity.keys)) is None:
            continue
        plain += 1
        (col,) = joined.columns.values()
        raw = [plain_integers(columns, *key, 10) for columns in messages]
        together = join_keys([each for each in raw if each is not None])
        assert isinstance(together, Integers)
        assert (together.raw, together.count) == (col.values.tobytes(), joined.count)
        prefix = bytes(range(8))
        encoded = [prefix + each for each in encode_keys([col])]
        assert integers_under(col.values.tobytes(), key[1].width)(prefix) == encoded
    assert plain


@pytest.mark.parametrize(
    "columns",
    [
        [],
        [encode_column("user", column(Int64, []))],
        [encode_column("user", column(Int64, [1] * 11))],
        [encode_column("user", column(Int64, [1, None]))],
        [encode_column("user", column(Int64, [1]))] * 2,
        [encode_column("user", column(Int64, [1])), encode_column("other", column(Int64, [1]))],
        [encode_column("user", column(Timestamp, [1]))],
        [pb.Column(name="user", type=pb.DATA_TYPE_INT64, data=bytes(9))],
        [pb.Column(name="user", type=pb.DATA_TYPE_INT64, data=bytes(8), length=1)],
        [pb.Column(name="user", type=pb.DATA_TYPE_INT64, data=bytes(8), offsets=offsets(0, 8))],
        [pb.Column(name="user", type=pb.DATA_TYPE_INT64, data=bytes(8), validity=b"\0")],
    ],
)
def test_keys_that_are_wrong_are_not_plain(columns: list[pb.Column]) -> None:
    """What is wrong with a key column is left for ``decode_keys`` to name."""
    assert plain_integers(columns, "user", Int64, 10) is None
    with pytest.raises((InvalidRequest, TooLarge)):
        decode_keys(columns, USER.keys, 10)


def test_a_key_that_is_no_bool_is_refused() -> None:
    """A bool is no integer key, and one of 2 is refused."""
    assert integer_key({"flag": Bool}) is None
    sent = [pb.Column(name="flag", type=pb.DATA_TYPE_BOOL, data=b"\1\2")]
    with pytest.raises(InvalidRequest, match="a bool is one byte"):
        decode_keys(sent, {"flag": Bool}, 10)


def test_schemas_and_views_survive_the_way(rng: np.random.Generator) -> None:
    """A client's schema of any service, and its types of any view, are the server's."""
    for _ in range(50):
        entities = [random_entity(rng, name) for name in "ab"]
        views = [random_view(rng, f"v{i}", entities[i % 2]) for i in range(3)]
        schema = compile_schema(random_service(rng, "s", views))
        sent = pb.ServiceSchema.FromString(encode_schema(schema).SerializeToString())
        got = decode_schema(sent)
        assert got == schema
        assert list(got.keys) == list(schema.keys)
        for view in views:
            described = pb.DescribeViewResponse.FromString(encode_view(view).SerializeToString())
            types = dict(view.entity.keys) | {f.name: f.type for f in view.features}
            assert decode_view(described) == types
            assert (described.hash, described.HasField("ttl_us")) == (view.hash, view.ttl is not None)


def test_rows_survive_the_way(rng: np.random.Generator) -> None:
    """Rows of any view, with and without known-at and positions, arrive as they were sent."""
    for _ in range(50):
        entity = random_entity(rng, "e")
        view = random_view(rng, "v", entity)
        batch = random_batch(rng, view, random_keys(rng, entity, 4), NOW_US, int(rng.integers(1, 9)))
        known = batch.known_at_us if rng.random() < 0.5 else None
        positions = batch.sequence if rng.random() < 0.5 else None
        sent = encode_rows("v", Arrival(batch.columns, batch.event_time_us, known, positions))
        types = dict(view.entity.keys) | {f.name: f.type for f in view.features}
        got = decode_rows(pb.WriteRowsRequest.FromString(sent.SerializeToString()), types, 10)
        assert {n: cells_of(c) for n, c in got.columns.items()} == {n: cells_of(c) for n, c in batch.columns.items()}
        assert got.event_time_us.tolist() == batch.event_time_us.tolist()
        for times, expected in ((got.known_at_us, known), (got.source_positions, positions)):
            assert (None if times is None else times.tolist()) == (None if expected is None else expected.tolist())


def write_message(**changes: Any) -> pb.WriteRowsRequest:
    """Return two rows of a view of an integer, with changes to the message."""
    times = np.array([1, 2]).tobytes()
    parts: dict[str, Any] = {"event_times": times, "known_at": times, "source_positions": times}
    columns = [encode_column("user", column(Int64, [1, 2])), encode_column("a", column(Int64, [3, None]))]
    return pb.WriteRowsRequest(**({"view": "v", "columns": columns} | parts | changes))


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (write_message(), None),
        (write_message(known_at=b""), None),
        (write_message(event_times=b""), r"columns differ in length: .*event_times has 0"),
        (write_message(event_times=bytes(15)), "event_times: 15 bytes are not a whole number of int64"),
        (write_message(known_at=bytes(8)), "known_at has 1 rows|known_at has 1,"),
        (write_message(source_positions=bytes(24)), "source_positions has 3 rows"),
        (write_message(columns=[]), "missing column 'user'.*missing column 'a'"),
        (write_message(columns=[encode_column("user", column(Int64, [1, 2]))] * 2), "'user' stands twice"),
        (write_message(columns=[encode_column("b", column(Int64, [1]))]), "unknown column 'b'"),
        (
            write_message(columns=[encode_column(n, column(Int64, [])) for n in ("user", "a")], event_times=b"",
                          known_at=b"", source_positions=b""),
            "the batch is empty",
        ),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(sent: pb.WriteRowsRequest, problem: str | None) -> None:
    """Rows whose columns and times are missing, ragged, repeated or cut are refused by name."""
    types = {"user": Int64, "a": Int64}
    if problem is None:
        assert len(decode_rows(sent, types, 10).event_time_us) == 2
        return
    with pytest.raises(InvalidRequest, match=problem):
        decode_rows(sent, types, 10)


def test_a_typed_column_of_other_rows_is_refused() -> None:
    """A typed column that is longer or shorter than its answer is refused."""
    view = FeatureView("v", USER, [Field("s", String), Field("n", Int64)])
    schema = compile_schema(FeatureService("s", [view]))
    answer = pb.GetFeaturesResponse(rows=2, status=b"\1\1")
    for values in (["a"], ["a", "b", "c"]):
        del answer.columns[:]
        answer.columns.extend([encode_column("", column(String, values)), encode_column("", column(Int64, [1, 2]))])
        with pytest.raises(InvalidRequest, match=f"v.s has {len(values)}, v.n has 2 rows"):
            decode_matrix(answer, schema)
    answer.columns.pop()
    with pytest.raises(InvalidRequest, match=r"answer.columns: 1 do not fit schema s@1, which says 2"):
        decode_matrix(answer, schema)


@pytest.mark.parametrize("nulls", [False, True])
@pytest.mark.parametrize("event_times", [False, True])
def test_a_hundred_rows_of_fifty_numbers_are_small(nulls: bool, event_times: bool) -> None:
    """An answer of 100 x 50 float32 is under 21,000 bytes, with nulls and without; event times add 8 bytes a row."""
    view = FeatureView("v", USER, [Field(f"f{i}", Float32) for i in range(50)])
    engine = Engine(MemoryStore(), Plans(snapshot_of([view], [FeatureService("s", [view])])))
    times = np.full(100, NOW_US)
    value: float | None = None if nulls else 1.5
    columns = {f"f{i}": column(Float32, [value if row % 3 == 0 else 0.25 for row in range(100)]) for i in range(50)}
    arrival = Arrival(columns | {"user": column(Int64, range(100))}, times, times)
    engine.write(engine.plans.view("v"), arrival, now_us=NOW_US, max_future_skew_us=0)
    service = Service(engine, Limits(100, 0), lambda: NOW_US)
    request = pb.GetFeaturesRequest(
        service="s", keys=[encode_column("user", column(Int64, range(100)))], include_event_times=event_times
    )
    size = len(service.get_features(request.SerializeToString(), Call()))
    assert size < 21_000 + (800 if event_times else 0)
    assert size > 20_000


def test_wide_answers_hold_every_bit() -> None:
    """Validity bits that do not fill a byte, for any number of features, are read back as they were."""
    for features in (1, 7, 8, 9, 63, 64, 65):
        view = FeatureView("v", USER, [Field(f"f{i}", Float32) for i in range(features)])
        schema = compile_schema(FeatureService("s", [view]))
        valid = np.random.default_rng(features).random((5, features)) < 0.5
        valid[0, 0] = False
        values: Array = np.where(valid, np.float32(1), np.float32(np.nan)).astype(np.float32)
        matrix = FeatureMatrix(schema, values, (), np.ones((5, 1), np.uint8), valid, None)
        same(decode_matrix(encode_matrix(matrix), schema), matrix)


def test_answers_in_parts_are_those_of_each_part(rng: np.random.Generator) -> None:
    """The bytes of several answers made at once are those of each, where some hold nulls, all do or none."""
    for _ in range(60):
        features = int(rng.integers(1, 20))
        fields = [Field(f"f{i}", String if rng.random() < 0.05 else Float32) for i in range(features)]
        schema = compile_schema(FeatureService("s", [FeatureView("v", USER, fields)]))
        counts = rng.integers(1, 5, size=rng.integers(1, 9)).tolist()
        rows = sum(counts)
        by_row = np.repeat(rng.random((rows, 1)) < 0.6, features, axis=1)
        valid = [None, by_row, rng.random((rows, features)) < 0.9][rng.integers(3)]
        columns = tuple(column(String, list(map(str, range(rows)))) for _ in schema.column_features)
        values = rng.random((rows, schema.width), np.float32)
        matrix = FeatureMatrix(schema, values, columns, rng.choice(np.array([1, 3], np.uint8), (rows, 1)), valid, None)
        answers, status, validity = encode_parts(matrix, counts)
        stops = [0, *np.cumsum(counts).tolist()]
        assert answers == [encode_matrix(matrix.part(*ends)).SerializeToString() for ends in pairwise(stops)]
        assert (status, validity == b"") == (matrix.view_status.tobytes(), valid is None)
        for answer, ends in zip(answers, pairwise(stops), strict=True):
            found = decode_matrix(pb.GetFeaturesResponse.FromString(answer), schema).valid
            expected = None if valid is None else valid[slice(*ends)]
            whole = expected is None or expected.all()
            assert (found is None) if whole else np.array_equal(found, expected)  # type: ignore[arg-type]


def test_columns_of_cells_are_what_is_sent() -> None:
    """The bytes of a message are the documented layout."""
    sent = encode_column("s", column_of_cells(String, [b"ab", None, "é".encode()]))
    assert (sent.data, sent.offsets, sent.validity, sent.length) == ("abé".encode(), offsets(0, 2, 2, 4), b"\x05", 0)
    vector = encode_column("v", Column(Vector(2), np.array([[1, 2]], "<f4")))
    assert (vector.data, vector.length) == (np.array([1, 2], "<f4").tobytes(), 2)
