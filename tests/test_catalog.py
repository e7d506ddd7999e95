"""What a reference to a view or service means in a snapshot."""

from __future__ import annotations

from dataclasses import fields
from datetime import timedelta

import pytest

from featserve.catalog import Snapshot
from featserve.definitions import FeatureService
from featserve.errors import InvalidRequest, SchemaMismatch, UnknownName
from tests.declarations import declare, view


@pytest.fixture
def snapshot() -> Snapshot:
    views = [view(), view(version=2, ttl=None), view(version=10, ttl=timedelta(1)), view("user")]
    services = [FeatureService("fraud", [views[0]]), FeatureService("fraud", [views[2]], version=2)]
    declared = declare(*views, *services)
    return Snapshot(**{f.name: getattr(declared, f.name) for f in fields(declared)}, revision=7)


def test_references(snapshot: Snapshot) -> None:
    """A bare name means the highest version as a number; a version means itself; a hash means what is promoted."""
    assert snapshot.view("weather").id == "weather@10"
    assert snapshot.view("weather@2").id == "weather@2"
    assert snapshot.service("fraud").id == "fraud@2"
    assert snapshot.service("fraud@1").id == "fraud@1"
    promoted = snapshot.services["fraud@2"].hash
    assert snapshot.service(f"fraud#{promoted}").id == "fraud@2"
    assert snapshot.service(f"fraud#{promoted[:8]}").id == "fraud@2"


def test_a_hash_that_is_not_served_is_refused(snapshot: Snapshot) -> None:
    """Another hash is a mismatch that says what is served, and which version had it, if one did."""
    with pytest.raises(SchemaMismatch, match=r"is now fraud@2 with hash .*; fetch the schema of fraud@2"):
        snapshot.service("fraud#00000000")
    first = snapshot.services["fraud@1"].hash
    with pytest.raises(SchemaMismatch, match=r"is now fraud@2 .*; ask for fraud@1 to stay"):
        snapshot.service(f"fraud#{first}")


def test_unknown_names(snapshot: Snapshot) -> None:
    """A name or version that does not exist offers the nearest that do."""
    with pytest.raises(UnknownName, match="unknown feature service 'frod'; did you mean 'fraud'"):
        snapshot.service("frod")
    with pytest.raises(UnknownName, match=r"unknown feature service 'fraud@3'; did you mean 'fraud@[12]'"):
        snapshot.service("fraud@3")
    with pytest.raises(UnknownName, match="unknown feature view 'wether'; did you mean 'weather'"):
        snapshot.view("wether@2")
    with pytest.raises(UnknownName, match="there are none"):
        Snapshot().view("weather")


@pytest.mark.parametrize(
    "reference", ["", "@1", "fraud@", "fraud@0", "fraud@x", "fraud#abc", "fraud#XYZXYZXY", "a@1#0"]
)
def test_what_is_no_reference(snapshot: Snapshot, reference: str) -> None:
    """Anything else is an invalid request that says what a reference looks like."""
    with pytest.raises(InvalidRequest, match="is not name, name@version or name#hash"):
        snapshot.service(reference)


def test_a_view_is_not_asked_for_by_hash(snapshot: Snapshot) -> None:
    """Only services are pinned by hash."""
    with pytest.raises(InvalidRequest, match="only a feature service is asked for by hash"):
        snapshot.view("weather#00000000")
