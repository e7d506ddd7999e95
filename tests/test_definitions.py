"""Definitions: what is refused and how it says so, the canonical form, and the hash of what can change a value."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from featserve.definitions import (
    CsvSource,
    Entity,
    FeatureService,
    FeatureView,
    Field,
    OnDemandTransform,
    ParquetSource,
    RequestColumn,
    Selection,
    Source,
    micros,
)
from featserve.definitions.code import MAIN, Code
from featserve.errors import DefinitionError
from featserve.types import Bool, Bytes, Float32, Float64, Int32, Int64, String, Timestamp, Type, Vector
from tests.random_data import random_entity, random_service, random_view

USER = Entity("user", {"user_id": Int64})
ROUTE = Entity("route", {"origin": String, "dest": String})
NAN = float("nan")


def view(name: str = "weather", **changes: Any) -> FeatureView:
    parts: dict[str, Any] = {
        "entity": USER,
        "features": [Field("temp", Float32), Field("wind", Float64, min=0.0), Field("sky", String)],
        "ttl": timedelta(hours=3),
        "source": parquet(),
        "owner": "ops",
    }
    return FeatureView(name, **(parts | changes))


def parquet(**changes: Any) -> Source:
    parts: dict[str, Any] = {"path": "weather/*.parquet", "event_time": "time", "delay": timedelta(minutes=5)}
    parts |= changes
    return ParquetSource(parts.pop("path"), **parts)


def csv(**changes: Any) -> Source:
    return CsvSource("weather.csv", event_time="time", **changes)


def service(*features: Any, **changes: Any) -> FeatureService:
    return FeatureService("delay", list(features or [view()]), **changes)


def transform(inputs: Any = None, outputs: Any = None, **changes: Any) -> OnDemandTransform:
    given = {"t": view()["temp"]} if inputs is None else inputs
    made = [Field("a", Float32), Field("b", Float32)] if outputs is None else outputs
    return OnDemandTransform("wind", given, made, Code("wind", {MAIN: ""}), **changes)


def fields(count: int) -> list[Field]:
    return [Field(f"f{i}", Int64) for i in range(count)]


REFUSED: list[tuple[Callable[[], Any], str]] = [
    # names and versions
    (lambda: Entity("User", {"id": Int64}), "entity name 'User': use up to 63 of a-z, 0-9 and _, a letter first"),
    (lambda: Entity("", {"id": Int64}), "entity name ''"),
    (lambda: Entity("a\n", {"id": Int64}), r"entity name 'a\\n'"),
    (lambda: Entity(None, {"id": Int64}), "entity name None"),  # type: ignore[arg-type]
    (lambda: Field("1st", Int64), "feature name '1st'"),
    (lambda: Field("é", Int64), "feature name 'é'"),
    (lambda: view("x" * 64), "feature view name 'xxx"),
    (lambda: FeatureService("a.b", [view()]), "feature service name 'a.b'"),
    (lambda: view(version=0), "feature view 'weather': version 0 is not a whole number from 1 up"),
    (lambda: view(version=True), "version True"),
    (lambda: view(version=1.0), "version 1.0"),
    (lambda: view(version=2**31), "version 2147483648"),
    (lambda: service(version=-1), "feature service 'delay': version -1"),
    # texts and tags
    (lambda: Entity("user", {"id": Int64}, description=None), "entity 'user': description None is not a string"),  # type: ignore[arg-type]
    (lambda: Field("temp", Int64, description=5), "feature 'temp': description 5 is not a string"),  # type: ignore[arg-type]
    (lambda: view(owner=["ops"]), r"feature view 'weather': owner \['ops'\] is not a string"),
    (lambda: service(description=b"x"), "feature service 'delay': description b'x' is not a string"),
    (lambda: view(tags={"tier": 1}), "feature view 'weather': tags is a mapping of strings to strings"),
    (lambda: service(tags=["tier"]), "feature service 'delay': tags is a mapping"),
    # entities
    (lambda: Entity("user", {}), r"entity 'user': keys is a mapping of at least one key column.*\{'user_id': Int64\}"),
    (lambda: Entity("user", ["id"]), "entity 'user': keys is a mapping"),  # type: ignore[arg-type]
    (lambda: Entity("user", {"Id": Int64}), "entity 'user': key column name 'Id'"),
    (lambda: Entity("user", {"id": Float64}), "key column 'id' is float64; a key is one of bool, int32, int64, string"),
    (lambda: Entity("user", {"id": Vector(2)}), r"key column 'id' is vector\[2\]"),
    (lambda: Entity("user", {"id": int}), "key column 'id' is <class 'int'>"),  # type: ignore[dict-item]
    # features
    (lambda: Field("temp", float), "feature 'temp': <class 'float'> is not a type such as Int64"),  # type: ignore[arg-type]
    (lambda: Field("temp", Int32, min=5, max=4), "feature 'temp': min 5 is greater than max 4"),
    (lambda: Field("temp", String, min="a"), "feature 'temp': min does not apply to string"),
    (lambda: Field("temp", Bool, max=True), "max does not apply to bool"),
    (lambda: Field("temp", Vector(2), min=0), r"min does not apply to vector\[2\]"),
    (lambda: Field("temp", Int32, min=0.5), r"feature 'temp': min\[0\]: expected int32, got 0.5 \(float\)"),
    (lambda: Field("temp", Int32, max=2**31), "max.*out of range"),
    (lambda: Field("temp", Float64, min=NAN), "feature 'temp': min holds nan, which is no value"),
    (lambda: Field("temp", Float32, default=NAN), "default holds nan, which is no value"),
    (lambda: Field("temp", Vector(2), default=[0.0, NAN]), r"default holds \[0.0, nan\], which is no value"),
    (lambda: Field("temp", Float32, default="0"), r"default\[0\]: expected float32, got '0' \(str\)"),
    (lambda: Field("temp", Float32, default=1e39), "default.*out of range"),
    (lambda: Field("temp", Vector(2), default=[1.0]), "default.*got 1 elements"),
    (lambda: Field("temp", Bytes, default="abc"), r"default\[0\]: expected bytes, got 'abc' \(str\)"),
    (lambda: Field("temp", Timestamp, default=np.datetime64("NaT", "us")), "default holds .*NaT.*, which is no value"),
    (lambda: Field("temp", Int64, allowed=[]), r"allowed \[\] is not a list of at least one int64"),
    (lambda: Field("temp", String, allowed="abc"), "allowed 'abc' is not a list of at least one string"),
    (lambda: Field("temp", Int64, allowed=5), "allowed 5 is not a list"),  # type: ignore[arg-type]
    (lambda: Field("temp", Int64, allowed={1: 2}), r"allowed \{1: 2\} is not a list"),
    (lambda: Field("temp", Int64, allowed=(n for n in [1])), "allowed <generator.*> is not a list"),  # type: ignore[arg-type]
    (lambda: Field("temp", Int64, allowed=[1, None]), "allowed holds None"),
    (lambda: Field("temp", Int64, allowed=[1, "2"]), r"allowed\[0\]: expected int64, got '2'"),
    (lambda: Field("temp", Float64, allowed=[NAN]), "allowed holds nan"),
    (lambda: Field("temp", Vector(2), allowed=[[1, 2]]), r"allowed does not apply to vector\[2\]"),
    (lambda: Field("temp", Int64, not_nan=True), "not_nan does not apply to int64"),
    (lambda: Field("temp", Int64, not_null=1), "feature 'temp': not_null 1 is neither True nor False"),  # type: ignore[arg-type]
    (lambda: Field("temp", Int64, default=4, allowed=[1, 2]), "default 4 is not one of the allowed values"),
    (lambda: Field("temp", Int64, default=4, max=3), "default 4 is outside of min and max"),
    (lambda: Field("temp", Float64, default=-1, min=0), "default -1.0 is outside of min and max"),
    # views
    (lambda: view(entity={"user_id": Int64}), "feature view 'weather': entity .* is not an Entity"),
    (lambda: view(features=[]), "feature view 'weather': features is a list of at least one Field"),
    (lambda: view(features=["temp"]), "features is a list of at least one Field"),
    (lambda: view(features=Field("temp", Int64)), "features is a list of at least one Field"),
    (lambda: view(features=5), "features is a list of at least one Field"),
    (lambda: view(features=fields(2) + fields(1)), "feature view 'weather': feature 'f0' stands twice"),
    (lambda: view(features=fields(4_097)), "4,097 features; the most is 4,096"),
    (lambda: view(features=[Field("user_id", Int64)]), "feature 'user_id' is also a key column of entity 'user'"),
    (lambda: view(ttl=3_600), "feature view 'weather': ttl: 3600 is not a datetime.timedelta"),
    (lambda: view(ttl=timedelta(0)), "ttl: 0:00:00 is not a positive duration"),
    (lambda: view(ttl=-timedelta(1)), "ttl: -1 day, 0:00:00 is not a positive duration"),
    (lambda: view(ttl=timedelta.max), "ttl: .* is longer than .* leave it out to mean for ever"),
    (lambda: view(source="a.parquet"), "source 'a.parquet' is not a ParquetSource or CsvSource"),
    (
        lambda: view(source=parquet(columns={"tmp": "t"})),
        "its source renames 'tmp', which is no .* did you mean 'temp'",
    ),
    (lambda: view()["tmp"], "feature view 'weather' has no feature 'tmp'; did you mean 'temp'"),
    (lambda: view()["temp", "sly"], "has no feature 'sly'; did you mean 'sky'"),
    (lambda: view()[0], r"feature view 'weather': 0 names no features; choose them by name, as in \['a', 'b'\]"),  # type: ignore[index]
    (lambda: view()[()], r"\(\) names no features"),
    (lambda: view()["temp", 1], r"\('temp', 1\) names no features"),  # type: ignore[index]
    (lambda: view()[["temp"]], r"\['temp'\] names no features"),  # type: ignore[index]
    (lambda: Selection(view(), ("cloud",)), "has no feature 'cloud'"),
    # sources
    (lambda: parquet(path=""), "parquet source: path '' is not a file path or glob"),
    (lambda: parquet(path=5), "parquet source: path 5"),
    (lambda: parquet(event_time=""), "parquet source 'weather/.*': event_time '' is not a column name"),
    (lambda: parquet(event_time=None), "event_time is required"),
    (lambda: parquet(known_at=1), "known_at 1 is not a column name"),
    (lambda: parquet(known_at="seen"), "known_at and delay are two answers to one question; declare one of them"),
    (lambda: parquet(delay=5), "delay: 5 is not a datetime.timedelta"),
    (lambda: parquet(delay=-timedelta(1)), "delay: -1 day, 0:00:00 is not zero or a positive duration"),
    (lambda: parquet(columns=["a"]), "columns maps a feature or key name to the source's column name"),
    (lambda: parquet(columns={"temp": 1}), "columns maps a feature or key name"),
    (lambda: csv(delimiter=";;"), "csv source 'weather.csv': delimiter ';;' is not one ASCII character"),
    (lambda: csv(delimiter='"'), "or is a quote or line end"),
    (lambda: csv(delimiter="é"), "delimiter 'é' is not one ASCII character"),
    (lambda: csv(nulls="NA"), r"nulls 'NA' is not a list; write \['NA'\]"),
    (lambda: csv(nulls=["NA", None]), r"nulls \['NA', None\] is not a list of strings"),
    (lambda: csv(nulls=5), "nulls 5 is not a list of strings"),
    # services
    (lambda: FeatureService("delay", []), "feature service 'delay': features is a list of at least one view"),
    (lambda: FeatureService("delay", view()), "feature service 'delay': features is a list of at least one view"),  # type: ignore[arg-type]
    (lambda: FeatureService("delay", 5), "features is a list of at least one view"),  # type: ignore[arg-type]
    (lambda: service("weather"), "'weather' is neither a feature view nor a transform, nor features chosen from one"),
    (lambda: service(dtype=Int64), "feature service 'delay': dtype int64 is neither Float32 nor Float64"),
    (lambda: service(dtype="float32"), "dtype 'float32' is neither"),
    (lambda: service(view()["temp"], view()["sky", "temp"]), "feature 'weather.temp' stands twice"),
    (lambda: service(view()["temp", "temp"]), "feature 'weather.temp' stands twice"),
    (lambda: service(view()["temp"], view(version=2)["sky"]), "two definitions of 'weather': weather@1 and weather@2"),
    (lambda: service(view()["temp"], view(ttl=None)["sky"]), "two definitions of 'weather': weather@1 and weather@1"),
    (
        lambda: service(
            view(entity=ROUTE)["temp"], view(entity=Entity("route", {"dest": String, "origin": String}))["sky"]
        ),
        "two definitions of 'weather'",
    ),
    (
        lambda: service(view(), view("other", entity=Entity("person", {"user_id": String}))),
        "feature service 'delay': key column 'user_id' is int64 in weather@1 and string in other@1",
    ),
    # transforms
    (lambda: transform()[0], r"transform 'wind': 0 names no outputs; choose them by name, as in \['a', 'b'\]"),  # type: ignore[index]
    (lambda: transform()[()], r"\(\) names no outputs"),
    (lambda: transform()["a", 1], r"\('a', 1\) names no outputs"),  # type: ignore[index]
    (lambda: transform()[["a"]], r"\['a'\] names no outputs"),  # type: ignore[index]
    (lambda: transform()["a", "c"], "transform 'wind' has no output 'c'; there is: 'a', 'b'"),
    (lambda: transform({}), "transform 'wind': inputs maps each parameter"),
    (lambda: transform([view()["temp"]]), r"inputs maps each parameter to view\['feature'\], a RequestColumn or"),
    (lambda: transform({"t": view()["temp", "wind"]}), "transform 'wind': input 't' is 2 features; it takes one"),
    (lambda: transform({"t": transform()}), "input 't' is OnDemandTransform"),
    (lambda: transform({"t": 5}), r"input 't' is 5; it takes view\['feature'\], a RequestColumn or RequestTime\(\)"),
    (lambda: transform({"T": view()["temp"]}), "transform 'wind': parameter name 'T'"),
    (lambda: transform(outputs=[]), "transform 'wind': outputs is a list of at least one Field"),
    (lambda: transform(outputs=["a"]), "outputs is a list of at least one Field"),
    (lambda: transform(outputs=Field("a", Float32)), "outputs is a list of at least one Field"),
    (lambda: transform(outputs=[Field("a", Float32)] * 2), "transform 'wind': output 'a' stands twice"),
    (lambda: transform(outputs=[Field("a", Float32, min=0)]), "output 'a': constraints are for rows that are written"),
    (lambda: transform(nulls="none"), "transform 'wind': nulls 'none' is neither 'strict' nor 'pass'"),
    (lambda: RequestColumn("amount", float), "request column 'amount': <class 'float'> is not a type such as Float32"),  # type: ignore[arg-type]
    (lambda: RequestColumn("Amount", Float32), "request column name 'Amount'"),
    (lambda: micros("wait", 5), "wait: 5 is not a datetime.timedelta"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_what_contradicts_itself_is_refused(make: Callable[[], Any], message: str) -> None:
    """A definition that is inconsistent fails where it is written, with a message that says what and where."""
    with pytest.raises(DefinitionError, match=message):
        make()


CANONICAL: list[tuple[Type, Any, Any]] = [
    (Float64, 0, 0.0),
    (Float64, np.float32(0.5), 0.5),
    (Float64, 0.1, 0.1),
    (Float32, 0.1, 0.1),
    (Float32, np.float32(0.1), 0.1),
    (Float32, 0.10000000149011612, 0.1),
    (Float32, float("inf"), float("inf")),
    (Int64, np.int32(5), 5),
    (Bool, np.True_, True),
    (String, np.str_("a"), "a"),
    (Bytes, b"\xff\x00", "\xff\x00"),
    (Bytes, bytearray(b"a"), "a"),
    (Timestamp, datetime(2024, 1, 1), 1_704_067_200_000_000),
    (Timestamp, datetime(2024, 1, 1, tzinfo=UTC), 1_704_067_200_000_000),
    (Timestamp, np.datetime64("2024-01-01"), 1_704_067_200_000_000),
    (Timestamp, 1_704_067_200_000_000, 1_704_067_200_000_000),
    (Vector(2), (0.1, 1), [0.1, 1.0]),
    (Vector(2), np.array([0.1, 1.0], np.float32), [0.1, 1.0]),
]


@pytest.mark.parametrize(("type", "value", "expected"), CANONICAL, ids=lambda value: repr(value)[:30])
def test_a_value_has_one_form(type: Type, value: Any, expected: Any) -> None:
    """However a default is written, its form, and so the hash of its view, is one and is JSON."""
    f = Field("a", type, default=value)
    assert repr(f.default) == repr(expected)
    assert json.loads(json.dumps(f.meaning())) == f.meaning()


def test_the_order_of_a_set_means_nothing() -> None:
    """Allowed values and spellings of null are sets: written in any order, any number of times, they mean the same."""
    texts = ["b", "a", "é", "a"]
    assert Field("a", String, allowed=texts).meaning() == Field("a", String, allowed=set(texts)).meaning()
    assert csv(nulls=["NA", ""]).to_dict() == csv(nulls={"", "NA"}).to_dict() == csv(nulls=("", "NA", "")).to_dict()


def test_random_definitions_survive_json(rng: np.random.Generator) -> None:
    """Any definition is rebuilt from its JSON with the same meaning, hash and everything else."""
    for _ in range(100):
        entities = [random_entity(rng, name) for name in "ab"]
        views = [random_view(rng, f"v{i}", entities[i % 2], constraints=i == 2) for i in range(3)]
        rebuilt = [FeatureView.from_dict(json.loads(json.dumps(v.to_dict()))) for v in views]
        assert rebuilt == views
        assert [v.hash for v in rebuilt] == [v.hash for v in views]
        assert [v.to_dict() for v in rebuilt] == [v.to_dict() for v in views]
        first = random_service(rng, "s", views)
        again = FeatureService.from_dict(json.loads(json.dumps(first.to_dict())), {v.id: v for v in rebuilt}, {})
        assert again == first
        assert again.hash == first.hash


def hashes(mutations: dict[str, Any], make: Callable[..., Any], base: str) -> dict[str, bool]:
    """Return, for each mutation, whether the hash of what it makes differs from ``base``."""
    return {name: make(**changes).hash != base for name, changes in mutations.items()}


def test_the_hash_of_a_view_is_its_meaning() -> None:
    """Everything that can change a value changes a view's hash; what is said about it does not."""
    temp, wind, sky = view().features
    changing: dict[str, Any] = {
        "name": {"name": "climate"},
        "version": {"version": 2},
        "entity name": {"entity": Entity("person", {"user_id": Int64})},
        "key name": {"entity": Entity("user", {"id": Int64})},
        "key type": {"entity": Entity("user", {"user_id": String})},
        "order of features": {"features": [wind, temp, sky]},
        "fewer features": {"features": [temp, wind]},
        "feature name": {"features": [Field("tmp", Float32), wind, sky]},
        "feature type": {"features": [Field("temp", Float64), wind, sky]},
        "default": {"features": [Field("temp", Float32, default=0), wind, sky]},
        "negative zero": {"features": [Field("temp", Float32, default=-0.0), wind, sky]},
        "min": {"features": [temp, Field("wind", Float64, min=0.5), sky]},
        "no min": {"features": [temp, Field("wind", Float64), sky]},
        "max": {"features": [temp, Field("wind", Float64, min=0, max=9), sky]},
        "allowed": {"features": [temp, wind, Field("sky", String, allowed=["clear"])]},
        "not null": {"features": [temp, wind, Field("sky", String, not_null=True)]},
        "not nan": {"features": [Field("temp", Float32, not_nan=True), wind, sky]},
        "ttl": {"ttl": timedelta(hours=3, microseconds=1)},
        "no ttl": {"ttl": None},
        "no source": {"source": None},
        "source path": {"source": parquet(path="other/*.parquet")},
        "source event time": {"source": parquet(event_time="at")},
        "source delay": {"source": parquet(delay=timedelta(minutes=6))},
        "source known at": {"source": parquet(delay=timedelta(0), known_at="seen")},
        "source columns": {"source": parquet(columns={"temp": "t"})},
        "source format": {"source": csv(delay=timedelta(minutes=5))},
    }
    keeping: dict[str, Any] = {
        "nothing": {},
        "owner": {"owner": "others"},
        "description": {"description": "of the air"},
        "tags": {"tags": {"tier": "1"}},
        "entity description": {"entity": Entity("user", {"user_id": Int64}, description="A person")},
        "feature description": {"features": [Field("temp", Float32, description="Celsius"), wind, sky]},
        "an integer for a float": {"features": [temp, Field("wind", Float64, min=0), sky]},
        "a tuple for a list": {"features": (temp, wind, sky)},
    }
    assert hashes(changing, view, view().hash) == dict.fromkeys(changing, True)
    assert hashes(keeping, view, view().hash) == dict.fromkeys(keeping, False)
    all_hashes = [view(**changes).hash for changes in changing.values()]
    assert len(set(all_hashes)) == len(all_hashes)
    assert csv(delimiter=";").to_dict() != csv().to_dict() != csv(nulls=["x"]).to_dict()


