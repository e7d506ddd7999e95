"""What a window's definition says, refuses and spells out: in JSON, its hash, the schema and ``featserve describe``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from featserve.aggregates import AGGREGATES
from featserve.catalog import KINDS, Definitions
from featserve.cli.inventory import definition_json, show_definition
from featserve.definitions import (
    Aggregate,
    Calendar,
    Entity,
    EventSource,
    Expression,
    FeatureService,
    FeatureView,
    Field,
    Hopping,
    ParquetSource,
    Rolling,
    Window,
    col,
)
from featserve.errors import DefinitionError
from featserve.plan import compile_schema
from featserve.types import Bool, Float64, Int32, Int64, String, Timestamp, Vector
from featserve.wire import decode_schema, encode_schema
from tests.windows_model import WINDOWS, make_view

HOUR, WEEK = timedelta(hours=1), timedelta(days=7)
USER = Entity("user", {"user_id": Int64})
FIELDS = [
    Field("user_id", Int64),
    Field("order_id", String),
    Field("paid", Float64),
    Field("shop", String),
    Field("gift", Bool),
    Field("at", Timestamp),
    Field("face", Vector(3)),
]
SOURCE = ParquetSource("orders.parquet", event_time="time")
ORDERS = EventSource("orders", FIELDS, source=SOURCE, event_id="order_id")


def view(*aggregates: Aggregate, **rest: Any) -> FeatureView:
    given: dict[str, Any] = {"events": ORDERS, "aggregates": aggregates}
    return FeatureView("spending", USER, **(given | rest))


def total(**rest: Any) -> Aggregate:
    given: dict[str, Any] = {"of": "paid", "over": Rolling(WEEK)}
    return Aggregate("total", "sum", **(given | rest))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no window": (lambda: Aggregate("total", "sum", "paid"), "'total': .* say which: Rolling, Calendar or Hopping"),
    "a duration": (lambda: total(over=WEEK), "is not a window; say which: Rolling, Calendar or Hopping"),
    "no such function": (lambda: Aggregate("n", "cuont", over=Rolling(WEEK)), "unknown aggregate 'cuont'.*count"),
    "sum of nothing": (lambda: total(of=None), "of is required"),
    "sum of a string": (lambda: view(total(of="shop")), "there is no sum of string"),
    "mean of an instant": (lambda: view(Aggregate("m", "mean", "at", over=Rolling(WEEK))), "no mean of timestamp"),
    "last of a vector": (lambda: view(Aggregate("m", "last", "face", over=Rolling(WEEK))), "a vector.3., which no"),
    "unknown column": (lambda: view(total(of="paidd")), "no column 'paidd'.*paid"),
    "where is a number": (lambda: view(total(where=col("paid"))), "where paid is float64, neither true nor false"),
    "and of numbers": (lambda: view(total(where=col("paid") & col("gift"))), "takes no float64 and bool"),
    "an order of texts and numbers": (lambda: view(total(where=col("paid") > "x")), "takes no float64 and string"),
    "an expression as a truth": (lambda: bool(col("paid") > 1), "neither true nor false; write & | ~"),
    "NaN": (lambda: col("paid") > float("nan"), "a finite number"),
    "no duration": (lambda: Rolling(timedelta(0)), "not a positive duration"),
    "a hop that does not divide": (lambda: Hopping(WEEK, 5 * HOUR), "does not divide"),
    "a hop beyond its window": (lambda: Hopping(HOUR, WEEK), "does not divide"),
    "no zone": (lambda: Calendar(1, "day", "America/NewYork"), "no IANA time zone.*America/New_York"),
    "a zone outside": (lambda: Calendar(1, "day", "../../etc/passwd"), "no IANA time zone"),
    "no such unit": (lambda: Calendar(1, "year", "UTC"), "is not one of day, week, month"),  # type: ignore[arg-type]
    "no periods": (lambda: Calendar(0, "day", "UTC"), "is not a whole number from 1"),
    "events without aggregates": (lambda: view(), "aggregates is a list of at least one"),
    "aggregates without events": (lambda: view(total(), events=None), "aggregates need events"),
    "a key of another type": (lambda: view(total(), events=EventSource("e", [Field("user_id", Int32), FIELDS[2]])),
                              "key column 'user_id' .* is int64, and in event source 'e' it is int32"),
    "a ttl": (lambda: view(total(), ttl=WEEK), "a ttl does not apply"),
    "another source": (lambda: view(total(), source=ParquetSource("x", event_time="t")), "is that of its events"),
    "features beside": (lambda: FeatureView("v", USER, [FIELDS[2]], events=ORDERS, aggregates=[total()]), "no others"),
    "a name twice": (lambda: view(total(), total()), "'total' stands twice"),
    "no such event id": (lambda: EventSource("e", FIELDS, event_id="id"), "event_id 'id' is no field"),
    "an event id that is a float": (lambda: EventSource("e", FIELDS, event_id="paid"), "is float64; it is an integer"),
    "a default of an event": (lambda: EventSource("e", [Field("x", Int64, default=1)]), "has a default"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """What is inconsistent is refused as it is defined, and the message says what and why."""
    define, message = REFUSED[name]
    with pytest.raises(DefinitionError, match=message):
        define()


def test_json_round_trip(rng: np.random.Generator) -> None:
    """A view over events survives its JSON, with its hash; so do its event source and whoever else is made of it."""
    for _ in range(50):
        made = make_view(rng, WINDOWS, SOURCE)
        again = FeatureView.from_dict(json.loads(json.dumps(made.to_dict())))
        assert again == made
        assert again.hash == made.hash
        assert again.events is not None
        assert again.events.hash == EventSource.from_dict(json.loads(json.dumps(again.events.to_dict()))).hash


def test_the_hash_covers_the_meaning() -> None:
    """Whatever changes a value changes the hash, and a description does not."""
    base = view(total())
    others = [
        total(over=Rolling(WEEK + HOUR)),
        total(over=Rolling(WEEK, max_events=5)),
        total(over=Hopping(WEEK, HOUR)),
        total(over=Hopping(WEEK, 2 * HOUR)),
        total(over=Calendar(7, "day", "UTC")),
        total(over=Calendar(6, "day", "UTC")),
        total(over=Calendar(7, "week", "UTC")),
        total(over=Calendar(7, "day", "America/New_York")),
        total(of=col("paid") * 2),
        total(where=col("gift")),
        total(default=0.0),
        Aggregate("total", "mean", "paid", over=Rolling(WEEK)),
        *(Aggregate("total", "distinct_count", "paid", over=Rolling(WEEK), max_distinct=most) for most in (5, 6)),
    ]
    changed = [view(a).hash for a in others]
    changed.append(view(total(), events=EventSource("orders", FIELDS, source=SOURCE)).hash)
    changed.append(view(total(), events=replace(ORDERS, version=2)).hash)
    assert len({base.hash, *changed}) == len(changed) + 1
    assert view(total(description="What was paid")).hash == base.hash
    assert view(total(description="What was paid")) != base


def test_plain_views_keep_their_hash() -> None:
    """A view of rows has the hash that it had before there were windows, so that stored ones still match."""
    plain = FeatureView("plain", USER, [Field("x", Float64)], ttl=HOUR, source=SOURCE)
    assert plain.hash == "a12a0fa7110f6c17e8d8945a977fc020472ff533d43625bb6115d1403296cd6b"
    assert "events" not in plain.to_dict()


def test_rows_of_a_view_over_events() -> None:
    """Of its events a view reads keys, event id and what its aggregates take; a null key is no error, a null id is."""
    one = view(Aggregate("n", "count", over=Rolling(WEEK))).rows
    assert [f.name for f in one.features] == ["user_id", "order_id"]
    two = view(total(where=col("shop") == "north")).rows
    assert [f.name for f in two.features] == ["user_id", "order_id", "paid", "shop"]
    assert (dict(two.keys), two.id, two.source) == ({}, "spending@1", SOURCE)
    assert [f.name for f in two.features if f.not_null] == ["order_id"]


def test_equality_of_expressions_is_not_asked_for() -> None:
    """Two aggregates, views or event sources are compared as a whole, though == of two expressions is an expression."""
    assert isinstance(col("x") == col("x"), Expression)
    assert total(where=col("paid") > 1) == total(where=col("paid") > 1)
    assert total(where=col("paid") > 1) != total(where=col("paid") > 2)
    assert len({total(where=col("paid") > 1), total(where=col("paid") > 1)}) == 1


BOUNDARIES: dict[str, Window] = {
    "T - 168 h < event time <= T": Rolling(WEEK),
    "T - 90 min < event time <= T": Rolling(timedelta(minutes=90)),
    "T - 1 us < event time <= T": Rolling(timedelta(microseconds=1)),
    "floor(T - 168 h, 1 h) <= event time <= T": Hopping(WEEK, HOUR),
    "the start of T's day in UTC <= event time <= T": Calendar(1, "day", "UTC"),
    "the start of the week 1 week before T's in Asia/Tokyo <= event time <= T": Calendar(2, "week", "Asia/Tokyo"),
    "the start of the day 6 days before T's in America/New_York <= event time <= T": Calendar(
        7, "day", "America/New_York"
    ),
}


@pytest.mark.parametrize("words", BOUNDARIES)
def test_boundaries_in_words(words: str) -> None:
    """A window says in words which event times it holds."""
    assert BOUNDARIES[words].boundaries == words


def test_the_schema_spells_windows_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Kind, boundaries, zone, empty value, ties, function, filter and source come with the schema, and are shown."""
    made = view(
        total(over=Calendar(7, "day", "America/New_York"), where=col("shop") == "north"),
        Aggregate("n", "distinct_count", "shop", over=Hopping(WEEK, HOUR)),
    )
    service = FeatureService("fraud", [made["total", "n"]])
    schema = decode_schema(encode_schema(compile_schema(service)))
    assert schema == compile_schema(service)
    total_, n = (f.aggregate for f in schema.features)
    assert total_ is not None
    assert (total_.function, total_.of, total_.where) == ("sum", "paid", "(shop == 'north')")
    assert (total_.kind, total_.zone, total_.events) == ("calendar", "America/New_York", "orders@1")
    assert (total_.empty_json, total_.ties) == ("null", "event_time, known_at, sequence")
    assert n is not None
    assert (n.kind, n.zone, n.empty_json) == ("hopping", "", "0")
    for described in (schema, service, made):
        show_definition(described)
        shown = " ".join(capsys.readouterr().out.split())
        assert "sum(paid) where (shop == 'north')" in shown
        assert "hopping: floor(T - 168 h, 1 h)" in shown
    assert definition_json(schema)["features"][0]["aggregate"]["kind"] == "calendar"
    show_definition(ORDERS)
    assert "event id order_id" in " ".join(capsys.readouterr().out.split())


def test_every_kind_of_definition_is_shown(rng: np.random.Generator) -> None:
    """An event source is a kind of definition like any other: planned, applied, listed and described."""
    assert "event_sources" in [kind.field for kind in KINDS]
    assert Definitions(event_sources={ORDERS.id: ORDERS}).event_sources == {"orders@1": ORDERS}
    made = make_view(rng, WINDOWS)
    assert {a.function for a in made.aggregates} <= set(AGGREGATES)
