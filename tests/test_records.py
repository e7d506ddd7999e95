"""Records of windowed views: folded in any batches, at any clock, they read as the naive oracle says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from featserve.batch import EventBatch
from featserve.definitions import (
    Aggregate,
    Calendar,
    Entity,
    EventSource,
    FeatureView,
    Field,
    Hopping,
    Rolling,
    Window,
)
from featserve.errors import CorruptRow, InvalidRequest
from featserve.finals import ROW_BYTES, Cut, Strings
from featserve.folding import beyond, fold, settled, unite
from featserve.records import RecordCodec
from featserve.series import MAX_WAITING, Events, Pool, events_of
from featserve.types import NEVER_US, Array, Column, Float64, Int64, String, column, to_us
from tests.windows_model import WEEKS_KEPT, Event, answers, distinct, every_aggregate, make_history


def batch_of(view: FeatureView, events: Sequence[Event]) -> EventBatch:
    """Return events as a batch of the columns of their source."""
    assert view.events is not None
    columns = {f.name: column(f.type, [e.values[f.name] for e in events]) for f in view.events.fields}
    times = ([e.event_time_us for e in events], [e.known_at_us for e in events], [e.sequence for e in events])
    return EventBatch(columns, *(np.array(t, np.int64) for t in times))


class World:
    """The records of a view's entities as bytes, and every event that was folded into them.

    ``parts``: events are folded into second records, which are now and then united with the first ones.
    """

    def __init__(self, view: FeatureView, parts: np.random.Generator | None = None) -> None:
        self.view, self.codec, self.parts = view, RecordCodec(view), parts
        self.records: dict[tuple[Any, ...], bytes] = {}
        self.recent: dict[tuple[Any, ...], bytes] = {}
        self.events: list[Event] = []

    def fold(self, events: Sequence[Event], now_us: int) -> None:
        """Fold events as they arrive at ``now_us``, in one batch."""
        self.events += events
        keyed = [(tuple(e.values[name] for name in self.view.entity.keys), e) for e in events]
        keyed = [(key, e) for key, e in keyed if None not in key]
        keys = list(dict.fromkeys(key for key, _ in keyed))
        if not keys:
            return
        pool = Pool()
        state = self.codec.decode([self.records.get(key, self.codec.empty) for key in keys], pool)
        owner = np.array([keys.index(key) for key, _ in keyed])
        come = events_of(self.codec.layout, batch_of(self.view, [e for _, e in keyed]), owner, pool)
        layout = self.codec.layout
        if self.parts is not None:
            state = settled(layout, state, now_us)
            recent = self.codec.decode([self.recent.get(key, self.codec.empty) for key in keys], pool)
            recent = replace(recent, seen_us=np.maximum(recent.seen_us, state.newest_us))
            recent = fold(layout, recent, come, now_us)
            if not len(recent.waiting) and self.parts.random() < 0.7:
                self.recent |= zip(keys, self.codec.encode(recent, pool), strict=True)
                return
            self.recent |= dict.fromkeys(keys, self.codec.empty)
            state, come = unite(layout, state, recent), Events.none(layout)
        self.records |= zip(keys, self.codec.encode(fold(layout, state, come, now_us), pool), strict=True)

    def check(self, asked: Sequence[tuple[Any, ...]], time_us: int) -> None:
        """Hold what is read at an instant against the oracle."""
        recent = [self.recent.get(key) for key in asked]
        rows = self.codec.read([self.records.get(key) for key in asked], time_us, recent=recent)
        valid = rows.validity(len(self.view.features))
        event_times = rows.times()[0].tolist()
        told = [answers(self.view, self.events, key, time_us) for key in asked]
        for i, (f, aggregate) in enumerate(zip(self.view.features, self.view.aggregates, strict=True)):
            got = rows.column(f.type, self.codec.rows.place[f.name], valid[:, i]).to_list()
            for key, value, (_, expected) in zip(asked, got, told, strict=True):
                value = to_us(value) if isinstance(value, datetime) else value
                assert expected[f.name].agrees(value), (key, time_us, aggregate, value, expected[f.name])
        assert event_times == [NEVER_US if newest is None else newest for newest, _ in told]


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_records_read_as_the_oracle_says(seed: int, in_parts: bool) -> None:
    """Whatever the batches, their order and the clock, every aggregate over every kind of window is the oracle's."""
    rng = np.random.default_rng(seed)
    history = make_history(rng, asked=24, in_parts=in_parts)
    events = distinct(history.view, history.events)
    world = World(history.view, rng if in_parts else None)
    rng.shuffle(events)
    clocks = sorted(t for t, _ in history.asked)
    keys = list(dict.fromkeys(key for _, key in history.asked))
    cuts = np.sort(rng.integers(0, len(events) + 1, len(clocks)))
    for start, stop, now_us, later in zip([0, *cuts], cuts, clocks, [*clocks[1:], None], strict=False):
        world.fold(events[start:stop], now_us)
        world.check(keys, now_us)
        if later is not None:
            world.check(keys, int(rng.integers(now_us, later + 1)))