def test_the_hash_of_a_composite_key_has_its_order() -> None:
    """The order of key columns is part of what an entity means: it is the order of the stored key."""
    turned = Entity("route", {"dest": String, "origin": String})
    assert turned.hash != ROUTE.hash
    assert turned != ROUTE
    assert Entity("route", {"origin": String, "dest": String}) == ROUTE


def test_the_hash_of_a_service_is_its_meaning() -> None:
    """A service's hash covers its dtype, the order of its features and the meaning of its views, and no more."""
    base = service()
    changing = {
        "name": FeatureService("late", [view()]),
        "version": service(version=2),
        "dtype": service(dtype=Float64),
        "fewer features": service(view()["temp", "wind"]),
        "order": service(view()["wind", "temp", "sky"]),
        "a view's meaning": service(view(ttl=None)),
        "a view's version": service(view(version=2)),
        "another view": service(view(), view("climate")),
    }
    keeping = {
        "owner": service(owner="others", description="new", tags={"a": "b"}),
        "the owner of a view": service(view(owner="others")),
        "chosen by name": service(view()["temp", "wind", "sky"]),
        "chosen in parts": service(view()["temp"], view()["wind", "sky"]),
    }
    assert {name: s.hash != base.hash for name, s in changing.items()} == dict.fromkeys(changing, True)
    assert {name: s.hash != base.hash for name, s in keeping.items()} == dict.fromkeys(keeping, False)


