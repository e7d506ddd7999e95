"""What a plan says of each difference between what is stored and what is declared."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from featserve.catalog import Definitions
from featserve.changes import compare
from featserve.definitions import Entity, FeatureService, Field, OnDemandTransform, ParquetSource, RequestColumn
from featserve.definitions.code import MAIN, Code
from featserve.types import Float32, Float64, Int64
from tests.declarations import AIRPORT, declare, view

FEATURES = [Field("temp", Float32), Field("wind", Float64, description="knots", min=0.0)]


@pytest.mark.parametrize(
    ("changes", "details"),
    [
        ({"ttl": timedelta(hours=4)}, ["ttl: 3:00:00 -> 4:00:00"]),
        ({"ttl": None}, ["ttl: 3:00:00 -> none"]),
        ({"source": None}, ["source: removed"]),
        (
            {"source": ParquetSource("w.parquet", event_time="t")},
            [
                "source: path 'weather/*.parquet' -> 'w.parquet'",
                "source: event_time 'time' -> 't'",
                "source: delay 0:05:00 -> 0:00:00",
            ],
        ),
        ({"features": [Field("temp", Float64), FEATURES[1]]}, ["feature temp: type float32 -> float64"]),
        ({"features": [*FEATURES, Field("rain", Float32)]}, ["feature rain: added"]),
        ({"features": FEATURES[:1]}, ["feature wind: removed"]),
        ({"features": FEATURES[::-1]}, ["features: in another order"]),
        (
            {"features": [Field("temp", Float32, default=1.0), FEATURES[1]], "owner": "x"},
            ["feature temp: default none -> 1.0", "owner: 'ops' -> 'x'"],
        ),
        (
            {"entity": Entity("airport", {"origin": Int64, "hour": Int64}, description=AIRPORT.description)},
            ["entity: keys origin string -> origin int64, hour int64"],
        ),
    ],
)
def test_a_changed_meaning_is_a_conflict(changes: dict[str, Any], details: list[str]) -> None:
    """A version that means something else is a conflict that names each difference, and nothing else."""
    (conflict,) = compare(declare(view()), declare(view(**changes))).conflicts
    assert conflict.id == "weather@1"
    assert set(conflict.details) == set(details)


@pytest.mark.parametrize(
    ("changes", "details"),
    [
        ({"owner": "x", "description": "d"}, ["owner: 'ops' -> 'x'", "description: '' -> 'd'"]),
        ({"tags": {"tier": "1"}}, ["tags: tier none -> '1'"]),
        (
            {"features": [Field("temp", Float32, description="F"), FEATURES[1]]},
            ["feature temp: description '' -> 'F'"],
        ),
    ],
)
def test_metadata_is_an_update(changes: dict[str, Any], details: list[str]) -> None:
    """Owner, descriptions and tags change under the same version."""
    (update,) = compare(declare(view()), declare(view(**changes))).writes
    assert (update.action, update.details) == ("update", tuple(details))


def test_an_entity_of_the_same_keys_is_an_update() -> None:
    """A described entity updates itself and the views that hold it, and conflicts with nothing."""
    described = Entity("airport", dict(AIRPORT.keys), description="new")
    plan = compare(declare(view()), declare(view(entity=described)))
    assert [(change.id, change.action) for change in plan.changes] == [("airport", "update"), ("weather@1", "update")]


def test_a_service_that_moves_to_another_version_is_a_conflict() -> None:
    """A service names the view versions that it is made of; another one needs a new version of the service."""
    stored = declare(FeatureService("fraud", [view()["temp"]]))
    (moved,) = compare(stored, declare(FeatureService("fraud", [view(version=2)["wind", "temp"]]))).conflicts
    assert moved.id == "fraud@1"
    assert set(moved.details) == {
        f"view weather: weather@1 ({view().hash[:12]}) -> weather@2 ({view(version=2).hash[:12]})",
        "feature weather.wind: added",
    }
    (retyped,) = compare(stored, declare(FeatureService("fraud", [view()["temp"]], dtype=Float64))).conflicts
    assert retyped.details == ("dtype: float32 -> float64",)


def route(runway: float = 220.0, **changes: Any) -> OnDemandTransform:
    parts: dict[str, Any] = {
        "inputs": {"temp": view()["temp"], "runway": RequestColumn("runway", Float32)},
        "outputs": [Field("angle", Float64)],
    }
    code = Code("crosswind", {MAIN: f"def crosswind(temp, runway):\n    return temp * {runway}\n"})
    return OnDemandTransform("crosswind", **(parts | changes), code=code)


def test_a_changed_transform_is_a_conflict() -> None:
    """A transform's code, inputs and outputs are its meaning, and a plan says which of them changed."""
    stored = declare(FeatureService("delay", [view(), route()]))
    edited, service = compare(stored, declare(FeatureService("delay", [view(), route(180.0)]))).conflicts
    assert [detail.partition(" with hash")[0] for detail in edited.details] == ["code: modules of 1"]
    assert service.details == (
        f"transform crosswind: crosswind@1 ({route().hash[:12]}) -> crosswind@1 ({route(180.0).hash[:12]})",
    )
    rewired = route(
        inputs={"temp": view(version=2)["temp"], "runway": RequestColumn("runway", Float64)},
        outputs=[Field("angle", Float32)],
    )
    conflict, _ = compare(stored, declare(FeatureService("delay", [rewired]))).conflicts
    first, second = view().hash[:12], view(version=2).hash[:12]
    assert conflict.details == (
        f"inputs: temp 'temp' of weather@1 ({first}) -> 'temp' of weather@2 ({second})",
        "inputs: runway request runway, type float32 -> request runway, type float64",
        "output angle: type float64 -> float32",
    )


def test_two_writings_of_one_list_are_one() -> None:
    """Features chosen one by one or at once are the same service: no conflict, nothing to write."""
    stored = declare(FeatureService("delay", [view()["temp"], view()["wind"]]))
    plan = compare(stored, declare(FeatureService("delay", [view()["temp", "wind"]])))
    assert (plan.conflicts, plan.writes) == ((), ())


def test_the_order_of_a_plan() -> None:
    """Changes stand by kind, then by name, and versions as numbers."""
    declared = declare(view(version=10), view(version=9), FeatureService("a", [view("zoo")]))
    assert [change.id for change in compare(Definitions(), declared).changes] == [
        "airport",
        "weather@9",
        "weather@10",
        "zoo@1",
        "a@1",
    ]