@pytest.mark.parametrize(("window", "in_parts"), WEEKS_KEPT, ids=str)
def test_every_function_over_every_kind(rng: np.random.Generator, window: Window, in_parts: bool) -> None:
    """Each aggregate of each column that it takes, over each kind of window, is the oracle's after every fold.

    In two parts, too, where there is an aggregate that may be kept so.
    """
    history = make_history(rng, events=150, windows=[window])
    view = replace(history.view, aggregates=every_aggregate(window, in_parts), features=())
    world = World(view, rng if in_parts else None)
    assert world.codec.layout.in_parts == in_parts
    events = distinct(history.view, history.events)
    clocks = sorted(t for t, _ in history.asked)[::6]
    keys = list(dict.fromkeys(key for _, key in history.asked))
    for some, now_us in zip(np.array_split(rng.permutation(len(events)), len(clocks)), clocks, strict=True):
        world.fold([events[i] for i in some], now_us)
        world.check(keys, now_us)


HOUR, DAY = timedelta(hours=1), timedelta(days=1)
USER = Entity("user", {"user_id": Int64})
CLICKS = EventSource("clicks", [Field("user_id", Int64), Field("amount", Float64), Field("page", String)])


def clicks_of(*aggregates: Aggregate) -> FeatureView:
    return FeatureView("clicks", USER, events=CLICKS, aggregates=aggregates)


def clicks(times_us: Sequence[int], pages: Sequence[str] | None = None) -> EventBatch:
    """Return clicks of user 1 at these instants, known at once."""
    many = len(times_us)
    columns = {
        "user_id": Column(Int64, np.ones(many, np.int64)),
        "amount": Column(Float64, np.arange(many) / 7),
        "page": column(String, pages or [f"page {i % 5}" for i in range(many)]),
    }
    times = np.array(times_us, np.int64)
    return EventBatch(columns, times, times, np.arange(many))


def folded(codec: RecordCodec, record: bytes, batch: EventBatch, now_us: int) -> tuple[bytes, str | None]:
    """Return the record with the events of one entity, and what bound it is over."""
    pool = Pool()
    events = events_of(codec.layout, batch, np.zeros(len(batch), np.int64), pool)
    state = fold(codec.layout, codec.decode([record], pool), events, now_us)
    problem = beyond(codec.layout, state)
    return codec.encode(state, pool)[0], problem and problem[0]


