"""The registry, over a SQLite file and over a real PostgreSQL: one suite for both."""

from __future__ import annotations

from typing import Any

import pytest

from featserve.definitions import Entity, FeatureService, FeatureView, Field, OnDemandTransform, Outputs, Selection
from featserve.definitions.code import MAIN, Code
from featserve.errors import DefinitionError, RegistryConflict, UnknownName
from featserve.registry import Load, Registry, Snapshot
from featserve.types import Bytes, Float64, Int64, String, Timestamp, Vector
from tests.declarations import AIRPORT, NOW_US, declare, view

pytest_plugins = ["tests.postgres"]


def actions(plan: Any) -> dict[str, str]:
    return {change.id: change.action for change in plan.changes}


# Apply, and read back


def test_what_was_applied_is_read_back(registry: Registry) -> None:
    """A snapshot holds definitions equal to those applied, of every type and setting."""
    rich = FeatureView(
        "rich",
        Entity("route", {"origin": String, "day": Timestamp}, description="ü"),
        [
            Field("raw", Bytes, default=b"\x00\xff", description="'quoted' \x00"),
            Field("when", Timestamp, min=0),
            Field("carrier", String, allowed=["AA", "ü☃"], default="AA", not_null=True),
            Field("embedding", Vector(3), default=[0.1, 0.2, 1e-7]),
            Field("big", Int64, max=2**62 + 1),
            Field("ratio", Float64, default=0.1 + 0.2, not_nan=True),
        ],
        tags={"team": "a", "tier": "1"},
        description="everything",
    )
    service = FeatureService("fraud", [rich["raw", "when"], view(), rich["big"]], dtype=Float64, owner="me")
    declared = declare(service)
    registry.apply(declared, "ann", NOW_US)
    snapshot = registry.snapshot()
    for kind in ("entities", "views", "services"):
        assert dict(getattr(snapshot, kind)) == dict(getattr(declared, kind))
    assert snapshot.services["fraud@1"].hash == service.hash
    assert [v.hash for v in snapshot.services["fraud@1"].views] == [v.hash for v in service.views]


def test_a_chain_of_transforms_is_read_back(registry: Registry) -> None:
    """A transform is read back with those that it takes from, whatever their names and the order of the rows."""

    def halve(name: str, given: Selection | Outputs) -> OnDemandTransform:
        code = Code("halve", {MAIN: "def halve(x):\n    return x / 2\n"})
        return OnDemandTransform(name, {"x": given}, [Field("half", Float64)], code)

    first = halve("z", view()["wind"])
    last = halve("a", halve("m", first["half"])["half"])
    service = FeatureService("fraud", [last])
    registry.apply(declare(service), "ann", NOW_US)
    snapshot = registry.snapshot()
    assert list(snapshot.transforms) == ["a@1", "m@1", "z@1"]
    assert snapshot.services["fraud@1"].hash == service.hash
    assert snapshot.services["fraud@1"].transforms == service.transforms


def test_a_transform_that_breaks_its_contract_is_not_applied(registry: Registry) -> None:
    """One function that depends on its neighbours keeps the whole apply out."""
    code = Code("center", {MAIN: "def center(x):\n    return x - x.mean()\n"})
    bad = OnDemandTransform("center", {"x": view()["wind"]}, [Field("centered", Float64)], code)
    with pytest.raises(DefinitionError, match="center@1"):
        registry.apply(declare(FeatureService("fraud", [view(), bad])), "ann", NOW_US)
    assert registry.snapshot() == Snapshot()


def test_applying_again_changes_nothing(registry: Registry) -> None:
    """An apply of what is already stored adds no history, keeps the revision, and says that all is unchanged."""
    declared = declare(FeatureService("fraud", [view()]))
    assert set(actions(registry.apply(declared, "ann", NOW_US)).values()) == {"create"}
    before = registry.revision(), registry.history(), registry.snapshot()
    assert set(actions(registry.plan(declared)).values()) == {"unchanged"}
    assert set(actions(registry.apply(declared, "bob", NOW_US + 1)).values()) == {"unchanged"}
    assert (registry.revision(), registry.history(), registry.snapshot()) == before


def test_a_plan_writes_nothing(registry: Registry) -> None:
    """A plan says what an apply would do, and leaves the registry as it is."""
    plan = registry.plan(declare(view()))
    assert [str(change) for change in plan.changes] == ["create entity airport", "create feature view weather@1"]
    assert registry.revision() == 0
    assert registry.snapshot() == Snapshot()


def test_metadata_is_updated_in_place(registry: Registry) -> None:
    """Owner, description and tags may change under one version, which keeps its hash."""
    registry.apply(declare(view()), "ann", NOW_US)
    changed = view(owner="research", description="d", tags={"x": "y"})
    plan = registry.apply(declare(changed), "bob", NOW_US + 1)
    assert actions(plan) == {"airport": "unchanged", "weather@1": "update"}
    assert plan.writes[0].details == ("owner: 'ops' -> 'research'", "description: '' -> 'd'", "tags: x none -> 'y'")
    assert registry.snapshot().views["weather@1"] == changed
    assert changed.hash == view().hash


