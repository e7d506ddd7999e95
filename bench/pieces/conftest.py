"""Fixtures of the pieces: something served, and how many keys are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.pieces.served import ENTITIES, NOW_US, Served, batch
from featserve.catalog import Snapshot
from featserve.definitions import Entity, FeatureService, FeatureView, Field
from featserve.engine import write
from featserve.plan import Plans
from featserve.store import open_store
from featserve.types import Float64, Int64


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    account = Entity("account", {"account_id": Int64})
    view = FeatureView("account", account, [Field(f"f{i}", Float64) for i in range(50)])
    service = FeatureService("score", [view])
    snapshot = Snapshot(
        entities={account.name: account}, views={view.id: view}, services={service.id: service}, revision=1
    )
    plans = Plans(snapshot)
    store = open_store(tmp_path_factory.mktemp("pieces") / "store", "write", block_cache_mb=64)
    write(store, plans.view("account"), batch(ENTITIES), NOW_US)
    yield Served(snapshot, plans, store)
    store.close()


@pytest.fixture(params=(1, 10, 100), ids=lambda keys: f"{keys}-keys")
def count(request: pytest.FixtureRequest) -> int:
    """Give each number of keys in turn."""
    keys: int = request.param
    return keys