def test_a_million_events_of_one_entity_stay_bounded() -> None:
    """Hops and local days keep a struct for each bucket, however many events are in it; the answer is exact."""
    view = clicks_of(
        Aggregate("count", "count", over=Hopping(7 * DAY, HOUR)),
        Aggregate("sum", "sum", "amount", over=Calendar(30, "day", "Europe/Berlin")),
        Aggregate("last", "last", "page", over=Hopping(7 * DAY, HOUR)),
        Aggregate("pages", "distinct_count", "page", over=Calendar(30, "day", "Europe/Berlin")),
    )
    codec, record = RecordCodec(view), RecordCodec(view).empty
    now_us = to_us(datetime(2026, 3, 1, tzinfo=UTC))
    every_us = 30 * 86_400_000_000 // 1_000_000
    amounts: list[float] = []
    for start in range(0, 1_000_000, 250_000):
        batch = clicks([now_us - every_us * (999_999 - i) for i in range(start, start + 250_000)])
        amounts += batch.columns["amount"].to_list()
        record, problem = folded(codec, record, batch, now_us)
        assert problem is None
    assert len(record) < 16_384
    rows = codec.read([record], now_us)
    read = {f.name: rows.column(f.type, codec.rows.place[f.name], None).to_list() for f in view.features}
    week, month = (
        sum(now_us - every_us * i >= to_us(first) for i in range(1_000_000))
        for first in (datetime(2026, 2, 22, tzinfo=UTC), datetime(2026, 1, 30, 23, tzinfo=UTC))
    )
    total, size = math.fsum(amounts[-month:]), math.fsum(map(abs, amounts[-month:]))
    assert read == {"count": [week], "sum": [pytest.approx(total, abs=1e-12 * size)], "last": ["page 4"], "pages": [5]}


def test_bounds_hold_exactly() -> None:
    """As many events, or distinct values, as are declared fit; one more is told, and so is one that waits."""
    view = clicks_of(
        Aggregate("hour", "count", over=Rolling(HOUR, max_events=3)),
        Aggregate("day", "count", over=Rolling(DAY, max_events=5)),
        Aggregate("pages", "distinct_count", "page", over=Rolling(DAY), max_distinct=4),
    )
    codec = RecordCodec(view)
    now_us = to_us(datetime(2026, 3, 1, tzinfo=UTC))
    hour_us, same = 3_600_000_000, ["a"] * 9
    assert folded(codec, codec.empty, clicks([now_us] * 3, same[:3]), now_us)[1] is None
    assert "would hold 4 events of it; the most is max_events = 3" in str(
        folded(codec, codec.empty, clicks([now_us] * 4, same[:4]), now_us)[1]
    )
    spread = [now_us - i * hour_us for i in range(6)]
    assert folded(codec, codec.empty, clicks(spread[:5], same[:5]), now_us)[1] is None
    assert "'day'" in str(folded(codec, codec.empty, clicks(spread, same[:6]), now_us)[1])
    assert "'hour'" in str(folded(codec, codec.empty, clicks([now_us + 1] * 4, same[:4]), now_us)[1])
    assert folded(codec, codec.empty, clicks(spread[:4], list("abcd")), now_us)[1] is None
    assert "would hold 5 distinct values" in str(
        folded(codec, codec.empty, clicks(spread[:5], list("abcde")), now_us)[1]
    )
    codec = RecordCodec(clicks_of(Aggregate("day", "count", over=Hopping(DAY, HOUR))))
    assert folded(codec, codec.empty, clicks([now_us] + [now_us + 1] * MAX_WAITING), now_us)[1] is None
    assert "10,001 events of it would wait to become visible; the most is 10,000" in str(
        folded(codec, codec.empty, clicks([now_us + 1] * (MAX_WAITING + 1)), now_us)[1]
    )


def test_buckets_that_no_window_holds_are_let_go_of() -> None:
    """A record does not grow with time; what is trimmed is counted from the newest event, not from the clock."""
    view = clicks_of(
        Aggregate("count", "count", over=Hopping(DAY, HOUR)), Aggregate("last", "last", "page", over=Rolling(DAY))
    )
    codec = RecordCodec(view)
    record, sizes = codec.empty, []
    start_us = to_us(datetime(2020, 1, 1, tzinfo=UTC))
    for day in range(10):
        times = [start_us + day * 86_400_000_000 + i * 3_600_000_000 for i in range(24)]
        record, _ = folded(codec, record, clicks(times), to_us(datetime(2026, 1, 1, tzinfo=UTC)))
        sizes.append(len(record))
        assert codec.read([record], times[-1]).column(Int64, codec.rows.place["count"], None).to_list() == [
            min(25, 24 * (day + 1))
        ]
    assert max(sizes[1:]) - min(sizes[1:]) <= 64