def test_hashes_are_those_of_what_was_applied() -> None:
    """The hash of a definition is the same in every process and in every release: rows and requests carry it."""
    pinned = FeatureView(
        "weather",
        Entity("airport", {"origin": String, "runway": Int32}),
        [Field("temp", Float32, default=0.1, allowed=[2, 0.1, 1]), Field("raw", Bytes, default=b"\xff")],
        ttl=timedelta(hours=3),
        source=CsvSource("w.csv", event_time="time", nulls={"NA", ""}),
    )
    assert pinned.hash == "f76e1da87a608289c6a5fcddfb1f7d928ad1847654e8955c0140cb46be3029ec"
    assert (
        FeatureService("delay", [pinned["raw"]]).hash
        == "3d71a65fb9221a07028b64f3d44b79df15a53b655a2611356ea138efd8178c97"
    )


def test_services_know_their_views_and_keys() -> None:
    """A service's views stand in order of first use, once each, and its keys are theirs."""
    routes = view("traffic", entity=ROUTE)
    people = view("people", entity=Entity("person", {"user_id": Int64, "dest": String}))
    s = service(routes["temp"], view()["sky"], routes["sky"], people)
    assert [v.name for v in s.views] == ["traffic", "weather", "people"]
    assert s.keys == {"origin": String, "dest": String, "user_id": Int64}
    assert list(s.keys) == ["origin", "dest", "user_id"]
    assert [name for name, _, _ in s.fields][:3] == ["traffic.temp", "weather.sky", "traffic.sky"]
    assert (view().id, s.id, view().ttl_us) == ("weather@1", "delay@1", 10_800_000_000)


def test_definitions_hold_copies() -> None:
    """Changing a mapping or a list after it was given changes no definition."""
    keys, tags, features = {"user_id": Int64}, {"a": "b"}, [Field("temp", Float32)]
    entity = Entity("user", keys)
    v = FeatureView("weather", entity, features, tags=tags)
    before = v.to_dict()
    keys["more"] = Int64
    tags["c"] = "d"
    features.append(Field("wind", Float32))
    assert v.to_dict() == before
