"""Fixtures of the pieces: something served, and how many keys are asked for. And what is kept of a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.pieces.served import ENTITIES, NOW_US, Served, batch
from featserve.catalog import Snapshot
from featserve.definitions import Entity, FeatureService, FeatureView, Field
from featserve.engine import write
from featserve.plan import Plans
from featserve.store import open_store
from featserve.types import Float64, Int64

MACHINE = ("machine", "python_implementation", "python_version", "system")
TIMES = ("min", "max", "mean", "stddev", "median", "iqr", "ops", "outliers", "rounds", "iterations")
"""What of its results pytest-benchmark compares."""


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


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave of the machine what times depend on."""
    cpu = machine_info["cpu"].get("brand_raw", "")
    kept = {name: machine_info[name] for name in MACHINE}
    machine_info.clear()
    machine_info.update(kept, cpu=cpu)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leave of the results what a comparison takes, so that a baseline can be kept beside the code."""
    del output_json["commit_info"]
    for found in output_json["benchmarks"]:
        del found["options"], found["extra_info"], found["params"]
        found["stats"] = {name: found["stats"][name] for name in TIMES}