@pytest.mark.parametrize(
    ("every", "events", "structs"), [(2, 40, 79), (3, 40, 40), (3, 6, 16), (1, 40, 40), (160, 2, 2), (24, 1, 1)]
)
def test_buckets_between_others_have_structs_where_those_are_few(every: int, events: int, structs: int) -> None:
    """As many as have an event, or up to sixteen in all; an answer is the same at every hour, with or without."""
    codec = RecordCodec(clicks_of(Aggregate("count", "count", over=Hopping(7 * DAY, HOUR))))
    hour_us = 3_600_000_000
    times = [i * every * hour_us for i in range(events)]
    record, _ = folded(codec, codec.empty, clicks(times), times[-1])
    (run,) = codec.decode([record], Pool()).runs
    assert len(run.number) == structs
    for hour in range(times[-1] // hour_us, times[-1] // hour_us + 172):
        rows = codec.read([codec.empty, record], hour * hour_us)
        held = sum(time_us >= (hour - 168) * hour_us for time_us in times)
        assert rows.column(Int64, codec.rows.place["count"], None).to_list() == [0, held]


LASTING = clicks_of(
    Aggregate("short", "count", over=Hopping(HOUR, timedelta(minutes=5))),
    Aggregate("mean", "mean", "amount", over=Hopping(7 * DAY, HOUR)),
    Aggregate("most", "max", "amount", over=Calendar(2, "day", "Europe/Berlin")),
)


def outcome(codec: RecordCodec, parts: Sequence[Sequence[bytes | None]], now_us: int, as_of: bool) -> bytes | str:
    """Return the rows that records and recent parts are read as, or why they are not."""
    try:
        return codec.read(parts[0], now_us, recent=parts[1], as_of=as_of).fixed.tobytes()
    except (InvalidRequest, CorruptRow) as error:
        return str(error)


@pytest.mark.parametrize("seed", range(8))
def test_what_was_read_before_changes_no_row(seed: int) -> None:
    """Whatever was read, of earlier records and at other instants, the next read is that of a codec that is new.

    Instants are before and after events, some of which wait, and before and after hops; a record may be damaged.
    """
    rng = np.random.default_rng(seed)
    codec, second_us = RecordCodec(LASTING), 1_000_000
    now_us = to_us(datetime(2026, 3, 29, tzinfo=UTC))
    records: list[bytes | None] = [None] * 6
    recent: list[bytes | None] = [None] * 6
    for _ in range(250):
        now_us += int(rng.choice([0, 1, 10 * second_us, 280 * second_us], p=[0.3, 0.3, 0.3, 0.1]))
        entity, part = int(rng.integers(6)), recent if rng.random() < 0.5 else records
        if rng.random() < 0.2:
            earliest_us = -int(rng.choice([2, 7_200])) * second_us
            latest_us = 20 * second_us if part is records else 1  # nothing waits in what came lately
            batch = clicks((now_us + rng.integers(earliest_us, latest_us, 3)).tolist())
            part[entity], _ = folded(codec, part[entity] or codec.empty, batch, now_us)
        asked = rng.integers(0, 6, rng.integers(1, 9)).tolist()
        parts = [records[i] for i in asked], [recent[i] for i in asked]
        if rng.random() < 0.05:
            parts[0][-1] = b"damaged!"
        read_us = now_us + int(rng.choice([0, 0, -second_us, -1, second_us]))
        as_of = bool(rng.random() < 0.5)
        assert outcome(codec, parts, read_us, as_of) == outcome(RecordCodec(LASTING), parts, read_us, as_of)


def test_a_record_is_looked_at_once_until_a_window_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a hop only records and recent parts that are new are parsed; with the next hop all are."""
    codec, hop_us = RecordCodec(LASTING), 300_000_000
    now_us = to_us(datetime(2026, 3, 1, tzinfo=UTC))
    one, two, three = (folded(codec, codec.empty, clicks([now_us - i]), now_us)[0] for i in range(3))
    parsed: list[int] = []
    parse = codec._parse

    def counted(records: Sequence[bytes]) -> Any:
        parsed.append(len(records))
        return parse(records)

    monkeypatch.setattr(codec, "_parse", counted)
    codec.read([one, two], now_us)
    codec.read([two, one, two], now_us + hop_us - 1)
    assert parsed == [2]
    codec.read([two, three, one], now_us + 1)
    codec.read([two], now_us + 1, recent=[three])
    codec.read([two], now_us + 1, recent=[one])
    assert parsed == [2, 1, 1, 1]
    codec.read([one], now_us + hop_us)
    assert parsed == [2, 1, 1, 1, 1]


def test_what_is_held_for_rows_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many records are read within a hop, those that are held take the bound and one read more at most."""
    monkeypatch.setattr("featserve.records.HELD_BYTES", 10_000)
    codec = RecordCodec(LASTING)
    now_us = to_us(datetime(2026, 3, 1, tzinfo=UTC))
    record, _ = folded(codec, codec.empty, clicks([now_us]), now_us)
    most = 0
    for _ in range(1_000):
        new = bytes(bytearray(record))
        for _ in range(3):
            codec.read([new], now_us)
            most = max(most, codec._kept.made.held)
    assert 10_000 < most <= 10_000 + len(record) + 2 * ROW_BYTES


def test_a_row_is_kept_from_the_second_time_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for once between two pushes is not kept; of what is asked for again no third row is made."""
    codec = RecordCodec(LASTING)
    now_us = to_us(datetime(2026, 3, 1, tzinfo=UTC))
    one, two, three = (folded(codec, codec.empty, clicks([now_us - i]), now_us)[0] for i in range(3))
    made: list[int] = []
    rows = codec._finals.rows

    def counted(cut: Cut, earliest_us: Array, strings: Strings) -> Any:
        made.append(len(cut.exact))
        return rows(cut, earliest_us, strings)

    monkeypatch.setattr(codec._finals, "rows", counted)
    codec.read([one, two], now_us)
    held = codec._kept.made.held
    codec.read([one, two], now_us, recent=[three, three])
    assert codec._kept.made.held == held  # each of the two pairs is new
    codec.read([one, two], now_us, recent=[three, None])
    assert made == [2, 2, 2]
    codec.read([one, two], now_us, recent=[three, None])  # the first was asked for before, and is known
    assert made == [2, 2, 2, 1]
    codec.read([two, one, two], now_us, recent=[None, three, None])
    assert made == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: r[:-8], "bytes long and should be"),
        (lambda r: r[:20], "truncated"),
        (lambda r: b"", "starts with nothing"),
        (lambda r: bytes(len(r)), "is not a featserve row"),
        (lambda r: r[:2] + b"\0" + r[3:], "has format 1.0"),
        (lambda r: r[:4] + b"abcd" + r[8:], "was written under another definition"),
    ],
)
def test_damaged_records_are_named(damage: Callable[[bytes], bytes], words: str) -> None:
    """A record that is truncated, foreign or of a plain row is refused, and what is wrong with it said."""
    codec = RecordCodec(clicks_of(Aggregate("last", "last", "page", over=Rolling(DAY))))
    record, _ = folded(codec, codec.empty, clicks([1, 2, 3]), 10)
    with pytest.raises(CorruptRow, match=f"stored record 1 of the batch .*{words}"):
        codec.read([record, damage(record)], 10)