def test_what_is_no_longer_declared_is_kept(registry: Registry) -> None:
    """Definitions that left the files are reported as absent, and are still served."""
    registry.apply(declare(FeatureService("fraud", [view()]), view("user")), "ann", NOW_US)
    plan = registry.apply(declare(view("user")), "ann", NOW_US + 1)
    assert actions(plan) == {"airport": "unchanged", "user@1": "unchanged", "weather@1": "absent", "fraud@1": "absent"}
    assert set(registry.snapshot().views) == {"user@1", "weather@1"}
    assert set(registry.snapshot().services) == {"fraud@1"}


def test_a_new_version_stands_beside_the_old(registry: Registry) -> None:
    """A new version changes nothing of the old one; services stay with the versions that they name."""
    registry.apply(declare(FeatureService("fraud", [view()])), "ann", NOW_US)
    second = FeatureService("fraud", [view(version=2, ttl=None)], version=2)
    registry.apply(declare(second), "ann", NOW_US + 1)
    snapshot = registry.snapshot()
    assert snapshot.services["fraud@1"].views == (view(),)
    assert snapshot.services["fraud@2"].views == (view(version=2, ttl=None),)


# Conflicts


def test_a_conflict_lands_nothing(registry: Registry) -> None:
    """One conflict among many new definitions: it is named with its remedy, and none of them lands."""
    registry.apply(declare(view()), "ann", NOW_US)
    before = registry.snapshot(), registry.history()
    with pytest.raises(RegistryConflict, match=r"view weather@1 \(ttl: 3:00:00 -> none\).* raise version=") as caught:
        registry.apply(declare(view(ttl=None), *(view(f"v{i}") for i in range(20))), "ann", NOW_US + 1)
    assert [violation.field for violation in caught.value.violations] == ["weather@1"]
    assert (registry.snapshot(), registry.history()) == before


def test_an_entity_changes_with_its_views(registry: Registry) -> None:
    """Keys change under the same entity name once every declared view of it has a new version; old ones keep theirs."""
    registry.apply(declare(view()), "ann", NOW_US)
    rekeyed = Entity("airport", {"origin": String, "terminal": Int64})
    assert registry.plan(declare(view(entity=rekeyed))).conflicts
    plan = registry.apply(declare(view(version=2, entity=rekeyed)), "ann", NOW_US + 1)
    assert actions(plan) == {"airport": "update", "weather@1": "absent", "weather@2": "create"}
    snapshot = registry.snapshot()
    assert snapshot.views["weather@1"].entity == AIRPORT
    assert snapshot.views["weather@2"].entity == snapshot.entities["airport"] == rekeyed


def test_a_snapshot_does_not_change(registry: Registry) -> None:
    """A snapshot stays what it was when more is applied; the revision tells that there is a newer one."""
    registry.apply(declare(view()), "ann", NOW_US)
    old = registry.snapshot()
    assert old.revision == registry.revision() > 0
    registry.apply(declare(view(version=2)), "ann", NOW_US)
    assert list(old.views) == ["weather@1"]
    assert registry.revision() > old.revision
    with pytest.raises(TypeError):
        old.views["x@1"] = view()  # type: ignore[index]


# History and loads


def test_history(registry: Registry) -> None:
    """Every write is in the history: who, when, what, and how it differed."""
    registry.apply(declare(view()), "ann", NOW_US)
    registry.apply(declare(view(owner="x"), view(version=2)), "bob", NOW_US + 1)
    entries = [(e.at_us - NOW_US, e.who, e.kind, e.id, e.action, e.details) for e in registry.history()]
    assert entries == [
        (0, "ann", "entity", "airport", "created", ()),
        (0, "ann", "feature_view", "weather@1", "created", ()),
        (1, "bob", "feature_view", "weather@1", "updated", ("owner: 'ops' -> 'x'",)),
        (1, "bob", "feature_view", "weather@2", "created", ()),
    ]
    assert [e.id for e in registry.history("weather")] == ["weather@1", "weather@1", "weather@2"]
    (second,) = registry.history("weather@2")
    assert (second.hash, second.revision) == (view(version=2).hash, registry.revision())
    with pytest.raises(UnknownName, match="unknown definition 'wether'; did you mean 'weather'"):
        registry.history("wether")


def test_loads(registry: Registry) -> None:
    """Loads are kept in order, exactly as recorded, and are no change of a definition."""
    loads = [
        Load(f"{name}@1", NOW_US, NOW_US + 1, 2**40, 7, "weather/*.parquet", 0.125) for name in ("weather", "user")
    ]
    for load in loads:
        registry.record_load(load)
    assert registry.loads() == loads
    assert registry.loads("user@1") == loads[1:]
    assert registry.loads("none@1") == []
    assert registry.revision() == 0
